package quick

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/client/runproto"
	"tenon.dev/tenon/internal/cli"
	"tenon.dev/tenon/internal/version"
)

// pointers is words as the kernel hands them over.
func pointers(words []string) []*byte {
	var out []*byte
	for _, w := range words {
		out = append(out, &append([]byte(w), 0)[0])
	}
	return out
}

// socketDir is a directory whose name is short enough for sockets.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tq")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// slowly returns the request that package cli sends for args, or nil.
func slowly(t testing.TB, args []string) []byte {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(socketDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan []byte, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			got <- nil
			return
		}
		defer c.Close()
		got <- readRequest(t, c)
		io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}")
	}()
	args = append([]string{"-H", "unix://" + l.Addr().String()}, args...)
	cli.Main(cli.Env{In: strings.NewReader(""), Out: io.Discard, Err: io.Discard, Version: version.Version}, args)
	l.Close()
	return <-got
}

// readRequest returns a request as it came, without more than its body.
func readRequest(t testing.TB, c net.Conn) []byte {
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	var b bytes.Buffer
	r, err := http.ReadRequest(bufio.NewReader(io.TeeReader(c, &b)))
	if err != nil {
		t.Errorf("read the request: %v", err)
		return nil
	}
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		t.Errorf("read the request: %v", err)
	}
	return b.Bytes()
}

// meaning is a request without what may differ: the order of headers, what JSON
// leaves out, and whether a missing image is pulled.
type meaning struct {
	Line   string
	Header http.Header
	Run    runproto.Request
	Exec   runproto.ExecRequest
	Create container.CreateRequest
	Config container.ExecCreateRequest
}

func meaningOf(t testing.TB, request []byte) meaning {
	t.Helper()
	r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(request)))
	if err != nil {
		t.Fatalf("%v\n%s", err, request)
	}
	m := meaning{Line: r.Method + " " + r.RequestURI + " " + r.Host, Header: r.Header}
	body, err := io.ReadAll(r.Body)
	if err == nil && r.RequestURI == runproto.Path {
		if err = json.Unmarshal(body, &m.Run); err == nil {
			err = json.Unmarshal(m.Run.Config, &m.Create)
			if p := m.Run.Pull; p != "missing" && p != "never" {
				t.Errorf("pull is %q", p)
			}
			m.Run.Config, m.Run.Pull = nil, ""
		}
	} else if err == nil {
		if err = json.Unmarshal(body, &m.Exec); err == nil {
			err = json.Unmarshal(m.Exec.Config, &m.Config)
			m.Exec.Config = nil
		}
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, request)
	}
	m.Header.Del("Content-Length") // what JSON leaves out
	return m
}

// compare compares what this package and package cli make of args; it returns
// whether this one understands them.
func compare(t testing.TB, environ, args []string) bool {
	t.Helper()
	var c command
	if !c.parse(pointers(append([]string{"tenon"}, args...)), pointers(environ)) || !theRequest.make(&c) {
		return false
	}
	quick := bytes.Clone(theRequest.bytes())
	slow := slowly(t, args)
	if slow == nil {
		t.Fatalf("%q: no request by package cli, this one sends\n%s", args, quick)
	}
	if d := cmp.Diff(meaningOf(t, slow), meaningOf(t, quick), cmpopts.EquateComparable(), cmpopts.EquateEmpty()); d != "" {
		t.Errorf("%q (-cli +quick):\n%s", args, d)
	}
	return true
}

func TestRequests(t *testing.T) {
	t.Setenv("TENON_TEST_QUICK", "a=b")
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	environ := os.Environ()
	for _, line := range []string{
		"run busybox",
		"run --rm busybox true",
		"run -d busybox sleep 10",
		"run --detach --rm --name web --network host nginx -g daemon",
		"run --net none -h box -u 1:2 -w /tmp --init --privileged busybox sh -c --rm",
		"run --hostname= --user root --workdir=/a=b --entrypoint= busybox",
		"run --entrypoint /bin/sh busybox -c id",
		"run -e A=1 --env B= --env=C=x=y -e TENON_TEST_QUICK -e TENON_TEST_MISSING busybox env",
		"run --network container:x busybox",
		"run --name a --name b --rm --rm busybox",
		"exec c true",
		"exec -d c sleep 1",
		"exec -e A=1 -u nobody -w / --privileged c sh -c id",
		"exec --env=A --user= --workdir /x --detach c -d -e",
	} {
		if !compare(t, environ, strings.Fields(line)) {
			t.Errorf("%s: not understood", line)
		}
	}
	for _, args := range [][]string{
		{"run", "busybox", "", "\"\\\t\n\x01\x7f</&>", "a b"},
		{"run", "--name", "", "-h", "-d", "--network", "x y", "busybox"},
		{"exec", "", "true"},
		{"exec", "--env", "-e=1", "c", strings.Repeat("x", 5000)},
	} {
		if !compare(t, environ, args) {
			t.Errorf("%q: not understood", args)
		}
	}
}

// TestNotUnderstood: what is none of this package's business.
func TestNotUnderstood(t *testing.T) {
	for _, line := range []string{
		"", "ps", "run", "run --rm", "run --name", "run -it busybox sh", "run -i busybox", "run --rm=true busybox", "run -dit busybox",
		"run -eA=1 busybox", "run -e=A=1 busybox", "run -- busybox", "run --help", "run -p 80:80 nginx", "run -v a:/b busybox",
		"run --network a --network b busybox", "run --network name=a busybox", "run -e =x busybox", "run --pull always busybox",
		"run busybox \xff", "run büsybox", "run --sig-proxy=false busybox", "run --name= --cidfile x busybox",
		"exec c", "exec -it c sh", "exec -i c cat", "exec --rm c true", "exec --name x c true",
		"--tlsverify run busybox", "-v", "--config x run busybox", "help run", "container run busybox", "-H tcp://h:1 run busybox",
		"-H", "-H unix:// run busybox", "-H unix://@a run busybox", "-H=unix:///a run busybox", "--host",
	} {
		var c command
		if c.parse(pointers(append([]string{"tenon"}, strings.Fields(line)...)), nil) && theRequest.make(&c) {
			t.Errorf("%s: understood", line)
		}
	}
	for _, args := range [][]string{nil, {"tenon", "run", ""}, {"tenon", "run", "x", strings.Repeat("y", 100000)}} {
		var c command
		if c.parse(pointers(args), nil) && theRequest.make(&c) {
			t.Errorf("%.50q: understood", args)
		}
	}
}

func TestDaemon(t *testing.T) {
	for _, c := range []struct {
		args, env, want string
	}{
		{"", "", "/run/tenon/docker.sock"},
		{"", "DOCKER_HOST=unix:///d", "/d"},
		{"", "DOCKER_HOST=unix:///d TENON_HOST=unix:///t TENON_HOST=unix:///u", "/t"},
		{"", "TENON_HOST= DOCKER_HOST=unix:///d", "/d"},
		{"-H unix://x", "TENON_HOST=unix:///t", "x"},
		{"--host unix:///a --host=unix:///b", "", "/b"},
		{"", "TENON_HOST=tcp://h:1", ""},
		{"", "DOCKER_TLS_VERIFY=1", ""},
		{"", "DOCKER_TLS_VERIFY=", "/run/tenon/docker.sock"},
	} {
		var got command
		args := append(append([]string{"tenon"}, strings.Fields(c.args)...), "exec", "a", "b")
		if got.parse(pointers(args), pointers(strings.Fields(c.env))) != (c.want != "") || c.want != "" && got.socket != c.want {
			t.Errorf("%s, %s: %q", c.args, c.env, got.socket)
		}
	}
}

// FuzzRequests: a command line that is understood means what package cli sends.
// Words are separated by line ends.
func FuzzRequests(f *testing.F) {
	f.Add("run\n--rm\nbusybox\ntrue")
	f.Add("run\n-d\n--name=x\n-e\nA=1\n--network\nhost\n-h\nh\n-u\nu\n-w\n/\n--entrypoint\nsh\nbusybox\n-c\nid")
	f.Add("exec\n-e\nA\n--user\n0\n--privileged\nc\nls\n-l")
	f.Setenv("DOCKER_CONFIG", f.TempDir())
	f.Fuzz(func(t *testing.T, words string) {
		if strings.Contains(words, "\x00") || !strings.HasPrefix(words, "run\n") && !strings.HasPrefix(words, "exec\n") {
			return
		}
		compare(t, os.Environ(), strings.Split(words, "\n"))
	})
}
