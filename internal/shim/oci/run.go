package oci

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch/fork"
)

// deleteTimeout is how long the end of dying processes is waited for.
const deleteTimeout = 10 * time.Second

func runRun(a *app, f *flagSet) (int, error) {
	id, err := f.id()
	if err != nil {
		return 1, err
	}
	if err := fork.Protect(); err != nil {
		return 1, err
	}
	a.waits = !launching.detach
	m := &making{app: a, opts: launching}
	if m.container, err = a.create(id); err != nil {
		return 1, err
	}
	defer m.close()
	var signals *relay
	if a.waits {
		signals = catchSignals()
	}
	if err := m.make(false); err != nil {
		return 1, err
	}
	signals.ready()
	if err := m.begin(); err != nil {
		m.undo()
		return 1, err
	}
	if launching.detach {
		return 0, m.proc.Close()
	}
	m.close() // others may kill, pause, exec …
	exit, err := attend(m.proc, signals, m.opts.consoleSocket == "")
	if err != nil || m.opts.keep {
		return exit.Code, err
	}
	if err := m.acquire(); errors.Is(err, errNotExist) {
		return exit.Code, nil // deleted by somebody else
	} else if err != nil {
		return exit.Code, err
	}
	return exit.Code, m.remove(a, m.spec)
}

// begin lifts the barrier of a container that this command made.
func (m *making) begin() error {
	hooks := m.spec.Hooks
	if hooks != nil && len(hooks.StartContainer) > 0 {
		if err := m.hooksInside(hooks.StartContainer, statusCreated); err != nil {
			return err
		}
	}
	if err := m.proc.Exec(); err != nil {
		return explain(err, m.spec.Process)
	}
	m.Started = true
	if err := m.save(); err != nil {
		return err
	}
	if hooks != nil {
		m.hooksOutside(m.app, hooks.Poststart, statusRunning)
	}
	return nil
}

// forwarded are the signals that go on to a process in the foreground.
var forwarded = []os.Signal{
	unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGCONT,
}

// relay holds the signals that are to go on to a process.
type relay struct {
	caught chan os.Signal
	armed  chan struct{} // closed when all are subscribed to
}

// catchSignals begins to collect signals. Each costs 50 µs to subscribe to (the
// runtime of Go hands it to a thread and waits), so it is done beside the
// making of the process.
func catchSignals() *relay {
	r := &relay{caught: make(chan os.Signal, 64), armed: make(chan struct{})}
	go func() {
		signal.Notify(r.caught, forwarded...)
		close(r.armed)
	}()
	return r
}

// ready returns when no signal can end this program any more. It is called
// before the barrier is lifted: who has seen the process run may send one, and
// if that ended this program alone, the container would be left to nobody. What
// came earlier waits and is forwarded too. A nil relay collects nothing.
func (r *relay) ready() {
	if r != nil {
		<-r.armed
	}
}

// attend waits for a process in the foreground: its terminal is ours, signals
// go to it. The program ends after it: signals stay subscribed.
func attend(proc *fork.Process, signals *relay, ownConsole bool) (fork.Exit, error) {
	debug.SetGCPercent(100) // from here on it may take long
	go func() {
		for s := range signals.caught {
			_ = proc.Signal(s.(syscall.Signal)) // it may be gone already
		}
	}()
	if ownConsole && proc.Console != nil {
		p := startProxy(proc.Console)
		defer p.restore()
	}
	exit, err := proc.Wait()
	_ = proc.Close() // the pidfd is not needed any more
	return exit, err
}

func runDelete(a *app, f *flagSet) (int, error) {
	id, err := f.id()
	if err != nil {
		return 1, err
	}
	c, err := a.openLocked(id)
	if err != nil {
		if forceDelete && errors.Is(err, errNotExist) {
			return 0, nil
		}
		return 1, err
	}
	defer c.close()
	if s := c.status(); s != statusStopped {
		if !forceDelete && s != statusCreated {
			return 1, &stateError{"delete", c.ID, "that is not stopped", s}
		}
		if err := c.destroy(); err != nil {
			return 1, err
		}
	}
	s, err := c.spec()
	if err != nil && !os.IsNotExist(err) {
		return 1, err
	}
	return 0, c.remove(a, s)
}

var forceDelete bool

func deleteFlags(f *flagSet) {
	f.boolean(&forceDelete, "force", "f", "end the container first; no error if there is none")
}

// destroy kills the container's processes and waits for the first one's end.
func (c *container) destroy() error {
	fd, err := c.pidfd()
	if errors.Is(err, errNotRunning) {
		return nil
	} else if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	if g, err := c.group(); err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
		defer cancel()
		_ = g.Thaw(ctx) // a frozen process of cgroup v1 does not die
	}
	return waitPidfd(fd, deleteTimeout)
}

// waitPidfd waits until the process is dead (it may be a zombie of its parent's).
func waitPidfd(fd int, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return errors.New("container does not end after SIGKILL")
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
		if n > 0 {
			return nil
		}
	}
}

// remove removes what is left of a stopped container: its cgroup with what may
// still live in it, its directory; then poststop hooks run.
func (c *container) remove(a *app, s *specs.Spec) error {
	if g, err := c.group(); err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
		defer cancel()
		// Without a pid namespace of its own, processes outlive the first one;
		// after an interrupted create, the first one may wait for its start.
		if s == nil || c.Pid == 0 || !hasNamespace(s, specs.PIDNamespace) {
			if err := g.Kill(unix.SIGKILL); err != nil {
				return err
			}
		}
		if err := g.Delete(ctx); err != nil {
			return fmt.Errorf("%s: %w", c.ID, err)
		}
	}
	if err := os.RemoveAll(c.dir); err != nil {
		return err
	}
	if s != nil {
		c.runPoststop(a, s)
	}
	return nil
}

func hasNamespace(s *specs.Spec, kind specs.LinuxNamespaceType) bool {
	return s.Linux != nil && slices.ContainsFunc(s.Linux.Namespaces,
		func(n specs.LinuxNamespace) bool { return n.Type == kind && n.Path == "" })
}

// stateError is a command that does not fit the container's state.
type stateError struct {
	verb, id, why string
	status        specs.ContainerState
}

func (e *stateError) Error() string {
	return fmt.Sprintf("cannot %s container %s %s: %s", e.verb, e.id, e.why, e.status)
}
