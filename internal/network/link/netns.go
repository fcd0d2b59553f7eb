package link

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// ErrNotNetns says that a path is no network namespace.
var ErrNotNetns = errors.New("not a network namespace")

// PrepareDir makes a directory that namespaces can be bound in: a mount of its
// own that propagates, so that a namespace let go here is let go everywhere.
func PrepareDir(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("make namespace directory: %w", err)
	}
	// Works only if the directory is a mount already.
	if err := unix.Mount("", dir, "none", unix.MS_SHARED, ""); err == nil {
		return nil
	}
	if err := unix.Mount(dir, dir, "none", unix.MS_BIND, ""); err != nil {
		return &os.PathError{Op: "bind", Path: dir, Err: err}
	}
	if err := unix.Mount("", dir, "none", unix.MS_SHARED, ""); err != nil {
		return &os.PathError{Op: "make shared", Path: dir, Err: err}
	}
	return nil
}

// RemoveDir undoes PrepareDir; the namespaces in it must be gone.
func RemoveDir(dir string) error {
	_ = unix.Unmount(dir, unix.MNT_DETACH)
	return os.RemoveAll(dir)
}

// NewNetns makes a network namespace, or takes the one that from is (nil: none),
// binds it to path, and calls fn on a thread that is in it, with the namespace's
// descriptor (closed afterwards) and a socket in it. If fn fails, the namespace
// is let go.
func NewNetns(path string, from *os.File, fn func(fd int, s *Socket) error) error {
	return abroad(func() error { return newNetns(path, from, fn) })
}

// abroad calls fn on a thread of its own, which may leave its network namespace.
func abroad(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- &os.PathError{Op: "open", Path: "/proc/thread-self/ns/net", Err: err}
			return
		}
		defer unix.Close(home)
		defer func() {
			// A thread that is not back home ends with this goroutine.
			if unix.Setns(home, unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
		}()
		done <- fn()
	}()
	return <-done
}

func newNetns(path string, from *os.File, fn func(fd int, s *Socket) error) (err error) {
	if from != nil {
		if err := unix.Setns(int(from.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", os.NewSyscallError("setns", err))
		}
	} else if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make network namespace: %w", os.NewSyscallError("unshare", err))
	}
	file, err := unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_RDONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("make network namespace: %w", &os.PathError{Op: "create", Path: path, Err: err})
	}
	unix.Close(file)
	defer func() {
		if err != nil {
			_ = unix.Unmount(path, unix.MNT_DETACH)
			_ = os.Remove(path)
		}
	}()
	if err := unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, ""); err != nil {
		return &os.PathError{Op: "bind network namespace to", Path: path, Err: err}
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	s, err := Open()
	if err != nil {
		return err
	}
	defer s.Close()
	return fn(fd, s)
}

// InNetns calls fn on a thread that is in the namespace bound to path.
func InNetns(path string, fn func(fd int, s *Socket) error) error {
	return abroad(func() error {
		fd, err := OpenNetns(path)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %s: %w", path, os.NewSyscallError("setns", err))
		}
		s, err := Open()
		if err != nil {
			return err
		}
		defer s.Close()
		return fn(fd, s)
	})
}

// OpenNetns opens the namespace bound to path; ErrNotNetns if it is only a file.
func OpenNetns(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil || st.Type != unix.NSFS_MAGIC {
		unix.Close(fd)
		return -1, &os.PathError{Op: "open", Path: path, Err: ErrNotNetns}
	}
	return fd, nil
}

// ReleaseNetns lets a namespace go. The kernel destroys it with its
// interfaces, in its own time, when the last process in it is gone.
// One that is gone is no error.
func ReleaseNetns(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Sysctl writes a setting below /proc/sys for the calling thread's namespace.
func Sysctl(name, value string) error {
	path := filepath.Join("/proc/sys", name)
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(value)); err != nil {
		return &os.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}
