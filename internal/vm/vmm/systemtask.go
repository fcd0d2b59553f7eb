package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	taskv3 "tenon.dev/tenon/internal/task/api/v3"
	"tenon.dev/tenon/internal/task/replay"
	"tenon.dev/tenon/internal/vm/dhcp"
)

// systemTask is the task that a system is: its life and its console.
type systemTask struct {
	v       *machine
	events  *replay.Ring[taskv1.Event]
	done    chan struct{} // closed when QEMU has ended and the console's output is kept
	ctx     context.Context
	cancel  context.CancelFunc
	server  *ttrpc.Server
	mux     *channel.Listener
	dhcp    []*dhcp.Server
	screen  screen
	closing sync.Once

	mu       sync.Mutex
	id       string // empty: no task was created
	owner    string
	terminal bool
	status   taskv1.Status
	started  time.Time
	exited   time.Time
	code     uint32
	ending   bool // the power button is being pressed
}

// ringOfTask is how many events of a system are kept.
const ringOfTask = 128

func newSystemTask(v *machine) *systemTask {
	t := &systemTask{v: v, done: make(chan struct{}), events: replay.New(ringOfTask, func(e *taskv1.Event, n uint64) {
		e.Sequence = n
		if e.Time == 0 {
			e.Time = time.Now().UnixNano()
		}
	}, func(n uint64) *taskv1.Event {
		return &taskv1.Event{Type: taskv1.Event_GAP, Sequence: n, Time: time.Now().UnixNano()}
	})}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

// listen serves the task on the machine's socket.
func (t *systemTask) listen() error {
	path := filepath.Join(t.v.dir(), socketName)
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return fmt.Errorf("the machine's socket: %w", err)
	}
	if t.server, err = ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(task.ServerInterceptor)); err != nil {
		l.Close()
		return err
	}
	taskv3.RegisterTaskService(t.server, systemService{t})
	taskv1.RegisterKernelService(t.server, systemKernel{t})
	t.mux = channel.Listen(l, t.stream)
	go func() { _ = t.server.Serve(t.ctx, t.mux) }() // until close
	return nil
}

// close frees everything. QEMU has ended.
func (t *systemTask) close() {
	t.closing.Do(func() {
		t.cancel()
		if t.server != nil {
			_ = t.server.Close()
		}
		if t.mux != nil {
			_ = t.mux.Close()
		}
		for _, s := range t.dhcp {
			s.Close()
		}
		t.screen.end()
		t.screen.setLog(nil, false)
	})
}

// follow takes what the console says until the end, and tells of that.
func (t *systemTask) follow() {
	v := t.v
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		b := make([]byte, 32<<10)
		for {
			n, err := v.proc.Console.Read(b)
			t.screen.write(b[:n])
			if err != nil {
				return
			}
		}
	}()
	<-v.proc.Done()
	select {
	case <-copied:
	case <-time.After(consoleEnd):
	}
	t.screen.end()
	why := v.systemReason()
	v.mu.Lock()
	v.why = why
	v.mu.Unlock()
	t.mu.Lock()
	t.exited, t.status = time.Now(), taskv1.Status_STATUS_STOPPED
	if !v.poweroff.Load() || v.panicked.Load() {
		t.code = 128 + uint32(syscall.SIGKILL)
	}
	id, code := t.id, t.code
	t.mu.Unlock()
	close(t.done)
	v.m.log.Info("a machine with its own system has ended", "sandbox", v.id, "reason", why)
	if id != "" {
		ev := &taskv1.Event{Type: taskv1.Event_EXIT, Id: id, ExitStatus: code, Pid: uint32(v.proc.PID())}
		if code != 0 && why != killedByUser {
			ev.Message = "the machine ended: " + why
		}
		t.events.Publish(ev)
	}
}

// snapshot is the task as it is; nil: there is none.
func (t *systemTask) snapshot() *taskv1.Process {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.id == "" {
		return nil
	}
	p := &taskv1.Process{Id: t.id, Status: t.status, Pid: uint32(t.v.proc.PID()), ExitStatus: t.code, Owner: t.owner, Terminal: t.terminal}
	if !t.started.IsZero() {
		p.StartedAt = t.started.UnixNano()
	}
	if !t.exited.IsZero() {
		p.ExitedAt = t.exited.UnixNano()
	}
	return p
}

// task returns an error unless id is the task's, and exec is empty.
func (t *systemTask) task(id, exec string) error {
	if exec != "" {
		return noProcesses("a further process")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.id == "" || t.id != id {
		return fmt.Errorf("task %s: %w", id, errdefs.ErrNotFound)
	}
	return nil
}

// noProcesses refuses what only a shim in the guest could do.
func noProcesses(what string) error {
	return errdefs.ErrNotImplemented.WithMessage(what + " can't be had of a machine with its own operating system: nothing of Tenon runs in it; use its console (attach) or its network")
}

// pressAgain is how often the power button is pressed until the machine has ended: a
// system that still boots does not hear the first time.
const pressAgain = 5 * time.Second

// pressTime is how long it is pressed for one that asks: a system that does not want to
// hear of it is not turned off by it some other day.
const pressTime = 10 * time.Minute

// powerTime bounds a command to QEMU.
const powerTime = 10 * time.Second

const (
	// commandTime bounds one whose failure undoes something: the client's container is
	// locked meanwhile, and QEMU answers nobody while a dead disk holds it.
	commandTime = 30 * time.Second
	// flushTime bounds one that first writes to the disks what waits for that.
	flushTime = 2 * time.Minute
)

// powerButton presses it, now and again.
func (t *systemTask) powerButton(ctx context.Context) error {
	if err := t.v.proc.PowerButton(ctx); err != nil {
		return err
	}
	t.mu.Lock()
	again := !t.ending
	t.ending = true
	t.mu.Unlock()
	if again {
		go func() {
			tick, over := time.NewTicker(pressAgain), time.After(pressTime)
			defer tick.Stop()
			for {
				select {
				case <-t.done:
					return
				case <-t.ctx.Done():
					return
				case <-over:
					t.mu.Lock()
					t.ending = false
					t.mu.Unlock()
					return
				case <-tick.C:
					ctx, cancel := context.WithTimeout(t.ctx, powerTime)
					_ = t.v.proc.PowerButton(ctx) // the next time, or it has ended
					cancel()
				}
			}
		}()
	}
	return nil
}

// killedByUser is the reason of an end that somebody has asked for.
const killedByUser = "it was killed"

// kill is a signal to a machine.
func (t *systemTask) kill(ctx context.Context, sig syscall.Signal) error {
	if isClosed(t.done) {
		return fmt.Errorf("task: it has ended: %w", errdefs.ErrNotFound)
	}
	const rtminHalt, rtminPoweroff = 37, 38 // what stops systemd in a container
	switch sig {
	case syscall.SIGKILL:
		t.v.kill(killedByUser)
		return nil
	case syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGPWR, rtminHalt, rtminPoweroff:
		ctx, cancel := context.WithTimeout(ctx, powerTime)
		defer cancel()
		return t.powerButton(ctx)
	}
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("a machine with its own operating system knows its power button (TERM, INT, QUIT, PWR, RTMIN+3, RTMIN+4) and its end (KILL), not signal %d", sig))
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// await waits for the end.
func (t *systemTask) await(ctx context.Context, id, exec string) (*taskv1.Process, error) {
	if err := t.task(id, exec); err != nil {
		return nil, err
	}
	select {
	case <-t.done:
		return t.snapshot(), nil
	case <-t.ctx.Done():
		return nil, fmt.Errorf("the machine was removed: %w", errdefs.ErrUnavailable)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// enter writes what somebody types to the console, which takes nothing while the
// guest does not read its serial line: then it waits as long as the one who types is
// there. False if nothing more can be written.
func (t *systemTask) enter(b []byte, c net.Conn, viewer *viewer) bool {
	console := t.v.proc.Console
	for {
		_ = console.SetWriteDeadline(time.Now().Add(hangUpTurn)) // others who write mean the same
		n, err := console.Write(b)
		if b = b[n:]; len(b) == 0 {
			return true
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
		u, ok := c.(*net.UnixConn)
		if isClosed(viewer.over) || isClosed(t.done) || ok && hungUp(u) {
			return false
		}
	}
}

// stream serves a connection that is no call: the console's.
func (t *systemTask) stream(_ context.Context, c channel.Conn, h *taskv1.StreamHeader) {
	var err error
	a := h.GetAttach()
	switch {
	case h.GetExecute() != nil:
		err = noProcesses("exec")
	case h.GetFiles() != nil:
		err = noProcesses("its files (cp, diff, export, commit)")
	case a == nil:
		err = fmt.Errorf("stream of an unknown kind: %w", errdefs.ErrNotImplemented)
	default:
		err = t.task(a.Id, a.ExecId)
	}
	if err != nil {
		_ = channel.WriteMessage(c, task.ReplyOf(err)) // the client may be gone
		c.Close()
		return
	}
	if err := channel.WriteMessage(c, new(taskv1.StreamReply)); err != nil {
		c.Close()
		return
	}
	viewer := t.screen.attach(c, a.Stdout)
	stop := context.AfterFunc(t.ctx, func() { c.Close() })
	defer stop()
	b := make([]byte, 4096)
	for {
		n, err := c.Read(b)
		if n > 0 && a.Stdin && !t.enter(b[:n], c, viewer) {
			a.Stdin = false // it has ended: discard
		}
		if err != nil {
			break
		}
	}
	// It has said that it writes no more. Whether it still reads nobody says.
	if u, ok := c.(*net.UnixConn); ok {
		turn := time.NewTicker(hangUpTurn)
		defer turn.Stop()
		for !isClosed(viewer.over) && !isClosed(t.done) && !hungUp(u) {
			select {
			case <-viewer.over:
			case <-t.done:
			case <-turn.C:
			}
		}
		if isClosed(t.done) { // what is left is being sent
			viewer.settle()
		}
	}
	t.screen.detach(viewer)
}
