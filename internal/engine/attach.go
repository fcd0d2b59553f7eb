package engine

import (
	"context"
	"io"
	"sync"

	"github.com/moby/moby/api/types/events"

	"tenon.dev/tenon/internal/task"
)

// pendingAttach is an attach to a container that does not run yet: the next
// start connects it before the first instruction.
type pendingAttach struct {
	o       AttachOptions
	settled chan struct{} // closed once att or err is set
	once    sync.Once
	att     *task.Attachment
	err     error
}

func newPendingAttach(o AttachOptions) *pendingAttach {
	return &pendingAttach{o: o, settled: make(chan struct{})}
}

func (p *pendingAttach) fail(err error) {
	p.once.Do(func() {
		p.err = err
		close(p.settled)
	})
}

// wait returns when all output has been written, or with an error.
func (p *pendingAttach) wait(ctx context.Context) error {
	select {
	case <-p.settled:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if p.att == nil {
		return p.err
	}
	return waitAttachment(ctx, p.att)
}

func waitAttachment(ctx context.Context, a *task.Attachment) error {
	err := a.Wait(ctx)
	if ctx.Err() != nil {
		_ = a.Close() // detached: the process goes on
	}
	return err
}

func stdio(o AttachOptions, tty bool) task.Stdio {
	s := task.Stdio{Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr, Terminal: tty}
	if tty && s.Stdout == nil {
		s.Stdout = o.Stderr
	}
	return s
}

// connectWaiting attaches those who wait, between create and start.
func (e *Engine) connectWaiting(ctx context.Context, c *ctr, client *task.Client) error {
	c.mu.Lock()
	waiting := c.waiting
	c.waiting = nil
	c.mu.Unlock()
	tty := c.record().Config.Tty
	for _, w := range waiting {
		att, err := client.Attach(ctx, c.id, "", stdio(w.o, tty))
		c.track(att)
		if err == nil && tty && w.o.Width > 0 && w.o.Height > 0 {
			err = client.Resize(ctx, c.id, "", uint32(w.o.Width), uint32(w.o.Height))
		}
		w.once.Do(func() {
			w.att, w.err = att, err
			close(w.settled)
		})
	}
	return nil
}

// Attach connects streams to a container. It returns when the container has
// ended and all output is written, or with ctx (the container goes on). A
// container that does not run is attached to at its next start.
func (e *Engine) Attach(ctx context.Context, ref string, o AttachOptions) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	r := c.record()
	if r.Facts.Paused && r.Running() {
		return conflict("container %s is paused, unpause the container before attach", ref)
	}
	if o.Logs {
		if err := e.replay(ctx, c, o); err != nil {
			return err
		}
	}
	ready := func() {
		if o.Ready != nil {
			o.Ready()
		}
	}
	if !o.Stream {
		ready()
		return nil
	}
	if !r.Config.OpenStdin {
		o.Stdin = nil
	}
	c.mu.Lock()
	rn := c.run
	running := false
	if rn != nil {
		select {
		case <-rn.settled:
			running = c.record().Running()
		default: // being started: wait with the others, or for the result
		}
	}
	if !running {
		p := newPendingAttach(o)
		c.waiting = append(c.waiting, p)
		c.mu.Unlock()
		e.emit(c, events.ActionAttach, nil)
		ready()
		err := p.wait(ctx)
		e.dropWaiting(c, p)
		return err
	}
	c.mu.Unlock()
	client, err := e.client(ctx, c)
	if err != nil {
		return err
	}
	att, err := client.Attach(ctx, c.id, "", stdio(o, r.Config.Tty))
	if err != nil {
		return err
	}
	c.track(att)
	if r.Config.Tty && o.Width > 0 && o.Height > 0 {
		_ = client.Resize(ctx, c.id, "", uint32(o.Width), uint32(o.Height)) // a picture only
	}
	e.emit(c, events.ActionAttach, nil)
	ready()
	err = waitAttachment(ctx, att)
	if ctx.Err() != nil {
		e.emit(c, events.ActionDetach, nil)
	}
	return err
}

func (e *Engine) dropWaiting(c *ctr, p *pendingAttach) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, w := range c.waiting {
		if w == p {
			c.waiting = append(c.waiting[:i:i], c.waiting[i+1:]...)
			return
		}
	}
}

// replay writes the log to the streams.
func (e *Engine) replay(ctx context.Context, c *ctr, o AttachOptions) error {
	lo := LogsOptions{Stdout: o.Stdout != nil, Stderr: o.Stderr != nil, Tail: -1}
	out, errOut := o.Stdout, o.Stderr
	if out == nil {
		out = io.Discard
	}
	if errOut == nil {
		errOut = io.Discard
	}
	_, err := e.Logs(ctx, c.id, lo, out, errOut)
	return err
}

// Resize sets the size of a running container's terminal.
func (e *Engine) Resize(ctx context.Context, ref string, height, width uint) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if !c.record().Running() {
		return conflict("container %s is not running", ref)
	}
	client, err := e.client(ctx, c)
	if err != nil {
		return err
	}
	if err := client.Resize(ctx, c.id, "", uint32(width), uint32(height)); err != nil {
		return err
	}
	e.emit(c, events.ActionResize, map[string]string{"height": utoa(height), "width": utoa(width)})
	return nil
}

// IsTTY says whether the container has a terminal.
func (e *Engine) IsTTY(_ context.Context, ref string) (bool, error) {
	c, err := e.find(ref)
	if err != nil {
		return false, err
	}
	return c.record().Config.Tty, nil
}
