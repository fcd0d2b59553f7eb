package tenon

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// control delivers signals and resizes to a container, or an exec, in the order
// they came, also those that came before it ran. Its goroutine exists only while
// there is something to deliver.
type control struct {
	ctx  context.Context
	kill func(ctx context.Context, id, signal string) error // nil: signals are not delivered
	size func(ctx context.Context, id string, height, width uint) error

	mu      sync.Mutex
	id      string
	queue   []func(ctx context.Context, id string) error
	working bool
}

// maxQueued bounds what a client can pile up before its container runs.
const maxQueued = 64

func newControl(ctx context.Context, kill func(ctx context.Context, id, signal string) error, size func(ctx context.Context, id string, height, width uint) error) *control {
	return &control{ctx: ctx, kill: kill, size: size}
}

// target tells who it is for; what has been queued starts to move.
func (c *control) target(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.id = id
	c.workLocked()
}

func (c *control) signal(sig string) {
	if c.kill == nil {
		return
	}
	c.add(func(ctx context.Context, id string) error { return c.kill(ctx, id, sig) })
}

func (c *control) resize(h, w uint) {
	until := time.Now().Add(retryFor)
	c.add(func(ctx context.Context, id string) error {
		err := c.size(ctx, id, h, w)
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
