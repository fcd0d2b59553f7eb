package cgroup

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// group makes a group of the test's own and removes it.
func group(t *testing.T, res *specs.LinuxResources) *Group {
	t.Helper()
	g, err := Create(fmt.Sprintf("/tenontest-%d/%s", os.Getpid(), t.Name()), res)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Kill(syscall.SIGKILL); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := g.Delete(ctx); err != nil {
			t.Error(err)
		}
		for _, p := range g.Paths() {
			if _, err := os.Stat(p); err == nil {
				t.Errorf("%s is left", p)
			}
			_ = os.Remove(filepath.Dir(p)) // the last test's removes it
		}
	})
	return g
}

// in starts a process in the group.
func in(t *testing.T, g *Group, args ...string) *exec.Cmd {
	t.Helper()
	// The shell waits until it is in the group.
	cmd := exec.Command("/bin/sh", append([]string{"-c", `read x; exec "$@"`, "sh"}, args...)...)
	w, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if err := g.Add(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func ptr[T any](v T) *T { return &v }

func TestLife(t *testing.T) {
	g := group(t, &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Swap: ptr(int64(128 << 20))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(17))},
	})
	if g.v1("cpu") != "" {
		t.Error("the group is in a hierarchy that it does not need")
	}
	cmd := in(t, g, "sleep", "1000")
	pids, err := g.Pids()
	if err != nil || len(pids) != 1 || pids[0] != cmd.Process.Pid {
		t.Errorf("pids %v %v, want %d", pids, err, cmd.Process.Pid)
	}
	st, err := g.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if st.Memory.Limit != 64<<20 || st.Pids.Current != 1 || st.Pids.Limit != 17 {
		t.Errorf("stats %+v", st)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := g.Freeze(ctx); err != nil {
		t.Fatal(err)
	}
	if on, err := g.Frozen(); !on || err != nil {
		t.Errorf("frozen %v %v", on, err)
	}
	if err := g.Thaw(ctx); err != nil {
		t.Fatal(err)
	}
	if on, err := g.Frozen(); on || err != nil {
		t.Errorf("thawed: frozen %v %v", on, err)
	}
	// A limit of a hierarchy that the group was not in so far.
	if err := g.Update(&specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000)), Cpus: "0"},
		Memory: &specs.LinuxMemory{Limit: ptr(int64(256 << 20)), Swap: ptr(int64(512 << 20))},
	}); err != nil {
		t.Fatal(err)
	}
	if d := g.v1("cpu"); d != "" {
		b, err := os.ReadFile(filepath.Join(d, "cgroup.procs"))
		if err != nil || strings.TrimSpace(string(b)) != fmt.Sprint(cmd.Process.Pid) {
			t.Errorf("cpu group has %q, %v", b, err)
		}
		if n, err := readUint(filepath.Join(d, "cpu.cfs_quota_us")); n != 50000 || err != nil {
			t.Errorf("quota %d %v", n, err)
		}
	}
	again, err := Load(g.Path())
	if err != nil {
		t.Fatal(err)
	}
	if len(again.Paths()) != len(g.Paths()) {
		t.Errorf("loaded %v, want %v", again.Paths(), g.Paths())
	}
	if st, err := again.Stats(); err != nil || st.Memory.Limit != 256<<20 {
		t.Errorf("%v %v", st, err)
	}
	if _, err := Create(g.Path(), nil); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("a second one with processes: %v", err)
	}
	if err := g.Freeze(ctx); err != nil { // killed while frozen
		t.Fatal(err)
	}
	if err := again.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if s := cmd.ProcessState.Sys().(syscall.WaitStatus); s.Signal() != syscall.SIGKILL {
		t.Errorf("ended with %v", cmd.ProcessState)
	}
}

// TestFirstAtOnce: several groups made at the same time below a parent that is
// new get their limits, whoever of them makes the parent.
// TestDelegate: the directory and what the kernel lists, on v2 alone.
func TestDelegate(t *testing.T) {
	limit := int64(16)
	g := group(t, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &limit}})
	if err := g.Delegate(12345); err != nil {
		t.Fatal(err)
	}
	for _, d := range g.dirs {
		for name, want := range map[string]bool{"": d.v2, "cgroup.procs": d.v2, "pids.max": false, "hugetlb.2MB.max": false} {
			var st syscall.Stat_t
			if err := syscall.Stat(filepath.Join(d.path, name), &st); err != nil {
				continue // a controller that this hierarchy doesn't have
			}
			if (st.Uid == 12345) != want {
				t.Errorf("%s/%s belongs to %d", d.path, name, st.Uid)
			}
		}
	}
}

func TestFirstAtOnce(t *testing.T) {
	res := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(17))},
	}
	for round := range 30 {
		parent := fmt.Sprintf("/tenontest-first-%d-%d", os.Getpid(), round)
		errs, groups := make(chan error), make([]*Group, 8)
		for i := range groups {
			go func() {
				var err error
				groups[i], err = Create(fmt.Sprintf("%s/%d", parent, i), res)
				errs <- err
			}()
		}
		for range groups {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		for _, g := range groups {
			if g == nil {
				continue
			}
			if err := g.Delete(ctx); err != nil {
				t.Error(err)
			}
		}
		for _, h := range Hierarchies() {
			_ = os.Remove(filepath.Join(h.Path, parent))
		}
		cancel()
	}
}

func TestKillTree(t *testing.T) {
	g := group(t, nil)
	// Forks as fast as it can.
	cmd := in(t, g, "sh", "-c", "while :; do (sleep 1000 & sleep 1000 &) ; sleep 0.001; done")
	deadline := time.Now().Add(time.Minute)
	for {
		pids, err := g.Pids()
		if err != nil {
			t.Fatal(err)
		}
		if len(pids) > 20 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no processes")
		}
	}
	if err := g.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for {
		pids, err := g.Pids()
		if err != nil {
			t.Fatal(err)
		}
		if len(pids) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v live", pids)
		}
	}
}

// TestV1 leaves v2 aside, as on a machine that has none.
func TestV1(t *testing.T) {
	g := group(t, nil)
	var hs []Hierarchy
	for _, h := range Hierarchies() {
		if !h.V2 && (h.Has("freezer") || h.Has("pids") || h.Has("memory") || h.Has("cpuacct")) {
			hs = append(hs, h)
		}
	}
	if len(hs) == 0 {
		return // pure v2: the other tests say it all
	}
	dirs, err := resolve(g.path, hs)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		if _, err := d.make(); err != nil {
			t.Fatal(err)
		}
	}
	g.dirs = append(dirs, g.dirs...) // all are removed in the end
	v1 := &Group{path: g.path, dirs: dirs}
	cmd := in(t, v1, "sh", "-c", "while :; do (sleep 1000 & sleep 1000 &) ; sleep 0.001; done")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		pids, err := v1.Pids()
		if err != nil {
			t.Fatal(err)
		}
		if len(pids) > 20 {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("no processes")
		}
	}
	if err := v1.Freeze(ctx); err != nil {
		t.Fatal(err)
	}
	if on, err := v1.Frozen(); !on || err != nil {
		t.Errorf("frozen %v %v", on, err)
	}
	st, err := v1.Stats()
	if err != nil || st.Pids.Current < 20 || st.CPU.Usage == 0 || st.Memory.Usage == 0 {
		t.Errorf("%+v %v", st, err)
	}
	if err := v1.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for {
		pids, err := v1.Pids()
		if err != nil {
			t.Fatal(err)
		}
		if len(pids) == 0 {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%v live", pids)
		}
	}
}

func TestOOM(t *testing.T) {
	g := group(t, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(16 << 20)), Swap: ptr(int64(16 << 20))}})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := g.OOM(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cmd := in(t, g, "sh", "-c", "x=xxxxxxxxxxxxxxxx; while :; do x=$x$x; done")
	select {
	case n := <-c:
		if n != 1 {
			t.Errorf("%d kills", n)
		}
	case <-ctx.Done():
		t.Fatal("no report of the kill")
	}
	_ = cmd.Wait()
	if n, err := g.OOMKills(); n != 1 || err != nil {
		t.Errorf("%d kills, %v", n, err)
	}
	cancel()
	for range c {
	}
}

var defaultDevices = []specs.LinuxDeviceCgroup{
	{Allow: false, Access: "rwm"},
	{Allow: true, Type: "c", Access: "m"},
	{Allow: true, Type: "b", Access: "m"},
	{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rwm"},
	{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(5)), Access: "r"},
}

// devicesSeen says what a process of the group may do.
func devicesSeen(t *testing.T, g *Group) string {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", `read x
		t() { if sh -c "$2" 2>/dev/null; then echo "$1"; fi; }
		t null-rw 'exec 3<>/dev/null'
		t zero-r 'exec 3</dev/zero'
		t zero-w 'exec 3>/dev/zero'
		t urandom-r 'exec 3</dev/urandom'
		t mknod 'mknod "$D/n" c 1 9'`)
	cmd.Env = append(os.Environ(), "D="+t.TempDir())
	w, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := g.Add(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := cmd.Wait(); err != nil && out.Len() == 0 {
		t.Fatal(err)
	}
	return strings.Join(strings.Fields(out.String()), " ")
}

func TestDevices(t *testing.T) {
	const want = "null-rw zero-r mknod"
	g := group(t, &specs.LinuxResources{Devices: defaultDevices})
	if got := devicesSeen(t, g); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// The BPF program works on any v2 hierarchy, whatever its controllers.
func TestDevicesV2(t *testing.T) {
	g := group(t, nil)
	if g.V2() == "" {
		return // a machine without v2 has no such program
	}
	for i, c := range []struct {
		rules []specs.LinuxDeviceCgroup
		want  string
	}{
		{defaultDevices, "null-rw zero-r mknod"},
		{[]specs.LinuxDeviceCgroup{{Allow: false, Type: "a", Access: "rwm"}}, ""},
		{[]specs.LinuxDeviceCgroup{
			{Allow: false},
			{Allow: true, Type: "c", Major: ptr(int64(1)), Access: "r"},
			{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "w"},
			{Allow: false, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(9)), Access: "r"},
		}, "null-rw zero-r"},
		{[]specs.LinuxDeviceCgroup{{Allow: false, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(9)), Access: "m"}}, "null-rw zero-r zero-w urandom-r"},
	} {
		if err := g.devicesV2(c.rules); err != nil {
			t.Fatal(err)
		}
		// A process is judged by the v2 group only: it joins just that.
		only := &Group{path: g.path, dirs: []dir{{path: g.V2(), v2: true}}}
		if got := devicesSeen(t, only); got != c.want {
			t.Errorf("%d: got %q, want %q", i, got, c.want)
		}
	}
}

func TestRefused(t *testing.T) {
	for name, res := range map[string]*specs.LinuxResources{
		"device type":  {Devices: []specs.LinuxDeviceCgroup{{Type: "x"}}},
		"unified path": {Unified: map[string]string{"../x.y": "1"}},
	} {
		if _, err := Create("/tenontest-refused", res); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Create("/", nil); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if _, err := Load("/tenontest-none"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	for _, h := range Hierarchies() {
		if _, err := os.Stat(filepath.Join(h.Path, "tenontest-refused")); err == nil {
			t.Errorf("%s is left", h.Path)
		}
	}
}

func TestWeightV2(t *testing.T) {
	for shares, want := range map[uint64]uint64{0: 1, 2: 1, 1024: 100, 262144: 10000, math.MaxUint64: 10000} {
		if got := weightV2(shares); got != want {
			t.Errorf("%d: %d, want %d", shares, got, want)
		}
	}
}

func TestParse(t *testing.T) {
	p := parsePressure("some avg10=1.50 avg60=0.00 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.25 avg300=0.00 total=7\n")
	if p.Some.Avg10 != 1.5 || p.Some.Total != 12 || p.Full.Avg60 != .25 || p.Full.Total != 7 {
		t.Errorf("%+v", p)
	}
	io := parseIOStat("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n")
	if len(io) != 1 || io[0] != (IOStats{8, 0, 1, 2, 3, 4, 5, 6}) {
		t.Errorf("%+v", io)
	}
	hs := parseMountinfo(strings.NewReader(`25 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw
26 25 0:23 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
27 25 0:24 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
28 25 0:25 / /sys/fs/cgroup/uni\040fied rw shared:1 - cgroup2 cgroup2 rw
29 25 0:25 / /mnt rw shared:1 - cgroup2 cgroup2 rw
`))
	if got := fmt.Sprint(hs); got != "[{cpu,cpuacct /sys/fs/cgroup/cpu,cpuacct false} {name=systemd /sys/fs/cgroup/systemd false} { /sys/fs/cgroup/uni fied true}]" {
		t.Error(got)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("25 1 0:22 / /sys/fs/cgroup rw - cgroup tmpfs rw,cpu")
	f.Add("8:0 rbytes=1 wbytes=2")
	f.Add("some avg10=1.50 total=12")
	f.Add(`a b\`)
	f.Fuzz(func(t *testing.T, s string) {
		parseMountinfo(strings.NewReader(s))
		parseIOStat(s)
		parseBlkio(s, s)
		parsePressure(s)
		parseKeyed(s)
		unescape(s)
	})
}
