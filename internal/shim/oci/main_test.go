package oci

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// program is the command, built once: it executes itself again, which a test
// program must not do.
var program string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "tenon-oci-test-")
	if err != nil {
		panic(err)
	}
	program = filepath.Join(dir, "tenon-oci")
	args := []string{"build", "-o", program}
	if runtime.GOARCH == "amd64" { // as the Makefile
		args = append(args, "-ldflags", "-E tenon_oci_entry")
	}
	cmd := exec.Command("go", append(args, "tenon.dev/tenon/cmd/tenon-oci")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

var counter atomic.Int64

// bench of one test: a bundle and a state root.
type fixture struct {
	t      *testing.T
	id     string
	bundle string
	root   string
	spec   *specs.Spec
}

// setup makes a bundle of busybox that runs a shell script.
func setup(t *testing.T, script string) *fixture {
	t.Helper()
	f := &fixture{t: t, id: fmt.Sprintf("tenon-oci-test-%d-%d", os.Getpid(), counter.Add(1)), bundle: t.TempDir()}
	f.root = filepath.Join(f.bundle, "state")
	rootfs := filepath.Join(f.bundle, "rootfs")
	for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(rootfs, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("busybox-static is not installed: %v", err)
	}
	if err := os.WriteFile(filepath.Join(rootfs, "bin/busybox"), busybox, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"sh", "sleep", "cat", "ls", "true", "id", "tty", "stty", "echo", "kill", "pwd", "env", "dd"} {
		if err := os.Symlink("busybox", filepath.Join(rootfs, "bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	f.spec = exampleSpec()
	f.spec.Process.Terminal = false
	f.spec.Process.Args = []string{"sh", "-c", script}
	f.spec.Root.Readonly = false
	f.spec.Linux.CgroupsPath = "/" + f.id
	t.Cleanup(func() {
		f.write()
		f.run(nil, "delete", "--force", f.id)
		for _, dir := range []string{"memory", "pids", "unified", ""} {
			if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", dir, f.id)); err == nil {
				t.Errorf("cgroup %s/%s is left", dir, f.id)
			}
		}
	})
	return f
}

func (f *fixture) write() {
	f.t.Helper()
	raw, err := json.Marshal(f.spec)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.bundle, "config.json"), raw, 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// result is what a command did.
type result struct {
	code        int
	out, errout string
}

// commandTime bounds each command; what it started is ended by setup's cleanup.
const commandTime = time.Minute

func (f *fixture) command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	f.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, program, append([]string{"--root", f.root}, args...)...)
	cmd.Dir = f.bundle
	cmd.WaitDelay = 5 * time.Second // a container may hold the pipes
	return cmd
}

// run runs a command; edit, if not nil, changes it before.
func (f *fixture) run(edit func(*exec.Cmd), args ...string) result {
	f.t.Helper()
	cmd := f.command(args...)
	var out, errout bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errout
	if edit != nil {
		edit(cmd)
	}
	started := time.Now()
	err := cmd.Run()
	if time.Since(started) >= commandTime {
		f.t.Fatalf("%v: does not end: %s%s", args, out.String(), errout.String())
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		f.t.Fatalf("%v: %v", args, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errout.String()}
}

// must runs a command that has to succeed.
func (f *fixture) must(args ...string) string {
	f.t.Helper()
	r := f.run(nil, args...)
	if r.code != 0 {
		f.t.Fatalf("%s: exit %d: %s%s", strings.Join(args, " "), r.code, r.errout, r.out)
	}
	return r.out
}

// refused runs a command that has to fail with text in its error.
func (f *fixture) refused(text string, args ...string) {
	f.t.Helper()
	r := f.run(nil, args...)
	if r.code == 0 || !strings.Contains(r.errout, text) {
		f.t.Errorf("%s: exit %d, %q; want an error with %q", strings.Join(args, " "), r.code, r.errout, text)
	}
}

// detached runs create or run --detach: the container keeps the descriptors,
// so they are files.
func (f *fixture) detached(args ...string) {
	f.t.Helper()
	f.write()
	out, err := os.Create(filepath.Join(f.bundle, "out"))
	if err != nil {
		f.t.Fatal(err)
	}
	defer out.Close()
	cmd := f.command(args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		f.t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, f.output())
	}
}

func (f *fixture) output() string {
	raw, err := os.ReadFile(filepath.Join(f.bundle, "out"))
	if err != nil {
		f.t.Fatal(err)
	}
	return string(raw)
}

func (f *fixture) state() specs.State {
	f.t.Helper()
	var s specs.State
	if err := json.Unmarshal([]byte(f.must("state", f.id)), &s); err != nil {
		f.t.Fatal(err)
	}
	return s
}

// pipe gives the command a pipe as standard output, of which every read is
// bounded. started is to be called when the command runs.
func pipe(t *testing.T, cmd *exec.Cmd) (out *os.File, started func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	if err := r.SetReadDeadline(time.Now().Add(commandTime)); err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = w
	return r, func() { w.Close() }
}

// until waits for a condition that the kernel brings about.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}
