package oci

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/cgroup"
	"tenon.dev/tenon/internal/launch"
	"tenon.dev/tenon/internal/launch/fork"
)

// launchOptions are the flags of create and run, and most of exec's.
type launchOptions struct {
	bundle        string
	consoleSocket string
	pidFile       string
	preserve      *int64
	noPivot       bool
	noKeyring     bool
	detach        bool
	keep          bool
	ignored       bool
	config        string
}

var launching launchOptions

func createFlags(f *flagSet) {
	o := &launching
	f.str(&o.bundle, "bundle", ".", "directory of config.json (default .)")
	f.short("b")
	f.str(&o.config, "config", "config.json", "name of the specification in the bundle")
	f.short("f")
	f.str(&o.consoleSocket, "console-socket", "", "unix socket that the console's master is sent to")
	f.str(&o.pidFile, "pid-file", "", "file that the process id is written to")
	f.number(&o.preserve, "preserve-fds", "descriptors from 3 on that the program inherits")
	f.boolean(&o.noPivot, "no-pivot", "", "for a root that is an initramfs")
	f.boolean(&o.noKeyring, "no-new-keyring", "", "leave the caller's session keyring")
	f.boolean(&o.ignored, "no-subreaper", "", "accepted: run is no subreaper")
}

func runFlags(f *flagSet) {
	createFlags(f)
	f.boolean(&launching.detach, "detach", "d", "do not wait for the end")
	f.boolean(&launching.keep, "keep", "", "do not delete the container at its end")
}

// making is a container on its way.
type making struct {
	*container
	app   *app
	opts  launchOptions
	spec  *specs.Spec
	group *cgroup.Group
	proc  *fork.Process
	gate  [2]*os.File // open until create returns
}

func runCreate(a *app, f *flagSet) (int, error) {
	id, err := f.id()
	if err != nil {
		return 1, err
	}
	if err := fork.Protect(); err != nil {
		return 1, err
	}
	m := &making{app: a, opts: launching}
	if m.container, err = a.create(id); err != nil {
		return 1, err
	}
	defer m.close()
	if err := m.make(true); err != nil {
		return 1, err
	}
	return 0, m.proc.Close()
}

// make takes the container to the barrier; with gated, another command lifts
// it. Nothing is left of a container that fails.
func (m *making) make(gated bool) (err error) {
	defer func() {
		if err != nil {
			m.undo()
		}
	}()
	if err := m.readSpec(); err != nil {
		return err
	}
	if err := m.save(); err != nil {
		return err
	}
	if err := m.makeCgroup(); err != nil {
		return err
	}
	if err := m.start(gated); err != nil {
		return err
	}
	m.Pid = m.proc.Pid
	if m.PidStart, err = startTime(m.Pid); err != nil {
		return err
	}
	if err := m.sendConsole(); err != nil {
		return err
	}
	if err := m.sendListener(m.proc, m.spec.Linux, specs.StateCreating); err != nil {
		return err
	}
	if err := m.save(); err != nil {
		return err
	}
	return writePid(m.opts.pidFile, m.Pid)
}

// undo removes what make made. Failures are not reported: the first error is
// why we are here, and delete --force finds the rest.
func (m *making) undo() {
	if m.proc != nil {
		_ = m.proc.Signal(unix.SIGKILL)
		_, _ = m.proc.Wait()
		_ = m.proc.Close()
		m.runPoststop(m.app, m.spec)
	}
	if m.group != nil {
		ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
		defer cancel()
		if m.group.Kill(unix.SIGKILL) != nil || m.group.Delete(ctx) != nil {
			return // the directory stays, so that delete --force can try again
		}
	}
	_ = os.RemoveAll(m.dir)
}

func (m *making) readSpec() error {
	bundle, err := filepath.Abs(m.opts.bundle)
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(filepath.Join(bundle, m.opts.config))
	if err != nil {
		return err
	}
	if m.spec, err = decodeSpec(raw); err != nil {
		return err
	}
	if m.spec.Linux == nil {
		m.spec.Linux = &specs.Linux{}
	}
	if m.spec.Process == nil {
		return errors.New("config.json: process: is missing")
	}
	if m.spec.Process.Terminal && m.opts.consoleSocket == "" && (m.opts.detach || !m.foreground()) {
		return errors.New("process.terminal needs --console-socket")
	}
	if !m.spec.Process.Terminal && m.opts.consoleSocket != "" {
		return errors.New("--console-socket needs process.terminal")
	}
	m.OCIVersion, m.Bundle, m.Annotations = m.spec.Version, bundle, m.spec.Annotations
	if m.spec.Root != nil {
		m.Rootfs = m.spec.Root.Path
		if !filepath.IsAbs(m.Rootfs) {
			m.Rootfs = filepath.Join(bundle, m.Rootfs)
		}
	}
	m.Created = time.Now().UTC()
	m.Owner = owner()
	m.listenFDs()
	m.spec.Process.Env = lastWins(m.spec.Process.Env)
	if m.Cgroup, err = cgroupPath(m.spec.Linux.CgroupsPath, m.ID, m.app.systemd); err != nil {
		return err
	}
	return writeAtomic(m.path("config.json"), raw, 0o600)
}

// owner is the name of the calling user. Root is by far the usual one.
func owner() string {
	uid := os.Getuid()
	if uid == 0 {
		return "root"
	}
	u, err := user.LookupId(strconv.Itoa(uid))
	if err != nil {
		return strconv.Itoa(uid)
	}
	return u.Username
}

// foreground tells whether this command waits: run, without --detach.
func (m *making) foreground() bool { return m.app.waits }

// listenFDs passes socket activation on, as runc does: the descriptors of
// LISTEN_FDS, for the program that will be pid 1.
func (m *making) listenFDs() {
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n <= 0 {
		return
	}
	m.spec.Process.Env = append(m.spec.Process.Env, "LISTEN_FDS="+strconv.Itoa(n), "LISTEN_PID=1")
	total := int64(n)
	if m.opts.preserve != nil {
		total += *m.opts.preserve
	}
	m.opts.preserve = &total
}

// lastWins drops variables that are set again later, as runc and crun do: most
// programs look at the first of a name.
func lastWins(env []string) []string {
	last := make(map[string]int, len(env))
	for i, e := range env {
		name, _, _ := strings.Cut(e, "=")
		last[name] = i
	}
	kept := make([]string, 0, len(last))
	for i, e := range env {
		if name, _, _ := strings.Cut(e, "="); last[name] == i {
			kept = append(kept, e)
		}
	}
	return kept
}

// cgroupPath is the cgroup of a container below the hierarchies' roots. A
// relative path and none are taken from there too.
func cgroupPath(configured, id string, systemd bool) (string, error) {
	if systemd && strings.Count(configured, ":") == 2 {
		parts := strings.Split(configured, ":")
		slice, prefix, name := parts[0], parts[1], parts[2]
		if slice == "" {
			slice = "system.slice"
		}
		expanded, err := expandSlice(slice)
		if err != nil {
			return "", err
		}
		unit := name
		if !strings.HasSuffix(unit, ".slice") {
			unit = prefix + "-" + name + ".scope"
		}
		return expanded + "/" + unit, nil
	}
	if configured == "" {
		configured = id
	}
	clean := filepath.Clean("/" + configured)
	if clean == "/" || slices.Contains(strings.Split(configured, "/"), "..") {
		return "", fmt.Errorf("linux.cgroupsPath: %q is no place for a container", configured)
	}
	return clean, nil
}

// expandSlice is where systemd puts a slice: a-b.slice in /a.slice/a-b.slice.
func expandSlice(slice string) (string, error) {
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || strings.Contains(name, "/") {
		return "", fmt.Errorf("linux.cgroupsPath: %q is no slice", slice)
	}
	if name == "-" {
		return "", nil
	}
	path, prefix := "", ""
	for part := range strings.SplitSeq(name, "-") {
		if part == "" {
			return "", fmt.Errorf("linux.cgroupsPath: %q is no slice", slice)
		}
		path += "/" + prefix + part + ".slice"
		prefix += part + "-"
	}
	return path, nil
}

func (m *making) makeCgroup() (err error) {
	// Engines that drive OCI runtimes read statistics and freeze on their own.
	m.group, err = cgroup.Create(m.Cgroup, withDefaultDevices(m.spec.Linux.Resources),
		"cpu", "cpuacct", "freezer")
	if uid, ok := launch.CgroupOwner(m.spec); ok && err == nil {
		err = m.group.Delegate(uid)
	}
	return err
}

// start forks the child up to its barrier.
func (m *making) start(gated bool) error {
	extra, err := extraFiles(m.opts.preserve)
	if err != nil {
		return err
	}
	plan, err := launch.Compile(m.spec, launch.Options{
		Bundle: m.Bundle, Cgroup: m.group, Preserve: len(extra), NoPivot: m.opts.noPivot, NoNewKeyring: m.opts.noKeyring,
		Phases: phases(m.spec.Hooks), Gate: gated,
	})
	if err != nil {
		return err
	}
	stdio := fork.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Extra: extra, AtPhase: m.atPhase}
	if gated {
		if err := m.openGate(); err != nil {
			return err
		}
		stdio.Gate, stdio.GateStatus = m.gate[0], m.gate[1]
		defer m.gate[0].Close()
		defer m.gate[1].Close()
	}
	if gated {
		m.keepSteps(plan)
	}
	if m.proc, err = fork.Start(plan, stdio); err != nil {
		return explain(err, m.spec.Process)
	}
	for _, w := range m.proc.Warnings {
		m.app.warn(w)
	}
	return nil
}

// keepSteps records the names of the steps after the barrier, for start.
func (m *making) keepSteps(plan *launch.Plan) {
	for _, in := range plan.Code {
		if in.Nr == launch.OpBarrier {
			m.FirstStep = in.Step
		}
	}
	for _, step := range plan.Steps[m.FirstStep:] {
		m.Steps = append(m.Steps, step.Name)
	}
}

// extraFiles are the inherited descriptors from 3 on.
func extraFiles(n *int64) ([]*os.File, error) {
	if n == nil {
		return nil, nil
	}
	var files []*os.File
	for fd := 3; fd < 3+int(*n); fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			return nil, fmt.Errorf("--preserve-fds %d: descriptor %d is not open", *n, fd)
		}
		files = append(files, os.NewFile(uintptr(fd), "preserved"))
	}
	return files, nil
}

// The gate's files. Opened for reading and writing, so that neither side ever
// waits for the other to open them.
const gateName, gateStatusName = "gate", "gate.status"

func (m *making) openGate() error {
	for i, name := range []string{gateName, gateStatusName} {
		if err := unix.Mkfifo(m.path(name), 0o600); err != nil {
			return &fs.PathError{Op: "mkfifo", Path: m.path(name), Err: err}
		}
		fd, err := unix.Open(m.path(name), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return &fs.PathError{Op: "open", Path: m.path(name), Err: err}
		}
		m.gate[i] = os.NewFile(uintptr(fd), name)
	}
	return nil
}

// explain says a failed exec in the words that Docker, containerd and Podman
// know, so that their own exit status (126, 127) is right.
func explain(err error, p *specs.Process) error {
	var step *fork.StepError
	if !errors.As(err, &step) || len(p.Args) == 0 || !strings.HasPrefix(step.Step, "exec") {
		return err
	}
	program := p.Args[0]
	if step.Errno == unix.ENOENT && !strings.Contains(program, "/") {
		return fmt.Errorf("exec: %q: executable file not found in $PATH", program)
	}
	return fmt.Errorf("exec: %q: %w", program, step.Errno)
}

func writePid(path string, pid int) error {
	if path == "" {
		return nil
	}
	return writeAtomic(path, []byte(strconv.Itoa(pid)), 0o644)
}

func runStart(a *app, f *flagSet) (int, error) {
	id, err := f.id()
	if err != nil {
		return 1, err
	}
	c, err := a.openLocked(id)
	if err != nil {
		return 1, err
	}
	defer c.close()
	switch s := c.status(); s {
	case statusCreated:
	case statusStopped:
		return 1, fmt.Errorf("cannot start a container that has stopped")
	default:
		return 1, fmt.Errorf("cannot start an already %s container", s)
	}
	return 0, c.start(a)
}

// start lifts the gate of a created container.
func (c *container) start(a *app) error {
	s, err := c.spec()
	if err != nil {
		return err
	}
	if s.Hooks != nil && len(s.Hooks.StartContainer) > 0 {
		if err := c.hooksInside(s.Hooks.StartContainer, specs.StateCreated); err != nil {
			c.kill()
			return err
		}
	}
	status, err := unix.Open(c.path(gateStatusName), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: c.path(gateStatusName), Err: err}
	}
	if err := unix.SetNonblock(status, false); err != nil {
		return err
	}
	statusFile := os.NewFile(uintptr(status), gateStatusName)
	defer statusFile.Close()
	gate, err := unix.Open(c.path(gateName), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == unix.ENXIO { // no reader
		return errNotRunning
	} else if err != nil {
		return &fs.PathError{Op: "open", Path: c.path(gateName), Err: err}
	}
	defer unix.Close(gate)
	if _, err := unix.Write(gate, []byte{1}); err != nil {
		return &fs.PathError{Op: "write", Path: c.path(gateName), Err: err}
	}
	// The program's exec closes the child's end: then there is an end of file.
	if err := c.readGateStatus(statusFile, s.Process); err != nil {
		return err
	}
	c.Started = true
	if err := c.save(); err != nil {
		return err
	}
	_ = os.Remove(c.path(gateName)) // delete removes the directory anyway
	_ = os.Remove(c.path(gateStatusName))
	if s.Hooks != nil {
		c.hooksOutside(a, s.Hooks.Poststart, statusRunning)
	}
	return nil
}

// kill ends a container that failed to start; its end is not waited for.
func (c *container) kill() {
	if fd, err := c.pidfd(); err == nil {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		unix.Close(fd)
	}
}
