package shim

import (
	"context"
	"fmt"
	"io"
	"net"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	taskv3 "tenon.dev/tenon/internal/task/api/v3"
)

// serveStream is the channel.Handler of the shim.
func (s *Shim) serveStream(ctx context.Context, conn channel.Conn, h *taskv1.StreamHeader) {
	stop := context.AfterFunc(ctx, func() { conn.Close() }) // the shim ends
	defer stop()
	switch k := h.Kind.(type) {
	case *taskv1.StreamHeader_Attach:
		s.serveAttach(conn, k.Attach)
	case *taskv1.StreamHeader_Execute:
		s.serveExecute(conn, k.Execute)
	case *taskv1.StreamHeader_Files:
		if k.Files.Operation == taskv1.Files_ACCOUNTS {
			s.serveAccounts(conn, k.Files)
			return
		}
		s.serveFiles(ctx, conn, k.Files)
	case *taskv1.StreamHeader_Serve:
		s.serveSocket(ctx, conn, k.Serve)
	default:
		refuse(conn, fmt.Errorf("stream of an unknown kind: %w", errdefs.ErrNotImplemented))
	}
}

// refuse answers with an error and closes.
func refuse(conn net.Conn, err error) {
	_ = channel.WriteMessage(conn, task.ReplyOf(err)) // the client may be gone: the same to us
	conn.Close()
}

func (s *Shim) serveAttach(conn channel.Conn, a *taskv1.Attach) {
	p, err := s.process(a.Id, a.ExecId)
	if err != nil {
		refuse(conn, err)
		return
	}
	if p.io == nil {
		refuse(conn, fmt.Errorf("%s: has no streams to attach to: %w", p.name(), errdefs.ErrFailedPrecondition))
		return
	}
	// Output is kept from now on, and follows the reply.
	c := newClient(conn, a.Stdout, a.Stderr)
	p.io.hub.add(c)
	s.attached(p, c, a.Stdin, &taskv1.StreamReply{})
}

// serveExecute makes a further process, attaches to it and starts it.
func (s *Shim) serveExecute(conn channel.Conn, x *taskv1.Execute) {
	a, o := x.Attach, x.Options
	if a == nil || o == nil || a.ExecId == "" {
		refuse(conn, fmt.Errorf("execute: what is missing: %w", errdefs.ErrInvalidArgument))
		return
	}
	p, err := s.makeExec(&taskv3.ExecProcessRequest{Id: a.Id, ExecId: a.ExecId, Terminal: x.Terminal}, o)
	if err != nil {
		refuse(conn, err)
		return
	}
	c := newClient(conn, a.Stdout, a.Stderr)
	p.io.hub.add(c)
	pid, err := p.start()
	if err != nil {
		p.io.hub.remove(c)
		p.c.forget(p.execID)
		refuse(conn, err)
		return
	}
	s.attached(p, c, a.Stdin, &taskv1.StreamReply{Pid: uint32(pid)})
}

// attached answers and serves an attached client until its side ends.
func (s *Shim) attached(p *process, c *client, stdin bool, reply *taskv1.StreamReply) {
	if err := channel.WriteMessage(c.conn, reply); err != nil {
		p.io.hub.remove(c)
		c.hungUp()
		return
	}
	c.flush()
	raw := c.raw
	if raw == nil {
		s.attachGeneric(p, c, stdin)
		return
	}
	// The client's bytes, or only its end.
	open := stdin
	for {
		b, n, err := readPooled(raw, 0)
		if n > 0 && open {
			if f := p.io.stdinFile(); f == nil {
				open = false
			} else if _, err := f.Write((*b)[:n]); err != nil {
				open = false // the process has closed it: discard
			}
		}
		if b != nil {
			pumpBuffers.Put(b)
		}
		if err != nil || n == 0 {
			break
		}
	}
	s.detach(p, c, stdin)
}

// attachGeneric is serveAttach's reading for transports without descriptors.
func (s *Shim) attachGeneric(p *process, c *client, stdin bool) {
	b := make([]byte, 4096)
	var err error
	for err == nil {
		var n int
		n, err = c.conn.Read(b)
		if n > 0 && stdin {
			if f := p.io.stdinFile(); f != nil {
				_, _ = f.Write(b[:n]) // closed by the process: discard
			}
		}
	}
	if err != io.EOF { // such a transport tells a lost connection so
		if stdin {
			p.stdinEnded()
		}
		p.io.hub.remove(c)
		c.hungUp()
		return
	}
	s.detach(p, c, stdin)
}

// detach handles the end of a client's side.
func (s *Shim) detach(p *process, c *client, stdin bool) {
	if stdin {
		p.stdinEnded()
	}
	if isHungUp(c.conn) {
		p.io.hub.remove(c)
		c.hungUp()
		return
	}
	// Half closed: output goes on until the client hangs up or the process ends.
	c.readEnded()
	if f, ok := c.conn.(rawFile); ok {
		token, err := s.poll.once(f, unix.EPOLLHUP, func() {
			p.io.hub.remove(c)
			c.hungUp()
		})
		if err == nil { // else it is closed already
			c.onDrop(func() { s.poll.forget(token) })
		}
	}
}
