package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// stranger is a process of the host that has exactly this pid. It does nothing.
func stranger(t *testing.T, pid int) error {
	t.Helper()
	tids := [1]int32{int32(pid)}
	args := struct{ flags, pidfd, child, parent, exit, stack, size, tls, tids, n, cgroup uint64 }{
		exit: uint64(unix.SIGCHLD), tids: uint64(uintptr(unsafe.Pointer(&tids))), n: 1}
	got, _, errno := unix.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), 0)
	if errno == 0 && got == 0 {
		for { // a copy of this program with one thread: no Go runs here
			_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, 0, 0, 0, 0, 0, 0)
		}
	}
	if errno != 0 {
		return errno
	}
	t.Cleanup(func() {
		_ = unix.Kill(pid, unix.SIGKILL) // dead already if the attack succeeded
		_, _ = unix.Wait4(pid, nil, 0, nil)
	})
	return nil
}

// alive reports whether the stranger lives. A dead one is a zombie, since only
// this program reaps it.
func alive(t *testing.T, pid int) bool {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	return !strings.Contains(string(b), ") Z ")
}

// pidOf finds the host's number of a container's process by its command line.
func pidOf(t *testing.T, args ...string) int {
	t.Helper()
	found := 0
	eventually(t, strings.Join(args, " "), func() string {
		procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, p := range procs {
			if b, err := os.ReadFile(p); err == nil && string(b) == strings.Join(args, "\x00")+"\x00" {
				found, _ = strconv.Atoi(filepath.Base(filepath.Dir(p)))
				return ""
			}
		}
		return "no such process"
	})
	return found
}

func gone(t *testing.T, pid int) {
	t.Helper()
	eventually(t, fmt.Sprintf("end of %d", pid), func() string {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			return "still there"
		}
		return ""
	})
}

// TestA17PidReuse: the number of a process that has ended belongs to somebody
// else soon; what the engine kills then is not him.
func TestA17PidReuse(t *testing.T) {
	d := newTarget(t)
	var strangers []int
	invite := func(pid int) bool {
		err := stranger(t, pid)
		if errors.Is(err, unix.EEXIST) { // somebody else has it already
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
		strangers = append(strangers, pid)
		return true
	}
	// A process of exec ends while the engine runs.
	mark := strconv.Itoa(1_000_000 + os.Getpid())
	d.Must(t, "run", "-d", "--name", "one", "busybox", "sleep", "100000")
	d.Must(t, "exec", "-d", "one", "sleep", mark)
	pid := pidOf(t, "sleep", mark)
	_ = unix.Kill(pid, unix.SIGKILL)
	gone(t, pid)
	invite(pid)
	d.Must(t, "exec", "one", "true")
	d.Must(t, "stop", "-t", "0", "one")
	d.Must(t, "start", "one")
	d.Must(t, "restart", "-t", "0", "one")
	// The first process ends, with everybody who could have seen it.
	first, err := strconv.Atoi(d.Must(t, "inspect", "-f", "{{.State.Pid}}", "one"))
	if err != nil {
		t.Fatal(err)
	}
	shim := d.shimPid(t)
	d.Kill(t)
	d.Sh(t, "kill -9 "+shim)
	_ = unix.Kill(first, unix.SIGKILL)
	gone(t, first)
	invite(first)
	d.Start(t)
	d.Docker(t, "stop", "-t", "0", "one")
	d.Docker(t, "kill", "one")
	d.Must(t, "rm", "-f", "one")
	if len(strangers) == 0 {
		t.Error("both numbers were taken by others: this test has shown nothing")
	}
	for _, pid := range strangers {
		if !alive(t, pid) {
			t.Errorf("the stranger with pid %d was killed", pid)
		}
	}
}

// TestX2Exhaustion (FEATURES X2, G1 to G3): a fork bomb, and hogs of memory,
// shared memory and disk, in containers that were given no limits by hand.
func TestX2Exhaustion(t *testing.T) {
	d := newTarget(t, "--default-pids-limit", "150")
	d.Must(t, "run", "-d", "--name", "neighbour", "busybox", "sleep", "100000")
	neighbour := func(what string) {
		t.Helper()
		start := time.Now()
		if out := d.Must(t, "exec", "neighbour", "sh", "-c", "head -c 1000000 /dev/zero | wc -c"); out != "1000000" {
			t.Errorf("%s: the neighbour says %q", what, out)
		}
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("%s: the neighbour took %v", what, took)
		}
	}

	d.Must(t, "run", "-d", "--name", "bomb", "busybox", "sh", "-c", "f() { f | f & }; f; exec sleep 100000")
	eventually(t, "the bomb", func() string {
		var s struct {
			PIDs struct{ Current int } `json:"pids_stats"`
		}
		if _, b := d.api(t, "GET", "/containers/bomb/stats?stream=false&one-shot=true", nil); json.Unmarshal(b, &s) != nil || s.PIDs.Current > 150 {
			t.Fatalf("%s", b)
		}
		if s.PIDs.Current < 100 {
			return strconv.Itoa(s.PIDs.Current)
		}
		return ""
	})
	neighbour("fork bomb")
	if out := d.Must(t, "run", "--rm", "busybox", "echo", "alive"); out != "alive" {
		t.Errorf("a new container: %q", out)
	}
	d.Must(t, "rm", "-f", "bomb")

	// Memory: there is a limit without being asked for, below the machine's.
	limit := strings.Fields(d.Sh(t, "docker run --rm busybox cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null").Out)
	info := d.Must(t, "info", "-f", "{{.MemTotal}}")
	total, err := strconv.ParseInt(info, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if len(limit) != 1 {
		t.Errorf("limits %q", limit)
	} else if n, err := strconv.ParseInt(limit[0], 10, 64); err != nil || n >= total {
		t.Errorf("memory limit %s of %s", limit[0], info)
	}
	// One that is smaller, so that the test needs not fill the machine.
	hog := d.Docker(t, "run", "--name", "hog", "-m", "48m", "--memory-swap", "48m", "busybox", "sh", "-c", "tail /dev/zero")
	if hog.Code != 137 {
		t.Errorf("the hog ended with %d: %s", hog.Code, hog.Err)
	}
	if s := d.Must(t, "inspect", "-f", "{{.State.OOMKilled}} {{.State.ExitCode}}", "hog"); s != "true 137" {
		t.Errorf("the hog: %s", s)
	}
	neighbour("memory hog")
	if s := d.Must(t, "inspect", "-f", "{{.State.OOMKilled}} {{.State.Status}}", "neighbour"); s != "false running" {
		t.Errorf("the neighbour: %s", s)
	}
	// A process that is not the first one dies alone.
	if out := d.Must(t, "run", "--rm", "-m", "48m", "--memory-swap", "48m", "busybox", "sh", "-c", "tail /dev/zero 2>/dev/null; echo first lives"); !strings.Contains(out, "first lives") {
		t.Errorf("%q", out)
	}

	// Shared memory and tmpfs end by themselves.
	for _, flags := range [][]string{{"/dev/shm"}, {"/t", "--tmpfs", "/t:size=16m"}, {"/dev"}} {
		r := d.Docker(t, append(append([]string{"run", "--rm"}, flags[1:]...), "busybox", "sh", "-c", "dd if=/dev/zero of="+flags[0]+"/f bs=1M count=100 2>/dev/null || echo refused")...)
		if strings.TrimSpace(r.Out) != "refused" {
			t.Errorf("%s: %q %q (exit %d)", flags[0], r.Out, r.Err, r.Code)
		}
	}
	neighbour("all of it")
}
