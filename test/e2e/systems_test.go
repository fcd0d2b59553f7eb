package e2e

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"tenon.dev/tenon/internal/vm/kernel"
)

// systemDisk makes a disk image with a small operating system.
func systemDisk(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience(2*time.Minute))
	defer cancel()
	cache := os.Getenv("TENON_CACHE")
	if cache == "" {
		cache = "/var/cache/tenon-test"
	}
	k, err := kernel.Find(ctx, kernel.Config{Kernel: kernel.Debian, Dir: filepath.Join(cache, "kernel")})
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "system.raw")
	cmd := exec.CommandContext(ctx, "sh", "../tools/systemdisk.sh", filepath.Dir(filepath.Dir(k.Image)), out)
	cmd.WaitDelay = time.Second
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("systemdisk.sh: %v\n%s", err, text)
	}
	return out
}

// TestSystems runs a disk image as a machine with its own operating system, by the
// verbs of every container.
func TestSystems(t *testing.T) {
	disk := systemDisk(t)
	d := newVMDaemonAt(t, "", "", "--vm-pool", "0")
	d.Busybox(t)
	d.tenon(t, "load -i "+disk+" --tag sys")
	for _, x := range []struct{ args, says string }{
		{"sys", "--isolation machine"},
		{"--isolation vm sys", "--isolation machine"},
		{"--isolation machine busybox", "is no disk with an operating system"},
		{"--isolation machine sys true", "a command can't be had"},
		{"--isolation machine -v /tmp:/x sys", "a directory of the host"},
		{"--isolation machine --privileged sys", "--privileged can't be had"},
		{"--isolation machine --network host sys", "--network host can't be had"},
		{"--isolation machine --memory 16m sys", "at least 128 MiB"},
		{"--isolation machine --storage-opt size=10m sys", "can't be made smaller"},
	} {
		if r := d.Sh(t, "docker create "+x.args); r.Code == 0 || !strings.Contains(r.Err, x.says) {
			t.Errorf("create %s: exit %d, %s", x.args, r.Code, r.Err)
		}
	}
	if ids := d.Must(t, "ps", "-aq"); ids != "" {
		t.Errorf("refusals have left %s", ids)
	}
	d.Must(t, "network", "create", "net")
	d.Must(t, "run", "-d", "--name", "web", "--hostname", "webby", "--isolation", "machine", "--network", "net", "-p", "127.0.0.1::80", "--restart", "always",
		"--memory", "200m", "--cpus", "1", "--storage-opt", "size=100m", "--annotation", "tenon.user-data=#cloud-config\nhello: world\n", "sys")
	answers := func(path, want string) {
		t.Helper()
		eventually(t, "what it answers at "+path, func() string { // its port may be another after a restart
			r := d.Sh(t, "port=$(docker port web 80/tcp) && curl -sS --connect-timeout 1 -m 2 --retry 2 --retry-delay 1 --retry-all-errors http://$port"+path)
			if r.Out != want {
				return r.Out + r.Err + "\nconsole: " + d.Sh(t, "docker logs --tail 20 web").Out
			}
			return ""
		})
	}
	answers("/", "webby boot 1\n")
	answers("/user-data", "#cloud-config\nhello: world\n")
	if got := d.Must(t, "run", "--rm", "--network", "net", "busybox", "wget", "-q", "-O", "-", "http://web/"); got != "webby boot 1" {
		t.Errorf("a container of its network reads %q", got)
	}
	if log := d.Must(t, "logs", "web"); !strings.Contains(log, "name webby") || !strings.Contains(log, "100 MiB, 1 processors") {
		t.Errorf("console: %s", log)
	}
	d.systemVerbs(t)
	d.systemDeaths(t, answers)
	d.Must(t, "stop", "web")
	if got := d.Must(t, "inspect", "-f", "{{.State.ExitCode}} {{.State.Status}}", "web"); got != "0 exited" {
		t.Errorf("after stop: %s", got)
	}
	if log := d.Must(t, "logs", "--tail", "5", "web"); !strings.Contains(log, "the power button was pressed") {
		t.Errorf("console: %s", log)
	}
	d.systemUnseen(t)
	d.Must(t, "rm", "web")
	d.systemConsole(t)
	if left, _ := filepath.Glob("/sys/class/net/" + d.Name + "-v*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// systemVerbs is what else can be asked of a machine that runs.
func (d *Daemon) systemVerbs(t *testing.T) {
	for _, x := range []string{"docker exec web true", "docker top web", "docker cp web:/etc /tmp/nowhere", "docker diff web", "docker commit web other", "docker network disconnect net web"} {
		if r := d.Sh(t, x); r.Code == 0 || !strings.Contains(r.Err, "its own operating system") {
			t.Errorf("%s: exit %d, %s", x, r.Code, r.Err)
		}
	}
	d.Must(t, "pause", "web")
	if got := d.Must(t, "ps", "--format", "{{.Status}}"); !strings.Contains(got, "Paused") {
		t.Errorf("paused: %s", got)
	}
	d.Must(t, "unpause", "web")
	d.Must(t, "update", "--cpus", "0.9", "--memory", "150m", "--memory-swap", "150m", "web")
	if r := d.Docker(t, "update", "--memory", "2g", "--memory-swap", "2g", "web"); r.Code == 0 || !strings.Contains(r.Err, "stop it first") {
		t.Errorf("update to more memory: exit %d, %s", r.Code, r.Err)
	}
	var s struct{ CPUPerc, NetIO, BlockIO string }
	if text := d.Must(t, "stats", "--no-stream", "--format", "{{json .}}", "web"); json.Unmarshal([]byte(text), &s) != nil || strings.HasPrefix(s.NetIO, "0B") || strings.HasPrefix(s.BlockIO, "0B") {
		t.Errorf("stats: %s", text)
	}
	var annotations map[string]string
	text := d.Must(t, "inspect", "-f", "{{json .HostConfig.Annotations}}", "web")
	if json.Unmarshal([]byte(text), &annotations) != nil || annotations["tenon.isolation"] != "machine" || annotations["tenon.accel"] != "tcg" {
		t.Errorf("inspect: %s", text)
	}
}

// systemDeaths kills the daemon, which is not the machine's end, and then its QEMU.
func (d *Daemon) systemDeaths(t *testing.T, answers func(path, want string)) {
	d.Kill(t)
	d.Start(t)
	answers("/", "webby boot 1\n")
	pid, err := strconv.Atoi(d.Must(t, "inspect", "-f", "{{.State.Pid}}", "web"))
	if err != nil || pid <= 1 {
		t.Fatalf("pid: %v", err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	answers("/", "webby boot 2\n")
	if got := d.Must(t, "inspect", "-f", "{{.RestartCount}}", "web"); got != "1" {
		t.Errorf("restarts: %s", got)
	}
}

// systemUnseen kills a machine's QEMU while there is no daemon: the next one knows why it
// ended.
func (d *Daemon) systemUnseen(t *testing.T) {
	d.Must(t, "update", "--restart", "no", "web")
	d.Must(t, "start", "web")
	pid, err := strconv.Atoi(d.Must(t, "inspect", "-f", "{{.State.Pid}}", "web"))
	if err != nil || pid <= 1 {
		t.Fatalf("pid: %v", err)
	}
	d.Kill(t)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	d.Start(t)
	eventually(t, "why it ended", func() string {
		got := d.Must(t, "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.State.Error}}", "web")
		if !strings.HasPrefix(got, "exited 137 the machine ended: QEMU") || !strings.Contains(got, "SIGKILL") {
			return got
		}
		return ""
	})
}

// systemConsole types on the console of a machine, which turns itself off.
func (d *Daemon) systemConsole(t *testing.T) {
	script := `n=0; (until docker logs con 2>/dev/null | grep -q "is up"; do
	n=$((n+1)); [ $n -lt 200 ] || exit; sleep 0.3; done; sleep 1; echo; sleep 0.5; echo 'echo the answer is $((40+2)); poweroff -f') |
	docker run --rm -i --name con --isolation machine --memory 200m sys`
	if r := d.Sh(t, script); r.Code != 0 || !strings.Contains(r.Out, "the answer is 42") {
		t.Errorf("exit %d\n%s%s", r.Code, r.Out, r.Err)
	}
	if ids := d.Must(t, "ps", "-aq"); ids != "" {
		t.Errorf("left: %s", ids)
	}
}
