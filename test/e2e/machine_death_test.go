package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// TestMachineDeaths is TestVMDeaths for a machine that holds several containers:
// the daemon's death is nobody's, a container's death is its own, and the
// machine's is that of all its containers, and of nothing else.
func TestMachineDeaths(t *testing.T) {
	d := newVMDaemonAt(t, "", "hang-time = \"30s\"\n", "--vm-pool", "0")
	d.Busybox(t)
	d.tenon(t, "machine create m --cpus 1 --memory 512m --disk 1g")
	web := "echo alive >/index.html; httpd -h /; i=0; while :; do i=$((i+1)); echo $i; sleep 0.3; done"
	d.Must(t, "run", "-d", "--name", "beside", "-p", "127.0.0.1::80", "busybox", "sh", "-c", web)
	d.Must(t, "run", "-d", "--name", "one", "--isolation", "machine=m", "--restart", "always", "-p", "127.0.0.1::80", "busybox", "sh", "-c", web)
	d.Must(t, "run", "-d", "--name", "two", "--isolation", "machine=m", "busybox", "sleep", "100000")
	boot := d.Must(t, "exec", "one", "cat", "/proc/sys/kernel/random/boot_id")
	answers := func(t *testing.T) {
		t.Helper()
		for _, name := range []string{"beside", "one"} {
			port := strings.TrimSpace(d.Must(t, "port", name, "80/tcp"))
			if r := d.Sh(t, "curl -sS -m 30 --retry 20 --retry-delay 1 --retry-connrefused http://"+port+"/"); r.Out != "alive\n" {
				t.Errorf("%s answers %q %s", name, r.Out, r.Err)
			}
		}
	}
	unharmed := func(t *testing.T) {
		t.Helper()
		for _, name := range []string{"one", "two"} {
			if got := d.Must(t, "exec", name, "cat", "/proc/sys/kernel/random/boot_id"); got != boot {
				t.Errorf("%s runs on another kernel: %s, was %s", name, got, boot)
			}
		}
		answers(t)
	}
	t.Run("steps", func(t *testing.T) { d.diesAtGuestSteps(t, unharmed) })
	t.Run("random points", func(t *testing.T) {
		d.diesBeside(t, "machine=m")
		unharmed(t)
		d.guestsAgree(t)
	})
	t.Run("one container", func(t *testing.T) {
		d.Must(t, "kill", "two")
		if code := d.Must(t, "wait", "two"); code != "137" {
			t.Errorf("exit code %s", code)
		}
		d.Must(t, "start", "two")
		unharmed(t)
	})
	d.countsInLog(t, "beside", "one")

	hung := d.fillsAndHangs(t)

	// The machine's end is that of its containers, which say why; what its policy,
	// and theirs, wants is started again.
	d.Must(t, "run", "-d", "--name", "boom", "--isolation", "machine=m", "--privileged", "busybox", "sh", "-c", "sleep 1; echo c >/proc/sysrq-trigger; sleep 1000")
	for _, name := range []string{"two", "boom"} {
		d.diesOf(t, name, "machine m ended: kernel panic: sysrq triggered crash")
	}
	eventually(t, "the restart policies", func() string {
		r := d.Docker(t, "exec", "one", "cat", "/proc/sys/kernel/random/boot_id")
		if now := strings.TrimSpace(r.Out); r.Code != 0 || now == boot {
			return now + r.Err
		}
		return ""
	})
	boot = d.Must(t, "exec", "one", "cat", "/proc/sys/kernel/random/boot_id")
	d.Must(t, "rm", "boom")
	d.Must(t, "start", "two")
	unharmed(t)

	hung()
	d.tenon(t, "machine rm -f m")
	for _, name := range []string{"one", "two"} {
		if r := d.Docker(t, "inspect", name); r.Code == 0 {
			t.Errorf("%s is there without its machine", name)
		}
	}
	if left, err := filepath.Glob(d.Root + "/machines/*"); err != nil || len(left) > 0 {
		t.Errorf("files of machines are left: %v, %v", left, err)
	}
	d.Must(t, "rm", "-f", "beside")
	eventually(t, "QEMUs", func() string {
		if left := d.qemus(t); len(left) > 0 {
			return fmt.Sprint(left)
		}
		return ""
	})
	d.checkEmpty(t)
}

// fillsAndHangs has a second machine whose disk is full, and whose guest then hangs:
// that is noticed after a while, and whoever waits for it calls what is returned.
func (d *Daemon) fillsAndHangs(t *testing.T) (noticed func()) {
	d.tenon(t, "machine create h --cpus 1 --memory 512m --disk 64m --restart no")
	d.Must(t, "run", "-d", "--name", "hung", "--isolation", "machine=h", "busybox", "sleep", "100000")
	r := d.Docker(t, "run", "--rm", "--isolation", "machine=h", "busybox", "sh", "-c", "dd if=/dev/zero of=/f bs=1M count=100 || { rm /f; echo room >/g; cat /g; }")
	if r.Code != 0 || r.Out != "room\n" || !strings.Contains(r.Err, "No space left") {
		t.Errorf("with a full disk: exit %d: %q %q", r.Code, r.Out, r.Err)
	}
	if err := syscall.Kill(d.machine(t, "h").Pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	return func() {
		d.diesOf(t, "hung", "machine h ended: the guest hangs: it has not answered for 30s")
		d.machineIs(t, "h", "crashed")
		d.tenon(t, "machine rm -f h")
	}
}

// diesAtGuestSteps is diesAtMachineSteps for containers on a machine that lasts.
func (d *Daemon) diesAtGuestSteps(t *testing.T, unharmed func(*testing.T)) {
	const flags = "--name cut --isolation machine=m -v data:/data busybox sleep 100000"
	d.diesAtSteps(t, []deadlyStep{
		{"start-network", "docker create " + flags, "docker start cut", "created running"},
		{"start-created", "docker rm -fv cut; docker create " + flags, "docker start cut", "created running"},
		{"start-started", "docker rm -fv cut; docker create " + flags, "docker start cut", "running"},
		{"stop-marked", "", "docker stop -t 0 cut", "running exited"},
		{"rm-marked", "docker start cut", "docker rm -fv cut", "none"},
		{"start-created", "", "tenon run --rm " + flags, "none"},
		{"rm-network", "docker run -d " + flags, "docker rm -fv cut", "none"},
	}, func(*testing.T) {})
	unharmed(t)
	d.Docker(t, "volume", "rm", "data")
	d.guestsAgree(t)
}

// guestsAgree waits until the machine has nothing but what its two containers
// need: their files, and an interface for each.
func (d *Daemon) guestsAgree(t *testing.T) {
	t.Helper()
	eventually(t, "what is there and what should be", func() string {
		here := strings.Fields(d.Must(t, "ps", "-aq", "--no-trunc"))
		entries, err := os.ReadDir(filepath.Join(d.Root, "containers"))
		if err != nil {
			return err.Error()
		}
		for _, e := range entries {
			if !slices.Contains(here, e.Name()) {
				return "files of no container: " + e.Name()
			}
		}
		taps, err := filepath.Glob("/sys/class/net/" + d.Name + "-v*")
		if err != nil {
			return err.Error()
		}
		up := 0
		for _, tap := range taps {
			if _, err := os.Stat(tap + "/brport"); err == nil { // others wait for the next container
				up++
			}
		}
		if up != 2 {
			return fmt.Sprintf("%d interfaces of machines are in bridges, want 2: %v", up, taps)
		}
		// The files that they have written lie beside each other on the machine's disk.
		r := d.Docker(t, "run", "--rm", "--isolation", "machine=m", "--privileged", "--pid", "host", "busybox", "ls", "/proc/1/root/run/tenon/data/c")
		if dirs := strings.Fields(r.Out); r.Code != 0 || len(dirs) != 3 { // those of the two, and of the one that looks
			return fmt.Sprintf("files of containers on the machine: %v %s", dirs, r.Err)
		}
		return ""
	})
}
