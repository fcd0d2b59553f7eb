package shim

import (
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// poller waits for the end of many processes (pidfds) and for hang-ups of many
// connections with one goroutine and no thread: its epoll descriptor is itself
// waited for by the Go runtime.
type poller struct {
	f    *os.File // the epoll descriptor
	raw  syscall.RawConn
	done chan struct{}

	mu   sync.Mutex
	next int32
	wait map[int32]func()
}

// rawFile is what can be waited for.
type rawFile interface {
	SyscallConn() (syscall.RawConn, error)
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // makes os.File wait for it
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	p := &poller{f: os.NewFile(uintptr(fd), "epoll"), done: make(chan struct{}), wait: map[int32]func(){}}
	if p.raw, err = p.f.SyscallConn(); err != nil {
		p.f.Close()
		return nil, fmt.Errorf("epoll: %w", err)
	}
	go func() {
		defer close(p.done)
		var events [64]unix.EpollEvent
		for {
			var n int
			err := p.raw.Read(func(fd uintptr) bool {
				n, _ = unix.EpollWait(int(fd), events[:], 0) // EINTR cannot be without waiting
				return n > 0
			})
			if err != nil {
				return
			}
			for _, e := range events[:n] {
				p.mu.Lock()
				f := p.wait[e.Fd]
				delete(p.wait, e.Fd)
				p.mu.Unlock()
				if f != nil {
					go f()
				}
			}
		}
	}()
	return p, nil
}

// once calls f in a goroutine of its own when one of the events (EPOLLHUP and
// EPOLLERR are always among them) comes to fd. If fd is closed before, f is
// never called; forget frees it then.
func (p *poller) once(file rawFile, events uint32, f func()) (token int32, err error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return 0, err
	}
	p.mu.Lock()
	p.next++
	if p.next <= 0 {
		p.next = 1
	}
	for p.wait[p.next] != nil {
		p.next++
	}
	token = p.next
	p.wait[token] = f
	p.mu.Unlock()
	var ctlErr error
	cerr := raw.Control(func(fd uintptr) {
		err = p.raw.Control(func(ep uintptr) {
			ctlErr = unix.EpollCtl(int(ep), unix.EPOLL_CTL_ADD, int(fd), &unix.EpollEvent{Events: events | unix.EPOLLONESHOT, Fd: token})
		})
	})
	if err == nil {
		err = ctlErr
	}
	if err == nil {
		err = cerr
	}
	if err != nil {
		p.forget(token)
		return 0, fmt.Errorf("watch descriptor: %w", err)
	}
	return token, nil
}

func (p *poller) forget(token int32) {
	p.mu.Lock()
	delete(p.wait, token)
	p.mu.Unlock()
}

func (p *poller) close() {
	p.f.Close()
	<-p.done
}
