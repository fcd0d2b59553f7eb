package qemu

import (
	"context"
	"strings"
	"testing"
	"time"
)

// TestDropCode: an emulator forgets what it has translated, gives the memory back, and
// the guest goes on, whatever it was about; also one that nothing wakes.
func TestDropCode(t *testing.T) {
	p := clone(t)
	cont(t, p)
	for turn := range 4 {
		before, err := p.Code()
		if err != nil || before.Resident == 0 {
			t.Fatal(before, err)
		}
		begin := time.Now()
		// A guest that nobody talks to may have nothing to do for long.
		if err := p.DropCode(limited(t), func() { say(t, p, "y"); expect(t, p, "y") }); err != nil {
			t.Fatal(err)
		}
		took := time.Since(begin)
		after, err := p.Code()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("turn %d: %d KiB, then %d KiB; %v", turn, before.Resident>>10, after.Resident>>10, took)
		if turn == 0 && after.Resident > before.Resident/2 {
			t.Errorf("%d bytes of translated code are still %d", before.Resident, after.Resident)
		}
		if st, err := p.Status(limited(t)); err != nil || st != "running" {
			t.Errorf("status: %q, %v", st, err)
		}
		say(t, p, "z")
		expect(t, p, "z")
	}
	// Nothing of it is left with QEMU.
	if err := p.QMP.Run(limited(t), "chardev-remove", map[string]string{"id": debugger}, nil); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("the debugger's connection: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.DropCode(ctx, func() {}); err == nil {
		t.Error("it went well without time")
	}
	say(t, p, "q")
	if e := ended(t, p); e.Code != 0 {
		t.Errorf("exit: %v", e)
	}
	if err := p.DropCode(limited(t), func() {}); err == nil {
		t.Error("a machine that has ended gave something up")
	}
}

// A step that ends only when it is interrupted is known to have ended.
func TestInterruptedStep(t *testing.T) {
	for _, how := range []string{"$T02thread:01;#00", "$T05thread:01;#00"} {
		conn, f, err := Socketpair()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		defer f.Close()
		go func() { // as QEMU does; it ends with the connection
			b := make([]byte, 1)
			for b[0] != 3 {
				if n, err := f.Read(b); err != nil || n == 0 {
					return
				}
			}
			_, _ = f.WriteString("+" + how) // or nobody waits any more
		}()
		woken := make(chan bool, 1)
		err = awaitStep(conn, func() { woken <- true }, 20*time.Millisecond)
		if err == nil || !strings.Contains(err.Error(), "the guest does not run") {
			t.Errorf("%s: %v", how, err)
		}
		select {
		case <-woken:
		case <-limited(t).Done():
			t.Error("it was not woken")
		}
	}
}

// Only QEMU's buffer is given up.
func TestCodeCheck(t *testing.T) {
	const capacity = 1<<26 - 4096 - highWater // as of 64 MiB
	for _, c := range []struct {
		code Code
		good bool
	}{
		{Code{all: 1<<26 - 4096, parts: 1}, true},
		{Code{all: 1<<26 - 4096 + 8192, parts: 2}, true}, // a little more, which stays
		{Code{all: 1<<26 - 4096 + codeKept + 4096, parts: 2}, false},
		{Code{all: 1 << 25, parts: 1}, false},
		{Code{}, false},
	} {
		if err := c.code.check(capacity); (err == nil) != c.good {
			t.Errorf("%+v: %v", c.code, err)
		}
	}
}
