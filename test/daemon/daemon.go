// Package daemon runs a tenond under test, for every package whose tests want a real
// one: with roots, a name prefix and address pools of its own, so that any number of
// them, and a daemon in use, live side by side on one machine. The end of one is
// checked: nothing that carries its name or its roots may be left.
//
// Its functions return errors instead of failing a test, since a daemon may also be
// shared by all tests of a program, and end after the last of them (TestMain).
package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Daemon is a tenond under test: make it with New, then Start it, and End it.
// A Daemon may be killed while others talk to it; its fields are set in between only.
type Daemon struct {
	Name                  string // the prefix of all names on the machine
	Bin                   string // the directory of the programs
	Root, RunRoot, Socket string
	LogFile               string   // what all its processes wrote
	Args                  []string // tenond's; more may be appended before a Start
	Env                   []string // beside the test's own; for the next Start

	dir     string // everything that is not below RunRoot
	release func()

	mu  sync.Mutex
	cmd *exec.Cmd // nil if none runs
	end chan error
}

// New takes a prefix and makes the directories of a daemon, with more flags of
// tenond's. The caller ends it by End, whether it was started or not.
func New(args ...string) (_ *Daemon, err error) {
	bin, err := Bin()
	if err != nil {
		return nil, err
	}
	n, release, err := takePrefix()
	if err != nil {
		return nil, err
	}
	d := &Daemon{Name: fmt.Sprintf("te%d", n), Bin: bin, release: release}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.remove())
		}
	}()
	if d.dir, err = os.MkdirTemp("", "tenon-test-"); err != nil {
		return nil, err
	}
	// In memory, as it is on any host.
	if d.RunRoot, err = os.MkdirTemp("/dev/shm", "tenon-test-"); err != nil {
		return nil, err
	}
	d.Root, d.Socket, d.LogFile = filepath.Join(d.dir, "root"), filepath.Join(d.RunRoot, "docker.sock"), filepath.Join(d.dir, "tenond.log")
	d.Args = append([]string{
		"--config", "/dev/null", "--root", d.Root, "--run-root", d.RunRoot, "--host", "unix://" + d.Socket, "--name", d.Name, "--debug",
		"--default-address-pool", fmt.Sprintf("base=10.%d.0.0/16,size=24", 130+n),
		"--default-address-pool", fmt.Sprintf("base=fd7e:%x::/48,size=64", 0x7000+n),
	}, args...)
	return d, nil
}

// SetRoot puts the state elsewhere, before the first Start. The caller removes it.
func (d *Daemon) SetRoot(dir string) {
	for i, arg := range d.Args {
		if arg == d.Root {
			d.Args[i] = dir
		}
	}
	d.Root = dir
}

// Start runs the daemon and returns once it answers.
func (d *Daemon) Start() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd != nil {
		select {
		case <-d.end: // by itself, and nobody waited
		default:
			return fmt.Errorf("tenond %s runs already", d.Name)
		}
	}
	log, err := os.OpenFile(d.LogFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(d.Bin, "tenond"), d.Args...)
	cmd.Env = append(os.Environ(), d.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	end := make(chan error, 1)
	go func() { end <- cmd.Wait() }()
	d.cmd, d.end = cmd, end
	deadline := time.Now().Add(Patience(time.Minute))
	for !d.answers() {
		select {
		case err := <-end:
			d.cmd = nil
			return fmt.Errorf("tenond ended while starting (%v); its log: %s", err, d.Tail())
		case <-time.After(5 * time.Millisecond): // polls for readiness, decides nothing
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("tenond does not answer; its log: %s", d.Tail())
		}
	}
	return nil
}

func (d *Daemon) answers() bool {
	c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", d.Socket)
		},
	}}
	resp, err := c.Get("http://tenon/_ping")
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// Pid is the daemon's process, 0 if none runs.
func (d *Daemon) Pid() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil {
		return 0
	}
	return d.cmd.Process.Pid
}

// Kill ends the daemon by SIGKILL and waits for it. What it made goes on.
func (d *Daemon) Kill() error {
	err := d.Signal(syscall.SIGKILL, time.Minute)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil // as it must be
	}
	return err
}

// Signal sends the daemon a signal that ends it, and waits for its end; nil if it
// ends well, or none ran. If it goes on for longer than the limit, that is an error.
func (d *Daemon) Signal(sig syscall.Signal, limit time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil {
		return nil
	}
	_ = d.cmd.Process.Signal(sig) // it may have ended by itself
	return d.waitLocked(limit)
}

// Wait waits for the daemon to end by itself; nil if it ends well, or none runs.
func (d *Daemon) Wait(limit time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil {
		return nil
	}
	return d.waitLocked(limit)
}

func (d *Daemon) waitLocked(limit time.Duration) error {
	select {
	case err := <-d.end:
		d.cmd = nil
		return err
	case <-time.After(limit):
		return fmt.Errorf("tenond does not end in %v; its log: %s", limit, d.Tail())
	}
}

// Shutdown takes down what a daemon has made that runs no longer. It is harmless
// where nothing is left.
func (d *Daemon) Shutdown() error {
	ctx, cancel := context.WithTimeout(context.Background(), Patience(2*time.Minute))
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(d.Bin, "tenond"), append(d.Args[:len(d.Args):len(d.Args)], "--shutdown")...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("tenond --shutdown: %w: %s", err, out)
	}
	return nil
}

// End kills the daemon if it runs, takes down what it made, checks that nothing is
// left, and removes its directories; they stay, with its log, if keep says so or
// something is wrong.
func (d *Daemon) End(keep bool) error {
	defer d.release()
	errs := []error{d.Kill(), d.Shutdown()}
	for _, left := range d.Leftovers() {
		errs = append(errs, fmt.Errorf("left behind: %s", left))
	}
	if err := errors.Join(errs...); err != nil || keep {
		return err
	}
	return d.remove()
}

func (d *Daemon) remove() error {
	var errs []error
	for _, dir := range []string{d.dir, d.RunRoot} {
		if dir != "" {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	d.release()
	return errors.Join(errs...)
}

// Tail is the end of the daemon's log.
func (d *Daemon) Tail() string {
	b, err := os.ReadFile(d.LogFile)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-3000):])
}

// Environ is what clients of the daemon run with: the test's environment, and the
// daemon's programs and sockets.
func (d *Daemon) Environ() []string {
	return append(os.Environ(), "DOCKER_HOST=unix://"+d.Socket, "TENON_HOST=unix://"+d.Socket, "DOCKER_CONTENT_TRUST=0",
		"DOCKER_CLI_HINTS=false", "PATH="+d.Bin+":"+os.Getenv("PATH"))
}

// Patience multiplies a bound by TENON_PATIENCE: where the whole machine is
// emulated, everything takes a while.
func Patience(d time.Duration) time.Duration {
	if n, err := strconv.Atoi(os.Getenv("TENON_PATIENCE")); err == nil && n > 0 {
		return d * time.Duration(n)
	}
	return d
}

// buildTime bounds the build of the programs.
const buildTime = 10 * time.Minute

// Bin is the directory of the built programs: $TENON_BIN, or bin/ of this module,
// which is then built.
var Bin = sync.OnceValues(func() (string, error) {
	if bin := os.Getenv("TENON_BIN"); bin != "" {
		return filepath.Abs(bin)
	}
	dir, err := os.Getwd() // of a test: its package's
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if dir == "/" {
			return "", errors.New("tests run in no module")
		}
		dir = filepath.Dir(dir)
	}
	lock, err := os.OpenFile(filepath.Join(os.TempDir(), "tenon-test-build.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil { // other packages' tests build the same
		return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), buildTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "make", "-s", "-C", dir, "build")
	cmd.WaitDelay = 10 * time.Second // what make has started may hold its output
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make build: %w\n%s", errors.Join(err, ctx.Err()), out)
	}
	return filepath.Join(dir, "bin"), nil
})

// takePrefix keeps the daemons of concurrently running test programs apart: each takes
// a number by an exclusive lock on a file, and so its name prefix and its address pools.
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
			return n, sync.OnceFunc(func() { _ = f.Close() }), nil
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
