package qemu

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func limited(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func file(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// hardware is small, so that tests are quick.
var hardware = Hardware{Type: "pc", Accel: "tcg", CPUs: 1, Memory: 128 << 20, MaxMemory: 1 << 30, Slots: 4, Disks: "rw", NICs: 1}

func config(t *testing.T, h Hardware, ram *os.File) Config {
	n := serial.Add(1)
	tap, err := NewTap(fmt.Sprintf("tq%d-%d", os.Getpid(), n))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tap.Close() })
	return Config{
		Hardware: h, Binary: shared.binary, RAM: ram, Share: true, Taps: []*os.File{tap},
		Jail:   Jail{UID: 0x6e000000 + uint32(os.Getpid())<<6 + uint32(n), Dir: shared.dir},
		Kernel: file(t, shared.image), Initrd: file(t, shared.initrd), Append: h.Append(TSCkHz(), 250),
	}
}

var serial atomic.Int32

// template is one saved machine for all tests.
type template struct {
	ram   *os.File
	state []byte
}

var saved struct {
	once sync.Once
	template
	boot, cpu time.Duration
}

func clone(t *testing.T) *Process {
	t.Helper()
	setup(t)
	saved.once.Do(func() {
		ram, err := NewRAM(hardware.Memory)
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		p := start(t, config(t, hardware, ram))
		expect(t, p, "!")
		say(t, p, "x")
		expect(t, p, "x")
		saved.boot, saved.cpu = time.Since(begin), cpuTime(t, p.PID())
		if saved.state, err = p.Save(limited(t)); err != nil {
			t.Fatal(err)
		}
		p.Close()
		if err := Seal(ram); err != nil {
			t.Fatal(err)
		}
		saved.ram = ram
	})
	if saved.ram == nil {
		t.Fatal("there is no template")
	}
	c := config(t, hardware, saved.ram)
	c.Share, c.Incoming = false, true
	p := start(t, c)
	if err := p.Restore(limited(t), saved.state); err != nil {
		t.Fatal(err)
	}
	return p
}

func cont(t *testing.T, p *Process) {
	t.Helper()
	if err := p.Cont(limited(t)); err != nil {
		t.Fatal(err)
	}
	say(t, p, "y")
	expect(t, p, "y")
}

// console collects what the guest's kernel says, and shows it if the test fails.
func console(t *testing.T, p *Process) {
	done := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(io.LimitReader(p.Console, 1<<20))
		done <- string(b)
	}()
	t.Cleanup(func() {
		p.Close()
		if text := <-done; t.Failed() {
			t.Logf("console: %s\nstderr: %s", text, p.errors)
		}
	})
}

func start(t *testing.T, c Config) *Process {
	t.Helper()
	p, err := shared.l.Start(limited(t), c)
	if err != nil {
		t.Fatal(err)
	}
	console(t, p)
	return p
}

// expect reads one byte from the port.
func expect(t *testing.T, p *Process, want string) {
	t.Helper()
	_ = p.Port.SetDeadline(time.Now().Add(time.Minute))
	b := make([]byte, len(want))
	if _, err := io.ReadFull(p.Port, b); err != nil || string(b) != want {
		t.Fatalf("from the guest: %q, %v; want %q", b, err, want)
	}
}

func say(t *testing.T, p *Process, text string) {
	t.Helper()
	if _, err := io.WriteString(p.Port, text); err != nil {
		t.Fatal(err)
	}
}

func tell(t *testing.T, p *Process) string {
	t.Helper()
	say(t, p, "d")
	_ = p.Port.SetDeadline(time.Now().Add(time.Minute))
	line, err := bufio.NewReader(p.Port).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

func ended(t *testing.T, p *Process) Exit {
	t.Helper()
	select {
	case <-p.Done():
		return p.Exit()
	case <-time.After(time.Minute):
		t.Fatal("QEMU does not end")
	}
	panic("unreachable")
}

func TestClones(t *testing.T) {
	for range 3 {
		begin := time.Now()
		p := clone(t)
		start, cpu := time.Since(begin), cpuTime(t, p.PID())
		cont(t, p)
		t.Logf("restored after %v (CPU %v), answers after %v (CPU %v)", start, cpu, time.Since(begin), cpuTime(t, p.PID()))
		say(t, p, "q")
		if e := ended(t, p); e.Code != 0 {
			t.Errorf("exit: %v", e)
		}
	}
	t.Logf("boot: %v (CPU %v); state %d bytes", saved.boot, saved.cpu, len(saved.state))
}

func diskFile(t *testing.T, content string, flags int) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// until asks the guest until its answer holds text.
func until(t *testing.T, p *Process, text string, there bool) {
	t.Helper()
	var got string
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if got = tell(t, p); strings.Contains(got, text) == there {
			return
		}
	}
	t.Fatalf("the guest tells %q; %q: want %v", got, text, there)
}

func TestDevices(t *testing.T) {
	ctx := limited(t)
	p := clone(t)
	if err := p.Fill(ctx, 0, Disk{File: diskFile(t, "layers", os.O_RDONLY), ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	if err := p.Fill(ctx, 1, Disk{File: diskFile(t, "upper", os.O_RDWR), Volatile: true}); err != nil {
		t.Fatal(err)
	}
	cont(t, p)
	until(t, p, `disk0="layers" disk1="upper"`, true)
	until(t, p, "eth0="+NICMAC(0), true)

	if err := p.Empty(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if err := p.Fill(ctx, 1, Disk{File: diskFile(t, "another", os.O_RDWR)}); err != nil {
		t.Error(err)
	}
	if err := p.PlugDisk(ctx, "more", Disk{File: diskFile(t, "plugged", os.O_RDWR)}); err != nil {
		t.Fatal(err)
	}
	until(t, p, `more="plugged"`, true)
	if err := p.UnplugDisk(ctx, "more"); err != nil {
		t.Error(err)
	}
	until(t, p, "more", false)

	tap, err := NewTap(fmt.Sprintf("tq%d-n", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	err = p.PlugNIC(ctx, "net-b", "52:54:00:01:02:03", tap)
	tap.Close()
	if err != nil {
		t.Fatal(err)
	}
	until(t, p, "52:54:00:01:02:03", true)
	// One who is gone does not hear that the guest has let it go; another takes it from there.
	short, gone := context.WithCancel(ctx)
	asked := make(chan error, 1)
	go func() { asked <- p.UnplugNIC(short, "net-b") }()
	time.Sleep(time.Millisecond) // any moment will do
	gone()
	if <-asked != nil {
		if err := p.UnplugNIC(ctx, "net-b"); err != nil {
			t.Error(err)
		}
	}
	until(t, p, "52:54:00:01:02:03", false)

	before := tell(t, p)
	if err := p.PlugMemory(ctx, "dimm0", MemoryUnit); err != nil {
		t.Fatal(err)
	}
	_, mem, _ := strings.Cut(before, "MemTotal:")
	until(t, p, mem, false)
	if err := p.PlugMemory(ctx, "dimm1", 1000); err == nil {
		t.Error("memory of 1000 bytes: no error")
	}
	if err := p.PlugDisk(ctx, "no such name", Disk{}); err == nil {
		t.Error("a disk with a bad name: no error")
	}
	if err := p.UnplugDisk(ctx, "none"); err == nil {
		t.Error("a disk that is not there: no error")
	}
}

func TestEnds(t *testing.T) {
	setup(t)
	t.Run("panic", func(t *testing.T) {
		p := clone(t)
		cont(t, p)
		say(t, p, "p")
		e := ended(t, p)
		t.Log(e)
	})
	t.Run("killed", func(t *testing.T) {
		p := clone(t)
		p.Kill()
		if e := ended(t, p); e.Code != -1 || e.Signal != syscall.SIGKILL {
			t.Errorf("exit: %v", e)
		}
	})
	t.Run("no such machine", func(t *testing.T) {
		ram, err := NewRAM(hardware.Memory)
		if err != nil {
			t.Fatal(err)
		}
		defer ram.Close()
		c := config(t, hardware, ram)
		c.Type = "toaster"
		if _, err := shared.l.Start(limited(t), c); err == nil || !strings.Contains(err.Error(), "unsupported machine type") {
			t.Errorf("start: %v", err)
		}
	})
	t.Run("the launcher is gone", func(t *testing.T) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		l := NewLauncher(self)
		ram, err := NewRAM(hardware.Memory)
		if err != nil {
			t.Fatal(err)
		}
		defer ram.Close()
		p, err := l.Start(limited(t), config(t, hardware, ram))
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		l.Close()
		if e := ended(t, p); e.Signal != syscall.SIGKILL {
			t.Errorf("exit: %v", e)
		}
	})
}

func TestJail(t *testing.T) {
	p := clone(t)
	cont(t, p)
	proc := fmt.Sprintf("/proc/%d/", p.PID())
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	field := func(name string) string {
		_, rest, _ := strings.Cut(string(status), "\n"+name+":")
		line, _, _ := strings.Cut(rest, "\n")
		return strings.Join(strings.Fields(line), " ")
	}
	uid := strings.Fields(field("Uid"))[0]
	if uid == "0" || field("Uid") != strings.TrimSpace(strings.Repeat(uid+" ", 4)) || field("Gid") != field("Uid") || field("Groups") != "" {
		t.Errorf("users %s, groups %s, %s", field("Uid"), field("Gid"), field("Groups"))
	}
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		if field(set) != "0000000000000000" {
			t.Errorf("%s: %s", set, field(set))
		}
	}
	if field("NoNewPrivs") != "1" || field("Seccomp") != "2" {
		t.Errorf("NoNewPrivs %s, Seccomp %s", field("NoNewPrivs"), field("Seccomp"))
	}
	if b, err := os.ReadFile(proc + "oom_score_adj"); err != nil || strings.HasPrefix(string(b), "-") {
		t.Errorf("oom_score_adj %s, %v", b, err)
	}
	for _, ns := range []string{"mnt", "net", "ipc", "uts", "pid"} {
		mine, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		if its, err := os.Readlink(proc + "ns/" + ns); err != nil || its == mine {
			t.Errorf("namespace %s: %s, %v", ns, its, err)
		}
	}
	mounts, err := os.ReadFile(proc + "mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if opts := "," + f[3] + ","; f[2] != "proc" && !strings.Contains(opts, ",ro,") {
			t.Errorf("can be written: %s", line)
		}
		if !slices.Contains(append(slices.Clone(shared.binary.Files), "/", "/proc"), f[1]) {
			t.Errorf("is none of QEMU's files: %s", line)
		}
	}
	entries, err := os.ReadDir(proc + "root")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains([]string{"bin", "dev", "etc", "lib", "lib64", "proc", "usr"}, e.Name()) {
			t.Errorf("in its root: %s", e.Name())
		}
	}
	if n, err := os.ReadFile(proc + "net/dev"); err != nil || strings.Count(string(n), "\n") != 3 {
		t.Errorf("its network: %s, %v", n, err)
	}
}
