package shim

import (
	"os"
	"runtime"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/cgroup"
	"tenon.dev/tenon/internal/safepath"
)

// show has a container that runs see the v1 hierarchies that its group was not in
// before: each is bound where a start would have mounted it. A container that has
// no directory of ours for them (mounts of its own there) is left as it is.
func (c *container) show(before map[string]string) error {
	var fresh []cgroup.Hierarchy
	now := c.group.Paths()
	for _, h := range cgroup.Hierarchies() {
		if _, was := before[h.Controllers]; !was && !h.V2 && now[h.Controllers] != "" {
			h.Path = now[h.Controllers]
			fresh = append(fresh, h)
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	live := c.livePidfd()
	if live == nil {
		return nil
	}
	pidfd, err := duplicate(live)
	if err != nil {
		return err
	}
	defer pidfd.Close()
	done := make(chan error, 1)
	go func() {
		// The thread is the container's in part, and ends with the goroutine.
		runtime.LockOSThread()
		done <- showIn(int(pidfd.Fd()), fresh)
	}()
	return <-done
}

// showIn binds the directories of hierarchies in the mount namespace of a process.
// The thread stays there.
func showIn(pidfd int, list []cgroup.Hierarchy) error {
	trees := make([]int, 0, len(list))
	defer func() {
		for _, t := range trees {
			unix.Close(t)
		}
	}()
	for _, h := range list {
		t, err := unix.OpenTree(unix.AT_FDCWD, h.Path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return &os.PathError{Op: "clone", Path: h.Path, Err: err}
		}
		trees = append(trees, t)
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Setns(pidfd, unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("setns", err)
	}
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/", Err: err}
	}
	defer unix.Close(root)
	const resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: resolve}
	top, err := unix.Openat2(root, "sys/fs/cgroup", how)
	if err == unix.ENOENT || err == unix.ELOOP || err == unix.ENOTDIR {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: "/sys/fs/cgroup", Err: err}
	}
	defer unix.Close(top)
	var st unix.Statfs_t
	if err := unix.Fstatfs(top, &st); err != nil {
		return os.NewSyscallError("fstatfs", err)
	}
	if st.Type != unix.TMPFS_MAGIC {
		return nil
	}
	// The container's is read-only; the clone is seen by nobody.
	writable, err := unix.OpenTree(top, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return &os.PathError{Op: "clone", Path: "/sys/fs/cgroup", Err: err}
	}
	defer unix.Close(writable)
	if err := unix.MountSetattr(writable, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return os.NewSyscallError("mount_setattr", err)
	}
	var owner unix.Stat_t // in a user namespace the host's root has no id
	if err := unix.Fstat(top, &owner); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if err := safepath.BecomeOwner(int(owner.Uid), int(owner.Gid)); err != nil {
		return err
	}
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
	if st.Flags&unix.ST_RDONLY != 0 {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	for i, h := range list {
		name := h.Name()
		switch err := unix.Mkdirat(writable, name, 0o755); err {
		case nil:
		case unix.EEXIST:
			continue // it sees the whole hierarchy already
		default:
			return &os.PathError{Op: "mkdir", Path: "/sys/fs/cgroup/" + name, Err: err}
		}
		if err := unix.MountSetattr(trees[i], "", unix.AT_EMPTY_PATH, attr); err != nil {
			return os.NewSyscallError("mount_setattr", err)
		}
		at, err := unix.Openat2(top, name, how)
		if err != nil {
			return &os.PathError{Op: "open", Path: "/sys/fs/cgroup/" + name, Err: err}
		}
		err = unix.MoveMount(trees[i], "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
		unix.Close(at)
		if err != nil {
			return &os.PathError{Op: "mount", Path: "/sys/fs/cgroup/" + name, Err: err}
		}
		if strings.Contains(name, ",") {
			for one := range strings.SplitSeq(name, ",") {
				if err := unix.Symlinkat(name, writable, one); err != nil && err != unix.EEXIST {
					return &os.PathError{Op: "symlink", Path: "/sys/fs/cgroup/" + one, Err: err}
				}
			}
		}
	}
	return nil
}

// update changes the limits of a container.
func (c *container) update(res *specs.LinuxResources) error {
	before := c.group.Paths()
	if err := c.group.Update(res); err != nil {
		return err
	}
	if err := c.show(before); err != nil {
		// They hold all the same.
		c.shim.log.Warn("a new limit is not seen in the container", "container", c.id, "error", err)
	}
	return nil
}
