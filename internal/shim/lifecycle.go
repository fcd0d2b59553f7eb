package shim

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	taskv3 "tenon.dev/tenon/internal/task/api/v3"

	"tenon.dev/tenon/internal/launch"
	"tenon.dev/tenon/internal/launch/fork"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"

	"google.golang.org/grpc/codes"
)

// end makes sure that a process is over: one that never ran is ended, one that
// runs is refused.
func (p *process) end(ctx context.Context) error {
	p.mu.Lock()
	status, child := p.status, p.child
	if status == taskv1.Status_STATUS_CREATED && child == nil { // an exec
		p.failLocked(errdefs.ErrNotFound)
		p.mu.Unlock()
		return nil
	}
	if status == taskv1.Status_STATUS_CREATED {
		p.failed = true
		p.code = 128 + uint32(syscall.SIGKILL)
	}
	p.mu.Unlock()
	switch status {
	case taskv1.Status_STATUS_CREATED:
		_ = child.signal(syscall.SIGKILL) // it may just have ended
	case taskv1.Status_STATUS_STOPPED:
	default:
		select {
		case <-p.done: // just now
			return nil
		default:
		}
		return fmt.Errorf("%s: still runs: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// discardTime bounds the waiting for a killed exec.
const discardTime = 5 * time.Second

// discard ends an exec whose container goes.
func (p *process) discard() {
	p.mu.Lock()
	if p.child == nil {
		if p.status == taskv1.Status_STATUS_CREATED {
			p.failLocked(errdefs.ErrNotFound)
		}
		p.mu.Unlock()
		return
	}
	child := p.child
	p.mu.Unlock()
	select {
	case <-p.done:
		return
	default:
	}
	_ = child.signal(syscall.SIGKILL) // it may be dying with its pid namespace
	select {
	case <-p.done:
	case <-time.After(discardTime):
	}
}

func (p *process) exitTime() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exitedAt
}

// resize sets the terminal's size.
func (p *process) resize(width, height uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.terminal {
		return nil // as with any OCI runtime: clients resize what has no terminal, too
	}
	if p.status == taskv1.Status_STATUS_STOPPED {
		return fmt.Errorf("%s: has exited: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	if p.child == nil {
		p.width, p.height = width, height // for its start
		return nil
	}
	return p.io.resize(width, height)
}

// exec prepares a further process; its start makes the child.
func (c *container) exec(r *taskv3.ExecProcessRequest, o *taskv1.ExecOptions, spec *specs.Process) (_ *process, err error) {
	p := newProcess(c, r.ExecId)
	p.terminal = spec.Terminal
	p.once = true
	p.width, p.height = o.ConsoleWidth, o.ConsoleHeight
	c.init.mu.Lock()
	status := c.init.status
	c.init.mu.Unlock()
	if status != taskv1.Status_STATUS_RUNNING {
		return nil, fmt.Errorf("exec in task %s: it is %s: %w", c.id, stateName(status), errdefs.ErrFailedPrecondition)
	}
	if c.isPaused() {
		return nil, fmt.Errorf("exec in task %s: it is paused: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if p.io, err = newStdio(p.terminal, o.Stdin, nil); err != nil {
		return nil, err
	}
	err = p.io.give(spec.User.UID, c.spec.uidMaps)
	if err == nil {
		err = p.io.openFIFOs(r.Stdin, r.Stdout, r.Stderr)
	}
	if err != nil {
		p.io.close()
		return nil, err
	}
	if spec.OOMScoreAdj == nil {
		spec.OOMScoreAdj = c.spec.oomScoreAdj
	}
	p.prepare = func() (child, error) {
		if c.external != nil {
			return c.external.exec(c, p, spec)
		}
		return c.forkExec(p, spec, o.Privileged)
	}
	c.mu.Lock()
	if c.execs == nil {
		err = fmt.Errorf("task %s: %w", c.id, errdefs.ErrNotFound)
	} else if c.execs[r.ExecId] != nil {
		err = fmt.Errorf("%s: %w", p.name(), errdefs.ErrAlreadyExists)
	} else {
		c.execs[r.ExecId] = p
	}
	c.mu.Unlock()
	if err != nil {
		p.io.close()
		return nil, err
	}
	return p, nil
}

// forget lets an exec go that has ended, or never ran.
func (c *container) forget(execID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, execID)
}

// forkExec makes an exec's child by the plan.
func (c *container) forkExec(p *process, process *specs.Process, privileged bool) (child, error) {
	init, ok := c.init.child.(planned)
	if !ok {
		return nil, errdefs.ErrNotImplemented
	}
	select {
	case <-c.init.done:
		return nil, fmt.Errorf("container has exited: %w", errdefs.ErrFailedPrecondition)
	default:
	}
	raw, err := init.p.PidFD.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("container has exited: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	c.mu.Lock()
	seccomp := c.spec.seccomp
	c.mu.Unlock()
	if privileged {
		seccomp = nil
	}
	var fp *fork.Process
	cerr := raw.Control(func(fd uintptr) {
		var plan *launch.Plan
		plan, err = launch.CompileExec(process, launch.ExecOptions{Pidfd: int(fd), Cgroup: c.group, Seccomp: seccomp, Personality: c.spec.personality})
		if err != nil {
			if task.ErrorCode(err) == codes.Unknown {
				err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
			}
			return
		}
		fp, err = fork.Start(plan, fork.Stdio{In: p.io.in, Out: p.io.out, Err: p.io.err})
	})
	if err := errors.Join(cerr, err); err != nil {
		return nil, err
	}
	err = c.sendListener(fp, &specs.Linux{Seccomp: seccomp}, specs.StateRunning)
	if err == nil && fp.Console != nil {
		err = p.io.setConsole(fp.Console)
	}
	if err == nil && p.terminal && (p.width > 0 || p.height > 0) {
		err = p.io.resize(p.width, p.height)
	}
	if err != nil {
		_ = fp.Signal(syscall.SIGKILL) // it stands at the barrier
		_, _ = fp.Wait()
		_ = fp.Close()
		return nil, err
	}
	return planned{fp}, nil
}

func (c *container) pause(ctx context.Context) error {
	c.init.mu.Lock()
	status := c.init.status
	c.init.mu.Unlock()
	if status != taskv1.Status_STATUS_RUNNING {
		return fmt.Errorf("task %s: pause: it is %s: %w", c.id, stateName(status), errdefs.ErrFailedPrecondition)
	}
	c.mu.Lock()
	was := c.paused
	c.paused = true
	c.mu.Unlock()
	if was {
		return fmt.Errorf("task %s: is paused already: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if err := c.group.Freeze(ctx); err != nil {
		terr := c.group.Thaw(context.WithoutCancel(ctx))
		c.mu.Lock()
		c.paused = false
		c.mu.Unlock()
		return fmt.Errorf("task %s: pause: %w", c.id, errors.Join(err, terr))
	}
	c.shim.events.Publish(&taskv1.Event{Type: taskv1.Event_PAUSED, Id: c.id})
	return nil
}

func (c *container) resume(ctx context.Context) error {
	if !c.isPaused() {
		return fmt.Errorf("task %s: resume: it is not paused: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if err := c.group.Thaw(ctx); err != nil {
		return fmt.Errorf("task %s: resume: %w", c.id, err)
	}
	c.mu.Lock()
	was := c.paused
	c.paused = false
	c.mu.Unlock()
	if was {
		c.shim.events.Publish(&taskv1.Event{Type: taskv1.Event_RESUMED, Id: c.id})
	}
	return nil
}

// killAll signals every process of the container.
func (c *container) killAll(sig syscall.Signal) error {
	if err := c.group.Kill(sig); err != nil {
		return fmt.Errorf("task %s: signal %d to all: %w", c.id, sig, err)
	}
	return nil
}

// destroy kills and removes a container, whatever it does.
func (s *Shim) destroy(ctx context.Context, c *container) error {
	_ = c.killAll(syscall.SIGKILL)   // the end is waited for
	_ = c.init.kill(syscall.SIGKILL) // if it is in no cgroup
	if c.isPaused() {
		if err := c.resume(ctx); err != nil {
			return err
		}
	}
	select {
	case <-c.init.done:
	case <-ctx.Done():
		return fmt.Errorf("task %s: does not die: %w", c.id, context.Cause(ctx))
	}
	if s.take(c) {
		s.remove(c)
	}
	return nil
}
