package shim

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// sigchld is siginfo_t for SIGCHLD (sigaction(2)) on 64-bit machines.
type sigchld struct {
	signo, errno, code int32
	_                  int32
	pid                int32
	uid                uint32
	status             int32
}

// exitCode is a process's exit code, or 128 + the signal that ended it.
func exitCode(info *unix.Siginfo) int {
	s := (*sigchld)(unsafe.Pointer(info))
	if s.code == 1 { // CLD_EXITED
		return int(s.status)
	}
	return 128 + int(s.status)
}
