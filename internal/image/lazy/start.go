package lazy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/aside"
)

const (
	// startTime bounds how long a new program takes to answer, or one to end.
	startTime = 10 * time.Second
	// pingTime bounds how long a running one takes.
	pingTime = 3 * time.Second
	maxRead  = 1 << 20 // of one request of the kernel's, in bytes
)

// Config is for Start.
type Config struct {
	// RunDir is a volatile directory that only root may enter; the program's socket,
	// its log and the mount "fs" lie in it. It is made if it is missing.
	RunDir string
	// Name is the daemon's prefix of names.
	Name string
	// Binary is the program tenon-lazy.
	Binary string
	Log    *slog.Logger
}

func (c Config) mount() string  { return filepath.Join(c.RunDir, "fs") }
func (c Config) socket() string { return filepath.Join(c.RunDir, "socket") }
func (c Config) pidFile() string {
	return filepath.Join(c.RunDir, "pid")
}

// Start finds the program that serves below the directory, or starts it. Started says
// that it is a new one, which serves nothing yet (mounts of an older one's files are
// dead: EIO). A program that does not answer is killed and started anew. It may be
// called again, by any number of goroutines of one daemon, whenever a method of a
// Client says ErrUnavailable.
func Start(ctx context.Context, c Config) (client *Client, started bool, err error) {
	fail := func(err error) (*Client, bool, error) { return nil, false, fmt.Errorf("tenon-lazy: %w", err) }
	if err := os.MkdirAll(c.RunDir, 0o700); err != nil {
		return fail(err)
	}
	unlock, err := c.lock(ctx)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	client = &Client{c: c}
	mounted, err := c.mounted()
	if err != nil {
		return fail(err)
	}
	if mounted > 0 {
		ping, cancel := context.WithTimeout(ctx, pingTime)
		_, err := client.State(ping, "")
		cancel()
		if err == nil {
			return client, false, c.note(client.PID())
		}
		if ctx.Err() != nil {
			return fail(context.Cause(ctx))
		}
		c.Log.Warn("the program that serves lazy images does not answer, and is started anew", "err", err)
	}
	if err := c.clear(ctx, 0); err != nil {
		return fail(err)
	}
	if err := c.run(); err != nil {
		_ = c.clear(context.WithoutCancel(ctx), 0) // bounded by itself
		return fail(err)
	}
	wait, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	if _, err := client.State(wait, ""); err != nil {
		err = fmt.Errorf("%w (see %s)", err, filepath.Join(c.RunDir, "log"))
		_ = c.clear(context.WithoutCancel(ctx), 0)
		return nil, false, err
	}
	return client, true, nil
}

// Find returns the client of the program if it runs: ErrNotFound if not. It starts none.
func Find(ctx context.Context, c Config) (*Client, error) {
	client := &Client{c: c}
	if _, err := client.State(ctx, ""); err != nil {
		return nil, fmt.Errorf("tenon-lazy does not run: %w: %w", err, errdefs.ErrNotFound)
	}
	return client, nil
}

// Clear ends a program that is there, whatever it serves, and unmounts its files: for a
// daemon that is removed with all it has.
func Clear(ctx context.Context, c Config) error {
	if _, err := os.Stat(c.RunDir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return c.end(ctx, 0)
}

// end is clear, alone.
func (c Config) end(ctx context.Context, grace time.Duration) error {
	unlock, err := c.lock(ctx)
	if err != nil {
		return fmt.Errorf("tenon-lazy: %w", err)
	}
	defer unlock()
	if err := c.clear(ctx, grace); err != nil {
		return fmt.Errorf("tenon-lazy: %w", err)
	}
	return aside.Remove(c.Name)
}

// lock keeps starts and ends apart.
func (c Config) lock(ctx context.Context) (func(), error) {
	f, err := os.OpenFile(filepath.Join(c.RunDir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	limit := time.Now().Add(3 * startTime)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, os.NewSyscallError("flock", err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(limit) {
			f.Close()
			return nil, fmt.Errorf("another start takes too long: %w", errdefs.ErrUnavailable)
		}
	}
}

// mounted counts what is mounted on the mount point.
func (c Config) mounted() (n int, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	point := c.mount()
	if real, err := filepath.EvalSymlinks(c.RunDir); err == nil {
		point = filepath.Join(real, "fs")
	}
	escaped := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`).Replace(point)
	in := bufio.NewScanner(f)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		if w := strings.Fields(in.Text()); len(w) > 4 && w[4] == escaped {
			n++
		}
	}
	return n, in.Err()
}

// clear kills a program that is there, unless it ends in the grace time, and unmounts
// what it served.
func (c Config) clear(ctx context.Context, grace time.Duration) error {
	if err := c.kill(ctx, grace); err != nil {
		return err
	}
	for range 16 {
		n, err := c.mounted()
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
		if err := unix.Unmount(c.mount(), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL {
			return &os.PathError{Op: "unmount", Path: c.mount(), Err: err}
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
	}
	for _, p := range []string{c.socket(), c.pidFile()} {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// kill ends the program that the file names, and waits for its end: then the kernel
// has ended its connection, so that all who wait for it have their errors. It is not
// killed if the context ends before the grace time.
func (c Config) kill(ctx context.Context, grace time.Duration) error {
	b, err := os.ReadFile(c.pidFile())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var pid int
	var began string
	if n, _ := fmt.Sscanf(string(b), "%d %s", &pid, &began); n != 2 || pid <= 1 {
		return nil // written by halves
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return nil
	}
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(fd)
	if now, err := startOf(pid); err != nil || now != began {
		return nil // another process has the number now
	}
	if grace > 0 {
		err := ended(ctx, fd, grace)
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	if err := ended(ctx, fd, startTime); err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	return nil
}

// ended waits for a process's end.
func ended(ctx context.Context, pidfd int, limit time.Duration) error {
	until := time.Now().Add(limit)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(min(50, max(0, time.Until(until).Milliseconds()))))
		if n > 0 {
			return nil
		}
		if err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if time.Now().After(until) {
			return fmt.Errorf("it does not end: %w", errdefs.ErrUnavailable)
		}
	}
}

// note writes down which process it is, unless that is known.
func (c Config) note(pid int) error {
	began, err := startOf(pid)
	if err != nil {
		return err
	}
	line := fmt.Appendf(nil, "%d %s\n", pid, began)
	if b, err := os.ReadFile(c.pidFile()); err == nil && string(b) == string(line) {
		return nil
	}
	return os.WriteFile(c.pidFile(), line, 0o600)
}

// startOf tells when a process began, as the kernel counts.
func startOf(pid int) (string, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", err
	}
	w := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(w) < 20 {
		return "", fmt.Errorf("/proc/%d/stat: %q", pid, b)
	}
	return w[19], nil
}

// run mounts the file system and starts the program, with the listening socket as
// descriptor 3 and the connection to the kernel as 4.
func (c Config) run() error {
	if err := os.Mkdir(c.mount(), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.socket(), Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(c.socket(), 0o600); err != nil {
		return err
	}
	lf, err := l.File()
	if err != nil {
		return err
	}
	defer lf.Close()
	fuse, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("lazy images need FUSE: %w: %w", &os.PathError{Op: "open", Path: "/dev/fuse", Err: err}, errdefs.ErrFailedPrecondition)
	}
	dev := os.NewFile(uintptr(fuse), "/dev/fuse")
	defer dev.Close()
	log, err := os.OpenFile(filepath.Join(c.RunDir, "log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,max_read=%d", fuse, maxRead)
	if err := unix.Mount("tenon-lazy", c.mount(), "fuse.tenon-lazy", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_NOATIME, opts); err != nil {
		return &os.PathError{Op: "mount", Path: c.mount(), Err: err}
	}
	cmd := exec.Command(c.Binary)
	cmd.ExtraFiles = []*os.File{lf, dev}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.Env = []string{"GOGC=50"}
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
		if v, ok := os.LookupEnv(name); ok {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", c.Binary, err)
	}
	if err := c.note(cmd.Process.Pid); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return err
	}
	go func() { _ = cmd.Wait() }() // reaps it
	if err := aside.Move(c.Name, cmd.Process.Pid); err != nil {
		c.Log.Warn("the program that serves lazy images stays in the daemon's control group, and shares its fate if a service manager kills that", "err", err)
	}
	return nil
}
