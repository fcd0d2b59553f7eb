package hostfs

import (
	"os"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// openFlags are those that matter on this side. What is appended goes to the end
// as it is here: the guest's may be older.
func openFlags(flags uint32) int {
	return int(flags) & (unix.O_ACCMODE | unix.O_APPEND | unix.O_TRUNC | unix.O_SYNC | unix.O_DSYNC | unix.O_NOATIME)
}

func (s *server) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	flags := openFlags(in.Flags)
	if flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0 {
		if err := s.writable(); err != nil {
			return errno(err)
		}
	}
	n, err := s.node(in.NodeId)
	if err != nil {
		return errno(err)
	}
	if flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0 {
		if err := s.mapped(n, unix.EACCES); err != nil {
			return errno(err)
		}
	}
	if err := s.refresh(n); err != nil {
		return errno(err)
	}
	fd, err := s.reopen(n, flags)
	if err != nil {
		return errno(err)
	}
	if flags&unix.O_ACCMODE == unix.O_RDONLY {
		out.OpenFlags |= fuse.FOPEN_NOFLUSH // there is nothing to be told at its closing
	}
	if err := s.opened(fd, n, out); err != nil {
		return errno(err)
	}
	s.foretellFile(&in.InHeader, n, out.Fh, fd, flags, false)
	return fuse.OK
}

// opened makes a handle of fd and owns it.
func (s *server) opened(fd int, n *node, out *fuse.OpenOut) (err error) {
	if s.opts.Cache > 0 {
		out.OpenFlags |= fuse.FOPEN_KEEP_CACHE // checked against the times, as its attributes are
	}
	out.Fh, err = s.addHandle(os.NewFile(uintptr(fd), "file"), n)
	return err
}

func (s *server) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	p, err := s.maker(&in.InHeader, name)
	if err != nil {
		return errno(err)
	}
	flags := openFlags(in.Flags) | unix.O_CREAT | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(p.fd, name, flags|unix.O_EXCL, in.Mode&0o7777)
	if err == unix.EEXIST && in.Flags&unix.O_EXCL == 0 { // somebody else was faster
		if err := s.lookup(p, name, &out.EntryOut); err != nil {
			return errno(err)
		}
		n, err := s.node(out.NodeId)
		if err == nil {
			err = s.mapped(n, unix.EACCES)
		}
		if err == nil {
			fd, err = s.reopen(n, flags&^unix.O_CREAT)
		}
		if err == nil {
			err = s.opened(fd, n, &out.OpenOut)
		}
		if err != nil {
			s.Forget(out.NodeId, 1)
		}
		return errno(err)
	}
	if err != nil {
		return errno(err)
	}
	if status := s.made(p, name, &in.InHeader, &out.EntryOut, false); !status.Ok() {
		unix.Close(fd)
		return status
	}
	n, err := s.node(out.NodeId)
	if err != nil {
		unix.Close(fd)
	} else if err = s.opened(fd, n, &out.OpenOut); err != nil {
		s.Forget(out.NodeId, 1)
	} else {
		s.foretellFile(&in.InHeader, n, out.OpenOut.Fh, fd, flags, true)
		s.foretellDir(&in.InHeader, p)
	}
	return errno(err)
}

func (s *server) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	h, err := s.handle(in.Fh)
	if err != nil {
		return nil, errno(err)
	}
	n, err := unix.Pread(h.fd, buf[:min(int(in.Size), len(buf))], int64(in.Offset))
	if err != nil {
		return nil, errno(err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

func (s *server) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if err := s.writable(); err != nil {
		return 0, errno(err)
	}
	h, err := s.handle(in.Fh)
	if err != nil {
		return 0, errno(err)
	}
	h.node.written.Store(true)
	n, err := unix.Pwrite(h.fd, data, int64(in.Offset))
	return uint32(max(n, 0)), errno(err)
}

func (s *server) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	h, err := s.handle(in.Fh)
	if err != nil {
		return errno(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	n, err := unix.Seek(h.fd, int64(in.Offset), int(in.Whence))
	out.Offset = uint64(max(n, 0))
	return errno(err)
}

func (s *server) CopyFileRange(_ <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	if err := s.writable(); err != nil {
		return 0, errno(err)
	}
	from, err := s.handle(in.FhIn)
	if err != nil {
		return 0, errno(err)
	}
	to, err := s.handle(in.FhOut)
	if err != nil {
		return 0, errno(err)
	}
	a, b := int64(in.OffIn), int64(in.OffOut)
	n, err := unix.CopyFileRange(from.fd, &a, to.fd, &b, int(min(in.Len, 1<<30)), int(in.Flags))
	return uint32(max(n, 0)), errno(err)
}

func (s *server) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if err := s.writable(); err != nil {
		return errno(err)
	}
	h, err := s.handle(in.Fh)
	if err != nil {
		return errno(err)
	}
	return errno(unix.Fallocate(h.fd, in.Mode, int64(in.Offset), int64(in.Length)))
}

// Flush is called at each close: errors that a file system tells late come out
// of closing a duplicate. The closing process's POSIX locks go.
func (s *server) Flush(_ <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	h, err := s.handle(in.Fh)
	if err != nil {
		return errno(err)
	}
	s.dropLocks(in.NodeId, in.LockOwner)
	s.forgetOwner(h, in.LockOwner)
	fd, err := unix.FcntlInt(uintptr(h.fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return errno(err)
	}
	return errno(unix.Close(fd))
}

func (s *server) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	h, err := s.handle(in.Fh)
	if err != nil {
		return errno(err)
	}
	if in.FsyncFlags&1 != 0 {
		return errno(unix.Fdatasync(h.fd))
	}
	return errno(unix.Fsync(h.fd))
}

// Release ends an open file, and its flock with it.
func (s *server) Release(_ <-chan struct{}, in *fuse.ReleaseIn) { s.dropHandle(in.Fh) }
