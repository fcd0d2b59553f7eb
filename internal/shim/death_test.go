package shim_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/shim"
	"tenon.dev/tenon/internal/task"
)

// TestReap kills a shim with containers in every state.
func TestReap(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	runDir := filepath.Join(s.dir, "run")
	reap := func() ([]shim.Reaped, error) {
		out, err := exec.CommandContext(ctx, program, "reap", "--run-dir", runDir, "--cgroup-parent", s.parent).Output()
		var list []shim.Reaped
		if err == nil {
			err = json.Unmarshal(out, &list)
		}
		return list, err
	}
	if _, err := reap(); err == nil {
		t.Error("a living shim's containers were reaped")
	}
	var pids []int
	for _, id := range []string{"created", "running", "paused", "elsewhere"} {
		pid, err := s.Create(ctx, task.CreateRequest{ID: id, Spec: spec(root, func(sp *specs.Spec) {
			if id == "elsewhere" {
				sp.Linux.CgroupsPath = "/" + s.parent + "-other/x"
			}
		}, "sleep", "1000")})
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
		if id == "created" {
			continue
		}
		if _, err := s.Start(ctx, id, ""); err != nil {
			t.Fatal(err)
		}
		if id == "paused" {
			if err := s.Pause(ctx, id); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := s.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = s.cmd.Wait() // killed
	closed(t, s.Client)
	list, err := reap()
	if err != nil || len(list) != 4 {
		t.Errorf("reaped %+v, %v", list, err)
	}
	for _, pid := range pids {
		awaitEnd(t, pid)
	}
	if list, err = reap(); err != nil || len(list) != 0 {
		t.Errorf("reaped again: %+v, %v", list, err)
	}
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/" + s.parent + "*/*")
	for _, d := range dirs {
		if st, err := os.Stat(d); err == nil && st.IsDir() {
			t.Errorf("cgroup left behind: %s", d)
		}
	}
	others, _ := filepath.Glob("/sys/fs/cgroup/*/" + s.parent + "-other")
	for _, d := range others {
		_ = os.Remove(d)
	}
	// A new shim takes the place.
	s.start()
	if r, err := s.run(ctx, task.CreateRequest{ID: "running", Spec: spec(root, nil, "echo", "on")}, nil); err != nil || r.out != "on\n" {
		t.Errorf("after the reaping: %+v, %v", r, err)
	}
}

// awaitEnd waits until a killed process is gone with all its threads, or a
// zombie without any.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // gone
	}
	defer unix.Close(fd)
	for deadline := time.Now().Add(time.Minute); ; {
		if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1000); n == 1 { // EINTR: once more
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d lives", pid)
		}
	}
}

// TestSignalsIgnored shows that what ends the daemon's group does not end the shim.
func TestSignalsIgnored(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT} {
		if err := s.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	if i, err := s.Info(ctx); err != nil || i.ShimPid != int64(s.cmd.Process.Pid) || i.KernelRelease == "" {
		t.Errorf("info: %v, %v", i, err)
	}
	// The program is a sealed copy, which nobody can write.
	exe := fmt.Sprintf("/proc/%d/exe", s.cmd.Process.Pid)
	if name, err := os.Readlink(exe); err != nil || !strings.HasPrefix(name, "/memfd:") {
		t.Errorf("program is %s, %v", name, err)
	}
	if f, err := os.OpenFile(exe, os.O_WRONLY, 0); err == nil || !errors.Is(err, syscall.ETXTBSY) && !errors.Is(err, syscall.EPERM) {
		f.Close()
		t.Errorf("program can be opened for writing: %v", err)
	}
}

// TestOrphans has a container in the machine's pid namespace leave processes
// behind, alive and dead.
func TestOrphans(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	r, err := s.run(ctx, task.CreateRequest{ID: "a", Spec: spec(rootfs(t), func(sp *specs.Spec) {
		sp.Linux.Namespaces = []specs.LinuxNamespace{{Type: "mount"}, {Type: "network"}}
		sp.Hostname = ""
	}, "sh", "-c", "(sleep 1000 & echo $!) & wait")}, nil)
	if err != nil || !strings.HasSuffix(r.out, "\n") {
		t.Fatalf("%+v, %v", r, err)
	}
	children := func() []byte {
		var all []byte
		names, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", s.cmd.Process.Pid))
		for _, n := range names {
			b, _ := os.ReadFile(n)
			all = append(all, b...)
		}
		return bytes.TrimSpace(all)
	}
	for len(children()) > 0 {
		select {
		case <-ctx.Done():
			t.Fatalf("children are left: %s", children())
		default:
			syscall.Nanosleep(&syscall.Timespec{Nsec: 50e6}, nil)
		}
	}
}

// TestNothingLeft counts what the shim holds after many containers.
func TestNothingLeft(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	count := func() int {
		list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	once := func(id string) {
		r := task.CreateRequest{ID: id, Stdin: true, StdinOnce: true, Spec: spec(root, nil, "cat")}
		if got, err := s.run(ctx, r, strings.NewReader(id)); err != nil || got.out != id {
			t.Fatalf("%+v, %v", got, err)
		}
		r.Terminal, r.Spec = true, spec(root, nil, "true")
		if got, err := s.run(ctx, r, nil); err != nil {
			t.Fatalf("%+v, %v", got, err)
		}
		if _, err := s.run(ctx, task.CreateRequest{ID: id, Spec: spec(root, nil, "/none")}, nil); err == nil {
			t.Fatal("ran nothing")
		}
		if _, err := s.Create(ctx, task.CreateRequest{ID: id, Spec: []byte("{")}); err == nil {
			t.Fatal("took a torn spec")
		}
	}
	once("warm")
	before := count()
	for i := range 20 {
		once(fmt.Sprint("c", i))
	}
	for count() > before {
		select {
		case <-ctx.Done():
			t.Fatalf("%d descriptors, %d before", count(), before)
		default: // streams' goodbyes take a moment
			syscall.Nanosleep(&syscall.Timespec{Nsec: 20e6}, nil)
		}
	}
}

// TestShutdown shuts down with everything under way: tasks in every state,
// attached clients, removals.
func TestShutdown(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	for i := range 8 {
		id := fmt.Sprint("c", i)
		r := task.CreateRequest{ID: id, AutoDelete: i%2 == 0, Spec: spec(root, nil, "sleep", "1000")}
		if i < 4 {
			r.Spec = spec(root, nil, "true")
		}
		if _, err := s.Create(ctx, r); err != nil {
			t.Fatal(err)
		}
		c, err := s.OpenAttach(ctx, task.AttachRequest{ID: id, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if i == 7 {
			continue // stays created
		}
		if _, err := s.Start(ctx, id, ""); err != nil {
			t.Fatal(err)
		}
		if i < 4 {
			if _, err := s.Wait(ctx, id, ""); err != nil {
				t.Error(err)
			}
		}
	}
	if err := s.Shutdown(ctx, false); err == nil {
		t.Error("shut down with tasks")
	}
	// The end of the test shuts down with them.
}

// TestLock: who comes while the last holder dies gets the lock.
func TestLock(t *testing.T) {
	dir := t.TempDir()
	first, err := shim.Lock(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		second, err := shim.Lock(t.Context(), dir)
		if err == nil {
			err = second.Close()
		}
		got <- err
	}()
	refused, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := shim.Lock(refused, dir); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("two have the lock: %v", err)
	}
	first.Close()
	if err := <-got; err != nil { // Lock is bounded
		t.Error(err)
	}
}
