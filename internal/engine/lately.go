package engine

import (
	"context"
	"sync"
	"time"

	"tenon.dev/tenon/internal/task"
)

// outputTime bounds how long the end of a container is kept from those who wait
// for it while its last output is on the way to those who are attached.
const outputTime = 2 * time.Second

// flush calls then once all output of a run is written to those attached; c.mu is
// held. Clients that wait for the end and then look at what they have got find it
// whole, as with Docker.
func (c *ctr) flushLocked(then func()) {
	var open []*task.Attachment
	for _, a := range c.attached {
		if !isClosed(a.Done()) {
			open = append(open, a)
		}
	}
	c.attached, c.flushing = nil, nil
	if len(open) == 0 {
		then()
		return
	}
	flushed := make(chan struct{})
	c.flushing = flushed
	go func() {
		t := time.NewTimer(outputTime)
		defer t.Stop()
		for _, a := range open {
			select {
			case <-a.Done():
				continue
			case <-t.C:
			}
			break
		}
		close(flushed)
		then()
	}()
}

// result is a channel with one result, sent once flushing (nil: at once) is over.
func result(ctx context.Context, flushing <-chan struct{}, r WaitResult) <-chan WaitResult {
	ch := make(chan WaitResult, 1)
	if flushing == nil || isClosed(flushing) {
		ch <- r
		return ch
	}
	go func() {
		select {
		case <-flushing:
			ch <- r
		case <-ctx.Done():
		}
	}()
	return ch
}

const (
	maxLately  = 256
	latelyTime = time.Minute
)

// lately remembers how containers of --rm ended that are gone: clients that start
// one and then wait for it by its identifier are slower than its end.
type lately struct {
	mu   sync.Mutex
	list []ending // oldest first
}

type ending struct {
	id       string
	at       time.Time
	result   WaitResult
	flushing <-chan struct{}
}

func (l *lately) add(e ending) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.list) >= maxLately {
		l.list = append(l.list[:0], l.list[1:]...)
	}
	l.list = append(l.list, e)
}

// find is for whole identifiers: names are free again.
func (l *lately) find(id string) (ending, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for k := len(l.list) - 1; k >= 0; k-- {
		if e := l.list[k]; e.id == id {
			return e, time.Since(e.at) < latelyTime
		}
	}
	return ending{}, false
}
