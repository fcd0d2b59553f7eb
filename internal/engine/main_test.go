package engine_test

import (
	"bytes"
	"context"
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

	"github.com/moby/moby/api/types/container"
	mobynet "github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/events"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/rootfs"
	"tenon.dev/tenon/internal/sandbox/host"
	"tenon.dev/tenon/internal/store"
	"tenon.dev/tenon/internal/volume"
)

var programs string // directory of tenon-shim and tenon-dns

func TestMain(m *testing.M) {
	if h := os.Getenv("TENON_ENGINE_HELPER"); h != "" {
		helper(h)
		return
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "tenon-engine-bin")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		programs = dir
		cmd := exec.Command("go", "build", "-o", dir, "tenon.dev/tenon/cmd/tenon-shim", "tenon.dev/tenon/cmd/tenon-dns")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

var counter atomic.Int32

// bench is a daemon in this process, but for the server.
type bench struct {
	*engine.Engine
	t       testing.TB
	root    string
	run     string
	name    string
	closers []func() error
	log     *bytes.Buffer
}

type syncBuffer struct {
	mu sync.Mutex
	b  *bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func newBench(t testing.TB) *bench {
	t.Helper()
	n := int(counter.Add(1))
	pid := os.Getpid()
	b := &bench{t: t, name: fmt.Sprintf("e%x", (pid<<4+n)&0xfffff), log: &bytes.Buffer{}}
	b.root = t.TempDir()
	run, err := os.MkdirTemp("/run", "tenon-engine-")
	if err != nil {
		t.Fatal(err)
	}
	b.run = run
	b.open()
	ctx := context.Background()
	if _, err := b.Images().Resolve(ctx, "busybox", nil); err != nil {
		if _, err := b.Images().BootstrapBusybox(ctx); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if b.Engine != nil {
			for _, c := range b.list(engine.Filters{}) {
				_ = b.Remove(ctx, c.ID, engine.RemoveOptions{Force: true, Volumes: true})
			}
			if err := b.Shutdown(ctx); err != nil {
				t.Errorf("shutdown: %v", err)
			}
		}
		b.close()
		b.nothingLeft()
		if err := os.RemoveAll(run); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("daemon's log:\n%s", b.log)
			if shimLog, err := os.ReadFile(filepath.Join(run, "shim.log")); err == nil {
				t.Logf("shim's log:\n%s", shimLog)
			}
		}
	})
	return b
}

// open starts the daemon's parts; it can be called again after close.
func (b *bench) open() {
	b.t.Helper()
	ctx := context.Background()
	must := func(err error) {
		b.t.Helper()
		if err != nil {
			b.t.Fatal(err)
		}
	}
	log := slog.New(slog.NewTextHandler(&syncBuffer{b: b.log}, nil))
	closing := func(f func() error) { b.closers = append(b.closers, f) }
	db, err := store.Open(filepath.Join(b.root, "state.db"))
	must(err)
	closing(db.Close)
	vol, err := store.OpenVolatile(filepath.Join(b.run, "records"))
	must(err)
	hub, err := events.Open(filepath.Join(b.run, "events"), log)
	must(err)
	closing(hub.Close)
	imgs, err := image.Open(ctx, image.Config{Root: filepath.Join(b.root, "images"), Log: log})
	must(err)
	closing(imgs.Close)
	roots, err := rootfs.Open(rootfs.Config{Root: b.root, Images: imgs, Log: log})
	must(err)
	closing(roots.Close)
	vols, err := volume.Open(filepath.Join(b.root, "volumes"), db, log)
	must(err)
	closing(vols.Close)
	nets, err := network.Open(ctx, network.Config{Name: b.name, StateDir: filepath.Join(b.root, "networks"), RunDir: filepath.Join(b.run, "networks"), DNSBinary: filepath.Join(programs, "tenon-dns"), Log: log, PoolSize: 2})
	must(err)
	closing(nets.Close)
	kernel, err := host.New(host.Config{Shim: filepath.Join(programs, "tenon-shim"), RunRoot: b.run, Name: b.name, Log: log})
	must(err)
	b.Engine, err = engine.New(engine.Config{
		Name: b.name, Root: b.root, RunRoot: b.run, Version: "test", DB: db, Volatile: vol, Images: imgs, Roots: roots,
		Networks: nets, Volumes: vols, Events: hub, Kernel: kernel, Pids: 512, ShmSize: 64 << 20, MemoryReserve: 64 << 20, Logger: log,
	})
	must(err)
	closing(b.Engine.Close)
	must(b.Recover(ctx))
}

func (b *bench) close() {
	for i := len(b.closers) - 1; i >= 0; i-- {
		if err := b.closers[i](); err != nil {
			b.t.Errorf("close: %v", err)
		}
	}
	b.closers, b.Engine = nil, nil
}

func (b *bench) list(f engine.Filters) []container.Summary {
	b.t.Helper()
	l, err := b.List(context.Background(), engine.ListOptions{All: true, Filters: f})
	if err != nil {
		b.t.Fatal(err)
	}
	return l
}

// request makes a create request; edit may be nil.
func request(edit func(*container.Config, *container.HostConfig), cmd ...string) container.CreateRequest {
	c := &container.Config{Image: "busybox", Cmd: cmd}
	h := &container.HostConfig{}
	if edit != nil {
		edit(c, h)
	}
	return container.CreateRequest{Config: c, HostConfig: h, NetworkingConfig: &mobynet.NetworkingConfig{}}
}

// output runs a container with --rm to its end.
func (b *bench) output(edit func(*container.Config, *container.HostConfig), cmd ...string) (stdout, stderr string, code int, err error) {
	b.t.Helper()
	var out, errOut bytes.Buffer
	req := request(func(c *container.Config, h *container.HostConfig) {
		h.AutoRemove = true
		if edit != nil {
			edit(c, h)
		}
	}, cmd...)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, w, err := b.Run(ctx, engine.RunOptions{CreateOptions: engine.CreateOptions{Request: req}, Attach: &engine.AttachOptions{Stdout: &out, Stderr: &errOut, Stream: true}})
	return out.String(), errOut.String(), w.ExitCode, err
}

// detached starts a container and returns its ID.
func (b *bench) detached(name string, edit func(*container.Config, *container.HostConfig), cmd ...string) string {
	b.t.Helper()
	res, _, err := b.Run(context.Background(), engine.RunOptions{CreateOptions: engine.CreateOptions{Name: name, Request: request(edit, cmd...)}})
	if err != nil {
		b.t.Fatal(err)
	}
	return res.ID
}

func (b *bench) inspect(ref string) *container.InspectResponse {
	b.t.Helper()
	i, err := b.Inspect(context.Background(), ref, false)
	if err != nil {
		b.t.Fatal(err)
	}
	return i
}

// wait waits for a condition.
func (b *bench) wait(ref string, cond container.WaitCondition) engine.WaitResult {
	b.t.Helper()
	ch, err := b.Wait(context.Background(), ref, cond)
	if err != nil {
		b.t.Fatal(err)
	}
	return result(b.t, ch)
}

// result is what a wait comes to.
func result(t testing.TB, ch <-chan engine.WaitResult) engine.WaitResult {
	t.Helper()
	select {
	case w := <-ch:
		return w
	case <-time.After(time.Minute):
		t.Fatal("the condition that is waited for never holds")
		return engine.WaitResult{}
	}
}

// logText waits until the log holds want.
func (b *bench) logText(ref, want string) string {
	b.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		var out bytes.Buffer
		if _, err := b.Logs(context.Background(), ref, engine.LogsOptions{Stdout: true, Stderr: true, Tail: -1}, &out, &out); err != nil {
			b.t.Fatal(err)
		}
		if strings.Contains(out.String(), want) {
			return out.String()
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("log of %s never held %q:\n%s", ref, want, out.String())
		}
		time.Sleep(20 * time.Millisecond) // the log is a file: there is nothing to wait on
	}
}

// nothingLeft checks that the kernel and the directories hold nothing of the
// daemon, after Shutdown.
func (b *bench) nothingLeft() {
	b.t.Helper()
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + b.name)
	more, _ := filepath.Glob("/sys/fs/cgroup/" + b.name)
	for _, g := range append(groups, more...) {
		if sub, _ := filepath.Glob(g + "/*/cgroup.procs"); len(sub) > 0 {
			b.t.Errorf("control groups are left: %v", sub)
		}
		b.t.Errorf("control group is left: %s", g)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		b.t.Fatal(err)
	}
	for _, l := range strings.Split(string(mounts), "\n") {
		if strings.Contains(l, b.run+"/") || strings.Contains(l, b.root+"/") {
			b.t.Errorf("mount is left: %s", l)
		}
	}
	links, err := net.Interfaces()
	if err != nil {
		b.t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Name, b.name) {
			b.t.Errorf("interface is left: %s", l.Name)
		}
	}
	for _, dir := range []string{b.run + "/containers", b.run + "/records/containers", b.root + "/containers"} {
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			b.t.Errorf("%s holds %v", dir, left)
		}
	}
}

func newLog() *bytes.Buffer { return &bytes.Buffer{} }

// exec runs a command in a container and returns its output.
func (b *bench) exec(ref string, cmd ...string) string {
	b.t.Helper()
	out, code := b.execCode(ref, engine.ExecOptions{Cmd: cmd})
	if code != 0 {
		b.t.Errorf("exec %v in %s: exit code %d\n%s", cmd, ref, code, out)
	}
	return out
}

func (b *bench) execCode(ref string, o engine.ExecOptions) (string, int) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	o.AttachStdout, o.AttachStderr = true, true
	id, err := b.ExecCreate(ctx, ref, o)
	if err != nil {
		b.t.Fatal(err)
	}
	var out bytes.Buffer
	w := &syncBuffer{b: &out}
	if err := b.ExecStart(ctx, id, false, engine.AttachOptions{Stdout: w, Stderr: w}); err != nil {
		return err.Error(), -1
	}
	x, err := b.ExecInspect(ctx, id)
	if err != nil || x.ExitCode == nil {
		b.t.Fatalf("exec inspect: %+v %v", x, err)
	}
	return out.String(), *x.ExitCode
}

// killShim kills the daemon's shim from outside.
func (b *bench) killShim() {
	b.t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		b.t.Fatal(err)
	}
	for _, p := range procs {
		cmd, err := os.ReadFile(p)
		if err != nil || !strings.Contains(string(cmd), "tenon-shim\x00serve\x00") || !strings.Contains(string(cmd), b.run+"/shim.sock") {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(p, "/proc/%d/", &pid); err != nil {
			b.t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			b.t.Fatal(err)
		}
		return
	}
	b.t.Fatal("no shim found")
}
