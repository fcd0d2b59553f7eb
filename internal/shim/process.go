package shim

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"tenon.dev/tenon/internal/launch/fork"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

var errNoTerminal = fmt.Errorf("the process has no terminal: %w", errdefs.ErrFailedPrecondition)

// child is a prepared or running process, made by the plan or by an external
// runtime.
type child interface {
	pid() int
	pidfd() rawFile
	// exec runs the program; on an error the child is gone.
	exec() error
	// wait returns the exit code, 128 + signal for a killed one.
	wait() (int, error)
	signal(sig syscall.Signal) error
	close()
}

// process is an init or an exec.
type process struct {
	c        *container
	execID   string // empty: init
	terminal bool
	once     bool // stdin ends with the first attached stream that has it
	io       *stdio
	prepare  func() (child, error) // makes an exec's child at its start

	// done is closed when the process has exited, its output is kept, and the
	// exit is published.
	done chan struct{}

	mu        sync.Mutex // held while starting
	child     child
	status    taskv1.Status
	startedAt time.Time
	exitedAt  time.Time
	code      uint32
	failed    bool // never ran: exec failed
	oom       bool
	width     uint32 // of an exec's terminal, until it is made
	height    uint32
}

func newProcess(c *container, execID string) *process {
	return &process{c: c, execID: execID, status: taskv1.Status_STATUS_CREATED, done: make(chan struct{})}
}

// name is how errors call the process.
func (p *process) name() string {
	if p.execID == "" {
		return "task " + p.c.id
	}
	return "exec " + p.execID + " of task " + p.c.id
}

// watch has exited called after the child's end.
func (p *process) watch() error {
	_, err := p.c.shim.poll.once(p.child.pidfd(), unix.EPOLLIN, p.exited)
	return err
}

// start runs the program.
func (p *process) start() (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status != taskv1.Status_STATUS_CREATED {
		return 0, fmt.Errorf("%s: cannot start a process that is %s: %w", p.name(), stateName(p.status), errdefs.ErrFailedPrecondition)
	}
	if p.prepare != nil {
		if err := p.prepareLocked(); err != nil {
			p.failLocked(err)
			return 0, err
		}
	}
	if p.execID == "" {
		if err := p.c.startContainer(); err != nil {
			p.failLocked(err)
			_ = p.child.signal(syscall.SIGKILL) // its end is seen as any other's
			return 0, err
		}
	}
	at := time.Now() // before the program runs: it may end before this goroutine goes on
	if err := p.child.exec(); err != nil {
		err = execError(p.name(), err)
		p.failLocked(err)
		return 0, err
	}
	p.startedAt = at
	p.status = taskv1.Status_STATUS_RUNNING
	pid := p.child.pid()
	p.c.shim.events.Publish(&taskv1.Event{Type: taskv1.Event_START, Id: p.c.id, ExecId: p.execID, Pid: uint32(pid), Time: p.startedAt.UnixNano()})
	return pid, nil
}

// prepareLocked makes an exec's child.
func (p *process) prepareLocked() error {
	child, err := p.prepare()
	p.prepare = nil
	if err != nil {
		return execError(p.name(), err)
	}
	p.child = child
	p.io.run()
	if err := p.watch(); err != nil {
		_ = child.signal(syscall.SIGKILL) // it is at the barrier
		_, _ = child.wait()
		child.close()
		p.child = nil
		return fmt.Errorf("%s: %w", p.name(), err)
	}
	return nil
}

// failLocked ends a process that never ran.
func (p *process) failLocked(err error) {
	p.failed = true
	p.code = 127
	if errdefs.IsPermissionDenied(err) {
		p.code = 126
	}
	if p.child == nil {
		p.status = taskv1.Status_STATUS_STOPPED
		p.exitedAt = time.Now()
		p.io.close()
		close(p.done)
	}
	// Else the child's end is seen as any other's.
}

// execError gives a program that cannot be executed its class, which tells the
// engine the exit code (127 not found, 126 else).
func execError(name string, err error) error {
	var step *fork.StepError
	if task.ErrorCode(err) != codes.Unknown || !errors.As(err, &step) || !strings.HasPrefix(step.Step, "exec") {
		return fmt.Errorf("%s: %w", name, err)
	}
	var class error = errdefs.ErrInvalidArgument
	switch {
	case errors.Is(err, fs.ErrNotExist):
		class = errdefs.ErrNotFound
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOEXEC), errors.Is(err, syscall.EISDIR):
		class = errdefs.ErrPermissionDenied
	}
	return fmt.Errorf("%s: %w: %w", name, err, class)
}

// exited runs once, in a goroutine of its own, when the child has ended.
func (p *process) exited() {
	code, err := p.child.wait()
	at := time.Now()
	if err != nil {
		p.c.shim.log.Error("exit status is lost", "container", p.c.id, "exec", p.execID, "err", err)
		code = 255
	}
	if p.execID == "" {
		p.c.initExited()
	}
	p.io.drain()
	oom := p.execID == "" && p.c.oomKilled()
	if p.execID == "" {
		if err := p.c.log.Close(); err != nil {
			p.c.shim.log.Warn("log not closed", "container", p.c.id, "err", err)
		}
	}
	p.io.close()
	p.mu.Lock() // a start that still runs comes first
	p.status = taskv1.Status_STATUS_STOPPED
	p.exitedAt = at
	p.oom = oom
	if !p.failed {
		p.code = uint32(code)
		p.c.shim.events.Publish(&taskv1.Event{
			Type: taskv1.Event_EXIT, Id: p.c.id, ExecId: p.execID, Pid: uint32(p.child.pid()),
			ExitStatus: p.code, OomKilled: oom, Time: at.UnixNano(),
		})
	}
	p.child.close()
	p.mu.Unlock()
	close(p.done)
}

// stdinEnded is called at the end of an attached stream that had stdin.
func (p *process) stdinEnded() {
	if p.once {
		p.io.closeStdin()
	}
}

// kill sends a signal.
func (p *process) kill(sig syscall.Signal) error {
	p.mu.Lock()
	child, status := p.child, p.status
	p.mu.Unlock()
	if status == taskv1.Status_STATUS_STOPPED {
		return fmt.Errorf("%s: has exited: %w", p.name(), errdefs.ErrNotFound)
	}
	if child == nil {
		return fmt.Errorf("%s: is not started: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	if err := child.signal(sig); err != nil {
		if errors.Is(err, syscall.ESRCH) || errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("%s: has exited: %w", p.name(), errdefs.ErrNotFound)
		}
		return fmt.Errorf("%s: signal %d: %w", p.name(), sig, err)
	}
	return nil
}

// snapshot is the process as List and Await tell it.
func (p *process) snapshot() *taskv1.Process {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := &taskv1.Process{
		Id: p.c.id, ExecId: p.execID, Status: p.status, ExitStatus: p.code,
		StartedAt: nano(p.startedAt), ExitedAt: nano(p.exitedAt),
		OomKilled: p.oom, Owner: p.c.owner, Terminal: p.terminal,
	}
	if p.child != nil {
		r.Pid = uint32(p.child.pid())
	}
	if r.Status == taskv1.Status_STATUS_RUNNING && p.c.isPaused() {
		r.Status = taskv1.Status_STATUS_PAUSED
	}
	return r
}

func nano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func stateName(s taskv1.Status) string {
	switch s {
	case taskv1.Status_STATUS_CREATED:
		return "created"
	case taskv1.Status_STATUS_RUNNING:
		return "running"
	case taskv1.Status_STATUS_PAUSED:
		return "paused"
	case taskv1.Status_STATUS_STOPPED:
		return "stopped"
	}
	return "unknown"
}

// planned is a child made by package fork.
type planned struct{ p *fork.Process }

func (c planned) pid() int                        { return c.p.Pid }
func (c planned) pidfd() rawFile                  { return c.p.PidFD }
func (c planned) exec() error                     { return c.p.Exec() }
func (c planned) signal(sig syscall.Signal) error { return c.p.Signal(sig) }
func (c planned) close()                          { _ = c.p.Close() }
func (c planned) wait() (int, error) {
	e, err := c.p.Wait()
	return e.Code, err
}
