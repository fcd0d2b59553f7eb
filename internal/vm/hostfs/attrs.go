package hostfs

import (
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func (s *server) fillAttr(a *fuse.Attr, st *unix.Stat_t) {
	*a = fuse.Attr{
		Ino: st.Ino, Size: uint64(st.Size), Blocks: uint64(st.Blocks), Mode: st.Mode, Nlink: uint32(st.Nlink),
		Atime: uint64(st.Atim.Sec), Atimensec: uint32(st.Atim.Nsec), Mtime: uint64(st.Mtim.Sec), Mtimensec: uint32(st.Mtim.Nsec),
		Ctime: uint64(st.Ctim.Sec), Ctimensec: uint32(st.Ctim.Nsec), Owner: fuse.Owner{Uid: s.opts.IDs.guest(st.Uid), Gid: s.opts.IDs.guest(st.Gid)},
		Rdev: uint32(st.Rdev), Blksize: uint32(st.Blksize),
	}
}

func (s *server) attr(n *node, out *fuse.AttrOut) error {
	var st unix.Stat_t
	if err := unix.Fstat(n.fd, &st); err != nil {
		return err
	}
	s.mu.Lock()
	n.told = versionOf(&st)
	s.mu.Unlock()
	s.fillAttr(&out.Attr, &st)
	out.SetTimeout(s.opts.Cache)
	return nil
}

func (s *server) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, err := s.node(in.NodeId)
	if err != nil {
		return errno(err)
	}
	return errno(s.attr(n, out))
}

func (s *server) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if err := s.writable(); err != nil {
		return errno(err)
	}
	n, err := s.node(in.NodeId)
	if err != nil {
		return errno(err)
	}
	if err := s.set(n, in); err != nil {
		return errno(err)
	}
	return errno(s.attr(n, out))
}

func (s *server) set(n *node, in *fuse.SetAttrIn) error {
	uid, uok := in.GetUID()
	gid, gok := in.GetGID()
	u, g, err := s.newOwner(n, uid, gid, uok, gok)
	if err != nil {
		return err
	}
	if mode, ok := in.GetMode(); ok {
		if n.mode == unix.S_IFLNK {
			return unix.EOPNOTSUPP
		}
		if err := unix.Chmod(s.link(n), mode&0o7777); err != nil {
			return err
		}
	}
	if uok || gok {
		if err := unix.Fchownat(n.fd, "", u, g, unix.AT_EMPTY_PATH); err != nil {
			return err
		}
	}
	if size, ok := in.GetSize(); ok {
		if err := s.truncate(n, in, int64(size)); err != nil {
			return err
		}
	}
	return s.times(n, in)
}

// newOwner is what the owners are to be in the tree, -1: what they are. A file
// whose owners aren't the guest's stays as it is.
func (s *server) newOwner(n *node, uid, gid uint32, uok, gok bool) (u, g int, err error) {
	u, g = -1, -1
	if uok {
		id, ok := s.opts.IDs.tree(uid)
		if !ok {
			return -1, -1, unix.EOVERFLOW
		}
		u = int(id)
	}
	if gok {
		id, ok := s.opts.IDs.tree(gid)
		if !ok {
			return -1, -1, unix.EOVERFLOW
		}
		g = int(id)
	}
	return u, g, s.mapped(n, unix.EOVERFLOW)
}

// truncate uses the open file where there is one: it may be longer writable
// than its mode says.
func (s *server) truncate(n *node, in *fuse.SetAttrIn, size int64) error {
	if size < 0 {
		return unix.EFBIG
	}
	if fh, ok := in.GetFh(); ok {
		h, err := s.handle(fh)
		if err != nil {
			return err
		}
		if h.node != n {
			return unix.EBADF
		}
		return unix.Ftruncate(h.fd, size)
	}
	fd, err := s.reopen(n, unix.O_WRONLY|unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Ftruncate(fd, size)
}

func (s *server) times(n *node, in *fuse.SetAttrIn) error {
	if in.Valid&(fuse.FATTR_ATIME|fuse.FATTR_MTIME) == 0 {
		return nil
	}
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
	if in.Valid&fuse.FATTR_ATIME != 0 {
		ts[0] = unix.Timespec{Sec: int64(in.Atime), Nsec: int64(in.Atimensec)}
		if in.Valid&fuse.FATTR_ATIME_NOW != 0 {
			ts[0].Nsec = unix.UTIME_NOW
		}
	}
	if in.Valid&fuse.FATTR_MTIME != 0 {
		ts[1] = unix.Timespec{Sec: int64(in.Mtime), Nsec: int64(in.Mtimensec)}
		if in.Valid&fuse.FATTR_MTIME_NOW != 0 {
			ts[1].Nsec = unix.UTIME_NOW
		}
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, s.link(n), ts, 0)
}

func (s *server) StatFs(_ <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	n, err := s.node(in.NodeId)
	if err != nil {
		return errno(err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(n.fd, &st); err != nil {
		return errno(err)
	}
	*out = fuse.StatfsOut{
		Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), NameLen: uint32(st.Namelen), Frsize: uint32(st.Frsize),
	}
	return fuse.OK
}

// attribute refuses names that mean something to the host's security modules
// or file systems.
func attribute(name string) error {
	if strings.HasPrefix(name, "user.") || name == capability ||
		name == aclAccess || name == aclDefault || strings.HasPrefix(name, "trusted.") {
		return nil
	}
	return unix.EOPNOTSUPP
}

// attributes finds a node that may have extended attributes. Links and devices
// have none here: their link in /proc would be followed by some calls.
func (s *server) attributes(id uint64) (*node, error) {
	n, err := s.node(id)
	if err != nil {
		return nil, err
	}
	if n.mode != unix.S_IFREG && n.mode != unix.S_IFDIR {
		return nil, unix.EOPNOTSUPP
	}
	return n, nil
}

func (s *server) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	n, err := s.attributes(h.NodeId)
	if err == nil {
		err = attribute(name)
	}
	if err != nil {
		return 0, errno(err)
	}
	size, err := unix.Getxattr(s.link(n), name, dest)
	if err == nil {
		err = s.opts.IDs.toGuest(name, dest[:min(size, len(dest))])
	}
	return uint32(max(size, 0)), errno(err)
}

func (s *server) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	n, err := s.attributes(h.NodeId)
	if err != nil {
		return 0, errno(err)
	}
	size, err := unix.Listxattr(s.link(n), dest)
	return uint32(max(size, 0)), errno(err)
}

func (s *server) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, name string, data []byte) fuse.Status {
	if err := s.writable(); err != nil {
		return errno(err)
	}
	n, err := s.attributes(in.NodeId)
	if err == nil {
		err = attribute(name)
	}
	if err != nil {
		return errno(err)
	}
	if err := s.mapped(n, unix.EPERM); err != nil {
		return errno(err)
	}
	data, err = s.opts.IDs.toTree(name, data)
	if err != nil {
		return errno(err)
	}
	return errno(unix.Setxattr(s.link(n), name, data, int(in.Flags)))
}

func (s *server) RemoveXAttr(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if err := s.writable(); err != nil {
		return errno(err)
	}
	n, err := s.attributes(h.NodeId)
	if err == nil {
		err = attribute(name)
	}
	if err != nil {
		return errno(err)
	}
	if err := s.mapped(n, unix.EPERM); err != nil {
		return errno(err)
	}
	return errno(unix.Removexattr(s.link(n), name))
}
