package tenon

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/moby/moby/api/types/container"
	"tenon.dev/tenon/client/runproto"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/server/wire"
)

const execIntro = "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: " + runproto.ExecUpgrade + "\r\n\r\n"

// exec is POST /tenon/v1/exec.
func (a *API) exec(w http.ResponseWriter, r *http.Request) error {
	if !strings.EqualFold(r.Header.Get("Upgrade"), runproto.ExecUpgrade) {
		return wire.Invalid("this endpoint needs the headers Connection: Upgrade and Upgrade: %s", runproto.ExecUpgrade)
	}
	var req runproto.ExecRequest
	if err := wire.ReadJSON(w, r, &req); err != nil {
		return err
	}
	var conf container.ExecCreateRequest
	if err := json.Unmarshal(req.Config, &conf); err != nil {
		return wire.Invalid("config is not understood: %v", err)
	}
	switch {
	case req.Container == "":
		return wire.Invalid("no container specified")
	case len(conf.Cmd) == 0:
		return wire.Invalid("No exec command specified")
	}
	o := engine.ExecOptions{
		User: conf.User, WorkingDir: conf.WorkingDir, Cmd: conf.Cmd, Env: conf.Env,
		Privileged: conf.Privileged, Tty: conf.Tty,
		AttachStdin: conf.AttachStdin, AttachStdout: conf.AttachStdout, AttachStderr: conf.AttachStderr,
		DetachKeys: conf.DetachKeys,
	}
	if s := conf.ConsoleSize; s != nil {
		o.Height, o.Width = s[0], s[1]
	}
	sess, ctx, err := wire.Hijack(w, r, execIntro)
	if err != nil {
		return err
	}
	sess.Begin()
	defer sess.End()
	ex := &execution{link: link{sess: sess, out: wire.NewFrames(sess.Conn()), tty: conf.Tty}, eng: a.cfg.Engine, detach: req.Detach}
	ex.do(ctx, req.Container, o)
	return nil
}

// execution is one exec's connection.
type execution struct {
	link
	eng    engine.API
	detach bool
}

func (x *execution) do(ctx context.Context, ref string, o engine.ExecOptions) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	id, err := x.eng.ExecCreate(ctx, ref, o)
	if err != nil {
		x.fail(err, "", 0)
		return
	}
	var at engine.AttachOptions
	if !x.detach {
		created := sync.OnceFunc(func() { x.send(runproto.Created, runproto.CreatedMessage{ID: id}) })
		at = engine.AttachOptions{Stream: true, Ready: created}
		if o.AttachStdout {
			at.Stdout = &after{created, x.out.Stream(runproto.Stdout)}
		}
		if o.AttachStderr {
			at.Stderr = &after{created, x.out.Stream(runproto.Stderr)}
		}
		var in *inbox
		if o.AttachStdin {
			in = newInbox()
			at.Stdin = in
			defer in.close(io.EOF)
		}
		x.ctl = newControl(ctx, nil, x.eng.ExecResize)
		x.ctl.target(id)
		go x.read(in, cancel) // ends with the session
	}
	err = x.eng.ExecStart(ctx, id, x.detach, at)
	switch {
	case err != nil && ctx.Err() != nil:
		// The client has left; nobody reads an answer.
	case err != nil:
		x.fail(err, "start", x.code(ctx, id))
	case x.detach:
		x.send(runproto.Exit, runproto.ExitMessage{ID: id})
	default:
		x.send(runproto.Exit, runproto.ExitMessage{Code: x.code(ctx, id)})
	}
}

// code is the exec's exit code, 0 if it has none.
func (x *execution) code(ctx context.Context, id string) int {
	ex, err := x.eng.ExecInspect(ctx, id)
	if err != nil || ex.ExitCode == nil {
		return 0
	}
	return *ex.ExitCode
}

// after is a writer whose first byte comes after something else was sent: the
// process's output may be faster than the answer to its start.
type after struct {
	first func()
	w     io.Writer
}

func (a *after) Write(p []byte) (int, error) {
	a.first()
	return a.w.Write(p)
}
