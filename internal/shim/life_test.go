package shim_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// closed waits for the end of a connection.
func closed(t *testing.T, c *task.Client) {
	t.Helper()
	select {
	case <-c.Closed():
	case <-time.After(time.Minute):
		t.Fatal("the connection does not close")
	}
}

// result is all that a container's run leaves.
type result struct {
	out, errs string
	exit      task.Exit
}

// run makes, attaches, starts, waits for and deletes a container.
func (s *shimProcess) run(ctx context.Context, r task.CreateRequest, stdin io.Reader) (result, error) {
	var res result
	if _, err := s.Create(ctx, r); err != nil {
		return res, err
	}
	var out, errs bytes.Buffer
	a, err := s.Attach(ctx, r.ID, "", task.Stdio{Stdin: stdin, Stdout: &out, Stderr: &errs, Terminal: r.Terminal})
	if err != nil {
		return res, err
	}
	defer a.Close()
	if _, err := s.Start(ctx, r.ID, ""); err != nil {
		_, derr := s.Delete(ctx, r.ID, "")
		return res, errors.Join(err, derr)
	}
	if err := a.Wait(ctx); err != nil {
		return res, err
	}
	if res.exit, err = s.Wait(ctx, r.ID, ""); err != nil {
		return res, err
	}
	res.out, res.errs = out.String(), errs.String()
	_, err = s.Delete(ctx, r.ID, "")
	return res, err
}

func TestRun(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	for _, c := range []struct {
		name, script, stdin string
		want                result
	}{
		{"output and code", "echo out; echo err >&2; exit 7", "", result{"out\n", "err\n", task.Exit{Status: 7}}},
		{"signal", "kill -TERM $$", "", result{"", "", task.Exit{Status: 0}}}, // init ignores it
		{"stdin", "cat; echo end", "hello", result{"helloend\n", "", task.Exit{}}},
		{"no newline", "printf abc", "", result{"abc", "", task.Exit{}}},
		{"closed stdin", "exec 0<&-; echo ok", "unread", result{"ok\n", "", task.Exit{}}},
	} {
		r := task.CreateRequest{ID: "a", Spec: spec(root, nil, "sh", "-c", c.script), Stdin: c.stdin != "", StdinOnce: true}
		var stdin io.Reader
		if c.stdin != "" {
			stdin = strings.NewReader(c.stdin)
		}
		got, err := s.run(ctx, r, stdin)
		got.exit.StartedAt, got.exit.ExitedAt = time.Time{}, time.Time{}
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v, want %+v", c.name, got, err, c.want)
		}
	}
	// Nothing of the shim's own is inherited.
	for _, file := range []string{"status", "oom_score_adj", "limits"} {
		mine, err := exec.Command("cat", "/proc/self/"+file).Output()
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.run(ctx, task.CreateRequest{ID: "a", Spec: spec(root, nil, "cat", "/proc/self/"+file)}, nil)
		if err != nil {
			t.Error(err)
		}
		for line := range strings.Lines(string(mine)) {
			name, _, _ := strings.Cut(line, " ")
			switch {
			case strings.HasPrefix(line, "SigIgn:"), strings.HasPrefix(line, "SigBlk:"):
				// All have their defaults, whatever the test's own caller ignores.
				if line := line[:8] + "0000000000000000\n"; !strings.Contains(got.out, line) {
					t.Errorf("%s: %s in the container is not %q: %s", file, name, line, got.out)
				}
			case file == "oom_score_adj", strings.HasPrefix(line, "Max open files"):
				if !strings.Contains(got.out, line) {
					t.Errorf("%s: %s in the container is not %q", file, name, line)
				}
			}
		}
	}
	// A program that does not exist, and one that cannot be executed.
	_, err := s.run(ctx, task.CreateRequest{ID: "b", Spec: spec(root, nil, "/bin/none")}, nil)
	if !errdefs.IsNotFound(err) {
		t.Errorf("no program: %v", err)
	}
	_, err = s.run(ctx, task.CreateRequest{ID: "b", Spec: spec(root, nil, "/etc")}, nil)
	if !errdefs.IsPermissionDenied(err) {
		t.Errorf("directory as program: %v", err)
	}
	_, err = s.run(ctx, task.CreateRequest{ID: "../b", Spec: spec(root, nil, "true")}, nil)
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("hostile ID: %v", err)
	}
	if _, err := s.Wait(ctx, "b", ""); !errdefs.IsNotFound(err) {
		t.Errorf("wait for nothing: %v", err)
	}
}

func TestTerminal(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Terminal: true, Stdin: true, StdinOnce: true, ConsoleWidth: 91, ConsoleHeight: 17,
		Spec: spec(root, nil, "sh", "-c", "stty size; trap 'stty size; exit 3' WINCH; echo ready; while :; do usleep 10000; done")}); err != nil {
		t.Fatal(err)
	}
	conn, err := s.OpenAttach(ctx, task.AttachRequest{ID: "a", Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	var out []byte
	for b := make([]byte, 100); !bytes.Contains(out, []byte("ready")); {
		n, err := conn.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b[:n]...)
	}
	if err := s.Resize(ctx, "a", "", 100, 40); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(conn)
	if err != nil {
		t.Error(err)
	}
	if got := string(out) + string(rest); got != "17 91\r\nready\r\n40 100\r\n" {
		t.Errorf("terminal: %q", got)
	}
	if e, err := s.Wait(ctx, "a", ""); err != nil || e.Status != 3 {
		t.Errorf("exit %+v, %v", e, err)
	}
}

func TestExec(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Spec: spec(root, nil, "sleep", "1000")}); err != nil {
		t.Fatal(err)
	}
	if err := s.Exec(ctx, task.ExecRequest{ID: "a", ExecID: "x", Process: process(t, "true")}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec before start: %v", err)
	}
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	exec := func(id string, stdin io.Reader, tty bool, args ...string) result {
		t.Helper()
		if err := s.Exec(ctx, task.ExecRequest{ID: "a", ExecID: id, Process: process(t, args...), Stdin: stdin != nil, Terminal: tty}); err != nil {
			t.Fatal(err)
		}
		var out, errs bytes.Buffer
		a, err := s.Attach(ctx, "a", id, task.Stdio{Stdin: stdin, Stdout: &out, Stderr: &errs, Terminal: tty})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		if _, err := s.Start(ctx, "a", id); err != nil {
			t.Fatal(err)
		}
		if err := a.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		e, err := s.Wait(ctx, "a", id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Delete(ctx, "a", id); err != nil {
			t.Error(err)
		}
		return result{out.String(), errs.String(), task.Exit{Status: e.Status}}
	}
	if r := exec("x1", nil, false, "sh", "-c", "cat /proc/1/comm; echo e >&2; exit 9"); r != (result{"sleep\n", "e\n", task.Exit{Status: 9}}) {
		t.Errorf("exec: %+v", r)
	}
	if r := exec("x2", strings.NewReader("in"), false, "cat"); r != (result{"in", "", task.Exit{}}) {
		t.Errorf("exec with stdin: %+v", r)
	}
	if r := exec("x3", nil, true, "sh", "-c", "test -t 1 && echo tty; kill -9 $$"); r != (result{"tty\r\n", "", task.Exit{Status: 137}}) {
		t.Errorf("exec with terminal: %+v", r)
	}
	if r := exec("x4", nil, false, "sh", "-c", "(sleep 1000) & echo on"); r.out != "on\n" {
		t.Errorf("exec that leaves a child: %+v", r)
	}
	if err := s.Exec(ctx, task.ExecRequest{ID: "a", ExecID: "x5", Process: process(t, "/none")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, "a", "x5"); !errdefs.IsNotFound(err) {
		t.Errorf("exec of nothing: %v", err)
	}
	if e, err := s.Wait(ctx, "a", "x5"); err != nil || e.Status != 127 {
		t.Errorf("exit of exec of nothing: %+v, %v", e, err)
	}
	// Execs end with the container.
	if err := s.Exec(ctx, task.ExecRequest{ID: "a", ExecID: "x6", Process: process(t, "sleep", "1000")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, "a", "x6"); err != nil {
		t.Fatal(err)
	}
	titles, rows, err := s.Processes(ctx, "a", nil)
	if err != nil || len(rows) != 3 || strings.Join(titles, " ") != "UID PID PPID C STIME TTY TIME CMD" {
		t.Errorf("ps: %v %v, %v", titles, rows, err)
	}
	if titles, rows, err = s.Processes(ctx, "a", []string{"-o", "pid,comm", "-H"}); err != nil || len(rows) != 3 || rows[0][1] != "sleep" {
		t.Errorf("host's ps: %v %v, %v", titles, rows, err)
	}
	if err := s.Kill(ctx, "a", "", syscall.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if e, err := s.Wait(ctx, "a", "x6"); err != nil || e.Status != 137 {
		t.Errorf("exec of a killed container: %+v, %v", e, err)
	}
	if e, err := s.Wait(ctx, "a", ""); err != nil || e.Status != 137 {
		t.Errorf("killed: %+v, %v", e, err)
	}
	if err := s.Kill(ctx, "a", "", syscall.SIGTERM, false); !errdefs.IsNotFound(err) {
		t.Errorf("kill after the end: %v", err)
	}
}

func process(t *testing.T, args ...string) []byte {
	b, err := json.Marshal(&specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestPauseAndStats(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Owner: "me", Spec: spec(root, func(s *specs.Spec) {
		limit := int64(64 << 20)
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	}, "sleep", "1000")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	if err := s.Pause(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	list, seq, err := s.List(ctx, "a")
	if err != nil || len(list) != 1 || list[0].Status != taskv1.Status_STATUS_PAUSED || list[0].Owner != "me" || seq == 0 {
		t.Errorf("list: %v, %v", list, err)
	}
	if err := s.Pause(ctx, "a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("paused twice: %v", err)
	}
	if err := s.Resume(ctx, "a"); err != nil {
		t.Error(err)
	}
	if err := s.Resume(ctx, "a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("resumed twice: %v", err)
	}
	limit := int64(32 << 20)
	if err := s.Update(ctx, "a", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}); err != nil {
		t.Error(err)
	}
	m, err := s.Metrics(ctx, "a", "none")
	if err != nil || len(m) != 1 || m[0].MemoryLimit != 32<<20 || m[0].MemoryUsage == 0 || m[0].PidsCurrent != 1 || m[0].CpuTotalNs == 0 || m[0].OnlineCpus == 0 {
		t.Errorf("metrics: %v, %v", m, err)
	}
	if err := s.Pause(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := s.Kill(ctx, "a", "", syscall.SIGKILL, true); err != nil {
		t.Error(err)
	}
	if e, err := s.Wait(ctx, "a", ""); err != nil || e.Status != 137 || e.OOMKilled {
		t.Errorf("killed while paused: %+v, %v", e, err)
	}
}

func TestOOM(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	r, err := s.run(ctx, task.CreateRequest{ID: "a", Spec: spec(rootfs(t), func(s *specs.Spec) {
		limit := int64(16 << 20)
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit}
	}, "sh", "-c", "tail /dev/zero; exit 5")}, nil)
	if err != nil || !r.exit.OOMKilled {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestAttachRace runs many short containers and wants every byte of each.
func TestAttachRace(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	n := 1000
	if testing.Short() {
		n = 100
	}
	work := make(chan int)
	var wg sync.WaitGroup
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range work {
				id := fmt.Sprintf("c%d", i)
				r, err := s.run(ctx, task.CreateRequest{ID: id, Spec: spec(root, nil, "echo", id)}, nil)
				if err != nil || r.out != id+"\n" || r.exit.Status != 0 {
					t.Errorf("%s: %+v, %v", id, r, err)
				}
			}
		}()
	}
	for i := range n {
		work <- i
	}
	close(work)
	wg.Wait()
}

// TestLogLines has a million lines of 100 bytes arrive complete and in order.
func TestLogLines(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	n := 1_000_000
	if testing.Short() {
		n = 100_000
	}
	pad := strings.Repeat("0", 90)
	all := make([]byte, 0, 100*n)
	for i := range n {
		all = fmt.Appendf(all, "%09d%s\n", i, pad)
	}
	if err := os.WriteFile(filepath.Join(root, "lines"), all, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, driver := range []string{logs.Local, logs.JSONFile} {
		path := filepath.Join(s.dir, driver)
		c := logs.Config{Driver: driver, Path: path, MaxSize: 20 << 20, MaxFiles: 20, Compress: true}
		if _, err := s.Create(ctx, task.CreateRequest{ID: "a", AutoDelete: true, Spec: spec(root, nil, "cat", "/lines"),
			Log: &taskv1.Log{Driver: driver, Path: path, MaxSize: uint64(c.MaxSize), MaxFiles: uint32(c.MaxFiles), Compress: true}}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Start(ctx, "a", ""); err != nil {
			t.Fatal(err)
		}
		if e, err := s.Wait(ctx, "a", ""); err != nil || e.Status != 0 {
			t.Fatalf("%+v, %v", e, err)
		}
		left := all
		err := logs.Read(ctx, c, logs.ReadOptions{}, func(m *logs.Message) error {
			if len(left) < 100 || !bytes.Equal(m.Line, left[:99]) {
				return fmt.Errorf("got %q, %d bytes before the end", m.Line, len(left))
			}
			left = left[100:]
			return nil
		})
		if err != nil || len(left) > 0 {
			t.Errorf("%s: %v, %d bytes are missing", driver, err, len(left))
		}
		if err := logs.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

// TestStalledClient shows that a client that does not read holds up neither
// the log of a container that exits nor other containers.
func TestStalledClient(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	path := filepath.Join(s.dir, "log")
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Log: &taskv1.Log{Driver: logs.Local, Path: path},
		Spec: spec(root, nil, "sh", "-c", "head -c 20000000 /dev/zero; echo end")}); err != nil {
		t.Fatal(err)
	}
	stalled, err := s.OpenAttach(ctx, task.AttachRequest{ID: "a", Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	if r, err := s.run(ctx, task.CreateRequest{ID: "b", Spec: spec(root, nil, "echo", "b")}, nil); err != nil || r.out != "b\n" {
		t.Errorf("other container: %+v, %v", r, err)
	}
	list, _, err := s.List(ctx, "a")
	if err != nil || list[0].Status != taskv1.Status_STATUS_RUNNING {
		t.Errorf("not held up: %v, %v", list, err)
	}
	// The client goes: everything flows on.
	stalled.Close()
	if e, err := s.Wait(ctx, "a", ""); err != nil || e.Status != 0 {
		t.Errorf("%+v, %v", e, err)
	}
	total := 0
	if err := logs.Read(ctx, logs.Config{Driver: logs.Local, Path: path}, logs.ReadOptions{}, func(m *logs.Message) error {
		total += len(m.Line)
		return nil
	}); err != nil || total != 20_000_003 {
		t.Errorf("log has %d bytes, %v", total, err)
	}
}

// TestReconnect has a second client find what happened while nobody was there.
func TestReconnect(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Spec: spec(root, nil, "sh", "-c", "exit 4")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	s.Client.Close()
	closed(t, s.Client)
	s.Client = s.dial()
	if e, err := s.Wait(ctx, "a", ""); err != nil || e.Status != 4 || e.StartedAt.IsZero() || e.ExitedAt.Before(e.StartedAt) {
		t.Errorf("exit %+v, %v", e, err)
	}
	var got []string
	stop := errors.New("stop")
	other := s.dial()
	defer other.Close()
	collect := func(after uint64, until taskv1.Event_Type) (last uint64) {
		got = nil
		if err := other.Events(ctx, after, func(e *taskv1.Event) error {
			got = append(got, e.Type.String())
			last = e.Sequence
			if e.Type == until {
				return stop
			}
			return nil
		}); !errors.Is(err, stop) {
			t.Error(err)
		}
		return last
	}
	last := collect(0, taskv1.Event_EXIT)
	if fmt.Sprint(got) != "[START EXIT]" {
		t.Errorf("events: %v", got)
	}
	if _, err := s.Delete(ctx, "a", ""); err != nil {
		t.Error(err)
	}
	collect(last, taskv1.Event_DELETE)
	if fmt.Sprint(got) != "[DELETE]" {
		t.Errorf("events: %v", got)
	}
	collect(1<<40, taskv1.Event_GAP)
	if list, _, err := other.List(ctx, ""); err != nil || len(list) != 0 {
		t.Errorf("list: %v, %v", list, err)
	}
}
