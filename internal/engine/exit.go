package engine

import (
	"context"
	"errors"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/task"
)

// exitFacts are how a run ended.
type exitFacts struct {
	code int
	at   time.Time
	oom  bool
	// unknown: it ended while nobody looked; the text says what is known.
	unknown string
}

// cleanTime bounds what follows an exit.
const cleanTime = time.Minute

// exited does everything that follows the end of a run: facts, events, waiters,
// restart or removal. It is called once a run; more calls do nothing.
func (e *Engine) exited(client *task.Client, c *ctr, rn *run, x exitFacts) {
	select {
	case <-rn.settled: // a start that failed has used up the once
	case <-e.ctx.Done():
		return // recovery of the next daemon finds the exit again
	}
	rn.once.Do(func() {
		e.recordExit(c, rn, x)
		e.cleanRun(client, c, rn)
	})
}

// recordExit publishes that the container has ended and tells who waits.
func (e *Engine) recordExit(c *ctr, rn *run, x exitFacts) {
	e.stopHealth(c)
	c.mu.Lock()
	stopped := c.noRetry
	c.mu.Unlock()
	var retry bool
	closing := e.isClosing()
	finish := func(r *container.Record) {
		f := &r.Facts
		f.Finished, f.ExitCode, f.Pid, f.Paused = x.at.UTC(), x.code, 0, false
		if !f.Finished.After(f.Started) {
			f.Finished = f.Started.Add(1)
		}
		f.OOM = f.OOM || x.oom
		f.Error = x.unknown
		retry = !closing && !f.Removing && shouldRestart(r.HostConfig.RestartPolicy, x.code, f.RestartCount, stopped)
		if f.Restarting = retry; retry {
			f.RestartCount++
		}
		if f.Health != nil {
			h := *f.Health
			f.Health = &h
		}
	}
	if c.record().HostConfig.AutoRemove {
		c.publish(finish) // the record goes next; a kill in between leaves "running" without a task
	} else if err := e.change(c, finish); err != nil {
		e.log.Error("exit is not recorded", "container", c.id, "err", err)
	}
	r := c.record()
	ran := r.Facts.Finished.Sub(r.Facts.Started)
	e.volumesUsed(r, false)
	e.emit(c, events.ActionDie, map[string]string{"exitCode": strconv.Itoa(x.code), "execDuration": strconv.FormatInt(int64(ran.Seconds()), 10)})
	c.mu.Lock()
	close(rn.exited)
	waiting := c.exitSubs
	c.exitSubs = nil
	c.flushLocked(func() { notifyLocked(&waiting, WaitResult{ExitCode: x.code, Error: x.unknown}) })
	var pause time.Duration
	if retry {
		c.backoff = c.backoff.next(ran)
		pause = c.backoff.pause
	}
	c.mu.Unlock()
	if retry {
		e.scheduleRestart(c, pause)
	}
}

// cleanRun frees what the run held. Nobody waits for it but the next start and
// the removal.
func (e *Engine) cleanRun(client *task.Client, c *ctr, rn *run) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanTime)
	defer cancel()
	if e.vanish(ctx, client, c, rn) {
		return
	}
	var errs []error
	ending := []func() error{
		func() error { return e.endTask(ctx, client, c) },
		func() error {
			c.setNetwork(nil)
			defer close(rn.freed)
			return e.cfg.Networks.Disconnect(ctx, c.id)
		},
	}
	if c.onMachine() != nil { // which may take its time to end, or give the interfaces to others
		slices.Reverse(ending)
	}
	for _, f := range ending {
		if err := f(); err != nil {
			errs = append(errs, err)
		}
	}
	if err := e.releaseShm(ctx, c); err != nil {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		e.log.Error("something of an ended container is left", "container", c.id, "err", err)
	}
	e.dropExecs(c)
	close(rn.done)
	if c.record().HostConfig.AutoRemove && !e.isClosing() && !c.held() {
		err := e.remove(ctx, c, RemoveOptions{Volumes: true, Force: true})
		if err != nil && !errdefs.IsNotFound(err) {
			e.log.Error("container of --rm is not removed", "container", c.id, "err", err)
			e.removeLater(c, RemoveOptions{Volumes: true, Force: true})
		}
	}
}

// vanish is the end of a --rm container in the usual case: once its address and
// ports are free it is gone for every client, and what is left of it is freed
// with nobody waiting. The volatile record goes last: if the daemon is killed
// in between, recovery finds a running container without a task, and removes it.
func (e *Engine) vanish(ctx context.Context, client *task.Client, c *ctr, rn *run) bool {
	r := c.record()
	if !r.HostConfig.AutoRemove || e.isClosing() || c.held() || hasAnonymous(r) || !c.op.try() {
		return false
	}
	defer c.op.unlock()
	c.setNetwork(nil)
	if c.isGone() || e.cfg.Networks.Disconnect(ctx, c.id) != nil {
		return false
	}
	close(rn.freed)
	c.publish(func(r *container.Record) { r.Facts.Removing = true })
	e.emit(c, events.ActionDestroy, nil)
	e.unregister(c)
	g := c.onMachine()
	taskErr := e.endTask(ctx, client, c)
	freeErr := e.free(ctx, c)
	close(rn.done)
	if err := errors.Join(taskErr, freeErr); err != nil {
		e.log.Error("something of an ended container is left for now", "container", c.id, "err", err)
		e.freeLater(c, r, func(ctx context.Context) error {
			if taskErr != nil {
				taskErr = e.dropTask(ctx, c, g)
			}
			return taskErr
		})
		return true
	}
	if err := e.saver.remove(r); err != nil {
		e.log.Error("record of a removed container is left until the daemon's next start", "container", c.id, "err", err)
	}
	return true
}

func hasAnonymous(r *container.Record) bool {
	return slices.ContainsFunc(r.Mounts, func(m container.Mount) bool { return m.Anonymous })
}

// releaseShm keeps shared memory while another container of the kernel uses it.
func (e *Engine) releaseShm(ctx context.Context, c *ctr) error {
	if r := c.record(); !r.HostConfig.IpcMode.IsShareable() || !onHost(r) {
		return nil
	}
	for _, other := range e.all() {
		r := other.record()
		if other != c && r.Running() && r.HostConfig.IpcMode.Container() == c.id {
			return nil
		}
	}
	return e.cfg.Kernel.Release(ctx, c.id)
}

// scheduleRestart starts the container again after a pause.
func (e *Engine) scheduleRestart(c *ctr, pause time.Duration) {
	ctx, cancel := context.WithCancel(e.ctx)
	c.mu.Lock()
	c.retry = cancel
	c.mu.Unlock()
	e.spawn(func() {
		defer cancel()
		t := time.NewTimer(pause)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		if waits, hopeful := e.waitsForMachine(c); waits { // its start starts the container
			if !hopeful {
				e.restNow(c)
			}
			return
		}
		err := e.start(ctx, c, startOptions{})
		if err == nil || errors.Is(err, ErrNotModified) || errdefs.IsNotFound(err) || ctx.Err() != nil {
			return
		}
		e.log.Error("container could not be restarted", "container", c.id, "err", err)
		e.retryFailed(c, err)
	})
}

// retryFailed goes on trying where the policy says always: what the start
// lacked may come back. Docker gives up here; a network that is away for a
// moment must not end a service for ever.
func (e *Engine) retryFailed(c *ctr, cause error) {
	c.mu.Lock()
	stopped := c.noRetry
	c.mu.Unlock()
	r := c.record()
	if c.isGone() || stopped || e.isClosing() || r.Running() || errdefs.IsInvalidArgument(cause) ||
		!shouldRestart(r.HostConfig.RestartPolicy, r.Facts.ExitCode, r.Facts.RestartCount, stopped) {
		return
	}
	if err := e.change(c, func(r *container.Record) {
		r.Facts.Restarting = true
		r.Facts.RestartCount++
	}); err != nil {
		e.log.Error("restart is not recorded", "container", c.id, "err", err)
	}
	c.mu.Lock()
	c.backoff = c.backoff.next(0)
	pause := c.backoff.pause
	c.mu.Unlock()
	e.scheduleRestart(c, pause)
}

// cancelRetry ends a restart that waits.
func (c *ctr) cancelRetry() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.retry != nil {
		c.retry()
		c.retry = nil
	}
}

func removeDir(path string, files ...string) error {
	for _, f := range files {
		_ = unix.Unlink(path + "/" + f) // what is left is seen below
	}
	if err := unix.Rmdir(path); err == nil || err == unix.ENOENT {
		return nil
	}
	return os.RemoveAll(path)
}
