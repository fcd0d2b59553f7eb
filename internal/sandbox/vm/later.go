package vm

import (
	"context"
	"sync"
	"time"
)

// later does things after a while, until it is ended.
type later struct {
	over context.Context
	end  context.CancelFunc

	mu      sync.Mutex
	running sync.WaitGroup
}

func (l *later) after(d time.Duration, f func(over context.Context)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over.Err() != nil {
		return
	}
	l.running.Go(func() {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
			f(l.over)
		case <-l.over.Done():
		}
	})
}

// stop ends what waits, and waits for what has begun.
func (l *later) stop() {
	l.mu.Lock()
	l.end()
	l.mu.Unlock()
	l.running.Wait()
}
