package engine

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"time"

	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/health"
)

// healthAction is the annotation that holds Podman's --health-on-failure: none,
// kill, restart or stop. It is no label, since an image can bring labels.
const healthAction = "tenon.health-on-failure"

func initialHealth(c *mobycontainer.Config) *mobycontainer.Health {
	if !health.Enabled(c.Healthcheck) {
		return nil
	}
	return &mobycontainer.Health{Status: mobycontainer.Starting, Log: []*mobycontainer.HealthcheckResult{}}
}

// startHealth begins to probe a container that runs, if it asks for that.
func (e *Engine) startHealth(c *ctr) {
	r := c.record()
	if !health.Enabled(r.Config.Healthcheck) {
		return
	}
	cmd := health.Command(r.Config.Healthcheck, r.Config.Shell)
	if len(cmd) == 0 {
		e.log.Warn("health check has no command", "container", c.id)
		return
	}
	probe := func(ctx context.Context) (int, []byte, error) { return e.probe(ctx, c, cmd) }
	m := health.Start(r.Config.Healthcheck, r.Facts.Health, r.Facts.Started, probe, func(h *mobycontainer.Health) { e.observeHealth(c, h) })
	c.mu.Lock()
	old := c.monitor
	c.monitor = m
	c.mu.Unlock()
	if old != nil {
		old.Stop()
	}
}

// stopHealth ends the probing; a probe under way dies with the container.
func (e *Engine) stopHealth(c *ctr) {
	c.mu.Lock()
	m := c.monitor
	c.monitor = nil
	c.mu.Unlock()
	if m != nil {
		m.Stop()
	}
}

// probe runs the command in the container. A paused one is not probed: the
// answer stays what it was.
func (e *Engine) probe(ctx context.Context, c *ctr, cmd []string) (int, []byte, error) {
	var out bytes.Buffer
	r := c.record()
	x, err := e.newExec(c, ExecOptions{Cmd: cmd, User: r.Config.User, AttachStdout: true, AttachStderr: true})
	if err != nil {
		return 0, nil, err
	}
	defer e.dropExec(x)
	w := &limitedWriter{buf: &out, max: health.MaxOutput + 1}
	err = e.runExec(ctx, x, false, AttachOptions{Stdout: w, Stderr: w})
	if ctx.Err() != nil {
		e.killExec(x)
		return 0, out.Bytes(), ctx.Err()
	}
	if err != nil {
		return 0, nil, err
	}
	return x.code(), out.Bytes(), nil
}

// limitedWriter keeps the beginning and swallows the rest.
type limitedWriter struct {
	buf *bytes.Buffer
	max int
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	if room := w.max - w.buf.Len(); room > 0 {
		w.buf.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// observeHealth publishes a probe's result and acts on a failure.
func (e *Engine) observeHealth(c *ctr, h *mobycontainer.Health) {
	old := c.record().Facts.Health
	if !c.record().Running() {
		return
	}
	set := func(r *container.Record) { r.Facts.Health = h }
	if old != nil && old.Status == h.Status {
		c.publish(set) // kept with the next change: a probe is not worth a write
		return
	}
	if err := e.change(c, set); err != nil {
		e.log.Error("health is not recorded", "container", c.id, "err", err)
	}
	e.emit(c, events.Action("health_status: "+string(h.Status)), nil)
	if h.Status == mobycontainer.Unhealthy {
		e.actOnUnhealthy(c)
	}
}

func (e *Engine) actOnUnhealthy(c *ctr) {
	r := c.record()
	action := r.HostConfig.Annotations[healthAction]
	if action == "" || action == "none" {
		return
	}
	e.spawn(func() {
		ctx, cancel := context.WithTimeout(e.ctx, 5*time.Minute)
		defer cancel()
		var err error
		switch action {
		case "kill": // by itself, so that the restart policy acts
			client, cerr := e.client(ctx, c)
			if err = cerr; err == nil {
				err = e.kill(ctx, client, c, syscall.SIGKILL)
			}
		case "restart":
			err = e.Restart(ctx, c.id, StopOptions{})
		case "stop":
			err = e.stop(ctx, c, StopOptions{})
		default:
			err = invalid("%s=%s: use none, kill, restart or stop", healthAction, action)
		}
		if err != nil && !errors.Is(err, ErrNotModified) {
			e.log.Error("unhealthy container is left as it is", "container", c.id, "action", action, "err", err)
		}
	})
}
