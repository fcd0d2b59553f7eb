package launch

import (
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// allNamespaces are those that an exec joins by one setns; the user namespace
// is added at the start where it differs, the pid namespace by the clone.
const allNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS |
	unix.CLONE_NEWCGROUP | unix.CLONE_NEWTIME

// CompileExec makes the plan of a further process in a running container.
func CompileExec(process *specs.Process, opts ExecOptions) (*Plan, error) {
	if opts.Pidfd <= 0 {
		return nil, fmt.Errorf("exec: no process to join")
	}
	if process == nil {
		return nil, fmt.Errorf("exec: process: is missing")
	}
	if err := checkProcess(process, false); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	c := &compiler{builder: newBuilder(), spec: &specs.Spec{Process: process, Linux: &specs.Linux{}}}
	c.p.Preserve, c.p.Gate, c.p.Terminal = opts.Preserve, opts.Gate, process.Terminal
	c.p.Target = opts.Pidfd
	c.p.JoinFlags, c.p.JoinUser, c.p.JoinPidNS = allNamespaces, true, true
	if opts.Namespaces != nil {
		c.p.JoinFlags, c.p.JoinUser, c.p.JoinPidNS = 0, false, false
		for _, n := range opts.Namespaces {
			switch n {
			case specs.PIDNamespace:
				c.p.JoinPidNS = true
			case specs.UserNamespace:
				c.p.JoinUser = true
			default:
				f := namespaceFlag(n)
				if f == 0 {
					return nil, fmt.Errorf("exec: namespace %q is unknown", n)
				}
				c.p.JoinFlags |= f
			}
		}
	}
	c.proc, c.root = c.builder.slot(), c.builder.slot()
	c.hostProc()
	c.oomScoreAdj(process)
	c.joinCgroup(opts.Cgroup)
	c.p.OwnCaps = true // fork knows better if it joins a user namespace
	final, err := c.execAffinity(process)
	if err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	if c.p.JoinFlags != 0 || c.p.JoinUser {
		c.step("join the container's namespaces")
		none := c.label()
		flags := slot(SlotJoinFlags)
		c.call(OpTestSlot, flags.arg(), num(0)).to(none)
		c.call(unix.SYS_SETNS, slot(SlotPidfd).arg(), flags.arg())
		c.mark(none)
	}
	c.step("new session")
	c.call(unix.SYS_SETSID)
	c.keyring()
	c.call(unix.SYS_CLOSE, c.proc.arg())
	if process.Terminal {
		c.step("open /")
		c.call(unix.SYS_OPENAT, fdcwd, c.str("/"), num(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC), num(0)).out(c.root)
		slave := c.terminal(c.root, process)
		c.attachTerminal(slave)
		c.call(unix.SYS_CLOSE, c.root.arg())
	}
	c.affinity("final", final)
	filter, err := compileFilter(opts.Filter, opts.Seccomp)
	if err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	if err := c.process(process, filter, opts.Personality, false); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	return c.finish(), nil
}
