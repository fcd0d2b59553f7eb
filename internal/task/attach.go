package task

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/channel"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// AttachRequest says which of a process's streams a connection carries.
type AttachRequest struct {
	ID, ExecID            string
	Stdin, Stdout, Stderr bool
}

// OpenAttach attaches to a process, before or after its start. Output comes as
// Docker's stdcopy frames (raw if the process has a terminal) and ends when the
// process has exited and everything is delivered; what is written goes to
// stdin, CloseWrite ends it. The caller closes the connection.
func (c *Client) OpenAttach(ctx context.Context, r AttachRequest) (channel.Conn, error) {
	conn, _, err := c.Stream(ctx, &taskv1.StreamHeader{Kind: &taskv1.StreamHeader_Attach{Attach: &taskv1.Attach{
		Id: r.ID, ExecId: r.ExecID, Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr,
	}}})
	return conn, err
}

// Stdio is what Attach connects. Nil members are not attached.
type Stdio struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Terminal       bool // the process has one: all output goes to Stdout
}

// An Attachment is a running Attach.
type Attachment struct {
	conn channel.Conn
	done chan struct{}
	err  error
	once sync.Once
}

// Attach connects a process's streams; when it returns, nothing written from
// now on is missed. Stdin's end is passed on; a Read of Stdin that never
// returns outlives the Attachment.
func (c *Client) Attach(ctx context.Context, id, execID string, s Stdio) (*Attachment, error) {
	conn, err := c.OpenAttach(ctx, AttachRequest{ID: id, ExecID: execID, Stdin: s.Stdin != nil, Stdout: s.Stdout != nil, Stderr: s.Stderr != nil})
	if err != nil {
		return nil, err
	}
	return attachment(conn, s), nil
}

// Execute is Exec, Attach and Start in one round trip, and tells the process's
// pid. On an error nothing is left of the process; its class is as Start's, and
// NotImplemented from a shim that has no Execute.
func (c *Client) Execute(ctx context.Context, r ExecRequest, s Stdio) (a *Attachment, pid int, err error) {
	conn, reply, err := c.Stream(ctx, &taskv1.StreamHeader{Kind: &taskv1.StreamHeader_Execute{Execute: &taskv1.Execute{
		Attach: &taskv1.Attach{
			Id: r.ID, ExecId: r.ExecID, Stdin: s.Stdin != nil, Stdout: s.Stdout != nil, Stderr: s.Stderr != nil,
		},
		Options: r.options(), Terminal: r.Terminal,
	}}})
	if err != nil {
		return nil, 0, err
	}
	return attachment(conn, s), int(reply.Pid), nil
}

// attachment copies between a connection and s.
func attachment(conn channel.Conn, s Stdio) *Attachment {
	a := &Attachment{conn: conn, done: make(chan struct{})}
	if s.Stdin != nil {
		go func() {
			_, _ = io.Copy(conn, s.Stdin) // the process's stdin may be gone before the user's
			_ = conn.CloseWrite()
		}()
	}
	go func() {
		defer close(a.done)
		defer conn.Close()
		if s.Terminal && s.Stdout != nil {
			_, a.err = io.Copy(s.Stdout, conn)
		} else {
			a.err = Demux(conn, s.Stdout, s.Stderr)
		}
	}()
	return a
}

// Done is closed when all output has been copied, or copying it failed.
func (a *Attachment) Done() <-chan struct{} { return a.done }

// Wait returns when all output has been copied, or copying it failed.
func (a *Attachment) Wait(ctx context.Context) error {
	select {
	case <-a.done:
		return a.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Close detaches; the process goes on.
func (a *Attachment) Close() error {
	a.once.Do(func() { a.conn.Close() })
	<-a.done
	return nil
}

// maxFrame bounds a stdcopy frame from the shim, which makes none above 64 KiB.
const maxFrame = 1 << 20

// Demux splits Docker's stdcopy framing until r ends. Nil writers discard.
func Demux(r io.Reader, stdout, stderr io.Writer) error {
	if stdout == nil {
		stdout = io.Discard
	}
	if stderr == nil {
		stderr = io.Discard
	}
	var head [8]byte
	buf := make([]byte, 32<<10)
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		w := stdout
		switch head[0] {
		case 0, 1:
		case 2:
			w = stderr
		default:
			return fmt.Errorf("stdcopy frame of stream %d: %w", head[0], errdefs.ErrDataLoss)
		}
		n := int64(binary.BigEndian.Uint32(head[4:]))
		if n > maxFrame {
			return fmt.Errorf("stdcopy frame of %d bytes: %w", n, errdefs.ErrDataLoss)
		}
		if m, err := io.CopyBuffer(onlyWriter{w}, io.LimitReader(r, n), buf); err != nil {
			return err
		} else if m < n {
			return io.ErrUnexpectedEOF
		}
	}
}

// onlyWriter hides ReadFrom, so that CopyBuffer uses its buffer.
type onlyWriter struct{ io.Writer }
