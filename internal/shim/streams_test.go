package shim_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tenon.dev/tenon/internal/task"
	taskv3 "tenon.dev/tenon/internal/task/api/v3"
)

// TestTwoClients attaches two, one of which goes midway.
func TestTwoClients(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Stdin: true, Spec: spec(rootfs(t), nil, "cat")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	both := task.AttachRequest{ID: "a", Stdin: true, Stdout: true}
	one, err := s.OpenAttach(ctx, both)
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.OpenAttach(ctx, both)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	const first = "\x01\x00\x00\x00\x00\x00\x00\x04one\n"
	if _, err := io.WriteString(one, "one\n"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []io.Reader{one, other} {
		b := make([]byte, len(first))
		if _, err := io.ReadFull(c, b); err != nil || string(b) != first {
			t.Fatalf("%q, %v", b, err)
		}
	}
	one.Close() // stdin stays: it is not StdinOnce
	if _, err := io.WriteString(other, "two\n"); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseIO(ctx, "a", ""); err == nil {
		var out bytes.Buffer
		if err := task.Demux(other, &out, nil); err != nil || !strings.HasPrefix("two\n", out.String()) {
			t.Errorf("%q, %v", out.String(), err)
		}
	}
	if e, err := s.Wait(ctx, "a", ""); err != nil || e.Status != 0 {
		t.Errorf("%+v, %v", e, err)
	}
}

// TestAttachStorm attaches and detaches many times, in every way, and wants
// nothing of it to stay.
func TestAttachStorm(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Stdin: true, Spec: spec(rootfs(t), nil, "sleep", "1000")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	fds := func() int {
		list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	before := fds() + 1 // the watch for OOM kills comes a moment later
	n := 2000
	if testing.Short() {
		n = 200
	}
	for i := range n {
		c, err := s.OpenAttach(ctx, task.AttachRequest{ID: "a", Stdin: i%3 == 0, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
		}
		c.Close()
	}
	for fds() > before {
		select {
		case <-ctx.Done():
			t.Fatalf("%d descriptors, %d before", fds(), before)
		default:
			syscall.Nanosleep(&syscall.Timespec{Nsec: 10e6}, nil)
		}
	}
	if err := s.Resize(ctx, "a", "", 1, 1); err != nil {
		t.Errorf("resize of no terminal: %v", err)
	}
}

// TestFIFOs is containerd's way of stdio.
func TestFIFOs(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	r := task.CreateRequest{ID: "a", Spec: spec(rootfs(t), nil, "sh", "-c", "cat; echo err >&2")}
	for _, f := range []struct {
		name string
		path *string
	}{{"in", &r.StdinPath}, {"out", &r.StdoutPath}, {"err", &r.StderrPath}} {
		*f.path = filepath.Join(s.dir, f.name)
		if err := syscall.Mkfifo(*f.path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Create(ctx, r); err != nil {
		t.Fatal(err)
	}
	open := func(p string, flag int) *os.File {
		f, err := os.OpenFile(p, flag, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		_ = f.SetDeadline(time.Now().Add(time.Minute)) // pipes have deadlines
		return f
	}
	in, out, errs := open(r.StdinPath, os.O_WRONLY), open(r.StdoutPath, os.O_RDONLY), open(r.StderrPath, os.O_RDONLY)
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "through\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Task.CloseIO(ctx, &taskv3.CloseIORequest{Id: "a", Stdin: true}); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(out); err != nil || string(b) != "through\n" {
		t.Errorf("%q, %v", b, err)
	}
	if b, err := io.ReadAll(errs); err != nil || string(b) != "err\n" {
		t.Errorf("%q, %v", b, err)
	}
	if w, err := s.Task.Wait(ctx, &taskv3.WaitRequest{Id: "a"}); err != nil || w.ExitStatus != 0 {
		t.Errorf("%v, %v", w, err)
	}
	bad := r
	bad.ID, bad.StdoutPath = "b", "binary:///bin/true"
	if _, err := s.Create(ctx, bad); err == nil {
		t.Error("took a log program")
	}
}
