package server

import (
	"bytes"
	"crypto/md5"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"golang.org/x/net/websocket"
	"tenon.dev/tenon/client/runproto"
)

func demux(t *testing.T, r io.Reader) (string, string) {
	t.Helper()
	var out, errs bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &errs, r); err != nil {
		t.Errorf("stream: %v after %q %q", err, out.String(), errs.String())
	}
	return out.String(), errs.String()
}

// TestAttach is `docker run -i`: attach, wait, start, input with a half-close.
func TestAttach(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox","Cmd":["sh","-c","cat; echo done >&2; exit 3"],"OpenStdin":true,"StdinOnce":true,"AttachStdin":true,"AttachStdout":true,"AttachStderr":true}`)
	c, head := d.upgrade(t, "/v1.50/containers/"+id+"/attach?stream=1&stdin=1&stdout=1&stderr=1", "")
	if !strings.HasPrefix(head, "HTTP/1.1 101 UPGRADED\r\n") || !strings.Contains(head, "application/vnd.docker.multiplexed-stream") {
		t.Errorf("header %q", head)
	}
	d.start(t, id)
	in := make([]byte, 3<<20)
	_, _ = rand.Read(in) // never fails
	go func() {
		_, _ = c.Write(in) // the output tells
		_ = c.CloseWrite()
	}()
	out, errs := demux(t, c)
	if out != string(in) || errs != "done\n" {
		t.Errorf("got %d bytes and %q, want %d", len(out), errs, len(in))
	}
	if code := d.wait(t, id); code != 3 {
		t.Errorf("exit code %d", code)
	}
}

// TestAttachOld: before 1.42, and without an upgrade, the header is another.
func TestAttachOld(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox","Cmd":["echo","hi"]}`)
	c, head := d.upgrade(t, "/v1.41/containers/"+id+"/attach?stream=1&stdout=1&stderr=1", "")
	if !strings.Contains(head, "101 UPGRADED") || !strings.Contains(head, "raw-stream") {
		t.Errorf("header %q", head)
	}
	c2, head := d.upgrade(t, "/containers/"+id+"/attach?stream=1&stdout=1", "", "X-Nothing: 1")
	if !strings.HasPrefix(head, "HTTP/1.1 200 OK\r\n") || !strings.Contains(head, "raw-stream") {
		t.Errorf("header %q", head)
	}
	d.start(t, id)
	for _, c := range []io.Reader{c, c2} {
		if out, _ := demux(t, c); out != "hi\n" {
			t.Errorf("got %q", out)
		}
	}
}

func TestAttachErrors(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox","Cmd":["sleep","1000"]}`)
	for path, want := range map[string]string{
		"/containers/nothing/attach?stream=1&stdout=1":                           "HTTP/1.1 404",
		"/containers/" + id + "/attach?stream=1&stdout=1&detachKeys=ctrl-%C3%A4": "HTTP/1.1 400",
	} {
		if _, head := d.upgrade(t, path, ""); !strings.HasPrefix(head, want) {
			t.Errorf("%s: %q", path, head)
		}
	}
	d.start(t, id)
	d.call(t, "POST", "/containers/"+id+"/pause", "", nil)
	if _, head := d.upgrade(t, "/containers/"+id+"/attach?stream=1&stdout=1", ""); !strings.HasPrefix(head, "HTTP/1.1 409") {
		t.Errorf("paused: %q", head)
	}
}

// TestDetach: the keys end the attachment, not the container; neither does a
// client that vanishes.
func TestDetach(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox","Cmd":["cat"],"Tty":true,"OpenStdin":true,"StdinOnce":true}`)
	d.start(t, id)
	path := "/containers/" + id + "/attach?stream=1&stdin=1&stdout=1&stderr=1"
	c, head := d.upgrade(t, path+"&detachKeys=ctrl-a,b", "")
	if !strings.Contains(head, "raw-stream") {
		t.Errorf("header %q", head)
	}
	_, _ = io.WriteString(c, "x\n")
	expect(t, c, "x\r\nx\r\n")
	_, _ = io.WriteString(c, "\x01b")
	if b, err := io.ReadAll(c); err != nil {
		t.Errorf("after the keys: %q %v", b, err)
	}
	c, _ = d.upgrade(t, path, "")
	_, _ = io.WriteString(c, "y\n")
	expect(t, c, "y\r\ny\r\n")
	_ = c.Close()
	c, _ = d.upgrade(t, path, "")
	_, _ = io.WriteString(c, "z\n")
	expect(t, c, "z\r\nz\r\n")
	if in := d.inspect(t, id); !in.State.Running {
		t.Errorf("state %+v", in.State)
	}
}

func expect(t *testing.T, r io.Reader, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if n, err := io.ReadFull(r, b); err != nil || string(b) != want {
		t.Fatalf("got %q %v, want %q", b[:n], err, want)
	}
}

// TestManyClients: hundreds of attached clients come and go and leave nothing.
func TestManyClients(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox","Cmd":["cat"],"OpenStdin":true}`)
	d.start(t, id)
	var info struct{ NGoroutines int }
	count := func() (int, int) {
		d.call(t, "GET", "/info", "", &info)
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.Pid()))
		if err != nil {
			t.Fatal(err)
		}
		return info.NGoroutines, len(fds)
	}
	g, f := count()
	var conns []net.Conn
	for i := range 300 {
		c, head := d.upgrade(t, fmt.Sprintf("/containers/%s/attach?stream=1&stdin=%d&stdout=1&stderr=1", id, i%2), "")
		if !strings.HasPrefix(head, "HTTP/1.1 101") {
			t.Fatalf("client %d: %q", i, head)
		}
		conns = append(conns, c)
	}
	for _, c := range conns {
		_ = c.Close()
	}
	eventually(t, "no goroutines and descriptors of clients that left", func() bool {
		g2, f2 := count()
		return g2 <= g+10 && f2 <= f+10
	})
	if in := d.inspect(t, id); !in.State.Running {
		t.Errorf("state %+v", in.State)
	}
}

func TestWebsocket(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox","Cmd":["sh","-c","read x; echo got $x"],"OpenStdin":true,"StdinOnce":true}`)
	raw, err := net.Dial("unix", d.Socket)
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.SetDeadline(time.Now().Add(time.Minute)) // a unix socket has deadlines
	cfg, err := websocket.NewConfig("ws://d/containers/"+id+"/attach/ws?stream=1&stdin=1&stdout=1", "http://d")
	if err != nil {
		t.Fatal(err)
	}
	ws, err := websocket.NewClient(cfg, raw)
	if err != nil {
		t.Fatal(err)
	}
	d.start(t, id)
	_, _ = io.WriteString(ws, "me\n")
	if b, err := io.ReadAll(ws); err != nil || string(b) != "got me\n" {
		t.Errorf("got %q %v", b, err)
	}
}

// exec runs a command in a container and returns its output and code.
func (d *tenond) exec(t *testing.T, id, body string) (string, string, int) {
	t.Helper()
	var res struct{ Id string }
	if s, b := d.call(t, "POST", "/containers/"+id+"/exec", body, &res); s != 201 {
		t.Fatalf("exec create: %d %s", s, b)
	}
	c, head := d.upgrade(t, "/exec/"+res.Id+"/start", `{}`)
	if !strings.Contains(head, "101 UPGRADED") {
		t.Fatalf("header %q", head)
	}
	_ = c.CloseWrite()
	out, errs := demux(t, c)
	var in struct {
		Running  bool
		ExitCode *int
	}
	d.call(t, "GET", "/exec/"+res.Id+"/json", "", &in)
	if in.Running || in.ExitCode == nil {
		t.Fatalf("exec after its end: %+v", in)
	}
	return out, errs, *in.ExitCode
}

func TestExec(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox","Cmd":["sleep","1000"]}`)
	if s, b := d.call(t, "POST", "/containers/"+id+"/exec", `{"Cmd":["true"]}`, nil); s != 409 {
		t.Errorf("exec in a stopped container: %d %s", s, b)
	}
	d.start(t, id)
	const all = `"AttachStdin":true,"AttachStdout":true,"AttachStderr":true`
	if out, errs, code := d.exec(t, id, `{`+all+`,"Cmd":["sh","-c","cat; echo o; echo e >&2; exit 5"]}`); out != "o\n" || errs != "e\n" || code != 5 {
		t.Errorf("got %q %q %d", out, errs, code)
	}
	if _, errs, code := d.exec(t, id, `{`+all+`,"Cmd":["nothing"]}`); code != 127 || !strings.Contains(errs, "nothing") {
		t.Errorf("got %q %d", errs, code)
	}
	if _, _, code := d.exec(t, id, `{`+all+`,"Cmd":["/etc"]}`); code != 126 {
		t.Errorf("got %d", code)
	}
	for path, want := range map[string]int{"/exec/nothing/json": 404, "/exec/nothing/start": 404} {
		method, body := "GET", ""
		if strings.HasSuffix(path, "start") {
			method, body = "POST", "{}"
		}
		if s, b := d.call(t, method, path, body, nil); s != want {
			t.Errorf("%s: %d %s", path, s, b)
		}
	}
	if s, b := d.call(t, "POST", "/containers/"+id+"/exec", `{"Cmd":[]}`, nil); s != 400 {
		t.Errorf("empty command: %d %s", s, b)
	}
}

// runner speaks the client's side of /tenon/v1/run.
type runner struct {
	t *testing.T
	c *net.UnixConn
	r *runproto.Reader
	w *runproto.Writer
}

func (d *tenond) run(t *testing.T, body string) *runner {
	t.Helper()
	c, head := d.upgrade(t, runproto.Path, body, "Upgrade: "+runproto.Upgrade)
	if !strings.HasPrefix(head, "HTTP/1.1 101 ") {
		t.Fatalf("header %q", head)
	}
	return &runner{t, c, runproto.NewReader(c), runproto.NewWriter(c)}
}

type ran struct {
	id, out, errs string
	exit          *runproto.ExitMessage
	fail          *runproto.ErrorMessage
}

// finish reads to the last frame.
func (r *runner) finish() (res ran) {
	r.t.Helper()
	var out, errs []byte
	defer func() { res.out, res.errs = string(out), string(errs) }()
	for {
		typ, p, err := r.r.Next()
		if err != nil {
			r.t.Fatalf("run: %v after %+v", err, res)
		}
		switch typ {
		case runproto.Stdout:
			if res.id == "" {
				r.t.Error("output before Created")
			}
			out = append(out, p...)
		case runproto.Stderr:
			errs = append(errs, p...)
		case runproto.Created:
			var m runproto.CreatedMessage
			if err := json.Unmarshal(p, &m); err != nil || len(m.ID) != 64 {
				r.t.Errorf("created: %s %v", p, err)
			}
			res.id = m.ID
		case runproto.Exit:
			if err := json.Unmarshal(p, &res.exit); err != nil {
				r.t.Error(err)
			}
			return res
		case runproto.Error:
			if err := json.Unmarshal(p, &res.fail); err != nil {
				r.t.Error(err)
			}
			return res
		}
	}
}

func TestRun(t *testing.T) {
	d := sharedDaemon(t)
	const rm = `"HostConfig":{"AutoRemove":true}`
	res := d.run(t, `{"attach":["stdout","stderr"],"config":{"Image":"busybox","Cmd":["sh","-c","echo o; echo e >&2; exit 7"],`+rm+`}}`).finish()
	if res.exit == nil || res.exit.Code != 7 || res.out != "o\n" || res.errs != "e\n" {
		t.Errorf("got %+v", res)
	}
	eventually(t, "removed", func() bool {
		s, _ := d.call(t, "GET", "/containers/"+res.id+"/json", "", nil)
		return s == 404
	})
	// The name is free as soon as the exit is told.
	for range 5 {
		res = d.run(t, `{"name":"server-run-again","config":{"Image":"busybox","Cmd":["true"],`+rm+`}}`).finish()
		if res.exit == nil {
			t.Fatalf("again: %+v", res.fail)
		}
	}
	// Much output arrives whole.
	res = d.run(t, `{"attach":["stdout"],"config":{"Image":"busybox","Cmd":["sh","-c","dd if=/dev/zero bs=64k count=160 2>/dev/null | tr '\\0' x"],`+rm+`}}`).finish()
	if len(res.out) != 160<<16 || res.exit == nil {
		t.Errorf("got %d bytes, %+v", len(res.out), res.exit)
	}
	// Input and its end.
	r := d.run(t, `{"stdin":true,"attach":["stdin","stdout"],"config":{"Image":"busybox","Cmd":["md5sum"],"OpenStdin":true,"StdinOnce":true,`+rm+`}}`)
	for range 100 {
		_ = r.w.Write(runproto.Stdin, bytes.Repeat([]byte("y"), 50000))
	}
	_ = r.w.Write(runproto.StdinEOF, nil)
	sum := fmt.Sprintf("%x", md5.Sum(bytes.Repeat([]byte("y"), 5000000)))
	if res = r.finish(); !strings.HasPrefix(res.out, sum) {
		t.Errorf("got %+v, want %s", res, sum)
	}
	// A signal that comes before the container does.
	r = d.run(t, `{"attach":["stdout"],"config":{"Image":"busybox","Cmd":["sleep","1000"],`+rm+`}}`)
	_ = r.w.WriteJSON(runproto.Signal, runproto.SignalMessage{Signal: "SIGKILL"})
	if res = r.finish(); res.exit == nil || res.exit.Code != 137 {
		t.Errorf("got %+v", res)
	}
	// Nothing attached: still waits for the end.
	if res = d.run(t, `{"config":{"Image":"busybox","Cmd":["sh","-c","exit 4"],`+rm+`}}`).finish(); res.exit == nil || res.exit.Code != 4 {
		t.Errorf("got %+v", res)
	}
}

func TestRunTTY(t *testing.T) {
	d := sharedDaemon(t)
	r := d.run(t, `{"tty":true,"stdin":true,"attach":["stdin","stdout"],"consoleSize":[33,77],"config":{"Image":"busybox","Cmd":["sh","-c","stty size; while [ \"$(stty size)\" = '33 77' ]; do sleep 0.02; done; stty size; read x; echo got $x"],"Tty":true,"OpenStdin":true,"HostConfig":{"AutoRemove":true,"ConsoleSize":[33,77]}}}`)
	_ = r.w.Write(runproto.StdinEOF, nil) // means nothing with a terminal
	out := ""
	for steps := []string{"33 77", "44 55", "got me", "\x00"}; ; {
		typ, p, err := r.r.Next()
		if err != nil || typ == runproto.Error {
			t.Fatalf("%v %s after %q", err, p, out)
		}
		if typ == runproto.Exit {
			break
		}
		if typ != runproto.Stdout {
			continue
		}
		out += string(p)
		if !strings.Contains(out, steps[0]) {
			continue
		}
		switch steps = steps[1:]; steps[0] {
		case "44 55":
			_ = r.w.WriteJSON(runproto.Resize, runproto.ResizeMessage{H: 44, W: 55})
		case "got me":
			_ = r.w.Write(runproto.Stdin, []byte("me\n"))
		}
	}
	if !strings.Contains(out, "got me") {
		t.Errorf("got %q", out)
	}
}

func TestRunErrors(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox"}`)
	var in struct{ Name string }
	d.call(t, "GET", "/containers/"+id+"/json", "", &in)
	for _, tc := range []struct {
		name, body   string
		status, code int
		kind         string
	}{
		{"no image", `{"pull":"never","config":{"Image":"no/such:image"}}`, 404, 0, "image"},
		{"name in use", `{"name":"` + strings.TrimPrefix(in.Name, "/") + `","config":{"Image":"busybox","Cmd":["true"]}}`, 409, 0, ""},
		{"no such command", `{"attach":["stdout"],"config":{"Image":"busybox","Cmd":["nothing"],"HostConfig":{"AutoRemove":true}}}`, 400, 127, "start"},
		{"a directory", `{"config":{"Image":"busybox","Cmd":["/etc"],"HostConfig":{"AutoRemove":true}}}`, 400, 126, "start"},
		{"no such network", `{"config":{"Image":"busybox","HostConfig":{"NetworkMode":"nothing","AutoRemove":true}}}`, 404, 125, "start"},
	} {
		res := d.run(t, tc.body).finish()
		if res.fail == nil || res.fail.Status != tc.status || res.fail.Kind != tc.kind || res.fail.Code != tc.code {
			t.Errorf("%s: got %+v %+v", tc.name, res, res.fail)
		}
		if res.id != "" {
			eventually(t, tc.name+": removed", func() bool {
				s, _ := d.call(t, "GET", "/containers/"+res.id+"/json", "", nil)
				return s == 404
			})
		}
	}
	for body, want := range map[string]string{
		`{"config":{}}`: "config cannot be empty",
		`{"pull":"often","config":{"Image":"busybox"}}`: "pull is",
		`{"attach":["x"],"config":{"Image":"busybox"}}`: "attach lists",
		`{`: "invalid JSON",
	} {
		c, head := d.upgrade(t, runproto.Path, body, "Upgrade: "+runproto.Upgrade)
		b := make([]byte, 200)
		n, _ := c.Read(b)
		if !strings.HasPrefix(head, "HTTP/1.1 400") || !strings.Contains(string(b[:n]), want) {
			t.Errorf("%s: got %q %q", body, head, b[:n])
		}
	}
}

// TestRunLeave: a client that detaches, and one that vanishes.
func TestRunLeave(t *testing.T) {
	d := sharedDaemon(t)
	for _, leave := range []func(*runner){
		func(r *runner) { _ = r.w.Write(runproto.Detach, nil) },
		func(r *runner) { _ = r.c.Close() },
		func(r *runner) { // in the middle of a frame
			var hdr [8]byte
			hdr[0] = runproto.Stdin
			binary.BigEndian.PutUint32(hdr[4:], 100)
			_, _ = r.c.Write(append(hdr[:], "half"...))
			_ = r.c.Close()
		},
	} {
		r := d.run(t, `{"attach":["stdout","stdin"],"stdin":true,"tty":true,"config":{"Image":"busybox","Cmd":["sh","-c","echo up; sleep 1000"],"Tty":true,"OpenStdin":true}}`)
		var id string
		for out := ""; !strings.Contains(out, "up"); {
			typ, p, err := r.r.Next()
			if err != nil {
				t.Fatal(err)
			}
			switch typ {
			case runproto.Created:
				var m runproto.CreatedMessage
				_ = json.Unmarshal(p, &m)
				id = m.ID
				t.Cleanup(func() { d.remove(t, id) })
			case runproto.Stdout:
				out += string(p)
			case runproto.Error:
				t.Fatalf("%s", p)
			}
		}
		leave(r)
		// Output may be there before the start is recorded.
		eventually(t, "running", func() bool { return d.inspect(t, id).State.Running })
	}
	// Detached from the beginning.
	res := d.run(t, `{"detach":true,"config":{"Image":"busybox","Cmd":["sleep","1000"]}}`).finish()
	t.Cleanup(func() { d.remove(t, res.id) })
	if res.exit == nil || res.exit.ID != res.id || !d.inspect(t, res.id).State.Running {
		t.Errorf("got %+v", res)
	}
}
