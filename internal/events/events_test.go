package events

import (
	"context"
	"log/slog"
	"strconv"
	"testing"
	"time"

	"github.com/moby/moby/api/types/events"
)

func collect(t *testing.T, ch <-chan events.Message) []string {
	t.Helper()
	var got []string
	for m := range ch {
		got = append(got, string(m.Action)+" "+m.Actor.ID)
	}
	return got
}

func TestPastSurvivesAReopen(t *testing.T) {
	dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
	start := time.Now()
	h, err := Open(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		h.Publish(events.Message{Type: events.ContainerEventType, Action: events.ActionStart, Actor: events.Actor{ID: strconv.Itoa(i)}})
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if h, err = Open(dir, log); err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	h.Publish(events.Message{Type: events.ContainerEventType, Action: events.ActionDie, Actor: events.Actor{ID: "2"}})
	got := collect(t, h.Subscribe(t.Context(), start, time.Now(), nil))
	if len(got) != 4 || got[0] != "start 0" || got[3] != "die 2" {
		t.Errorf("got %q", got)
	}
	got = collect(t, h.Subscribe(t.Context(), start, time.Now(), map[string][]string{"event": {"die"}}))
	if len(got) != 1 {
		t.Errorf("filtered: got %q", got)
	}
}

func TestLiveInOrderAndSlowReadersDoNotBlock(t *testing.T) {
	h, err := Open("", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	live := h.Subscribe(ctx, time.Time{}, time.Time{}, nil)
	_ = h.Subscribe(ctx, time.Time{}, time.Time{}, nil) // never read
	for i := range 3 * queueSize {
		h.Publish(events.Message{Action: events.ActionStart, Actor: events.Actor{ID: strconv.Itoa(i)}})
	}
	last := -1
	for m := range live {
		n, _ := strconv.Atoi(m.Actor.ID)
		if n <= last {
			t.Fatalf("%d after %d", n, last)
		}
		if last = n; n == 3*queueSize-1 {
			cancel()
		}
	}
	if last != 3*queueSize-1 {
		t.Errorf("ended at %d", last)
	}
}

func TestMatch(t *testing.T) {
	m := &events.Message{Type: events.ContainerEventType, Action: "health_status: healthy", Scope: "local", Actor: events.Actor{ID: "abcdef", Attributes: map[string]string{"name": "web", "image": "busybox:1", "a": "b"}}}
	for _, c := range []struct {
		f    map[string][]string
		want bool
	}{
		{nil, true},
		{map[string][]string{"event": {"health_status"}}, true},
		{map[string][]string{"event": {"health"}}, false},
		{map[string][]string{"type": {"image", "container"}}, true},
		{map[string][]string{"container": {"web"}}, true},
		{map[string][]string{"container": {"abcde"}}, true},
		{map[string][]string{"container": {"db"}}, false},
		{map[string][]string{"image": {"busybox"}}, true},
		{map[string][]string{"label": {"a=b"}}, true},
		{map[string][]string{"label": {"a=b", "c"}}, false},
		{map[string][]string{"network": {"web"}}, false},
	} {
		if got := Match(m, c.f); got != c.want {
			t.Errorf("%v: got %v", c.f, got)
		}
	}
}
