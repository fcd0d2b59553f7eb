package cli

import (
	"bytes"
	"context"
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

	"github.com/creack/pty"

	"tenon.dev/tenon/test/daemon"
)

// engine is a real daemon and the real command, shared by the end-to-end tests.
type engine struct {
	*daemon.Daemon
	host, tenon string
	config      string // DOCKER_CONFIG
}

var shared struct {
	once sync.Once
	e    *engine
	err  error
}

func realEngine(t *testing.T) *engine {
	t.Helper()
	shared.once.Do(func() { shared.e, shared.err = launch() })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.e
}

func TestMain(m *testing.M) {
	code := m.Run()
	if e := shared.e; e != nil {
		if err := e.end(); err != nil {
			fmt.Fprintln(os.Stderr, "ending the daemon:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// launch starts a daemon and makes its base image.
func launch() (_ *engine, err error) {
	inner, err := daemon.New()
	if err != nil {
		return nil, err
	}
	e := &engine{inner, "unix://" + inner.Socket, filepath.Join(inner.Bin, "tenon"), filepath.Join(filepath.Dir(inner.LogFile), "client")}
	if err := e.Start(); err != nil {
		return nil, errors.Join(err, e.End(true))
	}
	if out, err := e.quick("image", "bootstrap", "busybox"); err != nil {
		return nil, errors.Join(fmt.Errorf("bootstrap: %w: %s", err, out), e.End(true))
	}
	return e, nil
}

// end shuts the daemon down by the command's own verb, which must leave nothing,
// and by force if it does not answer.
func (e *engine) end() error {
	out, err := e.quick("system", "shutdown", "--force")
	if err != nil {
		err = fmt.Errorf("shutdown: %w: %s", err, out)
		_ = e.Signal(syscall.SIGQUIT, time.Minute) // its goroutines into the log
	} else if err = e.Wait(time.Minute); err != nil {
		err = fmt.Errorf("tenond: %w: %s", err, e.Tail())
	} else if left := e.Leftovers(); len(left) > 0 {
		err = fmt.Errorf("after the shutdown: %q", left)
	}
	return errors.Join(err, e.End(err != nil))
}

// quick runs a command outside of a test.
func (e *engine) quick(args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return exec.CommandContext(ctx, e.tenon, append([]string{"-H", e.host}, args...)...).CombinedOutput()
}

// command is "tenon ARGS..." against the daemon, ended after a minute.
func (e *engine) command(t *testing.T, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, e.tenon, args...)
	cmd.Env = append(os.Environ(), "TENON_HOST="+e.host, "DOCKER_CONFIG="+e.config)
	return cmd
}

// run runs the command with input and returns what it wrote and its exit code.
func (e *engine) run(t *testing.T, stdin string, args ...string) (out, errOut string, code int) {
	t.Helper()
	cmd := e.command(t, args...)
	var o, x bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &o, &x
	err := cmd.Run()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		t.Fatalf("tenon %v: %v", args, err)
	}
	return o.String(), x.String(), cmd.ProcessState.ExitCode()
}

// ok runs the command, which must succeed, and returns its output.
func (e *engine) ok(t *testing.T, args ...string) string {
	t.Helper()
	out, errOut, code := e.run(t, "", args...)
	if code != 0 {
		t.Fatalf("tenon %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errOut)
	}
	return strings.TrimSuffix(out, "\n")
}

// until repeats a command until its output is as wanted.
func (e *engine) until(t *testing.T, wanted func(out string) bool, args ...string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; {
		out := e.ok(t, args...)
		if wanted(out) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("tenon %s: still %q", strings.Join(args, " "), out)
		}
	}
}

// unique returns a name of this test's own, and removes the container of that
// name at the test's end.
func (e *engine) unique(t *testing.T, suffix string) string {
	name := "e2e-" + strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name())) + suffix
	t.Cleanup(func() { _, _ = e.quick("rm", "-f", "-v", name) })
	return name
}

func TestRootRun(t *testing.T) {
	e := realEngine(t)
	for _, x := range []struct {
		args, stdin, out, errPart string
		code                      int
	}{
		{args: "run --rm busybox echo hello", out: "hello\n"},
		{args: "run --rm --network none busybox echo alone", out: "alone\n"},
		{args: "run --rm busybox false", code: 1},
		{args: "run --rm busybox sh -c exit_42", code: 42},
		{args: "run --rm busybox nosuch", code: 127, errPart: "nosuch"},
		{args: "run --rm busybox /etc", code: 126, errPart: "permission denied"},
		{args: "run --rm --pull never nosuchimage", code: 125, errPart: "nosuchimage"},
		{args: "run --rm -i busybox cat", stdin: "through\n", out: "through\n"},
		{args: "run --rm busybox cat", stdin: "not seen"},
		{args: "run --rm -e A=1 -w /tmp busybox sh -c echo_$A_$PWD", out: "1 /tmp\n"},
		{args: "run --rm -a stderr busybox sh -c echo_out;echo_err_>&2", errPart: "err"},
		{args: "run --rm --entrypoint echo busybox x y", out: "x y\n"},
	} {
		args := strings.Fields(x.args)
		last := len(args) - 1
		args[last] = strings.ReplaceAll(args[last], "_", " ")
		out, errOut, code := e.run(t, x.stdin, args...)
		if out != x.out || code != x.code || !strings.Contains(errOut, x.errPart) || x.errPart == "" && errOut != "" {
			t.Errorf("tenon %s: got %q, %q, %d", x.args, out, errOut, code)
		}
	}
	if out := e.ok(t, "ps", "-aq"); out != "" {
		t.Errorf("--rm left %s", out)
	}
}

func TestRootLargeStreams(t *testing.T) {
	e := realEngine(t)
	in := strings.Repeat("0123456789abcde\n", 1<<18) // 4 MiB
	out, errOut, code := e.run(t, in, "run", "--rm", "-i", "busybox", "cat")
	if out != in || code != 0 {
		t.Errorf("run: %d of %d bytes came back, %d, %s", len(out), len(in), code, errOut)
	}
	name := e.unique(t, "")
	e.ok(t, "run", "-d", "--name", name, "busybox", "sleep", "1000")
	if out, errOut, code = e.run(t, in, "exec", "-i", name, "cat"); out != in || code != 0 {
		t.Errorf("exec: %d of %d bytes came back, %d, %s", len(out), len(in), code, errOut)
	}
}

func TestRootLifeCycle(t *testing.T) {
	e := realEngine(t)
	name := e.unique(t, "")
	cid := filepath.Join(t.TempDir(), "cid")
	id := e.ok(t, "run", "-d", "--name", name, "--cidfile", cid, "-l", "e2e="+name, "busybox", "sh", "-c", "echo started; trap 'exit 3' TERM; while :; do sleep 0.1; done")
	if b, err := os.ReadFile(cid); string(b) != id || err != nil {
		t.Errorf("cidfile: %q, %v", b, err)
	}
	status := func(want string) {
		t.Helper()
		if got := e.ok(t, "inspect", "-f", "{{.State.Status}}", name); got != want {
			t.Errorf("got status %s, want %s", got, want)
		}
	}
	started := func(n int) {
		t.Helper()
		e.until(t, func(out string) bool { return strings.Count(out, "started") == n }, "logs", name)
	}
	status("running")
	started(1)
	if got := e.ok(t, "ps", "-q", "--no-trunc", "-f", "label=e2e="+name); got != id {
		t.Errorf("ps: %q", got)
	}
	e.ok(t, "pause", name)
	status("paused")
	e.ok(t, "unpause", name)
	e.ok(t, "exec", name, "touch", "/new")
	if got := e.ok(t, "diff", name); !strings.Contains(got, "A /new") {
		t.Errorf("diff: %q", got)
	}
	if got := e.ok(t, "top", name); !strings.Contains(got, "PID") || !strings.Contains(got, "sleep") {
		t.Errorf("top: %q", got)
	}
	if got := e.ok(t, "stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}", name); !strings.HasPrefix(got, name+" ") {
		t.Errorf("stats: %q", got)
	}
	e.ok(t, "update", "--memory", "64m", "--memory-swap", "64m", name)
	if got := e.ok(t, "inspect", "-f", "{{.HostConfig.Memory}}", name); got != "67108864" {
		t.Errorf("update: %q", got)
	}
	e.ok(t, "stop", name)
	if got := e.ok(t, "wait", name); got != "3" {
		t.Errorf("wait: %q", got)
	}
	e.ok(t, "start", name)
	status("running")
	started(2)
	e.ok(t, "restart", "-t", "0", name)
	status("running")
	started(3)
	e.ok(t, "kill", "-s", "KILL", name)
	if got := e.ok(t, "wait", name); got != "137" {
		t.Errorf("wait after kill: %q", got)
	}
	other := e.unique(t, "-renamed")
	e.ok(t, "rename", name, other)
	e.ok(t, "rm", other)
	if _, errOut, code := e.run(t, "", "inspect", other); code != 1 || !strings.Contains(errOut, "No such object") {
		t.Errorf("inspect after rm: %d %s", code, errOut)
	}
	if got := e.ok(t, "events", "--since", "10m", "--until", "0s", "-f", "container="+id, "--format", "{{.Action}}"); !strings.Contains(got, "create") || !strings.Contains(got, "destroy") {
		t.Errorf("events: %q", got)
	}
}

func TestRootExecAndLogs(t *testing.T) {
	e := realEngine(t)
	name := e.unique(t, "")
	e.ok(t, "run", "-d", "--name", name, "busybox", "sh", "-c", "echo one; echo two >&2; echo three; sleep 1000")
	for _, x := range []struct {
		args, stdin, out string
		code             int
	}{
		{args: "exec NAME echo hi", out: "hi\n"},
		{args: "exec NAME sh -c exit_5", code: 5},
		{args: "exec NAME nosuch", code: 127},
		{args: "exec -i NAME cat", stdin: "x", out: "x"},
		{args: "exec -e A=b -w /tmp -u 1:2 NAME sh -c echo_$A_$PWD_$(id_-u):$(id_-g)", out: "b /tmp 1:2\n"},
		{args: "exec nosuchcontainer true", code: 1},
	} {
		args := strings.Fields(strings.ReplaceAll(x.args, "NAME", name))
		last := len(args) - 1
		args[last] = strings.ReplaceAll(args[last], "_", " ")
		out, errOut, code := e.run(t, x.stdin, args...)
		if code == 127 {
			out = "" // where the complaint goes is the server's choice
		}
		if out != x.out || code != x.code {
			t.Errorf("tenon %s: got %q, %q, %d", x.args, out, errOut, code)
		}
	}
	// The follower sees what was and what comes, and ends with the container.
	follow := e.command(t, "logs", "-f", name)
	pipe, err := follow.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, _ := io.ReadAtLeast(pipe, buf, len("one\nthree\n"))
	e.ok(t, "kill", name)
	if _, err := io.Copy(io.Discard, pipe); err != nil {
		t.Error(err)
	}
	if err := follow.Wait(); err != nil || string(buf[:n]) != "one\nthree\n" {
		t.Errorf("logs -f: %q, %v", buf[:n], err)
	}
	out, errOut, _ := e.run(t, "", "logs", name)
	if out != "one\nthree\n" || errOut != "two\n" {
		t.Errorf("logs: %q and %q", out, errOut)
	}
	// The two streams are not ordered among each other: one line of either.
	out, errOut, _ = e.run(t, "", "logs", "--tail", "1", "-t", name)
	if got := out + errOut; strings.Count(got, "\n") != 1 || !strings.Contains(got, "Z ") {
		t.Errorf("logs --tail 1 -t: %q", got)
	}
}

// terminalSession is a tenon command on a terminal.
type terminalSession struct {
	t    *testing.T
	cmd  *exec.Cmd
	ptmx *os.File
	mu   sync.Mutex
	seen bytes.Buffer
	more chan struct{}
}

func (e *engine) onTerminal(t *testing.T, args ...string) *terminalSession {
	t.Helper()
	s := &terminalSession{t: t, cmd: e.command(t, args...), more: make(chan struct{}, 1)}
	var err error
	if s.ptmx, err = pty.StartWithSize(s.cmd, &pty.Winsize{Rows: 31, Cols: 97}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.ptmx.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := s.ptmx.Read(buf)
			s.mu.Lock()
			s.seen.Write(buf[:n])
			s.mu.Unlock()
			select {
			case s.more <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	return s
}

// expect waits for text in the output and forgets what came before it.
func (s *terminalSession) expect(text string) {
	s.t.Helper()
	deadline := time.After(time.Minute)
	for {
		s.mu.Lock()
		i := strings.Index(s.seen.String(), text)
		if i >= 0 {
			s.seen.Next(i + len(text))
			s.mu.Unlock()
			return
		}
		all := s.seen.String()
		s.mu.Unlock()
		select {
		case <-s.more:
		case <-deadline:
			s.t.Fatalf("no %q in %q", text, all)
		}
	}
}

func (s *terminalSession) send(text string) {
	s.t.Helper()
	if _, err := s.ptmx.WriteString(text); err != nil {
		s.t.Fatal(err)
	}
}

func (s *terminalSession) exit() int {
	s.t.Helper()
	err := s.cmd.Wait()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		s.t.Fatal(err)
	}
	return s.cmd.ProcessState.ExitCode()
}

func TestRootTerminal(t *testing.T) {
	e := realEngine(t)
	name := e.unique(t, "")
	s := e.onTerminal(t, "run", "-it", "--name", name, "busybox", "sh")
	s.expect("# ")
	s.send("stty size\n")
	s.expect("31 97")
	s.expect("# ")
	if err := pty.Setsize(s.ptmx, &pty.Winsize{Rows: 40, Cols: 120}); err != nil {
		t.Fatal(err)
	}
	// The new size arrives on its own time.
	s.send("until [ \"$(stty size)\" = '40 120' ]; do sleep 0.05; done; echo re''sized\n")
	s.expect("resized")
	s.expect("# ")
	// The terminal answers and cat repeats: it runs, and ctrl-c will reach it.
	s.send("echo go $((1+1)); cat\n")
	s.expect("go 2\r\n")
	s.send("ping\n")
	s.expect("ping\r\nping\r\n")
	s.send("\x03")
	s.expect("# ")
	s.send("echo still $((40+2))\n")
	s.expect("still 42")
	s.expect("# ")
	s.send("\x10\x11")
	if code := s.exit(); code != 0 {
		t.Errorf("detached with %d", code)
	}
	if got := e.ok(t, "inspect", "-f", "{{.State.Status}}", name); got != "running" {
		t.Errorf("after detaching: %s", got)
	}
	s = e.onTerminal(t, "attach", name)
	s.send("echo again $((1+1))\n")
	s.expect("again 2")
	s.expect("# ")
	x := e.onTerminal(t, "exec", "-it", name, "sh")
	x.expect("# ")
	x.send("stty size; exit 9\n")
	x.expect("31 97")
	if code := x.exit(); code != 9 {
		t.Errorf("exec ended with %d", code)
	}
	s.send("exit 6\n")
	if code := s.exit(); code != 6 {
		t.Errorf("attach ended with %d", code)
	}
}

func TestRootSignals(t *testing.T) {
	e := realEngine(t)
	cmd := e.command(t, "run", "--rm", "--name", e.unique(t, ""), "busybox", "sh", "-c", "trap 'echo got it; exit 4' TERM; echo ready; while :; do sleep 0.05; done")
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(pipe, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(pipe)
	_ = cmd.Wait() // the exit code says it
	if code := cmd.ProcessState.ExitCode(); code != 4 || string(rest) != "got it\n" || err != nil {
		t.Errorf("got %d, %q, %v", code, rest, err)
	}
}
