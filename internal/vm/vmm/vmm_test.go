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

func prepare(t *testing.T) {
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
		{"go", "build", "-ldflags", "-s -w", "-o", shared.shim, "tenon.dev/tenon/cmd/tenon-shim"},
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
	t      *testing.T
	m      *Manager
	dir    string
	client vmv1.VMMClient
}

// config is one for tests: the state, with its template, is common to all.
func config(t *testing.T) Config {
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

func start(t *testing.T, c Config) *engine {
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
	if left, _ := filepath.Glob("/sys/class/net/" + c.Name + "*"); len(left) > 0 {
		e.t.Errorf("interfaces are left: %v", left)
	}
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

func limited(t *testing.T) context.Context {
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
	s := warmSpec()
	s.Linux.Namespaces = s.Linux.Namespaces[:5] // the machine's network
	s.Process.Args = []string{"/bin/sh", "-c", script}
	s.Mounts = append(s.Mounts, mounts...)
	b, err := json.Marshal(s)
	if err != nil {
		e.t.Fatal(err)
	}
	_, err = c.Create(ctx, task.CreateRequest{
		ID: v.Id, Spec: b, Log: &taskv1.Log{Driver: logs.Local, Path: "/the/host/knows"},
		Rootfs: []task.Mount{{Type: "overlay", Source: "overlay", Options: []string{
			"lowerdir=" + guestRoot + "/lower", "upperdir=" + guestRoot + "/rw/upper", "workdir=" + guestRoot + "/rw/work"}}},
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
