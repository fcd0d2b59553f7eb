package fork

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// String is a sentence's end: "exit status 3", "signal: killed".
func (e Exit) String() string {
	if e.Signal != 0 {
		return "signal: " + e.Signal.String()
	}
	return fmt.Sprintf("exit status %d", e.Code)
}

func (p *Process) wait() (Exit, error) {
	p.waitOnce.Do(func() {
		p.exit, p.exitErr = waitPidfd(p.PidFD)
		close(p.done)
	})
	<-p.done
	return p.exit, p.exitErr
}

// siginfoChild is siginfo_t of waitid.
type siginfoChild struct {
	signo, errno, code int32
	_                  int32
	pid                int32
	uid                uint32
	status             int32
	_                  [100]byte
}

// waitPidfd waits without holding a thread where the pidfd can be polled.
func waitPidfd(f *os.File) (Exit, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return Exit{}, err
	}
	var info siginfoChild
	var ru syscall.Rusage
	var errno syscall.Errno
	err = rc.Read(func(fd uintptr) bool {
		for {
			_, _, errno = syscall.Syscall6(syscall.SYS_WAITID, unix.P_PIDFD, fd,
				uintptr(unsafe.Pointer(&info)), unix.WEXITED, uintptr(unsafe.Pointer(&ru)), 0)
			if errno == syscall.EINTR {
				continue
			}
			// EAGAIN: the pidfd is non-blocking and the child lives.
			return errno != syscall.EAGAIN
		}
	})
	if err != nil {
		if errors.Is(err, os.ErrNoDeadline) {
			err = fmt.Errorf("wait: %w", err)
		}
		return Exit{}, err
	}
	if errno != 0 {
		return Exit{}, os.NewSyscallError("waitid", errno)
	}
	e := Exit{Usage: ru}
	if info.code == 1 { // CLD_EXITED
		e.Code = int(info.status)
	} else {
		e.Signal = syscall.Signal(info.status)
		e.Code = 128 + int(info.status)
	}
	return e, nil
}

func (p *Process) signal(sig syscall.Signal) error {
	rc, err := p.PidFD.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	return serr
}
