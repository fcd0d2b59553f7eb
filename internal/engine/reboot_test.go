package engine_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/engine"
)

// reboot takes away what a reboot takes away: all processes, mounts, control
// groups and the run root.
func (b *bench) reboot() {
	b.t.Helper()
	b.close()
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		cmd, err := os.ReadFile(p)
		if err != nil || !strings.HasPrefix(string(cmd), programs+"/") { // one test at a time has them
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p))); err == nil && pid != os.Getpid() {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
			awaitEnd(b.t, pid)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(programs, "tenon-shim"), "reap", "--run-dir", filepath.Join(b.run, "shim"), "--cgroup-parent", b.name).CombinedOutput()
	if err != nil {
		b.t.Fatalf("reap: %v\n%s", err, out)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		b.t.Fatal(err)
	}
	for _, l := range strings.Split(string(mounts), "\n") {
		if f := strings.Fields(l); len(f) > 4 && strings.HasPrefix(f[4], b.run+"/") {
			_ = unix.Unmount(f[4], unix.MNT_DETACH) // several may be stacked
		}
	}
	entries, _ := os.ReadDir(b.run)
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(b.run, e.Name())); err != nil {
			b.t.Fatal(err)
		}
	}
	b.open()
}

// awaitEnd waits until a killed process is gone with all its threads. Its state
// in /proc does not say so: that is the first thread's, and others may hold its
// files and locks a while longer.
func awaitEnd(t testing.TB, pid int) {
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
			stat, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
			t.Fatalf("process %d does not end: %s", pid, stat)
		}
	}
}

func TestRootReboot(t *testing.T) {
	b := newBench(t)
	policy := func(name string) func(*container.Config, *container.HostConfig) {
		return func(_ *container.Config, h *container.HostConfig) {
			h.RestartPolicy.Name = container.RestartPolicyMode(name)
		}
	}
	b.detached("always", policy("always"), "sleep", "1000")
	b.detached("unless", policy("unless-stopped"), "sleep", "1000")
	b.detached("unless-halted", policy("unless-stopped"), "sleep", "1000")
	b.detached("always-halted", policy("always"), "sleep", "1000")
	b.detached("plain", nil, "sleep", "1000")
	b.detached("gone", func(_ *container.Config, h *container.HostConfig) { h.AutoRemove = true }, "sleep", "1000")
	if _, err := b.Create(t.Context(), engine.CreateOptions{Name: "never", Request: request(policy("always"), "sleep", "1000")}); err != nil {
		t.Fatal(err)
	}
	zero := 0
	for _, name := range []string{"unless-halted", "always-halted"} {
		if err := b.Stop(context.Background(), name, engine.StopOptions{Timeout: &zero}); err != nil {
			t.Fatal(err)
		}
	}
	b.reboot()
	for name, want := range map[string]container.ContainerState{
		"always": "running", "unless": "running", "always-halted": "running", "unless-halted": "exited", "plain": "exited", "never": "created",
	} {
		deadline := time.Now().Add(time.Minute)
		for {
			got := b.inspect(name).State
			if got.Status == want {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("%s is %s (%s), want %s", name, got.Status, got.Error, want)
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	if s := b.inspect("plain").State; s.ExitCode == 0 || s.Error == "" {
		t.Errorf("plain: %+v", s)
	}
	if _, err := b.Inspect(t.Context(), "gone", false); err == nil {
		t.Error("a --rm container survived the reboot")
	}
}
