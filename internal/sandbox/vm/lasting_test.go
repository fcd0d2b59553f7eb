package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/image/erofs"
	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// limit bounds what waits for a guest, which emulation on a busy host makes slow.
const limit = 3 * time.Minute

func limited(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// host is what a lasting machine runs on: tenon-vmm, and two images.
type host struct {
	t      *testing.T
	dir    string
	v      *VMs
	m      sandbox.Machine
	images [2]string
}

func newHost(t *testing.T) *host {
	t.Helper()
	dir, err := os.MkdirTemp("", "tsv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	endWithUs(t, dir)
	h := &host{t: t, dir: dir}
	cmd := exec.CommandContext(limited(t), "go", "build", "-ldflags", "-s -w", "-o", dir, "tenon.dev/tenon/cmd/tenon-shim", "tenon.dev/tenon/cmd/tenon-vmm")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	box, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	for i := range h.images {
		root := filepath.Join(dir, fmt.Sprintf("root%d", i))
		for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc", "mnt"} {
			if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(root, "bin/busybox"), box, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("busybox", filepath.Join(root, "bin/sh")); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "image"), fmt.Appendf(nil, "%d\n", i), 0o644); err != nil {
			t.Fatal(err)
		}
		h.images[i] = filepath.Join(dir, fmt.Sprintf("image%d", i))
		f, err := os.Create(h.images[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := erofs.Write(limited(t), f, []string{root}, erofs.Options{}); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	cache := os.Getenv("TENON_CACHE")
	if cache == "" {
		cache = "/var/cache/tenon-test"
	}
	cfg := Config{
		Program: filepath.Join(dir, "tenon-vmm"), Shim: filepath.Join(dir, "tenon-shim"), RunRoot: filepath.Join(dir, "run"), Root: filepath.Join(dir, "lib"),
		Name: fmt.Sprintf("tsv%x", os.Getpid()), Accel: "tcg", KernelDir: filepath.Join(cache, "kernel"), CPUs: 1,
	}
	for _, d := range []string{cfg.RunRoot, cfg.Root} {
		if err := os.Mkdir(d, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	h.v = New(cfg)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := h.v.Teardown(ctx); err != nil {
			t.Error(err)
		}
		h.v.Close()
		if left, _ := filepath.Glob("/sys/fs/cgroup/*/" + cfg.Name + "*"); len(left) > 0 { // no bad pattern
			t.Errorf("cgroups are left: %v", left)
		}
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(cfg.RunRoot, "vmm.log"))
			k, _ := os.ReadFile(filepath.Join(dir, "kernel.log"))
			t.Logf("tenon-vmm:\n%s\nguest:\n%s", b, k)
		}
	})
	return h
}

func (h *host) start(memory int64, containers ...string) {
	h.t.Helper()
	begin := time.Now()
	m, err := h.v.Create(limited(h.t), sandbox.MachineRequest{
		ID: "lasts", Hostname: "team-a", Memory: memory, CPUs: 1,
		Lasting: &sandbox.Lasting{
			Name: "team-a", Data: filepath.Join(h.dir, "data"), DataSize: 256 << 20,
			KernelLog: filepath.Join(h.dir, "kernel.log"), Containers: containers,
		},
	})
	if err != nil {
		h.t.Fatal(err)
	}
	h.m = m
	h.t.Logf("it started in %v, processor time of the machine %v", time.Since(begin).Round(time.Millisecond), h.cpu())
}

func (h *host) cpu() time.Duration {
	u, err := h.m.Usage(limited(h.t))
	if err != nil {
		h.t.Error(err)
	}
	return u.CPU.Round(time.Millisecond)
}

func (h *host) log(id string) *taskv1.Log {
	return &taskv1.Log{Driver: logs.Local, Path: filepath.Join(h.dir, id+".log")}
}

// begin starts a container that runs a script.
func (h *host) begin(id, script string, change ...func(*sandbox.MachineHandover, *specs.Spec)) *task.Client {
	h.t.Helper()
	ctx := limited(h.t)
	var bytes int64 = 64 << 20
	s := &specs.Spec{
		Version: specs.Version, Root: &specs.Root{Path: "rootfs"}, Hostname: id,
		Process: &specs.Process{Args: []string{"/bin/sh", "-c", script}, Env: []string{"PATH=/bin"}, Cwd: "/"},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs"},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}},
			Resources:  &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &bytes}},
		},
	}
	hand := sandbox.MachineHandover{ID: id, Disks: sandbox.Disks{Image: h.images[0]}, Log: h.log(id)}
	for _, f := range change {
		f(&hand, s)
	}
	begin := time.Now()
	p, err := h.m.Handover(ctx, hand)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Logf("%s handed over in %v, processor time of the machine %v", id, time.Since(begin).Round(time.Millisecond), h.cpu())
	if p.NetNS != "" {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: p.NetNS})
	}
	for i, path := range p.Shares {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/mnt", Type: "bind", Source: path, Options: []string{"rbind"}})
		_ = i
	}
	b, err := json.Marshal(s)
	if err != nil {
		h.t.Fatal(err)
	}
	c, _, err := h.m.Connect(ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := c.Create(ctx, task.CreateRequest{ID: id, Spec: b, Rootfs: p.Rootfs, Log: &taskv1.Log{Driver: logs.Local, Path: "/the/host/knows"}}); err != nil {
		h.t.Fatal(err)
	}
	if _, err := c.Start(ctx, id, ""); err != nil {
		h.t.Fatal(err)
	}
	return c
}

// end waits for a container's end, takes everything of it back and returns its
// exit status and its output.
func (h *host) end(c *task.Client, id string) (uint32, string) {
	h.t.Helper()
	ctx := limited(h.t)
	defer c.Close()
	x, err := c.Wait(ctx, id, "")
	if err != nil {
		h.t.Fatal(err)
	}
	if err := c.FlushLog(ctx, id); err != nil {
		h.t.Error(err)
	}
	if _, err := c.Delete(ctx, id, ""); err != nil {
		h.t.Fatal(err)
	}
	begin := time.Now()
	if err := h.m.Release(ctx, id); err != nil {
		h.t.Error(err)
	}
	h.t.Logf("%s released in %v, processor time of the machine %v", id, time.Since(begin).Round(time.Millisecond), h.cpu())
	var out bytes.Buffer
	if err := logs.Read(ctx, logs.Config{Driver: logs.Local, Path: h.log(id).Path}, logs.ReadOptions{}, func(m *logs.Message) error {
		fmt.Fprintf(&out, "%s\n", m.Line)
		return nil
	}); err != nil {
		h.t.Error(err)
	}
	if err := logs.Remove(h.log(id).Path); err != nil {
		h.t.Error(err)
	}
	return x.Status, out.String()
}

func (h *host) run(id, script string, change ...func(*sandbox.MachineHandover, *specs.Spec)) (uint32, string) {
	h.t.Helper()
	return h.end(h.begin(id, script, change...), id)
}

// kernel is what a process that is in none of the guest's namespaces sees there.
func (h *host) kernel(script string) string {
	h.t.Helper()
	_, out := h.run("look", script, func(_ *sandbox.MachineHandover, s *specs.Spec) {
		s.Hostname, s.Linux.Namespaces = "", s.Linux.Namespaces[1:2]
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/mnt", Type: "bind", Source: "/run/tenon", Options: []string{"rbind"}},
			specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys", Options: []string{"rbind"}})
	})
	return out
}

// TestLasting has several containers on one machine, stops it, and starts it
// again.
func TestLasting(t *testing.T) {
	h := newHost(t)
	if a, err := h.v.Prepare(limited(t)); err != nil || a.Accel != "tcg" || a.Kernel == "" {
		t.Fatalf("%+v, %v", a, err)
	}
	h.start(512 << 20)
	if h.m.Isolation() != "machine=team-a" || !h.m.Lasting() || h.m.Facts().CPUs != 1 {
		t.Errorf("%s, %+v", h.m.Isolation(), h.m.Facts())
	}
	h.together(t)
	h.sizes(t)
	h.daemon(t)
	h.restart(t)
}

// together has three containers of two images run at once.
func (h *host) together(t *testing.T) {
	share := filepath.Join(h.dir, "share")
	if err := os.Mkdir(share, 0o755); err != nil {
		t.Fatal(err)
	}
	nic := func(id string, n byte) func(*sandbox.MachineHandover, *specs.Spec) {
		return func(x *sandbox.MachineHandover, _ *specs.Spec) {
			tap, err := h.m.AddTap(limited(t), id)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := net.InterfaceByName(tap); err != nil {
				t.Error(err)
			}
			x.NICs = []sandbox.NIC{{Tap: tap, Plug: network.Plug{Interface: "eth0", MTU: 1500, MAC: net.HardwareAddr{2, 0x42, 0, 0, 0, n},
				IPv4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, 0, n}), 24)}}}
			x.Files = []sandbox.File{{Name: "hosts", Mode: 0o644, Data: []byte("127.0.0.1 localhost\n")}}
		}
	}
	// The third has a new interface: two are there from birth.
	a := h.begin("aaa", "ip addr show eth0; cat /image; echo a >/mine; ls /", nic("aaa", 1))
	b := h.begin("bbb", "ip addr show eth0; cat /image; echo b >/mine; cat /mnt/word; echo yes >/mnt/answer", nic("bbb", 2), func(x *sandbox.MachineHandover, _ *specs.Spec) {
		x.Disks.Image = h.images[1]
		x.Shares = []sandbox.Share{{Path: share}}
		if err := os.WriteFile(filepath.Join(share, "word"), []byte("from the host\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	})
	c := h.begin("ccc", "ip addr show eth0; cat /image; ls /mine", nic("ccc", 3))
	taps := slices.Concat(h.m.Taps("aaa"), h.m.Taps("bbb"), h.m.Taps("ccc"))
	if len(taps) != 3 || taps[0] == taps[1] || taps[1] == taps[2] || taps[0] == taps[2] {
		t.Errorf("taps %v", taps)
	}
	for id, x := range map[string]struct {
		c    *task.Client
		want []string
	}{
		"aaa": {a, []string{"10.9.0.1/24", "02:42:00:00:00:01", "\n0\n", "mine"}},
		"bbb": {b, []string{"10.9.0.2/24", "\n1\n", "from the host"}},
		"ccc": {c, []string{"10.9.0.3/24", "\n0\n"}},
	} {
		_, out := h.end(x.c, id)
		for _, w := range x.want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: no %q in:\n%s", id, w, out)
			}
		}
	}
	if b, err := os.ReadFile(filepath.Join(share, "answer")); err != nil || string(b) != "yes\n" {
		t.Errorf("%q, %v", b, err)
	}
	if taps := h.m.Taps("aaa"); len(taps) != 0 {
		t.Errorf("it still has %v", taps)
	}
	// What it wrote is there until it is discarded.
	if err := h.m.Discard(limited(t), "aaa"); err != nil {
		t.Error(err)
	}
	if _, err := h.m.Written(limited(t), "aaa"); !errdefs.IsNotFound(err) {
		t.Errorf("its files are still there: %v", err)
	}
	// What a killed daemon has asked for may come after the removal by the next.
	if _, err := h.m.Handover(limited(t), sandbox.MachineHandover{ID: "aaa", Disks: sandbox.Disks{Image: h.images[0]}}); err == nil || !strings.Contains(err.Error(), "was removed") {
		t.Errorf("made again after its removal: %v", err)
	}
	if !h.m.Holds("aaa") {
		t.Error("it has got nothing")
	}
	if err := h.m.Release(limited(t), "aaa"); err != nil || h.m.Holds("aaa") {
		t.Errorf("what it has got: %v", err)
	}
	h.run("aab", "echo a >/mine")
	// A limit of its own.
	few := func(x *sandbox.MachineHandover, _ *specs.Spec) { x.SizeLimit = 8 << 20 }
	code, out := h.run("ddd", "dd if=/dev/zero of=/big bs=1M count=32 2>&1; stat -c %s /big", few)
	if !strings.Contains(out, "No space left") && !strings.Contains(out, "quota exceeded") {
		t.Errorf("exit %d, %s", code, out)
	}
	if n, err := h.m.Written(limited(t), "aab"); err != nil || n != 4096 {
		t.Errorf("it has written %d bytes, %v", n, err)
	}
	if n, err := h.m.Written(limited(t), "nobody"); !errdefs.IsNotFound(err) {
		t.Errorf("nobody has written %d bytes, %v", n, err)
	}
	if err := h.m.Keep(limited(t), []string{"aab", "bbb"}); err != nil {
		t.Error(err)
	}
	// Only what the one who looks has, and an image that was used just now.
	out = h.kernel("ls /mnt/data/c /mnt/c /mnt/netns; cat /proc/mounts; ls /sys/class/net")
	if want := "/mnt/c:\n\n/mnt/data/c:\naab\nbbb\nlook\n\n/mnt/netns:\nlook\n"; !strings.HasPrefix(out, want) || strings.Contains(out, "fuse") || !strings.Contains(out, "spare-nic2") {
		t.Errorf("in the guest:\n%s", out)
	}
}

// sizes has the machine grow.
func (h *host) sizes(t *testing.T) {
	if err := h.m.Resize(limited(t), 640<<20, 2); err != nil {
		t.Fatal(err)
	}
	if f := h.m.Facts(); f.Memory != 640<<20 || f.CPUs != 2 || f.CPUSet != "0-1" {
		t.Errorf("%+v", f)
	}
	if _, out := h.run("eee", "grep -c ^processor /proc/cpuinfo"); out != "2\n" {
		t.Errorf("processors: %q", out)
	}
	if err := h.m.Resize(limited(t), 0, 1); !errdefs.IsInvalidArgument(err) {
		t.Errorf("one less: %v", err)
	}
	if err := h.m.Resize(limited(t), 0, 3); !errdefs.IsResourceExhausted(err) {
		t.Errorf("more than there can be: %v", err)
	}
	if err := h.m.GrowDisk(limited(t), 512<<20); err != nil {
		t.Fatal(err)
	}
	if err := h.m.GrowDisk(limited(t), 128<<20); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a smaller disk: %v", err)
	}
	u, err := h.m.Usage(limited(t))
	if err != nil || u.DiskSize < 400<<20 || u.MemoryTotal < 540<<20 || u.CPU <= 0 || u.HostPrivate < 32<<20 || u.DiskOnHost <= 0 {
		t.Errorf("%+v, %v", u, err)
	}
	// What is deleted goes back to the host.
	h.run("big", "dd if=/dev/zero of=/big bs=1M count=64 2>/dev/null; sync")
	full, err := h.m.Usage(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.m.Discard(limited(t), "big"); err != nil {
		t.Error(err)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		u, err := h.m.Usage(limited(t))
		if err != nil {
			t.Fatal(err)
		}
		if u.DiskOnHost < full.DiskOnHost-(48<<20) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the disk had %d bytes, and has %d", full.DiskOnHost, u.DiskOnHost)
		}
	}
}

// daemon is another one that finds the machine, with a container that runs.
func (h *host) daemon(t *testing.T) {
	c := h.begin("stays", "sleep 1000", func(x *sandbox.MachineHandover, _ *specs.Spec) {
		tap, err := h.m.AddTap(limited(t), "stays")
		if err != nil {
			t.Fatal(err)
		}
		x.NICs = []sandbox.NIC{{Tap: tap, Plug: network.Plug{Interface: "eth0", MTU: 1500, MAC: net.HardwareAddr{2, 0x42, 0, 0, 0, 9}}}}
		x.Shares = []sandbox.Share{{Path: filepath.Join(h.dir, "share")}}
	})
	old := h.v
	h.v = New(old.cfg)
	old.Close()
	list, err := h.v.List(limited(t))
	if err != nil || len(list) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	h.m = list[0]
	if h.m.Isolation() != "machine=team-a" || len(h.m.Taps("stays")) != 1 || h.m.Facts().CPUs != 2 || h.m.Facts().Memory != 640<<20 {
		t.Errorf("%s, %v, %+v", h.m.Isolation(), h.m.Taps("stays"), h.m.Facts())
	}
	r := h.m.Root("stays", true)
	if !strings.Contains(strings.Join(r.Mounts[0].Options, ","), "/run/tenon/images/disk0") {
		t.Errorf("its root: %v", r)
	}
	if err := c.Kill(limited(t), "stays", "", 9, false); err != nil {
		t.Error(err)
	}
	h.end(c, "stays")
	if out := h.kernel("ls /mnt/netns /mnt/c; cat /proc/mounts"); strings.Contains(out, "tenon:") || strings.Contains(out, "stays") {
		t.Errorf("something is left:\n%s", out)
	}
}

// restart stops the machine and starts it again, with one container less, and
// kills it.
func (h *host) restart(t *testing.T) {
	if err := h.m.PowerOff(limited(t)); err != nil {
		t.Fatal(err)
	}
	if h.m.End() != "power off" {
		t.Errorf("it ended: %s", h.m.End())
	}
	if err := h.m.Remove(limited(t)); err != nil {
		t.Fatal(err)
	}
	h.start(256<<20, "bbb") // less than what others are copied from
	if h.m.Proof().Origin != "boot" {
		t.Errorf("its origin: %s", h.m.Proof().Origin)
	}
	if _, out := h.run("bbb", "cat /mine", func(x *sandbox.MachineHandover, _ *specs.Spec) { x.Disks.Image = h.images[1] }); out != "b\n" {
		t.Errorf("%q", out)
	}
	if u, err := h.m.Usage(limited(t)); err != nil || u.DiskSize < 400<<20 {
		t.Errorf("%+v, %v", u, err)
	}
	c := h.begin("ccc", "ls /mine; sleep 1000") // its files of before are gone
	defer c.Close()
	p, err := os.FindProcess(h.m.Proof().Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-h.m.Ended():
	case <-limited(t).Done():
		t.Fatal("its end is not known")
	}
	if !strings.Contains(h.m.End(), "SIGKILL") {
		t.Errorf("reason %q", h.m.End())
	}
	if err := h.m.Release(limited(t), "ccc"); err != nil {
		t.Errorf("of a machine that is gone: %v", err)
	}
	if err := h.m.Remove(limited(t)); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(filepath.Join(h.dir, "kernel.log")); err != nil || bytes.Count(b, []byte("Power down")) != 1 {
		t.Errorf("kernel log: %v\n%s", err, b)
	}
}
