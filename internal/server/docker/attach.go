package docker

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"

	"github.com/moby/moby/api/types"
	"github.com/moby/term"
	"golang.org/x/net/websocket"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/server/wire"
)

// intro is the header of an upgraded answer.
func (c *call) intro(tty bool) string {
	if len(c.r.Header["Upgrade"]) == 0 {
		return "HTTP/1.1 200 OK\r\nContent-Type: " + types.MediaTypeRawStream + "\r\n\r\n"
	}
	ct := types.MediaTypeRawStream
	if !tty && !c.v.before(42) {
		ct = types.MediaTypeMultiplexedStream
	}
	return "HTTP/1.1 101 UPGRADED\r\nContent-Type: " + ct + "\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
}

// errDetached ends an attachment whose user typed the detach keys.
var errDetached = errors.New("read escape sequence")

// detachKeys parses keys like "ctrl-p,ctrl-q", which is the default.
func detachKeys(s string) ([]byte, error) {
	if s == "" {
		return []byte{16, 17}, nil
	}
	keys, err := term.ToBytes(s)
	if err != nil {
		return nil, wire.Invalid("Invalid detach keys (%s) provided: write them like ctrl-p,ctrl-q", s)
	}
	return keys, nil
}

// streams connects an upgraded connection to a container's streams.
type streams struct {
	sess           *wire.Session
	cancel         context.CancelCauseFunc
	stdin          io.Reader
	stdout, stderr io.Writer
}

// begun sends the session's header before the first output.
type begun struct {
	s *wire.Session
	w io.Writer
}

func (b begun) Write(p []byte) (int, error) {
	b.s.Begin()
	return b.w.Write(p)
}

// upgrade takes the call's connection over. keys are those that detach from a
// terminal.
func (c *call) upgrade(tty, in, out, errs bool, keys []byte) (*streams, context.Context, error) {
	sess, ctx, err := wire.Hijack(c.w, c.r, c.intro(tty))
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	st := &streams{sess: sess, cancel: cancel}
	if in {
		st.stdin = sess
		if tty {
			st.stdin = &ttyInput{r: term.NewEscapeProxy(sess, keys), cancel: cancel}
		}
	}
	if tty {
		if out || errs {
			st.stdout = begun{sess, sess.Conn()}
		}
	} else {
		f := wire.NewFrames(sess.Conn())
		if out {
			st.stdout = begun{sess, f.Stream(wire.Stdout)}
		}
		if errs {
			st.stderr = begun{sess, f.Stream(wire.Stderr)}
		}
	}
	return st, ctx, nil
}

// end ends the session; err is what the engine's call returned.
func (st *streams) end(err error) {
	if err != nil && !st.sess.Began() {
		st.sess.Refuse(err)
	}
	st.sess.Begin()
	st.cancel(nil)
	st.sess.End()
}

// ttyInput is a terminal's input: neither the detach keys nor the client's
// departure are an end of file for the container, they end the attachment.
type ttyInput struct {
	r      io.Reader
	cancel context.CancelCauseFunc
}

func (t *ttyInput) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if err == nil {
		return n, nil
	}
	var esc term.EscapeError
	cause := wire.ErrClientGone
	if errors.As(err, &esc) {
		cause = errDetached
	}
	t.cancel(cause)
	return n, cause
}

func (a *API) containerAttach(c *call) error {
	keys, err := detachKeys(c.str("detachKeys"))
	if err != nil {
		return err
	}
	ref := c.name()
	tty, err := a.eng.IsTTY(c.ctx, ref)
	if err != nil {
		return err
	}
	st, ctx, err := c.upgrade(tty, c.flag("stdin"), c.flag("stdout"), c.flag("stderr"), keys)
	if err != nil {
		return err
	}
	err = a.eng.Attach(ctx, ref, engine.AttachOptions{
		Stdin: st.stdin, Stdout: st.stdout, Stderr: st.stderr,
		Logs: c.flag("logs"), Stream: c.flag("stream"),
		Ready: st.sess.Begin,
	})
	a.logStream("attach", ref, ctx, err)
	st.end(err)
	return nil
}

// logStream notes how a stream ended, if not well.
func (a *API) logStream(what, ref string, ctx context.Context, err error) {
	if err != nil && ctx.Err() == nil {
		a.log.Debug("stream ended", "what", what, "container", ref, "err", err)
	}
}

func (a *API) containerAttachWS(c *call) error {
	keys, err := detachKeys(c.str("detachKeys"))
	if err != nil {
		return err
	}
	ref := c.name()
	tty, err := a.eng.IsTTY(c.ctx, ref)
	if err != nil {
		return err
	}
	in, out, errs := true, true, true
	if !c.v.before(42) {
		in, out, errs = c.flag("stdin"), c.flag("stdout"), c.flag("stderr")
	}
	srv := websocket.Server{Handler: func(ws *websocket.Conn) {
		ws.PayloadType = websocket.BinaryFrame
		ctx, cancel := context.WithCancelCause(c.ctx)
		defer cancel(nil)
		o := engine.AttachOptions{Logs: c.flag("logs"), Stream: c.flag("stream")}
		// The client's frames are always read: that is how its close shows.
		pr, pw := io.Pipe()
		go func() {
			_, err := io.Copy(pw, ws)
			_ = pw.CloseWithError(err) // never fails
			cancel(wire.ErrClientGone)
		}()
		defer func() { _ = pr.Close() }() // ends the copy together with ws
		if in {
			o.Stdin = pr
			if tty {
				o.Stdin = &ttyInput{r: term.NewEscapeProxy(pr, keys), cancel: cancel}
			}
		} else {
			go func() { _, _ = io.Copy(io.Discard, pr) }() // ends with pr
		}
		if out || (tty && errs) {
			o.Stdout = ws
		}
		if errs && !tty {
			o.Stderr = ws
		}
		a.logStream("attach", ref, ctx, a.eng.Attach(ctx, ref, o))
	}}
	srv.ServeHTTP(hijackable{c.w}, c.r)
	return nil
}

// hijackable finds the Hijacker under wrapped writers, for code that asserts it.
type hijackable struct{ http.ResponseWriter }

// Hijack implements http.Hijacker.
func (h hijackable) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return http.NewResponseController(h.ResponseWriter).Hijack()
}
