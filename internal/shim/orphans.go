package shim

import (
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// orphanAfter is how long a dead child that nobody waits for stays.
const orphanAfter = 2 * time.Second

// reapOrphans waits for processes that were left to the shim as subreaper:
// background processes of containers in the machine's pid namespace, helpers
// of external runtimes. Children that somebody waits for are left alone: only
// what has been dead for a while, and is no process of a container, is taken.
func (s *Shim) reapOrphans() {
	died := make(chan os.Signal, 1)
	signal.Notify(died, syscall.SIGCHLD)
	defer signal.Stop(died)
	seen := map[int]bool{}
	var timer <-chan time.Time
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-died:
			if timer == nil {
				timer = time.After(orphanAfter)
			}
			continue
		case <-timer:
			timer = nil
		}
		ours := s.pids()
		now := map[int]bool{}
		for _, pid := range zombies() {
			if ours[pid] {
				continue
			}
			if !seen[pid] {
				now[pid] = true
				continue
			}
			var info unix.Siginfo
			_ = unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG, nil) // reaped meanwhile: as good
		}
		seen = now
		if len(seen) > 0 {
			timer = time.After(orphanAfter)
		}
	}
}

// pids are the processes that somebody waits for.
func (s *Shim) pids() map[int]bool {
	m := map[int]bool{}
	for _, c := range s.list() {
		c.mu.Lock()
		list := []*process{c.init}
		for _, p := range c.execs {
			list = append(list, p)
		}
		c.mu.Unlock()
		for _, p := range list {
			if pid := p.knownPid(); pid > 0 {
				m[pid] = true
			}
		}
	}
	return m
}

// knownPid is 0 while the process is being made.
func (p *process) knownPid() int {
	if !p.mu.TryLock() {
		return 0
	}
	defer p.mu.Unlock()
	if p.child == nil {
		return 0
	}
	return p.child.pid()
}

// zombies lists the dead children.
func zombies() (list []int) {
	names, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return nil
	}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err != nil {
			continue // the thread has ended
		}
		for f := range strings.FieldsSeq(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				continue
			}
			if st, err := processState(pid); err == nil && st == "Z" {
				list = append(list, pid)
			}
		}
	}
	return list
}
