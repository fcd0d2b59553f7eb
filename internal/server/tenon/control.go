package tenon

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"tenon.dev/tenon/internal/engine"
)

// control delivers signals and resizes to a container in the order they came,
// also those that came before it ran. Its goroutine exists only while there is
// something to deliver.
type control struct {
	ctx context.Context
	eng engine.API

	mu      sync.Mutex
	id      string
	queue   []func(ctx context.Context, id string) error
	working bool
}

// maxQueued bounds what a client can pile up before its container runs.
const maxQueued = 64

func newControl(ctx context.Context, eng engine.API) *control {
	return &control{ctx: ctx, eng: eng}
}

// container tells which container it is; what has been queued starts to move.
func (c *control) container(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.id = id
	c.workLocked()
}

func (c *control) signal(sig string) {
	c.add(func(ctx context.Context, id string) error { return c.eng.Kill(ctx, id, sig) })
}

func (c *control) resize(h, w uint) {
	until := time.Now().Add(retryFor)
	c.add(func(ctx context.Context, id string) error {
		err := c.eng.Resize(ctx, id, h, w)
		if time.Now().After(until) {
			return nil // too late to matter
		}
		return err
	})
}

func (c *control) add(f func(ctx context.Context, id string) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.queue) >= maxQueued {
		return
	}
	c.queue = append(c.queue, f)
	c.workLocked()
}

func (c *control) workLocked() {
	if c.working || c.id == "" || len(c.queue) == 0 {
		return
	}
	c.working = true
	go c.work()
}

func (c *control) work() {
	for {
		c.mu.Lock()
		if len(c.queue) == 0 {
			c.working = false
			c.mu.Unlock()
			return
		}
		f, id := c.queue[0], c.id
		c.queue = c.queue[1:]
		c.mu.Unlock()
		c.deliver(f, id)
	}
}

// deliver repeats f while the container is not running yet; the run's context
// ends it when the container has ended or the client is gone.
func (c *control) deliver(f func(context.Context, string) error, id string) {
	wait := time.Millisecond
	for {
		err := f(c.ctx, id)
		if !errdefs.IsFailedPrecondition(err) && !errdefs.IsConflict(err) {
			return // done, or hopeless
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
			wait = min(2*wait, 50*time.Millisecond)
		case <-c.ctx.Done():
			t.Stop()
			return
		}
	}
}
