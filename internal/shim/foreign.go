package shim

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch"
)

// foreign is a process that an external runtime made, and left to the shim.
type foreign struct {
	id    int
	fd    *os.File
	start func() error
	send  func(syscall.Signal) error // nil: by pidfd

	once sync.Once
	code int
	err  error
}

func newForeign(pid int, start func() error, send func(syscall.Signal) error) (child, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("process %d of the runtime: %w", pid, os.NewSyscallError("pidfd_open", err))
	}
	return &foreign{id: pid, fd: os.NewFile(uintptr(fd), "pidfd"), start: start, send: send}, nil
}

func (f *foreign) pid() int       { return f.id }
func (f *foreign) pidfd() rawFile { return f.fd }
func (f *foreign) close()         { f.fd.Close() }

func (f *foreign) exec() error {
	err := f.start()
	if err != nil {
		_ = f.byPidfd(syscall.SIGKILL) // if it has ended, all the better
	}
	return err
}

func (f *foreign) byPidfd(sig syscall.Signal) error {
	raw, err := f.fd.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := raw.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); cerr != nil {
		return cerr
	}
	return err
}

func (f *foreign) signal(sig syscall.Signal) error {
	if f.send != nil && sig != syscall.SIGKILL {
		return f.send(sig)
	}
	return f.byPidfd(sig)
}

// wait reaps the process: it is the shim's child since its own parent ended.
func (f *foreign) wait() (int, error) {
	f.once.Do(func() {
		raw, err := f.fd.SyscallConn()
		if err != nil {
			f.err = err
			return
		}
		var info unix.Siginfo
		werr := raw.Read(func(fd uintptr) bool {
			for {
				err = unix.Waitid(unix.P_PIDFD, int(fd), &info, unix.WEXITED, nil)
				if err != unix.EINTR {
					return err != unix.EAGAIN
				}
			}
		})
		if werr != nil || err != nil {
			f.err = fmt.Errorf("wait for process %d: %w", f.id, errors.Join(werr, err))
			return
		}
		f.code = exitCode(&info)
	})
	return f.code, f.err
}

// BundleCommand is the argument by which the shim's program becomes the one
// that mounts a bundle's root, joins a cgroup (each may be empty: none), and then
// is the runtime:
//
//	tenon-shim bundle MOUNTS.json CGROUP RUNTIME [args]
const BundleCommand = "bundle"

// BundleMounts are the contents of MOUNTS.json.
type BundleMounts struct {
	Dir    string
	Mounts []launch.Mount
	// Sources are mounted before the runtime binds them: it has no word for it.
	Sources []BundleSource
}

// BundleSource is what of a directory a container mounts, and where it is bound
// for the runtime.
type BundleSource struct {
	Dir, Beneath, Target string
}
