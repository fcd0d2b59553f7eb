package channel

import (
	"context"
	"io"
	"net"
	"sync"
	"time"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// headerTime is how long a client may take from the first byte to the end of
// its header.
const headerTime = 10 * time.Second

// Handler serves one stream connection and closes it.
type Handler func(ctx context.Context, c Conn, h *taskv1.StreamHeader)

// Listener sorts the connections of one listener: those that begin as a stream
// go to a handler, the others come out of Accept with nothing taken from them.
type Listener struct {
	l       net.Listener
	handler Handler
	rpc     chan net.Conn
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{} // not yet handed on
}

var _ net.Listener = (*Listener)(nil)

// Listen starts to accept from l, which the Listener owns from now on.
// Connections of l must be Conns.
func Listen(l net.Listener, handler Handler) *Listener {
	ctx, cancel := context.WithCancel(context.Background())
	x := &Listener{l: l, handler: handler, rpc: make(chan net.Conn), ctx: ctx, cancel: cancel, conns: map[net.Conn]struct{}{}}
	x.wg.Add(1)
	go x.accept()
	return x
}

// Accept returns the next connection that is not a stream.
func (x *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-x.rpc:
		return c, nil
	case <-x.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Addr is the underlying listener's.
func (x *Listener) Addr() net.Addr { return x.l.Addr() }

// Close stops accepting, ends the streams' context and waits for their handlers.
func (x *Listener) Close() error {
	x.cancel()
	err := x.l.Close()
	x.mu.Lock()
	for c := range x.conns {
		c.Close()
	}
	x.mu.Unlock()
	x.wg.Wait()
	return err
}

func (x *Listener) accept() {
	defer x.wg.Done()
	backoff := time.Millisecond
	for {
		c, err := x.l.Accept()
		if err != nil {
			if x.ctx.Err() != nil {
				return
			}
			// Out of descriptors or memory: try again, as long as it takes.
			select {
			case <-x.ctx.Done():
				return
			case <-time.After(backoff):
			}
			backoff = min(2*backoff, time.Second)
			continue
		}
		backoff = time.Millisecond
		x.mu.Lock()
		x.conns[c] = struct{}{}
		if x.ctx.Err() != nil {
			c.Close()
		}
		x.mu.Unlock()
		x.wg.Add(1)
		go func() {
			defer x.wg.Done()
			x.sort(c)
		}()
	}
}

// forget gives up ownership of c.
func (x *Listener) forget(c net.Conn) {
	x.mu.Lock()
	delete(x.conns, c)
	x.mu.Unlock()
}

func (x *Listener) sort(c net.Conn) {
	var first [1]byte
	if _, err := io.ReadFull(c, first[:]); err != nil {
		x.forget(c)
		c.Close()
		return
	}
	if first[0] != Magic {
		x.forget(c)
		select {
		case x.rpc <- &prefixed{Conn: c, first: first[0], full: true}:
		case <-x.ctx.Done():
			c.Close()
		}
		return
	}
	h := new(taskv1.StreamHeader)
	_ = c.SetReadDeadline(time.Now().Add(headerTime)) // without it, Close still ends the read
	err := ReadMessage(c, h)
	_ = c.SetReadDeadline(time.Time{})
	x.forget(c)
	s, ok := c.(Conn)
	if err != nil || !ok {
		c.Close()
		return
	}
	x.handler(x.ctx, s, h)
}

// prefixed gives back the byte that was read to sort the connection.
type prefixed struct {
	net.Conn
	first byte
	full  bool
}

func (p *prefixed) Read(b []byte) (int, error) {
	if p.full && len(b) > 0 {
		p.full = false
		b[0] = p.first
		return 1, nil
	}
	return p.Conn.Read(b)
}
