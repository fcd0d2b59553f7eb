package wire

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"tenon.dev/tenon/client/runproto"
	"tenon.dev/tenon/internal/engine"
)

func TestStatus(t *testing.T) {
	for _, tc := range []struct {
		err    error
		status int
		msg    string
	}{
		{fmt.Errorf("container x: %w", errdefs.ErrNotFound), 404, "container x: not found"},
		{fmt.Errorf("network x not found: %w", errdefs.ErrNotFound), 404, "network x not found"},
		{fmt.Errorf("%w: %w", fmt.Errorf("dial: %w", syscall.ECONNREFUSED), errdefs.ErrUnavailable), 503, "dial: connection refused"},
		{errdefs.ErrNotFound.WithMessage("No such container: x"), 404, "No such container: x"},
		{fmt.Errorf("name: %w", errdefs.ErrInvalidArgument), 400, "name"},
		{fmt.Errorf("x: %w", errdefs.ErrOutOfRange), 400, "x: out of range"},
		{fmt.Errorf("x: %w", errdefs.ErrAlreadyExists), 409, "x: already exists"},
		{fmt.Errorf("port 80 is in use: %w", errdefs.ErrAlreadyExists), 409, "port 80 is in use"},
		{fmt.Errorf("x: %w", errdefs.ErrConflict), 409, "x"},
		{fmt.Errorf("x: %w", errdefs.ErrFailedPrecondition), 409, "x"},
		{fmt.Errorf("x: %w", errdefs.ErrUnauthenticated), 401, "x: unauthorized"},
		{fmt.Errorf("x: %w", errdefs.ErrPermissionDenied), 403, "x: permission denied"},
		{fmt.Errorf("x: %w", errdefs.ErrUnavailable), 503, "x"},
		{fmt.Errorf("x: %w", errdefs.ErrNotImplemented), 501, "x: not implemented"},
		{fmt.Errorf("y is not built yet: %w", errdefs.ErrNotImplemented), 501, "y is not built yet"},
		{fmt.Errorf("x: %w", engine.ErrNotModified), 304, "x: not modified"},
		{fmt.Errorf("x: %w", context.Canceled), StatusClientGone, "x: context canceled"},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), 500, "x: context deadline exceeded"},
		{fmt.Errorf("mount: %w", syscall.EINVAL), 500, "mount: invalid argument"},
		{fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, syscall.EINVAL), 400, "invalid argument: invalid argument"},
		{errors.New("boom"), 500, "boom"},
		// The outermost class decides.
		{fmt.Errorf("start: %w", fmt.Errorf("%w: %w", errdefs.ErrConflict, errdefs.ErrNotFound)), 409, "start: conflict: not found"},
		{&http.MaxBytesError{Limit: 1}, 413, "http: request body too large"},
	} {
		if got := Status(tc.err); got != tc.status {
			t.Errorf("%v: got %d, want %d", tc.err, got, tc.status)
		}
		if got := Message(tc.err); got != tc.msg {
			t.Errorf("got %q, want %q", got, tc.msg)
		}
	}
}

// TestFrames reads what Frames writes with the two readers that clients use.
func TestFrames(t *testing.T) {
	var buf bytes.Buffer
	f := NewFrames(&buf)
	big := bytes.Repeat([]byte("x"), 3<<20+7)
	for _, p := range []struct {
		typ byte
		b   []byte
	}{{Stdout, []byte("out")}, {Stderr, []byte("err")}, {Stdout, big}} {
		if n, err := f.Stream(p.typ).Write(p.b); err != nil || n != len(p.b) {
			t.Fatal(n, err)
		}
	}
	raw := bytes.Clone(buf.Bytes())
	var out, errs bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &errs, &buf); err != nil {
		t.Fatal(err)
	}
	if out.String() != "out"+string(big) || errs.String() != "err" {
		t.Errorf("stdcopy: %d and %q", out.Len(), errs.String())
	}
	out.Reset()
	fr := runproto.NewReader(bytes.NewReader(raw))
	for {
		typ, p, err := fr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if typ == runproto.Stdout {
			out.Write(p)
		}
	}
	if out.Len() != len(big)+3 {
		t.Errorf("runproto: %d bytes", out.Len())
	}
}

func FuzzFrames(f *testing.F) {
	f.Add([]byte("a"), []byte("bc"))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var buf, out, errs bytes.Buffer
		fr := NewFrames(&buf)
		for range 2 {
			_, _ = fr.Stream(Stdout).Write(a) // into memory
			_, _ = fr.Stream(Stderr).Write(b)
		}
		if _, err := stdcopy.StdCopy(&out, &errs, &buf); err != nil {
			t.Fatal(err)
		}
		if out.String() != string(a)+string(a) || errs.String() != string(b)+string(b) {
			t.Errorf("got %q %q", out.String(), errs.String())
		}
	})
}

// serve runs handler on a real unix socket and returns a dialer.
func serve(t *testing.T, handler http.HandlerFunc) func() *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: handler}
	done := make(chan struct{})
	go func() { _ = srv.Serve(l); close(done) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	return func() *net.UnixConn {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		return c.(*net.UnixConn)
	}
}

const (
	request   = "POST /x HTTP/1.1\r\nHost: t\r\nUser-Agent: tenon\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
	testIntro = "HTTP/1.1 101 UPGRADED\r\n\r\n"
)

// TestSession: input with a half-close, output after it, a clean end.
func TestSession(t *testing.T) {
	dial := serve(t, func(w http.ResponseWriter, r *http.Request) {
		s, _, err := Hijack(w, r, testIntro)
		if err != nil {
			t.Error(err)
			return
		}
		defer s.End()
		b, err := io.ReadAll(s) // ends with the client's half-close
		if err != nil {
			t.Error(err)
		}
		_, _ = fmt.Fprintf(s, "got %s", b)
	})
	c := dial()
	// What is sent together with the request must not be lost.
	if _, err := io.WriteString(c, request+"hello "); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(c, "world")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil || string(b) != testIntro+"got hello world" {
		t.Errorf("got %q, %v", b, err)
	}
}

// TestSessionApart: a client that reads all that is there in one go gets the header
// alone, whoever sends it, and what follows by the next read.
func TestSessionApart(t *testing.T) {
	dial := serve(t, func(w http.ResponseWriter, r *http.Request) {
		s, _, err := Hijack(w, r, testIntro)
		if err != nil {
			t.Error(err)
			return
		}
		defer s.End()
		go s.Begin()
		_, _ = io.WriteString(s, "output")
	})
	c := dial()
	_, _ = io.WriteString(c, strings.Replace(request, "tenon", "another", 1))
	b := make([]byte, 8192)
	n, err := c.Read(b)
	if err != nil || string(b[:n]) != testIntro {
		t.Fatalf("first read: %q, %v", b[:n], err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "output" {
		t.Errorf("then %q, %v", b, err)
	}
}

// TestSessionBody: a request's body is not the stream.
func TestSessionBody(t *testing.T) {
	dial := serve(t, func(w http.ResponseWriter, r *http.Request) {
		s, _, err := Hijack(w, r, testIntro)
		if err != nil {
			t.Error(err)
			return
		}
		defer s.End()
		_, _ = io.Copy(s, s)
	})
	c := dial()
	_, _ = io.WriteString(c, strings.Replace(request, "\r\n\r\n", "\r\nContent-Length: 4\r\n\r\nbody", 1)+"stream")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != testIntro+"stream" {
		t.Errorf("got %q, %v", b, err)
	}
}

// TestSessionUnreadInput: the client sees an end of file, not a reset, when the
// session ends with input unread.
func TestSessionUnreadInput(t *testing.T) {
	dial := serve(t, func(w http.ResponseWriter, r *http.Request) {
		s, _, err := Hijack(w, r, testIntro)
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = s.Read(make([]byte, 1)) // wait until there is some
		_, _ = io.WriteString(s, "bye")
		s.End()
	})
	c := dial()
	_, _ = io.WriteString(c, request+strings.Repeat("z", 10000))
	b, err := io.ReadAll(c)
	if err != nil || string(b) != testIntro+"bye" {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestSessionRefuse(t *testing.T) {
	dial := serve(t, func(w http.ResponseWriter, r *http.Request) {
		s, _, err := Hijack(w, r, testIntro)
		if err != nil {
			t.Error(err)
			return
		}
		s.Refuse(fmt.Errorf("container is paused: %w", errdefs.ErrFailedPrecondition))
		s.Begin() // too late
		s.End()
	})
	c := dial()
	_, _ = io.WriteString(c, request)
	b, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 409 Conflict\r\n") || !strings.HasSuffix(string(b), `{"message":"container is paused"}`+"\n") {
		t.Errorf("got %q, %v", b, err)
	}
}

// TestHangup: the session's context ends when clients close, though nobody
// reads, and not when they only end their input; and nothing is left of many.
func TestHangup(t *testing.T) {
	const clients = 500
	ended := make(chan error, clients)
	ready := make(chan struct{}, clients)
	dial := serve(t, func(w http.ResponseWriter, r *http.Request) {
		s, ctx, err := Hijack(w, r, testIntro)
		if err != nil {
			t.Error(err)
			return
		}
		s.Begin()
		ready <- struct{}{}
		<-ctx.Done()
		s.End()
		ended <- context.Cause(ctx)
	})
	before := runtime.NumGoroutine()
	fds := countFDs(t)
	var conns []*net.UnixConn
	for range clients {
		c := dial()
		_, _ = io.WriteString(c, request)
		conns = append(conns, c)
	}
	for range clients {
		<-ready
	}
	for _, c := range conns {
		_ = c.CloseWrite()
	}
	select {
	case err := <-ended:
		t.Fatalf("a half-close ended the session: %v", err)
	case <-time.After(50 * time.Millisecond): // there is no event for "nothing happens"
	}
	for _, c := range conns {
		_ = c.Close()
	}
	for range clients {
		select {
		case err := <-ended:
			if !errors.Is(err, ErrClientGone) {
				t.Fatalf("cause: %v", err)
			}
		case <-time.After(time.Minute):
			t.Fatal("sessions of closed clients go on")
		}
	}
	watcher.mu.Lock()
	left := len(watcher.calls)
	watcher.mu.Unlock()
	if left != 0 {
		t.Errorf("%d watches are left", left)
	}
	deadline := time.Now().Add(time.Minute)
	for runtime.NumGoroutine() > before+10 || countFDs(t) > fds+10 {
		if time.Now().After(deadline) {
			t.Fatalf("goroutines %d, was %d; descriptors %d, was %d", runtime.NumGoroutine(), before, countFDs(t), fds)
		}
		runtime.Gosched()
	}
}

func countFDs(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// TestStream: the first bytes of a live stream come at once, later ones too.
func TestStream(t *testing.T) {
	var next sync.WaitGroup
	next.Add(1)
	dial := serve(t, func(w http.ResponseWriter, r *http.Request) {
		s := NewStream(w, "application/json", true)
		enc := json.NewEncoder(s)
		for i := range 1000 {
			_ = enc.Encode(i)
		}
		next.Wait() // until the client has all of them
		_ = enc.Encode("last")
		s.Close(true)
	})
	c := dial()
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
	var got []byte
	buf := make([]byte, 4096)
	for !bytes.Contains(got, []byte("\n999\n")) {
		n, err := c.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, got)
		}
		got = append(got, buf[:n]...)
	}
	next.Done()
	rest, err := io.ReadAll(c)
	if err != nil || !bytes.Contains(rest, []byte("last")) {
		t.Errorf("got %q, %v", rest, err)
	}
}

// TestStreamHeader: a client of a silent stream gets the header.
func TestStreamHeader(t *testing.T) {
	dial := serve(t, func(w http.ResponseWriter, r *http.Request) {
		s := NewStream(w, "text/plain", true)
		s.StartWithin(time.Millisecond)
		<-r.Context().Done()
		s.Close(true)
	})
	c := dial()
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: t\r\n\r\n")
	b := make([]byte, 15)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "HTTP/1.1 200 OK" {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestReadJSON(t *testing.T) {
	dial := serve(t, func(w http.ResponseWriter, r *http.Request) {
		var v struct{ A int }
		if err := ReadJSON(w, r, &v); err != nil {
			WriteError(w, err)
			return
		}
		_ = WriteJSON(w, 200, v)
	})
	for _, tc := range []struct {
		name, headers, body string
		status              string
		want                string
	}{
		{"good", "Content-Type: application/json\r\n", `{"A":1}`, "200", `{"A":1}`},
		{"charset", "Content-Type: application/json; charset=utf-8\r\n", `{"A":1}`, "200", `{"A":1}`},
		{"empty", "", ``, "200", `{"A":0}`},
		{"no type", "", `{"A":1}`, "400", "Content-Type"},
		{"form", "Content-Type: application/x-www-form-urlencoded\r\n", `A=1`, "400", "Content-Type"},
		{"broken", "Content-Type: application/json\r\n", `{"A":`, "400", "invalid JSON"},
		{"deep", "Content-Type: application/json\r\n", strings.Repeat("[", 20000), "400", "invalid JSON"},
		{"two", "Content-Type: application/json\r\n", `{} {}`, "400", "unexpected content"},
		{"large", "Content-Type: application/json\r\nX-Length: 9999999\r\n", ``, "413", "too large"},
	} {
		c := dial()
		n := len(tc.body)
		if strings.Contains(tc.headers, "9999999") {
			n = 9999999
		}
		_, _ = fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: t\r\nConnection: close\r\n%sContent-Length: %d\r\n\r\n%s", tc.headers, n, tc.body)
		b, _ := io.ReadAll(c)
		if !strings.HasPrefix(string(b), "HTTP/1.1 "+tc.status) || !strings.Contains(string(b), tc.want) {
			t.Errorf("%s: got %q", tc.name, b)
		}
	}
}
