package vmm

import (
	"testing"
	"time"
)

// TestPoolPause: the longer it took to hand a machine over, the longer the next
// one is put off, within bounds.
func TestPoolPause(t *testing.T) {
	for _, c := range []struct{ took, low, high time.Duration }{
		{0, poolQuiet, mostQuiet},
		{20 * time.Millisecond, poolQuiet, mostQuiet},
		{400 * time.Millisecond, 1600 * time.Millisecond, mostQuiet},
		{time.Minute, mostQuiet, mostQuiet},
	} {
		p := newPool(&Manager{})
		p.asked = time.Now().Add(-c.took)
		p.touch()
		if p.quiet < c.low || p.quiet > c.high {
			t.Errorf("after %v: %v, want %v to %v", c.took, p.quiet, c.low, c.high)
		}
		before := p.quiet
		if p.touch(); p.quiet != before {
			t.Errorf("after %v, touched again: %v", c.took, p.quiet)
		}
	}
}
