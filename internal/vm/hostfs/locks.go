package hostfs

import (
	"os"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// lockKey names who holds POSIX locks on what: the guest's processes are the
// owners.
type lockKey struct {
	node, owner uint64
}

// lockFile is an open file description whose locks (F_OFD_SETLK, fcntl(2)) are
// one owner's: so owners conflict with each other and with the host's processes.
type lockFile struct {
	f        *os.File
	writable bool
}

// maxLockWait is the pause between attempts of who waits for a lock: a wait in
// the kernel could not be interrupted.
const maxLockWait = 20 * time.Millisecond

// lockFile finds or makes the owner's.
func (s *server) lockFile(n *node, owner uint64) (*lockFile, error) {
	k := lockKey{n.id, owner}
	s.mu.Lock()
	l := s.locks[k]
	s.mu.Unlock()
	if l != nil {
		return l, nil
	}
	flags, writable := unix.O_RDWR, true
	fd, err := s.reopen(n, flags)
	if err != nil || s.opts.ReadOnly {
		if err == nil {
			unix.Close(fd)
		}
		writable = false
		if fd, err = s.reopen(n, unix.O_RDONLY); err != nil {
			return nil, err
		}
	}
	l = &lockFile{f: os.NewFile(uintptr(fd), "lock"), writable: writable}
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.locks[k]; other != nil {
		l.f.Close()
		return other, nil
	}
	if len(s.locks) >= s.maxLocks {
		l.f.Close()
		return nil, unix.ENOLCK
	}
	s.locks[k] = l
	return l, nil
}

// dropLocks frees an owner's locks on a file.
func (s *server) dropLocks(node, owner uint64) {
	k := lockKey{node, owner}
	s.mu.Lock()
	l := s.locks[k]
	delete(s.locks, k)
	s.mu.Unlock()
	if l != nil {
		l.f.Close()
	}
}

// noteOwner has an owner's lockFile go with the open file at the latest: one that is
// only read is not flushed.
func (s *server) noteOwner(in *fuse.LkIn) error {
	h, err := s.handle(in.Fh)
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return unix.EBADF
	case h.owners[in.Owner]:
		return nil
	case s.owners.Add(1) > 4*int64(s.maxLocks): // some have lost their locks by other files
		s.owners.Add(-1)
		return unix.ENOLCK
	}
	if h.owners == nil {
		h.owners = map[uint64]bool{}
	}
	h.owners[in.Owner] = true
	return nil
}

func (s *server) forgetOwner(h *handle, owner uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.owners[owner] {
		delete(h.owners, owner)
		s.owners.Add(-1)
	}
}

func flockT(lk *fuse.FileLock) *unix.Flock_t {
	t := &unix.Flock_t{Type: int16(lk.Typ), Whence: unix.SEEK_SET, Start: int64(lk.Start)}
	if lk.End < 1<<63-1 && lk.End >= lk.Start {
		t.Len = int64(lk.End - lk.Start + 1)
	}
	return t
}

func (s *server) GetLk(_ <-chan struct{}, in *fuse.LkIn, out *fuse.LkOut) fuse.Status {
	n, err := s.node(in.NodeId)
	if err != nil {
		return errno(err)
	}
	if err := s.noteOwner(in); err != nil {
		return errno(err)
	}
	l, err := s.lockFile(n, in.Owner)
	if err != nil {
		return errno(err)
	}
	t := flockT(&in.Lk)
	if err := unix.FcntlFlock(l.f.Fd(), unix.F_OFD_GETLK, t); err != nil {
		return errno(err)
	}
	out.Lk = fuse.FileLock{Typ: uint32(t.Type)}
	if t.Type != unix.F_UNLCK {
		out.Lk.Start, out.Lk.End = uint64(t.Start), 1<<63-1
		if t.Len > 0 {
			out.Lk.End = uint64(t.Start + t.Len - 1)
		}
	}
	return fuse.OK
}

func (s *server) SetLk(_ <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return errno(s.lock(in))
}

func (s *server) SetLkw(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	for wait := time.Millisecond; ; wait = min(2*wait, maxLockWait) {
		s.use.RLock()
		err := s.lock(in)
		s.use.RUnlock()
		if err != unix.EAGAIN && err != unix.EACCES {
			return errno(err)
		}
		select {
		case <-cancel:
			return fuse.EINTR
		case <-s.done:
			return fuse.EINTR
		case <-time.After(wait):
		}
	}
}

// lock takes or frees a lock without waiting: flock(2) on the open file, POSIX
// on its owner's.
func (s *server) lock(in *fuse.LkIn) error {
	if in.LkFlags&fuse.LK_FLOCK != 0 {
		h, err := s.handle(in.Fh)
		if err != nil {
			return err
		}
		how := unix.LOCK_NB
		switch in.Lk.Typ {
		case unix.F_RDLCK:
			how |= unix.LOCK_SH
		case unix.F_WRLCK:
			how |= unix.LOCK_EX
		default:
			how |= unix.LOCK_UN
		}
		if err := unix.Flock(h.fd, how); err != nil || how == unix.LOCK_UN|unix.LOCK_NB {
			return err
		}
		return s.refresh(h.node)
	}
	n, err := s.node(in.NodeId)
	if err != nil {
		return err
	}
	if err := s.noteOwner(in); err != nil {
		return err
	}
	l, err := s.lockFile(n, in.Owner)
	if err != nil {
		return err
	}
	if in.Lk.Typ == unix.F_WRLCK && !l.writable {
		return unix.EBADF
	}
	if err := unix.FcntlFlock(l.f.Fd(), unix.F_OFD_SETLK, flockT(&in.Lk)); err != nil || in.Lk.Typ == unix.F_UNLCK {
		return err
	}
	return s.refresh(n)
}
