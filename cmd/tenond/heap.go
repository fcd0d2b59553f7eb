package main

import (
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

const (
	// ballastSize is counted as used memory, so that garbage is not collected
	// for each few containers. It is an address range that nobody touches and
	// takes no memory.
	ballastSize = 8 << 20

	tidyAfter = time.Second     // of quiet
	tidyEvery = 2 * time.Second // at most
)

// heap lets garbage lie while there is much to do, and gives it back to the
// kernel once it is quiet.
type heap struct {
	ballast []byte

	mu    sync.Mutex
	timer *time.Timer
	last  time.Time // when memory was given back
}

func keepHeap() *heap { return &heap{ballast: make([]byte, ballastSize)} }

// touch says that something was done.
func (h *heap) touch() {
	h.mu.Lock()
	defer h.mu.Unlock()
	wait := max(tidyAfter, tidyEvery-time.Since(h.last))
	if h.timer == nil {
		h.timer = time.AfterFunc(wait, h.tidy)
		return
	}
	h.timer.Reset(wait)
}

func (h *heap) tidy() {
	h.mu.Lock()
	h.last = time.Now()
	h.mu.Unlock()
	debug.FreeOSMemory()
}

func (h *heap) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.timer != nil {
		h.timer.Stop()
	}
	runtime.KeepAlive(h.ballast)
}
