package gitjail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// uid is the user, and the group, that git runs as: nobody.
const uid = 65534

// Bounds of one call of git.
const (
	maxTime   = time.Hour
	maxFile   = 64 << 30 // bytes of a file that it writes
	maxData   = 4 << 30  // bytes of memory of a process, the files that it maps apart
	maxProcs  = 1 << 14  // processes and threads of nobody, on the whole host
	maxFiles  = 1024     // open ones
	maxOutput = 16 << 20 // bytes of each of its outputs: BuildKit keeps them
	freeBytes = 256 << 20
	newFiles  = 4 << 20 // files that the disk has more than before, about
	look      = 250 * time.Millisecond
)

// failed is the exit status of a jail that can't be made: git's for a fatal error.
const failed = 128

// Main is the program git. It returns its exit status.
func Main() int {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer cancel()
	code, err := run(ctx, os.Args[1:], os.Environ())
	if err != nil {
		fmt.Fprintln(os.Stderr, "fatal: git:", err)
	}
	return code
}

func run(ctx context.Context, args, env []string) (code int, err error) {
	dir, program, err := real(os.Getenv("PATH"))
	if err != nil {
		return failed, err
	}
	cwd, err := os.Getwd()
	if err != nil {
		return failed, err
	}
	c, err := parse(args, env, cwd, filepath.Join(filepath.Dir(dir), "tmp"), filepath.Join(dir, notesDir))
	if err != nil {
		return failed, err
	}
	defer func() {
		for _, d := range c.given() {
			if gerr := give(d, 0); gerr != nil {
				code, err = failed, errors.Join(err, gerr)
			}
		}
	}()
	for _, d := range c.owned() {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return failed, err
		}
	}
	for _, d := range c.given() {
		if err := give(d, uid); err != nil {
			return failed, err
		}
	}
	if c.agent != "" {
		if err := os.Lchown(c.agent, uid, uid); err != nil {
			return failed, err
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, maxTime, fmt.Errorf("it has taken more than %s", maxTime))
	defer cancel()
	return c.run(ctx, filepath.Join(dir, rootDir), program, environ(env, searchPath(program)))
}

// searchPath is where git finds other programs.
func searchPath(program string) string {
	return filepath.Dir(program) + ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
}

// run starts git in the jail and waits for its end, and that of all that it has started.
func (c *call) run(ctx context.Context, root, program string, env []string) (int, error) {
	var outs [2]*bounded
	var files [3]uintptr
	null, err := os.Open(os.DevNull)
	if err != nil {
		return failed, err
	}
	defer null.Close()
	files[0] = null.Fd()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	for i, to := range []*os.File{os.Stdout, os.Stderr} {
		if outs[i], err = newBounded(to, func() { stop(fmt.Errorf("it has written more than %d MiB", maxOutput>>20)) }); err != nil {
			return failed, err
		}
		defer outs[i].close()
		files[i+1] = outs[i].w.Fd()
	}
	started := make(chan error, 1)
	var pid atomic.Int64
	done := make(chan struct{})
	defer close(done)
	go func() {
		runtime.LockOSThread() // for good: it has other namespaces, and the child ends with it
		p, err := c.start(root, program, env, files[:])
		pid.Store(int64(p))
		started <- err
		<-done
	}()
	if err := <-started; err != nil {
		return failed, err
	}
	for _, o := range outs {
		o.copy()
	}
	kill := sync.OnceFunc(func() { _ = unix.Kill(int(pid.Load()), unix.SIGKILL) }) // not reaped yet; its namespace ends with it
	ended := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		c.watch(ctx, ended, stop)
		select {
		case <-ended:
		default:
			kill()
		}
	})
	err = wait(int(pid.Load()), unix.WNOWAIT)
	close(ended)
	watching.Wait() // nobody kills it any more: its number may be another's
	var status unix.WaitStatus
	if err == nil {
		_, err = unix.Wait4(int(pid.Load()), &status, 0, nil)
	}
	for _, o := range outs {
		o.wait()
	}
	switch {
	case err != nil:
		return failed, err
	case context.Cause(ctx) != nil:
		return failed, fmt.Errorf("stopped: %w", context.Cause(ctx))
	case status.Signaled():
		return failed, fmt.Errorf("killed by a signal: %s", status.Signal())
	}
	return status.ExitStatus(), nil
}

// wait waits until a child has ended.
func wait(pid, flags int) error {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|flags, nil)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("waitid", err)
		}
	}
}

// start makes the jail around the calling thread, and starts git in it.
func (c *call) start(root, program string, env []string, files []uintptr) (int, error) {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID); err != nil {
		return 0, os.NewSyscallError("unshare", err)
	}
	if err := c.makeRoot(root); err != nil {
		return 0, err
	}
	for what, n := range map[int]uint64{unix.RLIMIT_FSIZE: maxFile, unix.RLIMIT_DATA: maxData, unix.RLIMIT_NOFILE: maxFiles, unix.RLIMIT_NPROC: maxProcs, unix.RLIMIT_CORE: 0} {
		var now unix.Rlimit
		if err := unix.Getrlimit(what, &now); err != nil {
			return 0, os.NewSyscallError("getrlimit", err)
		}
		n = min(n, now.Max)
		if err := unix.Setrlimit(what, &unix.Rlimit{Cur: n, Max: n}); err != nil {
			return 0, os.NewSyscallError("setrlimit", err)
		}
	}
	if err := restrict(); err != nil {
		return 0, err
	}
	cwd := "/tmp"
	for _, d := range c.owned() {
		if within(c.cwd, d) {
			cwd = c.cwd
		}
	}
	pid, err := syscall.ForkExec(program, append([]string{Name}, c.args...), &syscall.ProcAttr{Dir: cwd, Env: env, Files: files, Sys: &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uid, Gid: uid},
		Pdeathsig:  syscall.SIGKILL,
		Setsid:     true,
	}})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", program, err)
	}
	return pid, nil
}

// watch returns when git has ended or has to: if ctx ends, or it fills the disk.
func (c *call) watch(ctx context.Context, ended <-chan struct{}, stop context.CancelCauseFunc) {
	var first []uint64
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		for i, d := range c.owned() {
			var st unix.Statfs_t
			if err := unix.Statfs(d, &st); err != nil {
				continue // it has taken its own directory away
			}
			used := st.Files - st.Ffree
			if len(first) == i {
				first = append(first, used)
			}
			if st.Bavail*uint64(st.Bsize) < freeBytes {
				stop(fmt.Errorf("the disk is full: less than %d MiB would be free", freeBytes>>20))
				return
			}
			if i < len(first) && used > first[i]+newFiles {
				stop(fmt.Errorf("it has made more than %d files", newFiles))
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ended:
			return
		case <-tick.C:
		}
	}
}

// bounded is an output of git.
type bounded struct {
	r, w, to *os.File
	over     func()
	wg       sync.WaitGroup
}

func newBounded(to *os.File, over func()) (*bounded, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	return &bounded{r: r, w: w, to: to, over: over}, nil
}

// copy begins to hand on what git writes.
func (b *bounded) copy() {
	b.w.Close() // the child has it
	b.wg.Go(func() {
		n, _ := io.Copy(b.to, io.LimitReader(b.r, maxOutput)) // nobody reads it: git gets a broken pipe
		if n == maxOutput {
			b.over()
		}
		b.r.Close()
	})
}

func (b *bounded) wait()  { b.wg.Wait() }
func (b *bounded) close() { b.w.Close(); b.r.Close() }
