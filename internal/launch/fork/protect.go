package fork

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// protectedEnv marks the second execution, so that a kernel that shows no
// read-only mount cannot make a loop of it.
const protectedEnv = "_TENON_PROTECTED"

// Protect makes sure that the file of this program cannot be written to through
// /proc/PID/exe by a container's process that got hold of it (CVE-2019-5736):
// unless it lies on a read-only mount, the program executes itself again from a
// detached read-only clone of the mount it is on, with the same arguments and
// environment. It is to be called first in main by a program that starts
// containers; it returns in the protected program. With it, the process is not
// dumpable (CVE-2016-9962).
func Protect() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	again := os.Getenv(protectedEnv) != ""
	if err := os.Unsetenv(protectedEnv); err != nil {
		return err
	}
	safe, err := readOnlyExe()
	if err != nil {
		return fmt.Errorf("protect the program's file: %w", err)
	}
	if safe {
		return nil
	}
	if again {
		return fmt.Errorf("protect the program's file: the kernel made no read-only mount of it")
	}
	// The path, not the link, as a clone of a detached mount cannot be cloned.
	fd, err := unix.OpenTree(unix.AT_FDCWD, "/proc/self/exe", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("protect the program's file: open_tree: %w", err)
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(fd)
		return fmt.Errorf("protect the program's file: mount_setattr: %w", err)
	}
	env := append(os.Environ(), protectedEnv+"=1")
	err = execveat(fd, os.Args, env)
	unix.Close(fd)
	return fmt.Errorf("protect the program's file: execveat: %w", err)
}

// readOnlyExe tells whether this program's file cannot be opened for writing.
func readOnlyExe() (bool, error) {
	fd, err := unix.Open("/proc/self/exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, &os.PathError{Op: "open", Path: "/proc/self/exe", Err: err}
	}
	defer unix.Close(fd)
	if seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err == nil && seals&unix.F_SEAL_WRITE != 0 {
		return true, nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return false, os.NewSyscallError("fstatfs", err)
	}
	return st.Flags&unix.ST_RDONLY != 0, nil
}
