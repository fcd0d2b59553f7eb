package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/lazy"
	"tenon.dev/tenon/internal/loop"
)

// lazyGrace is how long a lazy image's file stays that no image needs any more: it may
// have been given to somebody who is about to open it.
const lazyGrace = 5 * time.Minute

// Root returns the lower directories of a container's root, topmost first: those of
// Layers, or of a lazy image one, where its file is mounted; lazy tells. What is read
// there may have to be fetched.
func (s *Store) Root(ctx context.Context, img *Image) (dirs []string, isLazy bool, err error) {
	c := s.lazyOf(img)
	if c == nil {
		dirs, err = s.Layers(ctx, img)
		return dirs, false, err
	}
	s.touch(img.ID)
	dir, err := s.mountLazy(ctx, c)
	if err != nil {
		return nil, true, fmt.Errorf("image %s: %w", img.Ref(), err)
	}
	s.completeLater(img, c)
	return []string{dir}, true, nil
}

// lazyDisk is EROFS of a lazy image; "" if it is none.
func (s *Store) lazyDisk(ctx context.Context, img *Image) (string, error) {
	c := s.lazyOf(img)
	if c == nil {
		return "", nil
	}
	s.touch(img.ID)
	path, err := s.serveLazy(ctx, c)
	if err != nil {
		return "", fmt.Errorf("image %s: %w", img.Ref(), err)
	}
	s.completeLater(img, c)
	return path, nil
}

func (s *Store) lazyConfig() lazy.Config {
	cfg := s.cfg.Lazy
	return lazy.Config{RunDir: cfg.RunDir, Name: cfg.Name, Binary: cfg.Binary, Log: s.log}
}

// lazyRunning is the program's client if it runs, else nil: it is not started.
func (s *Store) lazyRunning(ctx context.Context) *lazy.Client {
	s.lazy.mu.Lock()
	client := s.lazy.client
	s.lazy.mu.Unlock()
	if client != nil || s.cfg.Lazy.RunDir == "" {
		return client
	}
	if _, err := lazy.Find(ctx, s.lazyConfig()); err != nil {
		return nil
	}
	client, err := s.lazyClient(ctx, nil)
	if err != nil {
		s.log.Warn("lazy images not found again", "err", err)
	}
	return client
}

// EndLazy ends the program and unmounts what is mounted of lazy images, for a daemon
// that goes with all it has: nothing may use them.
func (s *Store) EndLazy(ctx context.Context) error {
	if s.cfg.Lazy.RunDir == "" {
		return nil
	}
	err := errors.Join(s.detachDead(0), lazy.Clear(ctx, s.lazyConfig()))
	s.lazy.mu.Lock()
	s.lazy.client = nil
	s.lazy.mu.Unlock()
	return err
}

// lazyClient connects to the program, which is started if it does not run; gone is the
// client that did not answer.
func (s *Store) lazyClient(ctx context.Context, gone *lazy.Client) (*lazy.Client, error) {
	s.lazy.start.Lock()
	defer s.lazy.start.Unlock()
	s.lazy.mu.Lock()
	client := s.lazy.client
	s.lazy.mu.Unlock()
	if client != nil && client != gone {
		return client, nil
	}
	client, started, err := lazy.Start(ctx, s.lazyConfig())
	if err != nil {
		return nil, fmt.Errorf("lazy images: %w", err)
	}
	if started && gone != nil {
		s.log.Warn("tenon-lazy was gone and has been started again: what is mounted of lazy images reads no more")
	}
	s.lazy.mu.Lock()
	s.lazy.client = client
	s.lazy.mu.Unlock()
	alive := client.PID()
	if started {
		alive = 0 // whatever is mounted is another's, even one's of the same number
	}
	if err := s.detachDead(alive); err != nil {
		s.log.Warn("mounts of lazy images not removed", "err", err)
	}
	return client, nil
}

// serveLazy has the program show a chain's file, and returns its path.
func (s *Store) serveLazy(ctx context.Context, c *lazyChain) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	path, _, err := s.serveLocked(ctx, c)
	return path, err
}

func (s *Store) serveLocked(ctx context.Context, c *lazyChain) (string, *lazy.Client, error) {
	c.touch()
	client, err := s.lazyClient(ctx, nil)
	for try := 0; err == nil; try++ {
		var path string
		if path, err = s.show(ctx, client, c); err == nil {
			return path, client, nil
		}
		if !errdefs.IsUnavailable(err) || try == 2 || ctx.Err() != nil {
			break
		}
		client, err = s.lazyClient(ctx, client)
	}
	return "", nil, err
}

// show adds a chain to the program, unless it has it: it may know a credential that this
// process does not.
func (s *Store) show(ctx context.Context, client *lazy.Client, c *lazyChain) (string, error) {
	if c.pid == client.PID() || c.pid == 0 && c.auth == nil {
		switch list, err := client.State(ctx, c.id); {
		case err == nil && len(list) == 1:
			c.pid = client.PID()
			return client.Path(c.id), nil
		case err != nil && !errdefs.IsNotFound(err):
			return "", err
		}
	}
	access, err := s.access(c.source.Repository, c.auth)
	if err != nil {
		return "", err
	}
	path, err := client.Add(ctx, lazy.Chain{ID: c.id, File: s.lazyPath(c.id, "erofs"), Map: s.lazyPath(c.id, "map"), Blobs: c.source.Blobs}, access)
	if err != nil {
		return "", err
	}
	c.pid = client.PID()
	return path, nil
}

// mountLazy mounts a chain's file, if it is not yet, for all containers of the image.
func (s *Store) mountLazy(ctx context.Context, c *lazyChain) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	path, client, err := s.serveLocked(ctx, c)
	if err != nil {
		return "", err
	}
	at := filepath.Join(s.cfg.Lazy.MountDir, strconv.Itoa(client.PID()), c.id.Encoded())
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err == nil && st.Type == unix.EROFS_SUPER_MAGIC_V1 {
		return at, nil
	}
	if err := os.MkdirAll(at, 0o711); err != nil {
		return "", err
	}
	if err := mountEROFS(path, at); err != nil {
		return "", err
	}
	return at, nil
}

// mountEROFS mounts a file's file system: as it is where the kernel can, else by a loop
// device, which goes with the mount.
func mountEROFS(path, at string) error {
	const flags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOATIME
	err := unix.Mount(path, at, "erofs", flags, "")
	if errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.EINVAL) {
		err = mountByLoop(path, at, flags)
	}
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("lazy image: this kernel has no EROFS (modprobe erofs); pull it without --lazy: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("lazy image: %w", &os.PathError{Op: "mount", Path: at, Err: err})
	}
	// Containers that share mounts with the host have no use for it.
	if err := unix.Mount("", at, "", unix.MS_PRIVATE, ""); err != nil {
		return &os.PathError{Op: "make private", Path: at, Err: err}
	}
	return nil
}

// mountByLoop is for kernels before 6.12.
func mountByLoop(path, at string, flags uintptr) error {
	dev, err := loop.Attach(path, true)
	if err != nil {
		return fmt.Errorf("this kernel mounts no files, and %w", err)
	}
	defer dev.Close()
	return unix.Mount(dev.Name(), at, "erofs", flags, "")
}

// detachDead unmounts what was mounted of other programs than pid's.
func (s *Store) detachDead(pid int) error {
	ents, err := os.ReadDir(s.cfg.Lazy.MountDir)
	if isNotExist(err) {
		return nil
	}
	errs := []error{err}
	for _, e := range ents {
		if e.Name() == strconv.Itoa(pid) {
			continue
		}
		dir := filepath.Join(s.cfg.Lazy.MountDir, e.Name())
		chains, err := os.ReadDir(dir)
		errs = append(errs, err)
		for _, c := range chains {
			errs = append(errs, unmountLazy(filepath.Join(dir, c.Name())))
		}
		errs = append(errs, os.Remove(dir))
	}
	return errors.Join(errs...)
}

// unmountLazy unmounts a chain's file; whoever has it in a root keeps it.
func unmountLazy(at string) error {
	for {
		err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err == unix.EINVAL || err == unix.ENOENT {
			break
		}
		if err != nil {
			return &os.PathError{Op: "unmount", Path: at, Err: err}
		}
	}
	if err := os.Remove(at); err != nil && !isNotExist(err) {
		return err
	}
	return nil
}

// completeLater completes an image in the background, some time after its first use.
func (s *Store) completeLater(img *Image, c *lazyChain) {
	if s.cfg.Lazy.CompleteAfter <= 0 {
		return
	}
	s.lazy.mu.Lock()
	defer s.lazy.mu.Unlock()
	if c.asked {
		return
	}
	c.asked = true
	s.wg.Go(func() {
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(s.cfg.Lazy.CompleteAfter):
		}
		if _, err := s.Resolve(s.ctx, img.ID, &img.Platform); err != nil {
			return // it was removed
		}
		err := s.Complete(s.ctx, img)
		if err != nil && s.ctx.Err() == nil {
			s.log.Warn("lazy image not completed: its files go on coming when they are read", "image", img.Ref(), "err", err)
		}
		if err != nil {
			s.lazy.mu.Lock()
			c.asked = false // the next use asks again
			s.lazy.mu.Unlock()
		}
	})
}

// Complete brings here what a lazy image has left at its registry: it is like others
// then. It does nothing for those. Errors are Pull's.
func (s *Store) Complete(ctx context.Context, img *Image) error {
	if s.lazyOf(img) == nil {
		return nil
	}
	end, err := s.begin()
	if err != nil {
		return err
	}
	defer end()
	return s.complete1(ctx, img)
}

// complete1 is Complete, within an operation.
func (s *Store) complete1(ctx context.Context, img *Image) error {
	c := s.lazyOf(img)
	if c == nil {
		return nil
	}
	unlock, err := s.locks.lock(ctx, "complete "+img.ChainID.String())
	if err != nil {
		return err
	}
	defer unlock()
	if s.whole(img) {
		return nil // another has done it meanwhile
	}
	ctx, cancel := context.WithCancel(log.WithLogger(ctx, quiet))
	defer cancel()
	stop := context.AfterFunc(s.ctx, cancel)
	defer stop()
	from, auth := c.from()
	named, err := reference.ParseNormalizedNamed(from)
	if err != nil {
		return err
	}
	began := time.Now()
	fetcher, err := s.resolver(auth, nil).Fetcher(ctx, from+"@"+img.Manifest.Digest.String())
	if err == nil {
		_, err = s.newPuller(fetcher, serial(nil)).layers(ctx, img)
	}
	if err != nil {
		return fmt.Errorf("image %s is lazy, and its layers are needed now: %w", img.Ref(), registryError("pull", reference.FamiliarName(named), err))
	}
	if err := s.update(func(b *batch) error { b.saveLayers(img.ChainIDs); return nil }); err != nil {
		return err
	}
	s.flushSoon()
	s.wg.Go(func() { // an operation keeps the store open
		select {
		case <-time.After(lazyGrace + time.Second):
			s.gcSoon()
		case <-s.ctx.Done():
		}
	})
	s.log.Debug("lazy image completed", "image", img.Ref(), "took", time.Since(began))
	return nil
}

// from is the repository that the layers are in, and the credentials that are known
// for it.
func (c *lazyChain) from() (repository string, auth *registry.AuthConfig) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.source.Repository, c.auth
}

// CompleteTarget is Complete by what a name stands for, for the default platform. Targets
// that are no image are left alone.
func (s *Store) CompleteTarget(ctx context.Context, target digest.Digest) error {
	s.lazy.mu.Lock()
	n := len(s.lazy.chains)
	s.lazy.mu.Unlock()
	if n == 0 {
		return nil
	}
	img, err := s.Resolve(ctx, target.String(), nil)
	if err != nil {
		return nil
	}
	return s.Complete(ctx, img)
}

// completeBlob completes the lazy image of a repository that a blob is a layer of.
func (s *Store) completeBlob(r *Repositories, repo string, d digest.Digest) error {
	s.lazy.mu.Lock()
	n := len(s.lazy.chains)
	s.lazy.mu.Unlock()
	if n == 0 || s.hasBlob(d, -1) {
		return nil
	}
	roots, _ := r.roots(repo, "")
	for _, t := range roots {
		if r.find([]ocispec.Descriptor{t}, d, false) == nil {
			continue
		}
		if err := s.CompleteTarget(s.ctx, t.Digest); err != nil {
			return err
		}
	}
	return nil
}

// superseded tells whether all that a lazy image stands for is here otherwise.
func (s *Store) superseded(c *lazyChain) bool {
	if !s.hasLayer(c.source.Chain) {
		return false
	}
	for _, b := range c.source.Blobs {
		if !s.hasBlob(b.Digest, b.Size) {
			return false
		}
	}
	return true
}

// collectLazy removes lazy images' files that no image needs, or not any more: its
// layers are here. Who has one open goes on reading. The gate must be held alone.
// ids are those that images need.
func (s *Store) collectLazy(ids map[digest.Digest]bool, trash func(path string)) {
	s.lazy.mu.Lock()
	var gone []*lazyChain
	for id, c := range s.lazy.chains {
		if !ids[id] || s.superseded(c) && time.Since(c.lastUse()) > lazyGrace {
			gone = append(gone, c)
		}
	}
	left := len(s.lazy.chains) - len(gone)
	s.lazy.mu.Unlock()
	if len(gone) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, 15*time.Second)
	defer cancel()
	client := s.lazyRunning(ctx)
	for _, c := range gone {
		if client != nil {
			if err := unmountLazy(filepath.Join(s.cfg.Lazy.MountDir, strconv.Itoa(client.PID()), c.id.Encoded())); err != nil {
				s.log.Warn("lazy image not unmounted", "err", err)
			}
			if err := client.Remove(ctx, c.id); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) {
				s.log.Warn("lazy image not removed", "chain", c.id.String(), "err", err)
				continue
			}
		}
		s.lazy.mu.Lock()
		delete(s.lazy.chains, c.id)
		s.lazy.mu.Unlock()
		trash(s.lazyPath(c.id, ""))
	}
	if left == 0 && client != nil {
		if err := client.Quit(ctx, false); err == nil {
			s.lazy.mu.Lock()
			s.lazy.client = nil
			s.lazy.mu.Unlock()
		} else if !errdefs.IsFailedPrecondition(err) {
			s.log.Debug("tenon-lazy not ended", "err", err)
		}
	}
}
