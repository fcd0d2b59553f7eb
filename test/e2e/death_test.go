package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// kills is how often the daemon is killed; TENON_KILLS sets another number.
func kills(t *testing.T, n int) int {
	if s := os.Getenv("TENON_KILLS"); s != "" {
		v, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	return n
}

// eventually polls until f returns "" or the deadline passes; then it fails with
// what f said last.
func eventually(t testing.TB, what string, f func() string) {
	t.Helper()
	deadline := time.Now().Add(patience(60 * time.Second))
	for {
		last := f()
		if last == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %s", what, last)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// A daemon killed again and again, whatever it is doing, loses no container, log
// line, exit code, port, name or duty, and leaves nothing behind.
func TestDaemonKilledAtRandomPoints(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	d.Must(t, "network", "create", "net")
	// The witnesses: they must not notice anything.
	d.Must(t, "run", "-d", "--name", "counter", "busybox", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")
	d.Must(t, "run", "-d", "--name", "web", "--network", "net", "-p", "127.0.0.1::80", "busybox", "sh", "-c", "echo alive >/index.html; httpd -f -p 80 -h /")
	d.Must(t, "run", "-d", "--name", "peer", "--network", "net", "busybox", "sleep", "100000")
	d.Must(t, "run", "-d", "--name", "phoenix", "--restart", "always", "busybox", "sh", "-c", "sleep 0.3")
	port := strings.TrimSpace(d.Must(t, "port", "web", "80/tcp"))
	ids := map[string]string{}
	for _, name := range []string{"counter", "web", "peer"} {
		ids[name] = d.Must(t, "inspect", "-f", "{{.State.Pid}} {{.State.StartedAt}}", name)
	}

	var stop atomic.Bool
	var wg sync.WaitGroup
	for w := range 3 { // work that is interrupted
		wg.Go(func() {
			for k := 0; !stop.Load(); k++ {
				name := fmt.Sprintf("w%d-%d", w, k)
				d.Docker(t, "run", "--rm", "--name", name+"r", "busybox", "true")
				d.Docker(t, "run", "-d", "--name", name, "--network", "net", "-v", name+":/v", "-p", "127.0.0.1::80", "busybox", "sh", "-c", "exit 3")
				d.Docker(t, "exec", "peer", "ping", "-c", "1", "-W", "1", "web")
				d.Docker(t, "stop", "-t", "0", name)
				d.Docker(t, "rm", "-fv", name)
				d.Docker(t, "volume", "rm", "-f", name)
			}
		})
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for k := range kills(t, 25) {
		time.Sleep(time.Duration(rng.IntN(400)) * time.Millisecond)
		d.Kill(t)
		// The data path does without it.
		if r := d.Sh(t, "curl -sS --max-time 10 http://"+port+"/"); strings.TrimSpace(r.Out) != "alive" {
			t.Errorf("kill %d: published port while the daemon is away: %q %q", k, r.Out, r.Err)
		}
		if err := d.start(); err != nil {
			t.Fatal(err)
		}
		for name, want := range ids {
			if got := d.Must(t, "inspect", "-f", "{{.State.Pid}} {{.State.StartedAt}}", name); got != want {
				t.Fatalf("kill %d: %s was %s and is %s", k, name, want, got)
			}
		}
		if r := d.Docker(t, "exec", "peer", "ping", "-c", "1", "-W", "5", "web"); r.Code != 0 {
			t.Errorf("kill %d: name resolution: %s%s", k, r.Out, r.Err)
		}
	}
	stop.Store(true)
	wg.Wait()

	lines := strings.Fields(d.Must(t, "logs", "counter"))
	for i, line := range lines {
		if line != strconv.Itoa(i+1) {
			t.Fatalf("log line %d is %q", i+1, line)
		}
	}
	if len(lines) == 0 {
		t.Error("the counter wrote nothing")
	}
	before := d.Must(t, "inspect", "-f", "{{.RestartCount}}", "phoenix")
	eventually(t, "restart policy after the kills", func() string {
		if now := d.Must(t, "inspect", "-f", "{{.RestartCount}}", "phoenix"); now == before {
			return "still at " + now
		}
		return ""
	})

	// What the interrupted work left can be removed, and then nothing is left.
	for _, name := range strings.Fields(d.Must(t, "ps", "-aq")) {
		if r := d.Docker(t, "rm", "-fv", name); r.Code != 0 && !strings.Contains(r.Err, "No such container") && !strings.Contains(r.Err, "already in progress") {
			t.Errorf("rm: %s", r.Err)
		}
	}
	d.Docker(t, "network", "rm", "net")
	eventually(t, "containers", func() string { return d.Must(t, "ps", "-aq") })
	d.checkEmpty(t)
}

// checkEmpty compares what the daemon knows with what is on the machine, once
// no container is left.
func (d *Daemon) checkEmpty(t testing.TB) {
	t.Helper()
	eventually(t, "cgroups", func() string {
		var left []string
		for _, pattern := range []string{"/sys/fs/cgroup/*/" + d.Name + "/*/cgroup.procs", "/sys/fs/cgroup/" + d.Name + "/*/cgroup.procs"} {
			m, _ := filepath.Glob(pattern)
			for _, p := range m {
				if len(filepath.Base(filepath.Dir(p))) >= 12 { // named by a container's ID
					left = append(left, p)
				}
			}
		}
		return strings.Join(left, " ")
	})
	eventually(t, "container directories", func() string {
		m, _ := filepath.Glob(d.Root + "/containers/*")
		return strings.Join(m, " ")
	})
}

// A killed shim takes its containers along; the daemon notices, reports them and
// goes on with a new shim.
func TestShimKilled(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	d.Must(t, "run", "-d", "--name", "victim", "-p", "127.0.0.1::80", "busybox", "sleep", "100000")
	d.Must(t, "run", "-d", "--name", "back", "--restart", "always", "busybox", "sleep", "100000")
	pid := d.shimPid(t)
	if r := d.Sh(t, "kill -9 "+pid); r.Code != 0 {
		t.Fatal(r.Err)
	}
	eventually(t, "the victim's end", func() string {
		if s := d.Must(t, "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "victim"); s != "exited 137" {
			return s
		}
		return ""
	})
	eventually(t, "restart by policy", func() string {
		if s := d.Must(t, "inspect", "-f", "{{.State.Running}}", "back"); s != "true" {
			return s
		}
		return ""
	})
	if out := d.Must(t, "run", "--rm", "busybox", "echo", "again"); out != "again" {
		t.Errorf("after the shim's death: %q", out)
	}
	d.Must(t, "rm", "-f", "victim", "back")
	d.checkEmpty(t)
}

func (d *Daemon) shimPid(t testing.TB) string {
	t.Helper()
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err == nil && strings.Contains(string(b), "tenon-shim") && strings.Contains(string(b), d.RunRoot) && strings.Contains(string(b), "serve") {
			return filepath.Base(filepath.Dir(p))
		}
	}
	t.Fatal("no shim runs")
	return ""
}

// Exit codes, --rm and restart duties of what ended while the daemon was away.
func TestExitsWhileTheDaemonIsAway(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	word := fmt.Sprintf("go%d", os.Getpid()) // another run of this test has its own
	script := "while ! test -f /x/" + word + "; do sleep 0.05; done; echo last words; exit 42"
	dir := t.TempDir()
	for _, args := range [][]string{{"--name", "plain"}, {"--name", "gone", "--rm"}, {"--name", "again", "--restart", "on-failure:1"}} {
		d.Must(t, append(append([]string{"run", "-d", "-v", dir + ":/x"}, args...), "busybox", "sh", "-c", script)...)
	}
	d.Kill(t)
	if err := os.WriteFile(filepath.Join(dir, word), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Nobody but the shim sees them end.
	eventually(t, "their end", func() string {
		return strings.TrimSpace(d.Sh(t, "ps ax -o args | grep '[t]est -f /x/"+word+"'").Out)
	})
	d.Start(t)
	eventually(t, "exit code", func() string {
		if s := d.Must(t, "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "plain"); s != "exited 42" {
			return s
		}
		return ""
	})
	if s := d.Must(t, "logs", "plain"); s != "last words" {
		t.Errorf("logs: %q", s)
	}
	eventually(t, "--rm", func() string { return d.Must(t, "ps", "-aq", "--filter", "name=gone") })
	eventually(t, "restart duty", func() string {
		if s := d.Must(t, "inspect", "-f", "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}", "again"); s != "1 exited 42" {
			return s
		}
		return ""
	})
}

// Two daemons on one machine know nothing of each other.
func TestDaemonsSideBySide(t *testing.T) {
	a, b := NewDaemon(t), NewDaemon(t)
	for _, d := range []*Daemon{a, b} {
		d.Busybox(t)
		d.Must(t, "run", "-d", "--name", "same", "-p", "127.0.0.1::80", "busybox", "sh", "-c", "hostname >/index.html; httpd -f -p 80 -h /")
	}
	for _, d := range []*Daemon{a, b} {
		id := d.Must(t, "inspect", "-f", "{{.Config.Hostname}}", "same")
		r := d.Sh(t, "curl -sS --retry 20 --retry-delay 1 --retry-connrefused http://"+d.Must(t, "port", "same", "80/tcp")+"/")
		if strings.TrimSpace(r.Out) != id {
			t.Errorf("got %q, want %q", r.Out, id)
		}
		if n := len(strings.Fields(d.Must(t, "ps", "-aq"))); n != 1 {
			t.Errorf("%d containers", n)
		}
	}
}

// A full disk is a clear error; what ran before goes on, and nothing half-made
// stays once there is space again.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	d := NewDaemon(t)
	if r := d.Sh(t, "mount -t tmpfs -o size=400m tmpfs "+dir); r.Code != 0 {
		t.Fatal(r.Err)
	}
	t.Cleanup(func() { d.Sh(t, "umount "+dir) })
	small := newDaemonAt(t, filepath.Join(dir, "root"))
	small.Busybox(t)
	small.Must(t, "run", "-d", "--name", "old", "busybox", "sleep", "100000")
	if r := small.Sh(t, "head -c 400m /dev/zero >"+dir+"/fill"); r.Code == 0 {
		t.Fatal("the disk is not full")
	}
	r := small.Docker(t, "run", "--name", "new", "-v", "vol:/v", "busybox", "sh", "-c", "dd if=/dev/zero of=/f bs=1M count=1")
	if r.Code == 0 || !strings.Contains(strings.ToLower(r.Out+r.Err), "no space left") {
		t.Errorf("exit %d: %s%s", r.Code, r.Out, r.Err)
	}
	if out := small.Must(t, "exec", "old", "echo", "alive"); out != "alive" {
		t.Errorf("the old container: %q", out)
	}
	if err := os.Remove(filepath.Join(dir, "fill")); err != nil {
		t.Fatal(err)
	}
	small.Docker(t, "rm", "-fv", "new")
	if out := small.Must(t, "run", "--rm", "--name", "new", "busybox", "echo", "space"); out != "space" {
		t.Errorf("with space again: %q", out)
	}
	small.Must(t, "rm", "-f", "old")
	small.checkEmpty(t)
}
