package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What the deaths of machines have in common, whether they have one container
// (TestVMDeaths) or several (TestMachineDeaths).

// newDisk is a directory with a small file system of its own.
func newDisk(t *testing.T, size string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "disk")
	out, err := exec.Command("sh", "-ec", `truncate -s "$2" "$1.img"; mkfs.ext4 -q -m 0 "$1.img"; mkdir "$1"; mount -o loop "$1.img" "$1"`, "sh", dir, size).CombinedOutput()
	if err != nil {
		t.Fatalf("a disk of %s: %v: %s", size, err, out)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("umount %s: %v", dir, err)
		}
	})
	return dir
}

// diesOf waits for the end of a container whose machine has died, and compares
// what it says.
func (d *Daemon) diesOf(t *testing.T, name, why string) {
	t.Helper()
	want := "exited 137 " + why
	eventually(t, name, func() string {
		if got := d.Must(t, "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.State.Error}}", name); got != want {
			return fmt.Sprintf("it is %q, want %q", got, want)
		}
		return ""
	})
}

// countsInLog checks the logs of containers that count from 1: no line is lost.
func (d *Daemon) countsInLog(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		for i, line := range strings.Fields(d.Must(t, "logs", name)) {
			if line != strconv.Itoa(i+1) {
				t.Errorf("%s: line %d of its log is %q", name, i+1, line)
				break
			}
		}
	}
}

// deadlyStep is a point at which the daemon dies while it does what a script asks
// for, and the states that the container cut may have afterwards (none: it is not there).
type deadlyStep struct{ point, before, script, states string }

// diesAtSteps kills the daemon where it has made a part of a container on a machine.
func (d *Daemon) diesAtSteps(t *testing.T, steps []deadlyStep, agree func(*testing.T)) {
	for _, c := range steps {
		name := c.point + " in " + c.script
		if c.before != "" {
			if r := d.Sh(t, c.before); r.Code != 0 {
				t.Fatalf("%s: %s: %s", name, c.before, r.Err)
			}
		}
		d.dieAt(t, c.point, c.script)
		eventually(t, name, func() string { // what was begun may still end in the background
			state := "none"
			if r := d.Docker(t, "inspect", "-f", "{{.State.Status}}", "cut"); r.Code == 0 {
				state = strings.TrimSpace(r.Out)
			}
			if !slices.Contains(strings.Fields(c.states), state) {
				return "it is " + state + ", want one of " + c.states
			}
			return ""
		})
		agree(t)
	}
}

// diesBeside kills the daemon while containers of that isolation come and go.
func (d *Daemon) diesBeside(t *testing.T, isolation string) {
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for k := 0; !stop.Load(); k++ {
			name := fmt.Sprintf("w%d", k)
			d.Docker(t, "run", "--rm", "--name", name+"r", "--isolation", isolation, "busybox", "true")
			d.Docker(t, "run", "-d", "--name", name, "--isolation", isolation, "-p", "127.0.0.1::80", "busybox", "sh", "-c", "exit 3")
			d.Docker(t, "cp", name+":/etc/passwd", "-")
			d.Docker(t, "rm", "-fv", name)
		}
	})
	var err error
	for k := range kills(t, 6) {
		time.Sleep(time.Duration(k%4*800+100) * time.Millisecond) // any moment will do
		d.Kill(t)
		if err = d.start(); err != nil {
			break
		}
	}
	stop.Store(true)
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(d.Must(t, "ps", "-a", "--format", "{{.Names}}", "--filter", "name=^/?w[0-9]")) {
		if r := d.Docker(t, "rm", "-fv", name); r.Code != 0 && !strings.Contains(r.Err, "No such container") && !strings.Contains(r.Err, "already in progress") {
			t.Errorf("rm: %s", r.Err)
		}
	}
	eventually(t, "containers", func() string {
		return d.Must(t, "ps", "-a", "--format", "{{.Names}}", "--filter", "name=^/?w[0-9]")
	})
}

// qemu is the process of a container's machine.
func (d *Daemon) qemu(t *testing.T, name string) int {
	t.Helper()
	pid, err := strconv.Atoi(d.Must(t, "inspect", "-f", "{{.State.Pid}}", name))
	if err != nil || pid <= 0 {
		t.Fatalf("%s: process %d, %v", name, pid, err)
	}
	return pid
}

// running are the processes of the machines of all containers that run.
func (d *Daemon) running(t *testing.T) []int {
	t.Helper()
	var out []int
	for _, name := range strings.Fields(d.Must(t, "ps", "--format", "{{.Names}}")) {
		if r := d.Docker(t, "inspect", "-f", `{{index .HostConfig.Annotations "tenon.isolation"}} {{.State.Pid}}`, name); r.Code == 0 {
			if f := strings.Fields(r.Out); len(f) == 2 && f[0] == "vm" {
				pid, err := strconv.Atoi(f[1])
				if err != nil {
					t.Fatal(err)
				}
				out = append(out, pid)
			}
		}
	}
	slices.Sort(out)
	return out
}

// qemus are all of the daemon's, from the control groups of their machines.
func (d *Daemon) qemus(t *testing.T) []int {
	t.Helper()
	var out []int
	for _, pattern := range []string{"/sys/fs/cgroup/memory/", "/sys/fs/cgroup/"} {
		groups, err := filepath.Glob(pattern + d.Name + "-vm/vm-*/cgroup.procs")
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range groups {
			b, _ := os.ReadFile(g) // it may be gone
			for _, f := range strings.Fields(string(b)) {
				pid, err := strconv.Atoi(f)
				if err != nil {
					t.Fatal(err)
				}
				if exe, err := os.Readlink("/proc/" + f + "/exe"); err == nil && strings.HasPrefix(filepath.Base(exe), "qemu-system") {
					out = append(out, pid)
				}
			}
		}
	}
	slices.Sort(out)
	return out
}
