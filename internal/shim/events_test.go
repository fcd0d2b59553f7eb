package shim

import (
	"context"
	"errors"
	"fmt"
	"testing"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

func TestRingGap(t *testing.T) {
	r := newRing()
	const n = ringSize + 100
	for i := range n {
		r.publish(&taskv1.Event{Type: taskv1.Event_START, Id: fmt.Sprint(i)})
	}
	for _, c := range []struct {
		after uint64
		first taskv1.Event_Type
		count int
	}{
		{0, taskv1.Event_GAP, ringSize + 1},
		{99, taskv1.Event_GAP, ringSize + 1},
		{100, taskv1.Event_START, ringSize},
		{n - 1, taskv1.Event_START, 1},
		{n + 5, taskv1.Event_GAP, ringSize + 2}, // another shim's number: all of this one's
	} {
		var got []*taskv1.Event
		stop := errors.New("stop")
		err := r.stream(t.Context(), c.after, func(e *taskv1.Event) error {
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
	if err := r.stream(ctx, n, func(*taskv1.Event) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestParseNetDevAndStat(t *testing.T) {
	p, err := parseStat("12 (a) b (c) R 1 12 12 34816 12 4194304 100 0 0 0 5 7 0 0 20 0 3 0 1000 4096000 25 18446744073709551615 1 1 0 0")
	if err != nil || p.comm != "a) b (c" || p.pid != 12 || p.ppid != 1 || p.utime != 5 || p.threads != 3 || p.stat() != "Rsl+" || ttyName(p.tty) != "pts/0" {
		t.Errorf("%+v, %v", p, err)
	}
	if r, err := parsePS("  PID CMD\n 1 a b c\n 2 d\n", []int{1}); err != nil || len(r.Rows) != 1 || r.Rows[0].Fields[1] != "a b c" {
		t.Errorf("%v, %v", r, err)
	}
	if _, err := parsePS("CMD\n a\n", nil); !errors.Is(err, errNoPID) {
		t.Error(err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("12 (a) b (c) R 1 12 12 34816 12 4194304 100 0 0 0 5 7 0 0 20 0 3 0 1000 4096000 25 1 1 1 0 0")
	f.Add(")(")
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := parseStat(s); err == nil && p == nil {
			t.Error("nothing, and no error")
		}
	})
}
