// Package aside puts the processes that outlive the daemon (shims, the name server,
// the holder of virtual machines) into control groups of their own, where a service
// manager that ends, kills or limits the daemon's service does not find them.
package aside

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// suffix makes the group's name from the daemon's prefix. No prefix has a dot.
const suffix = ".engine"

// Move puts the process, a child of this one, into the group of the daemon with this
// prefix, in the hierarchies by which service managers know processes, unless this
// process is in the root group there: then nobody manages it.
func Move(prefix string, pid int) error {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return fmt.Errorf("aside: %w", err)
	}
	var errs []error
	for _, root := range managed(string(b)) {
		group := filepath.Join(root, prefix+suffix)
		err := os.Mkdir(group, 0o755)
		if err == nil || errors.Is(err, unix.EEXIST) {
			err = os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("aside: process %d: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

// managed are the mount points of the hierarchies that a service manager tells
// processes apart by and in which /proc/self/cgroup shows another group than the root.
func managed(cgroups string) []string {
	var roots []string
	for line := range strings.Lines(cgroups) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 || f[2] == "/" {
			continue
		}
		switch f[1] {
		case "":
			roots = append(roots, v2Root())
		case "name=systemd":
			roots = append(roots, v1+"/systemd")
		}
	}
	return roots
}

const v1 = "/sys/fs/cgroup"

// v2Root is where the one hierarchy of version 2 is mounted; beside those of version
// 1 it has a directory of its own.
func v2Root() string {
	var st unix.Statfs_t
	if unix.Statfs(v1, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		return v1
	}
	return v1 + "/unified"
}

// endTime is how long ended processes may take to leave the group.
const endTime = time.Second

// Remove removes the daemon's group where it is empty. A process in it keeps it, and
// is no error: its own end will call Remove again.
func Remove(prefix string) error {
	var errs []error
	for _, root := range []string{v1, v1 + "/unified", v1 + "/systemd"} {
		group := filepath.Join(root, prefix+suffix)
		err := unix.Rmdir(group)
		for end := time.Now().Add(endTime); err == unix.EBUSY && time.Now().Before(end); err = unix.Rmdir(group) {
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil && err != unix.ENOENT && err != unix.EBUSY {
			errs = append(errs, &os.PathError{Op: "rmdir", Path: group, Err: err})
		}
	}
	return errors.Join(errs...)
}
