package replay

import (
	"context"
	"errors"
	"fmt"
	"testing"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

const size = 512

func ring() *Ring[taskv1.Event] {
	return New(size, func(e *taskv1.Event, n uint64) { e.Sequence = n },
		func(n uint64) *taskv1.Event { return &taskv1.Event{Type: taskv1.Event_GAP, Sequence: n} })
}

func TestGap(t *testing.T) {
	r := ring()
	const n = size + 100
	for i := range n {
		r.Publish(&taskv1.Event{Type: taskv1.Event_START, Id: fmt.Sprint(i)})
	}
	for _, c := range []struct {
		after uint64
		first taskv1.Event_Type
		count int
	}{
		{0, taskv1.Event_GAP, size + 1},
		{99, taskv1.Event_GAP, size + 1},
		{100, taskv1.Event_START, size},
		{n - 1, taskv1.Event_START, 1},
		{n + 5, taskv1.Event_GAP, size + 2}, // another process's number: all of this one's
	} {
		var got []*taskv1.Event
		stop := errors.New("stop")
		err := r.Stream(t.Context(), c.after, func(e *taskv1.Event) error {
			got = append(got, e)
			if e.Sequence == n {
				return stop
			}
			return nil
		})
		if !errors.Is(err, stop) || got[0].Type != c.first || len(got) != c.count {
			t.Errorf("after %d: %d events, the first %v, %v; want %d, %v", c.after, len(got), got[0], err, c.count, c.first)
		}
		last := uint64(0)
		for _, e := range got {
			if e.Type == taskv1.Event_GAP {
				continue
			}
			if last != 0 && e.Sequence != last+1 {
				t.Fatalf("after %d: %d follows %d", c.after, e.Sequence, last)
			}
			last = e.Sequence
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Stream(ctx, n, func(*taskv1.Event) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
