package shim_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/task"
)

var program string // the built tenon-shim

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "tenon-shim-test")
	if err != nil {
		panic(err)
	}
	program = filepath.Join(dir, "tenon-shim")
	cmd := exec.Command("go", "build", "-o", program, "tenon.dev/tenon/cmd/tenon-shim")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// shimProcess is a running tenon-shim and a client of it.
type shimProcess struct {
	*task.Client
	t      testing.TB
	dir    string
	socket string
	parent string
	cmd    *exec.Cmd
}

var counter atomic.Int64

// startShim starts a shim that is shut down, and checked for leftovers, at the
// test's end.
func startShim(t testing.TB) *shimProcess {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("these tests run containers: they need root")
	}
	dir, err := os.MkdirTemp("", "ts")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &shimProcess{
		t: t, dir: dir, socket: filepath.Join(dir, "s"),
		parent: fmt.Sprintf("tenon-shimtest-%d-%d", os.Getpid(), counter.Add(1)),
	}
	s.start()
	t.Cleanup(s.stop)
	return s
}

// shimTime bounds one test.
const shimTime = 2 * time.Minute

// start runs the program and connects to it.
func (s *shimProcess) start() {
	t, dir := s.t, s.dir
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s.cmd = exec.Command(program, "serve", "--socket", s.socket, "--run-dir", filepath.Join(dir, "run"), "--cgroup-parent", s.parent, "--name", "t", "--ready-fd", "3")
	s.cmd.ExtraFiles = []*os.File{w}
	s.cmd.Stderr = os.Stderr
	if !testing.Verbose() {
		s.cmd.Stderr = nil
	}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	// Whatever waits for the shim ends with it.
	pid := s.cmd.Process
	late := time.AfterFunc(shimTime, func() {
		t.Errorf("the test does not end: the shim is killed")
		_ = pid.Kill()
	})
	t.Cleanup(func() { late.Stop() })
	var b [1]byte
	if _, err := r.Read(b[:]); err != nil {
		t.Fatalf("shim did not become ready: %v", err)
	}
	r.Close()
	s.Client = s.dial()
}

func (s *shimProcess) dial() *task.Client {
	c, err := task.Dial(s.t.Context(), s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

func (s *shimProcess) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.Shutdown(ctx, true); err != nil {
		s.t.Errorf("shutdown: %v", err)
		_ = s.cmd.Process.Kill()
	}
	s.Close()
	late := time.AfterFunc(time.Minute, func() {
		s.t.Error("the shim does not end")
		_ = s.cmd.Process.Kill()
	})
	if err := s.cmd.Wait(); err != nil {
		s.t.Errorf("shim: %v", err)
		out, err := exec.CommandContext(ctx, program, "reap", "--run-dir", filepath.Join(s.dir, "run"), "--cgroup-parent", s.parent).CombinedOutput()
		s.t.Logf("reaped: %s (%v)", out, err)
	}
	late.Stop()
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/" + s.parent)
	if len(dirs) > 0 {
		s.t.Errorf("cgroups left behind: %v", dirs)
	}
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(b), s.dir) {
		s.t.Errorf("mounts left behind below %s: %v", s.dir, err)
	}
}

// rootfs makes a busybox root.
func rootfs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"bin", "dev", "proc", "sys", "tmp", "etc", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, n := range strings.Fields("sh cat echo sleep true false seq head yes dd ls id tail env touch mkdir ln rm mv ps kill stty wc printf readlink stat test usleep chown sync od awk trap mkfifo cp grep tee") {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", n)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// spec is a usual container's; change may adjust it.
func spec(root string, change func(*specs.Spec), args ...string) []byte {
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_BIND_SERVICE", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"}
	s := &specs.Spec{
		Version:  "1.2.0",
		Root:     &specs.Root{Path: root},
		Hostname: "box",
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/bin"},
			Capabilities:    &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
			NoNewPrivileges: true,
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: "pid"}, {Type: "mount"}, {Type: "ipc"}, {Type: "uts"}, {Type: "network"}},
			Resources:  &specs.LinuxResources{},
		},
	}
	if change != nil {
		change(s)
	}
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return b
}
