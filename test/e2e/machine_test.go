package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// machineFacts are what inspect shows of a machine.
type machineFacts struct {
	ID, State, Socket, BootID, Error string
	Pid, Running, RestartCount       int
	Containers                       []string
	Disk                             int64
}

// tenon runs the tenon command, which must succeed.
func (d *Daemon) tenon(t testing.TB, args string) string {
	t.Helper()
	r := d.run(t, 4*time.Minute, "sh", "-c", "tenon "+args) // the first machine waits for the template
	if r.Code != 0 {
		t.Fatalf("tenon %s: exit %d\n%s%s", args, r.Code, r.Out, r.Err)
	}
	return strings.TrimRight(r.Out, "\n")
}

func (d *Daemon) machine(t testing.TB, name string) machineFacts {
	t.Helper()
	var list []machineFacts
	if err := json.Unmarshal([]byte(d.tenon(t, "machine inspect "+name)), &list); err != nil || len(list) != 1 {
		t.Fatalf("inspect of machine %s: %v, %d of them", name, err, len(list))
	}
	return list[0]
}

// machineIs waits until a machine is in a state.
func (d *Daemon) machineIs(t testing.TB, name, state string) {
	t.Helper()
	eventually(t, "machine "+name, func() string {
		if m := d.machine(t, name); m.State != state {
			return m.State + " " + m.Error
		}
		return ""
	})
}

// TestMachine: several containers on a virtual machine that lasts, its own socket,
// and who dies with whom. What containers there have in common with those of the
// host's kernel is the matrix's.
func TestMachine(t *testing.T) {
	t.Parallel()
	d := newVMDaemon(t)
	d.Busybox(t)
	share := t.TempDir()
	for path, text := range map[string]string{"rw/file": "shared", "ro/file": "kept"} {
		if err := os.MkdirAll(filepath.Join(share, filepath.Dir(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(share, path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/", filepath.Join(share, "rw", "out")); err != nil {
		t.Fatal(err)
	}
	d.machineRefused(t, d.Socket, "there is no machine m", "run", "--rm", "--isolation", "machine=m", "busybox", "true")
	d.tenon(t, "machine create m --memory 512m --disk 1g --share "+share+"/rw --share "+share+"/ro:ro")
	d.machineContainers(t)
	d.machineSocket(t, share)
	d.machineDeaths(t)
	d.machineKills(t)
	if out := d.tenon(t, "machine ls -q"); out != "" {
		t.Errorf("machines are left: %s", out)
	}
	if left, _ := filepath.Glob(filepath.Join(d.Root, "machines", "*")); len(left) > 0 {
		t.Errorf("files of machines are left: %s", left)
	}
	if left, _ := filepath.Glob(filepath.Join(d.RunRoot, "machines", "*")); len(left) > 0 {
		t.Errorf("sockets of machines are left: %s", left)
	}
}

// machineRefused runs docker on a socket, which must refuse it with some words.
func (d *Daemon) machineRefused(t *testing.T, socket, words string, args ...string) {
	t.Helper()
	r := d.Docker(t, append([]string{"-H", "unix://" + socket}, args...)...)
	if r.Code == 0 || !strings.Contains(r.Err, words) {
		t.Errorf("docker %s: exit %d, want a refusal with %q: %s%s", strings.Join(args, " "), r.Code, words, r.Out, r.Err)
	}
}

func (d *Daemon) machineContainers(t *testing.T) {
	d.Must(t, "network", "create", "net")
	d.Must(t, "run", "-d", "--name", "peer", "--network", "net", "busybox", "sleep", "1000")
	serve := func(name string, args ...string) {
		d.Must(t, append(append([]string{"run", "-d", "--name", name, "--isolation", "machine=m", "--network", "net", "-p", "127.0.0.1::80"}, args...),
			"busybox", "sh", "-c", "echo "+name+" >/index.html; sync; exec httpd -f -h /")...)
	}
	serve("one", "--memory", "64m", "-v", "data:/data")
	serve("two", "--restart", "always", "--ipc", "shareable")
	m := d.machine(t, "m")
	boot := func(name string) string { return d.Must(t, "exec", name, "cat", "/proc/sys/kernel/random/boot_id") }
	if host := boot("peer"); boot("one") != m.BootID || boot("two") != m.BootID || m.BootID == host || m.Running != 2 {
		t.Errorf("kernels: %s, %s, the machine's %s, the host's %s; %d run", boot("one"), boot("two"), m.BootID, host, m.Running)
	}
	if got := d.Must(t, "inspect", "-f", `{{.HostConfig.Isolation}} {{index .HostConfig.Annotations "tenon.machine"}} {{.State.Pid}}`, "one"); !strings.HasPrefix(got, "machine=m "+m.ID+" ") {
		t.Errorf("inspect says %q", got)
	}
	for _, name := range []string{"one", "two"} {
		port := strings.TrimSpace(d.Must(t, "port", name, "80/tcp"))
		if r := d.Sh(t, "curl -sS -m 20 --retry 5 --retry-connrefused http://"+port+"/"); r.Out != name+"\n" {
			t.Errorf("published port of %s: %q %s", name, r.Out, r.Err)
		}
		if out := d.Must(t, "exec", "peer", "wget", "-qO-", "http://"+name+"/"); out != name {
			t.Errorf("from a container of the host to %s: %q", name, out)
		}
	}
	if out := d.Must(t, "run", "--rm", "--isolation", "machine=m", "--network", "container:one", "--pid", "container:one", "--ipc", "container:two",
		"busybox", "sh", "-c", "wget -qO- 127.0.0.1; grep -c . /proc/1/cmdline"); !strings.HasPrefix(out, "one\n") {
		t.Errorf("with the namespaces of others: %q", out)
	}
	d.machineRefused(t, d.Socket, "it runs on another kernel", "run", "--rm", "--network", "container:one", "busybox", "true")
	d.machineRefused(t, d.Socket, "it runs on another kernel", "run", "--rm", "--isolation", "machine=m", "--network", "container:peer", "busybox", "true")
	if out := d.Must(t, "exec", "one", "sh", "-c", "cat /sys/fs/cgroup/memory.max; echo kept >/data/f"); out != "67108864" {
		t.Errorf("its memory limit is %s", out)
	}
	if out := d.Must(t, "run", "--rm", "-v", "data:/data", "busybox", "cat", "/data/f"); out != "kept" {
		t.Errorf("a volume in two kernels: %q", out)
	}
	if r := d.Sh(t, "echo new | tee $(mktemp -d)/f >/dev/null; cd /; docker cp /etc/hostname one:/h && docker cp one:/index.html - | tar xO"); r.Out != "one\n" {
		t.Errorf("cp: %q %s", r.Out, r.Err)
	}
	d.tenon(t, "machine update --memory 768m --disk 2g m")
	if out := d.Must(t, "exec", "two", "sh", "-c", "df -m / | tail -n 1; grep MemTotal /proc/meminfo"); len(strings.Fields(out)) < 9 || strings.Fields(out)[1] < "1800" || strings.Fields(out)[7] < "700000" {
		t.Errorf("after it has grown: %s", out)
	}
	if r := d.Sh(t, "tenon machine update --disk 1g m"); r.Code == 0 || !strings.Contains(r.Err, "it only grows") {
		t.Errorf("a smaller disk: exit %d %s", r.Code, r.Err)
	}

	// The daemon's death is nobody's.
	d.Kill(t)
	d.Start(t)
	if n := d.machine(t, "m"); n.State != "running" || n.Pid != m.Pid || n.Running != 2 || boot("one") != m.BootID {
		t.Errorf("after the daemon's death: %+v", n)
	}
}

// machineSocket is what a tenant can do, and can't.
func (d *Daemon) machineSocket(t *testing.T, share string) {
	s := d.machine(t, "m").Socket
	on := func(args ...string) string {
		t.Helper()
		return d.Must(t, append([]string{"-H", "unix://" + s}, args...)...)
	}
	if out := on("ps", "-a", "--format", "{{.Names}}"); out != "two\none" {
		t.Errorf("a tenant sees %q", out)
	}
	if out := on("info", "-f", "{{.Name}} {{.NCPU}} {{.Containers}} {{.Isolation}}"); out != "m 1 2 machine=m" {
		t.Errorf("info: %q", out)
	}
	d.Must(t, "network", "create", "--label", "x=y", "others")
	d.Must(t, "volume", "create", "foreign")
	if out := on("run", "--rm", "-v", share+"/rw:/rw", "-v", share+"/ro/file:/f:ro", "-v", "own:/own", "busybox", "sh", "-c",
		"uname -n >/own/x; echo -n and >>/rw/file; cat /f; cat /rw/out/etc/hostname | head -c 0 && cat /proc/sys/kernel/random/boot_id"); out != "kept"+d.machine(t, "m").BootID {
		t.Errorf("a tenant's container: %q", out)
	}
	if b, err := os.ReadFile(filepath.Join(share, "rw", "file")); string(b) != "sharedand" || err != nil {
		t.Errorf("a share's file: %q %v", b, err)
	}
	on("run", "--rm", "-v", "own:/own", "busybox", "sh", "-c", "mkdir /own/sub; echo below >/own/sub/f; ln -s / /own/out")
	if out := on("run", "--rm", "--mount", "type=volume,src=own,dst=/x,volume-subpath=sub", "busybox", "cat", "/x/f"); out != "below" {
		t.Errorf("a directory in a volume: %q", out)
	}
	d.machineRefused(t, s, "cannot access path out", "run", "--rm", "--mount", "type=volume,src=own,dst=/x,volume-subpath=out", "busybox", "true")
	on("network", "create", "mine")
	if out := on("network", "ls", "--format", "{{.Name}}"); out != "bridge\nhost\nmine\nnone" {
		t.Errorf("networks: %q", out)
	}
	if out := on("volume", "ls", "-q"); out != "own" {
		t.Errorf("volumes: %q", out)
	}
	image := func(words string, args ...string) { d.machineRefused(t, s, words, args...) }
	run := func(words string, args ...string) {
		t.Helper()
		d.machineRefused(t, s, words, append(append([]string{"run", "--rm"}, args...), "busybox", "true")...)
	}
	id := d.Must(t, "inspect", "-f", "{{.Id}}", "peer")
	for _, ref := range []string{"peer", id, id[:12]} {
		for _, verb := range []string{"inspect", "logs", "rm -f", "stop", "kill", "restart", "pause", "top", "port", "diff", "commit", "export", "update -m 64m", "rename %s x", "wait", "exec %s id", "cp %s:/etc/passwd -", "network connect mine", "network disconnect bridge"} {
			if !strings.Contains(verb, "%s") {
				verb += " %s"
			}
			if ref != "peer" && len(verb) > 12 {
				continue // the name says it
			}
			args := strings.Fields(strings.ReplaceAll(verb, "%s", ref))
			if r := d.Docker(t, append([]string{"-H", "unix://" + s}, args...)...); !strings.Contains(r.Err, ref) { // rm -f forgives
				t.Errorf("docker %s: exit %d %s%s", strings.Join(args, " "), r.Code, r.Out, r.Err)
			}
		}
	}
	for _, iso := range []string{"process", "vm", "machine=other"} {
		run("can't be had here", "--isolation", iso)
	}
	for _, src := range []string{"/", "/etc", "/proc", d.RunRoot, s, d.Socket, share, share + "/rw/../../", share + "/ro/../.."} {
		run("can't be mounted", "-v", src+":/x")
		run("can't be mounted", "--mount", "type=bind,src="+src+",dst=/x")
	}
	run("mount "+share+"/ro read-only", "-v", share+"/ro:/x")
	run("without links", "-v", share+"/rw/out:/x")
	run("without links", "-v", share+"/rw/out/etc:/x")
	run("No such container: peer", "--network", "container:peer")
	run("No such container: peer", "--pid", "container:peer")
	run("No such container: peer", "--ipc", "container:peer")
	run("No such container: peer", "--volumes-from", "peer")
	run("No such container: peer", "--link", "peer")
	run("nothing was", "--device", "/dev/sda")
	run("nothing was", "--cgroup-parent", "x")
	run("network others not found", "--network", "others")
	run("can't be chosen", "--mac-address", "02:42:00:00:00:01")
	run("belongs to others", "-v", "foreign:/x")
	run("driver options", "--mount", "type=volume,src=v,dst=/x,volume-opt=type=none,volume-opt=o=bind,volume-opt=device=/")
	image("driver options", "volume", "create", "-o", "type=none", "-o", "o=bind", "-o", "device=/")
	image("belongs to others", "volume", "create", "foreign")
	image("no such volume", "volume", "rm", "foreign")
	image("not found", "network", "inspect", "others")
	image("not found", "network", "rm", "others")
	image("can't be removed", "network", "rm", "bridge")
	image("can't be had", "network", "create", "-d", "macvlan", "-o", "parent=lo", "x")
	image("can't be had", "network", "create", "-o", "com.docker.network.bridge.name=lo", "x")
	image("can't be chosen", "network", "create", "--subnet", "10.0.0.0/8", "x")
	image("images are shared", "tag", "busybox", "busybox:evil")
	image("images are shared", "rmi", "busybox")
	image("images are shared", "commit", "one", "busybox")
	if r := d.Sh(t, "docker save busybox | docker -H unix://"+s+" load"); r.Code == 0 || !strings.Contains(r.Err+r.Out, "images are shared") {
		t.Errorf("load: exit %d %s%s", r.Code, r.Out, r.Err)
	}
	for _, path := range []string{"machines", "machines/m", "doctor"} {
		if r := d.Sh(t, "curl -s --unix-socket "+s+" http://x/tenon/v1/"+path); !strings.Contains(r.Out, "the daemon's own socket") {
			t.Errorf("%s: %s", path, r.Out)
		}
	}
	if r := d.Sh(t, "curl -s -X POST --unix-socket "+s+" http://x/tenon/v1/shutdown"); !strings.Contains(r.Out, "the daemon's own socket") {
		t.Errorf("shutdown: %s", r.Out)
	}
	on("commit", "one", "m/mine")
	on("rmi", "m/mine")
	// How much of what is shared with others it can take is bounded.
	on("network", "create", "mine2")
	image("there are 2 networks, and may be no more", "network", "create", "mine3")
	on("volume", "create", "two") // "own" is there
	on("create", "--name", "three", "-v", "/three", "busybox")
	image("there are 3 containers, and may be no more", "create", "busybox")
	on("rename", "three", "third")
	image("there are 3 volumes, and may be no more", "volume", "create", "four")
	on("rm", "third") // its volume stays
	image("there are 3 volumes, and may be no more", "create", "-v", "/four", "busybox")
	on("volume", "create", "two") // it is there
	on("volume", "rm", "two")
	if out := on("ps", "-aq"); strings.Count(out, "\n") != 1 {
		t.Errorf("containers: %q", out)
	}
	on("system", "prune", "-f", "--volumes")
	if out := on("volume", "ls", "-q"); out != "own" {
		t.Errorf("volumes after a prune: %q", out)
	}
	if out := d.Must(t, "network", "ls", "--format", "{{.Name}}"); !strings.Contains(out, "others") || strings.Contains(out, "mine") {
		t.Errorf("a tenant's prune: %s", out)
	}
	d.Must(t, "network", "rm", "others")
	d.Must(t, "volume", "rm", "foreign")
}

// machineDeaths is what becomes of containers when their machine crashes, or is
// stopped.
func (d *Daemon) machineDeaths(t *testing.T) {
	fact := func(name, what string) string { return d.Must(t, "inspect", "-f", what, name) }
	running := func(name string) {
		t.Helper()
		eventually(t, "container "+name, func() string {
			if got := fact(name, "{{.State.Status}} {{.State.Error}}"); !strings.HasPrefix(got, "running") {
				return got
			}
			return ""
		})
	}
	m := d.machine(t, "m")
	d.Must(t, "exec", "one", "sync")
	d.Sh(t, "kill -9 $1", strconv.Itoa(m.Pid))
	eventually(t, "a container whose machine was killed", func() string {
		if got := fact("one", "{{.State.Status}} {{.State.ExitCode}} {{.State.Error}}"); !strings.HasPrefix(got, "exited 137 machine m ended") {
			return got
		}
		return ""
	})
	d.machineIs(t, "m", "running") // by its policy
	running("two")                 // by its own
	if n := d.machine(t, "m"); n.Pid == m.Pid || n.RestartCount != 1 || n.BootID == m.BootID || n.ID != m.ID {
		t.Errorf("after its crash: %+v", n)
	}
	if got := fact("peer", "{{.State.Status}}"); got != "running" {
		t.Errorf("the host's container is %s", got)
	}
	d.Must(t, "start", "one")
	d.tenon(t, "machine stop -t 0 m")
	if got := fact("two", "{{.State.Status}}"); got != "exited" {
		t.Errorf("on a machine that was stopped, a container is %s", got)
	}
	for _, args := range []string{"start one", "cp one:/index.html -", "run --rm --isolation machine=m busybox true"} {
		d.machineRefused(t, d.Socket, "machine m is stopped: tenon machine start m", strings.Fields(args)...)
	}
	if r := d.Sh(t, "tenon machine rm m"); r.Code == 0 || !strings.Contains(r.Err, "it has 2 containers") {
		t.Errorf("rm: exit %d %s", r.Code, r.Err)
	}
	d.Kill(t) // what is stopped stays so
	d.Start(t)
	d.machineIs(t, "m", "stopped")
	d.tenon(t, "machine start m")
	running("two")
	if got := d.Must(t, "cp", "one:/index.html", "-"); !strings.Contains(got, "one") {
		t.Errorf("files of a container that does not run: %q", got)
	}
	d.Must(t, "rm", "one")
	d.tenon(t, "machine rm -f -v m")
	d.Must(t, "rm", "-f", "peer")
	d.Must(t, "network", "rm", "net")
	if out := d.Must(t, "ps", "-aq"); out != "" {
		t.Errorf("containers are left: %s", out)
	}
}

// machineKills kills the daemon, or lets it fail, while it makes, starts, stops and
// removes a machine.
func (d *Daemon) machineKills(t *testing.T) {
	const create = "create k --restart no --memory 256m --disk 128m" // nothing starts it but the test
	for _, x := range []struct{ point, verb, state string }{
		{"machine-made:kill", create, ""},
		{"machine-started:error", create, ""},
		{"machine-started:kill", create, ""},
		{"machine-stopping:kill", "stop -t 0 k", "stopped"},
		{"machine-started:error", "start k", "crashed"},
		{"machine-started:kill", "start k", "running"},
		{"machine-removing:kill", "rm -f -v k", ""},
	} {
		switch x.point {
		case "machine-stopping:kill":
			d.tenon(t, "machine "+create)
		case "machine-removing:kill":
			d.Must(t, "volume", "create", "--label", "tenon.machine=k", "of-k")
		}
		d.Kill(t)
		d.Env = []string{"TENON_FAILPOINT=" + x.point}
		d.Start(t)
		if r := d.Sh(t, "tenon machine "+x.verb); r.Code == 0 {
			t.Errorf("%s: it was to fail at %s: %s", x.verb, x.point, r.Out)
		}
		if strings.HasSuffix(x.point, ":kill") {
			d.Kill(t)
			d.Env = nil
			d.Start(t)
		}
		eventually(t, x.verb+", cut off at "+x.point, func() string {
			got := d.tenon(t, "machine ls --format '{{.State}}'")
			if got != x.state {
				return "it is " + got + ", not " + x.state
			}
			return ""
		})
	}
	d.Env = nil
	if out := d.Must(t, "volume", "ls", "-q"); strings.Contains(out, "of-k") {
		t.Errorf("volumes after rm -v: %s", out)
	}
}
