package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/client/runproto"
)

// serveRun answers POST /tenon/v1/run with f and everything else with other.
func serveRun(t *testing.T, f func(req runproto.Request, h http.Header, r *runproto.Reader, w *runproto.Writer), other http.HandlerFunc) (host string) {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	if f != nil {
		mux.HandleFunc("POST "+runproto.Path, func(w http.ResponseWriter, r *http.Request) {
			var req runproto.Request
			if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
				t.Errorf("request: %v", err)
			}
			conn, rw, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: "+runproto.Upgrade+"\r\n\r\n")
			f(req, r.Header, runproto.NewReader(rw), runproto.NewWriter(conn))
		})
	}
	if other == nil {
		other = http.NotFound
	}
	mux.HandleFunc("/", other)
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: mux}}
	s.Start()
	t.Cleanup(s.Close)
	return "unix://" + sock
}

// tenon runs the command line and returns its output and exit code.
func tenon(t *testing.T, host, stdin string, args ...string) (out, errOut string, code int) {
	t.Helper()
	var o, e bytes.Buffer
	code = Main(Env{In: strings.NewReader(stdin), Out: &o, Err: &e, Version: "test"}, append([]string{"-H", host}, args...))
	return o.String(), e.String(), code
}

func TestRunSession(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	created := runproto.CreatedMessage{ID: "abc", Warnings: []string{"careful"}}
	for _, x := range []struct {
		name, args, stdin string
		serve             func(req runproto.Request, h http.Header, r *runproto.Reader, w *runproto.Writer)
		out, errOut       string
		code              int
	}{
		{
			name: "output and exit code", args: "run --name n --pull never busybox true",
			serve: func(req runproto.Request, _ http.Header, _ *runproto.Reader, w *runproto.Writer) {
				if req.Name != "n" || req.Pull != "never" || fmt.Sprint(req.Attach) != "[stdout stderr]" {
					t.Errorf("got request %+v", req)
				}
				w.WriteJSON(runproto.Created, created)
				w.Write(runproto.Stdout, []byte("out"))
				w.Write(runproto.Stderr, []byte("err"))
				w.WriteJSON(runproto.Exit, runproto.ExitMessage{Code: 7})
			},
			out: "out", errOut: "WARNING: careful\nerr", code: 7,
		},
		{
			name: "standard input", args: "run -i busybox cat", stdin: "hello",
			serve: func(_ runproto.Request, _ http.Header, r *runproto.Reader, w *runproto.Writer) {
				w.WriteJSON(runproto.Created, runproto.CreatedMessage{ID: "abc"})
				for {
					typ, p, err := r.Next()
					if err != nil {
						t.Errorf("read: %v", err)
						return
					}
					if typ == runproto.StdinEOF {
						break
					}
					w.Write(runproto.Stdout, p)
				}
				w.WriteJSON(runproto.Exit, runproto.ExitMessage{})
			},
			out: "hello",
		},
		{
			name: "detached", args: "run -d busybox",
			serve: func(req runproto.Request, _ http.Header, _ *runproto.Reader, w *runproto.Writer) {
				if !req.Detach || len(req.Attach) != 0 {
					t.Errorf("got request %+v", req)
				}
				w.WriteJSON(runproto.Created, runproto.CreatedMessage{ID: "abc"})
				w.WriteJSON(runproto.Exit, runproto.ExitMessage{ID: "abc"})
			},
			out: "abc\n",
		},
		{
			name: "no such command", args: "run busybox nosuch",
			serve: func(_ runproto.Request, _ http.Header, _ *runproto.Reader, w *runproto.Writer) {
				w.WriteJSON(runproto.Created, runproto.CreatedMessage{ID: "abc"})
				w.WriteJSON(runproto.Error, runproto.ErrorMessage{Status: 400, Kind: "start", Message: "exec nosuch: executable file not found in $PATH"})
			},
			errOut: "Error response from daemon: exec nosuch: executable file not found in $PATH\n", code: 127,
		},
		{
			name: "name in use", args: "run --name x busybox",
			serve: func(_ runproto.Request, _ http.Header, _ *runproto.Reader, w *runproto.Writer) {
				w.WriteJSON(runproto.Error, runproto.ErrorMessage{Status: 409, Message: "name in use"})
			},
			errOut: "Error response from daemon: name in use\n", code: 125,
		},
		{
			name: "code of the server", args: "run busybox /etc",
			serve: func(_ runproto.Request, _ http.Header, _ *runproto.Reader, w *runproto.Writer) {
				w.WriteJSON(runproto.Error, runproto.ErrorMessage{Status: 400, Kind: "start", Code: 126, Message: "is a directory"})
			},
			errOut: "Error response from daemon: is a directory\n", code: 126,
		},
		{
			name: "pull", args: "run busybox",
			serve: func(_ runproto.Request, _ http.Header, _ *runproto.Reader, w *runproto.Writer) {
				w.Write(runproto.Progress, []byte(`{"status":"Unable to find image 'busybox' locally"}`))
				w.Write(runproto.Progress, []byte(`{"status":"Pulling","id":"abc"}`))
				w.WriteJSON(runproto.Created, runproto.CreatedMessage{ID: "abc"})
				w.WriteJSON(runproto.Exit, runproto.ExitMessage{})
			},
			errOut: "Unable to find image 'busybox' locally\nabc: Pulling\n",
		},
		{
			name: "lost connection", args: "run busybox",
			serve: func(_ runproto.Request, _ http.Header, _ *runproto.Reader, w *runproto.Writer) {
				w.WriteJSON(runproto.Created, runproto.CreatedMessage{ID: "abc"})
			},
			errOut: "tenon: the connection to the daemon broke, the container may still be running: EOF\n", code: 125,
		},
		{
			name: "garbage", args: "run busybox",
			serve: func(_ runproto.Request, _ http.Header, _ *runproto.Reader, w *runproto.Writer) {
				w.Write(runproto.Exit, []byte("garbage"))
			},
			errOut: "tenon: the daemon's answer is not understood: invalid character 'g' looking for beginning of value\n", code: 125,
		},
	} {
		t.Run(x.name, func(t *testing.T) {
			host := serveRun(t, x.serve, nil)
			out, errOut, code := tenon(t, host, x.stdin, strings.Fields(x.args)...)
			if out != x.out || errOut != x.errOut || code != x.code {
				t.Errorf("got %q, %q, %d; want %q, %q, %d", out, errOut, code, x.out, x.errOut, x.code)
			}
		})
	}
}

func TestRunCIDFile(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	host := serveRun(t, func(_ runproto.Request, _ http.Header, _ *runproto.Reader, w *runproto.Writer) {
		w.WriteJSON(runproto.Created, runproto.CreatedMessage{ID: "abc"})
		w.WriteJSON(runproto.Exit, runproto.ExitMessage{ID: "abc"})
	}, nil)
	file := filepath.Join(t.TempDir(), "cid")
	if _, errOut, code := tenon(t, host, "", "run", "-d", "--cidfile", file, "busybox"); code != 0 {
		t.Fatal(errOut)
	}
	if b, err := os.ReadFile(file); string(b) != "abc" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	if _, errOut, code := tenon(t, host, "", "run", "-d", "--cidfile", file, "busybox"); code != 125 || !strings.Contains(errOut, "container ID file found") {
		t.Errorf("a second time: %d %s", code, errOut)
	}
}

// TestRunCredentials checks that stored credentials go with the request, and
// that a helper program is asked only when the image has to be pulled.
func TestRunCredentials(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	write := func(text string) {
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`{"auths":{"reg.example.com":{"auth":"bWU6c2VjcmV0"}}}`)
	host := serveRun(t, func(_ runproto.Request, h http.Header, _ *runproto.Reader, w *runproto.Writer) {
		if h.Get("X-Registry-Auth") == "" {
			t.Error("no credentials")
		}
		w.WriteJSON(runproto.Exit, runproto.ExitMessage{})
	}, nil)
	if _, errOut, code := tenon(t, host, "", "run", "reg.example.com/web"); code != 0 {
		t.Error(errOut)
	}

	bin := t.TempDir()
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	script := "#!/bin/sh\nread server\necho asked >> " + bin + "/log\necho '{\"ServerURL\":\"'$server'\",\"Username\":\"me\",\"Secret\":\"s\"}'\n"
	if err := os.WriteFile(filepath.Join(bin, "docker-credential-test"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	write(`{"credHelpers":{"reg.example.com":"test"}}`)
	pulled := false
	host = serveRun(t, func(req runproto.Request, h http.Header, _ *runproto.Reader, w *runproto.Writer) {
		if req.Pull != "never" {
			t.Errorf("got pull %q", req.Pull)
		}
		if !pulled {
			w.WriteJSON(runproto.Error, runproto.ErrorMessage{Status: 404, Kind: "image", Message: "No such image"})
			return
		}
		w.WriteJSON(runproto.Exit, runproto.ExitMessage{Code: 3})
	}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/images/create" || r.Header.Get("X-Registry-Auth") == "" || r.URL.Query().Get("tag") != "latest" {
			t.Errorf("got %s", r.URL)
		}
		pulled = true
		io.WriteString(w, `{"status":"pulled"}`)
	})
	_, errOut, code := tenon(t, host, "", "run", "reg.example.com/web")
	log, _ := os.ReadFile(filepath.Join(bin, "log"))
	if code != 3 || !pulled || string(log) != "asked\n" {
		t.Errorf("got %d, pulled %v, helper %q, %s", code, pulled, log, errOut)
	}
}

// TestRunTerminal runs with a terminal: its size, raw bytes, a resize, and the
// detach keys.
func TestRunTerminal(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	ptmx, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer ptmx.Close()
	defer tty.Close()
	if err := pty.Setsize(ptmx, &pty.Winsize{Rows: 30, Cols: 100}); err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 16)
	host := serveRun(t, func(req runproto.Request, _ http.Header, r *runproto.Reader, w *runproto.Writer) {
		if !req.TTY || !req.Stdin || req.ConsoleSize == nil || *req.ConsoleSize != [2]uint{30, 100} {
			t.Errorf("got request %+v", req)
		}
		w.WriteJSON(runproto.Created, runproto.CreatedMessage{ID: "abc"})
		w.Write(runproto.Stdout, []byte("prompt> "))
		for {
			typ, p, err := r.Next()
			if err != nil {
				return
			}
			got <- fmt.Sprintf("%d:%q", typ, p)
		}
	}, nil)
	done := make(chan int, 1)
	go func() {
		done <- Main(Env{In: tty, Out: tty, Err: tty, Version: "test"}, []string{"-H", host, "run", "-it", "busybox"})
	}()
	stuck := time.AfterFunc(time.Minute, func() { ptmx.Close() }) // ends the read
	defer stuck.Stop()
	buf := make([]byte, 100)
	seen := ""
	for !strings.Contains(seen, "prompt> ") {
		n, err := ptmx.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		seen += string(buf[:n])
	}
	expect := func(want string) {
		t.Helper()
		select {
		case s := <-got:
			if s != want {
				t.Errorf("got frame %s, want %s", s, want)
			}
		case <-time.After(time.Minute):
			t.Fatalf("no frame, want %s", want)
		}
	}
	// ctrl-c is a byte for the container, not a signal for this process.
	ptmx.Write([]byte("\x03"))
	expect(`1:"\x03"`)
	ptmx.Write([]byte("\x10\x11"))
	expect(fmt.Sprintf("%d:%q", runproto.Detach, ""))
	select {
	case code := <-done:
		if code != 0 {
			t.Errorf("got exit code %d", code)
		}
	case <-time.After(time.Minute):
		t.Fatal("the command did not end")
	}
}

func TestFallback(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	var calls []string
	host := serveRun(t, nil, func(w http.ResponseWriter, r *http.Request) {
		calls = append(calls, r.Method+" "+r.URL.Path)
		switch r.URL.Path {
		case runproto.Path:
			w.WriteHeader(http.StatusNotImplemented)
		case "/containers/create":
			w.WriteHeader(http.StatusCreated)
			io.WriteString(w, `{"Id":"abc","Warnings":[]}`)
		case "/containers/abc/start":
			w.WriteHeader(http.StatusNoContent)
		}
	})
	out, errOut, code := tenon(t, host, "", "run", "-d", "busybox")
	want := "POST /tenon/v1/run POST /containers/create POST /containers/abc/start"
	if out != "abc\n" || code != 0 || strings.Join(calls, " ") != want {
		t.Errorf("got %q %q %d, calls %v", out, errOut, code, calls)
	}
}

// TestRunReaderLeaves checks that a run ends quietly, as a process that
// SIGPIPE ends, when nobody reads its output any more.
func TestRunReaderLeaves(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	host := serveRun(t, func(_ runproto.Request, _ http.Header, _ *runproto.Reader, w *runproto.Writer) {
		w.WriteJSON(runproto.Created, runproto.CreatedMessage{ID: "abc"})
		for w.Write(runproto.Stdout, []byte("y\n")) == nil {
		}
	}, nil)
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	pr.Close()
	defer pw.Close()
	var errOut bytes.Buffer
	code := Main(Env{In: strings.NewReader(""), Out: pw, Err: &errOut, Version: "test"}, []string{"-H", host, "run", "busybox", "yes"})
	if code != 141 || errOut.Len() > 0 {
		t.Errorf("got %d, %s", code, errOut.String())
	}
}

// TestTablesCannotCommandTheTerminal gives a terminal a hostile name.
func TestTablesCannotCommandTheTerminal(t *testing.T) {
	ptmx, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer ptmx.Close()
	defer tty.Close()
	l := listing{table: "{{.ID}}", headers: headers{"ID": "ID"}}
	if err := l.print(tty, "", []any{containerRow{s: container.Summary{ID: "\x1b]0;pwned\x07"}, full: true}}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, err := io.ReadAtLeast(ptmx, buf, len("ID\r\n\\x1b]0;pwned\\a"))
	if got := string(buf[:n]); err != nil || strings.Contains(got, "\x1b") || !strings.Contains(got, `\x1b]0;pwned\a`) {
		t.Errorf("got %q, %v", got, err)
	}
}
