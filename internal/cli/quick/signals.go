package quick

import (
	"syscall"
	"unsafe"

	"tenon.dev/tenon/client/runproto"
)

// Events of poll.
const (
	pollIn  = 1
	pollOut = 4
)

type pollFD struct {
	fd      int32
	events  int16
	revents int16
}

// writable is how much a file that poll calls writable takes at once without
// waiting (PIPE_BUF).
const writable = 4096

// untouched are the signals that mean nothing to a container's process and do
// nothing here, and the two that belong to the C library's threads.
const untouched = uint64(1<<(syscall.SIGCHLD-1) | 1<<(syscall.SIGURG-1) | 1<<(syscall.SIGWINCH-1) | 1<<(32-1) | 1<<(33-1))

// catch directs all signals to a descriptor, from which they are forwarded.
func (s *session) catch() bool {
	all := ^untouched
	_, _, errno := syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, sigBlock, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&s.mask)), 8, 0, 0)
	if errno != 0 {
		return false
	}
	fd, _, errno := syscall.RawSyscall6(syscall.SYS_SIGNALFD4, ^uintptr(0), uintptr(unsafe.Pointer(&all)), 8, syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0, 0)
	if errno != 0 {
		s.signals = -1
		s.unmask()
		return false
	}
	s.signals = int(fd)
	return true
}

const (
	sigBlock   = 0
	sigSetMask = 2
)

func (s *session) unmask() {
	syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, sigSetMask, uintptr(unsafe.Pointer(&s.mask)), 0, 8, 0, 0)
}

// restore undoes catch.
func (s *session) restore() {
	if s.signals < 0 {
		return
	}
	s.forward()
	shut(s.signals)
	s.signals = -1
	s.unmask()
}

// forward sends the signals that have come to the container.
func (s *session) forward() {
	var info [128]byte // struct signalfd_siginfo
	for {
		n, _, errno := syscall.RawSyscall(syscall.SYS_READ, uintptr(s.signals), uintptr(unsafe.Pointer(&info)), unsafe.Sizeof(info))
		if errno != 0 || n != unsafe.Sizeof(info) {
			return
		}
		s.forwardOne(int(info[0])) // ssi_signo, below 65
	}
}

func (s *session) forwardOne(sig int) {
	var frame [runproto.HeaderLen + 32]byte
	n := runproto.HeaderLen
	n += copy(frame[n:], `{"signal":"`)
	switch name := ""; {
	case sig < len(names):
		if name = names[sig]; name == "" {
			return
		}
		n += copy(frame[n:], name)
	default: // real-time signals go by number
		frame[n], frame[n+1] = byte('0'+sig/10), byte('0'+sig%10)
		n += 2
	}
	n += copy(frame[n:], `"}`)
	frame[0], frame[7] = runproto.Signal, byte(n-runproto.HeaderLen)
	s.send(frame[:n]) // a lost connection shows when it is read
}

// names are the signals that are forwarded by name.
var names = [32]string{
	syscall.SIGHUP: "SIGHUP", syscall.SIGINT: "SIGINT", syscall.SIGQUIT: "SIGQUIT", syscall.SIGILL: "SIGILL",
	syscall.SIGTRAP: "SIGTRAP", syscall.SIGABRT: "SIGABRT", syscall.SIGBUS: "SIGBUS", syscall.SIGFPE: "SIGFPE",
	syscall.SIGUSR1: "SIGUSR1", syscall.SIGSEGV: "SIGSEGV", syscall.SIGUSR2: "SIGUSR2", syscall.SIGALRM: "SIGALRM",
	syscall.SIGTERM: "SIGTERM", syscall.SIGSTKFLT: "SIGSTKFLT", syscall.SIGCONT: "SIGCONT", syscall.SIGTSTP: "SIGTSTP",
	syscall.SIGXCPU: "SIGXCPU", syscall.SIGXFSZ: "SIGXFSZ", syscall.SIGVTALRM: "SIGVTALRM", syscall.SIGPROF: "SIGPROF",
	syscall.SIGIO: "SIGIO", syscall.SIGPWR: "SIGPWR", syscall.SIGSYS: "SIGSYS",
}

// wait waits until fd is ready for events, and forwards signals meanwhile.
func (s *session) wait(fd int, events int16) bool {
	fds := [2]pollFD{{fd: int32(fd), events: events}, {fd: int32(s.signals), events: pollIn}}
	for {
		_, _, errno := syscall.RawSyscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&fds)), uintptr(len(fds)), 0, 0, 0, 0)
		if errno != 0 && errno != syscall.EINTR {
			return false
		}
		if errno == 0 && fds[1].revents != 0 {
			s.forward()
		}
		if errno == 0 && fds[0].revents != 0 {
			return true
		}
	}
}

// write writes p to fd and returns how much of it could be written. It forwards
// signals while the reader is slow.
func (s *session) write(fd int, p []byte) int {
	wrote := 0
	for wrote < len(p) {
		part := p[wrote:]
		if s.signals >= 0 {
			if !s.wait(fd, pollOut) {
				break
			}
			part = part[:min(len(part), writable)]
		}
		n, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&part[0])), uintptr(len(part)))
		switch {
		case errno == syscall.EINTR:
			continue
		case errno == syscall.EAGAIN && s.signals < 0:
			if !s.wait(fd, pollOut) { // the file was opened so
				return wrote
			}
		case errno == syscall.EAGAIN:
		case errno != 0:
			return wrote
		}
		if errno == 0 {
			wrote += int(n)
		}
	}
	return wrote
}
