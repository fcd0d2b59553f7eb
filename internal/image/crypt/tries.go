package crypt

import (
	"context"
	"sync/atomic"
)

// Tries counts the private-key operations for one image, which whoever makes an image
// has a hand in: there are maxImageTries in all. It is safe for concurrent use.
type Tries struct {
	n    atomic.Int64
	last atomic.Int64 // the key that fitted last: it is tried first
	gate chan struct{}
}

// NewTries returns a count of none. With a gate (may be nil) operations wait for room in
// it.
func NewTries(gate chan struct{}) *Tries { return &Tries{gate: gate} }

// attempt is the unwrapping of one layer's key.
type attempt struct {
	ctx context.Context
	all *Tries
	n   int
}

// do runs f, which takes n operations. ErrResourceExhausted if that is too many.
func (a *attempt) do(n int, f func()) error {
	if a.n += n; a.n > maxTries || a.all.n.Add(int64(n)) > maxImageTries {
		return errTries
	}
	if a.all.gate != nil {
		select {
		case a.all.gate <- struct{}{}:
			defer func() { <-a.all.gate }()
		case <-a.ctx.Done():
		}
	}
	if err := context.Cause(a.ctx); err != nil {
		return err
	}
	f()
	return nil
}

// order are the indexes of n keys, that which fitted last first.
func (a *attempt) order(n int) []int {
	out := make([]int, n)
	first := int(a.all.last.Load())
	for i := range out {
		switch {
		case i == 0 && first < n:
			out[i] = first
		case i <= first && first < n:
			out[i] = i - 1
		default:
			out[i] = i
		}
	}
	return out
}
