package fork

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/cgroup"
	"tenon.dev/tenon/internal/launch"
	"tenon.dev/tenon/internal/safepath"
)

const (
	sysClone3     = unix.SYS_CLONE3
	sysCloseRange = unix.SYS_CLOSE_RANGE
)

const (
	opBase       = launch.OpBase
	opJump       = launch.OpJump
	opTestMem    = launch.OpTestMem
	opTestSlot   = launch.OpTestSlot
	opPoke       = launch.OpPoke
	opFail       = launch.OpFail
	opPhase      = launch.OpPhase
	opBarrier    = launch.OpBarrier
	opSendFD     = launch.OpSendFD
	opClone      = launch.OpClone
	opReport     = launch.OpReport
	opDefaultSig = launch.OpDefaultSig
	opCloseRest  = launch.OpCloseRest
	opLoad       = launch.OpLoad
)

// process is the part of a Process that is not exported.
type process struct {
	plan *launch.Plan
	sock int // our end, -1 when closed
	// block is what the child lives in until it executes the program.
	block *block
	mu    sync.Mutex
	// below mu
	lifted   bool
	copy     [3]*os.File // what a copy-up is from and to, and the root
	waitOnce sync.Once
	exit     Exit
	exitErr  error
	done     chan struct{}
}

func start(plan *launch.Plan, stdio Stdio) (_ *Process, err error) {
	if len(stdio.Extra) != plan.Preserve {
		return nil, fmt.Errorf("fork: %d extra descriptors, the plan has %d", len(stdio.Extra), plan.Preserve)
	}
	if plan.Gate && (stdio.Gate == nil || stdio.GateStatus == nil) {
		return nil, errors.New("fork: the plan has a gate, the start has none")
	}
	a, err := assemble(plan, stdio)
	if err != nil {
		return nil, err
	}
	defer a.close()
	// In the block, as the kernel is given addresses: Go's stack may move meanwhile.
	h := a.head()
	args, pidfd := &h.args, &h.pidfd
	*args, *pidfd = cloneArgs{}, -1
	args.flags = plan.Clone | unix.CLONE_PIDFD | unix.CLONE_CLEAR_SIGHAND
	args.exitSignal = uint64(unix.SIGCHLD)
	args.pidfd = uint64(uintptr(unsafe.Pointer(pidfd)))
	a.firstStack(args)
	if plan.CgroupDir != "" {
		fd, err := openCgroup(plan.CgroupDir)
		if err != nil {
			return nil, err
		}
		defer unix.Close(fd)
		args.flags |= unix.CLONE_INTO_CGROUP
		args.cgroup = uint64(fd)
	}
	keepHeap()
	pid, errno := cloneIn(plan, a.m, args)
	if (errno == unix.EBUSY || errno == unix.EOPNOTSUPP) && plan.CgroupDir != "" && plan.Target > 0 {
		// The container has made groups of its own below and moved into one:
		// its own group takes no process any more. Go where it is.
		dir, err := targetCgroup(plan.Target)
		if err != nil {
			return nil, err
		}
		fd, err := openCgroup(dir)
		if err != nil {
			return nil, err
		}
		defer unix.Close(fd)
		args.cgroup = uint64(fd)
		pid, errno = cloneIn(plan, a.m, args)
	}
	if errno != 0 {
		return nil, &StepError{Step: "clone", Errno: errno}
	}
	p := &Process{Pid: pid, PidFD: newPidfd(int(*pidfd), pid)}
	p.plan = plan
	p.Warnings = a.warnings
	p.sock = a.takeSock()
	p.block, a.block = a.block, nil
	p.done = make(chan struct{})
	a.closeChild()
	if err := p.follow(stdio); err != nil {
		return nil, err
	}
	return p, nil
}

func openCgroup(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open cgroup", Path: dir, Err: err}
	}
	return fd, nil
}

// targetCgroup is the v2 group of the process.
func targetCgroup(pidfd int) (string, error) {
	pid, err := pidfdPid(pidfd)
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", fmt.Errorf("cgroup of %d: %w", pid, err)
	}
	for line := range strings.Lines(string(b)) {
		if p, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			for _, h := range cgroup.Hierarchies() {
				if h.V2 {
					return filepath.Join(h.Path, p), nil
				}
			}
		}
	}
	return "", fmt.Errorf("cgroup of %d: none on v2", pid)
}

// newPidfd makes the pidfd pollable.
func newPidfd(fd, pid int) *os.File {
	_ = unix.SetNonblock(fd, true) // a pidfd of 5.10 and later takes it; else waiting blocks a thread
	return os.NewFile(uintptr(fd), fmt.Sprintf("pidfd:%d", pid))
}

// cloneIn clones, from a thread that has joined the pid namespace that the plan
// names.
func cloneIn(plan *launch.Plan, m *machine, args *cloneArgs) (int, syscall.Errno) {
	runtime.LockOSThread()
	if plan.JoinPid == "" && !plan.JoinPidNS {
		pid, errno := fork(m, args)
		runtime.UnlockOSThread()
		return int(pid), errno
	}
	own, err := unix.Open("/proc/self/ns/pid", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return 0, err.(syscall.Errno)
	}
	defer unix.Close(own)
	fd := plan.Target
	if plan.JoinPid != "" {
		if fd, err = unix.Open(plan.JoinPid, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			runtime.UnlockOSThread()
			return 0, err.(syscall.Errno)
		}
		defer unix.Close(fd)
	}
	if err := unix.Setns(fd, unix.CLONE_NEWPID); err != nil {
		runtime.UnlockOSThread()
		return 0, err.(syscall.Errno)
	}
	pid, errno := fork(m, args)
	if err := unix.Setns(own, unix.CLONE_NEWPID); err == nil {
		runtime.UnlockOSThread() // else the thread dies with this goroutine
	}
	return int(pid), errno
}

// follow reads the child's messages until it stands at the barrier.
func (p *Process) follow(stdio Stdio) (err error) {
	defer func() {
		if err != nil {
			p.abort()
		}
	}()
	var m message
	for {
		fd, ok, err := p.receive(&m)
		if err != nil {
			return err
		}
		if !ok {
			ex, werr := p.Wait()
			if werr != nil {
				return werr
			}
			return fmt.Errorf("the child ended before the barrier: %s", ex)
		}
		switch m.kind {
		case msgError:
			return p.stepError(m)
		case msgWarn:
			p.Warnings = append(p.Warnings, p.stepError(m).Error())
		case msgFD:
			if err := p.take(int(m.value), fd); err != nil {
				return err
			}
		case msgReport:
			if err := p.report(m.value); err != nil {
				return err
			}
		case msgPid:
			if err := p.second(int(m.value)); err != nil {
				return err
			}
			if err := p.let(); err != nil {
				return err
			}
		case msgPhase:
			if err := p.phase(launch.Phase(m.value), stdio); err != nil {
				return err
			}
			if err := p.let(); err != nil {
				return err
			}
		case msgBarrier:
			return nil
		}
	}
}

// take keeps a descriptor that the child sent.
func (p *Process) take(kind, fd int) error {
	if fd < 0 {
		return errors.New("fork: a descriptor is missing")
	}
	switch kind {
	case launch.FDConsole:
		if p.Console != nil {
			p.Console.Close()
		}
		p.Console = console(fd)
	case launch.FDCopyFrom, launch.FDCopyTo, launch.FDRoot:
		i := kind - launch.FDCopyFrom
		if p.copy[i] != nil {
			p.copy[i].Close()
		}
		p.copy[i] = os.NewFile(uintptr(fd), "copy")
	default:
		unix.Close(fd)
	}
	return nil
}

// report takes a reported value: the number of the seccomp listener, which
// cannot be sent, since the filter may ask the agent about sendmsg already.
func (p *Process) report(value uint64) error {
	if value>>32 != launch.ReportListener {
		return nil
	}
	var fd int
	var gerr error
	rc, err := p.PidFD.SyscallConn()
	if err == nil {
		err = rc.Control(func(pidfd uintptr) { fd, gerr = unix.PidfdGetfd(int(pidfd), int(uint32(value)), 0) })
	}
	if err = errors.Join(err, gerr); err != nil {
		return fmt.Errorf("seccomp listener: %w", err)
	}
	p.SeccompListener = os.NewFile(uintptr(fd), "seccomp")
	return nil
}

// copyUp copies a directory for the child.
func (p *Process) copyUp() error {
	from, to := p.copy[0], p.copy[1]
	p.copy[0], p.copy[1] = nil, nil
	if from == nil || to == nil {
		return errors.New("fork: nothing to copy")
	}
	defer from.Close()
	defer to.Close()
	owner := p.plan.MapRoot
	if err := safepath.AsOwner(owner[0], owner[1], func() error { return safepath.CopyTree(from, to) }); err != nil {
		return fmt.Errorf("copy what was below a tmpfs: %w", err)
	}
	return nil
}

// makeTarget makes a mount point below the container's root.
func (p *Process) makeTarget(name string, dir bool) error {
	root := p.copy[2]
	p.copy[2] = nil
	if root == nil {
		return errors.New("fork: no root to make a mount point in")
	}
	defer root.Close()
	owner := p.plan.MapRoot
	if err := safepath.AsOwner(owner[0], owner[1], func() error { return safepath.MakeTarget(root, name, dir, owner[0], owner[1]) }); err != nil {
		return fmt.Errorf("make the mount point %s: %w", name, err)
	}
	return nil
}

// console makes a pty's master a pollable file.
func console(fd int) *os.File {
	_ = unix.SetNonblock(fd, true) // cannot fail for a descriptor just received
	return os.NewFile(uintptr(fd), "/dev/ptmx")
}

func (p *Process) stepError(m message) *StepError {
	name := "start"
	if int(m.step) < len(p.plan.Steps) {
		name = p.plan.Steps[m.step].Name
	}
	return &StepError{Step: name, Errno: syscall.Errno(m.value)}
}

// receive reads one message, with the descriptor that came with it.
func (p *Process) receive(m *message) (fd int, ok bool, err error) {
	var buf [16]byte
	var oob [32]byte
	for {
		n, on, _, _, err := unix.Recvmsg(p.sock, buf[:], oob[:], unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err == unix.ECONNRESET {
			n, err = 0, nil
		}
		if err != nil {
			return -1, false, os.NewSyscallError("recvmsg", err)
		}
		if n == 0 {
			return -1, false, nil
		}
		if n != len(buf) {
			return -1, false, fmt.Errorf("fork: message of %d bytes", n)
		}
		m.kind = binary.NativeEndian.Uint32(buf[0:])
		m.step = binary.NativeEndian.Uint32(buf[4:])
		m.value = binary.NativeEndian.Uint64(buf[8:])
		fd = -1
		if on > 0 {
			msgs, err := unix.ParseSocketControlMessage(oob[:on])
			if err != nil || len(msgs) != 1 {
				return -1, false, errors.New("fork: control message")
			}
			fds, err := unix.ParseUnixRights(&msgs[0])
			if err != nil || len(fds) != 1 {
				return -1, false, errors.New("fork: control message")
			}
			fd = fds[0]
		}
		return fd, true, nil
	}
}

// let lets the child go on.
func (p *Process) let() error {
	_, err := unix.Write(p.sock, []byte{1})
	return os.NewSyscallError("write", err)
}

// second takes over a child of the child, which is ours by CLONE_PARENT; the
// first one ends.
func (p *Process) second(pid int) error {
	first := p.PidFD
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		_ = unix.Kill(pid, unix.SIGKILL) // still ours: not reaped
		return os.NewSyscallError("pidfd_open", err)
	}
	p.Pid, p.PidFD = pid, newPidfd(fd, pid)
	_, err = waitPidfd(first)
	first.Close()
	return err
}

// phase does the parent's part of a phase.
func (p *Process) phase(ph launch.Phase, stdio Stdio) error {
	switch ph & 0xff {
	case launch.PhaseTargetDir, launch.PhaseTargetFile:
		return p.makeTarget(p.plan.Targets[ph>>8], ph&0xff == launch.PhaseTargetDir)
	case launch.PhaseMaps:
		return p.writeMaps()
	case launch.PhaseCopyUp:
		return p.copyUp()
	case launch.PhaseNetDevices:
		return p.moveDevices()
	}
	if stdio.AtPhase == nil {
		return nil
	}
	return stdio.AtPhase(ph, p)
}

// writeMaps writes the child's id maps.
func (p *Process) writeMaps() error {
	m := p.plan.Maps
	write := func(name, data string) error {
		path := fmt.Sprintf("/proc/%d/%s", p.Pid, name)
		if err := os.WriteFile(path, []byte(data), 0); err != nil {
			return fmt.Errorf("id maps: %w", err)
		}
		return nil
	}
	if m.DenySetgroup {
		if err := write("setgroups", "deny"); err != nil {
			return err
		}
	}
	if m.GID != "" {
		if err := write("gid_map", m.GID); err != nil {
			return err
		}
	}
	if m.UID != "" {
		if err := write("uid_map", m.UID); err != nil {
			return err
		}
	}
	return nil
}

// abort kills and reaps the child.
func (p *Process) abort() {
	_ = p.Signal(syscall.SIGKILL) // gone already is as good
	_, _ = p.Wait()               // the caller's error says more
	for _, f := range []*os.File{p.Console, p.SeccompListener, p.copy[0], p.copy[1], p.copy[2]} {
		if f != nil {
			f.Close()
		}
	}
	p.Console, p.SeccompListener = nil, nil
	p.freeBlock(true) // it is dead
	p.Close()
}

func (p *Process) exec() error {
	p.mu.Lock()
	if p.lifted {
		p.mu.Unlock()
		return errors.New("fork: Exec twice")
	}
	p.lifted = true
	p.mu.Unlock()
	if p.plan.Gate {
		return errors.New("fork: the barrier is on a gate")
	}
	if err := p.let(); err != nil {
		return err
	}
	var m message
	for {
		fd, ok, err := p.receive(&m)
		if err != nil {
			return err
		}
		if fd >= 0 {
			unix.Close(fd)
		}
		if !ok {
			p.closeSock()
			p.freeBlock(true) // it executes the program, or has ended
			p.plan = nil      // of no use to a program that runs for days
			return nil
		}
		if m.kind == msgError {
			err := p.stepError(m)
			_, _ = p.Wait() // the step says more
			p.closeSock()
			p.freeBlock(true)
			return err
		}
		if m.kind == msgWarn {
			p.Warnings = append(p.Warnings, p.stepError(m).Error())
		}
	}
}

func (p *Process) closeSock() {
	if p.sock >= 0 {
		unix.Close(p.sock)
		p.sock = -1
	}
}

// freeBlock frees the child's memory; if it has no use of it any more, for the
// next one.
func (p *Process) freeBlock(done bool) {
	p.mu.Lock()
	b := p.block
	p.block = nil
	p.mu.Unlock()
	if b != nil {
		b.release(done)
	}
}

func (p *Process) close() error {
	p.closeSock()
	p.freeBlock(false)
	return p.PidFD.Close()
}
