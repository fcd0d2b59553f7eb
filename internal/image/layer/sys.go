package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

func eintr(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

func openat(dir int, name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_CLOEXEC, mode)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// openIn opens a name that is resolved as if root were "/".
func openIn(root int, name string, flags uint64) (int, error) {
	for {
		fd, err := unix.Openat2(root, name, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: resolveInRoot})
		// EAGAIN: a rename elsewhere on the machine raced with the ".." walk.
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}

func pwrite(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return errShort
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

func futimens(fd int, ts [2]unix.Timespec) error {
	_, _, e := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	if e != 0 {
		return os.NewSyscallError("utimensat", e)
	}
	return nil
}

// umask is the process's, read once and without changing it.
var umask = sync.OnceValue(func() uint32 {
	b, err := os.ReadFile("/proc/self/status")
	if err == nil {
		for l := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(l, "Umask:"); ok {
				if n, err := strconv.ParseUint(strings.TrimSpace(v), 8, 32); err == nil {
					return uint32(n)
				}
			}
		}
	}
	return 0o777 // unknown: every mode is set explicitly
})

func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// keepXattr tells which extended attributes an image may set. Overlay's own
// would let a layer redirect names, and the others of trusted and security are
// the host's business.
func keepXattr(name string) bool {
	switch {
	case name == "security.capability", name == "system.posix_acl_access", name == "system.posix_acl_default":
		return true
	case strings.HasPrefix(name, "user.overlay."):
		return false
	}
	return strings.HasPrefix(name, "user.")
}

// xattrs calls set for each attribute to keep. A file system that cannot hold
// an attribute is not an error, as with tar.
func xattrs(hdr *tar.Header, set func(name string, val []byte) error) error {
	for k, v := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(k, paxXattr)
		if !ok || !keepXattr(name) {
			continue
		}
		err := set(name, []byte(v))
		if err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("layer entry %.200q: set attribute %.100q: %w", hdr.Name, name, err)
		}
	}
	return nil
}

// fdAttrs sets owner, mode (only if force, or if changing the owner has
// cleared bits) and attributes of an open file or directory.
func fdAttrs(fd int, hdr *tar.Header, force bool) error {
	if hdr.Uid != 0 || hdr.Gid != 0 || force {
		if err := unix.Fchown(fd, hdr.Uid, hdr.Gid); err != nil {
			return fmt.Errorf("layer entry %.200q: chown: %w", hdr.Name, err)
		}
	}
	if force {
		if err := unix.Fchmod(fd, uint32(hdr.Mode&0o7777)); err != nil {
			return fmt.Errorf("layer entry %.200q: chmod: %w", hdr.Name, err)
		}
	}
	return xattrs(hdr, func(n string, v []byte) error { return unix.Fsetxattr(fd, n, v, 0) })
}

// nodeAttrs does the same for what cannot be opened: symlinks, devices, pipes.
func (x *unpacker) nodeAttrs(p *dirHandle, base string, hdr *tar.Header) error {
	if hdr.Uid != 0 || hdr.Gid != 0 || p.setgid {
		if err := unix.Fchownat(p.fd, base, hdr.Uid, hdr.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("layer entry %.200q: chown: %w", hdr.Name, err)
		}
	}
	if hdr.Typeflag != tar.TypeSymlink {
		// The name was just made by us in a directory nobody else uses, and
		// is no symlink, so following it changes nothing.
		if err := unix.Fchmodat(p.fd, base, uint32(hdr.Mode&0o7777), 0); err != nil {
			return fmt.Errorf("layer entry %.200q: chmod: %w", hdr.Name, err)
		}
	}
	err := xattrs(hdr, func(n string, v []byte) error {
		return unix.Lsetxattr("/proc/self/fd/"+strconv.Itoa(p.fd)+"/"+base, n, v, 0)
	})
	if err != nil {
		return err
	}
	ts := times(hdr)
	if err := unix.UtimesNanoAt(p.fd, base, ts[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("layer entry %.200q: set times: %w", hdr.Name, err)
	}
	return nil
}

// removeAll removes a name and all below it, following nothing.
func removeAll(dir int, name string) error {
	err := eintr(func() error { return unix.Unlinkat(dir, name, 0) })
	if err == nil || err == unix.ENOENT {
		return nil
	}
	if err != unix.EISDIR && err != unix.EPERM {
		return err
	}
	fd, err := openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	names, err := f.Readdirnames(-1)
	for _, n := range names {
		if err := removeAll(fd, n); err != nil {
			f.Close()
			return err
		}
	}
	f.Close()
	if err != nil {
		return err
	}
	return eintr(func() error { return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR) })
}

// SpreadChildren asks ext4 to put each directory made in dir into a block group
// of its own (the "top of directory hierarchy" flag). Layers are made and
// deleted by the thousand files, and ext4 is many times slower at making files
// in a group where inodes have been deleted in the last minutes. Other file
// systems have no such flag, and need none.
func SpreadChildren(dir string) {
	const topdir = 0x00020000 // FS_TOPDIR_FL
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err == nil && flags&topdir == 0 {
		_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags|topdir) // a hint
	}
}
