package health

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
)

func TestJudge(t *testing.T) {
	t0 := time.Unix(1000, 0)
	cfg := &container.HealthConfig{Test: []string{"CMD", "x"}, Retries: 2, StartPeriod: 10 * time.Second}
	h := &container.Health{Status: container.Starting}
	for i, step := range []struct {
		after  time.Duration
		code   int
		status container.HealthStatus
		streak int
	}{
		{1 * time.Second, 1, container.Starting, 0}, // start period: does not count
		{9 * time.Second, 1, container.Starting, 0},
		{11 * time.Second, 1, container.Starting, 1},
		{12 * time.Second, 0, container.Healthy, 0},
		{13 * time.Second, 1, container.Healthy, 1},
		{14 * time.Second, 1, container.Unhealthy, 2},
		{15 * time.Second, 0, container.Healthy, 0},
	} {
		h = Judge(h, container.HealthcheckResult{Start: t0.Add(step.after), ExitCode: step.code}, cfg, t0)
		if h.Status != step.status || h.FailingStreak != step.streak {
			t.Errorf("step %d: got %s %d, want %s %d", i, h.Status, h.FailingStreak, step.status, step.streak)
		}
	}
	if len(h.Log) != MaxLog {
		t.Errorf("%d results kept, want %d", len(h.Log), MaxLog)
	}
}

func TestPause(t *testing.T) {
	t0 := time.Unix(1000, 0)
	starting, healthy := &container.Health{Status: container.Starting}, &container.Health{Status: container.Healthy}
	for _, c := range []struct {
		h    *container.Health
		cfg  container.HealthConfig
		at   time.Duration
		want time.Duration
	}{
		{starting, container.HealthConfig{}, 0, DefaultInterval},
		{starting, container.HealthConfig{StartPeriod: time.Minute}, time.Second, DefaultStartInterval},
		{starting, container.HealthConfig{StartPeriod: time.Minute, Interval: time.Second}, time.Second, time.Second},
		{starting, container.HealthConfig{StartPeriod: time.Minute, StartInterval: time.Millisecond}, time.Second, time.Millisecond},
		{starting, container.HealthConfig{StartPeriod: time.Minute, StartInterval: time.Millisecond}, time.Hour, DefaultInterval},
		{healthy, container.HealthConfig{StartPeriod: time.Minute}, time.Second, DefaultInterval},
	} {
		if got := Pause(c.h, &c.cfg, t0, t0.Add(c.at)); got != c.want {
			t.Errorf("%+v after %v: got %v, want %v", c.cfg, c.at, got, c.want)
		}
	}
}

func TestMonitor(t *testing.T) {
	cfg := &container.HealthConfig{Test: []string{"CMD", "x"}, Interval: time.Millisecond, Timeout: 20 * time.Millisecond, Retries: 1}
	n := 0
	states := make(chan *container.Health, 10)
	m := Start(cfg, &container.Health{Status: container.Starting}, time.Now(), func(ctx context.Context) (int, []byte, error) {
		switch n++; n {
		case 1:
			return 0, []byte("fine"), nil
		case 2:
			return 0, nil, errors.New("can't run")
		}
		<-ctx.Done()
		return 0, nil, ctx.Err()
	}, func(h *container.Health) { states <- h })
	next := func() *container.Health {
		t.Helper()
		select {
		case h := <-states:
			return h
		case <-time.After(time.Minute):
			t.Fatal("no state")
			return nil
		}
	}
	if h := next(); h.Status != container.Healthy || h.Log[0].Output != "fine" {
		t.Errorf("got %+v", h)
	}
	if h := next(); h.Status != container.Unhealthy || h.Log[1].ExitCode != -1 {
		t.Errorf("got %+v", h)
	}
	if h := next(); h.Log[2].Output != "Health check exceeded timeout (20ms)" {
		t.Errorf("got %q", h.Log[2].Output)
	}
	m.Stop()
	m.Wait()
}
