package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// JailArg is the first argument of a program that is to call Jailed.
const JailArg = "jail"

// Jail is what holds one QEMU. It has namespaces of its own in any case: of
// mounts, with nothing in them but QEMU's program files, all read-only; of
// network, with no interface; of processes, System V IPC and host name. It has
// no capability and can't get one.
type Jail struct {
	UID uint32 // its user and group, nobody else's
	// Dir is a directory on which its root is built, in its own namespace; it
	// may be any that exists.
	Dir string
	// Groups are cgroup.procs files that it is written to.
	Groups []string
	// Files bounds its open files. 0: 1024.
	Files uint64

	keepRAM int // see discard.go; 0: nothing
}

// prison is what the jailed stage is told.
type prison struct {
	Jail
	Binary string
	Paths  []string
	KVM    bool
	Keep   int // Jail.keepRAM
	Life   int // a socket whose other end the parent holds
	Args   []string
}

func (j Jail) encode(b *Binary, accel string, life int, args []string) (string, error) {
	if j.UID == 0 {
		return "", errors.New("qemu: a jail for root is none")
	}
	if j.Files == 0 {
		j.Files = 1024
	}
	text, err := json.Marshal(prison{Jail: j, Keep: j.keepRAM, Binary: b.Path, Paths: b.Files, KVM: accel == "kvm", Life: life, Args: args})
	return string(text), err
}

// Jailed is the second stage of a start: it runs in the new namespaces, gives
// up everything else and becomes QEMU. It returns only an error, or ends the
// process with a message.
func Jailed(arg string) {
	runtime.LockOSThread() // this thread becomes QEMU
	var p prison
	err := json.Unmarshal([]byte(arg), &p)
	if err == nil {
		err = p.enter()
	}
	fmt.Fprintln(os.Stderr, "jail:", err)
	os.Exit(125)
}

func (p *prison) enter() error {
	for _, g := range p.Groups {
		if err := os.WriteFile(g, []byte("0"), 0); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	if err := Unprotect(); err != nil {
		return err
	}
	if err := p.root(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("vm")); err != nil {
		return os.NewSyscallError("sethostname", err)
	}
	for what, max := range map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: p.Files, unix.RLIMIT_MEMLOCK: 0, unix.RLIMIT_MSGQUEUE: 0} {
		if err := unix.Setrlimit(what, &unix.Rlimit{Cur: max, Max: max}); err != nil {
			return fmt.Errorf("limit %d: %w", what, err)
		}
	}
	if err := p.drop(); err != nil {
		return err
	}
	if p.Keep > 0 {
		if err := keepHoles(p.Keep); err != nil {
			return err
		}
	}
	// The parent may have died before the kernel knew that this process should
	// too.
	poll := []unix.PollFd{{Fd: int32(p.Life), Events: unix.POLLIN}}
	if _, err := unix.Poll(poll, 0); err != nil || poll[0].Revents&unix.POLLHUP != 0 {
		return errors.New("the parent is gone")
	}
	err := unix.Exec(p.Binary, p.Args, []string{"LC_ALL=C"})
	return fmt.Errorf("exec %s: %w", p.Binary, err)
}

// Unprotect makes this process one that the kernel may kill when memory is
// short, though its parent may be protected.
func Unprotect() error {
	const path = "/proc/self/oom_score_adj"
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if strings.HasPrefix(string(b), "-") {
		return os.WriteFile(path, []byte("0"), 0)
	}
	return nil
}

// root makes a root of QEMU's own files and leaves the host's.
func (p *prison) root() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	// Directories are made, files bound from the host; then nothing is writable.
	if err := unix.Mount("tmpfs", p.Dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755,size=1m,nr_inodes=1000"); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	for _, path := range p.Paths {
		if err := bind(path, filepath.Join(p.Dir, path)); err != nil {
			return err
		}
	}
	for _, d := range []string{"proc", "dev"} {
		if err := os.Mkdir(filepath.Join(p.Dir, d), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	devices := map[string][2]uint32{"null": {1, 3}, "urandom": {1, 9}}
	if p.KVM {
		var st unix.Stat_t
		if err := unix.Stat("/dev/kvm", &st); err != nil {
			return &os.PathError{Op: "stat", Path: "/dev/kvm", Err: err}
		}
		devices["kvm"] = [2]uint32{unix.Major(st.Rdev), unix.Minor(st.Rdev)}
	}
	for name, n := range devices {
		path := filepath.Join(p.Dir, "dev", name)
		if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(n[0], n[1]))); err != nil {
			return &os.PathError{Op: "mknod", Path: path, Err: err}
		}
		if err := os.Chmod(path, 0o666); err != nil { // whatever the umask
			return err
		}
	}
	// QEMU opens its inherited files through it; it shows this process alone.
	if err := unix.Mount("proc", filepath.Join(p.Dir, "proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "hidepid=2"); err != nil {
		return fmt.Errorf("proc: %w", err)
	}
	if err := unix.Mount("", p.Dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("read-only root: %w", err)
	}
	if err := unix.Chdir(p.Dir); err != nil {
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

// bind shows a file or directory of the host, read-only, at target.
func bind(path, target string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.IsDir() {
		err = os.MkdirAll(target, 0o755)
	} else {
		if err = os.MkdirAll(filepath.Dir(target), 0o755); err == nil {
			err = unix.Mknod(target, unix.S_IFREG|0o444, 0)
		}
	}
	if err != nil {
		return fmt.Errorf("mount point %s: %w", target, err)
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return &os.PathError{Op: "open_tree", Path: path, Err: err}
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return &os.PathError{Op: "mount_setattr", Path: path, Err: err}
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: path, Err: err}
	}
	return nil
}

// drop gives up this thread's user, groups and capabilities for good.
func (p *prison) drop() error {
	for c := 0; ; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
			if err == unix.EINVAL && c > 0 {
				break // past the last one
			}
			return fmt.Errorf("bounding set: %w", err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("ambient set: %w", err)
	}
	id := uintptr(p.UID)
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); e != 0 {
		return os.NewSyscallError("setgroups", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, id, id, id); e != 0 {
		return os.NewSyscallError("setresgid", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, id, id, id); e != 0 {
		return os.NewSyscallError("setresuid", e)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if _, _, e := unix.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0); e != 0 {
		return os.NewSyscallError("capset", e)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	// Changing the user has cleared it.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("death signal: %w", err)
	}
	return nil
}
