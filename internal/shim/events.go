package shim

import (
	"time"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	"tenon.dev/tenon/internal/task/replay"
)

// ringSize is how many events are kept for a daemon that comes back.
const ringSize = 4096

func newRing() *replay.Ring[taskv1.Event] {
	return replay.New(ringSize, func(e *taskv1.Event, n uint64) {
		e.Sequence = n
		if e.Time == 0 {
			e.Time = time.Now().UnixNano()
		}
	}, func(n uint64) *taskv1.Event {
		return &taskv1.Event{Type: taskv1.Event_GAP, Sequence: n, Time: time.Now().UnixNano()}
	})
}
