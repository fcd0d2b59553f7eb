package server

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
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tenon.dev/tenon/test/daemon"
)

// tenond is a real daemon, shared by this package's end-to-end tests.
type tenond struct {
	*daemon.Daemon
	http *http.Client
}

var shared struct {
	once sync.Once
	d    *tenond
	err  error
}

// sharedDaemon starts the shared daemon, with busybox in it.
func sharedDaemon(t *testing.T) *tenond {
	t.Helper()
	shared.once.Do(func() { shared.d, shared.err = launch() })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.d
}

func TestMain(m *testing.M) {
	code := m.Run()
	if d := shared.d; d != nil {
		if err := d.end(); err != nil {
			fmt.Fprintln(os.Stderr, "ending the daemon:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// launch starts a daemon and makes its base image.
func launch() (_ *tenond, err error) {
	inner, err := daemon.New()
	if err != nil {
		return nil, err
	}
	d := &tenond{inner, unixClient(inner.Socket)}
	if err := d.Start(); err != nil {
		return nil, errors.Join(err, d.End(true))
	}
	resp, err := d.http.Post("http://d/tenon/v1/images/bootstrap?name=busybox", "", nil)
	if err == nil {
		b, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != 200 {
			err = fmt.Errorf("bootstrap: %s %s", resp.Status, b)
		}
	}
	if err != nil {
		return nil, errors.Join(err, d.End(true))
	}
	return d, nil
}

// end ends the daemon as a service manager does, and removes everything.
func (d *tenond) end() error {
	err := d.Signal(syscall.SIGTERM, time.Minute)
	if err != nil {
		err = fmt.Errorf("tenond: %w: %s", err, d.Tail())
	}
	return errors.Join(err, d.End(err != nil))
}

// limited bounds a request, and what is read of its answer.
func limited(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// call sends a request and decodes the JSON answer into out, if it is not nil;
// it returns the status and the body.
func (d *tenond) call(t *testing.T, method, path, body string, out any) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(limited(t), method, "http://d"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := d.http.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	if out != nil {
		if err := json.Unmarshal(b, out); err != nil {
			t.Fatalf("%s %s: %v in %s", method, path, err, b)
		}
	}
	return resp.StatusCode, string(b)
}

// create makes a container that the test's end removes.
func (d *tenond) create(t *testing.T, body string) string {
	t.Helper()
	var res struct{ Id, Message string }
	if s, b := d.call(t, "POST", "/v1.56/containers/create", body, &res); s != 201 {
		t.Fatalf("create: %d %s", s, b)
	}
	t.Cleanup(func() { d.remove(t, res.Id) })
	return res.Id
}

// remove removes a container whatever it does; the test's context has ended.
func (d *tenond) remove(t *testing.T, id string) {
	req, err := http.NewRequestWithContext(limited(t), "DELETE", "http://d/containers/"+id+"?force=1&v=1", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := d.http.Do(req)
	if err != nil {
		t.Error(err)
		return
	}
	b, _ := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if resp.StatusCode != 204 && resp.StatusCode != 404 && !strings.Contains(string(b), "already in progress") {
		t.Errorf("remove: %s %s", resp.Status, b)
	}
}

func (d *tenond) start(t *testing.T, id string) {
	t.Helper()
	if s, b := d.call(t, "POST", "/containers/"+id+"/start", "", nil); s != 204 {
		t.Fatalf("start: %d %s", s, b)
	}
}

func (d *tenond) wait(t *testing.T, id string) int {
	t.Helper()
	var res struct{ StatusCode int }
	d.call(t, "POST", "/containers/"+id+"/wait", "", &res)
	return res.StatusCode
}

type inspected struct {
	State struct {
		Status   string
		Running  bool
		ExitCode int
	}
}

func (d *tenond) inspect(t *testing.T, id string) (in inspected) {
	t.Helper()
	d.call(t, "GET", "/containers/"+id+"/json", "", &in)
	return in
}

// upgrade sends a request that takes the connection over, and returns it
// together with the answer's header.
func (d *tenond) upgrade(t *testing.T, path, body string, headers ...string) (*net.UnixConn, string) {
	t.Helper()
	c, err := net.Dial("unix", d.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	var b strings.Builder
	fmt.Fprintf(&b, "POST %s HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\n", path)
	if len(headers) == 0 {
		headers = []string{"Upgrade: tcp"}
	}
	for _, h := range headers {
		b.WriteString(h + "\r\n")
	}
	if body != "" {
		fmt.Fprintf(&b, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	b.WriteString("\r\n" + body)
	if _, err := io.WriteString(c, b.String()); err != nil {
		t.Fatal(err)
	}
	// Byte by byte: what follows the header belongs to the caller.
	var head []byte
	one := make([]byte, 1)
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		if _, err := c.Read(one); err != nil {
			t.Fatalf("%s: %v after %q", path, err, head)
		}
		head = append(head, one[0])
	}
	return c.(*net.UnixConn), string(head)
}

// eventually waits for a condition that no event announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for until := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("never: " + what)
		}
	}
}
