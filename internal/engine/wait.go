package engine

import (
	"context"

	"github.com/moby/moby/api/types/container"
)

// Wait sends one result when the condition holds. If ctx ends first, nothing
// is sent.
func (e *Engine) Wait(ctx context.Context, ref string, cond container.WaitCondition) (<-chan WaitResult, error) {
	c, err := e.find(ref)
	if g, ok := e.lately.find(ref); ok && err != nil {
		return result(ctx, g.flushing, g.result), nil
	}
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
		if g, ok := e.lately.find(c.id); ok {
			return result(ctx, g.flushing, g.result), nil
		}
		return nil, notFound("No such container: %s", ref)
	}
	r := c.record()
	var list *[]chan WaitResult
	switch cond {
	case container.WaitConditionRemoved:
		list = &c.goneSubs
	case container.WaitConditionNextExit:
		list = &c.exitSubs
	case container.WaitConditionNotRunning, "":
		ending := c.run != nil && isClosed(c.run.settled) && !isClosed(c.run.exited) // it is being recorded
		if !r.Running() && !r.Facts.Restarting && !ending {
			return result(ctx, c.flushing, WaitResult{ExitCode: r.Facts.ExitCode, Error: r.Facts.Error}), nil
		}
		list = &c.exitSubs
	default:
		return nil, invalid("invalid condition: %q", cond)
	}
	ch := c.subscribe(list)
	if ctx.Done() != nil {
		context.AfterFunc(ctx, func() { c.unsubscribe(list, ch) })
	}
	return ch, nil
}
