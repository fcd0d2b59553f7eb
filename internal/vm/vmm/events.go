package vmm

import (
	"context"
	"sync"
	"time"

	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

// ringSize is how many events are kept for a daemon that comes back.
const ringSize = 1024

// ring keeps the last events and hands them, old and new, to any number of
// readers. A reader that falls behind by the whole ring is told of a gap.
type ring struct {
	mu      sync.Mutex
	last    uint64 // sequence number of the newest event
	events  []*vmv1.Event
	changed chan struct{} // closed and replaced by each event
}

func newRing() *ring { return &ring{changed: make(chan struct{})} }

// add numbers, stamps and keeps e.
func (r *ring) add(e *vmv1.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last++
	e.Sequence, e.Time = r.last, time.Now().UnixNano()
	if len(r.events) < ringSize {
		r.events = append(r.events, e)
	} else {
		r.events[(e.Sequence-1)%ringSize] = e
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// sequence is the newest event's number.
func (r *ring) sequence() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last
}

// after returns events after a sequence number, and a channel that is closed
// when there are more.
func (r *ring) after(seq uint64) (list []*vmv1.Event, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	gap := func(at uint64) []*vmv1.Event {
		return []*vmv1.Event{{Type: vmv1.Event_GAP, Sequence: at, Time: time.Now().UnixNano()}}
	}
	if seq > r.last {
		return gap(0), r.changed // a number of another process's
	}
	if oldest := r.last - uint64(len(r.events)); seq < oldest {
		return gap(oldest), r.changed
	}
	for ; seq < r.last && len(list) < 64; seq++ {
		list = append(list, r.events[seq%ringSize])
	}
	return list, r.changed
}

// stream sends events until ctx ends or send fails.
func (r *ring) stream(ctx context.Context, seq uint64, send func(*vmv1.Event) error) error {
	for {
		list, changed := r.after(seq)
		for _, e := range list {
			if err := send(e); err != nil {
				return err
			}
			seq = e.Sequence
		}
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
