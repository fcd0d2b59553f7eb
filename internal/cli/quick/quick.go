// Package quick runs the commonest command lines of tenon, plain `run` and
// `exec` (and `--version`), before Go's runtime starts. Such a command costs half a millisecond of
// processor time then; starting the runtime and the packages of this program
// alone takes five times as much.
//
// The program's entry point (entry_amd64.s; the linker's -E in the Makefile)
// calls begin on the kernel's stack. Whatever begin does not know, it leaves: it
// returns, Go starts, and package cli does the same from the beginning. What it
// knows are a few flags (command.go), a daemon behind a unix socket, an image
// that is there, and a session without input and terminal (session.go). When it
// has sent the request and something else comes than output and an exit code
// (an error, a warning, a connection that breaks), it leaves the connection to
// package cli, too, with all that it has read but not dealt with: Left returns
// it. So nothing here prints a message, and a build without this package behaves
// no differently, only slower.
//
// The code that begin reaches must not need the runtime: it must not allocate,
// use maps, interfaces, closures, defer or goroutines, join strings, or panic (an
// index out of range ends the process with SIGSEGV). A test reads what the
// compiler made of it. All of it runs on one thread, and its state is in static
// memory.
package quick

import (
	"syscall"
	"unsafe"

	"tenon.dev/tenon/client/runproto"
	"tenon.dev/tenon/internal/version"
)

// leftover is a connection that begin leaves to Go.
type leftover struct {
	is bool
	fd int
	// The answer's head, the frame whose payload could not be written, the
	// header of the frame of which only a part has been dealt with, and what
	// was read behind it.
	parts [5][]byte
}

var left leftover

// Left returns the connection on which the request that the command line means
// was sent before Go started, and what was received on it so far; the caller
// owns both. ok is false if there is none.
func Left() (fd int, received []byte, ok bool) {
	if !left.is {
		return -1, nil, false
	}
	left.is = false
	for _, p := range left.parts {
		received = append(received, p...)
	}
	return left.fd, received, true
}

// begin is called with the stack that the kernel has set up: argc, argv, nil,
// envp, nil. It ends the process, or returns to let Go start.
func begin(stack unsafe.Pointer) {
	argc := *(*int)(stack)
	argv := unsafe.Slice((**byte)(unsafe.Add(stack, 8)), argc)
	envp := (**byte)(unsafe.Add(stack, 8*(argc+2)))
	n := 0
	for *(**byte)(unsafe.Add(unsafe.Pointer(envp), 8*n)) != nil {
		n++
	}
	if len(argv) == 2 && (text(argv[1]) == "--version" || text(argv[1]) == "-v") {
		theRequest.add("Tenon version ")
		theRequest.add(version.Version)
		theRequest.add("\n")
		theSession.signals = -1
		if line := theRequest.bytes(); theSession.write(syscall.Stdout, line) == len(line) {
			exit(0)
		}
		return
	}
	var c command
	if !c.parse(argv, unsafe.Slice(envp, n)) {
		return
	}
	if !theRequest.make(&c) {
		return
	}
	fd := dial(c.socket)
	if fd < 0 {
		return
	}
	theSession.conn, theSession.signals = fd, -1
	theSession.to = [3]int{runproto.Stdout: syscall.Stdout, runproto.Stderr: syscall.Stderr}
	theSession.exec, theSession.detach = c.exec, c.detach
	var end ending
	if theSession.send(theRequest.bytes()) {
		end = theSession.talk()
	} else {
		end = leave
	}
	if end == done {
		exit(theSession.code)
	}
	theSession.restore()
	if end == again {
		shut(fd)
		return
	}
	theSession.handOver(&left)
}

// text returns the string that ends with a zero byte.
func text(p *byte) string {
	n := 0
	for *(*byte)(unsafe.Add(unsafe.Pointer(p), n)) != 0 {
		n++
	}
	return unsafe.String(p, n)
}

func hasPrefix(s, prefix string) bool {
	return len(s) >= len(prefix) && s[:len(prefix)] == prefix
}

// index returns where c is in s, or -1.
func index(s string, c byte) int {
	for i := 0; i < len(s); i++ {
		if s[i] == c {
			return i
		}
	}
	return -1
}

// dial connects to the socket at path; negative if that fails.
func dial(path string) int {
	var sa syscall.RawSockaddrUnix
	sa.Family = syscall.AF_UNIX
	if len(path) >= len(sa.Path) {
		return -1
	}
	for i := 0; i < len(path); i++ {
		sa.Path[i] = int8(path[i])
	}
	fd, _, errno := syscall.RawSyscall(syscall.SYS_SOCKET, syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return -1
	}
	if int(fd) > syscall.Stderr { // else one of the three is closed; Go puts /dev/null there
		_, _, errno = syscall.RawSyscall(syscall.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&sa)), uintptr(len(path)+3))
		if errno == 0 {
			return int(fd)
		}
	}
	shut(int(fd))
	return -1
}

func shut(fd int) { syscall.RawSyscall(syscall.SYS_CLOSE, uintptr(fd), 0, 0) }

func exit(code int) {
	for {
		syscall.RawSyscall(syscall.SYS_EXIT_GROUP, uintptr(code), 0, 0)
	}
}
