package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// listen makes the shim's socket: whoever connects to it speaks with the guest's
// shim.
func (v *machine) listen() error {
	path := filepath.Join(v.dir(), socketName)
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return fmt.Errorf("the guest's shim: %w", err)
	}
	v.listener = l
	go func() {
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // no descriptors: they come back
				time.Sleep(acceptPause)
				continue
			}
			go v.proxy(c.(*net.UnixConn))
		}
	}()
	return nil
}

const (
	socketName  = "shim.sock"
	acceptPause = 10 * time.Millisecond
)

// proxy carries one connection as one stream.
func (v *machine) proxy(c *net.UnixConn) {
	s, err := v.session.Dial(context.Background())
	if err != nil {
		c.Close()
		return
	}
	join(c, s)
}

// join copies both ways until both ends have nothing more to say, or one is
// gone.
func join(c *net.UnixConn, s channel.Conn) {
	finished := make(chan struct{})
	shut := func() {
		c.Close()
		s.Close()
	}
	go func() {
		defer close(finished)
		if _, err := io.Copy(onlyWriter{c}, s); err != nil {
			shut()
			return
		}
		_ = c.CloseWrite() // it may be gone
	}()
	if _, err := io.Copy(s, onlyReader{c}); err != nil || hungUp(c) {
		shut()
		<-finished
		return
	}
	_ = s.CloseWrite() // the session may be gone
	// The peer has said that it writes no more. Whether it still reads nobody
	// says.
	t := time.NewTicker(hangUpTurn)
	defer t.Stop()
	for {
		select {
		case <-finished:
			shut()
			return
		case <-t.C:
			if hungUp(c) {
				shut()
				<-finished
				return
			}
		}
	}
}

const hangUpTurn = time.Second

// onlyReader and onlyWriter hide the ways by which io.Copy would do without its
// buffer.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

// hungUp says whether the peer has closed both directions.
func hungUp(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	up := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(p, 0)
		up = err == nil && n > 0 && p[0].Revents&unix.POLLHUP != 0
	})
	return up || err != nil
}

// accept serves the streams that the guest opens. The guest is not trusted.
func (v *machine) accept() {
	for {
		c, err := v.session.Accept()
		if err != nil {
			return
		}
		go v.stream(c.(channel.Conn))
	}
}

// headerTime is how long a guest may take to say what a stream is for.
const headerTime = 30 * time.Second

func (v *machine) stream(c channel.Conn) {
	defer c.Close()
	h := new(taskv1.HostHeader)
	_ = c.SetReadDeadline(time.Now().Add(headerTime)) // without it the session's end ends the read
	if err := channel.ReadMessage(c, h); err != nil {
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	var err error
	switch k := h.Kind.(type) {
	case *taskv1.HostHeader_Log:
		err = v.keepLog(c, k.Log.Id)
	case *taskv1.HostHeader_Share:
		err = v.serveShare(c, k.Share.Tag)
	default:
		err = fmt.Errorf("unknown stream: %w", errdefs.ErrNotImplemented)
	}
	if err != nil {
		_ = channel.WriteMessage(c, task.ReplyOf(err)) // the guest may be gone
		v.m.log.Debug("a guest's stream was refused", "sandbox", v.name(), "err", err)
	}
}

// logTurn is how long the log of a container's earlier run may take to be
// finished.
const logTurn = 10 * time.Second

// keepLog writes a container's output to its file until the stream ends. An
// error is to be told to the guest: nothing was.
func (v *machine) keepLog(c channel.Conn, id string) error {
	v.mu.Lock()
	l := v.logs[id]
	warming := v.id == ""
	v.mu.Unlock()
	if warming {
		if err := channel.WriteMessage(c, new(taskv1.StreamReply)); err != nil {
			return nil // nobody to tell
		}
		return logs.Receive(c, nil)
	}
	if l == nil {
		return fmt.Errorf("log of container %q: %w", id, errdefs.ErrNotFound)
	}
	select { // one writer at a time
	case l.busy <- struct{}{}:
		defer func() { <-l.busy }()
	case <-time.After(logTurn):
		return fmt.Errorf("log of container %q: is being written: %w", id, errdefs.ErrFailedPrecondition)
	}
	warn := func(err error) { v.m.log.Warn("output was lost", "sandbox", v.name(), "container", id, "err", err) }
	w, err := logs.Open(l.config, warn)
	if err != nil {
		return err
	}
	defer func() {
		if err := w.Close(); err != nil {
			warn(err)
		}
	}()
	if err := channel.WriteMessage(c, new(taskv1.StreamReply)); err != nil {
		return nil // nobody to tell
	}
	if err := logs.Receive(c, w); err != nil && v.alive() {
		warn(err)
	}
	return nil
}

// keptLog is where a container's output goes.
type keptLog struct {
	config logs.Config
	busy   chan struct{}
}

// setLog remembers it; nil forgets.
func (v *machine) setLog(container string, l *taskv1.Log) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if l == nil || l.Driver == logs.None {
		delete(v.logs, container)
		return nil
	}
	if l.Driver != logs.Local && l.Driver != logs.JSONFile || !filepath.IsAbs(l.Path) {
		return fmt.Errorf("log of container %q: driver %q, path %q: %w", container, l.Driver, l.Path, errdefs.ErrInvalidArgument)
	}
	k := &keptLog{busy: make(chan struct{}, 1), config: logs.Config{
		Driver: l.Driver, Path: l.Path, MaxSize: int64(l.MaxSize), MaxFiles: int(l.MaxFiles), Compress: l.Compress, Attrs: l.Attrs,
	}}
	if old := v.logs[container]; old != nil {
		k.busy = old.busy
	}
	v.logs[container] = k
	return nil
}

// openDisk opens what becomes a guest's disk.
func openDisk(path string, readOnly bool) (*os.File, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() && st.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
		err = fmt.Errorf("disk %s: neither a file nor a block device: %w", path, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
