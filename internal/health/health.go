// Package health runs a container's health probe again and again and judges
// the results, by Docker's rules: an interval between probes (a shorter one
// while starting), a timeout, and so many failures in a row until unhealthy;
// failures during the start period don't count until a probe has succeeded.
//
// What a probe is, the caller says: Monitor knows neither containers nor
// processes. The judgement (Judge) is pure.
package health

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
)

// Docker's defaults.
const (
	DefaultInterval      = 30 * time.Second
	DefaultTimeout       = 30 * time.Second
	DefaultStartInterval = 5 * time.Second
	DefaultRetries       = 3
	// MaxOutput of a probe is kept, in bytes; MaxLog results are kept.
	MaxOutput = 4096
	MaxLog    = 5
)

// Enabled says whether c asks for probes.
func Enabled(c *container.HealthConfig) bool {
	return c != nil && len(c.Test) > 0 && c.Test[0] != "NONE"
}

// Command is what a probe executes. shell is the image's, for CMD-SHELL.
func Command(c *container.HealthConfig, shell []string) []string {
	switch {
	case !Enabled(c):
		return nil
	case c.Test[0] == "CMD":
		return slices.Clone(c.Test[1:])
	case c.Test[0] == "CMD-SHELL":
		if len(shell) == 0 {
			shell = []string{"/bin/sh", "-c"}
		}
		return append(slices.Clone(shell), c.Test[1:]...)
	}
	return nil
}

func or[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

// Judge adds a result to a state and returns the new state; the old one is not
// changed. started is when the container was.
func Judge(old *container.Health, r container.HealthcheckResult, c *container.HealthConfig, started time.Time) *container.Health {
	h := &container.Health{Status: container.Starting}
	if old != nil {
		*h = *old
	}
	h.Log = append(slices.Clone(h.Log), &r)
	if n := len(h.Log); n > MaxLog {
		h.Log = h.Log[n-MaxLog:]
	}
	if r.ExitCode == 0 {
		h.FailingStreak, h.Status = 0, container.Healthy
		return h
	}
	if h.Status == container.Starting && r.Start.Sub(started) < c.StartPeriod {
		return h
	}
	h.FailingStreak++
	if h.FailingStreak >= or(c.Retries, DefaultRetries) {
		h.Status = container.Unhealthy
	}
	return h
}

// Pause is the time until the next probe. A start interval that is not given
// is five seconds; without a start period only the interval counts.
func Pause(h *container.Health, c *container.HealthConfig, started, now time.Time) time.Duration {
	interval := or(c.Interval, DefaultInterval)
	if h != nil && h.Status == container.Starting && now.Sub(started) < c.StartPeriod {
		return min(or(c.StartInterval, DefaultStartInterval), interval)
	}
	return interval
}

// Probe runs one probe. It honours ctx, whose deadline is the timeout. An error
// means that the probe could not be run.
type Probe func(ctx context.Context) (exitCode int, output []byte, err error)

// Monitor probes until it is stopped.
type Monitor struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// Start begins to probe, first after the pause. observe is called with each new
// state, one call at a time, from the monitor's goroutine.
func Start(c *container.HealthConfig, state *container.Health, started time.Time, probe Probe, observe func(*container.Health)) *Monitor {
	ctx, cancel := context.WithCancel(context.Background())
	m := &Monitor{cancel: cancel}
	m.wg.Add(1)
	go func() {
		defer m.wg.Done()
		for {
			t := time.NewTimer(Pause(state, c, started, time.Now()))
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return
			}
			r := run(ctx, c, probe)
			if ctx.Err() != nil {
				return
			}
			state = Judge(state, r, c, started)
			observe(state)
		}
	}()
	return m
}

func run(ctx context.Context, c *container.HealthConfig, probe Probe) container.HealthcheckResult {
	timeout := or(c.Timeout, DefaultTimeout)
	pctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r := container.HealthcheckResult{Start: time.Now()}
	code, output, err := probe(pctx)
	r.End = time.Now()
	switch {
	case pctx.Err() == context.DeadlineExceeded:
		r.ExitCode = -1
		r.Output = "Health check exceeded timeout (" + timeout.String() + ")"
		if len(output) > 0 {
			r.Output += ": " + clip(output)
		}
	case err != nil:
		r.ExitCode, r.Output = -1, err.Error()
	default:
		r.ExitCode, r.Output = code, clip(output)
	}
	return r
}

func clip(b []byte) string {
	if len(b) > MaxOutput {
		return string(b[:MaxOutput]) + "..."
	}
	return string(b)
}

// Stop ends the probing without waiting for a probe under way; nothing is
// observed after Wait.
func (m *Monitor) Stop() { m.cancel() }

// Wait returns when the monitor's goroutine has ended.
func (m *Monitor) Wait() { m.wg.Wait() }
