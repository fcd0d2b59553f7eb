package safepath

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// maxDepth bounds the recursion of CopyTree: each level holds two descriptors.
const maxDepth = 256

// inode identifies a file for hard links.
type inode struct{ dev, ino uint64 }

// CopyTree copies what is in the directory from into the directory to, which
// should be empty: owners, modes, times, extended attributes, links, devices
// and hard links. It does not cross into other mounts' roots below from except
// by copying what they show, and follows no symbolic link.
func CopyTree(from, to *os.File) error {
	c := copier{links: map[inode]string{}}
	src, err := unix.Openat(int(from.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: from.Name(), Err: err}
	}
	defer unix.Close(src)
	dst, err := unix.Openat(int(to.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: to.Name(), Err: err}
	}
	defer unix.Close(dst)
	c.top = dst
	var st unix.Stat_t
	if err := unix.Fstat(src, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if err := c.dir(src, dst, ".", 0); err != nil {
		return err
	}
	return c.meta(src, dst, &st)
}

// CopyAttributes gives one file or directory the owner, mode, times and extended
// attributes of another, but for those that are overlay's own.
func CopyAttributes(to, from *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(from.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	return (&copier{}).meta(int(from.Fd()), int(to.Fd()), &st)
}

type copier struct {
	top   int
	links map[inode]string // to the path below top
}

func (c *copier) dir(src, dst int, at string, depth int) error {
	if depth > maxDepth {
		return &os.PathError{Op: "copy", Path: at, Err: unix.ENAMETOOLONG}
	}
	fd, err := unix.Openat(src, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: at, Err: err}
	}
	f := os.NewFile(uintptr(fd), at)
	names, err := f.Readdirnames(-1)
	f.Close()
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := c.entry(src, dst, name, path.Join(at, name), depth); err != nil {
			return fmt.Errorf("copy %s: %w", path.Join(at, name), err)
		}
	}
	return nil
}

func (c *copier) entry(src, dst int, name, at string, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(src, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err == unix.ENOENT {
			return nil // gone meanwhile
		}
		return err
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		id := inode{uint64(st.Dev), st.Ino}
		if first, ok := c.links[id]; ok {
			return unix.Linkat(c.top, first, dst, name, 0)
		}
		c.links[id] = at
	}
	switch kind {
	case unix.S_IFDIR:
		if err := unix.Mkdirat(dst, name, 0o700); err != nil {
			return err
		}
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(src, name, buf)
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(string(buf[:n]), dst, name); err != nil {
			return err
		}
		if err := unix.Fchownat(dst, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		ts := []unix.Timespec{st.Atim, st.Mtim}
		return unix.UtimesNanoAt(dst, name, ts, unix.AT_SYMLINK_NOFOLLOW)
	case unix.S_IFREG:
	default:
		if err := unix.Mknodat(dst, name, st.Mode, int(st.Rdev)); err != nil {
			return err
		}
		if err := unix.Fchownat(dst, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		// The name is new and ours: it is no link.
		if err := unix.Fchmodat(dst, name, st.Mode&0o7777, 0); err != nil {
			return err
		}
		return unix.UtimesNanoAt(dst, name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
	}
	flags := unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	if kind == unix.S_IFDIR {
		flags |= unix.O_DIRECTORY
	}
	s, err := unix.Openat(src, name, flags, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	if kind == unix.S_IFDIR {
		d, err := unix.Openat(dst, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(d)
		if err := c.dir(s, d, at, depth+1); err != nil {
			return err
		}
		return c.meta(s, d, &st)
	}
	// What was a file may be something else by now.
	var now unix.Stat_t
	if err := unix.Fstat(s, &now); err != nil {
		return err
	}
	if now.Mode&unix.S_IFMT != unix.S_IFREG {
		return unix.ESTALE
	}
	d, err := unix.Openat(dst, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	in, out := os.NewFile(uintptr(dup(s)), at), os.NewFile(uintptr(dup(d)), at)
	_, err = io.Copy(out, in)
	in.Close()
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = c.meta(s, d, &st)
	}
	unix.Close(d)
	return err
}

func dup(fd int) int {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1 // the file made of it fails with EBADF
	}
	return n
}

// meta copies owner, mode, attributes and times, in the order in which none
// undoes another.
func (c *copier) meta(src, dst int, st *unix.Stat_t) error {
	if err := unix.Fchown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return os.NewSyscallError("fchown", err)
	}
	if err := unix.Fchmod(dst, st.Mode&0o7777); err != nil {
		return os.NewSyscallError("fchmod", err)
	}
	if err := xattrs(src, dst); err != nil {
		return err
	}
	ts := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(dst, "", ts, unix.AT_EMPTY_PATH); err != nil {
		return os.NewSyscallError("utimensat", err)
	}
	return nil
}

func xattrs(src, dst int) error {
	n, err := unix.Flistxattr(src, nil)
	if err != nil || n == 0 {
		if errors.Is(err, unix.ENOTSUP) {
			err = nil
		}
		return err
	}
	list := make([]byte, n+256)
	if n, err = unix.Flistxattr(src, list); err != nil {
		return os.NewSyscallError("flistxattr", err)
	}
	for list = list[:n]; len(list) > 0; {
		i := 0
		for i < len(list) && list[i] != 0 {
			i++
		}
		name := string(list[:i])
		list = list[min(i+1, len(list)):]
		if strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		val := make([]byte, 64<<10) // the kernel's largest
		m, err := unix.Fgetxattr(src, name, val)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("fgetxattr", err)
		}
		if err := unix.Fsetxattr(dst, name, val[:m], 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("fsetxattr %s: %w", name, err)
		}
	}
	return nil
}
