package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/term"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/runproto"
)

type execOptions struct {
	detach, interactive, tty, privileged bool
	keys, user, workdir                  string
	env, envFile                         list
}

func (a *app) execCmd() *cobra.Command {
	var o execOptions
	cmd := &cobra.Command{
		Use:   "exec [OPTIONS] CONTAINER COMMAND [ARG...]",
		Short: "Execute a command in a running container",
		Long: `Run one more command in a running container, in its namespaces and limits.
The command's exit code becomes this command's.`,
		Example:           "tenon exec web nginx -t\ntenon exec -it web sh\ntenon exec -u nobody -w /tmp -e A=1 web env",
		Args:              minArgs(2),
		ValidArgsFunction: a.completeFirst(a.containerNames(running)),
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&o.detach, "detach", "d", false, "Detached mode: run command in the background")
	f.StringVar(&o.keys, "detach-keys", "", "Override the key sequence for detaching a container")
	f.VarP(&o.env, "env", "e", "Set environment variables")
	f.Var(&o.envFile, "env-file", "Read in a file of environment variables")
	f.BoolVarP(&o.interactive, "interactive", "i", false, "Keep STDIN open even if not attached")
	f.BoolVar(&o.privileged, "privileged", false, "Give extended privileges to the command")
	f.BoolVarP(&o.tty, "tty", "t", false, "Allocate a pseudo-TTY")
	f.StringVarP(&o.user, "user", "u", "", `Username or UID (format: "<name|uid>[:<group|gid>]")`)
	f.StringVarP(&o.workdir, "workdir", "w", "", "Working directory inside the container")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		return a.exec(ctx, c, o, args)
	})
	return cmd
}

func (a *app) exec(ctx context.Context, c *client.Client, o execOptions, args []string) error {
	env, err := readEnv(o.envFile, o.env)
	if err != nil {
		return err
	}
	keys, err := parseDetachKeys(o.keys)
	if err != nil {
		return err
	}
	stdin := o.interactive && !o.detach
	if err := a.checkTTY(stdin, o.tty); err != nil {
		return err
	}
	req := container.ExecCreateRequest{
		User: o.user, Privileged: o.privileged, Tty: o.tty, DetachKeys: o.keys, Env: env, WorkingDir: o.workdir, Cmd: args[1:],
		AttachStdin: stdin, AttachStdout: !o.detach, AttachStderr: !o.detach,
	}
	if hw, ok := a.consoleSize(); ok && o.tty {
		req.ConsoleSize = &hw
	}
	err = a.execOnce(ctx, c, args[0], &req, o.detach, keys)
	if noEndpoint(err) {
		return a.execStepwise(ctx, c, args[0], &req, o.detach, keys)
	}
	return err
}

// execStepwise runs req by Docker's own endpoints: create, start, inspect.
func (a *app) execStepwise(ctx context.Context, c *client.Client, name string, req *container.ExecCreateRequest, detach bool, keys []byte) error {
	var created container.ExecCreateResponse
	if err := c.Post(ctx, "/containers/"+url.PathEscape(name)+"/exec", nil, req, &created); err != nil {
		return err
	}
	start := container.ExecStartRequest{Detach: detach, Tty: req.Tty, ConsoleSize: req.ConsoleSize}
	path := "/exec/" + url.PathEscape(created.ID)
	if detach {
		return c.Post(ctx, path+"/start", nil, start, nil)
	}
	conn, err := c.Hijack(ctx, client.Request{Method: http.MethodPost, Path: path + "/start", Body: start}, "tcp")
	if err != nil {
		if code := startCode(err.Error()); code != exitEngine {
			return &exitError{code, err}
		}
		return err
	}
	defer conn.Close()
	st := &attached{a: a, c: c, conn: conn}
	switch err := st.stream(ctx, streamOptions{id: created.ID, exec: true, tty: req.Tty, stdin: req.AttachStdin, keys: keys}); {
	case errors.Is(err, errDetached):
		return nil
	case err != nil:
		return err
	}
	var end container.ExecInspectResponse
	if err := c.Get(ctx, path+"/json", nil, &end); err != nil {
		return err
	}
	if end.ExitCode != nil && *end.ExitCode != 0 {
		return &exitError{code: *end.ExitCode}
	}
	return nil
}

// execOnce runs req in one round trip (runproto), until the process has ended
// or the user detaches.
func (a *app) execOnce(ctx context.Context, c *client.Client, name string, req *container.ExecCreateRequest, detach bool, keys []byte) error {
	conf, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("encode the command's configuration: %w", err)
	}
	rc, err := c.Exec(ctx, &runproto.ExecRequest{Container: name, Detach: detach, Config: conf})
	if err != nil {
		return err
	}
	defer rc.Close()
	x := &execSession{a: a, rc: rc, req: req, keys: keys, left: make(chan struct{}), undo: func() {}}
	defer func() { x.undo() }()
	o := newOutputs(a.out, a.err)
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
			case <-x.left:
				return nil
			default:
			}
			return fmt.Errorf("the connection to the daemon broke, the command may still be running: %w", err)
		}
		switch typ {
		case runproto.Stdout:
			err = o.write(o.out, p)
		case runproto.Stderr:
			err = o.write(o.err, p)
		case runproto.Created:
			err = x.started()
		case runproto.Exit, runproto.Error:
			if err := o.flush(); err != nil {
				return readerLeft(err)
			}
			x.undo()
			x.undo = func() {}
			if typ == runproto.Exit {
				return execExited(p)
			}
			return a.execFailed(p, detach)
		}
		if err != nil {
			return readerLeft(err)
		}
	}
}

// execSession is the terminal and the input of one exec.
type execSession struct {
	a    *app
	rc   *client.RunConn
	req  *container.ExecCreateRequest
	keys []byte
	left chan struct{} // closed when the user has typed the detach keys
	undo func()        // gives the terminal back
}

// started connects the terminal and the input to the process.
func (x *execSession) started() error {
	if x.req.Tty {
		restore := func() {}
		if x.req.AttachStdin {
			var err error
			if restore, err = rawTerminal(x.a.in); err != nil {
				return err
			}
		}
		resize := func(h, w uint) {
			_ = x.rc.Writer.WriteJSON(runproto.Resize, runproto.ResizeMessage{H: h, W: w}) // the reader sees a lost connection
		}
		if hw, ok := x.a.consoleSize(); ok && (x.req.ConsoleSize == nil || hw != *x.req.ConsoleSize) {
			resize(hw[0], hw[1]) // it has changed meanwhile
		}
		stop := x.a.onResize(resize)
		x.undo = func() {
			stop()
			restore()
		}
	}
	if x.req.AttachStdin {
		go x.sendStdin()
	}
	return nil
}

// sendStdin copies the input until it ends, or the user types the detach keys.
// It may outlive the session, blocked in a read of the input.
func (x *execSession) sendStdin() {
	in := x.a.in
	if x.req.Tty {
		in = term.NewEscapeProxy(in, x.keys)
	}
	_, err := io.Copy(x.rc.Writer.Stream(runproto.Stdin), onlyReader{in})
	var esc term.EscapeError
	if errors.As(err, &esc) {
		close(x.left)
		_ = x.rc.Writer.Write(runproto.Detach, nil) // it may just have ended
		x.rc.Close()
		return
	}
	_ = x.rc.Writer.Write(runproto.StdinEOF, nil) // the reader sees a lost connection
}

func execExited(payload []byte) error {
	var m runproto.ExitMessage
	if err := json.Unmarshal(payload, &m); err != nil {
		return fmt.Errorf("the daemon's answer is not understood: %w", err)
	}
	if m.Code != 0 {
		return &exitError{code: m.Code}
	}
	return nil
}

func (a *app) execFailed(payload []byte, detach bool) error {
	var m runproto.ErrorMessage
	if err := json.Unmarshal(payload, &m); err != nil {
		return fmt.Errorf("the daemon's answer is not understood: %w", err)
	}
	if m.Code != 0 && !detach {
		a.complain(m.Message)
		return &exitError{code: m.Code}
	}
	err := &client.Error{Status: m.Status, Message: m.Message}
	if code := startCode(m.Message); !detach && m.Kind == "start" && code != exitEngine {
		return &exitError{code, err}
	}
	return err
}
