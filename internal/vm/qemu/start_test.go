package qemu

import (
	"bufio"
	"context"
	"io"
	"os"
	"strings"
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
var hardware = Hardware{Type: "pc", Accel: "tcg", CPUs: 1, Memory: 128 << 20, MaxMemory: 1 << 30, Slots: 4, Disks: "rw"}

func config(t *testing.T, h Hardware, ram *os.File) Config {
	return Config{
		Hardware: h, Binary: shared.binary, RAM: ram, Share: true,
		Jail:   Jail{UID: 0x6e000000 + uint32(os.Getpid()), Dir: shared.dir},
		Kernel: file(t, shared.image), Initrd: file(t, shared.initrd), Append: h.Append(TSCkHz(), 250),
	}
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

func TestBootSaveRestore(t *testing.T) {
	setup(t)
	ctx := limited(t)
	ram, err := NewRAM(hardware.Memory)
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	begin := time.Now()
	var p *Process
	lap := func(what string) {
		t.Logf("%-16s %10v, CPU in all %v", what, time.Since(begin).Round(100*time.Microsecond), cpuTime(t, p.PID()))
		begin = time.Now()
	}
	c := config(t, hardware, ram)
	p = start(t, c)
	lap("start")
	expect(t, p, "!")
	lap("boot")
	say(t, p, "x")
	expect(t, p, "x")
	state, err := p.Save(ctx)
	if err != nil {
		t.Fatal(err)
	}
	lap("save")
	p.Close()
	if err := Seal(ram); err != nil {
		t.Fatal(err)
	}
	t.Logf("state: %d bytes", len(state))
	c.Share, c.Incoming = false, true
	for range 3 {
		begin = time.Now()
		q := start(t, c)
		p = q
		lap("start clone")
		if err := q.Restore(ctx, state); err != nil {
			t.Fatal(err)
		}
		lap("restore")
		if err := q.Cont(ctx); err != nil {
			t.Fatal(err)
		}
		say(t, q, "y")
		expect(t, q, "y")
		lap("first answer")
		say(t, q, "z")
		expect(t, q, "z")
		lap("second answer")
		t.Log(tell(t, q))
		say(t, q, "q")
		if e := ended(t, q); e.Code != 0 {
			t.Errorf("exit: %v", e)
		}
	}
}
