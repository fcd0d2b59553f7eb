package engine_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/internal/engine"
)

// helper is a daemon of its own for one operation, so that it can be killed.
// what is "root|run|name|operation".
func helper(what string) {
	parts := strings.SplitN(what, "|", 5)
	programs = parts[3]
	b := &bench{t: &fatalTB{}, root: parts[0], run: parts[1], name: parts[2], log: newLog()}
	b.open()
	ctx := context.Background()
	var err error
	switch op, arg, _ := strings.Cut(parts[4], " "); op {
	case "create":
		_, err = b.Create(ctx, engine.CreateOptions{Name: arg, Request: request(withVolume, "sleep", "1000")})
	case "start":
		err = b.Start(ctx, arg)
	case "run":
		b.detached(arg, nil, "sleep", "1000")
	case "runrm":
		b.detached(arg, func(_ *container.Config, h *container.HostConfig) { h.AutoRemove = true }, "sleep", "1000")
	case "stop":
		zero := 0
		err = b.Stop(ctx, arg, engine.StopOptions{Timeout: &zero})
	case "rm":
		err = b.Remove(ctx, arg, engine.RemoveOptions{Force: true, Volumes: true})
	case "die": // as by a killer from outside, at no special point
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	b.close()
}

func withVolume(c *container.Config, _ *container.HostConfig) {
	c.Volumes = map[string]struct{}{"/data": {}}
}

// fatalTB lets a bench be used outside of a test.
type fatalTB struct{ testing.TB }

func (*fatalTB) Helper() {}
func (*fatalTB) Fatal(args ...any) {
	fmt.Println(args...)
	os.Exit(1)
}
func (*fatalTB) Errorf(f string, args ...any) { fmt.Printf(f+"\n", args...) }

// during closes the bench's engine, runs an operation in a daemon that is
// killed at a failpoint (or not), and opens the bench again.
func (b *bench) during(failpoint, op string) (killed bool) {
	b.t.Helper()
	return b.duringAction(failpoint, "kill", op)
}

func (b *bench) duringAction(failpoint, action, op string) (killed bool) {
	b.t.Helper()
	b.close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.WaitDelay = time.Second // its children may hold the pipe
	cmd.Env = append(os.Environ(), "TENON_ENGINE_HELPER="+strings.Join([]string{b.root, b.run, b.name, programs, op}, "|"))
	if failpoint != "" {
		cmd.Env = append(cmd.Env, "TENON_FAILPOINT="+failpoint+":"+action)
	}
	out, err := cmd.CombinedOutput()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		killed = ee.Sys().(syscall.WaitStatus).Signaled()
	}
	defer func() {
		if b.Engine == nil {
			b.open()
		}
	}()
	if err != nil && !killed && action == "kill" {
		b.t.Fatalf("%s: %v\n%s", op, err, out)
	}
	if action == "error" && (err == nil || !strings.Contains(string(out), "failpoint "+failpoint)) {
		b.t.Fatalf("%s with an error at %s: %v\n%s", op, failpoint, err, out)
	}
	return killed
}

func TestRootDaemonKilledInCreate(t *testing.T) {
	b := newBench(t)
	for _, p := range []string{"create-volumes", "create-record", "create-end"} {
		if !b.during(p, "create c-"+p) {
			t.Fatalf("%s: not killed", p)
		}
		// Either it is there whole, or not at all; the name is free or works.
		if cs := b.list(engine.Filters{"name": {"c-" + p}}); len(cs) == 1 {
			if err := b.Start(t.Context(), "c-"+p); err != nil {
				t.Errorf("%s: start what was created: %v", p, err)
			}
			if err := b.Remove(t.Context(), "c-"+p, engine.RemoveOptions{Force: true, Volumes: true}); err != nil {
				t.Errorf("%s: %v", p, err)
			}
		} else if _, err := b.Create(t.Context(), engine.CreateOptions{Name: "c-" + p, Request: request(nil, "true")}); err != nil {
			t.Errorf("%s: create again: %v", p, err)
		}
	}
}

func TestRootDaemonKilledInStart(t *testing.T) {
	b := newBench(t)
	for _, p := range []string{"start-intent", "start-network", "start-prepared", "start-created", "start-started"} {
		for _, kind := range []string{"run", "runrm"} {
			name := kind + "-" + p
			if !b.during(p, kind+" "+name) {
				t.Fatalf("%s: not killed", name)
			}
			cs := b.list(engine.Filters{"name": {name}})
			switch {
			case p == "start-started":
				if len(cs) != 1 || cs[0].State != "running" {
					t.Errorf("%s: %+v, want it running", name, cs)
					continue
				}
				if out := b.exec(name, "echo", "alive"); out != "alive\n" {
					t.Errorf("%s: exec says %q", name, out)
				}
			case kind == "runrm":
				if len(cs) != 0 {
					t.Errorf("%s: %+v, want it gone", name, cs)
				}
				continue
			case len(cs) != 1 || cs[0].State != "created":
				t.Errorf("%s: %+v, want it created", name, cs)
				continue
			default:
				if err := b.Start(t.Context(), name); err != nil {
					t.Errorf("%s: start again: %v", name, err)
				}
			}
			if err := b.Remove(t.Context(), name, engine.RemoveOptions{Force: true}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func TestRootDaemonKilledInStopAndRemove(t *testing.T) {
	b := newBench(t)
	b.detached("stopped", nil, "sleep", "1000")
	if !b.during("stop-marked", "stop stopped") {
		t.Fatal("not killed")
	}
	if s := b.inspect("stopped").State; s.Status != "running" {
		t.Errorf("stop was cut off before the signal: %+v", s)
	}
	for _, p := range []string{"rm-marked", "rm-network", "rm-root", "rm-freed"} {
		b.detached(p, withVolume, "sleep", "1000")
		if !b.during(p, "rm "+p) {
			t.Fatalf("%s: not killed", p)
		}
		if cs := b.list(engine.Filters{"name": {"^" + p + "$"}}); len(cs) != 0 {
			t.Errorf("%s: %+v, want it gone", p, cs)
		}
	}
	if vs, _, err := b.VolumeList(t.Context(), nil); err != nil || len(vs) != 0 {
		t.Errorf("volumes are left: %+v %v", vs, err)
	}
}

func TestRootExitsWhileTheDaemonIsAway(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	shared := func(h *container.HostConfig) { h.Binds = []string{dir + ":/x"} }
	const told = "until test -e /x/go; do usleep 10000; done; "
	b.detached("ended", func(_ *container.Config, h *container.HostConfig) { shared(h) }, "sh", "-c", told+"echo last words; exit 9")
	b.detached("again", func(_ *container.Config, h *container.HostConfig) { shared(h); h.RestartPolicy.Name = "always" }, "sh", "-c", told+"exit 1")
	b.detached("gone", func(_ *container.Config, h *container.HostConfig) { shared(h); h.AutoRemove = true }, "sh", "-c", told)
	b.detached("live", nil, "sleep", "1000")
	pid := b.inspect("live").State.Pid
	pids := []int{b.inspect("ended").State.Pid, b.inspect("again").State.Pid, b.inspect("gone").State.Pid}
	b.close()
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, p := range pids { // they end now, with nobody there
		awaitEnd(t, p)
	}
	b.open()
	b.wait("ended", container.WaitConditionNotRunning)
	if s := b.inspect("ended").State; s.Status != "exited" || s.ExitCode != 9 {
		t.Errorf("ended: %+v", s)
	}
	b.logText("ended", "last words")
	if _, err := b.Inspect(t.Context(), "gone", false); err == nil {
		b.wait("gone", container.WaitConditionRemoved)
	}
	if s := b.inspect("live").State; s.Status != "running" || s.Pid != pid {
		t.Errorf("live: %+v, want pid %d", s, pid)
	}
	deadline := time.Now().Add(time.Minute)
	for b.inspect("again").RestartCount == 0 {
		if time.Now().After(deadline) {
			t.Fatalf("again: %+v", b.inspect("again").State)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if out := b.exec("live", "cat", "/etc/hostname"); !strings.HasPrefix(b.inspect("live").ID, strings.TrimSpace(out)) {
		t.Errorf("exec says %q", out)
	}
}

func TestRootShimKilled(t *testing.T) {
	b := newBench(t)
	b.detached("victim", nil, "sleep", "1000")
	b.detached("phoenix", func(_ *container.Config, h *container.HostConfig) { h.RestartPolicy.Name = "always" }, "sleep", "1000")
	pid := b.inspect("victim").State.Pid
	w, err := b.Wait(t.Context(), "victim", container.WaitConditionNotRunning)
	if err != nil {
		t.Fatal(err)
	}
	b.killShim()
	select {
	case r := <-w:
		if r.ExitCode != 137 {
			t.Errorf("victim: %+v", r)
		}
	case <-time.After(time.Minute):
		t.Fatal("nobody told that the container is lost")
	}
	deadline := time.Now().Add(time.Minute)
	for {
		if i := b.inspect("phoenix"); i.State.Running && !i.State.Restarting && i.RestartCount > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("phoenix: %+v", b.inspect("phoenix").State)
		}
		time.Sleep(10 * time.Millisecond)
	}
	awaitEnd(t, pid) // of the lost container
	if err := b.Start(t.Context(), "victim"); err != nil {
		t.Errorf("start the victim again: %v", err)
	}
}

func TestRootStepsFail(t *testing.T) {
	b := newBench(t)
	for _, p := range []string{"create-volumes", "create-record", "create-end"} {
		b.duringAction(p, "error", "create half")
		if cs := b.list(nil); len(cs) != 0 {
			t.Errorf("%s: %+v", p, cs)
		}
		if vs, _, err := b.VolumeList(t.Context(), nil); err != nil || len(vs) != 0 {
			t.Errorf("%s: volumes are left: %+v %v", p, vs, err)
		}
	}
	for _, p := range []string{"start-intent", "start-network", "start-prepared", "start-created", "start-started"} {
		b.duringAction(p, "error", "runrm gone")
		if cs := b.list(nil); len(cs) != 0 {
			t.Errorf("%s: %+v", p, cs)
		}
		b.duringAction(p, "error", "run kept")
		if cs := b.list(nil); len(cs) != 1 || cs[0].State != "created" {
			t.Errorf("%s: %+v", p, cs)
		}
		if err := b.Start(t.Context(), "kept"); err != nil {
			t.Errorf("%s: start again: %v", p, err)
		}
		if err := b.Remove(t.Context(), "kept", engine.RemoveOptions{Force: true}); err != nil {
			t.Errorf("%s: %v", p, err)
		}
	}
	for _, p := range []string{"rm-marked", "rm-network", "rm-root", "rm-freed"} {
		b.detached("kept", nil, "sleep", "1000")
		b.duringAction(p, "error", "rm kept") // and the next daemon finishes it
		if cs := b.list(nil); len(cs) != 0 {
			t.Errorf("%s: %+v", p, cs)
		}
	}
}
