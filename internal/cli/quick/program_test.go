package quick

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tenon.dev/tenon/client/runproto"
)

// program builds tenon as scripts/build does, in built.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "tenon-quick-")
	if err != nil {
		return "", err
	}
	built = dir
	args := []string{"build", "-o", dir + "/tenon"}
	if runtime.GOARCH == "amd64" {
		args = append(args, "-ldflags", "-E tenon_entry")
	}
	cmd := exec.Command("go", append(args, "tenon.dev/tenon/cmd/tenon")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return dir + "/tenon", nil
})

var built string

func TestMain(m *testing.M) {
	code := m.Run()
	if built != "" {
		os.RemoveAll(built)
	}
	os.Exit(code)
}

// limit is how long anything here may take.
const limit = 60 * time.Second

// daemon answers each request by a function; the connection is closed behind it.
func daemon(t *testing.T, answer func(c net.Conn, r *bufio.Reader)) (host string) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(socketDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(limit))
				br := bufio.NewReader(c)
				r, err := http.ReadRequest(br)
				if err == nil {
					_, err = io.Copy(io.Discard, r.Body)
				}
				if err != nil {
					t.Errorf("read a request: %v", err)
					return
				}
				answer(c, br)
			})
		}
	})
	t.Cleanup(func() { l.Close(); conns.Wait() })
	return "unix://" + l.Addr().String()
}

func tenon(t *testing.T, host string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "TENON_HOST="+host, "DOCKER_CONFIG=/nonexistent")
	return cmd
}

// TestSame: whatever the daemon answers, the program behaves in the same way
// with package cli alone and with this one in front.
func TestSame(t *testing.T) {
	t.Parallel()
	created := frame(runproto.Created, `{"id":"0123abcd"}`)
	out, errs := frame(runproto.Stdout, "out\n"), frame(runproto.Stderr, "err\n")
	for name, answer := range map[string]string{
		"nothing":       "",
		"no HTTP":       "what?\r\n\r\n",
		"no endpoint":   "HTTP/1.1 404 Not Found\r\nContent-Length: 20\r\n\r\n" + `{"message":"no page"}`[:20],
		"an error":      "HTTP/1.1 409 Conflict\r\nContent-Length: 20\r\n\r\n" + `{"message":"in use"}`,
		"success":       agreed + created + out + errs + frame(runproto.Exit, `{"code":0}`),
		"a code":        agreed + created + frame(runproto.Exit, `{"code":42}`),
		"detached":      agreed + created + frame(runproto.Exit, `{"id":"0123abcd","code":0}`),
		"a warning":     agreed + frame(runproto.Created, `{"id":"0123abcd","warnings":["beware"]}`) + out + frame(runproto.Exit, `{"code":1}`),
		"cannot start":  agreed + created + frame(runproto.Error, `{"status":400,"message":"exec: \"x\": executable file not found","kind":"start"}`),
		"start's code":  agreed + created + frame(runproto.Error, `{"status":400,"message":"no","kind":"start","code":126}`),
		"cut":           agreed + created + out,
		"cut in a head": agreed + created + out + errs[:5],
		"no image":      agreed + frame(runproto.Error, `{"status":404,"message":"No such image: x","kind":"image"}`),
		"progress":      agreed + frame(runproto.Progress, `{"status":"Pulling"}`) + created + out + frame(runproto.Exit, `{"code":3}`),
		"a failed wait": agreed + created + frame(runproto.Exit, `{"code":0,"error":"lost"}`),
		"bad frames":    agreed + "\x01\x02\x03\x04\x05\x06\x07\x08\x09",
		"bad JSON":      agreed + created + frame(runproto.Exit, `{"code":"x"}`),
		"much":          agreed + created + strings.Repeat(frame(runproto.Stdout, strings.Repeat("0123456789\n", 3000)), 30) + frame(runproto.Exit, `{"code":0}`),
	} {
		host := daemon(t, func(c net.Conn, _ *bufio.Reader) { io.WriteString(c, answer) })
		for _, c := range []struct{ quick, slow string }{
			{"run x true", "run --sig-proxy=true x true"},
			{"run -d x true", "run -d=true x true"},
			{"exec x true", "exec -- x true"},
			{"exec -d x true", "exec -d=true x true"},
		} {
			var results []string
			for _, line := range []string{c.quick, c.slow} {
				cmd := tenon(t, host, strings.Fields(line)...)
				var stdout, stderr bytes.Buffer
				cmd.Stdout, cmd.Stderr = &stdout, &stderr
				err := cmd.Run()
				results = append(results, fmt.Sprintf("%v\n%s\n%s", err, stdout.String(), stderr.String()))
			}
			if results[0] != results[1] {
				t.Errorf("%s, %s: %.500s\nwithout this package: %.500s", name, c.quick, results[0], results[1])
			}
		}
	}
}

// status returns a line of /proc/PID/status.
func status(t *testing.T, pid int, name string) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// TestSignals: a run without Go is one thread; it forwards signals, also while
// nobody reads its output.
func TestSignals(t *testing.T) {
	t.Parallel()
	if runtime.GOARCH != "amd64" {
		return // there is no entry
	}
	began := make(chan struct{}, 10)
	signals := make(chan string, 10)
	host := daemon(t, func(c net.Conn, br *bufio.Reader) {
		io.WriteString(c, agreed+frame(runproto.Created, `{"id":"a"}`)+frame(runproto.Stdout, strings.Repeat("x", 200<<10)))
		began <- struct{}{}
		r := runproto.NewReader(br)
		for {
			typ, p, err := r.Next()
			if err != nil || typ != runproto.Signal {
				t.Errorf("frame %d: %v", typ, err)
				return
			}
			signals <- string(p)
			if strings.Contains(string(p), "SIGTERM") {
				io.WriteString(c, frame(runproto.Exit, `{"code":143}`))
				return
			}
		}
	})
	for _, slow := range []bool{false, true} {
		cmd := tenon(t, host, "run", "--rm", "x")
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		cmd.Stdout = w
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		await(t, began)
		read := func() {
			if n, err := io.Copy(io.Discard, r); n != 200<<10 || err != nil {
				t.Errorf("%d bytes of output, %v", n, err)
			}
		}
		if !slow {
			// What came first shows that it catches signals.
			if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		// It blocks signals soon after it has sent its request.
		for deadline := time.Now().Add(limit); ; {
			mask, err := strconv.ParseUint(status(t, cmd.Process.Pid, "SigBlk"), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			if mask&(1<<(syscall.SIGUSR1-1)) != 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("signals are not caught")
			}
			time.Sleep(time.Millisecond)
		}
		if n := status(t, cmd.Process.Pid, "Threads"); n != "1" {
			t.Errorf("%s threads", n)
		}
		for sig, want := range map[syscall.Signal]string{syscall.SIGINT: "SIGINT", syscall.SIGUSR1: "SIGUSR1", 35: "35"} {
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if got, want := await(t, signals), `{"signal":"`+want+`"}`; got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		}
		for _, sig := range []syscall.Signal{syscall.SIGCHLD, syscall.SIGWINCH, syscall.SIGURG, syscall.SIGTTOU, syscall.SIGPIPE} {
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if got := await(t, signals); got != `{"signal":"SIGTERM"}` {
			t.Errorf("got %s", got)
		}
		if slow {
			read()
		} else {
			n, err := io.Copy(io.Discard, r)
			if n != 200<<10-1 || err != nil {
				t.Errorf("%d bytes of output, %v", n, err)
			}
		}
		if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != 143 {
			t.Errorf("%v", cmd.ProcessState)
		}
	}
}

func await[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(limit):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

// TestReaderLeaves: nobody reads the output any more.
func TestReaderLeaves(t *testing.T) {
	t.Parallel()
	host := daemon(t, func(c net.Conn, _ *bufio.Reader) {
		io.WriteString(c, agreed+frame(runproto.Created, `{"id":"a"}`))
		for {
			if _, err := io.WriteString(c, frame(runproto.Stdout, "x\n")); err != nil {
				return
			}
		}
	})
	for _, args := range [][]string{{"run", "x"}, {"exec", "x", "y"}} {
		cmd := tenon(t, host, args...)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdout = w
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if _, err := io.ReadFull(r, make([]byte, 2)); err != nil {
			t.Error(err)
		}
		r.Close()
		_ = cmd.Wait()
		ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if !(ws.Signaled() && ws.Signal() == syscall.SIGPIPE) && ws.ExitStatus() != 128+int(syscall.SIGPIPE) || stderr.Len() > 0 {
			t.Errorf("%q: %v, %s", args, cmd.ProcessState, stderr.String())
		}
	}
}

// TestFullOutput: an output that takes nothing is package cli's to complain about.
func TestFullOutput(t *testing.T) {
	t.Parallel()
	host := daemon(t, func(c net.Conn, _ *bufio.Reader) {
		io.WriteString(c, agreed+frame(runproto.Created, `{"id":"a"}`)+frame(runproto.Stdout, "x\n")+frame(runproto.Exit, `{"code":0}`))
	})
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, args := range [][]string{{"run", "x"}, {"run", "--sig-proxy=true", "x"}} {
		cmd := tenon(t, host, args...)
		cmd.Stdout = full
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if _ = cmd.Run(); cmd.ProcessState.ExitCode() != 125 || !strings.Contains(stderr.String(), "no space left") {
			t.Errorf("%q: %v, %s", args, cmd.ProcessState, stderr.String())
		}
	}
}

// TestClosedDescriptors: output that goes nowhere does not go to the daemon.
func TestClosedDescriptors(t *testing.T) {
	t.Parallel()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	host := daemon(t, func(c net.Conn, br *bufio.Reader) {
		io.WriteString(c, agreed+frame(runproto.Created, `{"id":"a"}`)+frame(runproto.Stdout, "x\n")+frame(runproto.Stderr, "y\n")+frame(runproto.Exit, `{"code":5}`))
		if b, err := io.ReadAll(br); len(b) > 0 {
			t.Errorf("the daemon got %q, %v", b, err)
		}
	})
	for _, closed := range []string{"<&-", ">&-", "2>&-", "<&- >&- 2>&-"} {
		cmd := tenon(t, host)
		cmd.Path, cmd.Args = "/bin/sh", []string{"sh", "-c", path + " exec x y " + closed}
		if err := cmd.Run(); cmd.ProcessState.ExitCode() != 5 {
			t.Errorf("%s: %v", closed, err)
		}
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	want, err := tenon(t, "", "-v=true").Output()
	if err != nil || !strings.HasPrefix(string(want), "Tenon version ") {
		t.Fatalf("%s, %v", want, err)
	}
	for _, flag := range []string{"-v", "--version"} {
		if got, err := tenon(t, "", flag).Output(); err != nil || string(got) != string(want) {
			t.Errorf("%s: %s, %v", flag, got, err)
		}
	}
}
