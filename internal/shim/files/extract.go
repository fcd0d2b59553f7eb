package files

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// extract unpacks a tar stream below dir, by Docker's rules for `cp`.
func (s *session) extract(r io.Reader, dir string) error {
	tr := tar.NewReader(r)
	x := &extractor{s: s, dir: dir, buf: make([]byte, copyBuffer)}
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("archive: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if err := x.entry(h, tr); err != nil {
			return fmt.Errorf("unpack %.200s: %w", h.Name, err)
		}
	}
	if err := x.times(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, r) // padding after the end
	return err
}

type extractor struct {
	s    *session
	dir  string // of the container
	buf  []byte
	dirs []*tar.Header // whose times are set last
}

// place returns the parent, opened, and the last element of an entry's name.
// The name is text: ".." in it never goes above dir; links on the way do what
// they do in the container.
func (x *extractor) place(name string, create bool) (parent int, base string, err error) {
	clean := path.Join("/", name)
	if clean == "/" {
		fd, err := x.s.openPath(x.dir)
		return fd, ".", err
	}
	dir := path.Join(x.dir, path.Dir(clean))
	if create {
		parent, err = mkdirAll(x.s.root, dir)
	} else {
		parent, err = x.s.openPath(dir)
	}
	return parent, path.Base(clean), err
}

func (s *session) openPath(dir string) (int, error) {
	fd, err := unix.Openat2(s.root, dir, &unix.OpenHow{Flags: unix.O_DIRECTORY | unix.O_PATH | unix.O_CLOEXEC, Resolve: inRoot})
	return fd, pathError("open", dir, err)
}

func (x *extractor) entry(h *tar.Header, r io.Reader) error {
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
	case 0, tar.TypeCont, tar.TypeGNUSparse:
		h.Typeflag = tar.TypeReg
	default:
		return fmt.Errorf("entry of type %q: %w", h.Typeflag, errdefs.ErrInvalidArgument)
	}
	parent, base, err := x.place(h.Name, true)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	if base == "." {
		if h.Typeflag != tar.TypeDir {
			return fmt.Errorf("the directory itself as another file: %w", errdefs.ErrInvalidArgument)
		}
		return nil // Docker leaves the directory as it is
	}
	exists, err := x.makeRoom(parent, base, h)
	if err != nil {
		return err
	}
	return x.create(parent, base, h, r, exists)
}

// makeRoom removes what is in an entry's place, unless both are directories.
func (x *extractor) makeRoom(parent int, base string, h *tar.Header) (dir bool, err error) {
	var st unix.Stat_t
	err = unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return false, nil
	}
	if err != nil {
		return false, os.NewSyscallError("stat", err)
	}
	is, will := st.Mode&unix.S_IFMT == unix.S_IFDIR, h.Typeflag == tar.TypeDir
	if is && will {
		return true, nil
	}
	if x.s.f.NoOverwriteDirNonDir && is != will {
		if is {
			return false, fmt.Errorf("cannot overwrite directory %q with non-directory: %w", h.Name, errdefs.ErrInvalidArgument)
		}
		return false, fmt.Errorf("cannot overwrite non-directory %q with directory: %w", h.Name, errdefs.ErrInvalidArgument)
	}
	return false, removeAll(parent, base, 0)
}

// maxDepth bounds the descriptors that removing a tree needs.
const maxDepth = 10_000

// removeAll removes a tree without following links.
func removeAll(parent int, base string, depth int) error {
	err := unix.Unlinkat(parent, base, 0)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	if err != unix.EISDIR && err != unix.EPERM || depth > maxDepth {
		return os.NewSyscallError("unlink", err)
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	defer unix.Close(fd)
	names, err := list(fd)
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := removeAll(fd, n, depth+1); err != nil {
			return err
		}
	}
	err = unix.Unlinkat(parent, base, unix.AT_REMOVEDIR)
	if err == unix.ENOENT {
		err = nil
	}
	return os.NewSyscallError("rmdir", err)
}

func (x *extractor) create(parent int, base string, h *tar.Header, r io.Reader, exists bool) error {
	mode := uint32(h.Mode & 0o7777)
	fd := -1
	switch h.Typeflag {
	case tar.TypeDir:
		if !exists {
			if err := unix.Mkdirat(parent, base, mode); err != nil {
				return os.NewSyscallError("mkdir", err)
			}
		}
		var err error
		if fd, err = unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0); err != nil {
			return os.NewSyscallError("open", err)
		}
		defer unix.Close(fd)
		x.dirs = append(x.dirs, h)
	case tar.TypeReg:
		var err error
		fd, err = unix.Openat(parent, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return os.NewSyscallError("create", err)
		}
		defer unix.Close(fd)
		if err := x.content(fd, r); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if err := unix.Symlinkat(h.Linkname, parent, base); err != nil {
			return os.NewSyscallError("symlink", err)
		}
	case tar.TypeLink:
		// The target is named from the archive's root, which is dir.
		tp, tb, err := x.place(h.Linkname, false)
		if err != nil {
			return err
		}
		defer unix.Close(tp)
		if err := unix.Linkat(tp, tb, parent, base, 0); err != nil {
			return os.NewSyscallError("link", err)
		}
		return nil // its owner and mode are its target's
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
		if err := unix.Mknodat(parent, base, kind|mode, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))); err != nil {
			return os.NewSyscallError("mknod", err)
		}
	}
	return x.meta(parent, fd, base, h, mode)
}

// meta sets owner, mode, attributes and times, in the order in which one does
// not undo the other.
func (x *extractor) meta(parent, fd int, base string, h *tar.Header, mode uint32) error {
	uid, gid := h.Uid, h.Gid
	// As Docker has it: the container's user, but for root, whose copies keep
	// the archive's owners.
	if x.s.f.CopyUidGid && (x.s.r.UID != 0 || x.s.r.GID != 0) {
		uid, gid = int(x.s.r.UID), int(x.s.r.GID)
	}
	uid, err := hostID(x.s.r.UIDMap, uid)
	if err != nil {
		return err
	}
	if gid, err = hostID(x.s.r.GIDMap, gid); err != nil {
		return err
	}
	if err := unix.Fchownat(parent, base, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return os.NewSyscallError("chown", err)
	}
	if fd >= 0 {
		if err := unix.Fchmod(fd, mode); err != nil {
			return os.NewSyscallError("chmod", err)
		}
		for k, v := range h.PAXRecords {
			name, ok := strings.CutPrefix(k, xattrPrefix)
			if !ok || hidden(name) {
				continue
			}
			if err := unix.Fsetxattr(fd, name, []byte(v), 0); err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
				return os.NewSyscallError("setxattr "+name, err)
			}
		}
	}
	return setTimes(parent, base, h)
}

func setTimes(parent int, base string, h *tar.Header) error {
	t := unix.NsecToTimespec(h.ModTime.UnixNano())
	at := t
	if !h.AccessTime.IsZero() {
		at = unix.NsecToTimespec(h.AccessTime.UnixNano())
	}
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(parent, base, []unix.Timespec{at, t}, unix.AT_SYMLINK_NOFOLLOW))
}

// times sets those of directories, which their contents have changed.
func (x *extractor) times() error {
	for i := len(x.dirs) - 1; i >= 0; i-- {
		parent, base, err := x.place(x.dirs[i].Name, false)
		if err != nil {
			if gone(err) == nil {
				continue
			}
			return err
		}
		err = gone(setTimes(parent, base, x.dirs[i]))
		unix.Close(parent)
		if err != nil {
			return err
		}
	}
	return nil
}

// content writes a file, leaving holes where there are only zeros.
func (x *extractor) content(fd int, r io.Reader) error {
	var size int64
	hole := false
	for {
		n, err := io.ReadFull(r, x.buf)
		b := x.buf[:n]
		if len(b) > 0 {
			if hole = zeros(b); hole {
				if _, err := unix.Seek(fd, int64(n), io.SeekCurrent); err != nil {
					return os.NewSyscallError("seek", err)
				}
			}
			for !hole && len(b) > 0 {
				m, err := unix.Write(fd, b)
				if err == unix.EINTR {
					continue
				}
				if err != nil {
					return os.NewSyscallError("write", err)
				}
				b = b[m:]
			}
			size += int64(n)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			// ReadFull says so of a short last piece; a torn archive is found by tar.
			if terr := tornEnd(r); terr != nil {
				return terr
			}
			break
		}
		if err != nil {
			return err
		}
	}
	if hole {
		return os.NewSyscallError("truncate", unix.Ftruncate(fd, size))
	}
	return nil
}

// tornEnd tells an entry's end from the archive's.
func tornEnd(r io.Reader) error {
	var b [1]byte
	if _, err := r.Read(b[:]); err != nil && err != io.EOF {
		return fmt.Errorf("archive: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func zeros(b []byte) bool {
	if len(b) < 4096 {
		return false
	}
	for _, c := range b[:64] {
		if c != 0 {
			return false
		}
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
