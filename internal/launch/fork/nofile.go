package fork

import (
	"os"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch"
)

// inheritedNofile is the limit of open files that a program started by us is to
// have, if its plan sets none: Go raises its own soft limit to the hard limit
// less one when it starts and keeps the old one to itself, for what the standard
// library starts. nil if ours was not raised.
func inheritedNofile(plan *launch.Plan) *syscall.Rlimit {
	if plan.Nofile {
		return nil
	}
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil || lim.Cur != lim.Max-1 {
		return nil
	}
	return oldNofile()
}

// oldNofile asks the standard library in the one way there is: it starts a
// process, this very program, stopped before its first instruction, looks at
// the limit that it was given, and kills it.
var oldNofile = sync.OnceValue(func() *syscall.Rlimit {
	runtime.LockOSThread() // the tracer is a thread
	defer runtime.UnlockOSThread()
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"nofile"}, &syscall.ProcAttr{
		Env: []string{}, Sys: &syscall.SysProcAttr{Ptrace: true},
	})
	if err != nil {
		return nil // nothing may be traced here: the limit stays
	}
	var lim unix.Rlimit
	var ws syscall.WaitStatus
	_, err = syscall.Wait4(pid, &ws, syscall.WALL, nil)
	if err == nil && ws.Stopped() {
		err = unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &lim)
	} else {
		err = os.ErrProcessDone
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)            // ours and not waited for: the number is right
	_, _ = syscall.Wait4(pid, &ws, syscall.WALL, nil) // nothing to learn
	if err != nil || lim.Max == 0 {
		return nil
	}
	return &syscall.Rlimit{Cur: lim.Cur, Max: lim.Max}
})
