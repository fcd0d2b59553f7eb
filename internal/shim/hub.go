package shim

import (
	"encoding/binary"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/logs"
)

const (
	// clientBuffer is how much output waits for a slow attached client before
	// its container's stream waits too.
	clientBuffer = 1 << 20
	// exitBuffer is how much may wait once the process has exited, when the
	// stream must not wait any more; a client that needs more is cut off.
	exitBuffer = 16 << 20
	// frameHead is the size of stdcopy's frame header.
	frameHead = 8
	// goodbyeTime is how long a client may take to close its side after the end
	// of output, and a slow one to take each piece of what is left.
	goodbyeTime = 10 * time.Second
)

// hub copies one process's output to the attached clients.
type hub struct {
	terminal bool

	mu      sync.Mutex
	clients []*client
	free    bool // the process has exited: don't wait for clients
	ended   bool // no output comes any more
}

// client is one attached connection's output side.
type client struct {
	conn           channel.Conn
	raw            syscall.RawConn // nil if the transport has none
	stdout, stderr bool

	mu       sync.Mutex
	space    sync.Cond
	buf      []byte // waits to be sent
	inflight int    // being sent by flush
	flushing bool
	free     bool
	ending   bool // close when all is sent
	gone     bool
	readDone bool // the client's side has ended
	dropped  func()
}

// newClient returns a client that keeps what is sent to it until flush is
// called for the first time.
func newClient(conn channel.Conn, stdout, stderr bool) *client {
	c := &client{conn: conn, stdout: stdout, stderr: stderr, flushing: true}
	c.space.L = &c.mu
	if s, ok := conn.(interface {
		SyscallConn() (syscall.RawConn, error)
	}); ok {
		c.raw, _ = s.SyscallConn() // without it, all goes through flush
	}
	return c
}

// add attaches c; if the process's output has ended, c is ended too.
func (h *hub) add(c *client) {
	h.mu.Lock()
	c.free = h.free
	ended := h.ended
	if !ended {
		h.clients = append(h.clients[:len(h.clients):len(h.clients)], c) // output may be walking the old slice
	}
	h.mu.Unlock()
	if ended {
		c.end()
	}
}

func (h *hub) remove(c *client) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, x := range h.clients {
		if x == c {
			h.clients = append(h.clients[:i:i], h.clients[i+1:]...)
			if len(h.clients) == 0 {
				h.clients = nil
			}
			return
		}
	}
}

// write sends b[frameHead:] to all who want source. The head belongs to write.
func (h *hub) write(source logs.Source, b []byte) {
	h.mu.Lock()
	clients := h.clients
	h.mu.Unlock()
	if len(clients) == 0 {
		return
	}
	if h.terminal {
		b = b[frameHead:]
	} else {
		*(*[4]byte)(b) = [4]byte{byte(source)}
		binary.BigEndian.PutUint32(b[4:], uint32(len(b)-frameHead))
	}
	for _, c := range clients {
		if h.terminal && (c.stdout || c.stderr) || source == logs.Stdout && c.stdout || source == logs.Stderr && c.stderr {
			c.send(b)
		}
	}
}

// release lets output go on without waiting for clients.
func (h *hub) release() {
	h.mu.Lock()
	h.free = true
	clients := h.clients
	h.mu.Unlock()
	for _, c := range clients {
		c.mu.Lock()
		c.free = true
		c.space.Broadcast()
		c.mu.Unlock()
	}
}

// end tells all clients that there is no more output.
func (h *hub) end() {
	h.mu.Lock()
	h.ended = true
	clients := h.clients
	h.clients = nil
	h.mu.Unlock()
	for _, c := range clients {
		c.end()
	}
}

// send sends or keeps b. It waits while too much is kept.
func (c *client) send(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.buf)+c.inflight+len(b) > clientBuffer && !c.gone && !c.free {
		c.space.Wait()
	}
	if c.gone {
		return
	}
	if len(c.buf)+len(b) > exitBuffer {
		c.dropLocked()
		return
	}
	if !c.flushing {
		b = b[c.try(b):]
	}
	if len(b) == 0 {
		return
	}
	c.buf = append(c.buf, b...)
	if !c.flushing {
		c.flushing = true
		go c.flush()
	}
}

// try writes what the connection takes without waiting.
func (c *client) try(b []byte) (n int) {
	if c.raw == nil {
		return 0
	}
	_ = c.raw.Write(func(fd uintptr) bool {
		for {
			m, err := unix.Write(int(fd), b)
			if err == unix.EINTR {
				continue
			}
			n = max(m, 0) // any error is met again, and told, by flush
			return true
		}
	})
	return n
}

// flush sends what is kept until nothing is.
func (c *client) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.buf) > 0 && !c.gone {
		b := c.buf
		c.buf, c.inflight = nil, len(b)
		if c.free {
			_ = c.conn.SetWriteDeadline(time.Now().Add(goodbyeTime)) // else it waits, no worse
		}
		c.mu.Unlock()
		_, err := c.conn.Write(b)
		c.mu.Lock()
		c.inflight = 0
		if err != nil {
			c.dropLocked()
		}
		c.space.Broadcast()
	}
	c.flushing = false
	if c.ending {
		c.finishLocked()
	}
}

// dropLocked gives the client up.
func (c *client) dropLocked() {
	c.gone = true
	c.buf = nil
	c.space.Broadcast()
	c.conn.Close()
	if c.dropped != nil {
		c.dropped()
		c.dropped = nil
	}
}

// onDrop has f called when the connection is closed.
func (c *client) onDrop(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
		f()
		return
	}
	c.dropped = f
}

// hungUp is called when the client is gone.
func (c *client) hungUp() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropLocked()
}

// end closes the connection once all is sent.
func (c *client) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ending = true
	c.free = true
	c.space.Broadcast()
	if !c.flushing {
		c.finishLocked()
		return
	}
	_ = c.conn.SetWriteDeadline(time.Now().Add(goodbyeTime)) // else it waits, no worse
}

// finishLocked says goodbye: the client reads the end, and closes.
func (c *client) finishLocked() {
	if c.gone {
		return
	}
	if c.readDone {
		c.dropLocked()
		return
	}
	_ = c.conn.CloseWrite()
	_ = c.conn.SetReadDeadline(time.Now().Add(goodbyeTime)) // whoever reads closes
}

// readEnded is called when the client's side has ended. gone tells that it is
// not only half closed.
func (c *client) readEnded() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.readDone = true
	if c.ending && !c.flushing && !c.gone {
		c.dropLocked()
	}
}

// isHungUp tells a closed connection from one whose peer ended only its half.
func isHungUp(conn net.Conn) bool {
	s, ok := conn.(interface {
		SyscallConn() (syscall.RawConn, error)
	})
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return true
	}
	hup := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: 0}}
		n, _ := unix.Poll(p, 0) // cannot be interrupted without waiting
		hup = n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return hup || err != nil
}
