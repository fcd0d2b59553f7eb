package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// settings writes a settings file for a daemon.
func settings(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tenond.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// disks lists the mounts and loop devices of limited writable layers.
func (d *Daemon) disks(t *testing.T) (list []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, d.Root) {
			list = append(list, strings.TrimSpace(line))
		}
	}
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), d.Root) {
			list = append(list, "loop device of "+strings.TrimSpace(string(b)))
		}
	}
	return list
}

// TestLimitedDisk: a limit of the writable layer that the daemon's settings give
// holds over the daemon's death at any step, and leaves nothing.
func TestLimitedDisk(t *testing.T) {
	d := NewDaemon(t, "--config", settings(t, "[limits]\ndisk = \"32m\"\n"))
	d.Busybox(t)
	const fill = "dd if=/dev/zero of=/big bs=1M count=64 2>&1 | grep -c 'No space left'"
	d.Must(t, "run", "-d", "--name", "c1", "busybox", "sh", "-c", "echo kept >/f; sleep 1000")
	eventually(t, "its file", func() string { return d.Docker(t, "exec", "c1", "cat", "/f").Err })
	if s := d.Must(t, "inspect", "-f", "{{.HostConfig.StorageOpt.size}}", "c1"); s != "33554432" {
		t.Errorf("inspect says %q", s)
	}
	d.Kill(t)
	d.Start(t)
	if s := d.Must(t, "exec", "c1", "sh", "-c", fill); s != "1" {
		t.Errorf("filling it after the daemon's death: %q", s)
	}
	d.Must(t, "restart", "-t", "0", "c1")
	if s := d.Must(t, "exec", "c1", "sh", "-c", "rm /big; cat /f"); s != "kept" {
		t.Errorf("after a restart: %q", s)
	}
	if s := d.Must(t, "run", "--rm", "--storage-opt", "size=64m", "busybox", "sh", "-c", "df -m / | awk 'END {print ($2 > 40)}'"); s != "1" {
		t.Errorf("a container's own size: %q", s)
	}
	d.Must(t, "rm", "-f", "c1")
	for _, c := range []struct{ point, script string }{
		{"create-end", "docker create --name cut busybox sleep 1000"},
		{"start-prepared", "docker run -d --name cut busybox sleep 1000"},
		{"start-created", "tenon run -d --name cut busybox sleep 1000"},
		{"start-prepared", "tenon run --rm --name cut busybox sleep 1000"},
		{"rm-marked", "docker run -d --name cut busybox sleep 1000; docker rm -f cut"},
		{"rm-root", "docker run -d --name cut busybox sleep 1000; docker rm -f cut"},
	} {
		d.dieAt(t, c.point, c.script)
		if r := d.Docker(t, "inspect", "cut"); r.Code == 0 {
			if r := d.Docker(t, "start", "cut"); r.Code != 0 {
				t.Errorf("%s: start again: %s", c.point, r.Err)
			}
			if s := d.Must(t, "exec", "cut", "sh", "-c", fill); s != "1" {
				t.Errorf("%s: filling it: %q", c.point, s)
			}
			d.Must(t, "rm", "-f", "cut")
		}
	}
	eventually(t, "nothing is left", func() string { return strings.Join(d.disks(t), "\n") })

	// What is stopped is still mounted; the daemon's end takes it away, and the
	// next use finds it.
	d.Must(t, "run", "--name", "c1", "busybox", "sh", "-c", "echo kept >/f")
	if r := d.Sh(t, "tenon system shutdown --force"); r.Code != 0 {
		t.Fatal(r.Err)
	}
	d.Wait(t, 30*time.Second)
	eventually(t, "nothing is mounted", func() string { return strings.Join(d.disks(t), "\n") })
	d.Start(t)
	if r := d.Sh(t, "docker cp -q c1:/f - | tar -xO"); r.Out != "kept\n" {
		t.Errorf("after a shutdown: %q %s", r.Out, r.Err)
	}
	d.Must(t, "rm", "c1")
}

// TestAnonymousVolumeOutlivesItsContainer: what `rm` without -v leaves, no later
// daemon takes for a leftover.
func TestAnonymousVolumeOutlivesItsContainer(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	d.Must(t, "run", "--name", "c1", "-v", "/data", "busybox", "sh", "-c", "echo kept >/data/f")
	v := d.Must(t, "inspect", "-f", "{{(index .Mounts 0).Name}}", "c1")
	d.Kill(t)
	d.Start(t)
	if s := d.Must(t, "volume", "ls", "-q"); s != v {
		t.Errorf("volumes of a stopped container: %q, want %q", s, v)
	}
	d.Must(t, "rm", "c1")
	d.Kill(t)
	d.Start(t)
	if s := d.Must(t, "run", "--rm", "-v", v+":/d", "busybox", "cat", "/d/f"); s != "kept" {
		t.Errorf("its file: %q", s)
	}
	d.Must(t, "volume", "rm", v)
}

// TestMemoryReserve: containers can't take the host's reserve together either,
// and whom the kernel ends for it is told so.
func TestMemoryReserve(t *testing.T) {
	var si syscall.Sysinfo_t
	if err := syscall.Sysinfo(&si); err != nil {
		t.Fatal(err)
	}
	reserve := int64(si.Totalram)*int64(si.Unit) - 256<<20
	d := NewDaemon(t, "--memory-reserve", strconv.FormatInt(reserve, 10))
	d.Busybox(t)
	d.Must(t, "run", "-d", "--name", "small", "busybox", "sleep", "1000")
	// Each alone has room, both together have not.
	d.Must(t, "run", "-d", "--name", "hog1", "-m", "4g", "busybox", "dd", "if=/dev/zero", "of=/dev/null", "bs=160M")
	d.Must(t, "run", "-d", "--name", "hog2", "busybox", "dd", "if=/dev/zero", "of=/dev/null", "bs=160M")
	eventually(t, "the kernel ends one of both", func() string {
		s := d.Must(t, "inspect", "-f", "{{.State.Status}} {{.State.OOMKilled}} {{.State.ExitCode}}", "hog1", "hog2", "small")
		switch s {
		case "exited true 137\nrunning false 0\nrunning false 0", "running false 0\nexited true 137\nrunning false 0":
			return ""
		}
		return s
	})
	// One that asks for more than there is ends whoever was left of them, or itself.
	d.Must(t, "run", "-d", "--name", "hog3", "busybox", "dd", "if=/dev/zero", "of=/dev/null", "bs=1G")
	if s := d.Must(t, "wait", "hog3"); s != "137" {
		t.Errorf("the third ended with %s", s)
	}
	if s := d.Must(t, "inspect", "-f", "{{.State.OOMKilled}} {{.State.Status}}", "hog3", "small"); s != "true exited\nfalse running" {
		t.Errorf("the third and its neighbour: %s", s)
	}
	// Another reserve is in force when the daemon is back, for what runs too.
	d.Kill(t)
	d.Args = append(d.Args, "--memory-reserve", strconv.FormatInt(reserve-64<<20, 10))
	d.Start(t)
	group := "/sys/fs/cgroup/memory/" + d.Name + "/memory.limit_in_bytes"
	if _, err := os.Stat("/sys/fs/cgroup/memory"); err != nil {
		group = "/sys/fs/cgroup/" + d.Name + "/memory.max"
	}
	if b, err := os.ReadFile(group); err != nil || strings.TrimSpace(string(b)) != strconv.FormatInt((320<<20)&^4095, 10) {
		t.Errorf("the group's limit: %q %v", b, err)
	}
	d.Must(t, "rm", "-f", "small", "hog1", "hog2", "hog3")
}

// TestNamedDevices: devices by the Container Device Interface, and --gpus, from
// specifications as vendors' tools write them.
func TestNamedDevices(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"acme.yaml": `cdiVersion: "0.6.0"
kind: acme.com/thing
containerEdits:
  env: ["ACME=yes"]
devices:
- name: one
  containerEdits:
    env: ["THING=one"]
    deviceNodes: [{path: /dev/acme0, hostPath: /dev/null}]
    mounts: [{hostPath: ` + dir + `, containerPath: /acme, options: [ro, rbind]}]
`,
		"gpu.json": `{"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": [
 {"name": "0", "containerEdits": {"env": ["GPU0=yes"]}},
 {"name": "1", "containerEdits": {"env": ["GPU1=yes"]}},
 {"name": "all", "containerEdits": {"env": ["GPU0=yes", "GPU1=yes"]}}]}`,
		"broken.json": `{"cdiVersion": `,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d := NewDaemon(t, "--cdi-spec-dir", dir)
	d.Busybox(t)
	for _, c := range []struct{ flags, cmd, want string }{
		{"--device acme.com/thing=one", "echo $ACME $THING; echo x >/dev/acme0 && stat -c %F /dev/acme0; ls /acme; touch /acme/x 2>/dev/null || echo refused", "yes one\ncharacter special file\nacme.yaml\nbroken.json\ngpu.json\nrefused"},
		{"--gpus all", "echo $GPU0 $GPU1", "yes yes"},
		{"--gpus 1", "echo $GPU0 $GPU1", "yes"},
		{"--gpus device=1", "echo $GPU0 . $GPU1", ". yes"},
	} {
		args := append([]string{"run", "--rm"}, strings.Fields(c.flags)...)
		if s := strings.TrimSpace(d.Must(t, append(args, "busybox", "sh", "-c", c.cmd)...)); s != c.want {
			t.Errorf("%s: %q, want %q", c.flags, s, c.want)
		}
	}
	for flags, want := range map[string]string{
		"--device acme.com/thing=two": "unresolvable CDI devices acme.com/thing=two",
		"--gpus 3":                    "3 devices of nvidia.com/gpu were asked for, and there are 2",
		"--gpus driver=amd":           "could not select device driver",
	} {
		args := append([]string{"create"}, strings.Fields(flags)...)
		if r := d.Docker(t, append(args, "busybox", "true")...); r.Code == 0 || !strings.Contains(r.Err, want) {
			t.Errorf("%s: exit %d: %s", flags, r.Code, r.Err)
		}
	}
	if code, b := d.api(t, "GET", "/v1.50/info", nil); code != 200 || !strings.Contains(string(b), `{"Source":"cdi","ID":"acme.com/thing=one"}`) || !strings.Contains(string(b), dir) {
		t.Errorf("info: %d %s", code, b)
	}
	if s := d.Must(t, "ps", "-aq"); s != "" {
		t.Errorf("containers are left: %s", s)
	}
}

// TestPropagation: what is mounted in a shared directory is seen on its other side,
// and a directory whose mount is private is refused, as by Docker.
func TestPropagation(t *testing.T) {
	d := newTarget(t)
	dir := t.TempDir()
	if err := syscall.Mount("tenon-e2e", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	kind := func(flag uintptr) {
		t.Helper()
		if err := syscall.Mount("", dir, "", flag, ""); err != nil {
			t.Fatal(err)
		}
	}
	kind(syscall.MS_PRIVATE)
	for mode, want := range map[string]string{"rshared": "is not a shared mount", "rslave": "is not a shared or slave mount", "shared": "is not a shared mount"} {
		r := d.Docker(t, "run", "--rm", "-v", dir+":/x:"+mode, "busybox", "true")
		if r.Code != 125 || !strings.Contains(r.Err, "path "+dir+" is mounted on "+dir+" but it "+want) {
			t.Errorf("%s of a private mount: exit %d, %s", mode, r.Code, r.Err)
		}
	}
	kind(syscall.MS_SHARED)
	if err := os.MkdirAll(filepath.Join(dir, "in"), 0o755); err != nil {
		t.Fatal(err)
	}
	d.Must(t, "run", "--rm", "--cap-add", "SYS_ADMIN", "-v", dir+":/x:rshared", "busybox", "sh", "-c", "mount -t tmpfs in /x/in && echo there >/x/in/f")
	if b, err := os.ReadFile(filepath.Join(dir, "in/f")); err != nil || string(b) != "there\n" {
		t.Errorf("what a container mounted: %q, %v", b, err)
	}
	d.Must(t, "run", "-d", "--name", "slave", "-v", dir+":/x:rslave", "busybox", "sleep", "100000")
	if err := syscall.Unmount(filepath.Join(dir, "in"), 0); err != nil {
		t.Fatal(err)
	}
	if out := d.Must(t, "exec", "slave", "sh", "-c", "ls /x/in; grep -c ' /x/in ' /proc/mounts || true"); out != "0" {
		t.Errorf("what the host unmounted: %s", out)
	}
}

// TestRunFlags: flags that no row of the table of behaviours is about.
func TestRunFlags(t *testing.T) {
	d := newTarget(t)
	labels := filepath.Join(t.TempDir(), "labels")
	if err := os.WriteFile(labels, []byte("a=b\n# not\nc=\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	oomControl, oomWant := "echo oom_kill_disable 1", "oom_kill_disable 1" // v2 has no such switch
	if _, err := os.Stat("/sys/fs/cgroup/memory"); err == nil {
		oomControl = "grep oom_kill_disable /sys/fs/cgroup/memory/memory.oom_control"
	}
	const poll = `w() { for _ in $(seq 300); do [ "$(docker inspect -f "$1" $c)" = "$2" ] && return; sleep 0.1; done; docker inspect -f "{{json .State}}" $c; }; `
	for k, row := range []struct{ script, want string }{
		{`docker create --name $c --annotation k=v --stop-timeout 3 busybox >/dev/null; docker inspect -f '{{index .HostConfig.Annotations "k"}} {{.Config.StopTimeout}}' $c`, "v 3"},
		{`docker run --rm --name $c --label-file ` + labels + ` -l d=e busybox true; docker create --name $c --label-file ` + labels + ` busybox >/dev/null; docker inspect -f '{{json .Config.Labels}}' $c`, `{"a":"b","c":""}`},
		{`for f in "" "--device-cgroup-rule=c\ 10:229\ r"; do eval docker run --rm $f busybox sh -c '"mknod /f c 10 229; ( : </f ) 2>&1 | grep -c permitted"' || true; done`, "1\n0"},
		{`docker run --rm -m 64m --oom-kill-disable busybox sh -c '` + oomControl + `' 2>/dev/null`, oomWant},
		{`docker run -d --name $c --stop-timeout 1 busybox sh -c 'trap "" TERM; while :; do sleep 0.1; done' >/dev/null; docker stop $c >/dev/null; docker inspect -f '{{.State.ExitCode}}' $c`, "137"},
		{`docker network create --ipv6 --subnet fd7e:9a:` + strconv.Itoa(os.Getpid()%9999) + `::/64 ${c}n >/dev/null; docker run --rm --network ${c}n --ip6 fd7e:9a:` + strconv.Itoa(os.Getpid()%9999) + `::77 busybox ip -6 addr show eth0 | grep -c '::77/64'; docker network rm ${c}n >/dev/null`, "1"},
		{poll + `docker run -d --name $c --health-cmd 'sleep 50' --health-timeout 200ms --health-interval 200ms --health-retries 1 busybox sleep 1000 >/dev/null; w '{{.State.Health.Status}}' unhealthy; docker inspect -f '{{json .State.Health.Log}}' $c | grep -c 'exceeded timeout'`, "1"},
		{poll + `docker run -d --name $c --health-cmd false --health-start-period 1h --health-start-interval 100ms --health-interval 1h --health-retries 1 busybox sleep 1000 >/dev/null; w '{{ge (len .State.Health.Log) 2}}' true; docker inspect -f '{{.State.Health.Status}} {{.State.Health.FailingStreak}}' $c`, "starting 0"},
		{poll + `docker run -d --name $c --health-cmd true --health-start-period 1h --health-start-interval 100ms --health-interval 1h busybox sleep 1000 >/dev/null; w '{{.State.Health.Status}}' healthy; echo ok`, "ok"},
		{poll + `for x in none kill stop restart; do c=health$x; tenon run -d --name $c --stop-timeout 0 --health-cmd false --health-interval 100ms --health-retries 2 --health-on-failure $x busybox sleep 1000 >/dev/null; done
c=healthnone; w '{{.State.Status}} {{.State.Health.Status}}' 'running unhealthy'; c=healthkill; w '{{.State.Status}} {{.State.ExitCode}}' 'exited 137'; c=healthstop; w '{{.State.Status}} {{.State.ExitCode}}' 'exited 137'
timeout 30 docker events --since 1m --filter container=healthrestart --filter event=restart --format '{{.Action}}' | head -n 1; for x in none kill stop restart; do docker rm -f health$x >/dev/null; done`, "restart"},
		{`docker create --name ${c}i busybox >/dev/null; docker commit -c 'HEALTHCHECK --interval=100ms CMD false' ${c}i ${c}i >/dev/null; docker run -d --name $c --no-healthcheck ${c}i sleep 1000 >/dev/null; docker inspect -f '{{.Config.Healthcheck.Test}} {{.State.Health}}' $c; docker rm ${c}i >/dev/null`, "[NONE] <nil>"},

		{`t=$(date +%s); docker network create --label x=$c ${c}n >/dev/null; docker network prune -f --filter label=x=$c >/dev/null; docker events --since $t --until $(($(date +%s)+1)) --filter type=network --filter event=prune --format '{{json .Actor.Attributes}}' | sort -u`, `{"reclaimed":"0"}`},

		// What a log says of its container, and how it is bounded.
		{`docker run --name $c --log-driver json-file --log-opt tag='{{.Name}}/{{.ID}}/{{.ImageName}}' --log-opt labels-regex='^ti' --log-opt env=A,C --log-opt env-regex=^B -l tier=web -l other=x -e A=1 -e BB=2 -e D=3 busybox echo x >/dev/null; docker logs --details $c | sed "s/$(docker inspect -f '{{.Id}}' $c | cut -c1-12)/ID/;s/$c/NAME/"`, "A=1,BB=2,tag=NAME%2FID%2Fbusybox,tier=web x"},
		{`docker create --log-driver json-file --log-opt tag='{{.Nosuch}}' busybox 2>&1 | grep -c "'tag'"; docker create --log-opt bogus=1 busybox 2>&1 | grep -c "unknown log opt 'bogus'"; docker create --log-opt max-file=0 busybox 2>&1 | grep -c max-file; docker create --log-opt env-regex='(' busybox 2>&1 | grep -c env-regex; docker create --log-driver json-file --log-opt compress=true --log-opt max-file=1 busybox 2>&1 | grep -c 'compress cannot be true'`, "1\n1\n1\n1\n1"},
		{`docker run --name $c --log-driver json-file --log-opt max-size=20k --log-opt max-file=3 --log-opt compress=true busybox seq 5000 >/dev/null; docker logs $c | tail -1; [ $(docker logs $c | wc -l) -lt 5000 ] && echo bounded; f=$(docker inspect -f '{{.LogPath}}' $c); ls $(dirname $f) | wc -l; ls $(dirname $f) | grep -c gz$`, "5000\nbounded\n3\n2"},
		{`docker run --name $c --log-driver none busybox echo seen; docker logs $c 2>&1 | grep -c 'does not support reading'`, "seen\n1"},
	} {
		c := "flags" + strconv.Itoa(k)
		r := d.Sh(t, "c="+c+"; "+row.script+"\ndocker rm -f $c >/dev/null 2>&1 || true")
		if got := strings.TrimSpace(r.Out); got != row.want {
			t.Errorf("%s\nsays %q (%s), want %q", row.script, got, strings.TrimSpace(r.Err), row.want)
		}
	}
}

// TestEveryRunFlag: each flag of docker run is used by a test of this package.
func TestEveryRunFlag(t *testing.T) {
	elsewhere := map[string]string{
		"cpu-count": "Windows", "cpu-percent": "Windows", "io-maxbandwidth": "Windows", "io-maxiops": "Windows",
		"disable-content-trust": "the client's", "use-api-socket": "the client's", "help": "the client's", "quiet": "the client's",
		"kernel-memory": "no longer there", "blkio-weight-device": "internal/cli; few kernels have it",
		"detach-keys": "internal/server", "sig-proxy": "internal/cli/quick",
	}
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(b)
	}
	help, err := exec.Command("docker", "run", "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	flags := regexp.MustCompile(`(?m)^ +(-\w)?,? +--([a-z0-9-]+)`).FindAllStringSubmatch(string(help), -1)
	if len(flags) < 90 {
		t.Fatalf("docker run has %d flags", len(flags))
	}
	for _, f := range flags {
		short, long := f[1], f[2]
		used := regexp.MustCompile(`--`+long+`[^a-z0-9-]`).MatchString(text.String()) ||
			short != "" && regexp.MustCompile(`[ "]`+short+`[ "]`).MatchString(text.String())
		if !used && elsewhere[long] == "" {
			t.Errorf("no test uses --%s", long)
		}
	}
}
