package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/container"
)

// againPauses are those between the tries of what should have worked and nobody
// waits for: a machine that is short of processors, or is being ended, refuses for
// a while. After the last it is left to the daemon's next start.
var againPauses = []time.Duration{time.Second, 4 * time.Second, 15 * time.Second, time.Minute, 5 * time.Minute, 20 * time.Minute}

// again tries f in the background until it succeeds, a few times.
func (e *Engine) again(what string, f func(context.Context) error) {
	e.spawn(func() {
		for _, pause := range againPauses {
			select {
			case <-time.After(pause):
			case <-e.ctx.Done():
				return
			}
			ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanTime)
			err := f(ctx)
			cancel()
			if err == nil || errdefs.IsNotFound(err) {
				e.log.Info("what had failed is done", "what", what)
				return
			}
			e.log.Warn("what had failed fails again", "what", what, "err", err)
		}
	})
}

// undoLater goes on with steps that have failed, in their order, until none is left.
func (e *Engine) undoLater(what string, steps []undoStep) {
	e.again(what, func(ctx context.Context) error {
		var errs []error
		steps = slices.DeleteFunc(steps, func(s undoStep) bool {
			err := s.f(ctx)
			if err == nil || errdefs.IsNotFound(err) {
				return true
			}
			errs = append(errs, fmt.Errorf("%s: %w", s.name, err))
			return false
		})
		return errors.Join(errs...)
	})
}

// freeLater frees what a --rm container that is gone for every client has left; before
// that it ends what its kernel still has of it.
func (e *Engine) freeLater(c *ctr, r *container.Record, end func(context.Context) error) {
	e.again("files of container "+c.id, func(ctx context.Context) error {
		if err := end(ctx); err != nil {
			return err
		}
		if err := e.free(ctx, c); err != nil {
			return err
		}
		return e.saver.remove(r)
	})
}

// dropTask ends what a kernel still has of a container that has ended; g is its
// machine, if it had one.
func (e *Engine) dropTask(ctx context.Context, c *ctr, g *guest) error {
	if g != nil && !g.machine.Lasting() {
		return g.machine.Remove(ctx)
	}
	if g != nil && (isClosed(g.over) || isClosed(g.machine.Ended())) {
		return nil // it went with the machine
	}
	shim := e.shim
	if g != nil {
		shim = g.link
	}
	client, err := shim.get(ctx)
	if err != nil {
		return err
	}
	if err := deleteTask(ctx, client, c.id); err != nil || g == nil {
		return err
	}
	return e.leaveMachine(ctx, c, g)
}

// removeLater goes on with a removal that was begun. One that somebody else has
// finished is done.
func (e *Engine) removeLater(c *ctr, o RemoveOptions) {
	e.again("removal of container "+c.id, func(ctx context.Context) error { return e.remove(ctx, c, o) })
}

// endTaskLater ends what a machine still has of a container that does not run,
// unless it is started again, which does it, too.
func (e *Engine) endTaskLater(c *ctr, g *guest) {
	rn := c.runOrNew()
	e.again("task of container "+c.id, func(ctx context.Context) error {
		if err := c.op.lock(ctx); err != nil {
			return err
		}
		defer c.op.unlock()
		c.mu.Lock()
		other := c.run != rn || c.gone
		c.mu.Unlock()
		if other || isClosed(g.over) || isClosed(g.machine.Ended()) {
			return nil
		}
		client, err := g.link.get(ctx)
		if err != nil {
			return err
		}
		if err := deleteTask(ctx, client, c.id); err != nil {
			return err
		}
		return e.leaveMachine(ctx, c, g)
	})
}

// runEnd is how long it may take until a run's end is known whose machine has gone.
const runEnd = 10 * time.Second

// signalOrEnd is signal for an end that is wanted: a container that ends meanwhile,
// or that has lost its machine, is no error. Whoever calls it then waits for the
// run's end.
func (e *Engine) signalOrEnd(c *ctr, rn *run, send func() error) error {
	err := send()
	if err == nil || errdefs.IsNotFound(err) {
		return nil
	}
	if isClosed(rn.exited) {
		return nil
	}
	if onHost(c.record()) || !errors.Is(err, errNoMachine) {
		return err
	}
	// Its machine's end is being recorded, or, if a daemon has failed to, nobody will.
	if waitFor(e.ctx, rn.exited, runEnd) {
		return nil
	}
	if c.onMachine() != nil {
		return err
	}
	e.exited(nil, c, rn, exitFacts{code: 137, at: time.Now(), unknown: machineText(c.record()) + " was lost"})
	return nil
}

// errNoMachine says that a container that should run has no machine (any more).
var errNoMachine = errors.New("it is on no machine")

// noMachine is the error of what needs a container to run.
func noMachine(c *ctr) error {
	return remark{errors.Join(errdefs.ErrFailedPrecondition, errNoMachine), fmt.Sprintf("container %s is not running", c.id)}
}
