package hostfs

import (
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel/ahead"
)

// What a guest will ask next is told with an answer (package ahead): nothing of it
// may have been changed meanwhile by another request, so it is told only while no
// other one that changes something is worked on.

// changes counts requests that change something: those that were read, and those
// that are worked on.
type changes struct {
	names, content       atomic.Uint64
	namesNow, contentNow atomic.Int64
}

// begin counts a request, in the stream's order; end is to be called when it is
// done. What runs is counted first: who sees the count sees that it runs.
func (c *changes) begin(request []byte) (end func()) {
	names, content := ahead.Changes(request)
	if !names && !content {
		return func() {}
	}
	if names {
		c.namesNow.Add(1)
		c.names.Add(1)
	}
	if content {
		c.contentNow.Add(1)
		c.content.Add(1)
	}
	return func() {
		if names {
			c.namesNow.Add(-1)
		}
		if content {
			c.contentNow.Add(-1)
		}
	}
}

// maxContent is the largest file whose content is told when it is opened, bytes.
const maxContent = 16 << 10

// foretell adds records to the answer of a request.
func (s *server) foretell(unique uint64, f func(b []byte) []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.foretold[unique] = f(s.foretold[unique])
}

// foretellings takes what is to be sent with an answer.
func (s *server) foretellings(unique uint64) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.foretold[unique]
	delete(s.foretold, unique)
	return b
}

// foretellDir tells the attributes of a directory that a request has changed: the
// guest asks for them before its next one there.
func (s *server) foretellDir(h *fuse.InHeader, dir *node) {
	if s.opts.Cache == 0 {
		return
	}
	c := ahead.Counts{Names: s.changes.names.Load()}
	if s.changes.namesNow.Load() != 1 { // this one
		return
	}
	var out fuse.AttrOut
	if s.attr(dir, &out) != nil {
		return
	}
	s.foretell(h.Unique, func(b []byte) []byte {
		return ahead.AppendAttr(b, c, dir.id, unsafe.Slice((*byte)(unsafe.Pointer(&out)), unsafe.Sizeof(out)))
	})
}

// foretellFile tells about a file that was opened, and made if isNew.
func (s *server) foretellFile(h *fuse.InHeader, n *node, file uint64, fd int, flags int, isNew bool) {
	if s.silent(n, fd) {
		s.foretell(h.Unique, func(b []byte) []byte { return ahead.AppendSilentClose(b, file) })
	}
	if s.opts.Cache == 0 {
		return
	}
	if flags&unix.O_ACCMODE != unix.O_RDONLY {
		s.foretellCaps(h, n, fd, isNew)
	}
	if flags&unix.O_ACCMODE != unix.O_WRONLY && !isNew && flags&unix.O_TRUNC == 0 {
		s.foretellContent(h, n, file, fd)
	}
}

// foretellCaps tells that a file has no capabilities, for which a kernel asks
// before it writes.
func (s *server) foretellCaps(h *fuse.InHeader, n *node, fd int, isNew bool) {
	c, others := ahead.Counts{Names: s.changes.names.Load()}, int64(0)
	if isNew {
		others = 1 // this one
	}
	if s.changes.namesNow.Load() != others {
		return
	}
	if !isNew {
		if _, err := unix.Getxattr(s.link(n), capability, nil); err != unix.ENODATA {
			return
		}
	}
	s.foretell(h.Unique, func(b []byte) []byte { return ahead.AppendNoCaps(b, c, n.id, s.opts.Cache) })
}

// foretellContent tells what is in a small file, once for each of its versions:
// after that the guest has it, as it has what it wrote.
func (s *server) foretellContent(h *fuse.InHeader, n *node, file uint64, fd int) {
	c := ahead.Counts{Content: s.changes.content.Load()}
	if s.changes.contentNow.Load() != 0 || n.written.Load() {
		return
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Size == 0 || st.Size > maxContent {
		return
	}
	v := versionOf(&st)
	s.mu.Lock()
	known := n.content == v
	n.content = v
	s.mu.Unlock()
	if known {
		return
	}
	b := make([]byte, st.Size+1)
	if size, err := unix.Pread(fd, b, 0); err != nil || int64(size) != st.Size {
		return
	}
	s.foretell(h.Unique, func(to []byte) []byte {
		return ahead.AppendContent(to, c, file, min(s.opts.Cache, time.Second), b[:st.Size])
	})
}

// silent says whether closing a file has nothing to say but for its locks: on
// file systems that write what they were given, and find errors of it, when it
// is written or synced.
func (s *server) silent(n *node, fd int) bool {
	s.mu.Lock()
	known, ok := s.silentOn[n.key.dev]
	s.mu.Unlock()
	if ok {
		return known
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return false
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, unix.TMPFS_MAGIC, unix.OVERLAYFS_SUPER_MAGIC:
		known = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silentOn[n.key.dev] = known
	return known
}
