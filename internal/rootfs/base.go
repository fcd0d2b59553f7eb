package rootfs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// baseDirs and baseFiles are the mount points that every container needs and few
// images have, and what programs look for: /.dockerenv by which they know that they
// are in a container, and the list of mounts. They lie in a layer of their own below all of the image's, which
// hide it where they have the same: so that nothing has to be made in each
// container's writable layer, and copied up for it, before it can be mounted on.
var (
	baseDirs  = []string{"dev", "etc", "proc", "sys"}
	baseFiles = []string{".dockerenv", "etc/hostname", "etc/hosts", "etc/resolv.conf"}
	baseLinks = map[string]string{"etc/mtab": "/proc/mounts"}
)

// Base is the lowest layer of all roots, with the mount points that every container
// needs. It is never written to.
func (s *Store) Base() string { return s.base() }

// makeBase makes the lowest layer, or completes it. The directory that it lies in
// has nothing else in it: a container with ids of its own covers it by a mapped
// mount of itself (launch's idmapLayers).
func makeBase(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return err
	}
	for _, d := range append([]string{"."}, baseDirs...) {
		path := filepath.Join(dir, d)
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := os.Chmod(path, 0o755); err != nil { // whatever the daemon's umask
			return err
		}
	}
	for _, name := range baseFiles {
		path := filepath.Join(dir, name)
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Chmod(0o755), f.Close()); err != nil { // as Docker's, in exports too
			return err
		}
	}
	for name, to := range baseLinks {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}
