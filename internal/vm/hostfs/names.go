package hostfs

import (
	"encoding/binary"
	"os"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// component refuses what is not one name of a directory's entry.
func component(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return unix.EINVAL
	}
	if len(name) > 255 {
		return unix.ENAMETOOLONG
	}
	return nil
}

// parent finds a directory in which a name is to be changed.
func (s *server) parent(id uint64, name string) (*node, error) {
	if err := s.writable(); err != nil {
		return nil, err
	}
	if err := component(name); err != nil {
		return nil, err
	}
	n, err := s.node(id)
	if err != nil {
		return nil, err
	}
	return n, s.mapped(n, unix.EACCES)
}

// maker is parent for what makes a file, which is to be the caller's.
func (s *server) maker(h *fuse.InHeader, name string) (*node, error) {
	if err := s.opts.IDs.caller(h); err != nil {
		return nil, err
	}
	return s.parent(h.NodeId, name)
}

func (s *server) lookup(parent *node, name string, out *fuse.EntryOut) error {
	fd, err := unix.Openat(parent.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return s.enter(parent, name, fd, out)
}

func (s *server) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if err := component(name); err != nil {
		return errno(err)
	}
	p, err := s.node(h.NodeId)
	if err != nil {
		return errno(err)
	}
	return errno(s.lookup(p, name, out))
}

// own gives what was made to its maker. A directory that hands its group on has
// done so.
func own(parent *node, name string, h *fuse.InHeader) error {
	gid := int(h.Gid)
	var st unix.Stat_t
	if err := unix.Fstat(parent.fd, &st); err == nil && st.Mode&unix.S_ISGID != 0 {
		gid = -1
	}
	if h.Uid == 0 && (h.Gid == 0 || gid == -1) {
		return nil // it is so
	}
	return unix.Fchownat(parent.fd, name, int(h.Uid), gid, unix.AT_SYMLINK_NOFOLLOW)
}

// made finishes what was made: the owner, and the answer.
func (s *server) made(p *node, name string, h *fuse.InHeader, out *fuse.EntryOut, isDir bool) fuse.Status {
	err := own(p, name, h)
	if err == nil {
		err = s.lookup(p, name, out)
	}
	if err != nil {
		flags := 0
		if isDir {
			flags = unix.AT_REMOVEDIR
		}
		_ = unix.Unlinkat(p.fd, name, flags) // nothing half-made
		return errno(err)
	}
	if h.Opcode != opCreate { // which has more to tell
		s.foretellDir(h, p)
	}
	return fuse.OK
}

func (s *server) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	p, err := s.maker(&in.InHeader, name)
	if err != nil {
		return errno(err)
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK, 0:
	case unix.S_IFCHR:
		if in.Rdev != 0 { // an overlay's whiteout is no device
			return fuse.EPERM
		}
	default:
		return fuse.EPERM
	}
	if err := unix.Mknodat(p.fd, name, in.Mode, int(in.Rdev)); err != nil {
		return errno(err)
	}
	return s.made(p, name, &in.InHeader, out, false)
}

func (s *server) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	p, err := s.maker(&in.InHeader, name)
	if err != nil {
		return errno(err)
	}
	if err := unix.Mkdirat(p.fd, name, in.Mode); err != nil {
		return errno(err)
	}
	return s.made(p, name, &in.InHeader, out, true)
}

func (s *server) Symlink(_ <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	p, err := s.maker(h, name)
	if err != nil {
		return errno(err)
	}
	if err := unix.Symlinkat(target, p.fd, name); err != nil {
		return errno(err)
	}
	return s.made(p, name, h, out, false)
}

func (s *server) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	p, err := s.parent(in.NodeId, name)
	if err != nil {
		return errno(err)
	}
	n, err := s.node(in.Oldnodeid)
	if err != nil {
		return errno(err)
	}
	if n.mode == unix.S_IFDIR {
		return fuse.EPERM
	}
	if err := s.mapped(n, unix.EOVERFLOW); err != nil {
		return errno(err)
	}
	// By its link in /proc, a link's own inode included.
	if err := unix.Linkat(unix.AT_FDCWD, s.link(n), p.fd, name, unix.AT_SYMLINK_FOLLOW); err != nil {
		return errno(err)
	}
	if err := s.lookup(p, name, out); err != nil {
		return errno(err)
	}
	s.foretellDir(&in.InHeader, p)
	return fuse.OK
}

func (s *server) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	n, err := s.node(h.NodeId)
	if err != nil {
		return nil, errno(err)
	}
	b := make([]byte, unix.PathMax)
	size, err := unix.Readlinkat(n.fd, "", b)
	if err != nil {
		return nil, errno(err)
	}
	return b[:size], fuse.OK
}

func (s *server) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	p, err := s.parent(h.NodeId, name)
	if err != nil {
		return errno(err)
	}
	if err := s.mappedEntry(p, name); err != nil {
		return errno(err)
	}
	if err := unix.Unlinkat(p.fd, name, 0); err != nil {
		return errno(err)
	}
	s.foretellDir(h, p)
	return fuse.OK
}

func (s *server) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	p, err := s.parent(h.NodeId, name)
	if err != nil {
		return errno(err)
	}
	if err := s.mappedEntry(p, name); err != nil {
		return errno(err)
	}
	if err := unix.Unlinkat(p.fd, name, unix.AT_REMOVEDIR); err != nil {
		return errno(err)
	}
	s.foretellDir(h, p)
	return fuse.OK
}

func (s *server) Rename(_ <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	p, err := s.parent(in.NodeId, from)
	if err != nil {
		return errno(err)
	}
	q, err := s.parent(in.Newdir, to)
	if err != nil {
		return errno(err)
	}
	if err := s.mappedEntry(p, from); err != nil {
		return errno(err)
	}
	if err := s.mappedEntry(q, to); err != nil && err != unix.ENOENT {
		return errno(err)
	}
	if err := unix.Renameat2(p.fd, from, q.fd, to, uint(in.Flags)); err != nil {
		return errno(err)
	}
	s.moved(q, to)
	s.foretellDir(&in.InHeader, p)
	if q != p {
		s.foretellDir(&in.InHeader, q)
	}
	if in.Flags&unix.RENAME_EXCHANGE != 0 {
		s.moved(p, from)
	}
	return fuse.OK
}

func (s *server) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n, err := s.node(in.NodeId)
	if err != nil {
		return errno(err)
	}
	fd, err := s.reopen(n, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return errno(err)
	}
	out.Fh, err = s.addHandle(os.NewFile(uintptr(fd), "dir"), n)
	return errno(err)
}

func (s *server) ReleaseDir(in *fuse.ReleaseIn) { s.dropHandle(in.Fh) }

func (s *server) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	h, err := s.handle(in.Fh)
	if err != nil {
		return errno(err)
	}
	return errno(unix.Fsync(h.fd))
}

func (s *server) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return errno(s.entries(in, func(e fuse.DirEntry) bool { return out.AddDirEntry(e) }))
}

// ReadDirPlus looks each entry up as well. The guest counts those as lookups,
// but for "." and "..".
func (s *server) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	p, err := s.node(in.NodeId)
	if err != nil {
		return errno(err)
	}
	return errno(s.entries(in, func(e fuse.DirEntry) bool {
		o := out.AddDirLookupEntry(e)
		if o == nil {
			return false
		}
		if e.Name != "." && e.Name != ".." && s.lookup(p, e.Name, o) != nil {
			*o = fuse.EntryOut{} // gone meanwhile, or no descriptor left: no lookup
		}
		return true
	}))
}

const direntHead = 19 // struct linux_dirent64 before its name

// entries gives a directory's entries from an offset on, until add has no room.
func (s *server) entries(in *fuse.ReadIn, add func(fuse.DirEntry) bool) error {
	h, err := s.handle(in.Fh)
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if int64(in.Offset) != h.pos {
		if _, err := unix.Seek(h.fd, int64(in.Offset), unix.SEEK_SET); err != nil {
			return err
		}
		h.pos, h.rest = int64(in.Offset), nil
	}
	var buf [8192]byte
	for {
		if len(h.rest) == 0 {
			n, err := unix.Getdents(h.fd, buf[:])
			if err != nil {
				return err
			}
			if n == 0 {
				return nil
			}
			h.rest = append([]byte(nil), buf[:n]...)
		}
		for len(h.rest) > direntHead {
			length := int(binary.NativeEndian.Uint16(h.rest[16:]))
			name := unix.ByteSliceToString(h.rest[direntHead:length])
			off := binary.NativeEndian.Uint64(h.rest[8:])
			e := fuse.DirEntry{Ino: binary.NativeEndian.Uint64(h.rest), Off: off, Mode: uint32(h.rest[18]) << 12, Name: name}
			if !add(e) {
				return nil
			}
			h.pos = int64(off)
			h.rest = h.rest[length:]
		}
		h.rest = nil
	}
}
