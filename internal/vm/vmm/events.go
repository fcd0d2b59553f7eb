package vmm

import (
	"time"

	"tenon.dev/tenon/internal/task/replay"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

// ringSize is how many events are kept for a daemon that comes back.
const ringSize = 1024

func newRing() *replay.Ring[vmv1.Event] {
	return replay.New(ringSize, func(e *vmv1.Event, n uint64) {
		e.Sequence, e.Time = n, time.Now().UnixNano()
	}, func(n uint64) *vmv1.Event {
		return &vmv1.Event{Type: vmv1.Event_GAP, Sequence: n, Time: time.Now().UnixNano()}
	})
}
