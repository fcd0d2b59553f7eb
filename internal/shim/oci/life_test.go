package oci

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestLife(t *testing.T) {
	t.Parallel()
	f := setup(t, "echo started; exec sleep 100000")
	f.spec.Annotations = map[string]string{"a": "b"}
	pidFile := filepath.Join(f.bundle, "pid")
	f.detached("create", "--bundle", f.bundle, "--pid-file", pidFile, f.id)
	if s := f.state(); s.Status != specs.StateCreated || s.Pid == 0 || s.Bundle != f.bundle || s.Annotations["a"] != "b" {
		t.Errorf("state %+v", s)
	}
	raw, err := os.ReadFile(pidFile)
	if err != nil || string(raw) != strconv.Itoa(f.state().Pid) {
		t.Errorf("pid file %q, %v", raw, err)
	}
	if out := f.output(); out != "" {
		t.Errorf("before start: %q", out)
	}
	f.refused("container with id exists", "create", f.id)
	f.must("start", f.id)
	f.refused("cannot start an already running container", "start", f.id)
	until(t, "output", func() bool { return f.output() == "started\n" })
	if s := f.state(); s.Status != specs.StateRunning {
		t.Errorf("state %+v", s)
	}
	if out := f.must("list", "-q"); out != f.id+"\n" {
		t.Errorf("list -q %q", out)
	}
	if out := f.must("list"); !strings.Contains(out, "running") {
		t.Errorf("list %q", out)
	}
	f.refused("not stopped", "delete", f.id)
	f.must("kill", f.id, "SIGKILL")
	until(t, "end", func() bool { return f.state().Status == specs.StateStopped })
	f.refused("container not running", "kill", f.id, "TERM")
	f.refused("stopped", "start", f.id)
	f.refused("stopped", "exec", f.id, "true")
	f.must("delete", f.id)
	f.refused("does not exist", "state", f.id)
	f.refused("does not exist", "delete", f.id)
	f.must("delete", "--force", f.id)
	if entries, err := os.ReadDir(f.root); err != nil || len(entries) > 0 {
		t.Errorf("left: %v %v", entries, err)
	}
}

func TestRun(t *testing.T) {
	t.Parallel()
	for script, want := range map[string]result{
		"echo out; echo err >&2; exit 7":     {7, "out\n", "err\n"},
		"kill -TERM $$":                      {0, "", ""}, // pid 1 has no default actions
		"read x; echo got $x":                {0, "got it\n", ""},
		"exec nosuch":                        {127, "", "sh: exec: line 0: nosuch: not found\n"},
		"ls /proc/self/fd":                   {0, "0\n1\n2\n3\n", ""}, // 3 is ls' own
		"sleep 0.1 & exec kill -9 -1; wait ": {0, "", ""},
	} {
		t.Run(script, func(t *testing.T) {
			t.Parallel()
			f := setup(t, script)
			f.write()
			got := f.run(func(c *exec.Cmd) { c.Stdin = strings.NewReader("it\n") }, "run", f.id)
			if got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
			f.refused("does not exist", "state", f.id)
		})
	}
}

func TestErrorsOfTheProgram(t *testing.T) {
	t.Parallel()
	for arg, want := range map[string]string{
		"nosuch":      `exec: "nosuch": executable file not found in $PATH`,
		"/bin/nosuch": `exec: "/bin/nosuch": no such file or directory`,
		"/etc":        `exec: "/etc": permission denied`,
	} {
		f := setup(t, "")
		f.spec.Process.Args = []string{arg}
		f.write()
		log := filepath.Join(f.bundle, "log.json")
		r := f.run(nil, "--log", log, "--log-format", "json", "run", f.id)
		if r.code != 1 || !strings.Contains(r.errout, want) {
			t.Errorf("%s: %+v", arg, r)
		}
		raw, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
		var line struct{ Level, Msg, Time string }
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &line); err != nil || line.Level != "error" || line.Msg != want || line.Time == "" {
			t.Errorf("log %q, %v", raw, err)
		}
	}
}

// TestStartTellsFailure: the program vanishes between create and start.
func TestStartTellsFailure(t *testing.T) {
	t.Parallel()
	f := setup(t, "")
	victim := filepath.Join(f.bundle, "rootfs/bin/victim")
	if err := os.Link(filepath.Join(f.bundle, "rootfs/bin/busybox"), victim); err != nil {
		t.Fatal(err)
	}
	f.spec.Process.Args = []string{"/bin/victim"}
	f.detached("create", f.id)
	if err := os.Remove(victim); err != nil {
		t.Fatal(err)
	}
	f.refused(`"/bin/victim": no such file or directory`, "start", f.id)
	until(t, "end", func() bool { return f.state().Status == specs.StateStopped })
	f.must("delete", f.id)
}

func TestSpecIsRefused(t *testing.T) {
	t.Parallel()
	f := setup(t, "true")
	f.refused("no such file", "create", f.id) // no config.json yet
	f.spec.Process.Cwd = "relative"
	f.write()
	f.refused("cwd", "create", f.id)
	f.refused("letters", "create", "../x")
	f.refused("unknown flag --nosuch", "create", "--nosuch", f.id)
	f.refused("not supported", "checkpoint", f.id)
	f.refused("not supported", "restore", "--image-path", "x", f.id)
	f.refused("unknown command", "nosuch")
	if _, err := os.Stat(filepath.Join(f.root, f.id)); err == nil {
		t.Error("the directory of a refused container is left")
	}
}

func TestExec(t *testing.T) {
	t.Parallel()
	f := setup(t, "exec sleep 100000")
	f.detached("run", "--detach", f.id)
	for _, c := range []struct {
		args []string
		want result
	}{
		{[]string{f.id, "sh", "-c", "echo out; echo err >&2; exit 9"}, result{9, "out\n", "err\n"}},
		{[]string{"--cwd", "/tmp", "--env", "X=y", f.id, "sh", "-c", "pwd; echo $X"}, result{0, "/tmp\ny\n", ""}},
		{[]string{"--user", "12:34", "-g", "56", f.id, "id"}, result{0, "uid=12 gid=34 groups=56\n", ""}},
		{[]string{f.id, "sh", "-c", "kill -9 $$"}, result{137, "", ""}},
	} {
		if got := f.run(nil, append([]string{"exec"}, c.args...)...); got != c.want {
			t.Errorf("exec %q: %+v, want %+v", c.args, got, c.want)
		}
	}
	if r := f.run(nil, "exec", f.id, "nosuch"); r.code != 255 || !strings.Contains(r.errout, "executable file not found in $PATH") {
		t.Errorf("exec nosuch: %+v", r)
	}
	process := filepath.Join(f.bundle, "process.json")
	raw, err := json.Marshal(&specs.Process{Args: []string{"sh", "-c", "echo $A"}, Env: []string{"PATH=/bin", "A=of file"}, Cwd: "/"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(process, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if out := f.must("exec", "--process", process, f.id); out != "of file\n" {
		t.Errorf("exec --process: %q", out)
	}
	pidFile := filepath.Join(f.bundle, "exec.pid")
	f.detached("exec", "--detach", "--pid-file", pidFile, f.id, "sleep", "100001")
	pid, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	if err := json.Unmarshal([]byte(f.must("ps", "--format", "json", f.id)), &pids); err != nil || len(pids) != 2 {
		t.Errorf("ps: %v %v", pids, err)
	}
	if out := f.must("ps", f.id); !strings.Contains(out, "sleep 100001") || !strings.Contains(out, string(pid)) {
		t.Errorf("ps: %q", out)
	}
}

func TestPauseUpdateEvents(t *testing.T) {
	t.Parallel()
	f := setup(t, "while true; do true; done")
	f.detached("run", "-d", f.id)
	f.must("pause", f.id)
	if s := f.state(); s.Status != statusPaused {
		t.Errorf("state %+v", s)
	}
	f.refused("paused", "exec", f.id, "true")
	f.refused("not running", "pause", f.id)
	f.must("resume", f.id)
	f.refused("not paused", "resume", f.id)
	f.must("exec", f.id, "true")
	f.must("update", "--memory", "64m", "--pids-limit", "33", f.id)
	var e struct {
		Type, ID string
		Data     statsJSON
	}
	if err := json.Unmarshal([]byte(f.must("events", "--stats", f.id)), &e); err != nil {
		t.Fatal(err)
	}
	if e.Type != "stats" || e.ID != f.id || e.Data.Memory.Usage.Limit != 64<<20 || e.Data.Pids.Limit != 33 || e.Data.CPU.Usage.Total == 0 {
		t.Errorf("events --stats: %+v", e)
	}
	r := f.run(func(c *exec.Cmd) { c.Stdin = strings.NewReader(`{"pids":{"limit":44}}`) }, "update", "--resources", "-", f.id)
	if r.code != 0 {
		t.Fatalf("update: %+v", r)
	}
	if err := json.Unmarshal([]byte(f.must("events", "--stats", f.id)), &e); err != nil || e.Data.Pids.Limit != 44 {
		t.Errorf("after update --resources: %+v, %v", e, err)
	}
	// A paused container can be killed.
	f.must("pause", f.id)
	f.must("kill", f.id, "KILL")
	until(t, "end", func() bool { return f.state().Status == specs.StateStopped })
}

func TestForcedDeletion(t *testing.T) {
	t.Parallel()
	for _, paused := range []bool{false, true} {
		f := setup(t, "sleep 100000 & exec sleep 100000")
		f.detached("run", "-d", f.id)
		if paused {
			f.must("pause", f.id)
		}
		pid := f.state().Pid
		start, err := startTime(pid)
		if err != nil {
			t.Fatal(err)
		}
		f.must("delete", "--force", f.id)
		if alive(pid, start) {
			t.Errorf("process %d lives on", pid)
		}
	}
}

// TestInterruptedCreate: create is killed at random points; delete --force
// removes whatever there is, and the same name can be used again.
func TestInterruptedCreate(t *testing.T) {
	t.Parallel()
	f := setup(t, "exit 3")
	f.write()
	for i := range 30 {
		cmd := f.command("create", f.id)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var ts unix.Timespec
		ts.Nsec = int64(i) * 400_000
		_ = unix.Nanosleep(&ts, nil) // the point of interruption, not a wait for anything
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		f.must("delete", "--force", f.id)
	}
	if r := f.run(nil, "run", f.id); r.code != 3 {
		t.Errorf("run after it: %+v", r)
	}
}

func TestTwoAtOnce(t *testing.T) {
	t.Parallel()
	f := setup(t, "exec sleep 100000")
	f.write()
	var wg sync.WaitGroup
	codes := make([]int, 8)
	for i := range codes {
		wg.Go(func() {
			cmd := f.command("create", f.id)
			_ = cmd.Run() // the exit status says it
			codes[i] = cmd.ProcessState.ExitCode()
		})
	}
	wg.Wait()
	made := 0
	for _, c := range codes {
		if c == 0 {
			made++
		}
	}
	if made != 1 {
		t.Errorf("created %d times: %v", made, codes)
	}
}

// TestSignalsInTheForeground: a signal that comes as soon as the program is seen
// to run goes to that program.
func TestSignalsInTheForeground(t *testing.T) {
	t.Parallel()
	for _, verb := range []string{"run", "exec"} {
		f := setup(t, `trap 'echo term; exit 5' TERM; echo ready; while true; do sleep 0.05; done`)
		args := []string{"run", f.id}
		if verb == "exec" {
			script := f.spec.Process.Args
			f.spec.Process.Args = []string{"sleep", "1000"}
			f.detached("run", "-d", f.id)
			args = append([]string{"exec", f.id}, script...)
		}
		f.write()
		cmd := f.command(args...)
		out, started := pipe(t, cmd)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		started()
		buf := make([]byte, 64)
		if n, err := out.Read(buf); err != nil || string(buf[:n]) != "ready\n" {
			t.Fatalf("%s: %q, %v", verb, buf[:n], err)
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if n, err := out.Read(buf); err != nil || string(buf[:n]) != "term\n" {
			t.Errorf("%s: %q, %v", verb, buf[:n], err)
		}
		_ = cmd.Wait() // the exit status is looked at
		if code := cmd.ProcessState.ExitCode(); code != 5 {
			t.Errorf("%s: exit %d (%s)", verb, code, cmd.ProcessState)
		}
	}
}

func TestPreservedDescriptors(t *testing.T) {
	t.Parallel()
	f := setup(t, "cat <&3; cat <&4; ls /proc/self/fd")
	f.write()
	files := make([]*os.File, 2)
	for i := range files {
		name := filepath.Join(f.bundle, fmt.Sprint("extra", i))
		if err := os.WriteFile(name, fmt.Appendf(nil, "%d\n", i), 0o600); err != nil {
			t.Fatal(err)
		}
		var err error
		if files[i], err = os.Open(name); err != nil {
			t.Fatal(err)
		}
		defer files[i].Close()
	}
	r := f.run(func(c *exec.Cmd) { c.ExtraFiles = files }, "run", "--preserve-fds", "2", f.id)
	if want := "0\n1\n0\n1\n2\n3\n4\n5\n"; r.out != want {
		t.Errorf("got %+v", r)
	}
	// Not asked for, not given.
	f.spec.Process.Args = []string{"ls", "/proc/self/fd"}
	f.write()
	r = f.run(func(c *exec.Cmd) { c.ExtraFiles = files }, "run", f.id)
	if want := "0\n1\n2\n3\n"; r.out != want {
		t.Errorf("leaked: %+v", r)
	}
}
