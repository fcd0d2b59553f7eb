package image

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/erofs"
)

// A virtual machine gets an image's files as one read-only file system, EROFS,
// in a file that all machines share:
//
//	<root>/erofs/<chain ID>
//
// It is made when it is first asked for, under another name, brought to the
// disk and renamed; it goes with the last image that ends in the chain.

func (s *Store) erofsDir() string { return filepath.Join(s.cfg.Root, "erofs") }

func (s *Store) erofsPath(chain digest.Digest) string {
	return filepath.Join(s.erofsDir(), chain.Encoded())
}

// EROFS returns the file with the image's files as a read-only file system; ""
// for an image without layers. It is made once, whoever waits for it. Nobody may
// write to it. ResourceExhausted, and ENOSPC, if the disk is too small for it.
func (s *Store) EROFS(ctx context.Context, img *Image) (string, error) {
	if path, err := s.lazyDisk(ctx, img); path != "" || err != nil {
		return path, err
	}
	stack, err := s.Layers(ctx, img)
	if err != nil || len(stack) == 0 {
		return "", err
	}
	path := s.erofsPath(img.ChainID)
	if _, err := os.Lstat(path); err == nil {
		return path, nil
	}
	end, err := s.begin()
	if err != nil {
		return "", err
	}
	defer end()
	unlock, err := s.locks.lock(ctx, "erofs "+img.ChainID.String())
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Lstat(path); err == nil {
		return path, nil // another has made it meanwhile
	}
	began := time.Now()
	if err := s.makeEROFS(ctx, path, img.ChainID, stack); err != nil {
		return "", fmt.Errorf("image %s: file system for virtual machines: %w", img.Ref(), err)
	}
	s.log.Debug("file system for virtual machines made", "image", img.Ref(), "took", time.Since(began))
	return path, nil
}

func (s *Store) makeEROFS(ctx context.Context, path string, chain digest.Digest, stack []string) (err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Root, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: s.cfg.Root, Err: err}
	}
	room := int64(st.Bavail)*st.Bsize - s.cfg.Limits.FreeBytes
	if room <= 0 {
		return fmt.Errorf("%d bytes of the disk must stay free: %w", s.cfg.Limits.FreeBytes, unix.ENOSPC)
	}
	tmp := filepath.Join(s.layerTmp(), rand.Text()) // what is there is discarded at the start
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			_ = os.Remove(tmp)
		}
	}()
	o := erofs.Options{MaxSize: room}
	sum := sha256.Sum256([]byte(chain))
	copy(o.UUID[:], sum[:])
	if err := erofs.Write(ctx, f, stack, o); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// erofsSize is what the chain's file takes on the disk; 0 if there is none.
func (s *Store) erofsSize(chain digest.Digest) int64 {
	var st unix.Stat_t
	if unix.Lstat(s.erofsPath(chain), &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// collectEROFS calls trash for each file of a chain that is not needed.
func (s *Store) collectEROFS(chains map[digest.Digest]bool, trash func(path string)) error {
	ents, err := os.ReadDir(s.erofsDir())
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	for c := range chains {
		keep[c.Encoded()] = true
	}
	for _, e := range ents {
		if !keep[e.Name()] {
			trash(filepath.Join(s.erofsDir(), e.Name()))
		}
	}
	return nil
}
