package oci

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// harden makes the process safe to join containers from: its executable is on
// a mount that nobody can write through (a container that gets a handle on
// /proc/PID/exe could otherwise overwrite this program: CVE-2019-5736), and it
// is not dumpable, so nothing of it can be opened through /proc. The first call
// executes the program again, from a read-only mount of its own, and does not
// return.
func harden() error {
	var st unix.Statfs_t
	if err := unix.Statfs("/proc/self/exe", &st); err != nil {
		return os.NewSyscallError("statfs /proc/self/exe", err)
	}
	if st.Flags&unix.ST_RDONLY == 0 {
		return execReadonly()
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_SET_DUMPABLE", err)
	}
	return nil
}

func execReadonly() error {
	// By name, not through the link: open_tree clones a mount that is in this
	// namespace.
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, self, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("a read-only mount of %s: %w", self, err)
	}
	var named, running unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &named), unix.Stat("/proc/self/exe", &running)); err != nil {
		return err
	}
	if named.Dev != running.Dev || named.Ino != running.Ino {
		return fmt.Errorf("%s is not the running program any more", self)
	}
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if err != nil {
		return os.NewSyscallError("mount_setattr", err)
	}
	return os.NewSyscallError("exec", unix.Exec("/proc/self/fd/"+strconv.Itoa(fd), os.Args, os.Environ()))
}
