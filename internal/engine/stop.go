package engine

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
)

func utoa(n uint) string { return strconv.FormatUint(uint64(n), 10) }

// current waits until no start is under way and returns the run.
func (c *ctr) current(ctx context.Context) (*run, error) {
	c.mu.Lock()
	rn := c.run
	c.mu.Unlock()
	if rn == nil {
		return nil, nil
	}
	select {
	case <-rn.settled:
		return rn, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Stop ends a container: its stop signal, and after the timeout SIGKILL.
// ErrNotModified if it does not run.
func (e *Engine) Stop(ctx context.Context, ref string, o StopOptions) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	// A client that hangs up does not leave a half-stopped container.
	return e.stop(context.WithoutCancel(ctx), c, o)
}

func (e *Engine) stop(ctx context.Context, c *ctr, o StopOptions) error {
	r := c.record()
	sig, err := spec.Signal(firstOf(o.Signal, r.Config.StopSignal))
	if err != nil {
		return err
	}
	if o.Signal != "" && isSystem(r) && !knownToSystem(sig) { // it is not to lose power for that
		return invalid("signal %d means nothing to a machine with its own operating system; TERM presses its power button", sig)
	}
	rn, err := c.current(ctx)
	if err != nil {
		return err
	}
	if r = c.record(); !r.Running() {
		return e.stopWaitingRestart(c)
	}
	if err := e.markStopped(c); err != nil {
		return err
	}
	if err := failpoint("stop-marked"); err != nil {
		return err
	}
	timeout := e.stopTimeout(r, o)
	if rn == nil {
		rn = c.runOrNew()
	}
	if err := e.signalOrEnd(c, rn, func() error { return e.signal(ctx, c, sig) }); err != nil {
		if c.onMachine() == nil || sig == syscall.SIGKILL {
			return err
		}
		timeout = 0 // its machine does not answer: it will not hear the signal
	}
	if !waitFor(ctx, rn.exited, timeout) {
		if err := e.signalOrEnd(c, rn, func() error { return e.signal(ctx, c, syscall.SIGKILL) }); err != nil {
			return err
		}
		if !waitFor(ctx, rn.exited, killTime) {
			return fmt.Errorf("container %s did not end within %v of SIGKILL: a process may hang in the kernel", c.id, killTime)
		}
	}
	waitFor(ctx, rn.freed, cleanTime) // its ports are another's from now on
	e.emit(c, events.ActionStop, nil)
	return nil
}

// killTime is how long a process may take to die of SIGKILL.
const killTime = 30 * time.Second

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func (e *Engine) stopTimeout(r *container.Record, o StopOptions) time.Duration {
	secs := e.cfg.StopTimeout
	if r.Config.StopTimeout != nil {
		secs = *r.Config.StopTimeout
	}
	if o.Timeout != nil {
		secs = *o.Timeout
	}
	if secs < 0 {
		return -1
	}
	return time.Duration(secs) * time.Second
}

// waitFor says whether ch was closed in time; a negative time waits for ever.
func waitFor(ctx context.Context, ch <-chan struct{}, d time.Duration) bool {
	if d < 0 {
		select {
		case <-ch:
			return true
		case <-ctx.Done():
			return false
		}
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ch:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// stopWaitingRestart ends a restart that waits.
func (e *Engine) stopWaitingRestart(c *ctr) error {
	if !c.record().Facts.Restarting {
		return ErrNotModified
	}
	c.cancelRetry()
	return e.change(c, func(r *container.Record) { r.Facts.Restarting, r.Facts.Stopped = false, true })
}

// markStopped records that a user wants the end: no policy restarts after it.
func (e *Engine) markStopped(c *ctr) error {
	c.mu.Lock()
	c.noRetry = true
	c.mu.Unlock()
	if c.record().HostConfig.RestartPolicy.IsNone() {
		c.publish(func(r *container.Record) { r.Facts.Stopped = true }) // nothing depends on it
		return nil
	}
	return e.change(c, func(r *container.Record) { r.Facts.Stopped = true })
}

// signal sends a signal to the first process, waking a paused container for
// the end.
func (e *Engine) signal(ctx context.Context, c *ctr, sig syscall.Signal) error {
	client, err := e.client(ctx, c)
	if err != nil {
		return err
	}
	if err := e.kill(ctx, client, c, sig); err != nil {
		return err
	}
	e.emit(c, events.ActionKill, map[string]string{"signal": strconv.Itoa(int(sig))})
	if c.record().Facts.Paused {
		// The shim wakes it itself for SIGKILL; it may also have ended by now.
		if err := client.Resume(ctx, c.id); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
			return err
		}
		c.publish(func(r *container.Record) { r.Facts.Paused = false })
	}
	return nil
}

// kill sends a signal to the first process. A machine that does not take the
// last one is ended itself.
func (e *Engine) kill(ctx context.Context, client *task.Client, c *ctr, sig syscall.Signal) error {
	all := sig == syscall.SIGKILL && c.record().HostConfig.PidMode.IsHost()
	g := c.onMachine()
	if g == nil {
		return client.Kill(ctx, c.id, "", sig, all)
	}
	limit := silentTime
	if sig == syscall.SIGKILL && !g.machine.Lasting() {
		limit = killAnswerTime
	}
	short, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := client.Kill(short, c.id, "", sig, all)
	if err == nil || errdefs.IsNotFound(err) || ctx.Err() != nil || sig != syscall.SIGKILL {
		return err
	}
	if g.machine.Lasting() { // others are on it
		return fmt.Errorf("%s does not answer (%w): tenon machine restart %s", machineText(c.record()), err, machine.Named(c.record().Isolation))
	}
	e.log.Error("virtual machine does not answer; it is ended", "container", c.id, "err", err)
	g.givenUp.Store(true)
	return g.machine.Remove(ctx) // whoever watches it hears of its end
}

// killAnswerTime is how long a machine may take to answer to SIGKILL.
const killAnswerTime = 5 * time.Second

// Kill sends a signal. FailedPrecondition if the container does not run.
func (e *Engine) Kill(ctx context.Context, ref, signal string) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if signal == "" {
		signal = "KILL"
	}
	sig, err := spec.Signal(signal)
	if err != nil {
		return err
	}
	if _, err := c.current(ctx); err != nil {
		return err
	}
	r := c.record()
	if !r.Running() {
		return conflict("cannot kill container: %s: container %s is not running", ref, c.id)
	}
	ending := true
	if stop := r.Config.StopSignal; stop != "" && sig != syscall.SIGKILL {
		want, err := spec.Signal(stop)
		ending = err == nil && want == sig
	}
	if ending {
		if err := e.markStopped(c); err != nil {
			return err
		}
	}
	client, err := e.client(ctx, c)
	if err != nil {
		return err
	}
	if ending && r.Facts.Paused {
		err = e.signal(ctx, c, sig)
	} else {
		err = e.kill(ctx, client, c, sig)
	}
	if errdefs.IsNotFound(err) {
		return conflict("cannot kill container: %s: container %s is not running", ref, c.id)
	}
	if err != nil {
		return fmt.Errorf("cannot kill container: %s: %w", ref, err)
	}
	if !(ending && r.Facts.Paused) {
		e.emit(c, events.ActionKill, map[string]string{"signal": strconv.Itoa(int(sig))})
	}
	if sig == syscall.SIGKILL { // as Docker: the call returns when it is dead
		c.mu.Lock()
		rn := c.run
		c.mu.Unlock()
		if rn != nil {
			waitFor(ctx, rn.exited, 10*time.Second)
		}
	}
	return nil
}

// Restart stops a container, if it runs, and starts it.
func (e *Engine) Restart(ctx context.Context, ref string, o StopOptions) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	c.hold(1) // --rm: the stop in between does not remove it
	defer c.hold(-1)
	if err := e.stop(ctx, c, o); err != nil && !errors.Is(err, ErrNotModified) {
		return err
	}
	if err := e.start(ctx, c, startOptions{byUser: true}); err != nil && !errors.Is(err, ErrNotModified) {
		return err
	}
	e.emit(c, events.ActionRestart, nil)
	return nil
}

// Pause freezes all processes.
func (e *Engine) Pause(ctx context.Context, ref string) error {
	return e.freeze(ctx, ref, true)
}

// Unpause thaws them.
func (e *Engine) Unpause(ctx context.Context, ref string) error {
	return e.freeze(ctx, ref, false)
}

func (e *Engine) freeze(ctx context.Context, ref string, pause bool) error {
	c, err := e.lockOp(ctx, ref)
	if err != nil {
		return err
	}
	defer c.op.unlock()
	r := c.record()
	switch {
	case !r.Running() && !pause:
		return conflict("Container %s is not paused", c.id)
	case r.Facts.Restarting:
		return conflict("Container %s is restarting, wait until the container is running", c.id)
	case !r.Running():
		return conflict("container %s is not running", c.id)
	case pause && r.Facts.Paused:
		return conflict("container %s is already paused", c.id)
	case !pause && !r.Facts.Paused:
		return conflict("Container %s is not paused", c.id)
	}
	client, err := e.client(ctx, c)
	if err != nil {
		return err
	}
	verb, action := client.Resume, events.ActionUnPause
	if pause {
		verb, action = client.Pause, events.ActionPause
	}
	if err := verb(ctx, c.id); err != nil {
		return err
	}
	if err := e.change(c, func(r *container.Record) { r.Facts.Paused = pause }); err != nil {
		return err
	}
	if pause {
		e.stopHealth(c) // a frozen container can't answer
	} else {
		e.startHealth(c)
	}
	e.emit(c, action, nil)
	return nil
}

// unmarkStopped takes markStopped back, so that the policy starts the container
// with the next daemon.
func (e *Engine) unmarkStopped(c *ctr) error {
	if c.record().HostConfig.RestartPolicy.IsNone() {
		return nil
	}
	return e.change(c, func(r *container.Record) { r.Facts.Stopped = false })
}
