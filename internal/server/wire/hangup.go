package wire

import (
	"crypto/tls"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// hangups tells when the other side of a connection is gone altogether, also
// while nobody reads from it or writes to it: a client that has only shut its
// sending side (the end of its stdin) must go on receiving. net/http stops
// looking after a connection once it is hijacked, and a goroutine that reads
// would take bytes that are the container's; so one epoll instance watches all
// such connections for EPOLLHUP, with one goroutine that is parked in the
// runtime's own poller (an epoll descriptor can be polled itself).
type hangups struct {
	once sync.Once
	file *os.File
	rc   syscall.RawConn

	mu    sync.Mutex
	next  uint64
	calls map[uint64]func()
}

var watcher hangups

// WatchHangup calls gone, once and from a goroutine of its own, when c's peer
// has closed both directions. stop ends the watch; it must be called before c
// is closed. Connections that are neither sockets nor TLS over one are not
// watched.
func WatchHangup(c net.Conn, gone func()) (stop func()) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	sc, ok := c.(syscall.Conn)
	if !ok {
		return func() {}
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return func() {}
	}
	return watcher.watch(rc, gone)
}

func (h *hangups) start() {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd) // unused
		return
	}
	f := os.NewFile(uintptr(fd), "hangups")
	rc, err := f.SyscallConn()
	if err != nil {
		_ = f.Close() // unused
		return
	}
	h.calls = make(map[uint64]func())
	h.file, h.rc = f, rc
	go h.loop()
}

func (h *hangups) loop() {
	var evs [64]unix.EpollEvent
	for {
		n := 0
		err := h.rc.Read(func(fd uintptr) bool {
			var err error
			n, err = unix.EpollWait(int(fd), evs[:], 0)
			return n > 0 || (err != nil && err != unix.EINTR)
		})
		if err != nil || n < 0 {
			return // never happens: the descriptor is never closed
		}
		for _, ev := range evs[:n] {
			id := uint64(uint32(ev.Fd)) | uint64(uint32(ev.Pad))<<32
			h.mu.Lock()
			f := h.calls[id]
			delete(h.calls, id)
			h.mu.Unlock()
			if f != nil {
				go f()
			}
		}
	}
}

func (h *hangups) watch(rc syscall.RawConn, gone func()) func() {
	h.once.Do(h.start)
	if h.file == nil {
		return func() {}
	}
	h.mu.Lock()
	h.next++
	id := h.next
	h.calls[id] = gone
	h.mu.Unlock()
	// EPOLLHUP and EPOLLERR are always reported.
	ev := unix.EpollEvent{Events: unix.EPOLLONESHOT | unix.EPOLLET, Fd: int32(uint32(id)), Pad: int32(uint32(id >> 32))}
	_ = rc.Control(func(fd uintptr) {
		_ = h.rc.Control(func(ep uintptr) {
			_ = unix.EpollCtl(int(ep), unix.EPOLL_CTL_ADD, int(fd), &ev) // unwatched at worst
		})
	})
	return func() {
		h.mu.Lock()
		delete(h.calls, id)
		h.mu.Unlock()
		_ = rc.Control(func(fd uintptr) {
			_ = h.rc.Control(func(ep uintptr) {
				_ = unix.EpollCtl(int(ep), unix.EPOLL_CTL_DEL, int(fd), nil) // closing it does the same
			})
		})
	}
}
