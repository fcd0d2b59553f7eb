package image

import (
	"context"
	"sync/atomic"
	"testing"
	"time"
)

// inUse is a cache that has nothing to give.
type inUse struct{ asked, shrunk atomic.Int64 }

func (c *inUse) Bytes(context.Context) int64 { c.asked.Add(1); return 1 << 20 }

func (c *inUse) Shrink(context.Context, int64, time.Duration) error { c.shrunk.Add(1); return nil }

// A cache that is in use is not asked for room again and again, however often the budget
// is looked at.
func TestCacheInUseIsLeftAlone(t *testing.T) {
	s := open(t, func(c *Config) { c.Budget = 1 })
	c := new(inUse)
	s.SetCache(c)
	deadline := time.Now().Add(time.Minute)
	for last := int64(0); last < 6; {
		n := c.asked.Load()
		if n > last {
			last = n
			s.budget.wanted.Store(true)
			s.kick()
		}
		if time.Now().After(deadline) {
			t.Fatalf("the budget was looked at %d times in a minute", n)
		}
		time.Sleep(5 * time.Millisecond) // between two looks
	}
	if n := c.shrunk.Load(); n != 1 {
		t.Errorf("the cache was shrunk %d times", n)
	}
}
