package vmm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/cgroup"
	"tenon.dev/tenon/internal/image/erofs"
	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
	"tenon.dev/tenon/internal/vm/qemu"
)

// limit bounds everything that waits for a guest, which software emulation on a
// busy machine makes slow.
const limit = 3 * time.Minute

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == qemu.JailArg {
		qemu.Jailed(os.Args[2])
	}
	if len(os.Args) > 1 && os.Args[1] == ShareArg {
		if err := Shared(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	if shared.dir != "" {
		os.RemoveAll(shared.dir)
	}
	os.Exit(code)
}

// shared is what the tests make once: the shim, images, and the template.
var shared struct {
	once         sync.Once
	err          error
	dir          string
	shim         string
	layers, data string // disk images
}

func prepare(t testing.TB) {
	t.Helper()
	shared.once.Do(func() { shared.err = prepareOnce() })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
}

func prepareOnce() (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if shared.dir, err = os.MkdirTemp("", "tvm"); err != nil {
		return err
	}
	shared.shim = filepath.Join(shared.dir, "tenon-shim")
	root := filepath.Join(shared.dir, "root")
	for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	for _, name := range []string{"sh", "uname", "cat", "echo", "hostname", "ls", "sleep", "mkdir", "mv", "rm", "ln", "stat", "id"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			return err
		}
	}
	shared.layers, shared.data = filepath.Join(shared.dir, "layers.erofs"), filepath.Join(shared.dir, "data.ext4")
	for _, args := range [][]string{
		{"go", "build", "-ldflags", "-s -w", "-o", shared.dir, "tenon.dev/tenon/cmd/tenon-shim", "tenon.dev/tenon/cmd/tenon-vmm"},
		{"cp", "/bin/busybox", filepath.Join(root, "bin/busybox")},
		{"truncate", "-s", "64M", shared.data},
		{"mke2fs", "-q", "-t", "ext4", shared.data},
	} {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %s", args, err, out)
		}
	}
	f, err := os.Create(shared.layers)
	if err != nil {
		return err
	}
	return errors.Join(erofs.Write(ctx, f, []string{root}, erofs.Options{}), f.Close())
}

var serial atomic.Int32

// engine is a Manager and a client of its service.
type engine struct {
	t      testing.TB
	m      *Manager
	dir    string
	client vmv1.VMMClient
}

// config is one for tests: the state, with its template, is common to all.
func config(t testing.TB) Config {
	t.Helper()
	prepare(t)
	dir, err := os.MkdirTemp(shared.dir, "r")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cache := os.Getenv("TENON_CACHE")
	if cache == "" {
		cache = "/var/cache/tenon-test"
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("tv%x-%d", os.Getpid(), serial.Add(1))
	var messages bytes.Buffer
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("messages:\n%s", messages.String())
		}
	})
	return Config{
		StateDir: filepath.Join(shared.dir, "state"), RunDir: filepath.Join(dir, "vms"), Name: name, CgroupParent: name,
		Self: self, Shim: shared.shim, KernelDir: filepath.Join(cache, "kernel"), Accel: "tcg", CPUs: 1,
		Log: slog.New(slog.NewTextHandler(&locked{w: &messages}, nil)),
	}
}

type locked struct {
	mu sync.Mutex
	w  *bytes.Buffer
}

func (l *locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

func start(t testing.TB, c Config) *engine {
	t.Helper()
	m, err := New(limited(t), c)
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{t: t, m: m, dir: filepath.Dir(c.RunDir)}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		e.nothingLeft(c)
	})
	l, err := net.Listen("unix", filepath.Join(e.dir, "vmm.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(task.ServerInterceptor))
	if err != nil {
		t.Fatal(err)
	}
	vmv1.RegisterVMMService(srv, NewService(m, func() {}))
	go srv.Serve(context.Background(), l) //nolint:errcheck // ends with Close
	t.Cleanup(func() { srv.Close() })
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	rpc := ttrpc.NewClient(conn, ttrpc.WithUnaryClientInterceptor(task.ClientInterceptor))
	t.Cleanup(func() { rpc.Close() })
	e.client = vmv1.NewVMMClient(rpc)
	return e
}

// nothingLeft checks what must be gone.
func (e *engine) nothingLeft(c Config) {
	e.t.Helper()
	if left, _ := filepath.Glob("/sys/fs/cgroup/*/" + c.CgroupParent); len(left) > 0 {
		e.t.Errorf("cgroups are left: %v", left)
	}
	e.noInterface(c)
	entries, err := os.ReadDir(c.RunDir)
	if err != nil {
		e.t.Error(err)
	}
	for _, d := range entries {
		if d.IsDir() {
			e.t.Errorf("a directory is left: %s", d.Name())
		}
	}
}

// noInterface waits until the kernel has taken the machines' interfaces away: it
// does so a little after QEMU's end.
func (e *engine) noInterface(c Config) {
	e.t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		left, _ := filepath.Glob("/sys/class/net/" + c.Name + "*") // no bad pattern
		if len(left) == 0 {
			return
		}
		if time.Now().After(end) {
			e.t.Fatalf("interfaces are left: %v", left)
		}
	}
}

func limited(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// disks are the image's layers and a writable disk of its own.
func (e *engine) disks(id string) []*vmv1.Disk {
	e.t.Helper()
	upper := filepath.Join(e.dir, id+".ext4")
	b, err := os.ReadFile(shared.data)
	if err != nil {
		e.t.Fatal(err)
	}
	if err := os.WriteFile(upper, b, 0o600); err != nil {
		e.t.Fatal(err)
	}
	return []*vmv1.Disk{{Path: shared.layers, ReadOnly: true}, {Path: upper, Volatile: true}}
}

func mount(fstype, source, target string, flags uint64) *taskv1.Step {
	return &taskv1.Step{Kind: &taskv1.Step_Mount{Mount: &taskv1.GuestMount{Type: fstype, Source: source, Target: target, Flags: flags}}}
}

func dir(path string) *taskv1.Step {
	return &taskv1.Step{Kind: &taskv1.Step_Directory{Directory: &taskv1.Directory{Path: path, Mode: 0o755}}}
}

const guestRoot = "/run/tenon/root"

func overlay() []task.Mount {
	return []task.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"lowerdir=" + guestRoot + "/lower", "upperdir=" + guestRoot + "/rw/upper", "workdir=" + guestRoot + "/rw/work"}}}
}

// create makes a machine with a container's root mounted.
func (e *engine) create(id string, change ...func(*vmv1.CreateRequest)) *vmv1.CreateResponse {
	e.t.Helper()
	r := &vmv1.CreateRequest{
		Id: id, Hostname: id, Disks: e.disks(id),
		Steps: []*taskv1.Step{
			mount("erofs", "serial:disk0", guestRoot+"/lower", syscall.MS_RDONLY), mount("ext4", "serial:disk1", guestRoot+"/rw", 0),
			dir(guestRoot + "/rw/upper"), dir(guestRoot + "/rw/work"),
		},
		Logs: map[string]*taskv1.Log{id: {Driver: logs.Local, Path: e.log(id).Path}},
	}
	for _, f := range change {
		f(r)
	}
	a, err := e.client.Create(limited(e.t), r)
	if err != nil {
		e.t.Fatal(err)
	}
	return a
}

func (e *engine) log(id string) logs.Config {
	return logs.Config{Driver: logs.Local, Path: filepath.Join(e.dir, id+".log")}
}

func (e *engine) remove(id string) {
	e.t.Helper()
	if _, err := e.client.Remove(limited(e.t), &vmv1.RemoveRequest{Id: id}); err != nil {
		e.t.Error(err)
	}
}

// run runs a shell script in a container on a machine, and returns its exit
// status and what its log holds.
func (e *engine) run(v *vmv1.Machine, script string, mounts ...specs.Mount) (uint32, string) {
	e.t.Helper()
	ctx := limited(e.t)
	c, err := task.Dial(ctx, v.Socket)
	if err != nil {
		e.t.Fatal(err)
	}
	defer c.Close()
	s := plainSpec()
	s.Linux.Namespaces = s.Linux.Namespaces[:5] // the machine's network
	s.Process.Args = []string{"/bin/sh", "-c", script}
	s.Mounts = append(s.Mounts, mounts...)
	b, err := json.Marshal(s)
	if err != nil {
		e.t.Fatal(err)
	}
	_, err = c.Create(ctx, task.CreateRequest{
		ID: v.Id, Spec: b, Log: &taskv1.Log{Driver: logs.Local, Path: "/the/host/knows"},
		Rootfs: overlay(),
	})
	if err != nil {
		e.t.Fatal(err)
	}
	if _, err := c.Start(ctx, v.Id, ""); err != nil {
		e.t.Fatal(err)
	}
	exit, err := c.Wait(ctx, v.Id, "")
	if err != nil {
		e.t.Fatal(err)
	}
	var out bytes.Buffer
	if err := logs.Read(ctx, e.log(v.Id), logs.ReadOptions{}, func(m *logs.Message) error {
		fmt.Fprintf(&out, "%s\n", m.Line)
		return nil
	}); err != nil {
		e.t.Fatal(err)
	}
	if _, err := c.Delete(ctx, v.Id, ""); err != nil {
		e.t.Fatal(err)
	}
	if err := logs.Remove(e.log(v.Id).Path); err != nil {
		e.t.Fatal(err)
	}
	return exit.Status, out.String()
}

// TestMachines has two machines at once.
func TestMachines(t *testing.T) {
	e := start(t, config(t))
	begin := time.Now()
	p, err := e.client.Prepare(limited(t), &vmv1.PrepareRequest{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("template after %v", time.Since(begin))
	seen := map[string]string{}
	differ := func(id, what, value string) {
		t.Helper()
		if other := seen[what+value]; other != "" || value == "" {
			t.Errorf("%s has %s %q, as %s", id, what, value, other)
		}
		seen[what+value] = id
	}
	var machines []*vmv1.Machine
	for _, id := range []string{"a", "b"} {
		begin := time.Now()
		v := e.create(id).Machine
		made := time.Since(begin)
		if v.Origin != fromClone || v.Template != p.Template || v.Accel != "tcg" || v.Pid == 0 || len(v.Nics) != 1 {
			t.Errorf("%v", v)
		}
		status, out := e.run(v, "uname -r; cat /proc/sys/kernel/random/boot_id; cat /proc/sys/kernel/random/uuid; echo more > /etc/x; exit 7")
		t.Logf("made after %v, ran after %v", made, time.Since(begin))
		lines := strings.Split(out, "\n")
		if status != 7 || len(lines) != 4 || lines[0] != v.KernelRelease || lines[1] != v.BootId {
			t.Errorf("exit %d, output %q of %v", status, out, v)
			continue
		}
		differ(id, "boot ID", v.BootId)
		differ(id, "UUID", lines[2])
		differ(id, "user", fmt.Sprint(v.Uid))
		differ(id, "tap", v.Nics[0].Tap)
		begin = time.Now()
		if status, out = e.run(v, "cat /etc/x"); status != 0 || out != "more\n" {
			t.Errorf("exit %d, output %q", status, out)
		}
		t.Logf("again: %v", time.Since(begin))
		machines = append(machines, v)
	}
	list, err := e.client.List(limited(t), &vmv1.ListRequest{})
	if err != nil || len(list.Machines) != 2 || list.Machines[0].Id != "a" || list.Machines[1].BootId != machines[1].BootId {
		t.Errorf("list: %v, %v", list, err)
	}
	if _, err := e.client.Create(limited(t), &vmv1.CreateRequest{Id: "a"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second time: %v", err)
	}
	if _, err := e.client.Create(limited(t), &vmv1.CreateRequest{Id: "../a"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad name: %v", err)
	}
	u, err := e.client.Usage(limited(t), &vmv1.UsageRequest{})
	if err != nil || len(u.Usages) != 2 || u.Usages[0].Cpu == 0 || u.Usages[0].PrivateBytes == 0 {
		t.Errorf("usage: %v, %v", u, err)
	}
	t.Logf("usage: %v", u)

	// One ends; the other goes on.
	if err := syscall.Kill(int(machines[0].Pid), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ev := e.event(vmv1.Event_ENDED, "a")
	if !strings.Contains(ev.Reason, "SIGKILL") || ev.Clean {
		t.Errorf("end: %v", ev)
	}
	if _, err := task.Dial(limited(t), machines[0].Socket); err == nil {
		t.Error("the shim of a machine that has ended answers")
	}
	if status, out := e.run(machines[1], "echo still"); status != 0 || out != "still\n" {
		t.Errorf("exit %d, output %q", status, out)
	}
	if list, err = e.client.List(limited(t), &vmv1.ListRequest{}); err != nil || !list.Machines[0].Ended || list.Machines[0].Reason != ev.Reason || list.Machines[1].Ended {
		t.Errorf("list: %v, %v", list, err)
	}
	e.remove("a")
	if _, err := e.client.Remove(limited(t), &vmv1.RemoveRequest{Id: "a"}); !errdefs.IsNotFound(err) {
		t.Errorf("removed twice: %v", err)
	}
	e.event(vmv1.Event_REMOVED, "a")
}

// TestClonesDiffer makes twenty copies of one machine.
func TestClonesDiffer(t *testing.T) {
	e := start(t, config(t))
	const count = 20
	made := make([]*vmv1.CreateResponse, count)
	var wg sync.WaitGroup
	turns := make(chan struct{}, 4)
	for i := range made {
		wg.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			var err error
			if made[i], err = e.client.Create(limited(t), &vmv1.CreateRequest{Id: fmt.Sprint("c", i)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	seen := map[string]string{}
	for _, a := range made {
		v := a.Machine
		for what, value := range map[string]string{
			"boot ID": a.Identity.BootId, "process": fmt.Sprint(v.Pid), "user": fmt.Sprint(v.Uid), "socket": v.Socket, "tap": v.Nics[0].Tap,
		} {
			if other := seen[what+value]; other != "" || value == "" {
				t.Errorf("%s has the %s %q, as %q", v.Id, what, value, other)
			}
			seen[what+value] = v.Id
		}
	}
	u, err := e.client.Usage(limited(t), &vmv1.UsageRequest{})
	if err != nil || len(u.Usages) != count {
		t.Fatal(u, err)
	}
	var private uint64
	for _, x := range u.Usages {
		private += x.PrivateBytes
	}
	t.Logf("%d MiB of private memory each", private/count>>20)
}

// TestPool takes a waiting machine, uses host directories in it, and has its
// kernel panic.
func TestPool(t *testing.T) {
	c := config(t)
	c.Pool = 1
	e := start(t, c)
	if _, err := e.client.Prepare(limited(t), &vmv1.PrepareRequest{}); err != nil {
		t.Fatal(err)
	}
	data, other := filepath.Join(e.dir, "data"), filepath.Join(e.dir, "other")
	for _, d := range []string{data, other} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{data + "/here": "on the host", other + "/single": "alone", other + "/secret": "not shared"} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(other+"/secret", data+"/link"); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	v := e.create("p", func(r *vmv1.CreateRequest) {
		r.Shares = []*vmv1.HostShare{{Tag: "data", Path: data}, {Tag: "ro", Path: data, ReadOnly: true}, {Tag: "file", Path: other + "/single"}}
		for _, s := range r.Shares {
			r.Steps = append(r.Steps, &taskv1.Step{Kind: &taskv1.Step_Share{Share: &taskv1.Share{Tag: s.Tag, Target: "/run/tenon/shares/" + s.Tag}}})
		}
	}).Machine
	made := time.Since(begin)
	if v.Origin != fromPool {
		t.Errorf("not from the pool: %v", v)
	}
	var mounts []specs.Mount
	for _, tag := range []string{"data", "ro", "file"} {
		mounts = append(mounts, specs.Mount{Destination: "/s/" + tag, Type: "bind", Source: "/run/tenon/shares/" + tag, Options: []string{"rbind"}})
	}
	status, out := e.run(v, `cd /s; cat data/here; echo; echo new > data/a; mv data/a data/b; ln -s /nowhere data/l; cat data/link 2>/dev/null && echo leak
(echo x > ro/x) 2>/dev/null && echo written; ls file; cat file/single; mkdir file/x 2>/dev/null && echo made; exit 3`, mounts...)
	t.Logf("made after %v, ran after %v", made, time.Since(begin))
	if want := "on the host\nsingle\nalone\n"; status != 3 || out != want {
		t.Errorf("exit %d, output %q, want %q", status, out, want)
	}
	if b, err := os.ReadFile(data + "/b"); err != nil || string(b) != "new\n" {
		t.Errorf("what the guest wrote: %q, %v", b, err)
	}
	if l, err := os.Readlink(data + "/l"); err != nil || l != "/nowhere" {
		t.Errorf("the guest's link: %q, %v", l, err)
	}
	e.serversAreShutUp(v)
	if _, err := e.client.Unshare(limited(t), &vmv1.UnshareRequest{Id: v.Id, Tag: "data"}); err != nil {
		t.Fatal(err)
	}
	if status, out := e.run(v, "cat /s/here; exit 0", specs.Mount{Destination: "/s", Type: "bind", Source: "/run/tenon/shares/ro", Options: []string{"rbind"}}); out != "on the host\n" {
		t.Errorf("another share: exit %d, output %q", status, out)
	}

	// Its interface waits in a namespace, and goes where it is asked to go.
	rpc := e.guest(v)
	for turn, mac := range []string{v.Nics[0].Mac, "02:42:00:00:00:01"} {
		path := fmt.Sprint("/run/tenon/netns/n", turn)
		i := &taskv1.Interface{Mac: mac, NewMac: "02:42:00:00:00:01", Netns: path, Name: fmt.Sprint("net", turn), Addresses: []string{"10.0.0.9/24"}}
		_, err := rpc.Apply(limited(t), &taskv1.ApplyRequest{Steps: []*taskv1.Step{
			{Kind: &taskv1.Step_Netns{Netns: &taskv1.NetNS{Path: path, Sysctls: map[string]string{"net.ipv6.conf.default.disable_ipv6": "1"}}}},
			interfaceStep(i),
			interfaceStep(&taskv1.Interface{Mac: i.NewMac, Netns: path, Name: "eth0", Remove: true}),
		}})
		if err != nil {
			t.Errorf("interface in its namespace, turn %d: %v", turn, err)
		}
	}
	e.memoryComesBack(v)
	_, _ = rpc.Apply(limited(t), &taskv1.ApplyRequest{Steps: []*taskv1.Step{ // never returns
		{Kind: &taskv1.Step_File{File: &taskv1.File{Path: "/proc/sysrq-trigger", Data: []byte("c")}}},
	}})
	if ev := e.event(vmv1.Event_ENDED, "p"); !strings.HasPrefix(ev.Reason, "kernel panic: ") || ev.Clean {
		t.Errorf("end: %v", ev)
	}
	if b, err := os.ReadFile(v.KernelLog); err != nil || !bytes.Contains(b, []byte("Kernel panic")) {
		t.Errorf("kernel log: %v, %q", err, b)
	}
	e.remove("p")

	// The pool has been filled again.
	if _, err := e.client.Prepare(limited(t), &vmv1.PrepareRequest{}); err != nil {
		t.Fatal(err)
	}

	// One that dies while it waits is replaced, though nobody asks for it.
	waiting := func() int {
		e.m.pool.mu.Lock()
		defer e.m.pool.mu.Unlock()
		if len(e.m.pool.waiting) == 0 || !e.m.pool.waiting[0].alive() {
			return 0
		}
		return e.m.pool.waiting[0].proc.PID()
	}
	first := waiting()
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	again := func() {
		t.Helper()
		for end := time.Now().Add(time.Minute); waiting() == 0 || waiting() == first; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the pool is not filled again after the death of a waiting machine")
			}
		}
	}
	again()
	// Who asks before that is known gets another.
	first = waiting()
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if v = e.create("early").Machine; int(v.Pid) == first {
		t.Errorf("it is the dead one: %v", v)
	}
	e.remove("early")
	again()
	v = e.create("q").Machine
	if v.Origin != fromPool {
		t.Errorf("not from the pool: %v", v)
	}
	if _, err := e.guest(v).PowerOff(limited(t), &taskv1.PowerOffRequest{}); err != nil {
		t.Logf("power off: %v", err) // the answer may not arrive
	}
	if ev := e.event(vmv1.Event_ENDED, "q"); ev.Reason != "power off" || !ev.Clean {
		t.Errorf("end: %v", ev)
	}
}

// memoryComesBack: what a copy of a template uses and frees is the host's again.
func (e *engine) memoryComesBack(v *vmv1.Machine) {
	e.t.Helper()
	private := func() uint64 {
		n, _, err := memoryOf(int(v.Pid))
		if err != nil {
			e.t.Fatal(err)
		}
		return n
	}
	const size = 64 << 20
	before := private()
	if status, out := e.run(v, fmt.Sprintf("busybox dd if=/dev/zero of=/dev/null bs=%d count=1; exit $?", size)); status != 0 {
		e.t.Fatalf("exit %d, output %q", status, out)
	}
	most := private()
	if most < before+size/2 { // some of it may be back already
		e.t.Errorf("%d bytes of private memory, %d after %d were used", before, most, size)
	}
	for end := time.Now().Add(time.Minute); private() > before+size/4; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			e.t.Fatalf("%d bytes of private memory before, %d with %d more, still %d when they are freed", before, most, size, private())
		}
	}
	e.t.Logf("private memory: %d MiB, %d MiB with %d more, %d MiB when they were freed", before>>20, most>>20, size>>20, private()>>20)
}

// TestDeath kills the process: its machines die with it, and the next one
// removes what is left.
func TestDeath(t *testing.T) {
	c := config(t)
	dir := filepath.Dir(c.RunDir)
	e := &engine{t: t, dir: dir}
	first := e.program(c)
	v := e.create("d", func(r *vmv1.CreateRequest) { r.Shares = []*vmv1.HostShare{{Tag: "data", Path: dir}} }).Machine
	_, err := e.guest(v).Apply(limited(t), &taskv1.ApplyRequest{Steps: []*taskv1.Step{
		{Kind: &taskv1.Step_Share{Share: &taskv1.Share{Tag: "data", Target: "/run/tenon/shares/data"}}}}})
	if err != nil {
		t.Fatal(err)
	}
	group, err := cgroup.Load("/" + c.CgroupParent)
	if err != nil {
		t.Fatal(err)
	}
	if pids, err := group.Pids(); err != nil || len(pids) != 2 {
		t.Errorf("processes: %v, %v", pids, err)
	}
	kill := func(cmd *exec.Cmd, sig syscall.Signal) {
		t.Helper()
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	kill(first, syscall.SIGTERM) // is not for it
	if a, err := e.client.List(limited(t), &vmv1.ListRequest{}); err != nil || len(a.Machines) != 1 {
		t.Fatalf("after SIGTERM: %v, %v", a, err)
	}
	kill(first, syscall.SIGKILL)
	_ = first.Wait() // it was killed
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		pids, err := group.Pids()
		if err != nil {
			t.Fatal(err)
		}
		if len(pids) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("processes are left: %v", pids)
		}
	}
	e.noInterface(c)
	second := e.program(c)
	if _, err := os.Stat(filepath.Join(c.RunDir, "d")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the machine's directory: %v", err)
	}
	if a, err := e.client.List(limited(t), &vmv1.ListRequest{}); err != nil || len(a.Machines) != 0 {
		t.Errorf("after a new start: %v, %v", a, err)
	}
	if _, err := New(limited(t), c); !errdefs.IsConflict(err) {
		t.Errorf("a second one at once: %v", err)
	}
	e.create("d")
	if _, err := e.client.Shutdown(limited(t), &vmv1.ShutdownRequest{}); err != nil {
		t.Error(err)
	}
	late := time.AfterFunc(limit, func() { _ = second.Process.Kill() })
	defer late.Stop()
	if err := second.Wait(); err != nil {
		t.Errorf("the end after Shutdown: %v", err)
	}
	e.nothingLeft(c)
}

// program starts tenon-vmm and connects to it.
func (e *engine) program(c Config) *exec.Cmd {
	t := e.t
	t.Helper()
	socket := filepath.Join(e.dir, "vmm.sock")
	ready, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	logFile := filepath.Join(e.dir, "vmm.log")
	cmd := exec.Command(filepath.Join(shared.dir, "tenon-vmm"), "serve", "--socket", socket, "--run-dir", c.RunDir, "--state-dir", c.StateDir,
		"--name", c.Name, "--cgroup-parent", c.CgroupParent, "--shim", c.Shim, "--kernel-dir", c.KernelDir, "--accel", c.Accel,
		"--cpus", fmt.Sprint(c.CPUs), "--ready-fd", "3", "--log", logFile)
	cmd.ExtraFiles = []*os.File{theirs}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		if b, err := os.ReadFile(logFile); err == nil && t.Failed() {
			t.Logf("messages:\n%s", b)
		}
	})
	if err := ready.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		t.Fatalf("tenon-vmm does not start: %v", err)
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	rpc := ttrpc.NewClient(conn, ttrpc.WithUnaryClientInterceptor(task.ClientInterceptor))
	t.Cleanup(func() { rpc.Close() })
	e.client = vmv1.NewVMMClient(rpc)
	return cmd
}

// guest speaks to a machine's init.
func (e *engine) guest(v *vmv1.Machine) taskv1.GuestService {
	e.t.Helper()
	conn, err := net.Dial("unix", v.Socket)
	if err != nil {
		e.t.Fatal(err)
	}
	rpc := ttrpc.NewClient(conn, ttrpc.WithUnaryClientInterceptor(task.ClientInterceptor))
	e.t.Cleanup(func() { rpc.Close() })
	return taskv1.NewGuestClient(rpc)
}

// serversAreShutUp looks at the processes that serve directories.
func (e *engine) serversAreShutUp(v *vmv1.Machine) {
	e.t.Helper()
	m, err := e.m.get(v.Id)
	if err != nil {
		e.t.Fatal(err)
	}
	pids, err := m.group.Pids()
	if err != nil || len(pids) != 4 {
		e.t.Errorf("processes of the machine: %v, %v", pids, err)
	}
	for _, pid := range pids {
		if pid == int(v.Pid) {
			continue
		}
		proc := fmt.Sprintf("/proc/%d/", pid)
		entries, err := os.ReadDir(proc + "root")
		if err != nil || len(entries) != 2 || entries[0].Name() != "proc" || entries[1].Name() != "tree" {
			e.t.Errorf("a server sees %v, %v", entries, err)
		}
		b, err := os.ReadFile(proc + "status")
		if err != nil || !bytes.Contains(b, fmt.Appendf(nil, "\nCapPrm:\t%016x\n", serverCaps)) || !bytes.Contains(b, fmt.Appendf(nil, "\nCapBnd:\t%016x\n", serverCaps)) {
			e.t.Errorf("a server's rights: %s, %v", b, err)
		}
		fds, err := os.ReadDir(proc + "fd")
		if err != nil || len(fds) > 20 {
			e.t.Errorf("a server's descriptors: %v, %v", fds, err)
		}
	}
}

// event waits for an event.
func (e *engine) event(kind vmv1.Event_Type, id string) *vmv1.Event {
	e.t.Helper()
	ctx, cancel := context.WithCancel(limited(e.t))
	defer cancel()
	s, err := e.client.Events(ctx, &vmv1.EventsRequest{})
	if err != nil {
		e.t.Fatal(err)
	}
	for {
		ev, err := s.Recv()
		if err != nil {
			e.t.Fatalf("no event %v of %s: %v", kind, id, err)
		}
		if ev.Type == kind && ev.Id == id {
			return ev
		}
	}
}
