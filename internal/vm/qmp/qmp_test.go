package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}` + "\r\n"

func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "qmp")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.UnixConn)
	}
	return conn(fds[0]), conn(fds[1])
}

type command struct {
	Execute   string
	Arguments json.RawMessage
	ID        uint64
}

// serve greets and answers each command with what answer says.
func serve(t *testing.T, c *net.UnixConn, answer func(command) string) {
	t.Helper()
	go func() {
		_, _ = io.WriteString(c, greeting)
		r := bufio.NewScanner(c)
		for r.Scan() {
			var m command
			if err := json.Unmarshal(r.Bytes(), &m); err != nil {
				t.Errorf("command %q: %v", r.Text(), err)
				return
			}
			s := `{"return": {}, "id": ID}`
			if m.Execute != "qmp_capabilities" {
				s = answer(m)
			}
			if _, err := io.WriteString(c, strings.ReplaceAll(s, "ID", fmt.Sprint(m.ID))+"\r\n"); err != nil {
				return
			}
		}
	}()
}

func limited(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestCommands(t *testing.T) {
	ctx := limited(t)
	a, b := pair(t)
	serve(t, b, func(m command) string {
		switch m.Execute {
		case "query-status":
			return `{"timestamp": {"seconds": 5, "microseconds": 7}, "event": "STOP", "data": {"x": 1}}` + "\r\n" + `{"return": {"status": "running"}, "id": ID}`
		case "quit":
			return `{"id": ID, "error": {"class": "GenericError", "desc": "no"}}`
		}
		return `{"return": ` + string(m.Arguments) + `, "id": ID}`
	})
	events := make(chan Event, 4)
	c, err := New(ctx, a, func(e Event) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	if v := c.Version(); v.Major != 7 || v.Minor != 2 || v.Package != "Debian" {
		t.Errorf("version %+v", v)
	}
	var st struct{ Status string }
	if err := c.Run(ctx, "query-status", nil, &st); err != nil || st.Status != "running" {
		t.Errorf("query-status: %+v, %v", st, err)
	}
	if e := <-events; e.Name != "STOP" || e.Time.Unix() != 5 {
		t.Errorf("event %+v", e)
	}
	var qe *Error
	if err := c.Run(ctx, "quit", nil, nil); !errors.As(err, &qe) || qe.Desc != "no" || qe.Class != "GenericError" {
		t.Errorf("quit: %v", err)
	}
	type echo struct{ N int }
	done := make(chan error)
	for i := range 50 {
		go func() {
			var out echo
			err := c.Run(ctx, "echo", echo{i}, &out)
			if err == nil && out.N != i {
				err = fmt.Errorf("answer %d to %d", out.N, i)
			}
			done <- err
		}()
	}
	for range 50 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	c.Close()
	if err := c.Run(ctx, "echo", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestDescriptorsArePassed(t *testing.T) {
	ctx := limited(t)
	a, b := pair(t)
	got := make(chan string, 1)
	go func() {
		_, _ = io.WriteString(b, greeting)
		buf, oob := make([]byte, 4096), make([]byte, 256)
		for id := 0; ; id++ {
			n, on, _, _, err := b.ReadMsgUnix(buf, oob)
			if err != nil || n == 0 {
				return
			}
			if on > 0 {
				ms, _ := unix.ParseSocketControlMessage(oob[:on])
				fds, _ := unix.ParseUnixRights(&ms[0])
				f := os.NewFile(uintptr(fds[0]), "passed")
				text, _ := io.ReadAll(f)
				f.Close()
				got <- string(text)
			}
			_, _ = fmt.Fprintf(b, "{\"return\": {}, \"id\": %d}\r\n", id)
		}
	}()
	c, err := New(ctx, a, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.WriteString("through")
	w.Close()
	if err := c.Run(ctx, "getfd", map[string]string{"fdname": "x"}, nil, r); err != nil {
		t.Fatal(err)
	}
	r.Close()
	if s := <-got; s != "through" {
		t.Errorf("read %q through the passed descriptor", s)
	}
}

func TestEnds(t *testing.T) {
	ctx := limited(t)
	t.Run("silent", func(t *testing.T) {
		a, _ := pair(t)
		short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		defer cancel()
		if _, err := New(short, a, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("greeting: %v", err)
		}
	})
	t.Run("no answer", func(t *testing.T) {
		a, b := pair(t)
		serve(t, b, func(command) string { return "" })
		c, err := New(ctx, a, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		defer cancel()
		if err := c.Run(short, "stop", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("stop: %v", err)
		}
	})
	t.Run("gone", func(t *testing.T) {
		a, b := pair(t)
		serve(t, b, func(command) string { b.Close(); return "" })
		c, err := New(ctx, a, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Run(ctx, "stop", nil, nil); err == nil {
			t.Error("stop: no error")
		}
		select {
		case <-c.Done():
		case <-ctx.Done():
			t.Error("the client did not end")
		}
	})
	t.Run("endless line", func(t *testing.T) {
		a, b := pair(t)
		go func() {
			chunk := strings.Repeat("x", 64<<10)
			for range 2 * MaxMessage / len(chunk) {
				if _, err := io.WriteString(b, chunk); err != nil {
					return
				}
			}
		}()
		if _, err := New(ctx, a, nil); err == nil || !strings.Contains(err.Error(), "exceeds") {
			t.Errorf("greeting: %v", err)
		}
	})
}

func FuzzDecoder(f *testing.F) {
	f.Add(greeting)
	f.Add(`{"return": {}, "id": 1}` + "\n\n" + `{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}` + "\n")
	f.Add(`{"error": {"class": "A", "desc": "b"}, "id": 18446744073709551615}` + "\r\n")
	f.Add(`{"return": null}` + "\n")
	f.Fuzz(func(t *testing.T, s string) {
		d := NewDecoder(strings.NewReader(s))
		for {
			if _, err := d.next(); err != nil {
				return
			}
		}
	})
}
