package e2e

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tenon.dev/tenon/test/daemon"
)

// Daemon is a tenond under test, and the clients that these tests drive it with.
// Start it with NewDaemon.
type Daemon struct{ *daemon.Daemon }

// Bin is the directory of the built programs.
func Bin(t testing.TB) string {
	t.Helper()
	bin, err := daemon.Bin()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// NewDaemon starts a daemon that ends, with everything it made, when the test
// ends; the test fails if anything is left behind.
func NewDaemon(t testing.TB, args ...string) *Daemon {
	t.Helper()
	return newDaemonAt(t, "", args...)
}

// newDaemonAt is NewDaemon with a state root of the caller's; empty: a temporary
// one.
func newDaemonAt(t testing.TB, root string, args ...string) *Daemon {
	t.Helper()
	d := notStarted(t, root, args...)
	d.Start(t)
	return d
}

// notStarted is newDaemonAt for who has to do something before the start.
func notStarted(t testing.TB, root string, args ...string) *Daemon {
	t.Helper()
	inner, err := daemon.New(args...)
	if err != nil {
		t.Fatal(err)
	}
	if root != "" {
		inner.SetRoot(root)
	}
	d := &Daemon{inner}
	t.Cleanup(func() {
		if err := d.End(t.Failed()); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("daemon's log: %s", d.LogFile)
		}
	})
	return d
}

// Start runs the daemon and returns once it answers.
func (d *Daemon) Start(t testing.TB) {
	t.Helper()
	if err := d.start(); err != nil {
		t.Fatal(err)
	}
}

func (d *Daemon) start() error { return d.Daemon.Start() }

// Kill ends the daemon by SIGKILL and waits for it.
func (d *Daemon) Kill(t testing.TB) {
	t.Helper()
	if err := d.Daemon.Kill(); err != nil {
		t.Fatal(err)
	}
}

// Wait waits for the daemon to end by itself, well or not.
func (d *Daemon) Wait(t testing.TB, limit time.Duration) {
	t.Helper()
	var exit *exec.ExitError
	if err := d.Daemon.Wait(limit); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
}

// Result is what a command printed and how it ended.
type Result struct {
	Out, Err string
	Code     int
}

// patience is a bound, and more of it where the whole machine is emulated.
func patience(d time.Duration) time.Duration { return daemon.Patience(d) }

// Docker runs the stock docker CLI against the daemon.
func (d *Daemon) Docker(t testing.TB, args ...string) Result {
	t.Helper()
	return d.run(t, 2*time.Minute, "docker", args...)
}

// Must runs docker and fails the test unless it succeeds; it returns its output
// without the last newline.
func (d *Daemon) Must(t testing.TB, args ...string) string {
	t.Helper()
	r := d.Docker(t, args...)
	if r.Code != 0 {
		t.Fatalf("docker %s: exit %d\n%s%s", strings.Join(args, " "), r.Code, r.Out, r.Err)
	}
	return strings.TrimRight(r.Out, "\n")
}

// Sh runs a shell script that may use docker, tenon and $DOCKER_HOST.
func (d *Daemon) Sh(t testing.TB, script string, env ...string) Result {
	t.Helper()
	return d.run(t, 2*time.Minute, "sh", append([]string{"-c", script, "sh"}, env...)...)
}

func (d *Daemon) run(t testing.TB, limit time.Duration, name string, args ...string) Result {
	t.Helper()
	limit = patience(limit)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = d.Environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("%s %s: no end after %v\n%s%s\ndaemon: %s", name, strings.Join(args, " "), limit, out.String(), errOut.String(), d.Tail())
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", name, err)
	}
	return Result{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}
}

// Busybox makes the base image.
func (d *Daemon) Busybox(t testing.TB) {
	t.Helper()
	if r := d.run(t, time.Minute, filepath.Join(d.Bin, "tenon"), "image", "bootstrap", "busybox"); r.Code != 0 {
		t.Fatalf("tenon image bootstrap busybox: exit %d\n%s%s\n%s", r.Code, r.Out, r.Err, d.Tail())
	}
}
