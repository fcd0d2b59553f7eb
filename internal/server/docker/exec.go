package docker

import (
	"context"
	"fmt"
	"net/http"

	"github.com/moby/moby/api/types/container"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/server/wire"
)

func (a *API) execCreate(c *call) error {
	var req container.ExecCreateRequest
	if err := c.read(&req); err != nil {
		return err
	}
	if len(req.Cmd) == 0 {
		return wire.Invalid("No exec command specified")
	}
	if _, err := detachKeys(req.DetachKeys); err != nil {
		return err
	}
	o := engine.ExecOptions{
		User: req.User, WorkingDir: req.WorkingDir, Cmd: req.Cmd, Env: req.Env,
		Privileged: req.Privileged, Tty: req.Tty,
		AttachStdin: req.AttachStdin, AttachStdout: req.AttachStdout, AttachStderr: req.AttachStderr,
		DetachKeys: req.DetachKeys,
	}
	if s := req.ConsoleSize; s != nil && !c.v.before(42) {
		o.Height, o.Width = s[0], s[1]
	}
	id, err := a.eng.ExecCreate(c.ctx, c.name(), o)
	if err != nil {
		return err
	}
	return c.json(http.StatusCreated, container.ExecCreateResponse{ID: id})
}

func (a *API) execStart(c *call) error {
	var req container.ExecStartRequest
	if err := c.read(&req); err != nil {
		return err
	}
	id := c.name()
	ex, err := a.eng.ExecInspect(c.ctx, id)
	if err != nil {
		return err
	}
	if req.Detach {
		return a.then(c, http.StatusOK, a.eng.ExecStart(c.ctx, id, true, engine.AttachOptions{}))
	}
	tty := req.Tty
	if ex.ProcessConfig != nil {
		tty = ex.ProcessConfig.Tty // the exec's own word counts
	}
	keys, err := detachKeys(string(ex.DetachKeys))
	if err != nil {
		keys = ex.DetachKeys // parsed already
	}
	st, ctx, err := c.upgrade(tty, ex.OpenStdin, ex.OpenStdout, ex.OpenStderr, keys)
	if err != nil {
		return err
	}
	o := engine.AttachOptions{Stdin: st.stdin, Stdout: st.stdout, Stderr: st.stderr, Stream: true, Ready: st.sess.Begin}
	if s := req.ConsoleSize; s != nil && tty && !c.v.before(42) {
		o.Height, o.Width = s[0], s[1]
	}
	err = a.eng.ExecStart(ctx, id, false, o)
	a.logStream("exec", id, ctx, err)
	if err != nil && ctx.Err() == nil && a.couldNotRun(ctx, id, st) {
		w := st.stderr
		if w == nil {
			w = st.stdout
		}
		if w != nil {
			_, _ = fmt.Fprintf(w, "%s\r\n", wire.Message(err)) // the client may be gone
		}
		err = nil
	}
	st.end(err)
	return nil
}

// couldNotRun tells whether an exec's error belongs on its stream: if that has
// begun, or if the command could not be executed. Such a command has an exit
// code (126, 127), which clients ask for only after a stream.
func (a *API) couldNotRun(ctx context.Context, id string, st *streams) bool {
	if st.sess.Began() {
		return true
	}
	ex, err := a.eng.ExecInspect(ctx, id)
	return err == nil && ex.ExitCode != nil && *ex.ExitCode != 0
}

func (a *API) execResize(c *call) error {
	h, w, err := c.size()
	if err != nil {
		return err
	}
	return a.then(c, http.StatusOK, a.eng.ExecResize(c.ctx, c.name(), h, w))
}

func (a *API) execInspect(c *call) error {
	ex, err := a.eng.ExecInspect(c.ctx, c.name())
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, ex)
}
