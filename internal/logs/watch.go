package logs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// watch waits for changes of a log: writes to the file that is read, and
// anything that comes or goes in its directory.
type watch struct {
	f    *os.File // inotify
	ctx  context.Context
	done <-chan struct{}
	over bool // done was closed, and the log was read since
	wd   uint32
	stop []func()
}

func newWatch(ctx context.Context, dir string, done <-chan struct{}) (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	w := &watch{f: os.NewFile(uintptr(fd), "inotify"), ctx: ctx, done: done}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_MOVED_FROM|unix.IN_DELETE_SELF|unix.IN_ONLYDIR); err != nil {
		w.f.Close()
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	wake := func() { _ = w.f.SetReadDeadline(time.Unix(1, 0)) } // inotify has deadlines
	stop := context.AfterFunc(ctx, wake)
	w.stop = append(w.stop, func() { stop() })
	if done != nil {
		quit := make(chan struct{})
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			select {
			case <-done:
				wake()
			case <-quit:
			}
		}()
		w.stop = append(w.stop, func() { close(quit); <-gone })
	}
	return w, nil
}

// follow watches writes to f instead of to the file before.
func (w *watch) follow(f *os.File) {
	raw, err := w.f.SyscallConn()
	if err != nil {
		return
	}
	target, err := f.SyscallConn()
	if err != nil {
		return
	}
	// By descriptor: the name may be another file's already.
	_ = target.Control(func(file uintptr) {
		_ = raw.Control(func(fd uintptr) {
			if w.wd != 0 {
				_, _ = unix.InotifyRmWatch(int(fd), w.wd) // it may be gone with its file
				w.wd = 0
			}
			if wd, err := unix.InotifyAddWatch(int(fd), fmt.Sprintf("/proc/self/fd/%d", file), unix.IN_MODIFY|unix.IN_MOVE_SELF|unix.IN_DELETE_SELF); err == nil {
				w.wd = uint32(wd)
			}
		})
	})
}

// wait returns nil when the log should be read again, errStop when it was read
// after done, or the context's end.
func (w *watch) wait() error {
	if w.over {
		return errStop
	}
	var b [4096]byte
	_, err := w.f.Read(b[:])
	if w.ctx.Err() != nil {
		return context.Cause(w.ctx)
	}
	select {
	case <-w.done:
		w.over = true
		return nil
	default:
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

func (w *watch) close() {
	for _, f := range w.stop {
		f()
	}
	w.f.Close()
}
