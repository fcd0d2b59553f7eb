// Package qmp speaks QEMU's Machine Protocol (docs/interop/qmp-spec in QEMU's
// tree): JSON objects, one a line, over a stream.
//
//	QEMU                                  client
//	{"QMP": {version, capabilities}}  ──►
//	                                  ◄── {"execute": "qmp_capabilities", "id": 0}
//	{"return": {}, "id": 0}           ──►
//	{"event": …}  (at any time)       ──►
//	                                  ◄── {"execute": NAME, "arguments": {…}, "id": n}
//	{"return": …, "id": n} or {"error": …, "id": n}
//
// QEMU serves a guest that is not trusted, so it is not trusted either: what it
// sends is bounded and anything malformed ends the client. A Client's methods
// are safe for concurrent use.
package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Event is something that QEMU reports on its own.
type Event struct {
	Name string
	Data json.RawMessage
	Time time.Time
}

// Error is QEMU's answer to a command that failed.
type Error struct {
	Command string
	Class   string // GenericError, CommandNotFound, DeviceNotFound, …
	Desc    string
}

func (e *Error) Error() string { return fmt.Sprintf("qemu: %s: %s", e.Command, e.Desc) }

// Version is QEMU's, from its greeting.
type Version struct {
	Major, Minor, Micro int
	Package             string
}

// ErrClosed is what commands end with after Close.
var ErrClosed = errors.New("qmp: the connection is closed")

// Client is one connection.
type Client struct {
	conn    *net.UnixConn
	version Version
	events  func(Event)
	done    chan struct{}

	wmu sync.Mutex // held while a command is written

	mu      sync.Mutex
	next    uint64
	pending map[uint64]chan message
	err     error
}

// New reads the greeting from conn, which it owns from now on, and leaves
// negotiation mode. Events go to events (may be nil), one after the other, from
// the goroutine that reads: it must not wait for a command.
func New(ctx context.Context, conn *net.UnixConn, events func(Event)) (_ *Client, err error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer func() {
		if err != nil {
			conn.Close()
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			err = fmt.Errorf("qmp: greeting: %w", err)
		}
	}()
	d := NewDecoder(conn)
	m, err := d.next()
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	if m.Greeting == nil {
		return nil, errors.New("the first message is none")
	}
	v := m.Greeting.Version
	c := &Client{
		conn: conn, events: events, done: make(chan struct{}), pending: map[uint64]chan message{},
		version: Version{v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro, v.Package},
	}
	go c.read(d)
	if err := c.Run(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Version is QEMU's.
func (c *Client) Version() Version { return c.version }

// Done is closed when the connection has ended; Err then says why.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err is why the connection ended, nil while it stands.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection and waits for the reader. Safe twice.
func (c *Client) Close() error {
	c.end(ErrClosed)
	<-c.done
	return nil
}

func (c *Client) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
	c.conn.Close()
}

func (c *Client) read(d *Decoder) {
	defer close(c.done)
	for {
		m, err := d.next()
		if err != nil {
			c.end(fmt.Errorf("qmp: %w", err))
			c.mu.Lock()
			for _, ch := range c.pending {
				close(ch)
			}
			clear(c.pending)
			c.mu.Unlock()
			return
		}
		switch {
		case m.Event != "":
			if c.events != nil {
				c.events(Event{m.Event, m.Data, time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)})
			}
		case m.ID != nil:
			c.mu.Lock()
			ch := c.pending[*m.ID]
			delete(c.pending, *m.ID)
			c.mu.Unlock()
			if ch != nil { // else the asker gave up
				ch <- m
			}
		}
	}
}

// Run executes a command. arguments may be nil; the answer is decoded into out
// unless that is nil. Files are passed with the command (getfd, add-fd take
// one); they stay the caller's. An answer of QEMU that is an error is an *Error.
// When ctx ends first, the command may still be carried out.
func (c *Client) Run(ctx context.Context, command string, arguments, out any, files ...*os.File) error {
	ch := make(chan message, 1)
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return c.err
	}
	id := c.next
	c.next++
	c.pending[id] = ch
	c.mu.Unlock()
	if err := c.send(ctx, id, command, arguments, files); err != nil {
		c.mu.Lock()
		delete(c.pending, id)
		c.mu.Unlock()
		return fmt.Errorf("qemu: %s: %w", command, err)
	}
	select {
	case m, ok := <-ch:
		switch {
		case !ok:
			return fmt.Errorf("qemu: %s: %w", command, c.Err())
		case m.Error != nil:
			return &Error{Command: command, Class: m.Error.Class, Desc: m.Error.Desc}
		case out == nil:
			return nil
		}
		if err := json.Unmarshal(m.Return, out); err != nil {
			return fmt.Errorf("qemu: %s: answer: %w", command, err)
		}
		return nil
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.pending, id)
		c.mu.Unlock()
		return fmt.Errorf("qemu: %s: %w", command, context.Cause(ctx))
	}
}

func (c *Client) send(ctx context.Context, id uint64, command string, arguments any, files []*os.File) error {
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return err
	}
	b = append(b, '\n')
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	deadline, _ := ctx.Deadline() // none: zero, no limit
	if err := c.conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	n, _, err := c.conn.WriteMsgUnix(b, oob, nil)
	if err == nil && n < len(b) {
		_, err = c.conn.Write(b[n:])
	}
	if err != nil {
		c.end(fmt.Errorf("qmp: write: %w", err)) // half a command may be out
	}
	return err
}
