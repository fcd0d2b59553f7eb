package launch

import (
	"fmt"
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// CompileHook makes the plan of a hook that runs in the namespaces of the
// process pid (with its pidfd), seeing the root that the process sees.
func CompileHook(hook specs.Hook, pid, pidfd int) (*Plan, error) {
	if err := CheckHook(hook); err != nil {
		return nil, err
	}
	c := &compiler{builder: newBuilder()}
	c.p.Target, c.p.JoinFlags, c.p.JoinUser, c.p.JoinPidNS = pidfd, allNamespaces, true, true
	c.root = c.builder.slot()
	c.step("root of the container's process")
	c.call(unix.SYS_OPENAT, fdcwd, c.str(fmt.Sprintf("/proc/%d/root", pid)), num(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC), num(0)).out(c.root)
	c.step("join the container's namespaces")
	c.call(unix.SYS_SETNS, slot(SlotPidfd).arg(), slot(SlotJoinFlags).arg())
	c.call(unix.SYS_FCHDIR, c.root.arg())
	c.call(unix.SYS_CHROOT, c.str("."))
	c.call(unix.SYS_CHDIR, c.str("/"))
	c.call(unix.SYS_SETSID)
	c.step("wait to be started")
	c.call(OpBarrier)
	c.call(unix.SYS_RT_SIGPROCMASK, num(2), mem(words(0)), num(0), num(8))
	args := hook.Args
	if len(args) == 0 {
		args = []string{hook.Path}
	}
	c.step("exec " + hook.Path)
	c.call(unix.SYS_EXECVE, c.str(hook.Path), vec(args), vec(hook.Env))
	return c.finish(), nil
}

// CheckHook refuses a hook that cannot be run.
func CheckHook(h specs.Hook) error {
	if !path.IsAbs(h.Path) {
		return fmt.Errorf("hook: path %q is not absolute", h.Path)
	}
	if h.Timeout != nil && *h.Timeout <= 0 {
		return fmt.Errorf("hook %s: timeout %d is not positive", h.Path, *h.Timeout)
	}
	for _, list := range [][]string{{h.Path}, h.Args, h.Env} {
		for _, s := range list {
			if strings.IndexByte(s, 0) >= 0 {
				return fmt.Errorf("hook: %q has a zero byte", s)
			}
		}
	}
	return nil
}
