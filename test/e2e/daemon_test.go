package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Daemon is a tenond under test. Start it with NewDaemon.
type Daemon struct {
	Name, Root, RunRoot, Socket string
	Args                        []string // further flags
	Env                         []string

	bin string
	log *os.File
	mu  sync.Mutex
	cmd *exec.Cmd
	end chan error
}

var (
	binOnce sync.Once
	binDir  string
	binErr  error
)

// Bin is the directory of the built programs: $TENON_BIN, or built once here.
func Bin(t testing.TB) string {
	t.Helper()
	binOnce.Do(func() {
		if binDir = os.Getenv("TENON_BIN"); binDir != "" {
			return
		}
		binDir, binErr = filepath.Abs("../../bin")
		if binErr == nil {
			cmd := exec.Command("make", "-s", "-C", "../..", "build")
			if out, err := cmd.CombinedOutput(); err != nil {
				binErr = fmt.Errorf("make build: %w\n%s", err, out)
			}
		}
	})
	if binErr != nil {
		t.Fatal(binErr)
	}
	return binDir
}

// prefixes keeps concurrently running test programs apart: each takes a number
// by an exclusive lock on a file, and so its name prefix and its address pool.
func takePrefix() (n int, release func(), err error) {
	dir := filepath.Join(os.TempDir(), "tenon-e2e-locks")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, nil, err
	}
	for n := range 64 {
		f, err := os.OpenFile(filepath.Join(dir, strconv.Itoa(n)), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return 0, nil, err
		}
		if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil && !taken(fmt.Sprintf("te%d", n)) {
			return n, func() { _ = f.Close() }, nil
		}
		_ = f.Close()
	}
	return 0, nil, errors.New("64 test daemons run already")
}

// taken says whether something of that name is on the machine, though nobody has
// its lock: a test program that was killed left it, or one with another directory
// for temporary files runs. It is not ours, and must not be taken for ours.
func taken(name string) bool {
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		for _, group := range []string{name, name + "-vm"} {
			if found, _ := filepath.Glob(pattern + group); len(found) > 0 {
				return true
			}
		}
	}
	links, _ := os.ReadDir("/sys/class/net")
	for _, l := range links {
		alias, _ := os.ReadFile(filepath.Join("/sys/class/net", l.Name(), "ifalias")) // gone meanwhile: not there
		if strings.HasPrefix(string(alias), "tenon:"+name+":") {
			return true
		}
	}
	return false
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
	n, release, err := takePrefix()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "tenon-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	run, err := os.MkdirTemp("/dev/shm", "tenon-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	d := &Daemon{
		Name: fmt.Sprintf("te%d", n), Root: filepath.Join(dir, "root"), RunRoot: run, bin: Bin(t),
		Socket: filepath.Join(run, "docker.sock"),
	}
	if root != "" {
		d.Root = root
	}
	d.Args = append([]string{
		"--config", "/dev/null", "--root", d.Root, "--run-root", d.RunRoot, "--host", "unix://" + d.Socket, "--name", d.Name, "--debug",
		"--default-address-pool", fmt.Sprintf("base=10.%d.0.0/16,size=24", 130+n),
		"--default-address-pool", fmt.Sprintf("base=fd7e:%x::/48,size=64", 0x7000+n),
	}, args...)
	if d.log, err = os.Create(filepath.Join(dir, "tenond.log")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer release()
		d.teardown(t)
		if t.Failed() {
			t.Logf("daemon's log: %s", d.log.Name())
			return
		}
		for _, path := range []string{dir, run} {
			if err := os.RemoveAll(path); err != nil {
				t.Error(err)
			}
		}
	})
	d.Start(t)
	return d
}

// Start runs the daemon and returns once it answers.
func (d *Daemon) Start(t testing.TB) {
	t.Helper()
	if err := d.start(); err != nil {
		t.Fatal(err)
	}
}

func (d *Daemon) start() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	cmd := exec.Command(filepath.Join(d.bin, "tenond"), d.Args...)
	cmd.Env = append(os.Environ(), d.Env...)
	cmd.Stdout, cmd.Stderr = d.log, d.log
	if err := cmd.Start(); err != nil {
		return err
	}
	end := make(chan error, 1)
	go func() { end <- cmd.Wait() }()
	d.cmd, d.end = cmd, end
	deadline := time.Now().Add(patience(time.Minute))
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		out, err := exec.CommandContext(ctx, "curl", "-sf", "--unix-socket", d.Socket, "http://tenon/_ping").Output()
		cancel()
		if err == nil && string(out) == "OK" {
			return nil
		}
		select {
		case err := <-end:
			d.cmd = nil
			return fmt.Errorf("tenond ended while starting (%v); its log: %s", err, d.Tail())
		default:
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("tenond does not answer; its log: %s", d.Tail())
		}
		time.Sleep(20 * time.Millisecond) // polls for readiness, decides nothing
	}
}

// Tail is the end of the daemon's log.
func (d *Daemon) Tail() string {
	b, err := os.ReadFile(d.log.Name())
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-3000):])
}

// Kill ends the daemon by SIGKILL and waits for it.
func (d *Daemon) Kill(t testing.TB) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil {
		return
	}
	_ = d.cmd.Process.Kill() // it may have ended by itself
	select {
	case <-d.end:
	case <-time.After(time.Minute):
		t.Fatal("tenond does not end after SIGKILL")
	}
	d.cmd = nil
}

// Wait waits for the daemon to end by itself.
func (d *Daemon) Wait(t testing.TB, limit time.Duration) {
	t.Helper()
	select {
	case <-d.end:
		d.mu.Lock()
		d.cmd = nil
		d.mu.Unlock()
	case <-time.After(limit):
		t.Fatalf("tenond did not end; its log: %s", d.Tail())
	}
}

// teardown ends everything and checks that nothing is left.
func (d *Daemon) teardown(t testing.TB) {
	t.Helper()
	d.Kill(t)
	ctx, cancel := context.WithTimeout(context.Background(), patience(2*time.Minute))
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(d.bin, "tenond"), append(d.Args, "--shutdown")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("tenond --shutdown: %v\n%s", err, out)
	}
	for _, left := range d.Leftovers() {
		t.Errorf("left behind: %s", left)
	}
	_ = d.log.Close()
}

// Leftovers lists everything on the machine that carries the daemon's name or
// roots: processes, mounts, interfaces, nftables tables, cgroups.
func (d *Daemon) Leftovers() []string {
	var left []string
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, d.Root) || strings.Contains(line, d.RunRoot) {
			left = append(left, "mount "+strings.TrimSpace(line))
		}
	}
	links, _ := os.ReadDir("/sys/class/net")
	for _, l := range links {
		alias, _ := os.ReadFile(filepath.Join("/sys/class/net", l.Name(), "ifalias")) // gone meanwhile: not left
		if strings.HasPrefix(string(alias), "tenon:"+d.Name+":") || strings.HasPrefix(l.Name(), d.Name+"-v") {
			left = append(left, "interface "+l.Name())
		}
	}
	if out, err := exec.Command("nft", "list", "tables").Output(); err == nil {
		for line := range strings.Lines(string(out)) {
			f := strings.Fields(line)
			if len(f) == 3 && (f[2] == d.Name || strings.HasPrefix(f[2], d.Name+"-") || strings.HasPrefix(f[2], d.Name+"_")) {
				left = append(left, "nftables "+strings.TrimSpace(line))
			}
		}
	}
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && (e.Name() == d.Name || e.Name() == d.Name+"-vm") {
			left = append(left, "cgroup "+path)
			return fs.SkipDir
		}
		return nil
	})
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err == nil && (bytes.Contains(b, []byte(d.Root)) || bytes.Contains(b, []byte(d.RunRoot))) {
			left = append(left, "process "+filepath.Base(filepath.Dir(p))+" "+string(bytes.ReplaceAll(b, []byte{0}, []byte{' '})))
		}
	}
	return left
}

// Result is what a command printed and how it ended.
type Result struct {
	Out, Err string
	Code     int
}

// patience multiplies a bound by TENON_PATIENCE: where the whole machine is
// emulated, everything takes a while.
func patience(d time.Duration) time.Duration {
	if n, err := strconv.Atoi(os.Getenv("TENON_PATIENCE")); err == nil && n > 0 {
		return d * time.Duration(n)
	}
	return d
}

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

// Environ is what clients of the daemon run with.
func (d *Daemon) Environ() []string {
	return append(os.Environ(), "DOCKER_HOST=unix://"+d.Socket, "TENON_HOST=unix://"+d.Socket, "DOCKER_CONTENT_TRUST=0",
		"DOCKER_CLI_HINTS=false", "PATH="+d.bin+":"+os.Getenv("PATH"))
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
	if r := d.run(t, time.Minute, filepath.Join(d.bin, "tenon"), "image", "bootstrap", "busybox"); r.Code != 0 {
		t.Fatalf("tenon image bootstrap busybox: exit %d\n%s%s\n%s", r.Code, r.Out, r.Err, d.Tail())
	}
}
