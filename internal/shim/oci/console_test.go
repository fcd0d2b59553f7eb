package oci

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// receiveConsole accepts one connection and the descriptor that comes by it.
func receiveConsole(l *net.UnixListener) (*os.File, error) {
	c, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, errors.Join(err, errors.New("no control message"))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, err
	}
	console := os.NewFile(uintptr(fds[0]), "console")
	return console, console.SetDeadline(time.Now().Add(commandTime))
}

func TestConsoleSocket(t *testing.T) {
	t.Parallel()
	f := setup(t, "tty; stty size; read x; echo got $x; exit 4")
	f.spec.Process.Terminal = true
	f.spec.Process.ConsoleSize = &specs.Box{Height: 11, Width: 22}
	f.write()
	f.refused("--console-socket", "create", f.id)
	dir, err := os.MkdirTemp("", "tocs") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.SetDeadline(time.Now().Add(commandTime)); err != nil {
		t.Fatal(err)
	}
	f.must("create", "--console-socket", socket, f.id)
	console, err := receiveConsole(l)
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	f.must("start", f.id)
	if _, err := console.WriteString("it\n"); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(console)
	if err != nil && !errors.Is(err, unix.EIO) {
		t.Fatal(err)
	}
	for _, want := range []string{"/dev/pts/0\r\n", "11 22\r\n", "got it\r\n"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in %q", want, out)
		}
	}
}

func TestOwnTerminal(t *testing.T) {
	t.Parallel()
	f := setup(t, "tty; exit 6")
	f.spec.Process.Terminal = true
	f.write()
	r := f.run(nil, "run", f.id)
	if r.code != 6 || r.out != "/dev/pts/0\r\n" {
		t.Errorf("%+v", r)
	}
	if _, err := exec.LookPath("script"); err != nil {
		t.Fatal("script (bsdutils) is not installed")
	}
	f.spec.Process.Args = []string{"sleep", "100000"}
	f.spec.Process.Terminal = false
	f.detached("run", "-d", f.id)
	// A terminal of the caller's: raw while it lasts, as before afterwards.
	ctx, cancel := context.WithTimeout(t.Context(), commandTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "script", "-qec", strings.Join(f.command("exec", "-t", f.id, "sh", "-c", "'tty; test -t 0 && echo a terminal'").Args, " ")+"; stty -a | grep -o ' icanon'", "/dev/null")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "/dev/pts/") || !strings.Contains(string(out), "a terminal\r\n") || !strings.Contains(string(out), "icanon") {
		t.Errorf("%q, %v", out, err)
	}
}

func TestHooks(t *testing.T) {
	t.Parallel()
	f := setup(t, "echo program >>/trace")
	trace := filepath.Join(f.bundle, "rootfs/trace")
	outside := func(name string) specs.Hook {
		return specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "read -r line; echo " + name + " ${line%%,*} >>" + trace}}
	}
	inside := specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "echo startContainer >>/trace"}}
	f.spec.Hooks = &specs.Hooks{
		CreateRuntime: []specs.Hook{outside("createRuntime")}, CreateContainer: []specs.Hook{outside("createContainer")},
		StartContainer: []specs.Hook{inside}, Poststart: []specs.Hook{outside("poststart")}, Poststop: []specs.Hook{outside("poststop")},
	}
	f.write()
	if r := f.run(nil, "run", f.id); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	raw, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	for i, line := range strings.Split(strings.TrimSpace(string(raw)), "\n") {
		name, _, _ := strings.Cut(line, " ")
		got[name] = i + 1
	}
	for _, pair := range [][2]string{
		{"createRuntime", "createContainer"}, {"createContainer", "startContainer"}, {"startContainer", "program"},
		{"startContainer", "poststart"}, {"program", "poststop"}, {"poststart", "poststop"},
	} {
		if got[pair[0]] == 0 || got[pair[0]] >= got[pair[1]] {
			t.Errorf("%s does not come before %s:\n%s", pair[0], pair[1], raw)
		}
	}
	// A hook that fails ends the creation, and nothing is left.
	for _, set := range []func(*specs.Hooks, []specs.Hook){
		func(h *specs.Hooks, l []specs.Hook) { h.CreateRuntime = l },
		func(h *specs.Hooks, l []specs.Hook) { h.CreateContainer = l },
		func(h *specs.Hooks, l []specs.Hook) { h.StartContainer = l },
	} {
		f.spec.Hooks = &specs.Hooks{}
		set(f.spec.Hooks, []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "exit 1"}}})
		f.write()
		f.refused("hook", "run", f.id)
		f.refused("does not exist", "state", f.id)
	}
}

func TestSpecAndFeatures(t *testing.T) {
	t.Parallel()
	f := setup(t, "")
	dir := t.TempDir()
	f.must("spec", "--bundle", dir)
	raw, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := decodeSpec(raw); err != nil {
		t.Error(err)
	}
	f.refused("exists", "spec", "--bundle", dir)
	if out := f.must("features"); !strings.Contains(out, `"ociVersionMax"`) || !strings.Contains(out, "CAP_SYS_ADMIN") {
		t.Errorf("features: %s", out)
	}
	if out := f.must("--version"); !strings.HasPrefix(out, "tenon-oci version ") {
		t.Errorf("version: %s", out)
	}
}
