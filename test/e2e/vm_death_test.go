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

// TestVMDeaths: whatever dies of a container with a kernel of its own, or of what
// holds it, that container ends with a reason that says so, everything else goes
// on, and nothing is left. One daemon serves for all deaths: making the first
// machine takes longest. Its state lies on a small disk of its own, which one of
// the deaths fills.
func TestVMDeaths(t *testing.T) {
	disk := newDisk(t, "3G")
	d := newVMDaemonAt(t, filepath.Join(disk, "root"), "hang-time = \"30s\"\n", "--default-isolation", "vm")
	d.Busybox(t)

	// Two witnesses that must not notice anything, one on each kind of kernel.
	web := "echo alive >/index.html; httpd -h /; while ! [ -e /talk ]; do sleep 0.3; done; i=0; while :; do i=$((i+1)); echo $i; sleep 0.3; done"
	d.Must(t, "run", "-d", "--name", "beside", "--isolation", "process", "-p", "127.0.0.1::80", "busybox", "sh", "-c", web)
	d.Must(t, "run", "-d", "--name", "witness", "-p", "127.0.0.1::80", "busybox", "sh", "-c", web)
	boot := d.Must(t, "exec", "witness", "cat", "/proc/sys/kernel/random/boot_id")
	ports := map[string]string{}
	for _, name := range []string{"beside", "witness"} {
		ports[name] = strings.TrimSpace(d.Must(t, "port", name, "80/tcp"))
	}
	unharmed := func(t *testing.T) {
		t.Helper()
		if got := d.Must(t, "exec", "witness", "cat", "/proc/sys/kernel/random/boot_id"); got != boot {
			t.Errorf("the witness runs on another kernel: %s, was %s", got, boot)
		}
		for name, port := range ports {
			if r := d.Sh(t, "curl -sS -m 30 http://"+port+"/"); r.Out != "alive\n" {
				t.Errorf("%s answers %q %s", name, r.Out, r.Err)
			}
		}
	}

	// A guest that hangs is noticed after a while, during which the others die.
	d.Must(t, "run", "-d", "--name", "hung", "busybox", "sleep", "100000")
	hung := d.qemu(t, "hung")
	if err := syscall.Kill(hung, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Run("panic", func(t *testing.T) {
		d.Must(t, "run", "-d", "--name", "panics", "--privileged", "busybox", "sh", "-c", "sleep 1; echo c >/proc/sysrq-trigger; sleep 1000")
		d.diesOf(t, "panics", "the container's virtual machine ended: kernel panic: sysrq triggered crash")
		d.Must(t, "rm", "panics")
		unharmed(t)
	})
	t.Run("its own limit", func(t *testing.T) {
		r := d.Docker(t, "run", "--rm", "--storage-opt", "size=32m", "busybox", "sh", "-c", "dd if=/dev/zero of=/f bs=1M count=64 || { rm /f; echo room >/g; cat /g; }")
		if r.Code != 0 || r.Out != "room\n" || !strings.Contains(r.Err, "No space left") {
			t.Errorf("exit %d: %q %q", r.Code, r.Out, r.Err)
		}
	})
	t.Run("full disk", func(t *testing.T) { d.fullUnderMachines(t, disk, unharmed) })
	t.Run("waiting machine", func(t *testing.T) {
		for _, pid := range d.qemus(t) {
			if !slices.Contains(d.running(t), pid) {
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
		}
		if out := d.Must(t, "run", "--rm", "busybox", "echo", "another"); out != "another" {
			t.Errorf("%q", out)
		}
	})
	t.Run("hang", func(t *testing.T) {
		d.diesOf(t, "hung", "the container's virtual machine ended: the guest hangs: it has not answered for 30s")
		d.Must(t, "rm", "hung")
	})
	for name := range ports { // a full disk loses a part of a log, a daemon's death does not
		d.Must(t, "exec", name, "touch", "/talk")
	}
	t.Run("steps", func(t *testing.T) { d.diesAtMachineSteps(t, unharmed) })
	t.Run("random points", func(t *testing.T) {
		d.diesBeside(t, "vm")
		unharmed(t)
		d.agrees(t)
	})
	unharmed(t)
	d.countsInLog(t, "beside", "witness")
	d.agrees(t)

	// The holder of all machines dies last: only those on the host's kernel go on.
	d.Must(t, "update", "--restart", "always", "witness")
	if err := syscall.Kill(holder(t, d.RunRoot), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the witness by its restart policy", func() string {
		s := d.Must(t, "inspect", "-f", "{{.State.Status}} {{.RestartCount}}", "witness")
		if s != "running 1" {
			return s
		}
		return ""
	})
	// Its port was any, and may be another now.
	if r := d.Sh(t, "curl -sS -m 30 --retry 20 --retry-delay 1 --retry-connrefused http://"+strings.TrimSpace(d.Must(t, "port", "witness", "80/tcp"))+"/"); r.Out != "alive\n" {
		t.Errorf("the witness answers %q %s", r.Out, r.Err)
	}
	d.agrees(t)
	d.Must(t, "rm", "-f", "witness", "beside")
	d.agrees(t)
	d.checkEmpty(t)
}

// fullUnderMachines fills the disk under all writable layers: who writes then
// dies of it, and with space again it goes on with what it had.
func (d *Daemon) fullUnderMachines(t *testing.T, disk string, unharmed func(*testing.T)) {
	d.Must(t, "run", "-d", "--name", "writer", "busybox", "sh", "-c",
		"[ -e /kept ] && exec sleep 100000; echo kept >/kept; sync; echo ready; while ! [ -e /go ]; do sleep 0.2; done; dd if=/dev/urandom of=/f bs=1M count=64; sync; sleep 100000")
	eventually(t, "the writer", func() string {
		if s := d.Must(t, "logs", "writer"); s != "ready" {
			return "it says " + s
		}
		return ""
	})
	d.Must(t, "exec", "witness", "sync") // it has nothing to write any more
	fill := filepath.Join(disk, "fill")
	if r := d.Sh(t, fmt.Sprintf("fallocate -l $(($(stat -f -c '%%a * %%S' %s) - (16 << 20))) %s && head -c 64M /dev/zero >>%[2]s", disk, fill)); r.Code == 0 || !strings.Contains(r.Err, "No space") {
		t.Fatalf("the disk is not full: %s", r.Err)
	}
	d.Docker(t, "exec", "writer", "touch", "/go") // it may die of that already
	d.diesOf(t, "writer", "the container's virtual machine ended: no space left on the host's disk for what the container writes")
	unharmed(t)
	if r := d.Docker(t, "run", "--name", "late", "busybox", "true"); r.Code == 0 || !strings.Contains(strings.ToLower(r.Err), "no space left") {
		t.Errorf("with a full disk: exit %d: %s", r.Code, r.Err)
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	d.Docker(t, "rm", "-f", "late") // it may be there
	d.Must(t, "start", "writer")
	if got := d.Must(t, "exec", "writer", "cat", "/kept"); got != "kept" {
		t.Errorf("its files: %q", got)
	}
	d.Must(t, "rm", "-f", "writer")
}

// diesAtMachineSteps kills the daemon where it has made a part of a machine.
func (d *Daemon) diesAtMachineSteps(t *testing.T, unharmed func(*testing.T)) {
	const flags = "--name cut -v data:/data busybox sleep 100000"
	d.diesAtSteps(t, []deadlyStep{
		{"create-record", "", "docker create " + flags, "none created"},
		{"start-intent", "docker rm -fv cut; docker create " + flags, "docker start cut", "created running"},
		{"start-network", "docker rm -fv cut; docker create " + flags, "docker start cut", "created running"},
		{"start-prepared", "docker rm -fv cut; docker create " + flags, "docker start cut", "created running"},
		{"start-created", "docker rm -fv cut; docker create " + flags, "docker start cut", "created running"},
		{"start-started", "docker rm -fv cut; docker create " + flags, "docker start cut", "running"},
		{"stop-marked", "", "docker stop -t 0 cut", "running exited"},
		{"rm-marked", "docker start cut", "docker rm -fv cut", "none"},
		{"start-created", "", "tenon run --rm " + flags, "none"},
		{"rm-network", "docker run -d " + flags, "docker rm -fv cut", "none"},
		{"rm-root", "docker create " + flags, "docker rm -fv cut", "none"},
		{"rm-freed", "docker create " + flags, "docker rm -fv cut", "none"},
	}, d.agrees)
	unharmed(t)
	d.Docker(t, "volume", "rm", "data")
	if s := d.Must(t, "volume", "ls", "-q"); s != "" {
		t.Errorf("volumes are left: %s", s)
	}
}

// agrees waits until what is on the machine is what the records say: a QEMU, a
// directory, a control group and an interface for each container that runs on a
// machine, and for one that waits; files for each container that is there.
func (d *Daemon) agrees(t *testing.T) {
	t.Helper()
	eventually(t, "what is there and what should be", func() string {
		running := d.running(t)
		qemus := d.qemus(t)
		for _, pid := range running {
			if !slices.Contains(qemus, pid) {
				return fmt.Sprintf("no QEMU %d, there are %v", pid, qemus)
			}
		}
		if len(qemus) != len(running)+1 {
			return fmt.Sprintf("QEMUs %v, of containers %v", qemus, running)
		}
		var dirs []string
		entries, err := os.ReadDir(filepath.Join(d.RunRoot, "vms"))
		if err != nil {
			return err.Error()
		}
		for _, e := range entries {
			if e.IsDir() {
				dirs = append(dirs, e.Name())
			}
		}
		if len(dirs) != len(running) {
			return fmt.Sprintf("directories of machines: %v, of containers %v", dirs, running)
		}
		taps, err := filepath.Glob("/sys/class/net/" + d.Name + "-v*")
		if err != nil || len(taps) != len(qemus) {
			return fmt.Sprintf("interfaces: %v, %d machines, %v", taps, len(qemus), err)
		}
		for _, parent := range []string{"/sys/fs/cgroup/memory/", "/sys/fs/cgroup/"} {
			groups, err := filepath.Glob(parent + d.Name + "-vm/vm-*")
			if err != nil || len(groups) != 0 && len(groups) != len(qemus) {
				return fmt.Sprintf("control groups: %v, %d machines, %v", groups, len(qemus), err)
			}
		}
		here := strings.Fields(d.Must(t, "ps", "-aq", "--no-trunc"))
		entries, err = os.ReadDir(filepath.Join(d.Root, "containers"))
		if err != nil {
			return err.Error()
		}
		for _, e := range entries {
			if !slices.Contains(here, e.Name()) {
				return "files of no container: " + e.Name()
			}
		}
		entries, err = os.ReadDir(filepath.Join(d.RunRoot, "networks", "containers"))
		if err != nil {
			return err.Error()
		}
		for _, e := range entries {
			if id := strings.TrimSuffix(e.Name(), ".json"); !slices.Contains(here, id) {
				return "endpoints of no container: " + e.Name()
			}
		}
		return ""
	})
}
