package shim

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// external drives an OCI runtime command (runc, crun, runsc, youki): its
// command line is the interface. The runtime's processes become the shim's
// children when the command has ended, since the shim is a subreaper.
//
//	RunDir/runtimes/NAME       the runtime's own state (--root)
//	RunDir/bundles/ID          config.json, rootfs (mounted in the runtime's own
//	                           mount namespace only), files of single commands
type external struct {
	self string // the shim's own program
	path string
	args []string
	root string // --root
	dir  string // the bundle
}

// runtimeTime bounds one command of a runtime.
const runtimeTime = 60 * time.Second

// bundleVersion is the version of the specification that bundles claim: the
// lowest that has all that they hold, since older runtimes refuse newer ones.
const bundleVersion = "1.0.2"

func (e *external) create(c *container, p *process, r createRequest) (_ child, err error) {
	run := c.shim.conf.RunDir
	e.root = filepath.Join(run, "runtimes", filepath.Base(e.path))
	e.dir = filepath.Join(run, "bundles", c.id)
	for _, d := range []string{e.root, filepath.Dir(e.dir)} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return nil, err
		}
	}
	if err := os.RemoveAll(e.dir); err != nil { // of a shim that was killed
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(e.dir, "rootfs"), 0o711); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			e.delete(c)
		}
	}()
	spec := *r.spec
	spec.Version = bundleVersion
	if len(r.rootfs) > 0 || spec.Root == nil {
		root := specs.Root{}
		if spec.Root != nil {
			root = *spec.Root
		}
		root.Path = filepath.Join(e.dir, "rootfs")
		spec.Root = &root
	} else if !filepath.IsAbs(spec.Root.Path) {
		root := *spec.Root
		root.Path = filepath.Join(r.bundle, root.Path)
		spec.Root = &root
	}
	spec.Linux = forLibseccomp(spec.Linux)
	var sources []BundleSource
	if spec.Mounts, sources, err = bundleSources(e.dir, spec.Mounts); err != nil {
		return nil, err
	}
	if err := writeJSON(filepath.Join(e.dir, "config.json"), &spec); err != nil {
		return nil, err
	}
	mounts := filepath.Join(e.dir, "mounts.json")
	if err := writeJSON(mounts, BundleMounts{Dir: filepath.Join(e.dir, "rootfs"), Mounts: r.rootfs, Sources: sources}); err != nil {
		return nil, err
	}
	pid, err := e.spawn(p, "create", []string{"create", "--bundle", e.dir}, []string{c.id}, func(args []string) *exec.Cmd {
		return e.run(context.Background(), mounts, e.mixedGroup(c), args)
	}, spec.Process, r.opts.ConsoleWidth, r.opts.ConsoleHeight)
	if err != nil {
		return nil, err
	}
	return newForeign(pid, func() error {
		said, err := e.output("start", c.id)
		return commandError(spec.Process, said, err)
	}, func(sig syscall.Signal) error {
		return e.command("kill", c.id, strconv.Itoa(int(sig)))
	})
}

// forLibseccomp leaves out rules for socketcall(2) that look at its first
// argument: libseccomp derives such rules from those for socket(2), bind(2) and
// so on, and takes ours for a contradiction.
func forLibseccomp(l *specs.Linux) *specs.Linux {
	const name = "socketcall"
	if l == nil || l.Seccomp == nil || !slices.ContainsFunc(l.Seccomp.Syscalls, func(r specs.LinuxSyscall) bool {
		return len(r.Args) > 0 && slices.Contains(r.Names, name)
	}) {
		return l
	}
	linux, filter := *l, *l.Seccomp
	linux.Seccomp, filter.Syscalls = &filter, nil
	for _, r := range l.Seccomp.Syscalls {
		if len(r.Args) > 0 && slices.Contains(r.Names, name) {
			r.Names = slices.DeleteFunc(slices.Clone(r.Names), func(s string) bool { return s == name })
			if len(r.Names) == 0 {
				continue
			}
		}
		filter.Syscalls = append(filter.Syscalls, r)
	}
	return &linux
}

func (e *external) exec(c *container, p *process, process *specs.Process) (child, error) {
	dir, err := os.MkdirTemp(e.dir, "exec-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "process.json")
	if p.terminal && (p.width > 0 || p.height > 0) { // the program runs before anything else can say it
		sized := *process
		sized.ConsoleSize = &specs.Box{Width: uint(p.width), Height: uint(p.height)}
		process = &sized
	}
	if err := writeJSON(file, process); err != nil {
		return nil, err
	}
	// The command runs the program at once; there is no barrier.
	pid, err := e.spawn(p, "exec", []string{"exec", "--detach", "--process", file}, []string{c.id}, func(args []string) *exec.Cmd {
		return e.run(context.Background(), "", e.mixedGroup(c), args)
	}, process, p.width, p.height)
	if err != nil {
		return nil, err
	}
	return newForeign(pid, func() error { return nil }, nil)
}

// spawn runs a command that leaves a process behind, and returns its pid.
func (e *external) spawn(p *process, name string, args, rest []string, command func([]string) *exec.Cmd, sp *specs.Process, width, height uint32) (pid int, err error) {
	dir, err := os.MkdirTemp(e.dir, name+"-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	pidFile, logFile := filepath.Join(dir, "pid"), filepath.Join(dir, "log")
	var console *net.UnixListener
	args = append(args, "--pid-file", pidFile)
	if p.terminal {
		// By a short name: a socket's path may have 107 bytes.
		short, err := os.MkdirTemp(filepath.Dir(filepath.Dir(e.dir)), "c")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(short)
		sock := filepath.Join(short, "s")
		if console, err = net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"}); err != nil {
			return 0, err
		}
		defer console.Close()
		args = append(args, "--console-socket", sock)
	}
	cmd := command(e.global(logFile, append(args, rest...)))
	// What is not there is not /dev/null: crun gives its standard streams to the
	// container's user, and that would be the host's node.
	in, none, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	none.Close()
	defer in.Close()
	sink, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		return 0, err
	}
	defer sink.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = cmp.Or(p.io.in, in), cmp.Or(p.io.out, sink), cmp.Or(p.io.err, sink)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("runtime: %w", err)
	}
	stop := time.AfterFunc(runtimeTime, func() { _ = cmd.Process.Kill() }) // else it has ended
	defer stop.Stop()
	if console != nil {
		master, err := receiveConsole(console, cmd)
		if err != nil {
			_ = cmd.Process.Kill() // it may have ended
			werr := cmd.Wait()
			return 0, e.failure(name, sp, errors.Join(err, werr), logFile, p)
		}
		if err := p.io.setConsole(master); err != nil {
			_ = cmd.Process.Kill() // the error says more
			_ = cmd.Wait()
			return 0, err
		}
		if width > 0 || height > 0 { // not every runtime heeds the process's own ConsoleSize
			if err := p.io.resize(width, height); err != nil {
				_ = cmd.Process.Kill() // the error says more
				_ = cmd.Wait()
				return 0, err
			}
		}
	}
	if err := cmd.Wait(); err != nil {
		return 0, e.failure(name, sp, err, logFile, p)
	}
	b, err := os.ReadFile(pidFile)
	if err != nil {
		return 0, fmt.Errorf("runtime %s: %w", e.path, err)
	}
	if pid, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil || pid <= 1 {
		return 0, fmt.Errorf("runtime %s: pid file holds %.20q: %w", e.path, b, errdefs.ErrInternal)
	}
	return pid, nil
}

// run is the runtime's command with these arguments, by way of BundleCommand:
// with the mounts of a file and in a cgroup (empty: none).
func (e *external) run(ctx context.Context, mounts, group string, args []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, e.self, append([]string{BundleCommand, mounts, group, e.path}, args...)...)
	cmd.Args[0] = "tenon-shim"
	return cmd
}

// mixedGroup is the container's directory in a hierarchy of cgroup v2 that is
// beside those of v1: runtimes put their processes into those only.
func (e *external) mixedGroup(c *container) string {
	if len(c.group.JoinV1()) == 0 {
		return ""
	}
	return c.group.V2()
}

func (e *external) global(logFile string, args []string) []string {
	list := append([]string(nil), e.args...)
	list = append(list, "--root", e.root)
	if logFile != "" {
		list = append(list, "--log", logFile, "--log-format", "json")
	}
	return append(list, args...)
}

// failure makes an error of a failed command, in the runtime's own words.
func (e *external) failure(name string, sp *specs.Process, err error, logFile string, p *process) error {
	said := lastLog(logFile)
	if said == "" && p != nil {
		said = p.io.peekErr()
	}
	if said == "" {
		return fmt.Errorf("runtime %s: %s: %w", e.path, name, err)
	}
	return commandError(sp, said, fmt.Errorf("runtime %s: %s: %s", e.path, name, said))
}

// commandError is err, with which a command for a process failed, under the
// sentence that clients look for if what the runtime said means that the user's
// program can't be executed.
func commandError(p *specs.Process, said string, err error) error {
	if err == nil || p == nil || len(p.Args) == 0 {
		return err
	}
	lower := strings.ToLower(said)
	has := func(s string) bool { return strings.Contains(lower, s) }
	program := p.Args[0]
	missing := has("no such file or directory")
	switch {
	case missing && len(p.Cwd) > 1 && strings.Contains(said, p.Cwd) && !strings.HasPrefix(program, p.Cwd):
		return fmt.Errorf("working directory %s: no such file or directory: %w: %w", p.Cwd, err, errdefs.ErrNotFound)
	case has("executable") && has("not found"), has("exec") && missing:
		if strings.Contains(program, "/") {
			return fmt.Errorf("exec: %q: no such file or directory: %w: %w", program, err, errdefs.ErrNotFound)
		}
		return fmt.Errorf("exec: %q: executable file not found in $PATH: %w: %w", program, err, errdefs.ErrNotFound)
	case (has("exec") || has("failed to load")) && (has("permission denied") || has("operation not permitted") || has("exec format error")),
		has("is not a regular file"):
		return fmt.Errorf("exec: %q: permission denied: %w: %w", program, err, errdefs.ErrPermissionDenied)
	}
	return err
}

// lastLog is the last error in a runtime's log.
func lastLog(path string) (said string) {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(b) {
		var m struct{ Level, Msg string }
		if json.Unmarshal(line, &m) == nil && m.Msg != "" && m.Level != "debug" && m.Level != "info" && m.Level != "warning" {
			said = m.Msg
		}
	}
	return said
}

// peekErr is what a command that failed wrote to the process's stderr.
func (s *stdio) peekErr() string {
	s.childEnds()
	if len(s.outs) < 2 {
		return ""
	}
	_ = s.outs[1].SetReadDeadline(time.Now().Add(100 * time.Millisecond)) // a pipe has deadlines
	b := make([]byte, 4096)
	n, _ := s.outs[1].Read(b) // nothing to read is an answer
	return strings.TrimSpace(string(b[:n]))
}

// command runs a command to its end.
func (e *external) command(name string, args ...string) error {
	_, err := e.output(name, args...)
	return err
}

// output is command that returns what the runtime said of its failure, too.
func (e *external) output(name string, args ...string) (said string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), runtimeTime)
	defer cancel()
	var stderr bytes.Buffer
	cmd := e.run(ctx, "", "", e.global("", append([]string{name}, args...)))
	cmd.Stderr = &limited{b: &stderr, left: 4096}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err = cmd.Run(); err == nil {
		return "", nil
	}
	said = strings.TrimSpace(stderr.String())
	if name == "kill" && (strings.Contains(said, "not running") || strings.Contains(said, "No such process") || strings.Contains(said, "already finished")) {
		return said, syscall.ESRCH
	}
	return said, fmt.Errorf("runtime %s: %s: %w: %s", e.path, name, err, said)
}

// delete frees what the runtime and the bundle hold.
func (e *external) delete(c *container) {
	if err := e.command("delete", "--force", c.id); err != nil && !strings.Contains(err.Error(), "does not exist") {
		c.shim.log.Debug("runtime did not delete", "container", c.id, "err", err)
	}
	if err := os.RemoveAll(e.dir); err != nil {
		c.shim.log.Warn("bundle stays", "container", c.id, "err", err)
	}
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// receiveConsole takes the pty's master that a runtime sends.
func receiveConsole(l *net.UnixListener, cmd *exec.Cmd) (*os.File, error) {
	_ = l.SetDeadline(time.Now().Add(runtimeTime)) // a listener has deadlines
	gone := make(chan struct{})
	defer close(gone)
	go func() { // a runtime that fails never connects
		for {
			select {
			case <-gone:
				return
			case <-time.After(50 * time.Millisecond):
				if st, err := processState(cmd.Process.Pid); err == nil && st == "Z" {
					_ = l.SetDeadline(time.Unix(1, 0))
					return
				}
			}
		}
	}()
	conn, err := l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("console: %w", err)
	}
	defer conn.Close()
	var b [4096]byte
	var oob [64]byte
	_, n, _, _, err := conn.ReadMsgUnix(b[:], oob[:])
	if err != nil {
		return nil, fmt.Errorf("console: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("console: no descriptor came: %w", errdefs.ErrInternal)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("console: no descriptor came: %w", errdefs.ErrInternal)
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), "/dev/ptmx"), nil
}

func processState(pid int) (string, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", err
	}
	p, err := parseStat(string(b))
	if err != nil {
		return "", err
	}
	return p.state, nil
}
