package guest_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/channel/mux"
	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/shim/guest"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	"tenon.dev/tenon/internal/vm/kernel"
)

// limit bounds everything that waits for the guest, which software emulation
// makes slow.
const limit = 4 * time.Minute

// machine is a guest that was booted for a test.
type machine struct {
	t       *testing.T
	session *mux.Session
	task    *task.Client
	guest   taskv1.GuestService
	console *os.File
	done    chan error // of QEMU
	dir     string
}

// bootGuest boots Debian's kernel with the shim as init; args are further
// arguments of QEMU.
func bootGuest(t *testing.T, args ...string) *machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	m := &machine{t: t, dir: t.TempDir(), done: make(chan error, 1)}
	cache := os.Getenv("TENON_CACHE")
	if cache == "" {
		cache = "/var/cache/tenon-test"
	}
	k, err := kernel.Find(ctx, kernel.Config{Dir: filepath.Join(cache, "kernel")})
	if err != nil {
		t.Fatal(err)
	}
	init := filepath.Join(m.dir, "tenon-shim")
	build := exec.CommandContext(ctx, "go", "build", "-ldflags", "-s -w", "-o", init, "tenon.dev/tenon/cmd/tenon-shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	initrd, err := k.Initramfs(ctx, m.dir, kernel.Files{Init: init})
	if err != nil {
		t.Fatal(err)
	}
	if m.console, err = os.Create(filepath.Join(m.dir, "console")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(m.console.Name())
			t.Logf("console:\n%s", b)
		}
		m.console.Close()
	})
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	all := append([]string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "512M", "-accel", "tcg", "-cpu", "max", "-M", "q35,hpet=off,vmport=off,usb=off,sata=off,smbus=off,smm=off,graphics=off",
		"-kernel", k.Image, "-initrd", initrd.Path, "-append", "console=ttyS0 quiet loglevel=5 mitigations=off random.trust_cpu=on no_timer_check",
		"-serial", "stdio", "-device", "virtio-serial-pci", "-chardev", "socket,id=ag,fd=3", "-device", "virtserialport,chardev=ag,name=" + guest.PortName,
	}, args...)
	cmd := exec.Command("qemu-system-x86_64", all...)
	cmd.Stdout, cmd.Stderr = m.console, m.console
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	go func() { m.done <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		select {
		case <-m.done:
		case <-time.After(time.Minute):
			t.Error("QEMU does not end")
		}
	})
	m.session = mux.New(conn, mux.Config{Host: true})
	t.Cleanup(func() { m.session.Close() })
	if err := m.session.Ping(ctx); err != nil {
		t.Fatalf("the guest does not answer: %v", err)
	}
	if m.task, err = task.New(ctx, m.session); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.task.Close() })
	c, err := m.session.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	rpc := ttrpc.NewClient(c)
	t.Cleanup(func() { rpc.Close() })
	m.guest = taskv1.NewGuestClient(rpc)
	return m
}

func (m *machine) context() context.Context {
	ctx, cancel := context.WithTimeout(m.t.Context(), limit)
	m.t.Cleanup(cancel)
	return ctx
}

func (m *machine) apply(steps ...*taskv1.Step) *taskv1.ApplyResponse {
	m.t.Helper()
	r, err := m.guest.Apply(m.context(), &taskv1.ApplyRequest{Steps: steps})
	if err != nil {
		m.t.Fatal(err)
	}
	return r
}

// serveHost answers the streams that the guest opens: logs go to files named
// by the container.
func (m *machine) serveHost() {
	go func() {
		for {
			c, err := m.session.Accept()
			if err != nil {
				return
			}
			go m.stream(c.(channel.Conn))
		}
	}()
}

func (m *machine) stream(c channel.Conn) {
	defer c.Close()
	h := new(taskv1.HostHeader)
	if err := channel.ReadMessage(c, h); err != nil {
		m.t.Error("header:", err)
		return
	}
	switch k := h.Kind.(type) {
	case *taskv1.HostHeader_Log:
		w, err := logs.Open(m.log(k.Log.Id), nil)
		if err != nil {
			m.t.Error(err)
			return
		}
		defer w.Close()
		if err := channel.WriteMessage(c, &taskv1.StreamReply{}); err != nil {
			return
		}
		if err := logs.Receive(c, w); err != nil {
			m.t.Error(err)
		}
	case *taskv1.HostHeader_Share:
		if err := channel.WriteMessage(c, &taskv1.StreamReply{}); err == nil {
			answerFUSE(c)
		}
	}
}

func (m *machine) log(id string) logs.Config {
	return logs.Config{Driver: logs.Local, Path: filepath.Join(m.dir, id+".log")}
}

// answerFUSE is a file system with one empty directory, which its readers are
// told the size of.
func answerFUSE(c net.Conn) {
	for {
		var h [40]byte // struct fuse_in_header
		if _, err := io.ReadFull(c, h[:]); err != nil {
			return
		}
		size, opcode, unique := binary.NativeEndian.Uint32(h[:]), binary.NativeEndian.Uint32(h[4:]), binary.NativeEndian.Uint64(h[8:])
		if _, err := io.CopyN(io.Discard, c, int64(size)-40); err != nil {
			return
		}
		body, errno := []byte(nil), int32(0)
		switch opcode {
		case 26: // FUSE_INIT: 7.31
			body = make([]byte, 64)
			binary.NativeEndian.PutUint32(body, 7)
			binary.NativeEndian.PutUint32(body[4:], 31)
			binary.NativeEndian.PutUint32(body[20:], 1<<16) // max_write
		case 3: // FUSE_GETATTR
			body = make([]byte, 16+88)
			binary.NativeEndian.PutUint64(body[16:], 1)         // inode
			binary.NativeEndian.PutUint64(body[24:], 12345)     // size
			binary.NativeEndian.PutUint32(body[16+60:], 040755) // mode
			binary.NativeEndian.PutUint32(body[16+64:], 2)      // links
		case 2, 36, 42: // FORGET, INTERRUPT, BATCH_FORGET have no answer
			continue
		case 38: // DESTROY
		default:
			errno = -int32(syscall.ENOSYS)
		}
		out := binary.NativeEndian.AppendUint32(nil, uint32(16+len(body)))
		out = binary.NativeEndian.AppendUint32(out, uint32(errno))
		out = binary.NativeEndian.AppendUint64(out, unique)
		if _, err := c.Write(append(out, body...)); err != nil {
			return
		}
	}
}

// busyboxDisk is an ext4 file system with busybox in it.
func busyboxDisk(t *testing.T, dir string) string {
	t.Helper()
	root := filepath.Join(dir, "root")
	for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc", "share"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sh", "uname", "cat", "echo", "ls", "id", "ip", "stat", "sleep", "hostname", "mount"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	img := filepath.Join(dir, "root.img")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 64<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-d", root, img).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	return img
}

const containerSpec = `{"ociVersion":"1.0.2","process":{"args":["/bin/sh","-c",%q],"env":["PATH=/bin"],"cwd":"/","user":{"uid":0,"gid":0},"noNewPrivileges":true},
"root":{"path":"rootfs"},"hostname":"c1","mounts":[{"destination":"/proc","type":"proc","source":"proc"},{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","mode=755"]},
{"destination":"/share","type":"bind","source":"/run/tenon/shares/data","options":["rbind"]}],
"linux":{"namespaces":[{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"cgroup"},{"type":"network","path":"/run/tenon/netns/c1"}],
"resources":{"memory":{"limit":67108864},"pids":{"limit":100}}}}`

// run runs a shell script in a container and returns its exit status and output.
func (m *machine) run(id, script string) (uint32, string) {
	m.t.Helper()
	ctx := m.context()
	_, err := m.task.Create(ctx, task.CreateRequest{
		ID: id, Spec: fmt.Appendf(nil, containerSpec, script), Log: &taskv1.Log{Driver: logs.Local, Path: "/the/host/knows"},
		Rootfs: []task.Mount{{Type: "bind", Source: "/run/tenon/roots/c1", Options: []string{"rbind"}}},
	})
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := m.task.Start(ctx, id, ""); err != nil {
		m.t.Fatal(err)
	}
	exit, err := m.task.Wait(ctx, id, "")
	if err != nil {
		m.t.Fatal(err)
	}
	var b bytes.Buffer
	err = logs.Read(ctx, m.log(id), logs.ReadOptions{}, func(msg *logs.Message) error {
		fmt.Fprintf(&b, "%s\n", msg.Line)
		return nil
	})
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := m.task.Delete(ctx, id, ""); err != nil {
		m.t.Fatal(err)
	}
	return exit.Status, b.String()
}

// TestGuest boots a guest and does there what the host does for containers.
func TestGuest(t *testing.T) {
	dir := t.TempDir()
	disk := busyboxDisk(t, dir)
	m := bootGuest(t,
		"-drive", "file="+disk+",format=raw,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0,serial=root",
		"-netdev", "hubport,id=n0,hubid=0", "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56,romfile=")
	m.serveHost()
	now := time.Now()
	id := m.apply(&taskv1.Step{Kind: &taskv1.Step_Identity{Identity: &taskv1.Identity{
		Seed: bytes.Repeat([]byte("seed"), 8), Time: now.Add(time.Hour).UnixNano(), Hostname: "guest-1", MachineId: strings.Repeat("a", 32),
	}}}).Identity
	host, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	if id.BootId == "" || id.BootId == strings.TrimSpace(string(host)) || id.KernelRelease == "" {
		t.Errorf("identity %v", id)
	}
	m.apply(
		&taskv1.Step{Kind: &taskv1.Step_Mount{Mount: &taskv1.GuestMount{Type: "ext4", Source: "serial:root", Target: "/run/tenon/roots/c1"}}},
		&taskv1.Step{Kind: &taskv1.Step_Netns{Netns: &taskv1.NetNS{Path: "/run/tenon/netns/c1", Sysctls: map[string]string{"net.ipv4.ping_group_range": "0 2147483647"}}}},
		&taskv1.Step{Kind: &taskv1.Step_Interface{Interface: &taskv1.Interface{
			Mac: "52:54:00:12:34:56", Netns: "/run/tenon/netns/c1", Name: "eth0", NewMac: "02:42:0a:00:00:05", Mtu: 1400,
			Addresses: []string{"10.0.0.5/24", "fd00::5/64"}, Routes: []*taskv1.Interface_Route{{Gateway: "10.0.0.1"}, {Gateway: "fd00::1"}},
			Sysctls: []*taskv1.Sysctl{{Name: "net/ipv4/conf/eth0/log_martians", Value: "1"}},
		}}},
		&taskv1.Step{Kind: &taskv1.Step_Share{Share: &taskv1.Share{Tag: "data", Target: "/run/tenon/shares/data"}}},
		&taskv1.Step{Kind: &taskv1.Step_File{File: &taskv1.File{Path: "/run/tenon/files/x", Mode: 0o600, Data: []byte("x")}}},
		&taskv1.Step{Kind: &taskv1.Step_Sysctl{Sysctl: &taskv1.Sysctl{Name: "vm.swappiness", Value: "10"}}},
		&taskv1.Step{Kind: &taskv1.Step_Online{Online: &taskv1.Online{}}},
	)
	status, out := m.run("c1", `uname -r; hostname; id -u; cat /proc/self/cgroup; cat /sys/class/net/eth0/address 2>/dev/null; ip addr show dev eth0; ip route; ip -6 route; stat -c %s /share; echo martians $(cat /proc/sys/net/ipv4/conf/eth0/log_martians); echo oops >&2; exit 7`)
	if status != 7 {
		t.Errorf("exit %d", status)
	}
	for _, want := range []string{id.KernelRelease + "\nc1\n0\n0::/\n", "link/ether 02:42:0a:00:00:05", "mtu 1400", "inet 10.0.0.5/24 brd 10.0.0.255", "inet6 fd00::5/64",
		"default via 10.0.0.1 dev eth0", "default via fd00::1 dev eth0", "\n12345\n", "\nmartians 1\n", "oops\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	// A million bytes in lines arrive, and a second container on the same kernel works.
	status, out = m.run("c2", `i=0; while [ $i -lt 2000 ]; do echo "line $i 0123456789012345678901234567890123456789"; i=$((i+1)); done`)
	if lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n"); status != 0 || len(lines) != 2000 || !strings.HasPrefix(lines[1999], "line 1999 ") {
		t.Errorf("exit %d, %d lines", status, len(lines))
	}
	info, err := m.task.Info(m.context())
	if err != nil {
		t.Fatal(err)
	}
	if info.BootId != id.BootId || info.CgroupVersion != "2" || info.ShimPid != 1 {
		t.Errorf("info %v", info)
	}
	if u, err := m.guest.Usage(m.context(), &taskv1.UsageRequest{}); err != nil || u.MemoryTotal < 400<<20 || u.MemoryFree == 0 || u.Cpus != 1 {
		t.Errorf("usage %v, %v", u, err)
	}
	m.apply(
		&taskv1.Step{Kind: &taskv1.Step_Interface{Interface: &taskv1.Interface{Mac: "02:42:0a:00:00:05", Netns: "/run/tenon/netns/c1", Name: "nic0", Remove: true}}},
		&taskv1.Step{Kind: &taskv1.Step_Netns{Netns: &taskv1.NetNS{Path: "/run/tenon/netns/c1", Remove: true}}},
		&taskv1.Step{Kind: &taskv1.Step_Unmount{Unmount: &taskv1.Unmount{Target: "/run/tenon/shares/data"}}},
		&taskv1.Step{Kind: &taskv1.Step_Unmount{Unmount: &taskv1.Unmount{Target: "/run/tenon/roots/c1"}}},
	)
	if _, err := m.guest.Apply(m.context(), &taskv1.ApplyRequest{Steps: []*taskv1.Step{{Kind: &taskv1.Step_Mount{Mount: &taskv1.GuestMount{Type: "nofs", Source: "x", Target: "/x"}}}}}); err == nil || !strings.Contains(err.Error(), "step 1 (mount)") {
		t.Errorf("bad step: %v", err)
	}
	if _, err := m.guest.PowerOff(m.context(), &taskv1.PowerOffRequest{}); err != nil {
		t.Logf("power off: %v", err) // the answer may not arrive
	}
	select {
	case err := <-m.done:
		m.done <- err
		if err != nil {
			t.Errorf("QEMU: %v", err)
		}
	case <-time.After(limit):
		t.Fatal("the guest does not power off")
	}
	if out, err := exec.Command("e2fsck", "-fn", disk).CombinedOutput(); err != nil {
		t.Errorf("the disk was left unclean: %v\n%s", err, out)
	}
}
