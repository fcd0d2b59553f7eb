package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// dieAt runs script against a daemon that kills itself at a failpoint, and then
// starts it again.
func (d *Daemon) dieAt(t *testing.T, point, script string) {
	t.Helper()
	d.Kill(t)
	d.Env = []string{"TENON_FAILPOINT=" + point + ":kill"}
	d.Start(t)
	d.Sh(t, script) // its client sees the connection break
	d.Wait(t, patience(time.Minute))
	d.Env = nil
	d.Start(t)
}

// freePort is a TCP port of 127.0.0.1 that nobody has, and that no connection
// gets by chance.
func freePort(t *testing.T) int {
	t.Helper()
	for range 100 {
		port := 20000 + rand.IntN(12000)
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}

// TestDaemonKilledAtEachStep: wherever an operation is cut off, afterwards it has
// happened or not; its name, port, network and volume are free or in use, and
// can be used again.
func TestDaemonKilledAtEachStep(t *testing.T) {
	d := newTarget(t)
	d.Must(t, "network", "create", "net")
	port := freePort(t)
	flags := fmt.Sprintf("--name cut --network net --network-alias nick -v data:/data -v /anon -p 127.0.0.1:%d:80 --restart unless-stopped busybox sh -c 'echo web >/index.html; httpd -f -p 80 -h /'", port)
	served := func() string {
		return strings.TrimSpace(d.Sh(t, fmt.Sprintf("curl -s --max-time 5 --retry 20 --retry-delay 1 --retry-connrefused http://127.0.0.1:%d/", port)).Out)
	}
	for _, c := range []struct {
		point, before, script string
		states                string // those in which it may be afterwards; "none": it is not there
	}{
		{"create-volumes", "", "docker create " + flags, "none"},
		{"create-record", "", "docker create " + flags, "none created"},
		{"create-end", "", "docker create " + flags, "created"},
		{"start-intent", "docker create " + flags, "docker start cut", "created running"},
		{"start-network", "docker create " + flags, "docker start cut", "created running"},
		{"start-prepared", "docker create " + flags, "docker start cut", "created running"},
		{"start-created", "docker create " + flags, "docker start cut", "created running"},
		{"start-started", "docker create " + flags, "docker start cut", "running"},
		{"start-prepared", "", "tenon run -d " + flags, "none created running"},
		{"start-created", "", "tenon run -d " + flags, "none created running"},
		{"start-started", "", "tenon run -d " + flags, "running"},
		{"start-created", "", "tenon run --rm " + strings.Replace(flags, "--restart unless-stopped", "", 1), "none"},
		{"stop-marked", "docker run -d " + flags, "docker stop -t 0 cut", "running exited"},
		{"rm-marked", "docker run -d " + flags, "docker rm -fv cut", "none"},
		{"rm-network", "docker run -d " + flags, "docker rm -fv cut", "none"},
		{"rm-root", "docker run -d " + flags, "docker rm -fv cut", "none"},
		{"rm-freed", "docker run -d " + flags, "docker rm -fv cut", "none"},
	} {
		name := c.point + " in " + strings.Join(strings.Fields(c.script)[:3], " ")
		if c.before != "" {
			if r := d.Sh(t, c.before); r.Code != 0 {
				t.Fatalf("%s: %s: %s", name, c.before, r.Err)
			}
		}
		d.dieAt(t, c.point, c.script)
		state := "none"
		eventually(t, name, func() string { // what was begun may still end in the background
			state = "none"
			if r := d.Docker(t, "inspect", "-f", "{{.State.Status}}", "cut"); r.Code == 0 {
				state = strings.TrimSpace(r.Out)
			}
			if !strings.Contains(c.states, state) {
				return "it is " + state + ", want one of " + c.states
			}
			return ""
		})
		switch state {
		case "none":
			if r := d.Sh(t, "docker run -d "+flags); r.Code != 0 {
				t.Fatalf("%s: run again: %s", name, r.Err)
			}
		case "created", "exited":
			if r := d.Docker(t, "start", "cut"); r.Code != 0 {
				t.Fatalf("%s: start again: %s", name, r.Err)
			}
		}
		if s := served(); s != "web" {
			t.Errorf("%s: its port says %q", name, s)
		}
		if r := d.Docker(t, "run", "--rm", "--network", "net", "busybox", "ping", "-c", "1", "-W", "5", "nick"); r.Code != 0 {
			t.Errorf("%s: its name: %s%s", name, r.Out, r.Err)
		}
		d.Must(t, "rm", "-fv", "cut")
		if s := d.Must(t, "volume", "ls", "-q"); s != "data" && s != "" {
			t.Errorf("%s: volumes are left: %q", name, s)
			d.Must(t, "volume", "prune", "-f")
		}
	}
	d.Must(t, "network", "rm", "net")
	d.checkEmpty(t)
}

// copyBin gives the daemon programs of its own, which a test may break.
func (d *Daemon) copyBin(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, p := range []string{"tenond", "tenon", "tenon-shim", "tenon-dns"} {
		b, err := os.ReadFile(filepath.Join(d.Bin, p))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, p), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestMissingTool: a program of ours that is not there is named, before anything
// is half-made; when it is back, all goes on.
func TestMissingTool(t *testing.T) {
	d := newTarget(t)
	whole := d.Bin
	d.Bin = d.copyBin(t)
	t.Cleanup(func() { d.Bin = whole })
	stop := func() {
		d.Kill(t)
		if r := d.run(t, time.Minute, filepath.Join(whole, "tenond"), append(append([]string{}, d.Args...), "--shutdown")...); r.Code != 0 {
			t.Fatalf("shutdown: %s", r.Err)
		}
	}
	for _, tool := range []string{"tenon-shim", "tenon-dns"} {
		path := filepath.Join(d.Bin, tool)
		for _, how := range []struct {
			name        string
			break_, fix func() error
		}{
			{"missing", func() error { return os.Rename(path, path+".away") }, func() error { return os.Rename(path+".away", path) }},
			{"not executable", func() error { return os.Chmod(path, 0o644) }, func() error { return os.Chmod(path, 0o755) }},
		} {
			stop()
			if err := how.break_(); err != nil {
				t.Fatal(err)
			}
			// Either it does not start, or what needs the tool says so.
			if err := d.start(); err == nil {
				r := d.Docker(t, "run", "--rm", "busybox", "echo", "ran")
				if r.Code != 125 || !strings.Contains(r.Err, tool) {
					t.Errorf("%s %s: exit %d: %q %q", tool, how.name, r.Code, r.Out, r.Err)
				}
				if s := d.Must(t, "ps", "-aq"); s != "" {
					t.Errorf("%s %s: containers are left: %s", tool, how.name, s)
				}
			} else if !strings.Contains(err.Error(), tool) {
				t.Errorf("%s %s: %v", tool, how.name, err)
			}
			if err := how.fix(); err != nil {
				t.Fatal(err)
			}
			d.Kill(t)
			d.Start(t)
			if out := d.Must(t, "run", "--rm", "busybox", "echo", "again"); out != "again" {
				t.Errorf("with %s again: %q", tool, out)
			}
		}
	}
}

// TestShimDiesInTheMiddle: the shim is killed, and its program is away, while a
// container waits to be started; then it is there again.
func TestShimDiesInTheMiddle(t *testing.T) {
	d := newTarget(t)
	whole := d.Bin
	d.Kill(t)
	d.Sh(t, "kill -9 "+d.shimPid(t))
	d.Bin = d.copyBin(t)
	t.Cleanup(func() { d.Bin = whole })
	d.Start(t)
	d.Must(t, "create", "--name", "waiting", "-p", "127.0.0.1::80", "busybox", "sleep", "100000")
	shim := filepath.Join(d.Bin, "tenon-shim")
	if err := os.Rename(shim, shim+".away"); err != nil {
		t.Fatal(err)
	}
	d.Sh(t, "kill -9 "+d.shimPid(t))
	if r := d.Docker(t, "start", "waiting"); r.Code == 0 || !strings.Contains(r.Err, "shim") {
		t.Errorf("without a shim: exit %d %q", r.Code, r.Err)
	}
	if r := d.Docker(t, "run", "--rm", "busybox", "true"); r.Code == 0 || !strings.Contains(r.Err, "shim") {
		t.Errorf("without a shim: exit %d %q", r.Code, r.Err)
	}
	if s := d.Must(t, "ps", "-a", "--format", "{{.Names}} {{.State}}"); s != "waiting created" {
		t.Errorf("%q", s)
	}
	if err := os.Rename(shim+".away", shim); err != nil {
		t.Fatal(err)
	}
	eventually(t, "start with a shim", func() string { return d.Docker(t, "start", "waiting").Err })
	if out := d.Must(t, "exec", "waiting", "echo", "alive"); out != "alive" {
		t.Errorf("%q", out)
	}
	// Killed between the shim's create and start, together with the daemon.
	d.Must(t, "create", "--name", "half", "busybox", "sleep", "100000")
	d.Kill(t)
	d.Env = []string{"TENON_FAILPOINT=start-created:kill"}
	d.Start(t)
	d.Docker(t, "start", "half")
	d.Wait(t, patience(time.Minute))
	d.Sh(t, "kill -9 "+d.shimPid(t))
	d.Env = nil
	d.Start(t)
	eventually(t, "half", func() string {
		if s := d.Must(t, "inspect", "-f", "{{.State.Status}}", "half"); s != "created" {
			return s
		}
		return d.Docker(t, "start", "half").Err
	})
	if out := d.Must(t, "exec", "half", "echo", "alive"); out != "alive" {
		t.Errorf("%q", out)
	}
	d.Must(t, "rm", "-f", "half", "waiting")
	d.checkEmpty(t)
}

// TestFullProcessTable: where no process can be made there is a clear error, and
// nothing half-made; those who run go on.
func TestFullProcessTable(t *testing.T) {
	d := newTarget(t)
	// In a container.
	d.Must(t, "run", "-d", "--name", "full", "--pids-limit", "1", "busybox", "sleep", "100000")
	for range 3 {
		// The kernel lets a process in, but it can make no other.
		if r := d.Docker(t, "exec", "full", "sh", "-c", "sleep 1 & wait"); r.Code == 0 || !strings.Contains(strings.ToLower(r.Err), "temporarily unavailable") {
			t.Errorf("exec: exit %d %q %q", r.Code, r.Out, r.Err)
		}
	}
	if out := d.Must(t, "update", "--pids-limit", "10", "full"); out != "full" {
		t.Errorf("%q", out)
	}
	if out := d.Must(t, "exec", "full", "echo", "alive"); out != "alive" {
		t.Errorf("with room: %q", out)
	}
	// For the shim, which makes all processes: its control group gets a limit.
	shim := d.shimPid(t)
	var group string
	for _, parent := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		dir := filepath.Join(parent, d.Name+"full")
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() {
			_ = os.WriteFile(filepath.Join(parent, "cgroup.procs"), []byte(shim), 0) // gone already, most likely
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
		if _, err := os.Stat(filepath.Join(dir, "pids.max")); err == nil {
			group = dir
			break
		}
	}
	if group == "" {
		t.Fatal("no control group can limit processes here")
	}
	write := func(name, value string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(group, name), []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	write("cgroup.procs", shim)
	b, err := os.ReadFile(filepath.Join(group, "pids.current"))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	write("pids.max", strconv.Itoa(n))
	for k := range 3 {
		r := d.Docker(t, "run", "--name", "never", "-p", "127.0.0.1::80", "-v", "data:/data", "busybox", "true")
		if r.Code != 125 && r.Code != 126 || !strings.Contains(r.Err, "temporarily unavailable") {
			t.Errorf("run %d: exit %d %q %q", k, r.Code, r.Out, r.Err)
		}
		d.Docker(t, "rm", "-fv", "never")
		if r := d.Docker(t, "exec", "full", "true"); r.Code == 0 || !strings.Contains(r.Err, "temporarily unavailable") {
			t.Errorf("exec %d: exit %d %q %q", k, r.Code, r.Out, r.Err)
		}
	}
	write("pids.max", "max")
	if d.shimPid(t) != shim {
		t.Error("the shim died of it")
	}
	if out := d.Must(t, "run", "--rm", "--name", "never", "-v", "data:/data", "busybox", "echo", "room"); out != "room" {
		t.Errorf("with room: %q", out)
	}
	if out := d.Must(t, "exec", "full", "echo", "alive"); out != "alive" {
		t.Errorf("%q", out)
	}
	d.Must(t, "rm", "-f", "full")
	d.Must(t, "volume", "rm", "data")
	d.checkEmpty(t)
}
