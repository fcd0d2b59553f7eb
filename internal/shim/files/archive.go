package files

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// archiver writes entries of a tree to a tar stream.
type archiver struct {
	tw    *tar.Writer
	s     *session
	links map[inode]string // first names of files with several
	buf   []byte
	// skip, if not nil, leaves out a path of the container and what is below.
	skip func(p string) bool
	// mount, if not 0, is the mount to stay on.
	mount uint64
}

type inode struct{ dev, ino uint64 }

// copyBuffer is how much of a file is read at once.
const copyBuffer = 128 << 10

func (s *session) archiver(w io.Writer) *archiver {
	return &archiver{tw: tar.NewWriter(w), s: s, links: map[inode]string{}, buf: make([]byte, copyBuffer)}
}

// archive writes path p by Docker's rules: entries begin with its last element.
func (s *session) archive(w io.Writer, p string) error {
	dir, base := split(p)
	fd, err := s.openDir(dir)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	name := rename(p)
	if name == "/" {
		name = ""
	}
	a := s.archiver(w)
	var st unix.Stat_t
	if err := unix.Fstatat(fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return pathError("stat", p, err)
	}
	if err := a.add(fd, base, name, path.Join("/", p), &st); err != nil {
		return err
	}
	return a.tw.Close()
}

// export writes the whole root.
func (s *session) export(w io.Writer) error {
	a := s.archiver(w)
	skip := map[string]bool{}
	for _, p := range s.f.Skip {
		skip[path.Join("/", p)] = true
	}
	a.skip = func(p string) bool { return skip[p] }
	var stx unix.Statx_t
	if err := unix.Statx(s.root, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &stx); err == nil && stx.Mask&unix.STATX_MNT_ID != 0 {
		a.mount = stx.Mnt_id
	}
	fd, err := s.openDir("/")
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := a.children(fd, "", "/"); err != nil {
		return err
	}
	return a.tw.Close()
}

// enterExport makes the root alone, without volumes, this thread's.
func (s *session) enterExport() error {
	if r := s.f.Root; r != nil && len(r.Mounts) > 0 {
		s.r.UIDMap, s.r.GIDMap = nil, nil // layers hold the ids that the container sees
		if err := s.private(); err != nil {
			return err
		}
		if err := s.mountRoot(false, false); err != nil {
			return err
		}
		return s.openRoot()
	}
	return s.enter(false)
}

// add writes base in dir, and what is below it, as name. p is its path in the
// container.
func (a *archiver) add(dir int, base, name, p string, st *unix.Stat_t) error {
	if a.skip != nil && a.skip(p) && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	if st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		return nil // tar has no word for it
	}
	fd := -1
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR, unix.S_IFREG:
		flags := unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC | unix.O_NOATIME
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			flags |= unix.O_DIRECTORY
		}
		var err error
		fd, err = unix.Openat(dir, base, flags, 0)
		if err == unix.EPERM {
			fd, err = unix.Openat(dir, base, flags&^unix.O_NOATIME, 0)
		}
		if err != nil {
			return gone(pathError("open", p, err))
		}
		defer unix.Close(fd)
		was := st.Mode & unix.S_IFMT
		if err := unix.Fstat(fd, st); err != nil {
			return pathError("stat", p, err)
		}
		if st.Mode&unix.S_IFMT != was {
			return nil // replaced meanwhile
		}
	}
	if err := a.entry(dir, fd, base, name, st); err != nil {
		return fmt.Errorf("archive %s: %w", p, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || a.skip != nil && a.skip(p) {
		return nil
	}
	return a.children(fd, name+"/", p)
}

// gone ignores what vanished while it was looked at.
func gone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return err
}

// children writes what is in the directory fd.
func (a *archiver) children(fd int, prefix, p string) error {
	names, err := list(fd)
	if err != nil {
		return pathError("read", p, err)
	}
	for _, n := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, n, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			if gone(err) == nil {
				continue
			}
			return pathError("stat", path.Join(p, n), err)
		}
		if a.mount != 0 {
			var stx unix.Statx_t
			if err := unix.Statx(fd, n, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_MNT_ID, &stx); err == nil && stx.Mnt_id != a.mount {
				if st.Mode&unix.S_IFMT == unix.S_IFDIR {
					h := a.header(prefix+n, &st)
					if err := a.tw.WriteHeader(h); err != nil {
						return err
					}
				}
				continue
			}
		}
		if err := a.add(fd, n, prefix+n, path.Join(p, n), &st); err != nil {
			return err
		}
	}
	return nil
}

// list returns a directory's names in order.
func list(fd int) ([]string, error) {
	dup, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(dup), "dir")
	defer f.Close()
	names, err := f.Readdirnames(-1)
	sort.Strings(names)
	return names, err
}

// header is st's, but for the type's own parts.
func (a *archiver) header(name string, st *unix.Stat_t) *tar.Header {
	h := &tar.Header{
		Name: name, Mode: int64(st.Mode & 0o7777), ModTime: mtime(st), Format: tar.FormatPAX,
		Uid: mapID(a.s.r.UIDMap, st.Uid), Gid: mapID(a.s.r.GIDMap, st.Gid),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	}
	return h
}

// entry writes one file. fd is open for directories and regular files.
func (a *archiver) entry(dir, fd int, base, name string, st *unix.Stat_t) error {
	h := a.header(name, st)
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		var b [unix.PathMax]byte
		n, err := unix.Readlinkat(dir, base, b[:])
		if err != nil {
			return gone(err)
		}
		h.Linkname = string(b[:n])
	}
	if st.Nlink > 1 && h.Typeflag != tar.TypeDir {
		id := inode{st.Dev, st.Ino}
		if first, ok := a.links[id]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return a.tw.WriteHeader(h)
		}
		a.links[id] = h.Name
	}
	if fd >= 0 {
		if err := xattrs(fd, h); err != nil {
			return err
		}
	}
	if err := a.tw.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	return a.content(fd, h.Size)
}

// content copies size bytes; a file that shrinks meanwhile is filled up with
// zeros, one that grows is cut.
func (a *archiver) content(fd int, size int64) error {
	for left := size; left > 0; {
		n, err := unix.Read(fd, a.buf[:min(left, int64(len(a.buf)))])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("read", err)
		}
		if n == 0 {
			n = int(min(left, int64(len(a.buf))))
			clear(a.buf[:n])
		}
		if _, err := a.tw.Write(a.buf[:n]); err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}

// xattrPrefix is PAX's name space for extended attributes.
const xattrPrefix = "SCHILY.xattr."

// hidden attributes belong to the machine, not to the file.
func hidden(name string) bool {
	return strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") || name == "security.selinux"
}

func xattrs(fd int, h *tar.Header) error {
	n, err := unix.Flistxattr(fd, nil)
	if err == unix.ENOTSUP || n == 0 {
		return nil
	}
	if err != nil {
		return os.NewSyscallError("flistxattr", err)
	}
	names := make([]byte, n+1024)
	if n, err = unix.Flistxattr(fd, names); err != nil {
		return os.NewSyscallError("flistxattr", err)
	}
	for name := range strings.SplitSeq(string(names[:n]), "\x00") {
		if name == "" || hidden(name) {
			continue
		}
		v := make([]byte, 64<<10) // the kernel's limit
		m, err := unix.Fgetxattr(fd, name, v)
		if err == unix.ENODATA || err == unix.ENOTSUP {
			continue
		}
		if err != nil {
			return os.NewSyscallError("fgetxattr "+name, err)
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrPrefix+name] = string(v[:m])
	}
	return nil
}
