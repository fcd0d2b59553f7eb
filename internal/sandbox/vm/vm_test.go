package vm

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/version"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

// What needs tenon-vmm is tried end to end (test/e2e, TestVM); here is what
// happens without it.
func TestWithoutAProgram(t *testing.T) {
	dir := t.TempDir()
	v := New(Config{Program: filepath.Join(dir, "tenon-vmm"), Shim: "/none", RunRoot: dir, Root: dir, Name: "none"})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if list, err := v.List(ctx); err != nil || len(list) != 0 {
		t.Errorf("list: %v, %v", list, err)
	}
	if a, err := v.About(ctx); err != nil || a != (sandbox.About{}) {
		t.Errorf("about: %+v, %v", a, err)
	}
	if _, err := v.Check(ctx); err == nil || !strings.Contains(err.Error(), "must lie beside tenond") {
		t.Errorf("check: %v", err)
	}
	if _, err := v.Create(ctx, sandbox.MachineRequest{ID: "a"}); err == nil {
		t.Error("made without a program")
	}
	if f := v.Facts(); !f.CgroupV2 || f.CPUs != 1 || len(f.Capabilities) != 41 {
		t.Errorf("facts %+v", f)
	}
	if err := v.Teardown(ctx); err != nil {
		t.Errorf("teardown of nothing: %v", err)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
}

func TestMachineMemory(t *testing.T) {
	for containers, want := range map[int64]int64{1: 128 << 20, 32 << 20: 128 << 20, 33 << 20: 256 << 20, 1 << 30: 1152 << 20} {
		if got := machineMemory(containers); got != want {
			t.Errorf("for %d bytes a machine has %d, want %d", containers, got, want)
		}
	}
}

// TestClean: an interface goes to the next container only if nobody can have changed it.
func TestClean(t *testing.T) {
	m := New(Config{}).newMachine(&vmv1.Machine{Id: "m", Lasting: true})
	l := m.lasting
	for id, clean := range map[string]bool{"a": true, "b": true, "admin": false} {
		l.enter(id, clean)
	}
	is := func(want string) {
		t.Helper()
		got := ""
		for _, id := range []string{"a", "admin", "b", "c"} {
			if l.clean(id) {
				got += id
			}
		}
		if got != want {
			t.Errorf("clean are %q, want %q", got, want)
		}
	}
	is("ab")
	m.Taint([]string{"admin", "b"}, false) // admin is in the network of b
	is("a")
	m.Taint([]string{"admin"}, true) // admin sees all processes
	l.enter("c", true)
	is("")
	l.mu.Lock()
	delete(l.holds, "admin") // it was released
	l.mu.Unlock()
	l.enter("c", true)
	is("c")
}

// TestService: many ask the guest over one connection, and none after its end.
func TestService(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	m := New(Config{}).newMachine(&vmv1.Machine{Id: "m", Socket: l.Addr().String()})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := m.service(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	accept := func(d time.Duration) (net.Conn, error) {
		if err := l.(*net.UnixListener).SetDeadline(time.Now().Add(d)); err != nil {
			t.Fatal(err)
		}
		return l.Accept()
	}
	c, err := accept(time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c, err := accept(10 * time.Millisecond); err == nil { // all have been made
		c.Close()
		t.Error("there is more than one connection")
	}
	m.end("it was removed")
	if _, err := m.service(t.Context()); err == nil || !strings.Contains(err.Error(), "it was removed") {
		t.Errorf("of a machine that is gone: %v", err)
	}
}

func TestAMachinesEnd(t *testing.T) {
	v := New(Config{})
	m := v.newMachine(&vmv1.Machine{Id: "m", Created: 100, Nics: []*vmv1.NIC{{Id: "nic0", Tap: "tap0", Mac: "52:54:00:00:00:01"}}})
	if m.created(99) || !m.created(100) {
		t.Error("an event of an earlier machine is taken for its own")
	}
	s, err := m.nicStep("/ns", sandbox.NIC{Tap: "tap0", Plug: network.Plug{
		Interface: "eth0", MTU: 1400, IPv4: netip.MustParsePrefix("10.0.0.5/24"), Default4: netip.MustParseAddr("10.0.0.1"),
	}})
	if i := s.GetInterface(); err != nil || i.Mac != "52:54:00:00:00:01" || i.Name != "eth0" || i.Mtu != 1400 || len(i.Addresses) != 1 || len(i.Routes) != 1 {
		t.Errorf("%v, %v", s, err)
	}
	if _, err := m.nicStep("/ns", sandbox.NIC{Tap: "other"}); err == nil {
		t.Error("an interface that it does not have")
	}
	m.end("first")
	m.end("second")
	select {
	case <-m.Ended():
	default:
		t.Error("it has not ended")
	}
	if m.End() != "first" {
		t.Errorf("reason %q", m.End())
	}
}

// TestUpgrade: a tenon-vmm of another build is replaced when it holds no machine.
func TestUpgrade(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "tsv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	endWithUs(t, dir)
	var pids []int
	for _, of := range []string{"old", version.Version} {
		bin := filepath.Join(dir, "vmm-"+of)
		build := exec.CommandContext(ctx, "go", "build", "-ldflags", "-s -w -X tenon.dev/tenon/internal/version.Version="+of, "-o", bin, "tenon.dev/tenon/cmd/tenon-vmm")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
		v := New(Config{Program: bin, Shim: "/none", RunRoot: dir, Root: dir, Name: fmt.Sprintf("tsu%x", os.Getpid())})
		defer v.Close()
		c, err := v.connect(ctx, true)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, c.pid)
		if of == "old" {
			if again, err := v.connect(ctx, true); err != nil || again != c || c.version != of {
				t.Errorf("one that was just started is replaced: %v", err)
			}
			continue
		}
		if again, err := v.connect(ctx, true); err != nil || again.pid != c.pid {
			t.Errorf("one of this build is replaced: %v", err)
		}
		if err := v.Teardown(ctx); err != nil {
			t.Error(err)
		}
	}
	if pids[0] == pids[1] {
		t.Error("the old one is still there")
	}
}
