package guest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// ModuleList is the file of the initramfs that names the modules to load, one
// path with perhaps parameters on a line, in the order of their dependencies.
const ModuleList = "/modules/order"

// secondStage is init's argument when it runs in its own root.
const secondStage = "stage2"

// mount is one of the file systems that the guest itself needs.
type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

var firstMounts = []mount{
	{"dev", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=755"},
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
}

var secondMounts = []mount{
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"},
	{"mqueue", "/dev/mqueue", "mqueue", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"shm", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"run", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	{"tmp", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"cgroup", "/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
}

// boot returns in the second stage, when the kernel is ready for containers.
func boot() error {
	if len(os.Args) > 1 && os.Args[1] == secondStage {
		return second()
	}
	return first()
}

func mountAll(list []mount) error {
	for _, m := range list {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
	}
	return nil
}

// first loads the modules and moves from the initramfs, whose memory is given
// back and in which pivot_root(2) does not work, to a tmpfs.
func first() error {
	if err := mountAll(firstMounts); err != nil {
		return err
	}
	if err := loadModules(ModuleList); err != nil {
		return err
	}
	const root = "/newroot"
	if err := mountAll([]mount{{"root", root, "tmpfs", 0, "mode=755"}}); err != nil {
		return err
	}
	if err := copyFile("/proc/self/exe", root+"/init"); err != nil {
		return err
	}
	for _, d := range []string{"/dev", "/proc", "/sys"} {
		if err := os.MkdirAll(root+d, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(d, root+d, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", d, err)
		}
	}
	for _, d := range []string{"/etc", "/tmp", "/run", "/root", "/var"} {
		if err := os.MkdirAll(root+d, 0o755); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"/etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "/etc/group": "root:x:0:\ntty:x:5:\n", "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
	} {
		if err := os.WriteFile(root+name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, p := range []string{"/modules", "/init"} { // their memory
		if err := os.RemoveAll(p); err != nil {
			return err
		}
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	err := unix.Exec("/init", []string{"/init", secondStage}, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"})
	return fmt.Errorf("exec /init: %w", err)
}

// second prepares what lasts.
func second() error {
	if err := mountAll(secondMounts); err != nil {
		return err
	}
	for link, target := range map[string]string{"/dev/fd": "/proc/self/fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2"} {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return err
	}
	if err := makeBase(Base, 0); err != nil {
		return err
	}
	limit := unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return os.NewSyscallError("setrlimit", err)
	}
	for name, value := range map[string]string{
		"/sys/devices/system/memory/auto_online_blocks": "online",
		"/proc/sys/net/ipv4/ip_forward":                 "1",  // as a host of containers has it: their namespaces copy it
		"/proc/sys/kernel/panic":                        "-1", // a panic ends the machine, and is reported
		"/proc/sys/kernel/panic_on_oops":                "1",
		"/proc/sys/vm/panic_on_oom":                     "0",
	} {
		if err := os.WriteFile(name, []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if isEmulated() {
		// A filter is translated twice, by the kernel and then by the emulator, and
		// most run once.
		if err := os.WriteFile("/proc/sys/net/core/bpf_jit_enable", []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return loopbackUp()
}

// Base is the lowest layer of all roots: the mount points that every container needs
// and few images have, and what programs look for (as internal/rootfs makes on hosts).
const Base = runDir + "/base"

// makeBase makes it, or another of another owner (user and group).
func makeBase(base string, owner int) error {
	dirs := []string{"", "/dev", "/etc", "/proc", "/sys"}
	files := []string{"/.dockerenv", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}
	const mtab = "/etc/mtab"
	for _, d := range dirs {
		if err := os.Mkdir(base+d, 0o755); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := os.WriteFile(base+f, nil, 0o755); err != nil {
			return err
		}
		if err := os.Chmod(base+f, 0o755); err != nil { // whatever the umask
			return err
		}
	}
	if err := os.Symlink("/proc/mounts", base+mtab); err != nil || owner == 0 {
		return err
	}
	for _, f := range slices.Concat(dirs, files, []string{mtab}) {
		if err := os.Lchown(base+f, owner, owner); err != nil {
			return err
		}
	}
	return nil
}

// loadModules loads the modules that a list names.
func loadModules(list string) error {
	f, err := os.Open(list)
	if errors.Is(err, os.ErrNotExist) {
		return nil // all is built in
	}
	if err != nil {
		return err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); ; {
		if !lines.Scan() {
			return lines.Err()
		}
		path, params, _ := strings.Cut(strings.TrimSpace(lines.Text()), " ")
		if path == "" {
			continue
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(list), path)
		}
		if err := loadModule(path, params); err != nil {
			return fmt.Errorf("module %s: %w", path, err)
		}
	}
}

func loadModule(path, params string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), params, 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
