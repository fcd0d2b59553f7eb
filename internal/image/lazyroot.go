package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/lazy"
	"tenon.dev/tenon/internal/image/lazy/remote"
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

// lazyStart is the lock of starts and ends of the program.
const lazyStart = "lazy start"

// lazyClient connects to the program, which is started if it does not run; gone is the
// client that did not answer.
func (s *Store) lazyClient(ctx context.Context, gone *lazy.Client) (*lazy.Client, error) {
	unlock, err := s.locks.lock(ctx, lazyStart)
	if err != nil {
		return nil, err
	}
	defer unlock()
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
	unlock, err := s.serving(ctx, c)
	if err != nil {
		return "", err
	}
	defer unlock()
	path, _, err := s.serveLocked(ctx, c)
	return path, err
}

// serving is the lock of what is said to the program about a chain, and of its mount.
func (s *Store) serving(ctx context.Context, c *lazyChain) (unlock func(), err error) {
	return s.locks.lock(ctx, "serve "+c.id.String())
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
	added := func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.pid = client.PID()
	}
	c.mu.Lock()
	source, auths, pid := c.source, maps.Clone(c.auths), c.pid
	c.mu.Unlock()
	if pid == client.PID() || pid == 0 && len(auths) == 0 {
		switch list, err := client.State(ctx, c.id); {
		case err == nil && len(list) == 1:
			added()
			return client.Path(c.id), nil
		case err != nil && !errdefs.IsNotFound(err):
			return "", err
		}
	}
	var access remote.Access
	for i, from := range source.repositories() {
		a, err := s.access(from, auths[from])
		if err != nil {
			return "", err
		}
		if i == 0 {
			access = a
			continue
		}
		for _, h := range a.Hosts {
			h.Repository = a.Repository
			access.Hosts = append(access.Hosts, h)
		}
	}
	path, err := client.Add(ctx, lazy.Chain{ID: c.id, File: s.lazyPath(c.id, "erofs"), Map: s.lazyPath(c.id, "map"), Blobs: source.Blobs}, access)
	if err != nil {
		return "", err
	}
	added()
	return path, nil
}

// mountLazy mounts a chain's file, if it is not yet, for all containers of the image.
// If the context ends before that is done, it is done for the next one.
func (s *Store) mountLazy(ctx context.Context, c *lazyChain) (string, error) {
	unlock, err := s.serving(ctx, c)
	if err != nil {
		return "", err
	}
	var at string
	done := make(chan error, 1)
	go func() { // it ends in lazy.ReadTimeout, or when the program does
		defer unlock()
		var err error
		at, err = s.mountLocked(ctx, c)
		if err == nil && ctx.Err() != nil && !s.hasLazy(c.id) { // it was collected meanwhile
			err = unmountLazy(at)
		}
		done <- err
	}()
	select {
	case err := <-done:
		return at, err
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

func (s *Store) mountLocked(ctx context.Context, c *lazyChain) (string, error) {
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

// collectLazy removes lazy images' files that no image needs, or not any more: its
// layers are here. Who has one open goes on reading. The gate must be held alone; the
// program hears of it by settleLazy. ids are those that images need.
func (s *Store) collectLazy(ids map[digest.Digest]bool, trash func(path string)) {
	s.lazy.mu.Lock()
	var gone []*lazyChain
	for id, c := range s.lazy.chains {
		if !ids[id] || s.superseded(c) && time.Since(c.lastUse()) > lazyGrace {
			gone = append(gone, c)
			delete(s.lazy.chains, id)
		}
	}
	s.lazy.mu.Unlock()
	for _, c := range gone {
		s.unmountCollected(c.id)
		trash(s.lazyPath(c.id, ""))
	}
}

// unmountCollected unmounts a chain's file, whichever program shows it.
func (s *Store) unmountCollected(id digest.Digest) {
	ents, err := os.ReadDir(s.cfg.Lazy.MountDir)
	if err != nil {
		return // nothing was ever mounted
	}
	for _, e := range ents {
		if err := unmountLazy(filepath.Join(s.cfg.Lazy.MountDir, e.Name(), id.Encoded())); err != nil {
			s.log.Warn("lazy image not unmounted", "err", err)
		}
	}
}

func (s *Store) hasLazy(id digest.Digest) bool {
	s.lazy.mu.Lock()
	defer s.lazy.mu.Unlock()
	return s.lazy.chains[id] != nil
}

const (
	// settleTime bounds settleLazy.
	settleTime = 15 * time.Second
	// maxEndDelay is how long an idle program stays behind its last reader.
	maxEndDelay = time.Minute
)

// settleLazy has the program show no more what was collected, and ends it if that was
// all and nobody reads any more. What fails is tried again after the next collection.
// The gate must not be held: the program may hang.
func (s *Store) settleLazy() {
	if s.cfg.Lazy.RunDir == "" {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, settleTime)
	defer cancel()
	client := s.lazyRunning(ctx)
	if client == nil {
		return
	}
	list, err := client.State(ctx, "")
	if err != nil {
		s.log.Debug("tenon-lazy does not say what it shows", "err", err)
	}
	for _, st := range list {
		if s.hasLazy(st.ID) {
			continue
		}
		if err := s.hideLazy(ctx, client, st.ID); err != nil && !errdefs.IsUnavailable(err) {
			s.log.Warn("lazy image not removed", "chain", st.ID.String(), "err", err)
		}
	}
	switch err := s.quitLazy(ctx, client); {
	case errdefs.IsFailedPrecondition(err):
		s.endLater()
	case err != nil:
		s.log.Debug("tenon-lazy not ended", "err", err)
	}
}

// endLater ends the program once nobody reads any more, unless there are lazy images
// again. It is called within what the store waits for.
func (s *Store) endLater() {
	s.lazy.mu.Lock()
	defer s.lazy.mu.Unlock()
	if s.lazy.ending {
		return
	}
	s.lazy.ending = true
	s.wg.Go(func() {
		defer func() {
			s.lazy.mu.Lock()
			defer s.lazy.mu.Unlock()
			s.lazy.ending = false
		}()
		for delay := 250 * time.Millisecond; ; delay = min(2*delay, maxEndDelay) {
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(delay):
			}
			s.lazy.mu.Lock()
			client := s.lazy.client
			s.lazy.mu.Unlock()
			if client == nil {
				return
			}
			ctx, cancel := context.WithTimeout(s.ctx, settleTime)
			err := s.quitLazy(ctx, client)
			cancel()
			if !errdefs.IsFailedPrecondition(err) {
				return
			}
		}
	})
}

// hideLazy has the program show a chain no more, unless it is there again.
func (s *Store) hideLazy(ctx context.Context, client *lazy.Client, id digest.Digest) error {
	unlock, err := s.serving(ctx, &lazyChain{id: id})
	if err != nil {
		return err
	}
	defer unlock()
	if s.hasLazy(id) {
		return nil
	}
	s.unmountCollected(id) // it may have been about to be mounted
	return client.Remove(ctx, id)
}

// quitLazy ends the program if there are no lazy images. Whoever is about to use one has
// noted it before asking for the client, which waits for this.
func (s *Store) quitLazy(ctx context.Context, client *lazy.Client) error {
	unlock, err := s.locks.lock(ctx, lazyStart)
	if err != nil {
		return err
	}
	defer unlock()
	s.lazy.mu.Lock()
	left, now := len(s.lazy.chains), s.lazy.client
	s.lazy.mu.Unlock()
	if left > 0 || now != client {
		return nil
	}
	if err := client.Quit(ctx, false); err != nil {
		return err
	}
	s.lazy.mu.Lock()
	s.lazy.client = nil
	s.lazy.mu.Unlock()
	return nil
}
