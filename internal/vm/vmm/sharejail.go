package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/vm/hostfs"
	"tenon.dev/tenon/internal/vm/qemu"
)

// ShareArg is the first argument of a program that is to call Shared.
const ShareArg = "share"

// Descriptors that a share's server inherits.
const (
	streamFD = 3 // to the guest
	treeFD   = 4 // a detached copy of the mounts of what is shared
	readyFD  = 5 // written to and closed when it is shut up
)

// shareJail is what a share's server is told.
type shareJail struct {
	Dir      string   // one on which its root is built, in its own namespace
	Groups   []string // cgroup.procs files to join
	Name     string   // of a single file
	ReadOnly bool
	Cache    time.Duration
	IDs      hostfs.IDs
}

func jailArg(j shareJail) (string, error) {
	b, err := json.Marshal(j)
	return string(b), err
}

// serverCaps are what a server needs to act for all users of its guest on the
// files that it sees. CAP_DAC_READ_SEARCH is not among them: with it, handles
// would lead to files that it does not see.
const serverCaps = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID | 1<<unix.CAP_SETFCAP

// Shared serves a host directory to a guest, in a process of its own: it shuts
// itself up with that directory first. It returns when the guest is gone.
func Shared(args []string) error {
	if len(args) != 1 {
		return errors.New("share: started by tenon-vmm only")
	}
	var j shareJail
	if err := json.Unmarshal([]byte(args[0]), &j); err != nil {
		return fmt.Errorf("share: %w", err)
	}
	root, err := j.enter()
	if err != nil {
		return fmt.Errorf("share: %w", err)
	}
	f := os.NewFile(streamFD, "stream")
	conn, err := net.FileConn(f)
	if err != nil {
		return fmt.Errorf("share: %w", err)
	}
	f.Close()
	log.SetOutput(io.Discard)
	if err := hostfs.Confine(); err != nil {
		return fmt.Errorf("share: %w", err)
	}
	ready := os.NewFile(readyFD, "ready")
	_, err = ready.Write([]byte{'\n'})
	if err := errors.Join(err, ready.Close()); err != nil {
		return fmt.Errorf("share: %w", err)
	}
	return hostfs.Serve(conn, hostfs.Options{Root: root, ReadOnly: j.ReadOnly, Cache: j.Cache, IDs: j.IDs})
}

// enter leaves everything but the directory, and returns a descriptor of it.
func (j *shareJail) enter() (int, error) {
	for _, g := range j.Groups {
		if err := os.WriteFile(g, []byte("0"), 0); err != nil {
			return -1, fmt.Errorf("cgroup: %w", err)
		}
	}
	if err := qemu.Unprotect(); err != nil {
		return -1, err
	}
	if err := j.pivot(); err != nil {
		return -1, err
	}
	root, err := unix.Open("/tree", unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: "/tree", Err: err}
	}
	unix.Umask(0)
	var files unix.Rlimit // a guest's kernel keeps many
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil {
		files.Cur = files.Max
		err = unix.Setrlimit(unix.RLIMIT_NOFILE, &files)
		if err != nil {
			return -1, os.NewSyscallError("setrlimit", err)
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return -1, os.NewSyscallError("setrlimit", err)
	}
	return root, dropCaps(serverCaps)
}

// pivot makes a root with nothing in it but the directory and this process's
// /proc.
func (j *shareJail) pivot() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	defer unix.Close(treeFD)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC, Propagation: unix.MS_PRIVATE}
	if j.ReadOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(treeFD, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		return os.NewSyscallError("mount_setattr", err)
	}
	if err := unix.Mount("tmpfs", j.Dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_NODEV, "mode=755,size=64k,nr_inodes=16"); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	for _, d := range []string{"proc", "tree"} {
		if err := os.Mkdir(filepath.Join(j.Dir, d), 0o755); err != nil {
			return err
		}
	}
	target := filepath.Join(j.Dir, "tree")
	if j.Name != "" {
		target = filepath.Join(target, filepath.Base(j.Name))
		f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		f.Close()
	}
	if err := unix.MoveMount(treeFD, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return os.NewSyscallError("move_mount", err)
	}
	if err := unix.Mount("proc", filepath.Join(j.Dir, "proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "hidepid=2"); err != nil {
		return fmt.Errorf("proc: %w", err)
	}
	if err := unix.Mount("", j.Dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("read-only root: %w", err)
	}
	if err := unix.Chdir(j.Dir); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return os.NewSyscallError("umount", err)
	}
	return unix.Chdir("/")
}

// dropCaps leaves all threads the capabilities of a set, for good.
func dropCaps(keep uint64) error {
	prctl := func(op, a uintptr) syscall.Errno {
		_, _, e := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, op, a, 0, 0, 0, 0)
		return e
	}
	for c := uintptr(0); c < 64; c++ {
		if keep&(1<<c) != 0 {
			continue
		}
		if e := prctl(unix.PR_CAPBSET_DROP, c); e == syscall.EINVAL && c > 0 {
			break // past the last one
		} else if e != 0 {
			return fmt.Errorf("bounding set: %w", e)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{
		{Effective: uint32(keep), Permitted: uint32(keep)}, {Effective: uint32(keep >> 32), Permitted: uint32(keep >> 32)},
	}
	if _, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0); e != 0 {
		return os.NewSyscallError("capset", e)
	}
	if e := prctl(unix.PR_SET_NO_NEW_PRIVS, 1); e != 0 {
		return os.NewSyscallError("no_new_privs", e)
	}
	return nil
}
