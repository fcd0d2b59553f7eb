package engine

import (
	"context"
	"errors"
	"time"

	"github.com/moby/moby/api/types/events"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// errGap says that the shim's ring has overrun: what exists is listed again.
var errGap = errors.New("events were lost")

// watch follows the shim's events and reconnects when it goes away. client is
// the first connection, whose events after seq have not been seen.
func (e *Engine) watch(client *task.Client, seq uint64) {
	for e.ctx.Err() == nil {
		err := client.Events(e.ctx, seq, func(ev *taskv1.Event) error {
			seq = ev.Sequence
			return e.onEvent(client, ev)
		})
		if e.ctx.Err() != nil {
			return
		}
		e.log.Warn("the shim's events ended; connecting again", "err", err)
		if !errors.Is(err, errGap) {
			e.shim.clear()
		}
		for pause := 10 * time.Millisecond; e.ctx.Err() == nil; pause = min(2*pause, 5*time.Second) {
			next, n, err := e.reconnect(e.ctx)
			if err == nil {
				client, seq = next, n
				break
			}
			e.log.Error("the shim is not reachable", "err", err)
			e.shim.fail(err)
			select {
			case <-time.After(pause):
			case <-e.ctx.Done():
			}
		}
	}
}

// reconnect finds the shim (or starts one) and makes the engine's picture agree
// with what it says.
func (e *Engine) reconnect(ctx context.Context) (*task.Client, uint64, error) {
	client, started, err := e.cfg.Kernel.Connect(ctx)
	if err != nil {
		return nil, 0, err
	}
	at := time.Now()
	procs, seq, err := client.List(ctx, "")
	if err != nil {
		client.Close()
		return nil, 0, err
	}
	if started {
		e.log.Warn("a new shim was started: containers of the one before are lost")
	}
	e.reconcile(ctx, client, procs, at) // before anything new is started on it
	e.shim.clear()
	e.shim.set(client)
	return client, seq, nil
}

// onEvent handles one event; anything that takes time goes on elsewhere.
func (e *Engine) onEvent(client *task.Client, ev *taskv1.Event) error {
	if ev.Type == taskv1.Event_GAP {
		return errGap
	}
	e.mu.Lock()
	c := e.ctrs[ev.Id]
	e.mu.Unlock()
	if ev.ExecId != "" {
		if ev.Type == taskv1.Event_EXIT {
			e.execExited(client, ev.Id, ev.ExecId, int(ev.ExitStatus))
		}
		return nil
	}
	if c == nil {
		return nil
	}
	switch ev.Type {
	case taskv1.Event_EXIT:
		c.mu.Lock()
		rn := c.run
		c.mu.Unlock()
		if rn != nil {
			x := exitFacts{code: int(ev.ExitStatus), at: time.Unix(0, ev.Time), oom: ev.OomKilled, unknown: ev.Message}
			e.spawn(func() { e.exited(client, c, rn, x) })
		}
	case taskv1.Event_OOM:
		e.emit(c, events.ActionOOM, nil)
		c.publish(func(r *container.Record) { r.Facts.OOM = true })
	case taskv1.Event_LOG_ERROR:
		e.log.Warn("container output could not be kept", "container", ev.Id, "err", ev.Message)
	}
	return nil
}
