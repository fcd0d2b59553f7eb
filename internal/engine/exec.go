package engine

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/rootfs"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
)

// execution is a further process of a container.
type execution struct {
	id string
	c  *ctr
	o  ExecOptions

	mu      sync.Mutex
	started bool
	running bool
	exit    *int
	pid     int
	ended   chan struct{} // closed at the exit, or when it can't be started
	gone    time.Time     // when it ended
}

func (x *execution) code() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.exit == nil {
		return 0
	}
	return *x.exit
}

func (e *Engine) newExec(c *ctr, o ExecOptions) (*execution, error) {
	if len(o.Cmd) == 0 {
		return nil, invalid("no exec command specified")
	}
	b := make([]byte, 32)
	if _, err := rand.Read(b); err != nil {
		return nil, fmt.Errorf("exec id: %w", err)
	}
	x := &execution{id: hex.EncodeToString(b), c: c, o: o, ended: make(chan struct{})}
	e.mu.Lock()
	e.execs[x.id] = x
	e.mu.Unlock()
	c.mu.Lock()
	c.execs[x.id] = x
	c.mu.Unlock()
	return x, nil
}

func (e *Engine) dropExec(x *execution) {
	e.mu.Lock()
	delete(e.execs, x.id)
	e.mu.Unlock()
	x.c.mu.Lock()
	delete(x.c.execs, x.id)
	x.c.mu.Unlock()
}

// dropExecs forgets a container's: they died with it.
func (e *Engine) dropExecs(c *ctr) {
	c.mu.Lock()
	var list []*execution
	for _, x := range c.execs {
		list = append(list, x)
	}
	c.mu.Unlock()
	for _, x := range list {
		x.finish(137)
	}
	// Clients ask for the exit code a moment later.
	e.forgetExecsLater(list)
}

// execKeep is how long an ended exec can still be inspected.
const execKeep = 5 * time.Minute

func (e *Engine) forgetExecsLater(list []*execution) {
	if len(list) == 0 {
		return
	}
	time.AfterFunc(execKeep, func() {
		for _, x := range list {
			e.dropExec(x)
		}
	})
}

// finish records the exit, once.
func (x *execution) finish(code int) (first bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.exit != nil {
		return false
	}
	x.exit, x.running, x.gone = &code, false, time.Now()
	close(x.ended)
	return true
}

// ExecCreate prepares a process in a running container.
func (e *Engine) ExecCreate(_ context.Context, ref string, o ExecOptions) (string, error) {
	c, err := e.find(ref)
	if err != nil {
		return "", err
	}
	if err := execable(c); err != nil {
		return "", err
	}
	if err := noSystem(c, "exec"); err != nil {
		return "", err
	}
	x, err := e.newExec(c, o)
	if err != nil {
		return "", err
	}
	e.emit(c, events.Action("exec_create: "+strings.Join(o.Cmd, " ")), map[string]string{"execID": x.id})
	return x.id, nil
}

func execable(c *ctr) error {
	r := c.record()
	switch {
	case r.Facts.Restarting:
		return conflict("Container %s is restarting, wait until the container is running", c.id)
	case !r.Running():
		return conflict("container %s is not running", c.id)
	case r.Facts.Paused:
		return conflict("Container %s is paused, unpause the container before exec", c.id)
	}
	return nil
}

func (e *Engine) exec(id string) (*execution, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if x, ok := e.execs[id]; ok {
		return x, nil
	}
	return nil, notFound("No such exec instance: %s", id)
}

// ExecStart runs a prepared process: attached until its end, or detached.
func (e *Engine) ExecStart(ctx context.Context, id string, detach bool, o AttachOptions) error {
	x, err := e.exec(id)
	if err != nil {
		return err
	}
	x.mu.Lock()
	switch {
	case x.running:
		x.mu.Unlock()
		return conflict("exec command %s is already running", id)
	case x.started:
		x.mu.Unlock()
		return conflict("exec command has already run")
	}
	x.started = true
	x.mu.Unlock()
	if err := execable(x.c); err != nil {
		return err
	}
	e.emit(x.c, events.Action("exec_start: "+strings.Join(x.o.Cmd, " ")), map[string]string{"execID": x.id})
	if o.Width == 0 && o.Height == 0 {
		o.Width, o.Height = x.o.Width, x.o.Height
	}
	return e.runExec(ctx, x, detach, o)
}

// runExec starts the process and, attached, waits for its output's end and its
// exit.
func (e *Engine) runExec(ctx context.Context, x *execution, detach bool, o AttachOptions) error {
	client, err := e.client(ctx, x.c)
	if err != nil {
		return err
	}
	process, err := e.execProcess(ctx, client, x)
	if err != nil {
		x.finish(126)
		e.forgetExecsLater([]*execution{x})
		return err
	}
	if !x.o.AttachStdin {
		o.Stdin = nil
	}
	if g := x.c.onMachine(); g != nil && x.o.Privileged {
		g.machine.Taint(e.reachOf(x.c.record()))
	}
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTime)
	defer cancel()
	r := task.ExecRequest{
		ID: x.c.id, ExecID: x.id, Process: process, Terminal: x.o.Tty, Stdin: o.Stdin != nil, Privileged: x.o.Privileged,
		ConsoleWidth: uint32(o.Width), ConsoleHeight: uint32(o.Height),
	}
	if detach {
		return e.startDetached(sctx, client, x, r)
	}
	att, pid, err := client.Execute(sctx, r, stdio(o, x.o.Tty))
	if errdefs.IsNotImplemented(err) {
		return e.runExecStepwise(ctx, sctx, client, x, r, o)
	}
	if err != nil {
		x.finish(startExitCode(err))
		if errdefs.IsUnavailable(err) { // it may run nevertheless
			e.killExec(x)
			e.deleteExec(client, x)
		} else {
			e.forgetExecsLater([]*execution{x})
		}
		return execError(x, err)
	}
	x.c.track(att)
	x.runs(pid)
	if o.Ready != nil {
		o.Ready()
	}
	return e.waitExec(ctx, client, x, att)
}

// runs records the process's start.
func (x *execution) runs(pid int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.running, x.pid = x.exit == nil, pid
}

// startDetached starts a process that nobody is attached to.
func (e *Engine) startDetached(ctx context.Context, client *task.Client, x *execution, r task.ExecRequest) error {
	if err := client.Exec(ctx, r); err != nil {
		x.finish(startExitCode(err))
		return execError(x, err)
	}
	pid, err := client.Start(ctx, x.c.id, x.id)
	if err != nil {
		x.finish(startExitCode(err))
		e.deleteExec(client, x)
		return execError(x, err)
	}
	x.runs(pid)
	e.spawn(func() {
		select {
		case <-x.ended:
			e.deleteExec(client, x)
		case <-e.ctx.Done():
		}
	})
	return nil
}

// runExecStepwise is runExec's way with a shim of an earlier version, which may
// still run after an upgrade. ctx is the session's, sctx the start's.
func (e *Engine) runExecStepwise(ctx, sctx context.Context, client *task.Client, x *execution, r task.ExecRequest, o AttachOptions) error {
	if err := client.Exec(sctx, r); err != nil {
		x.finish(startExitCode(err))
		return execError(x, err)
	}
	att, err := client.Attach(sctx, x.c.id, x.id, stdio(o, x.o.Tty))
	if err != nil {
		x.finish(126)
		e.deleteExec(client, x)
		return err
	}
	if o.Ready != nil {
		o.Ready()
	}
	pid, err := client.Start(sctx, x.c.id, x.id)
	if err != nil {
		x.finish(startExitCode(err))
		_ = att.Close() // nothing will come
		e.deleteExec(client, x)
		return execError(x, err)
	}
	x.runs(pid)
	return e.waitExec(ctx, client, x, att)
}

func (e *Engine) waitExec(ctx context.Context, client *task.Client, x *execution, att *task.Attachment) error {
	if err := waitAttachment(ctx, att); err != nil {
		e.spawn(func() { // it goes on without its client
			select {
			case <-x.ended:
				e.deleteExec(client, x)
			case <-e.ctx.Done():
			}
		})
		return err
	}
	select {
	case <-x.ended:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	e.deleteExec(client, x)
	return nil
}

// deleteExec lets the shim forget an exec, and later the engine too.
func (e *Engine) deleteExec(client *task.Client, x *execution) {
	e.spawn(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanTime)
		defer cancel()
		if _, err := client.Delete(ctx, x.c.id, x.id); err != nil && !errdefs.IsNotFound(err) {
			e.log.Warn("exec is left in the shim", "container", x.c.id, "exec", x.id, "err", err)
		}
	})
	e.forgetExecsLater([]*execution{x})
}

// killExec ends a process whose client has given up.
func (e *Engine) killExec(x *execution) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanTime)
	defer cancel()
	client, err := e.client(ctx, x.c)
	if err == nil {
		err = client.Kill(ctx, x.c.id, x.id, syscall.SIGKILL, false)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		e.log.Warn("process of an exec goes on", "container", x.c.id, "exec", x.id, "err", err)
	}
}

// execError is Docker's sentence for a command that can't be run.
func execError(x *execution, err error) error {
	text := strings.TrimPrefix(err.Error(), "task "+x.c.id+": ")
	text = strings.TrimPrefix(text, "exec "+x.id+" of task "+x.c.id+": ")
	text = "OCI runtime exec failed: " + commandText(x.c.id, remark{err, text})
	switch {
	case errdefs.IsNotFound(err), errdefs.IsPermissionDenied(err), errdefs.IsInvalidArgument(err):
		return errdefs.ErrInvalidArgument.WithMessage(text)
	}
	return remark{err, text}
}

// remark is an error under another text.
type remark struct {
	error
	text string
}

func (r remark) Error() string { return r.text }
func (r remark) Unwrap() error { return r.error }

// execExited is told by the shim's events.
func (e *Engine) execExited(client *task.Client, containerID, id string, code int) {
	e.mu.Lock()
	x := e.execs[id]
	e.mu.Unlock()
	if x == nil && e.steps.get(containerID) != nil {
		return // ExecStep asks for its code, and deletes it
	}
	if x == nil { // of an earlier daemon: nobody asks for its code any more
		e.spawn(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanTime)
			defer cancel()
			_, _ = client.Delete(ctx, containerID, id) // it goes with the container at the latest
		})
		return
	}
	if !x.finish(code) {
		return
	}
	x.mu.Lock()
	silent := !x.started // a health probe: no events, as in Docker
	x.mu.Unlock()
	if !silent {
		e.emit(x.c, events.ActionExecDie, map[string]string{"execID": x.id, "exitCode": fmt.Sprint(code)})
	}
}

// execProcess is the process's part of a specification.
func (e *Engine) execProcess(ctx context.Context, client *task.Client, x *execution) ([]byte, error) {
	r := x.c.record()
	var root *rootfs.Root
	var a *accounts
	var err error
	if onHost(r) {
		root, err = e.rootOf(e.ctx, r)
	} else {
		a, err = readMachineAccounts(ctx, client, task.Files{ID: x.c.id})
	}
	if err != nil {
		return nil, err
	}
	user, err := e.resolveUser(root, a, firstOf(x.o.User, r.Config.User), r.HostConfig.GroupAdd)
	if err != nil {
		return nil, err
	}
	if err := inUserNS(r, append(user.Additional[:len(user.Additional):len(user.Additional)], user.UID, user.GID)...); err != nil {
		return nil, err
	}
	h := r.HostConfig
	caps, err := spec.Capabilities(h.CapAdd, h.CapDrop, h.Privileged || x.o.Privileged, e.factsOf(r.Isolation).Capabilities)
	if err != nil {
		return nil, err
	}
	cfg := *r.Config
	cfg.Tty = x.o.Tty
	cfg.Env = spec.MergeEnv(r.Config.Env, x.o.Env)
	oom := h.OomScoreAdj
	p := specs.Process{
		Terminal: x.o.Tty, Args: x.o.Cmd, Cwd: firstOf(x.o.WorkingDir, firstOf(r.Config.WorkingDir, "/")),
		User:         specs.User{UID: user.UID, GID: user.GID, AdditionalGids: user.Additional, Umask: h.Umask},
		Env:          spec.Environment(&cfg, r.Config.Hostname, e.linkEnv(r), user.Home),
		Capabilities: spec.ProcessCapabilities(caps, user.UID), OOMScoreAdj: &oom,
		Rlimits:         spec.Rlimits(h.Ulimits),
		NoNewPrivileges: spec.NoNewPrivileges(h) && !x.o.Privileged,
	}
	return json.Marshal(p)
}

// ExecInspect describes an exec until some minutes after its end.
func (e *Engine) ExecInspect(_ context.Context, id string) (*mobycontainer.ExecInspectResponse, error) {
	x, err := e.exec(id)
	if err != nil {
		return nil, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	privileged := x.o.Privileged
	return &mobycontainer.ExecInspectResponse{
		ID: x.id, Running: x.running, ExitCode: x.exit, ContainerID: x.c.id, Pid: x.pid, CanRemove: x.exit != nil,
		OpenStdin: x.o.AttachStdin, OpenStdout: x.o.AttachStdout, OpenStderr: x.o.AttachStderr, DetachKeys: []byte(x.o.DetachKeys),
		ProcessConfig: &mobycontainer.ExecProcessConfig{Tty: x.o.Tty, Entrypoint: x.o.Cmd[0], Arguments: x.o.Cmd[1:], Privileged: &privileged, User: x.o.User},
	}, nil
}

// ExecResize sets the size of its terminal.
func (e *Engine) ExecResize(ctx context.Context, id string, height, width uint) error {
	x, err := e.exec(id)
	if err != nil {
		return err
	}
	client, err := e.client(ctx, x.c)
	if err != nil {
		return err
	}
	return client.Resize(ctx, x.c.id, x.id, uint32(width), uint32(height))
}
