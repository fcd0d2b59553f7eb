package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Freeze stops all processes of the group and returns when they stand.
func (g *Group) Freeze(ctx context.Context) error {
	if err := g.freeze(ctx, true); err != nil {
		// Half of a freeze is none.
		_ = g.freeze(context.WithoutCancel(ctx), false) // the freeze's error says more
		return fmt.Errorf("cgroup %s: freeze: %w", g.path, err)
	}
	return nil
}

// Thaw lets them run again.
func (g *Group) Thaw(ctx context.Context) error {
	if err := g.freeze(ctx, false); err != nil {
		return fmt.Errorf("cgroup %s: thaw: %w", g.path, err)
	}
	return nil
}

// Frozen tells whether the group is frozen.
func (g *Group) Frozen() (bool, error) {
	if d := g.V2(); d != "" {
		return frozenV2(d)
	}
	d := g.v1("freezer")
	if d == "" {
		return false, nil
	}
	b, err := readFile(filepath.Join(d, "freezer.state"))
	if err != nil {
		return false, fmt.Errorf("cgroup %s: %w", g.path, err)
	}
	return strings.TrimSpace(string(b)) == "FROZEN", nil
}

func frozenV2(d string) (bool, error) {
	n, err := keyed(filepath.Join(d, "cgroup.events"), "frozen")
	return n == 1, err
}

func (g *Group) freeze(ctx context.Context, on bool) error {
	file, value := "", ""
	var state func() (bool, error)
	if d := g.V2(); d != "" {
		file, value = filepath.Join(d, "cgroup.freeze"), "0"
		if on {
			value = "1"
		}
		state = func() (bool, error) { return frozenV2(d) }
	} else if d := g.v1("freezer"); d != "" {
		file, value = filepath.Join(d, "freezer.state"), "THAWED"
		if on {
			value = "FROZEN"
		}
		state = g.Frozen
	} else {
		return fmt.Errorf("the machine has no freezer: %w", errdefs.ErrFailedPrecondition)
	}
	wait := 200 * time.Microsecond
	for {
		// v1 is written again each time: a process forked meanwhile is caught.
		if err := writeFile(file, value); err != nil {
			return err
		}
		now, err := state()
		if err != nil {
			return err
		}
		if now == on {
			return nil
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
		if wait < 20*time.Millisecond {
			wait *= 2
		}
	}
}

// Kill sends sig to every process of the group and those below; with SIGKILL no
// process escapes by forking, and frozen processes die. It does not wait for
// them. A group that is gone is no error.
func (g *Group) Kill(sig syscall.Signal) error {
	if d := g.V2(); d != "" && sig == syscall.SIGKILL {
		err := writeFile(filepath.Join(d, "cgroup.kill"), "1")
		if err == nil {
			return nil
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			if _, serr := os.Stat(d); serr != nil {
				return nil
			}
		}
	}
	freezer := g.v1("freezer")
	// Several turns, for what is forked meanwhile where nothing can be frozen.
	for range maxKillTurns {
		if freezer != "" && sig == syscall.SIGKILL {
			// Best effort: what is not frozen is caught by the next turn.
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			_ = g.freeze(ctx, true)
			cancel()
		}
		pids, err := g.Pids()
		for _, pid := range pids {
			if kerr := syscall.Kill(pid, sig); kerr != nil && kerr != syscall.ESRCH && err == nil {
				err = fmt.Errorf("process %d: %w", pid, kerr)
			}
		}
		if freezer != "" && sig == syscall.SIGKILL {
			// The killed must run to die.
			if terr := writeFile(filepath.Join(freezer, "freezer.state"), "THAWED"); terr != nil && !errors.Is(terr, fs.ErrNotExist) && err == nil {
				err = terr
			}
		}
		if err != nil {
			return fmt.Errorf("cgroup %s: kill: %w", g.path, err)
		}
		if len(pids) == 0 || sig != syscall.SIGKILL {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

// maxKillTurns bounds Kill where the kernel cannot kill a group at once.
const maxKillTurns = 50

// OOMKills is the number of processes that the kernel killed for memory in the
// group and below so far.
func (g *Group) OOMKills() (uint64, error) {
	file := ""
	if d := g.v1("memory"); d != "" {
		file = filepath.Join(d, "memory.oom_control")
	} else if d := g.V2(); d != "" {
		file = filepath.Join(d, "memory.events")
	} else {
		return 0, nil
	}
	n, err := keyed(file, "oom_kill")
	if err != nil {
		return 0, fmt.Errorf("cgroup %s: %w", g.path, err)
	}
	return n, nil
}

// OOM reports kernel OOM kills: the number of kills in the group so far is sent
// after each change, until ctx is done or the group is gone; then the channel
// is closed. Kills that happened before are counted in the first value. A
// receiver that is late gets the newest number only.
func (g *Group) OOM(ctx context.Context) (<-chan uint64, error) {
	var f *os.File
	var err error
	v1 := g.v1("memory")
	if v1 != "" {
		f, err = watchV1(v1)
	} else if d := g.V2(); d != "" {
		f, err = watchV2(filepath.Join(d, "memory.events"))
	} else {
		err = fmt.Errorf("the machine has no memory controller: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("cgroup %s: watch for OOM kills: %w", g.path, err)
	}
	out := make(chan uint64, 1)
	stop := context.AfterFunc(ctx, func() { f.Close() })
	go func() {
		defer close(out)
		defer stop()
		defer f.Close()
		var last uint64
		buf := make([]byte, 4096)
		for {
			n, err := g.OOMKills()
			if err != nil {
				return
			}
			if n != last {
				last = n
				select {
				case <-out: // late receiver
				default:
				}
				out <- n
			}
			if _, err := f.Read(buf); err != nil {
				return
			}
			if v1 != "" {
				// The kernel tells of the shortage, a moment before the kill is counted.
				g.settle(ctx, last)
			}
		}
	}()
	return out, nil
}

// settle waits until the count moves, for a short time: a shortage need not end
// in a kill.
func (g *Group) settle(ctx context.Context, last uint64) {
	for wait := time.Millisecond; wait < 100*time.Millisecond; wait *= 2 {
		if n, err := g.OOMKills(); err != nil || n != last {
			return
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// watchV1 gives an eventfd of the group's oom_control (cgroup-v1/memory.rst §10).
func watchV1(d string) (*os.File, error) {
	ctl, err := os.Open(filepath.Join(d, "memory.oom_control"))
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	if err := writeFile(filepath.Join(d, "cgroup.event_control"), fmt.Sprintf("%d %d", fd, ctl.Fd())); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "eventfd"), nil
}

// watchV2 gives an inotify descriptor for the file.
func watchV2(file string) (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	if _, err := unix.InotifyAddWatch(fd, file, unix.IN_MODIFY); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "inotify_add_watch", Path: file, Err: err}
	}
	return os.NewFile(uintptr(fd), "inotify"), nil
}
