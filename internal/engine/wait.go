package engine

import (
	"context"

	"github.com/moby/moby/api/types/container"
)

// Wait sends one result when the condition holds. If ctx ends first, nothing
// is sent.
func (e *Engine) Wait(ctx context.Context, ref string, cond container.WaitCondition) (<-chan WaitResult, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
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
		if !r.Running() && !r.Facts.Restarting {
			ch := make(chan WaitResult, 1)
			ch <- WaitResult{ExitCode: r.Facts.ExitCode, Error: r.Facts.Error}
			return ch, nil
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
