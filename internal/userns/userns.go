// Package userns makes user namespaces for containers and hands out the ranges
// of host ids that they are mapped to.
//
// A Namespace is a pair of descriptors: a user namespace whose ids 0…Size-1 are
// the host's Start…, and, if asked for, a network namespace that belongs to it
// (so that the container's root may use it as its own). Nothing on disk refers to
// it: it lives by the descriptors, and then by the processes in it.
//
// Ranges are not remembered here: Allocate is a pure function of the pool and
// of what is in use, which the container records say.
package userns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Range is Size host ids from Start on; they are used for users and groups alike.
type Range struct {
	Start uint32 `json:"start"`
	Size  uint32 `json:"size"`
}

func (r Range) end() uint64 { return uint64(r.Start) + uint64(r.Size) }

// Namespace is an open user namespace. Close it when the container has started
// (or has not).
type Namespace struct {
	User *os.File
	Net  *os.File // nil unless asked for
}

// New makes a user namespace with the range, and with net a network namespace
// owned by it. An error names what the kernel lacks.
//
// A program with several threads cannot enter a user namespace, so a child does:
// it is stopped by ptrace at its first instruction, and killed once its
// namespaces are held.
func New(r Range, net bool) (*Namespace, error) {
	type result struct {
		ns  *Namespace
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // the tracer is a thread
		defer runtime.UnlockOSThread()
		ns, err := newNamespace(r, net)
		done <- result{ns, err}
	}()
	res := <-done
	return res.ns, res.err
}

func newNamespace(r Range, net bool) (_ *Namespace, err error) {
	flags := uintptr(unix.CLONE_NEWUSER)
	if net {
		flags |= unix.CLONE_NEWNET
	}
	maps := []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(r.Start), Size: int(r.Size)}}
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"userns"}, &syscall.ProcAttr{
		Sys: &syscall.SysProcAttr{
			Cloneflags: flags, UidMappings: maps, GidMappings: maps, GidMappingsEnableSetgroups: true,
			Ptrace: true, Pdeathsig: syscall.SIGKILL,
		},
	})
	if err != nil {
		return nil, explain(err)
	}
	defer func() {
		_ = unix.Kill(pid, unix.SIGKILL)
		var ws unix.WaitStatus
		for {
			if _, werr := unix.Wait4(pid, &ws, unix.WALL, nil); werr != unix.EINTR && (werr != nil || ws.Exited() || ws.Signaled()) {
				return
			}
		}
	}()
	ns := &Namespace{}
	defer func() {
		if err != nil {
			ns.Close()
		}
	}()
	if ns.User, err = os.Open(fmt.Sprintf("/proc/%d/ns/user", pid)); err != nil {
		return nil, fmt.Errorf("user namespace: %w", err)
	}
	if net {
		if ns.Net, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", pid)); err != nil {
			return nil, fmt.Errorf("network namespace: %w", err)
		}
	}
	return ns, nil
}

// netTime bounds what NewNet waits for.
const netTime = 10 * time.Second

// NewNet makes a network namespace owned by the user namespace at path, which
// exists: Net of the result, its User is nil. Entering a user namespace takes a
// program of one thread, so nsenter and unshare (util-linux) do it.
func NewNet(ctx context.Context, path string) (_ *Namespace, err error) {
	ctx, cancel := context.WithTimeout(ctx, netTime)
	defer cancel()
	defer func() {
		if err != nil {
			err = fmt.Errorf("network namespace in another container's user namespace (by nsenter and unshare of util-linux): %w", err)
		}
	}()
	cmd := exec.CommandContext(ctx, "nsenter", "--user="+path, "--", "unshare", "--net", "--", "cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	runtime.LockOSThread() // the signal at the parent's death is at that of its thread
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ns := &Namespace{}
	_, err = io.WriteString(in, "x")
	if err == nil {
		_, err = io.ReadFull(out, make([]byte, 1)) // cat runs: it is inside
	}
	if err == nil {
		ns.Net, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	}
	in.Close()
	if werr := cmd.Wait(); err == nil {
		err = werr
	}
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return ns, nil
}

// explain says what to do about a kernel that gives no user namespace.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		return fmt.Errorf("user namespace: the kernel allows no more of them (sysctl user.max_user_namespaces): %w", errdefs.ErrFailedPrecondition)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPERM):
		return fmt.Errorf("user namespace: the kernel refuses one, or to trace a child (%w); see `tenon doctor`, or use --userns host: %w", err, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("user namespace: %w", err)
}

// Close lets the descriptors go. A nil Namespace is no error.
func (n *Namespace) Close() {
	if n == nil {
		return
	}
	for _, f := range []*os.File{n.User, n.Net} {
		if f != nil {
			f.Close()
		}
	}
}

// Path is a path of the user namespace that other processes can open while n
// is open.
func (n *Namespace) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.User.Fd())
}

// Mappable says whether the ids of the mount at path can be mapped by n, with
// recursive those of all mounts below it too. The error is nil, or names the
// file system.
func (n *Namespace) Mappable(path string, recursive bool) error {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	attr := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
		attr |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, flags)
	if err != nil {
		return &os.PathError{Op: "open_tree", Path: path, Err: err}
	}
	defer unix.Close(fd)
	err = unix.MountSetattr(fd, "", attr, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(n.User.Fd())})
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("the kernel cannot map ids of mounts (it is older than 5.12): %w", errdefs.ErrFailedPrecondition)
	}
	var st unix.Statfs_t
	name := "file system"
	if unix.Fstatfs(fd, &st) == nil {
		name = fsName(int64(st.Type))
	}
	where := path
	if recursive {
		where += ", or what is mounted below it,"
	}
	return fmt.Errorf("%s is on a file system (%s) whose ids the kernel cannot map (%w): %w", where, name, err, errdefs.ErrFailedPrecondition)
}

func fsName(magic int64) string {
	switch magic {
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlay"
	case unix.TMPFS_MAGIC:
		return "tmpfs, before Linux 6.3"
	case unix.NFS_SUPER_MAGIC:
		return "nfs"
	case unix.FUSE_SUPER_MAGIC:
		return "fuse"
	case unix.V9FS_MAGIC:
		return "9p"
	case unix.PROC_SUPER_MAGIC:
		return "proc"
	case unix.SYSFS_MAGIC:
		return "sysfs"
	case 0x2fc12fc1:
		return "zfs"
	}
	return fmt.Sprintf("type %#x", magic)
}

// OverlayMappable says whether an overlay of idmapped layers can be made of
// directories in dir, which needs Linux 5.19.
func (n *Namespace) OverlayMappable(dir string) error {
	if err := n.Mappable(dir, false); err != nil {
		return err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return os.NewSyscallError("uname", err)
	}
	return OverlayRelease(unix.ByteSliceToString(u.Release[:]))
}

// OverlayRelease says whether a kernel's release has overlays of idmapped layers, as
// far as it tells.
func OverlayRelease(release string) error {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err == nil && (major < 5 || major == 5 && minor < 19) {
		return fmt.Errorf("overlayfs of this kernel (%d.%d) cannot be made of idmapped layers, which needs 5.19: %w", major, minor, errdefs.ErrFailedPrecondition)
	}
	return nil
}
