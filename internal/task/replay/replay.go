// Package replay keeps the last events of a process that outlives the daemon,
// numbered, and hands them, old and new, to whoever follows them: so that a
// daemon which comes back misses nothing.
package replay

import (
	"context"
	"sync"
)

// atOnce is how many events are taken from a ring under its lock.
const atOnce = 64

// Ring keeps the last events, of type E, numbered from 1. A reader that falls
// behind by the whole ring, or that comes with a number of another process's
// ring, is told of a gap. It is safe for concurrent use.
type Ring[E any] struct {
	size  uint64
	stamp func(e *E, sequence uint64)
	gap   func(sequence uint64) *E

	mu      sync.Mutex
	last    uint64 // the newest event's number
	events  []*E
	changed chan struct{} // closed and replaced by each event
}

// New returns an empty ring of size events. stamp gives an event its number and,
// if it has none, its time; gap makes the event which says that what was before
// and at a number is not known. Both must not call the ring.
func New[E any](size int, stamp func(e *E, sequence uint64), gap func(sequence uint64) *E) *Ring[E] {
	return &Ring[E]{size: uint64(size), stamp: stamp, gap: gap, changed: make(chan struct{})}
}

// Publish numbers, stamps and keeps e, which nobody may change afterwards.
func (r *Ring[E]) Publish(e *E) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last++
	r.stamp(e, r.last)
	if uint64(len(r.events)) < r.size {
		r.events = append(r.events, e)
	} else {
		r.events[(r.last-1)%r.size] = e
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// Sequence is the newest event's number; 0 if there was none.
func (r *Ring[E]) Sequence() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last
}

// after returns some of the events after a number, the number of the last of
// them, and a channel that is closed when there are more.
func (r *Ring[E]) after(seq uint64) (list []*E, at uint64, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if seq > r.last {
		// Of another process's ring: everything is news, and something was lost.
		return []*E{r.gap(0)}, 0, r.changed
	}
	if oldest := r.last - uint64(len(r.events)); seq < oldest {
		return []*E{r.gap(oldest)}, oldest, r.changed
	}
	for ; seq < r.last && len(list) < atOnce; seq++ {
		list = append(list, r.events[seq%r.size])
	}
	return list, seq, r.changed
}

// Stream sends the events after a number, and those to come, until ctx ends,
// whose cause it returns, or send fails.
func (r *Ring[E]) Stream(ctx context.Context, after uint64, send func(*E) error) error {
	for {
		list, at, changed := r.after(after)
		for _, e := range list {
			if err := send(e); err != nil {
				return err
			}
		}
		after = at
		if len(list) > 0 {
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
