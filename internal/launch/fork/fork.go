// Package fork walks a launch.Plan in a forked child of this process.
//
// Start clones the calling process, without executing anything: the child runs
// in a block of memory that was prepared for it, on a stack of its own, and does
// nothing but raw system calls from the plan until it executes the user's
// program. See launch for what the steps are.
//
// The child does not share this program's memory (CLONE_VM) but the block: the
// kernel kills all processes with one memory at once, so that a container's own
// memory limit would end this program; it would spread the child's
// oom_score_adj; and a child may wait at the barrier for days. But it does not
// copy the memory either: heap and data are kept out of it. So a program that uses
// this package must not fork by other means and use the heap in the child; the
// standard library's exec shares the memory and may be used, without Cloneflags
// of a user namespace.
//
// Life of a Process: Start returns at the barrier (all set up but the exec) or
// with the step that failed; Exec lifts the barrier; Wait returns the exit
// status, once, and frees the zombie; Close frees descriptors. Only this
// package's Wait may reap the child: never wait for -1 in a program that uses
// it.
package fork

import (
	"os"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/launch"
)

// Stdio is what the child inherits. Files stay the caller's to close.
type Stdio struct {
	// In, Out, Err become descriptors 0, 1, 2; nil is /dev/null. They are
	// ignored for a process with a terminal.
	In, Out, Err *os.File
	// Extra become descriptors 3, 4, …; launch.Options.Preserve of them.
	Extra []*os.File
	// AtPhase is called, in Start, at each of launch.Options.Phases. An error
	// aborts the start.
	AtPhase func(launch.Phase, *Process) error
	// Gate, with launch.Options.Gate: the child waits until it can read a
	// byte from it, and reports a failed exec by writing a line to GateStatus. Both
	// are typically FIFOs opened for reading and writing; closed by the exec.
	Gate, GateStatus *os.File
}

// Process is a child of this process.
type Process struct {
	// Pid as this process's pid namespace numbers it.
	Pid int
	// PidFD refers to the process; owned by the Process.
	PidFD *os.File
	// Console is the pty's master for a process with a terminal, else nil. The
	// caller owns it.
	Console *os.File
	// SeccompListener is the listener of a filter that asks an agent, else nil.
	// The caller owns it and sends it to the agent before Exec.
	SeccompListener *os.File
	// Warnings are steps that failed and that Docker would not fail for
	// either (oom_score_adj without CAP_SYS_RESOURCE).
	Warnings []string

	process
}

// Exit is how a process ended.
type Exit struct {
	Code   int            // exit code; 128 + signal for a killed one
	Signal syscall.Signal // 0 if it exited
	Usage  syscall.Rusage
}

// StepError is a failed step.
type StepError struct {
	Step  string // the sentence's subject: "mount overlay on /"
	Errno syscall.Errno
}

func (e *StepError) Error() string { return e.Step + ": " + e.Errno.Error() }

// Unwrap gives the errno.
func (e *StepError) Unwrap() error { return e.Errno }

// Start forks the child and returns when it stands at the barrier. A step that
// fails is a *StepError; nothing is left behind then.
func Start(plan *launch.Plan, stdio Stdio) (*Process, error) { return start(plan, stdio) }

// Exec lifts the barrier. It returns nil once the program runs, else a
// *StepError (ENOENT, EACCES, …), after which the child is gone and reaped.
func (p *Process) Exec() error { return p.exec() }

// Wait waits for the end of the process and reaps it. Callable any number of
// times from any goroutine; all get the same answer.
func (p *Process) Wait() (Exit, error) { return p.wait() }

// Signal sends a signal through the pidfd. syscall.ESRCH if it has ended.
func (p *Process) Signal(sig syscall.Signal) error { return p.signal(sig) }

// Close frees the descriptors but the console's; the process goes on.
func (p *Process) Close() error { return p.close() }

// RunHook runs a hook in the caller's own namespaces with state on its standard
// input, killed after the hook's timeout.
func RunHook(hook specs.Hook, state []byte) error { return runHook(hook, state, nil) }

// RunHook runs a hook in the process's namespaces (createContainer,
// startContainer) with state on its standard input.
func (p *Process) RunHook(hook specs.Hook, state []byte) error { return runHook(hook, state, p) }
