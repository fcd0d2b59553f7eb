package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestVM tries what a kernel of a container's own is about: that it is one, that
// it is shown, and who dies with whom. What it has in common with the host's is
// TestBehaviours's.
func TestVM(t *testing.T) {
	t.Parallel()
	d := newVMDaemon(t)
	d.Busybox(t)
	d.vmLife(t)
}

func (d *Daemon) vmLife(t *testing.T) {
	host := strings.TrimSpace(d.Sh(t, "uname -r; cat /proc/sys/kernel/random/boot_id").Out)
	r := d.Docker(t, "run", "--rm", "--isolation", "VM", "busybox", "sh", "-c", "uname -r; cat /proc/sys/kernel/random/boot_id")
	if lines := strings.Fields(r.Out); r.Code != 0 || len(lines) != 2 || strings.Contains(host, lines[0]) || strings.Contains(host, lines[1]) {
		t.Fatalf("exit %d, %q, on the host %q: %s", r.Code, r.Out, host, r.Err)
	}
	if !strings.Contains(r.Err, "emulated (TCG)") {
		t.Errorf("no word of the emulation: %s", r.Err)
	}
	if out := d.Must(t, "info"); !strings.Contains(out, "tcg") {
		t.Errorf("info does not show the accelerator:\n%s", out)
	}
	d.Must(t, "network", "create", "net")
	d.Must(t, "run", "-d", "--name", "peer", "--network", "net", "busybox", "sh", "-c", "echo hi >/index.html; exec httpd -f -h /")
	run := func(name string, args ...string) {
		d.Must(t, append([]string{"run", "-d", "--isolation", "vm", "--name", name, "--network", "net"}, args...)...)
	}
	run("count", "-p", "127.0.0.1::80", "busybox", "sh", "-c", "[ -e /boot ] || cat /proc/sys/kernel/random/boot_id >/boot; echo there >/index.html; sync; httpd -h /; i=0; while :; do echo $i; i=$((i+1)); sleep 0.2; done")
	run("again", "--restart", "on-failure", "busybox", "sleep", "1000")
	fact := func(name, what string) string { return d.Must(t, "inspect", "-f", what, name) }
	about := `{{index .HostConfig.Annotations "tenon.isolation"}} {{index .HostConfig.Annotations "tenon.accel"}} {{index .HostConfig.Annotations "tenon.boot-id"}}`
	boot := d.Must(t, "exec", "count", "cat", "/proc/sys/kernel/random/boot_id")
	if got := fact("count", about); got != "vm tcg "+boot {
		t.Errorf("inspect says %q, the guest %s", got, boot)
	}
	if out := d.Must(t, "exec", "count", "wget", "-qO-", "http://peer/"); out != "hi" {
		t.Errorf("from a machine to a container of the host: %q", out)
	}
	if out := d.Must(t, "exec", "peer", "wget", "-qO-", "http://count/"); out != "there" {
		t.Errorf("from a container of the host to a machine: %q", out)
	}
	port := strings.TrimSpace(d.Must(t, "port", "count", "80/tcp"))
	if r := d.Sh(t, "curl -sS -m 20 http://"+port+"/"); r.Out != "there\n" {
		t.Errorf("published port: %q %s", r.Out, r.Err)
	}
	pid := fact("count", "{{.State.Pid}}")

	// The daemon's death is nobody's.
	d.Kill(t)
	d.Start(t)
	if got := d.Must(t, "exec", "count", "cat", "/proc/sys/kernel/random/boot_id"); got != boot || fact("count", "{{.State.Pid}}") != pid {
		t.Errorf("after the daemon's death another kernel: %s, was %s", got, boot)
	}
	logs := strings.Fields(d.Must(t, "logs", "count"))
	for i, line := range logs {
		if line != strconv.Itoa(i) {
			t.Errorf("line %d of the log is %q", i, line)
			break
		}
	}

	// A machine's end is its container's.
	for _, name := range []string{"count", "again"} {
		d.Sh(t, "kill -9 "+fact(name, "{{.State.Pid}}"))
	}
	eventually(t, "a container whose machine was killed", func() string {
		if got := fact("count", "{{.State.Status}} {{.State.ExitCode}} {{.State.Error}}"); !strings.HasPrefix(got, "exited 137 the container's virtual machine ended") {
			return got
		}
		return ""
	})
	eventually(t, "the restart policy", func() string {
		if got := fact("again", "{{.State.Status}} {{.RestartCount}}"); got != "running 1" {
			return got
		}
		return ""
	})
	if got := fact("peer", "{{.State.Status}}"); got != "running" {
		t.Errorf("the host's container is %s", got)
	}
	d.Must(t, "start", "count")
	if got := d.Must(t, "exec", "count", "cat", "/boot"); got != boot { // of the first, not of this one
		t.Errorf("its files: %q, want %q", got, boot)
	}

	// So is that of the process which holds the machines.
	if err := syscall.Kill(holder(t, d.RunRoot), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "containers whose machines' holder was killed", func() string {
		if got := fact("count", "{{.State.Status}} {{.State.ExitCode}}"); got != "exited 137" {
			return got
		}
		return ""
	})
	eventually(t, "the restart policy", func() string {
		if got := fact("again", "{{.State.Status}}"); got != "running" {
			return got
		}
		return ""
	})
	d.Must(t, "rm", "-f", "count", "again", "peer")
	d.Must(t, "network", "rm", "net")
}

// TestVMRefusals: what can't be had is refused before anything is made.
func TestVMRefusals(t *testing.T) {
	d := newVMDaemon(t, "--default-isolation", "vm")
	d.Busybox(t)
	for _, flags := range []string{
		"--device /dev/sda", "--cgroup-parent x", "--gpus all", "-v /dev/kmsg:/x", "-v /tmp:/x:shared",
		"--mount type=volume,source=nfs,target=/x,volume-opt=type=nfs",
	} {
		r := d.Docker(t, append(append([]string{"run", "--name", "refused"}, strings.Fields(flags)...), "busybox", "true")...)
		if r.Code != 125 || !strings.Contains(r.Err, "nothing was started") {
			t.Errorf("%s: exit %d: %s", flags, r.Code, r.Err)
		}
	}
	if out := d.Must(t, "ps", "-aq"); out != "" {
		t.Errorf("made nevertheless: %s", out)
	}
	if out := d.Must(t, "run", "--rm", "--isolation", "process", "busybox", "uname", "-r"); out != strings.TrimSpace(d.Sh(t, "uname -r").Out) {
		t.Errorf("--isolation process: kernel %s", out)
	}
}

// holder is the pid of the tenon-vmm that works in a run root.
func holder(t *testing.T, runRoot string) int {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range lines {
		b, _ := os.ReadFile(line) // it may be gone
		args := strings.Split(string(b), "\x00")
		if len(args) > 2 && filepath.Base(args[0]) == "tenon-vmm" && args[1] == "serve" && strings.Contains(string(b), runRoot+"/") {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(line)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatal("no tenon-vmm works in " + runRoot)
	return 0
}
