package main

import (
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// unprobed are calls that block, end the child without an answer, or disturb
// others even with senseless arguments.
var unprobed = []uintptr{
	unix.SYS_PAUSE, unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_RT_SIGRETURN, unix.SYS_FORK, unix.SYS_VFORK,
	unix.SYS_CLONE, unix.SYS_VHANGUP, unix.SYS_SYNC, unix.SYS_MUNMAP,
}

const lastSyscall = 462

// syscalls tries every system call, each in a forked child, with -1 in all
// arguments: a bad descriptor, a bad address, unknown flags. What comes back
// says whether the filter let it through.
func syscalls(v view) {
	for nr := uintptr(0); nr <= lastSyscall; nr++ {
		if nr > 334 && nr < 424 || slices.Contains(unprobed, nr) {
			continue
		}
		v.add(fmt.Sprintf("syscall.%03d", nr), try(nr, ^uintptr(0)))
	}
	// In the host's IPC namespace a queue would stay, and the next one's answer be another.
	if id, _, errno := unix.RawSyscall(unix.SYS_MSGGET, ^uintptr(0), 0, 0); errno == 0 {
		_, _, _ = unix.RawSyscall(unix.SYS_MSGCTL, id, unix.IPC_RMID, 0) // as good as it can be
	}
	// The same by another personality of the processor, and some whose
	// arguments the default profile looks at.
	v.add("syscall.x32 getpid", try(unix.SYS_GETPID|0x40000000, 0))
	v.add("syscall.socket vsock", try(unix.SYS_SOCKET, unix.AF_VSOCK))
	v.add("syscall.socket alg", try(unix.SYS_SOCKET, unix.AF_ALG))
	v.add("syscall.personality uname26", try(unix.SYS_PERSONALITY, 0x20000))
	v.add("syscall.personality 0", try(unix.SYS_PERSONALITY, 0))
	v.add("syscall.personality no randomization", try(unix.SYS_PERSONALITY, 0x40000))
	v.add("syscall.unshare user", try(unix.SYS_UNSHARE, unix.CLONE_NEWUSER))
	v.add("syscall.unshare mount", try(unix.SYS_UNSHARE, unix.CLONE_NEWNS))
	v.add("syscall.unshare files", try(unix.SYS_UNSHARE, unix.CLONE_FILES))
	v.add("syscall.clone user", try(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD)))
}

// try makes the call in a child and tells its errno or the signal that it died of.
func try(nr, arg uintptr) string {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pid := child(nr, arg)
	if pid < 0 {
		return "cannot fork"
	}
	var status unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &status, 0, nil); err != unix.EINTR {
			break
		}
	}
	switch {
	case status.Signaled():
		return "killed by " + unix.SignalName(status.Signal())
	case status.ExitStatus() == 0:
		return "ok"
	}
	return unix.ErrnoName(unix.Errno(status.ExitStatus()))
}

// child forks; in the child there is nothing but system calls. They exit with
// the errno as status.
//
//go:nosplit
//go:noinline
//go:norace
func child(nr, arg uintptr) int {
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return -1
	}
	if pid != 0 {
		return int(pid)
	}
	// An alarm of 2 s for a call that blocks after all; no core for one that
	// the filter kills.
	alarm := [4]int64{0, 0, 2, 0}
	unix.RawSyscall6(unix.SYS_SETITIMER, 0, uintptr(unsafe.Pointer(&alarm)), 0, 0, 0, 0)
	_, _, errno = unix.RawSyscall6(nr, arg, ^uintptr(0), ^uintptr(0), ^uintptr(0), ^uintptr(0), ^uintptr(0))
	for {
		unix.RawSyscall6(unix.SYS_EXIT_GROUP, uintptr(errno), 0, 0, 0, 0, 0)
	}
}
