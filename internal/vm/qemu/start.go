package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/vm/qmp"
)

// Config is one QEMU to start. Its files stay the caller's.
type Config struct {
	Hardware
	Binary *Binary
	Jail   Jail

	RAM   *os.File // the guest's memory, Memory bytes: a memfd
	Share bool     // writes go to RAM itself; else they are this machine's own
	Taps  []*os.File

	Kernel, Initrd *os.File
	Append         string // the kernel's command line
	Incoming       bool   // wait for a saved state (Restore)

	System *System // nil: the guest is a kernel of ours

	// Events are QEMU's, from the goroutine that reads: it must not wait for a
	// command.
	Events func(qmp.Event)
}

// Launcher starts processes that die with it: the kernel kills a QEMU when the
// thread that started it ends, so there is one thread that starts them all.
// Create it with NewLauncher.
type Launcher struct {
	self string
	jobs chan func()
	done chan struct{}
	once sync.Once

	mu     sync.Mutex
	live   map[*Process]struct{}
	ramFDs map[string]int // see discard.go, by what a QEMU is like
}

// NewLauncher makes a Launcher. self is the program that calls Jailed when its
// first argument is JailArg.
func NewLauncher(self string) *Launcher {
	l := &Launcher{self: self, jobs: make(chan func()), done: make(chan struct{}), live: map[*Process]struct{}{}, ramFDs: map[string]int{}}
	go func() {
		runtime.LockOSThread() // never unlocked
		for {
			select {
			case f := <-l.jobs:
				f()
			case <-l.done:
				return
			}
		}
	}()
	return l
}

// Close kills what was started and still runs. It does not wait.
func (l *Launcher) Close() {
	l.once.Do(func() { close(l.done) })
	// The thread's end kills them too, unless it is the program's first, which
	// the runtime keeps.
	l.mu.Lock()
	defer l.mu.Unlock()
	for p := range l.live {
		p.Kill()
	}
}

func (l *Launcher) do(f func() error) error {
	res := make(chan error, 1)
	select {
	case l.jobs <- func() { res <- f() }:
		return <-res
	case <-l.done:
		return errors.New("qemu: the launcher is closed")
	}
}

// Run starts any command so that it dies with this process, if it does not take
// its own measures against that.
func (l *Launcher) Run(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return l.do(cmd.Start)
}

// Process is a running QEMU.
type Process struct {
	QMP     *qmp.Client
	Port    *net.UnixConn // the guest's virtio port
	Console *net.UnixConn // the guest's serial console

	cmd    *exec.Cmd
	errors *tail
	done   chan struct{}
	exit   Exit

	mu     sync.Mutex
	sets   map[string]int // descriptor sets of block nodes
	buses  []bus
	places map[string]int // buses of plugged devices

	inheritedRAM int // the number of the descriptor that it got
}

// Exit is how a QEMU ended.
type Exit struct {
	Code   int // -1 if a signal ended it
	Signal syscall.Signal
	Text   string // the last that it wrote to its stderr
}

func (e Exit) String() string {
	s := fmt.Sprintf("exit code %d", e.Code)
	if e.Code < 0 {
		s = "killed by signal " + unix.SignalName(e.Signal)
	}
	if e.Text != "" {
		s += ": " + e.Text
	}
	return s
}

// start is Start as it comes.
func (l *Launcher) start(ctx context.Context, c Config) (_ *Process, err error) {
	p := &Process{errors: &tail{}, done: make(chan struct{}), sets: map[string]int{}, buses: c.room(), places: map[string]int{}}
	var theirs []*os.File // what the child inherits, from descriptor 3
	var own []*os.File
	var qmpConn *net.UnixConn
	defer func() {
		for _, f := range own {
			f.Close()
		}
		if err == nil {
			return
		}
		for _, c := range []*net.UnixConn{qmpConn, p.Port, p.Console} {
			if c != nil {
				c.Close()
			}
		}
	}()
	give := func(f *os.File) int {
		if f == nil {
			return 0
		}
		theirs = append(theirs, f)
		return 2 + len(theirs)
	}
	socket := func() (*net.UnixConn, int, error) {
		conn, f, err := Socketpair()
		if err != nil {
			return nil, 0, err
		}
		own = append(own, f)
		return conn, give(f), nil
	}
	var f fds
	if qmpConn, f.qmp, err = socket(); err != nil {
		return nil, err
	}
	if p.Port, f.port, err = socket(); err != nil {
		return nil, err
	}
	if p.Console, f.console, err = socket(); err != nil {
		return nil, err
	}
	f.ram, f.kernel, f.initrd = give(c.RAM), give(c.Kernel), give(c.Initrd)
	p.inheritedRAM = f.ram
	for _, t := range c.Taps {
		f.taps = append(f.taps, give(t))
	}
	args := c.args
	if c.System != nil {
		f.system, args = c.System.give(give), c.systemArgs
	}
	arg, err := c.Jail.encode(c.Binary, c.Accel, f.qmp, append([]string{Program}, args(f)...))
	if err != nil {
		return nil, err
	}
	p.cmd = exec.Command(l.self, JailArg, arg)
	p.cmd.ExtraFiles, p.cmd.Stderr, p.cmd.Env, p.cmd.Dir = theirs, p.errors, []string{}, "/"
	p.cmd.WaitDelay = time.Second
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
		Setsid:     true,
	}
	if err := l.do(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("qemu: start: %w", err)
	}
	l.mu.Lock()
	l.live[p] = struct{}{}
	l.mu.Unlock()
	go func() {
		p.wait()
		l.mu.Lock()
		delete(l.live, p)
		l.mu.Unlock()
	}()
	for _, f := range own {
		f.Close() // so that an end is seen
	}
	own = nil
	if p.QMP, err = qmp.New(ctx, qmpConn, c.Events); err != nil {
		p.Kill()
		<-p.done
		if p.exit.Signal != syscall.SIGKILL {
			err = fmt.Errorf("qemu did not start: %v", p.exit)
		}
		return nil, err
	}
	return p, nil
}

func (p *Process) wait() {
	_ = p.cmd.Wait() // the state says it all
	st := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	p.exit = Exit{Code: st.ExitStatus(), Text: p.errors.String()}
	if st.Signaled() {
		p.exit.Signal = st.Signal()
	}
	close(p.done)
}

// PID is the process's.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit is how it ended. Valid after Done.
func (p *Process) Exit() Exit { return p.exit }

// Kill ends the process at once. It does not wait.
func (p *Process) Kill() { _ = p.cmd.Process.Kill() } // it may have ended

// Close kills the process, waits for its end and closes its connections.
func (p *Process) Close() {
	p.Kill()
	<-p.done
	if p.QMP != nil {
		p.QMP.Close()
	}
	p.Port.Close()
	p.Console.Close()
}

// Socketpair makes a connection and the descriptor of its other end, which
// blocks.
func Socketpair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	a, b := os.NewFile(uintptr(fds[0]), "socketpair"), os.NewFile(uintptr(fds[1]), "socketpair")
	defer a.Close()
	c, err := net.FileConn(a)
	if err != nil {
		b.Close()
		return nil, nil, err
	}
	return c.(*net.UnixConn), b, nil
}

// tail keeps the end of what is written to it.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const tailSize = 4 << 10

var _ io.Writer = (*tail)(nil)

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, b...)
	if len(t.b) > 2*tailSize {
		t.b = append([]byte(nil), t.b[len(t.b)-tailSize:]...)
	}
	return len(b), nil
}

// String is the last lines, as one.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := bytes.TrimSpace(t.b)
	if len(b) > tailSize {
		b = b[len(b)-tailSize:]
	}
	return strings.ToValidUTF8(strings.Join(strings.Split(string(b), "\n"), "; "), "?")
}
