package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/term"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/runproto"
)

// session is one foreground (or detached) run.
type session struct {
	a     *app
	c     *client.Client
	flags *containerFlags
	o     runOptions
	req   *container.CreateRequest
	keys  []byte

	stopResize func()

	mu      sync.Mutex
	restore func()
}

// runError is an Error frame.
type runError struct{ runproto.ErrorMessage }

func (e *runError) Error() string { return "Error response from daemon: " + e.Message }

// frames speaks the run protocol until the container has ended, or the user
// detaches. It closes rc.
func (s *session) frames(rc *client.RunConn) error {
	defer rc.Close()
	defer s.leaveRaw()
	s.stopResize = func() {}
	defer func() { s.stopResize() }()
	var pulling atomic.Bool
	var interrupted atomic.Int32
	if !s.o.detach && s.o.sigProxy {
		defer onSignals(func(name string) {
			if pulling.Load() && (name == "SIGINT" || name == "SIGTERM") {
				// There is no container yet that the signal could be for.
				interrupted.Store(map[string]int32{"SIGINT": 130, "SIGTERM": 143}[name])
				rc.Close()
				return
			}
			_ = rc.Writer.WriteJSON(runproto.Signal, runproto.SignalMessage{Signal: name}) // a lost connection shows in the reader
		})()
	}
	var prog *progress
	o := newOutputs(s.a.out, s.a.err)
	detached := make(chan struct{})
	for {
		if rc.Buffered() == 0 {
			if err := o.flush(); err != nil {
				return readerLeft(err)
			}
		}
		typ, p, err := rc.Reader.Next()
		if err != nil {
			_ = o.flush() // the lost connection is the news
			select {
			case <-detached:
				return nil
			default:
			}
			if code := interrupted.Load(); code != 0 {
				return &exitError{code: int(code)}
			}
			return fmt.Errorf("the connection to the daemon broke, the container may still be running: %w", err)
		}
		switch typ {
		case runproto.Stdout:
			err = o.write(o.out, p)
		case runproto.Stderr:
			err = o.write(o.err, p)
		case runproto.Progress:
			pulling.Store(true)
			if prog == nil {
				prog = newProgress(s.a.err, s.flags.quiet)
			}
			var m jsonstream.Message
			if json.Unmarshal(p, &m) == nil {
				prog.add(m)
			}
		case runproto.Created:
			pulling.Store(false)
			err = s.created(rc, p, detached)
		case runproto.Exit:
			if err := o.flush(); err != nil {
				return readerLeft(err)
			}
			return s.exited(p)
		case runproto.Error:
			_ = o.flush() // the server's error says more
			s.leaveRaw()
			return s.failed(p)
		}
		if err != nil {
			return readerLeft(err)
		}
	}
}

// readerLeft turns the error of a write that nobody reads any more into the
// exit code of a process that SIGPIPE ends; other errors stay as they are.
func readerLeft(err error) error {
	if errors.Is(err, syscall.EPIPE) {
		return &exitError{code: 128 + int(syscall.SIGPIPE)}
	}
	return err
}

// created handles the Created frame: from now on there is a container.
func (s *session) created(rc *client.RunConn, payload []byte, detached chan struct{}) error {
	var m runproto.CreatedMessage
	if err := json.Unmarshal(payload, &m); err != nil {
		return fmt.Errorf("the daemon's answer is not understood: %w", err)
	}
	for _, w := range m.Warnings {
		fmt.Fprintln(s.a.err, "WARNING:", w)
	}
	if err := writeCIDFile(s.flags.cidfile, m.ID); err != nil {
		return err
	}
	if s.o.detach {
		return nil
	}
	conf := s.req.Config
	if conf.Tty {
		if err := s.enterRaw(); err != nil {
			return err
		}
		s.stopResize = s.a.onResize(func(h, w uint) {
			_ = rc.Writer.WriteJSON(runproto.Resize, runproto.ResizeMessage{H: h, W: w}) // the reader sees a lost connection
		})
	}
	if conf.AttachStdin {
		go s.sendStdin(rc, detached)
	}
	return nil
}

// sendStdin copies the input until it ends, or the user types the detach keys.
// It may outlive the session, blocked in a read of the input.
func (s *session) sendStdin(rc *client.RunConn, detached chan struct{}) {
	in := s.a.in
	if s.req.Config.Tty {
		in = term.NewEscapeProxy(in, s.keys)
	}
	_, err := io.Copy(rc.Writer.Stream(runproto.Stdin), onlyReader{in})
	var esc term.EscapeError
	if errors.As(err, &esc) {
		close(detached)
		_ = rc.Writer.Write(runproto.Detach, nil)
		rc.Close()
		return
	}
	_ = rc.Writer.Write(runproto.StdinEOF, nil) // the reader sees a lost connection
}

// onlyReader hides WriteTo, so that io.Copy goes through Read.
type onlyReader struct{ io.Reader }

func (s *session) enterRaw() error {
	if !s.req.Config.AttachStdin {
		return nil
	}
	restore, err := rawTerminal(s.a.in)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.restore = restore
	s.mu.Unlock()
	return nil
}

func (s *session) leaveRaw() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.restore != nil {
		s.restore()
		s.restore = nil
	}
}

func (s *session) exited(payload []byte) error {
	var m runproto.ExitMessage
	if err := json.Unmarshal(payload, &m); err != nil {
		return fmt.Errorf("the daemon's answer is not understood: %w", err)
	}
	s.leaveRaw()
	if s.o.detach {
		fmt.Fprintln(s.a.out, m.ID)
		return nil
	}
	if m.Error != "" {
		return &exitError{exitEngine, fmt.Errorf("Error response from daemon: %s", m.Error)}
	}
	if m.Code != 0 {
		return &exitError{code: m.Code}
	}
	return nil
}

func (s *session) failed(payload []byte) error {
	e := &runError{}
	if err := json.Unmarshal(payload, &e.ErrorMessage); err != nil {
		return fmt.Errorf("the daemon's answer is not understood: %w", err)
	}
	code := e.Code
	if code == 0 {
		code = exitEngine
		if e.Kind == "start" {
			code = startCode(e.Message)
		}
	}
	return &exitError{code, e}
}

// fallback runs the container by Docker's own endpoints: create, attach, wait,
// start.
func (s *session) fallback(ctx context.Context) error {
	id, err := s.create(ctx)
	if err != nil {
		return err
	}
	conf := s.req.Config
	if s.o.detach {
		if err := s.start(ctx, id); err != nil {
			return err
		}
		fmt.Fprintln(s.a.out, id)
		return nil
	}
	var st *attached
	if conf.AttachStdin || conf.AttachStdout || conf.AttachStderr {
		q := attachQuery(conf.AttachStdin, conf.AttachStdout, conf.AttachStderr, false)
		if st, err = s.a.attach(ctx, s.c, id, q); err != nil {
			return err
		}
		defer st.conn.Close()
	}
	cond := container.WaitConditionNextExit
	if s.flags.autoRemove {
		cond = container.WaitConditionRemoved
	}
	wait, err := startWait(ctx, s.c, id, cond)
	if err != nil {
		return err
	}
	if s.o.sigProxy {
		defer s.a.forwardSignals(ctx, s.c, id)()
	}
	if err := s.start(ctx, id); err != nil {
		return err
	}
	if st != nil {
		switch err := st.stream(ctx, streamOptions{id: id, tty: conf.Tty, stdin: conf.AttachStdin, keys: s.keys}); {
		case errors.Is(err, errDetached):
			return nil
		case err != nil:
			return err
		}
	} else {
		fmt.Fprintln(s.a.out, id)
	}
	return wait()
}

// start starts the created container, and removes it again if that fails and
// it was to be removed at its end.
func (s *session) start(ctx context.Context, id string) error {
	err := s.c.Post(ctx, "/containers/"+id+"/start", nil, nil, nil)
	if err == nil {
		return nil
	}
	if s.flags.autoRemove {
		_ = s.c.Delete(ctx, "/containers/"+id, url.Values{"v": {"1"}, "force": {"1"}}, nil) // the server may have done it already
	}
	return &exitError{startCode(err.Error()), err}
}

// startWait asks to be told when the container ends and returns, once the
// server listens, a function that waits for that and gives the exit code as an
// error.
func startWait(ctx context.Context, c *client.Client, id string, cond container.WaitCondition) (func() error, error) {
	resp, err := c.Do(ctx, client.Request{
		Method: http.MethodPost, Path: "/containers/" + url.PathEscape(id) + "/wait",
		Query: url.Values{"condition": {string(cond)}},
	})
	if err != nil {
		return nil, err
	}
	return func() error {
		defer resp.Body.Close()
		var out container.WaitResponse
		if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
			return &exitError{exitEngine, fmt.Errorf("wait for the container: %w", err)}
		}
		if out.Error != nil && strings.TrimSpace(out.Error.Message) != "" {
			return &exitError{exitEngine, errors.New(out.Error.Message)}
		}
		if out.StatusCode != 0 {
			return &exitError{code: int(out.StatusCode)}
		}
		return nil
	}, nil
}

// attached is a connection to the streams of a container or an exec.
type attached struct {
	a    *app
	c    *client.Client
	conn *client.Hijacked
}

// errDetached reports that the user typed the detach keys.
var errDetached = errors.New("detached")

type streamOptions struct {
	id     string // of the container, or of the exec
	exec   bool
	tty    bool
	stdin  bool
	keys   []byte
	redraw bool // make what runs there draw its screen again
}

// stream copies input and output until the output ends; errDetached says that
// the user left.
func (t *attached) stream(ctx context.Context, o streamOptions) error {
	if o.tty && o.stdin {
		restore, err := rawTerminal(t.a.in)
		if err != nil {
			return err
		}
		defer restore()
	}
	if o.tty {
		kind := "/containers/"
		if o.exec {
			kind = "/exec/"
		}
		resize := func(h, w uint) {
			q := url.Values{"h": {fmt.Sprint(h)}, "w": {fmt.Sprint(w)}}
			_ = t.c.Post(ctx, kind+url.PathEscape(o.id)+"/resize", q, nil, nil) // cosmetic
		}
		if hw, ok := t.a.consoleSize(); ok {
			if o.redraw {
				resize(hw[0]+1, hw[1]+1) // a change is what makes programs draw
			}
			resize(hw[0], hw[1])
		}
		defer t.a.onResize(resize)()
	}
	left := make(chan struct{})
	if o.stdin {
		go func() {
			in := t.a.in
			if o.tty {
				in = term.NewEscapeProxy(in, o.keys)
			}
			_, err := io.Copy(t.conn.Conn, onlyReader{in})
			var esc term.EscapeError
			if errors.As(err, &esc) {
				close(left)
				t.conn.Close()
				return
			}
			_ = t.conn.CloseWrite() // the server may have closed already
		}()
	}
	var err error
	if o.tty {
		_, err = io.Copy(t.a.out, t.conn.Reader)
	} else {
		err = demux(t.a.out, t.a.err, t.conn.Reader)
	}
	select {
	case <-left:
		return errDetached
	default:
		return readerLeft(err)
	}
}
