package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/client/runproto"
)

// serve runs h on a unix socket and returns a client of it.
func serve(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: h}}
	s.Start()
	t.Cleanup(s.Close)
	c, err := New("unix://" + sock)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestGet(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if got := r.Method + " " + r.URL.RequestURI(); got != "GET /a%2Fb/json?x=1" {
			t.Errorf("got %s", got)
		}
		io.WriteString(w, `{"ID":"x"}`)
	})
	var out struct{ ID string }
	if err := c.Get(t.Context(), "/a%2Fb/json", url.Values{"x": {"1"}}, &out); err != nil || out.ID != "x" {
		t.Fatalf("got %+v, %v", out, err)
	}
}

func TestErrors(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusConflict)
		io.WriteString(w, `{"message":"in use"}`)
	})
	err := c.Post(t.Context(), "/x", nil, nil, nil)
	if !errors.Is(err, errdefs.ErrConflict) || err.Error() != "Error response from daemon: in use" {
		t.Fatalf("got %v", err)
	}
	c, _ = New("unix:///nonexistent/sock")
	var ce *ConnectError
	if err := c.Get(t.Context(), "/x", nil, nil); !errors.As(err, &ce) || !strings.Contains(err.Error(), "tenond") {
		t.Fatalf("got %v", err)
	}
}

func TestBothWaysAtOnce(t *testing.T) {
	const size = 4 << 20
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		if _, err := io.Copy(w, r.Body); err != nil {
			t.Errorf("echo: %v", err)
		}
	})
	resp, err := c.Do(t.Context(), Request{Method: "POST", Path: "/echo", Body: io.LimitReader(zeros{}, size)})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, resp.Body); n != size || err != nil {
		t.Fatalf("got %d bytes, %v", n, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestContextEndsCall(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	if err := c.Get(ctx, "/x", nil, nil); err == nil {
		t.Fatal("no error")
	}
}

func TestRunFrames(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != runproto.Upgrade || r.URL.Path != runproto.Path {
			t.Errorf("got %s %v", r.URL, r.Header)
		}
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tenon-run\r\n\r\n")
		fw, fr := runproto.NewWriter(conn), runproto.NewReader(conn)
		typ, p, err := fr.Next()
		if typ != runproto.Stdin || err != nil {
			t.Errorf("got frame %d, %v", typ, err)
		}
		fw.Write(runproto.Stdout, p)
		fw.WriteJSON(runproto.Exit, runproto.ExitMessage{Code: 3})
	})
	rc, err := c.Run(t.Context(), &runproto.Request{Config: []byte("{}")}, "")
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	rc.Writer.Write(runproto.Stdin, []byte("hi"))
	typ, p, err := rc.Reader.Next()
	if typ != runproto.Stdout || string(p) != "hi" || err != nil {
		t.Fatalf("got frame %d %q, %v", typ, p, err)
	}
	if typ, _, err = rc.Reader.Next(); typ != runproto.Exit || err != nil {
		t.Fatalf("got frame %d, %v", typ, err)
	}
}

func TestNew(t *testing.T) {
	for _, host := range []string{"", "/run/x.sock", "unix://", "ssh://x", "tcp://nohost"} {
		if _, err := New(host); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: got %v", host, err)
		}
	}
	if _, err := New("tcp://127.0.0.1:2375"); err != nil {
		t.Error(err)
	}
}

func TestTCPAndTLS(t *testing.T) {
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"TLS":`+strconv.FormatBool(r.TLS != nil)+`}`)
	})
	plain, secure := httptest.NewServer(h), httptest.NewTLSServer(h)
	defer plain.Close()
	defer secure.Close()
	pool := x509.NewCertPool()
	pool.AddCert(secure.Certificate())
	for _, x := range []struct {
		url  string
		conf *tls.Config
		tls  bool
		ok   bool
	}{
		{plain.URL, nil, false, true},
		{secure.URL, &tls.Config{RootCAs: pool}, true, true},
		{secure.URL, &tls.Config{}, true, false},
	} {
		_, addr, _ := strings.Cut(x.url, "://")
		c, err := New("tcp://" + addr)
		if err != nil {
			t.Fatal(err)
		}
		c.TLS = x.conf
		var out struct{ TLS bool }
		err = c.Get(t.Context(), "/x", nil, &out)
		if (err == nil) != x.ok || x.ok && out.TLS != x.tls {
			t.Errorf("%s: got %+v, %v", x.url, out, err)
		}
	}
}

// A body that can't be read to its end ends the request, and is not taken for a whole one.
func TestBrokenBody(t *testing.T) {
	whole := make(chan error, 1)
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		whole <- err
	})
	broken := errors.New("broken")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	_, err := c.Do(ctx, Request{Method: "POST", Path: "/x", Body: io.MultiReader(strings.NewReader("begin"), iotest.ErrReader(broken))})
	if !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	select {
	case err := <-whole:
		if err == nil {
			t.Error("the server took a part for the whole")
		}
	case <-ctx.Done():
		t.Error("the server still reads")
	}
}
