package network

import (
	"math/rand/v2"
	"sync/atomic"
)

// indexes hands out the indexes of the host's ends of endpoints. The guard's
// sets have them as keys before the interface exists, and for a moment after it
// is gone, so none may come again soon, and none that the kernel gives another
// interface: it counts up from 1 by itself, and this from a random number far
// above. Engines on one host that meet find the index taken and try the next.
// The zero value is not usable. Safe for concurrent use.
type indexes struct{ last atomic.Uint32 }

// Indexes are in [minIndex, minIndex+indexRange).
const (
	minIndex   = 1 << 20
	indexRange = 1 << 30
)

func newIndexes() *indexes {
	x := &indexes{}
	x.last.Store(rand.Uint32())
	return x
}

func (x *indexes) next() int { return minIndex + int(x.last.Add(1)%indexRange) }
