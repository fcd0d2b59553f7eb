package qemu

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// CanDropCode tells whether DropCode is there on this architecture.
const CanDropCode = true

// giveUp has a process give up the pages of parts of its private memory, which are
// zero when they are next touched. A thread of it that waits in a system call is
// stopped, makes the calls for it, and goes on waiting (ptrace(2)).
func giveUp(pid int, areas []area) error {
	res := make(chan error, 1)
	go func() {
		// Never unlocked: when this thread ends, what it traces is let go, also what
		// did not stop. (The program's first thread does not end.)
		runtime.LockOSThread()
		res <- giveUpIn(pid, areas)
	}()
	return <-res
}

func giveUpIn(pid int, areas []area) error {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return err
	}
	var threads []int
	for _, e := range list {
		// Not the first thread: whoever waits for the process's end would see that it
		// stops.
		if tid, err := strconv.Atoi(e.Name()); err == nil && tid != pid {
			threads = append(threads, tid)
		}
	}
	slices.Sort(threads) // the oldest waits for work, and gets no signals
	err = errRuns
	for _, tid := range threads {
		if err = giveUpBy(pid, tid, areas); !errors.Is(err, errRuns) {
			break
		}
	}
	return err
}

// errRuns: a thread is not in a system call. errNotIts: it is another process's.
var (
	errRuns   = errors.New("no thread waits")
	errNotIts = errors.New("it has ended")
)

// processOf is the process that a thread is of.
func processOf(tid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Tgid:"); ok {
			return strconv.Atoi(strings.TrimSpace(v))
		}
	}
	return 0, errors.New("its status tells no process")
}

func giveUpBy(pid, tid int, areas []area) (err error) {
	if err := unix.PtraceSeize(tid); err != nil {
		return os.NewSyscallError("ptrace", err)
	}
	var sig unix.Signal // one that came meanwhile
	defer func() {
		_, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_DETACH, uintptr(tid), 0, uintptr(sig), 0, 0)
		// One that did not stop is let go when this thread ends.
		if e != 0 && (e != unix.ESRCH || err == nil) {
			err = errors.Join(err, os.NewSyscallError("ptrace", e))
		}
	}()
	if err := unix.PtraceInterrupt(tid); err != nil {
		return os.NewSyscallError("ptrace", err)
	}
	st, err := stopped(tid)
	if err != nil {
		return err
	}
	if st>>16 != unix.PTRACE_EVENT_STOP {
		sig = st.StopSignal()
	}
	// Since it is traced, the number can't become another thread's.
	if of, err := processOf(tid); err != nil || of != pid {
		return fmt.Errorf("thread %d is none of process %d, but of %d: %w", tid, pid, of, errors.Join(errNotIts, err))
	}
	if st>>16 != unix.PTRACE_EVENT_STOP {
		return errRuns
	}
	var was unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &was); err != nil {
		return os.NewSyscallError("ptrace", err)
	}
	var code [2]byte
	if _, err := unix.PtracePeekText(tid, uintptr(was.Rip-2), code[:]); err != nil {
		return os.NewSyscallError("ptrace", err)
	}
	if code != [2]byte{0x0f, 0x05} || int64(was.Orig_rax) < 0 { // syscall
		return errRuns
	}
	defer func() { // the call that it waits in is then started again
		if e := unix.PtraceSetRegs(tid, &was); e != nil {
			err = errors.Join(err, os.NewSyscallError("ptrace", e))
		}
	}()
	for _, a := range areas {
		regs := was
		regs.Rip -= 2
		regs.Orig_rax = ^uint64(0) // not yet
		regs.Rax, regs.Rdi, regs.Rsi, regs.Rdx = unix.SYS_MADVISE, a.start, a.end-a.start, unix.MADV_DONTNEED
		if err := unix.PtraceSetRegs(tid, &regs); err != nil {
			return os.NewSyscallError("ptrace", err)
		}
		if err := unix.PtraceSingleStep(tid); err != nil {
			return os.NewSyscallError("ptrace", err)
		}
		if st, err = stopped(tid); err != nil {
			return err
		}
		if s := st.StopSignal(); s != unix.SIGTRAP {
			sig = s
			return fmt.Errorf("a signal came: %v", s)
		}
		if err := unix.PtraceGetRegs(tid, &regs); err != nil {
			return os.NewSyscallError("ptrace", err)
		}
		if regs.Rip != was.Rip {
			return errors.New("its thread went astray")
		}
		if n := int64(regs.Rax); n != 0 {
			return os.NewSyscallError("madvise", unix.Errno(-n))
		}
	}
	return nil
}

// haltTime bounds the wait for a thread that is to stop.
const haltTime = 10 * time.Second

func stopped(tid int) (unix.WaitStatus, error) {
	for end := time.Now().Add(haltTime); ; time.Sleep(50 * time.Microsecond) {
		var st unix.WaitStatus
		n, err := unix.Wait4(tid, &st, unix.WALL|unix.WNOHANG, nil)
		switch {
		case err != nil && err != unix.EINTR:
			return 0, os.NewSyscallError("wait4", err)
		case n == tid && st.Stopped():
			return st, nil
		case n == tid:
			return 0, errors.New("it has ended")
		case time.Now().After(end):
			return 0, errors.New("it does not stop")
		}
	}
}
