// Package safepath opens and makes files below a directory that others may
// change at the same time: every look-up is one openat2 with RESOLVE_IN_ROOT
// and without magic links, and what was looked up is a descriptor, never a
// path that is looked up again.
//
// A root is any open directory, O_PATH included. Functions may be called
// concurrently; descriptors that they return belong to the caller and are
// close-on-exec.
package safepath

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

const resolve = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS

// maxRetries bounds openat2's EAGAIN, which it answers when a rename races
// with a look-up of "..".
const maxRetries = 128

func openat2(root *os.File, name string, flags int, mode uint32, res uint64) (int, error) {
	how := unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Mode: uint64(mode), Resolve: res}
	if name == "" {
		name = "."
	}
	for range maxRetries {
		fd, err := unix.Openat2(int(root.Fd()), name, &how)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: name, Err: err}
		}
		return fd, nil
	}
	return -1, &os.PathError{Op: "open", Path: name, Err: unix.EAGAIN}
}

// Open opens name below root, links included: absolute ones and ".." stay
// inside. flags are O_*; mode is used with O_CREAT.
func Open(root *os.File, name string, flags int, mode os.FileMode) (*os.File, error) {
	fd, err := openat2(root, name, flags, uint32(mode.Perm()), resolve)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path.Join(root.Name(), name)), nil
}

// OpenBeneath is Open for paths that must not lead outside: where Open would stay
// inside (an absolute link, ".." at the top) it is an error.
func OpenBeneath(root *os.File, name string, flags int, mode os.FileMode) (*os.File, error) {
	fd, err := openat2(root, name, flags, uint32(mode.Perm()), unix.RESOLVE_BENEATH|unix.RESOLVE_NO_MAGICLINKS)
	if errors.Is(err, unix.EXDEV) {
		return nil, fmt.Errorf("it leads out of the directory: %w", err)
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path.Join(root.Name(), name)), nil
}

// OpenParent opens the directory that holds name and gives the last component,
// which is not looked up: for making, removing and renaming.
func OpenParent(root *os.File, name string) (dir *os.File, base string, err error) {
	clean := path.Clean("/" + name)
	if clean == "/" {
		return nil, "", &os.PathError{Op: "open the parent of", Path: name, Err: unix.EINVAL}
	}
	parent, base := path.Split(clean)
	dir, err = Open(root, parent, unix.O_PATH|unix.O_DIRECTORY, 0)
	return dir, base, err
}

// MkdirAll makes the directory name and its parents and opens it (O_PATH).
// Existing links to directories are followed, inside; a link that leads nowhere
// is an error.
func MkdirAll(root *os.File, name string, mode os.FileMode) (*os.File, error) {
	if f, err := Open(root, name, unix.O_PATH|unix.O_DIRECTORY, 0); err == nil || !errors.Is(err, unix.ENOENT) {
		return f, err
	}
	parts := strings.Split(strings.Trim(path.Clean("/"+name), "/"), "/")
	cur, err := Open(root, "", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	for i := range parts {
		prefix := strings.Join(parts[:i+1], "/")
		next, err := Open(root, prefix, unix.O_PATH|unix.O_DIRECTORY, 0)
		if errors.Is(err, unix.ENOENT) {
			if err := unix.Mkdirat(int(cur.Fd()), parts[i], uint32(mode.Perm())); err != nil && err != unix.EEXIST {
				cur.Close()
				return nil, &os.PathError{Op: "mkdir", Path: prefix, Err: err}
			}
			next, err = Open(root, prefix, unix.O_PATH|unix.O_DIRECTORY, 0)
		}
		cur.Close()
		if err != nil {
			return nil, err
		}
		cur = next
	}
	return cur, nil
}

// Mkdir makes one directory; its parent must exist.
func Mkdir(root *os.File, name string, mode os.FileMode) error {
	return inParent(root, name, "mkdir", func(dir int, base string) error {
		return unix.Mkdirat(dir, base, uint32(mode.Perm()))
	})
}

// Mknod makes a node; mode has the type's S_IF bits.
func Mknod(root *os.File, name string, mode uint32, dev uint64) error {
	return inParent(root, name, "mknod", func(dir int, base string) error {
		return unix.Mknodat(dir, base, mode, int(dev))
	})
}

// Symlink makes a link with that text, which is not looked at.
func Symlink(root *os.File, text, name string) error {
	return inParent(root, name, "symlink", func(dir int, base string) error {
		return unix.Symlinkat(text, dir, base)
	})
}

// Remove removes a file or an empty directory, never what a link leads to.
func Remove(root *os.File, name string) error {
	return inParent(root, name, "remove", func(dir int, base string) error {
		err := unix.Unlinkat(dir, base, 0)
		if err == unix.EISDIR {
			err = unix.Unlinkat(dir, base, unix.AT_REMOVEDIR)
		}
		return err
	})
}

func inParent(root *os.File, name, op string, f func(dir int, base string) error) error {
	dir, base, err := OpenParent(root, name)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := f(int(dir.Fd()), base); err != nil {
		return &os.PathError{Op: op, Path: name, Err: err}
	}
	return nil
}

// Create makes the regular file name anew (O_EXCL) and opens it for writing.
func Create(root *os.File, name string, mode os.FileMode) (*os.File, error) {
	dir, base, err := OpenParent(root, name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Openat(int(dir.Fd()), base, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, uint32(mode.Perm()))
	if err != nil {
		return nil, &os.PathError{Op: "create", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), path.Join(root.Name(), name)), nil
}

// Reopen opens what an O_PATH descriptor refers to, with other flags. proc must
// be procfs at /proc; this is made sure.
func Reopen(f *os.File, flags int) (*os.File, error) {
	proc, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/proc/self/fd", Err: err}
	}
	defer unix.Close(proc)
	var st unix.Statfs_t
	if err := unix.Fstatfs(proc, &st); err != nil || st.Type != unix.PROC_SUPER_MAGIC {
		return nil, fmt.Errorf("/proc is not procfs: %w", errors.Join(err, unix.EXDEV))
	}
	fd, err := unix.Openat(proc, fmt.Sprint(f.Fd()), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "reopen", Path: f.Name(), Err: err}
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
