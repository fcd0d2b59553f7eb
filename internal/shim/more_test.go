package shim_test

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// TestOOMEvent has the kernel kill a child of a container that goes on.
func TestOOMEvent(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Stdin: true, Spec: spec(rootfs(t), func(s *specs.Spec) {
		limit := int64(16 << 20)
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit}
	}, "sh", "-c", "sleep 1; tail /dev/zero; cat")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	if err := s.Events(ctx, 0, func(e *taskv1.Event) error {
		if e.Type == taskv1.Event_EXIT {
			return errors.New("exited first")
		}
		if e.Type == taskv1.Event_OOM && e.Id == "a" {
			return stop
		}
		return nil
	}); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	if err := s.CloseIO(ctx, "a", ""); err != nil {
		t.Error(err)
	}
	if e, err := s.Wait(ctx, "a", ""); err != nil || e.Status != 0 || !e.OOMKilled {
		t.Errorf("%+v, %v", e, err)
	}
}

// TestFullDisk has the log's disk run full: the container goes on, the loss is
// told, and what is kept can be read.
func TestFullDisk(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	path := filepath.Join(dir, "log")
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Log: &taskv1.Log{Driver: logs.Local, Path: path},
		Spec: spec(rootfs(t), nil, "sh", "-c", "i=0; while [ $i -lt 40000 ]; do echo line $i of a log that fills the disk; i=$((i+1)); done")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	if e, err := s.Wait(ctx, "a", ""); err != nil || e.Status != 0 {
		t.Errorf("%+v, %v", e, err)
	}
	n := 0
	if err := logs.Read(ctx, logs.Config{Driver: logs.Local, Path: path}, logs.ReadOptions{}, func(m *logs.Message) error {
		if !strings.HasPrefix(string(m.Line), "line ") {
			return fmt.Errorf("line %q", m.Line)
		}
		n++
		return nil
	}); err != nil || n == 0 || n >= 40000 {
		t.Errorf("%d lines, %v", n, err)
	}
	stop := errors.New("stop")
	if err := s.Events(ctx, 0, func(e *taskv1.Event) error {
		if e.Type == taskv1.Event_LOG_ERROR && strings.Contains(e.Message, "no space") {
			return stop
		}
		if e.Type == taskv1.Event_EXIT {
			return errors.New("not told")
		}
		return nil
	}); !errors.Is(err, stop) {
		t.Error(err)
	}
}

// TestHooks has every hook tell of itself.
func TestHooks(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	told := filepath.Join(t.TempDir(), "told")
	hook := func(name string) []specs.Hook {
		return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "echo " + name + " $(grep -o '\"status\":\"[a-z]*\"') >> " + told}}}
	}
	inside := []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > /inside"}}}
	r, err := s.run(ctx, task.CreateRequest{ID: "a", Spec: spec(root, func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{
			Prestart: hook("prestart"), CreateRuntime: hook("createRuntime"), StartContainer: inside,
			Poststart: hook("poststart"), Poststop: hook("poststop"),
		}
	}, "sh", "-c", "cat /inside")}, nil)
	if err != nil || !strings.Contains(r.out, `"id":"a"`) || !strings.Contains(r.out, `"status":"created"`) {
		t.Errorf("%+v, %v", r, err)
	}
	b, err := os.ReadFile(told)
	want := "prestart \"status\":\"creating\"\ncreateRuntime \"status\":\"creating\"\npoststart \"status\":\"running\"\npoststop \"status\":\"stopped\"\n"
	if err != nil || string(b) != want {
		t.Errorf("hooks told %q, %v, want %q", b, err, want)
	}
	if _, err := s.run(ctx, task.CreateRequest{ID: "a", Spec: spec(root, func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/false"}}}
	}, "true")}, nil); err == nil {
		t.Error("a failed hook was ignored")
	}
}

// TestUserNamespaceFiles shows that owners are those that the container sees.
func TestUserNamespaceFiles(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	if out, err := exec.Command("chown", "-Rh", "100000:100000", root).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for dir := root; len(dir) > 4; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Spec: spec(root, func(s *specs.Spec) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		s.Linux.UIDMappings, s.Linux.GIDMappings = ids, ids
	}, "sleep", "1000")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	f := task.Files{ID: "a"}
	if err := s.WriteFiles(ctx, f, "/tmp", tarOf(&tar.Header{Name: "w", Uid: 7, Gid: 8, PAXRecords: text("x")}), false, false); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(filepath.Join(root, "tmp/w"))
	if err != nil || st.Sys().(*syscall.Stat_t).Uid != 100007 || st.Sys().(*syscall.Stat_t).Gid != 100008 {
		t.Errorf("owner on the host: %+v, %v", st, err)
	}
	r, _, err := s.ReadFiles(ctx, f, "/tmp/w")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	h, err := tar.NewReader(r).Next()
	if err != nil || h.Uid != 7 || h.Gid != 8 {
		t.Errorf("owner in the archive: %+v, %v", h, err)
	}
	if err := s.WriteFiles(ctx, f, "/tmp", tarOf(&tar.Header{Name: "big", Uid: 70000, PAXRecords: text("x")}), false, false); err == nil {
		t.Error("wrote a file of an owner that the container cannot have")
	}
}

// TestSeccompListener hands a filter's descriptor to an agent.
func TestSeccompListener(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	path := filepath.Join(s.dir, "agent")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	type message struct {
		state specs.ContainerProcessState
		fd    int
		err   error
	}
	got := make(chan message, 1)
	go func() {
		var m message
		defer func() { got <- m }()
		var c *net.UnixConn
		if c, m.err = l.AcceptUnix(); m.err != nil {
			return
		}
		defer c.Close()
		b, oob := make([]byte, 8192), make([]byte, 64)
		n, on, _, _, err := c.ReadMsgUnix(b, oob)
		if m.err = err; err != nil {
			return
		}
		if m.err = json.Unmarshal(b[:n], &m.state); m.err != nil {
			return
		}
		msgs, err := syscall.ParseSocketControlMessage(oob[:on])
		if err != nil || len(msgs) != 1 {
			m.err = errors.New("no descriptor")
			return
		}
		fds, err := syscall.ParseUnixRights(&msgs[0])
		if m.err = err; err == nil {
			m.fd = fds[0]
		}
	}()
	r, err := s.run(ctx, task.CreateRequest{ID: "a", Spec: spec(rootfs(t), func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64}, ListenerPath: path, ListenerMetadata: "meta",
			Syscalls: []specs.LinuxSyscall{{Names: []string{"getpgrp"}, Action: specs.ActNotify}},
		}
	}, "echo", "ok")}, nil)
	if err != nil || r.out != "ok\n" {
		t.Fatalf("%+v, %v", r, err)
	}
	var m message
	select {
	case m = <-got:
	case <-ctx.Done():
		t.Fatal("no listener came")
	}
	if m.err != nil || m.fd <= 0 || m.state.Metadata != "meta" || m.state.State.ID != "a" || m.state.Pid == 0 {
		t.Errorf("%+v", m)
	}
	syscall.Close(m.fd)
}
