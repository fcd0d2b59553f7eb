package main

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
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
	begun sync.Once
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
	h.begun.Do(forgetStart)
}

// forgetStart takes the program's own pages out of memory that its start has read and
// nothing needs any more: the initialisation of what it is linked with touches most of
// it once. They stay in the kernel's cache, and come back when they are used: this frees
// nothing that the kernel could not take by itself when memory is short, but the daemon
// is then counted what it uses. A program that was changed where it was loaded (to lie
// at any address) would lose that, and is left as it is.
func forgetStart() {
	if !atItsPlace() {
		return
	}
	self, err := os.Executable()
	if err != nil {
		return
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line)
		if len(f) < 6 || f[5] != self || strings.Contains(f[1], "w") {
			continue
		}
		var from, to uintptr
		if _, err := fmt.Sscanf(f[0], "%x-%x", &from, &to); err == nil {
			// What it says does not matter: the pages stay, then.
			_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED)
		}
	}
}

// atItsPlace tells whether the program runs where it was linked to.
func atItsPlace() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool {
		return s.Key == "-buildmode" && s.Value == "exe"
	})
}

func (h *heap) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.timer != nil {
		h.timer.Stop()
	}
	runtime.KeepAlive(h.ballast)
}
