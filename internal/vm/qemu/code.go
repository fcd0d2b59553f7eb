package qemu

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// An emulator keeps what it has translated: some 40 MiB after the start of a
// container, of which a program that then waits needs next to nothing. DropCode
// gives it back. It takes three steps:
//
//   - QEMU forgets its translations. There is no command for that alone, but it does
//     so whenever a debugger has had a processor make a single step. So a debugger is
//     connected, asks for one, and is disconnected.
//   - QEMU is asked how much translated code it has: next to nothing, or the memory
//     is left as it is. The machine stands still meanwhile, so that it stays so.
//   - The pages behind that are given up by madvise(2), which a process can do for
//     itself only: one of its threads is led to (giveUp).

// codeKept is how much of each part of the buffer stays, in bytes. The first begins
// with what enters and leaves translated code.
const codeKept = 128 << 10

// Code is the memory of an emulator's translated code.
type Code struct {
	areas []area
	all   int64 // bytes, with areas that take nothing
	parts int64
	// Resident is what it takes, in bytes.
	Resident int64
}

type area struct{ start, end uint64 }

// Code looks where QEMU keeps translated code: in private memory that can be written
// and executed.
func (p *Process) Code() (Code, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", p.PID()))
	if err != nil {
		return Code{}, err
	}
	defer f.Close()
	var c Code
	var at area
	for s := bufio.NewScanner(f); ; {
		if !s.Scan() {
			return c, s.Err()
		}
		w := strings.Fields(s.Text())
		if len(w) < 2 {
			continue
		}
		if from, to, ok := strings.Cut(w[0], "-"); ok {
			at = area{}
			if len(w) != 5 || w[1] != "rwxp" || w[4] != "0" { // a file's, or named
				continue
			}
			var e1, e2 error
			at.start, e1 = strconv.ParseUint(from, 16, 64)
			at.end, e2 = strconv.ParseUint(to, 16, 64)
			if err := errors.Join(e1, e2); err != nil {
				return Code{}, err
			}
			c.all += int64(at.end - at.start)
			c.parts++
		} else if w[0] == "Rss:" && at.end != 0 {
			n, err := strconv.ParseInt(w[1], 10, 64)
			if err != nil {
				return Code{}, err
			}
			if n > 0 {
				c.areas = append(c.areas, at)
				c.Resident += n << 10
			}
		}
	}
}

// settleTime bounds the wait for QEMU to forget, once it was told to.
const settleTime = 2 * time.Second

// contTime bounds the command that lets the guest go on: a QEMU that does not answer
// is ended by who watches it.
const contTime = 30 * time.Second

// DropCode gives up all translated code of an emulated machine that runs. The guest
// stands still for some milliseconds, by which its clocks are then behind, and
// what it runs next is translated again. wake is called if the guest does nothing at
// all: it gives it something to do, and returns. Nobody else may change the machine
// meanwhile. After an error the guest runs as before, if it can.
func (p *Process) DropCode(ctx context.Context, wake func()) (err error) {
	c, err := p.Code()
	if err != nil {
		return err
	}
	_, capacity, err := p.translated(ctx)
	if err != nil {
		return err
	}
	if err := c.check(capacity); err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), contTime)
		defer cancel()
		if e := p.Cont(ctx); e != nil {
			err = errors.Join(err, e)
		}
	}()
	if err := p.forget(ctx, wake); err != nil {
		return fmt.Errorf("qemu: a single step: %w", err)
	}
	for end := time.Now().Add(settleTime); ; time.Sleep(time.Millisecond) {
		n, _, err := p.translated(ctx)
		if err != nil {
			return err
		}
		if n < codeKept/2 {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("qemu: it still has %d bytes of translated code", n)
		}
	}
	var list []area
	for _, a := range c.areas {
		if a.start += codeKept; a.start < a.end {
			list = append(list, a)
		}
	}
	if err := giveUp(p.PID(), list); err != nil {
		return fmt.Errorf("qemu: memory of translated code: %w", err)
	}
	return nil
}

// highWater is what QEMU leaves free at the end of each part of its buffer, and does not
// count as room for code.
const highWater = 1024

// check tells whether the areas are QEMU's buffer, of which it says how much code it can
// hold. What is not of it is then smaller than codeKept, and stays.
func (c Code) check(capacity int64) error {
	if more := c.all - capacity; more < 0 || more > codeKept/2+c.parts*highWater {
		return fmt.Errorf("qemu: %d bytes can be executed, not the %d for translated code", c.all, capacity)
	}
	return nil
}

var codeSize = regexp.MustCompile(`(?m)^gen code size +(\d+)/(\d+)`)

// translated is how much code QEMU has, and how much it can have, in bytes.
func (p *Process) translated(ctx context.Context) (size, capacity int64, err error) {
	text, err := p.monitor(ctx, "info jit")
	if err != nil {
		return 0, 0, err
	}
	m := codeSize.FindStringSubmatch(text)
	if m == nil {
		return 0, 0, errors.New("qemu: it does not say how much code it has translated")
	}
	size, e1 := strconv.ParseInt(m[1], 10, 64)
	capacity, e2 := strconv.ParseInt(m[2], 10, 64)
	return size, capacity, errors.Join(e1, e2)
}

// monitor runs a command of the monitor for people.
func (p *Process) monitor(ctx context.Context, line string) (text string, err error) {
	err = p.QMP.Run(ctx, "human-monitor-command", map[string]string{"command-line": line}, &text)
	return text, err
}

// Names and times of the single step.
const (
	debugger = "debugger"
	wakeTime = 300 * time.Millisecond // until a guest that does nothing is woken
	stepTime = 5 * time.Second
)

// forget makes QEMU forget what it has translated. The guest stands still afterwards.
func (p *Process) forget(ctx context.Context, wake func()) (err error) {
	conn, f, err := Socketpair()
	if err != nil {
		return err
	}
	defer conn.Close()
	err = p.passFD(ctx, debugger, f)
	f.Close()
	if err != nil {
		return err
	}
	if _, err := p.run(ctx, "chardev-add", map[string]any{"id": debugger, "backend": map[string]any{"type": "socket", "data": map[string]any{
		"server": false, "addr": map[string]any{"type": "fd", "data": map[string]any{"str": debugger}}}}}); err != nil {
		return err
	}
	defer func() { // the connection goes with it
		_, e := p.monitor(context.WithoutCancel(ctx), "gdbserver none")
		err = errors.Join(err, e)
	}()
	// A step in which interrupts come as ever. Nothing is acknowledged: whatever
	// comes while the guest runs would stop it.
	if _, err := fmt.Fprint(conn, packet("Qqemu.sstep=1"), packet("s")); err != nil {
		return err
	}
	if _, err := p.monitor(ctx, "gdbserver chardev:"+debugger); err != nil {
		return err
	}
	return awaitStep(conn, wake, stepTime)
}

// awaitStep waits for the end of a single step, for a time and after wake.
func awaitStep(conn *net.UnixConn, wake func(), limit time.Duration) error {
	const stepped, halted = "$T05", "$T0" // by SIGTRAP; by any signal
	err := answer(conn, min(wakeTime, limit), stepped)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		go wake()
		err = answer(conn, limit, stepped)
	}
	if err != nil { // it must not be left to a step that nobody waits for
		_, _ = conn.Write([]byte{3}) // then neither is there an answer
		// The step may have come to its end just now.
		if answer(conn, limit, halted) == nil {
			err = fmt.Errorf("the guest does not run: %w", err)
		}
	}
	return err
}

// packet is a command to QEMU's side of a debugger.
func packet(command string) string {
	sum := byte(0)
	for _, c := range []byte(command) {
		sum += c
	}
	return fmt.Sprintf("$%s#%02x", command, sum)
}

// answer reads what QEMU says to a debugger until there is text in it.
func answer(conn *net.UnixConn, limit time.Duration, text string) error {
	if err := conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	var got []byte
	for b := make([]byte, 512); len(got) < 8*len(b); {
		n, err := conn.Read(b)
		if err != nil {
			return err
		}
		if got = append(got, b[:n]...); bytes.Contains(got, []byte(text)) {
			return nil
		}
	}
	return errors.New("the answer does not end")
}
