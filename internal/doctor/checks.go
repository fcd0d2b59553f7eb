package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	nft "github.com/google/nftables"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/network/shortcut"
	"tenon.dev/tenon/internal/userns"
	"tenon.dev/tenon/internal/vm/accel"
)

func kernel(context.Context, Options) Check {
	c := Check{Name: "kernel", Required: true, Status: OK}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		c.Status, c.Detail = Missing, err.Error()
		return c
	}
	c.Detail = unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])
	major, rest, _ := strings.Cut(unix.ByteSliceToString(u.Release[:]), ".")
	minor, _, _ := strings.Cut(rest, ".")
	a, _ := strconv.Atoi(major) // 0 if odd: reported as too old
	b, _ := strconv.Atoi(minor)
	if a < 5 || a == 5 && b < 14 {
		c.Status, c.Remedy = Missing, "use Linux 5.14 or newer (Debian 12 has 6.1)"
	}
	return c
}

// capabilities that the engine needs as a daemon on the host.
var needed = map[uint]string{
	unix.CAP_SYS_ADMIN: "SYS_ADMIN", unix.CAP_NET_ADMIN: "NET_ADMIN", unix.CAP_MKNOD: "MKNOD",
	unix.CAP_CHOWN: "CHOWN", unix.CAP_DAC_OVERRIDE: "DAC_OVERRIDE", unix.CAP_SETUID: "SETUID",
	unix.CAP_SETGID: "SETGID", unix.CAP_SYS_CHROOT: "SYS_CHROOT", unix.CAP_SETPCAP: "SETPCAP",
	unix.CAP_KILL: "KILL", unix.CAP_FOWNER: "FOWNER",
}

func privileges(context.Context, Options) Check {
	c := Check{Name: "privileges", Required: true, Status: OK, Detail: "root with all that is needed"}
	var data [2]unix.CapUserData
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&h, &data[0]); err != nil {
		c.Status, c.Detail = Missing, err.Error()
		return c
	}
	has := func(n uint) bool { return data[n/32].Effective&(1<<(n%32)) != 0 }
	var lack []string
	for n, name := range needed {
		if !has(n) {
			lack = append(lack, name)
		}
	}
	switch {
	case len(lack) > 0:
		c.Status, c.Detail = Missing, "capabilities "+strings.Join(lack, ", ")+" are missing"
		c.Remedy = "start tenond as root, outside of other containers"
	case !has(unix.CAP_SYS_RESOURCE):
		c.Status, c.Detail = Warn, "no SYS_RESOURCE: limits can't be raised and OOM scores can't be lowered"
		c.Remedy = "give tenond CAP_SYS_RESOURCE, or don't ask for ulimits above the daemon's own"
	}
	return c
}

func cgroups(context.Context, Options) Check {
	c := Check{Name: "cgroups", Required: true, Status: OK}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil {
		c.Status, c.Detail, c.Remedy = Missing, err.Error(), "mount cgroup2 on /sys/fs/cgroup"
		return c
	}
	want := []string{"memory", "cpu", "pids", "cpuset"}
	have := map[string]bool{}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		b, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
		if err != nil {
			c.Status, c.Detail = Missing, err.Error()
			return c
		}
		for _, name := range strings.Fields(string(b)) {
			have[name] = true
		}
		c.Detail = "version 2: " + strings.TrimSpace(string(b))
	} else {
		entries, _ := os.ReadDir("/sys/fs/cgroup") // empty shows as everything missing
		var names []string
		for _, e := range entries {
			for part := range strings.SplitSeq(e.Name(), ",") {
				if exists(filepath.Join("/sys/fs/cgroup", e.Name(), "cgroup.procs")) {
					have[part] = true
					names = append(names, part)
				}
			}
		}
		c.Detail = "version 1: " + strings.Join(names, " ")
		if len(names) == 0 {
			c.Status, c.Detail, c.Remedy = Missing, "no hierarchy is mounted on /sys/fs/cgroup", "mount cgroup2 on /sys/fs/cgroup"
			return c
		}
	}
	for _, name := range want {
		if !have[name] {
			c.Status = Warn
			c.Remedy += name + " limits can't be had: enable the controller on the kernel's command line (cgroup_enable=" + name + "). "
		}
	}
	c.Remedy = strings.TrimSpace(c.Remedy)
	return c
}

func overlay(_ context.Context, o Options) Check {
	c := Check{Name: "overlayfs", Required: true, Status: OK, Detail: "available"}
	b, err := os.ReadFile("/proc/filesystems")
	if err == nil && !strings.Contains(string(b), "\toverlay\n") && !moduleThere("overlay") {
		c.Status, c.Detail, c.Remedy = Missing, "the kernel has no overlay file system", "modprobe overlay"
		return c
	}
	root := o.Root
	for root != "" && root != "/" && !exists(root) {
		root = filepath.Dir(root)
	}
	var st unix.Statfs_t
	if root == "" || unix.Statfs(root, &st) != nil {
		return c
	}
	switch st.Type {
	case unix.OVERLAYFS_SUPER_MAGIC:
		c.Status, c.Detail = Missing, o.Root+" lies on an overlay itself, which can't hold another's upper layer"
		c.Remedy = "put --root on ext4, xfs, btrfs or tmpfs"
	case unix.NFS_SUPER_MAGIC:
		c.Status, c.Detail, c.Remedy = Missing, o.Root+" lies on NFS", "put --root on a local file system"
	default:
		c.Detail += fmt.Sprintf(", state under %s (file system %#x, %d GiB free)", o.Root, st.Type, st.Bavail*uint64(st.Bsize)>>30)
	}
	return c
}

// moduleThere says that a module could be loaded by name.
func moduleThere(name string) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	b, err := os.ReadFile("/lib/modules/" + unix.ByteSliceToString(u.Release[:]) + "/modules.dep")
	return err == nil && strings.Contains(string(b), "/"+name+".ko")
}

func nftables(context.Context, Options) Check {
	c := Check{Name: "nftables", Required: true, Status: OK, Detail: "answers over netlink"}
	conn, err := nft.New()
	if err == nil {
		_, err = conn.ListTables()
	}
	if err != nil {
		c.Status, c.Detail = Missing, err.Error()
		c.Remedy = "modprobe nf_tables nft_chain_nat (the nft program is not needed)"
	}
	return c
}

// shortcuts tells whether frames may go past the bridges.
func shortcuts(context.Context, Options) Check {
	p, err := shortcut.Open()
	if err != nil {
		return Check{Name: "shortcuts", Status: Warn, Detail: "frames go by the bridges, which is slower: " + err.Error(),
			Remedy: "let the daemon use bpf(2): CAP_BPF and CAP_NET_ADMIN, a kernel with CONFIG_BPF_SYSCALL, CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF"}
	}
	p.Close()
	return Check{Name: "shortcuts", Status: OK, Detail: "frames between containers and the host need not go by the bridges"}
}

func namespaces(context.Context, Options) Check {
	c := Check{Name: "namespaces", Required: true, Status: OK}
	var have, lack []string
	for _, ns := range []string{"mnt", "pid", "net", "ipc", "uts", "cgroup", "user", "time"} {
		if exists("/proc/self/ns/" + ns) {
			have = append(have, ns)
		} else {
			lack = append(lack, ns)
		}
	}
	c.Detail = strings.Join(have, " ")
	if len(lack) > 0 {
		c.Status, c.Detail = Missing, "missing: "+strings.Join(lack, " ")
		c.Remedy = "use a kernel with all namespaces (CONFIG_NAMESPACES and its children)"
	}
	var st unix.Statx_t
	if unix.Statx(unix.AT_FDCWD, "/", 0, unix.STATX_TYPE, &st) == nil && st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		c.Status, c.Detail = Missing, "/ is not the root of a mount (tenond runs in a chroot): the kernel lets nobody change the root there"
		c.Remedy = "enter the tree by pivot_root (as unshare, systemd-nspawn and test/fresh/run do) instead of chroot, or mount --bind DIR DIR before the chroot"
		return c
	}
	b, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	if err == nil && strings.TrimSpace(string(b)) == "0" {
		c.Status, c.Remedy = Warn, "sysctl user.max_user_namespaces=15000 (for --userns)"
	}
	return c
}

// userNamespaces makes one, and asks the kernel to map a mount of the state root to
// its ids. Only containers with --userns need it.
func userNamespaces(_ context.Context, o Options) Check {
	const remedy = "only --userns auto needs it: "
	c := Check{Name: "userns", Status: OK}
	ns, err := userns.New(userns.Range{Start: 1 << 30, Size: 1}, false)
	if err != nil {
		c.Status, c.Detail = Warn, err.Error()
		c.Remedy = remedy + "sysctl user.max_user_namespaces=15000, and a kernel with CONFIG_USER_NS"
		return c
	}
	defer ns.Close()
	root := o.Root
	for root != "/" && !exists(root) {
		root = filepath.Dir(filepath.Join("/", root))
	}
	if err := ns.OverlayMappable(root); err != nil {
		c.Status, c.Detail = Warn, err.Error()
		c.Remedy = remedy + "Linux 5.19 or newer, and --root on ext4, xfs or btrfs"
		return c
	}
	c.Detail = "user namespaces, and overlays of idmapped layers under " + root + " (for --userns auto)"
	return c
}

func seccomp(context.Context, Options) Check {
	c := Check{Name: "seccomp", Required: true, Status: OK}
	b, err := os.ReadFile("/proc/sys/kernel/seccomp/actions_avail")
	if err != nil {
		c.Status, c.Detail, c.Remedy = Missing, err.Error(), "use a kernel with CONFIG_SECCOMP_FILTER"
		return c
	}
	c.Detail = strings.TrimSpace(string(b))
	return c
}

func helpers(_ context.Context, o Options) Check {
	c := Check{Name: "programs", Required: true, Status: OK, Detail: strings.Join(o.Helpers, " ")}
	for _, p := range o.Helpers {
		if err := unix.Access(p, unix.X_OK); err != nil {
			c.Status, c.Detail = Missing, fmt.Sprintf("%s: %v", p, err)
			c.Remedy = "put tenon-shim and tenon-dns beside tenond (make build does)"
		}
	}
	return c
}

// InitPaths are where an init for --init is looked for, in this order.
var InitPaths = []string{"/usr/libexec/tenon/init", "/usr/bin/tini-static", "/usr/bin/docker-init", "/usr/libexec/docker/docker-init", "/usr/bin/catatonit", "/usr/libexec/podman/catatonit"}

func initProgram(context.Context, Options) Check {
	c := Check{Name: "init", Status: OK}
	for _, p := range InitPaths {
		if exists(p) {
			c.Detail = p
			return c
		}
	}
	c.Status, c.Detail = Warn, "no init for `run --init`"
	c.Remedy = "apt-get install tini"
	return c
}

func qemu(ctx context.Context, _ Options) Check {
	c := Check{Name: "qemu", Status: OK}
	path, err := exec.LookPath(qemuName())
	if err != nil {
		c.Status, c.Detail = Warn, qemuName()+" is not installed; --isolation vm needs it"
		c.Remedy = "apt-get install --no-install-recommends qemu-system-x86"
		return c
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		c.Status, c.Detail = Warn, fmt.Sprintf("%s --version: %v", path, err)
		return c
	}
	line, _, _ := strings.Cut(string(out), "\n")
	c.Detail = path + ": " + line
	var major, minor int
	if _, err := fmt.Sscanf(line, "QEMU emulator version %d.%d", &major, &minor); err != nil || major < 7 || major == 7 && minor < 2 {
		c.Status, c.Remedy = Warn, "use QEMU 7.2 or newer"
	}
	return c
}

func mkfs(context.Context, Options) Check {
	c := Check{Name: "mkfs.ext4", Status: OK}
	for _, p := range []string{"/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"} { // as rootfs looks for it
		if _, err := os.Stat(p); err == nil {
			c.Detail = p
			return c
		}
	}
	path, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		c.Status, c.Detail = Warn, "not installed; --isolation vm and limits of the writable layer (--storage-opt size) need it"
		c.Remedy = "apt-get install e2fsprogs"
		return c
	}
	c.Detail = path
	return c
}

func guestKernel(context.Context, Options) Check {
	c := Check{Name: "guest kernel", Status: OK}
	found, _ := filepath.Glob("/boot/vmlinuz-*") // the pattern is well-formed
	if len(found) == 0 {
		c.Detail = "none in /boot; for --isolation vm Debian's is fetched, or vm.kernel names one"
		return c
	}
	c.Detail = found[len(found)-1]
	return c
}

func kvm(ctx context.Context, _ Options) Check {
	c := Check{Name: "kvm", Status: OK}
	err := probeKVM(ctx)
	path, lookErr := exec.LookPath(qemuName())
	if err == nil && lookErr == nil {
		err = accel.Probe(ctx, path, "kvm")
	}
	switch {
	case err == nil && lookErr == nil:
		c.Detail = "a tiny guest runs"
	case err == nil:
		c.Detail = "a virtual CPU runs; whether a guest kernel does is seen once QEMU is installed"
	case errors.Is(err, os.ErrNotExist):
		c.Status, c.Detail = Warn, "no /dev/kvm: virtual machines would be emulated (slow)"
		c.Remedy = "switch virtualization on in the firmware, or nested virtualization in the cloud; modprobe kvm_intel or kvm_amd"
	default:
		c.Status, c.Detail = Warn, "unusable: "+err.Error()+"; virtual machines would be emulated (slow)"
		c.Remedy = "use a host whose hypervisor offers nested virtualization in hardware"
	}
	return c
}
