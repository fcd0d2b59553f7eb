package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/cgroup"
	"tenon.dev/tenon/internal/launch"
	"tenon.dev/tenon/internal/launch/fork"
)

type execOptions struct {
	launchOptions
	process      string
	cwd, user    string
	env, caps    []string
	groups       []string
	tty          bool
	noNewPrivs   bool
	ignorePaused bool
	apparmor     string
	label        string
	cgroup       string
}

var executing execOptions

func execFlags(f *flagSet) {
	o := &executing
	f.str(&o.process, "process", "", "file with the process as JSON")
	f.short("p")
	f.str(&o.consoleSocket, "console-socket", "", "unix socket that the console's master is sent to")
	f.str(&o.pidFile, "pid-file", "", "file that the process id is written to")
	f.str(&o.cwd, "cwd", "", "working directory")
	f.str(&o.user, "user", "", "UID[:GID]")
	f.short("u")
	f.list(&o.env, "env", "e", "KEY=VALUE")
	f.list(&o.caps, "cap", "c", "a capability more")
	f.list(&o.groups, "additional-gids", "g", "a group more")
	f.boolean(&o.tty, "tty", "t", "with a terminal")
	f.boolean(&o.detach, "detach", "d", "do not wait for the end")
	f.boolean(&o.noNewPrivs, "no-new-privs", "", "set no_new_privs")
	f.boolean(&o.ignorePaused, "ignore-paused", "", "also in a paused container")
	f.str(&o.apparmor, "apparmor", "", "AppArmor profile")
	f.str(&o.label, "process-label", "", "SELinux label")
	f.str(&o.cgroup, "cgroup", "", "cgroup below the container's")
	f.number(&o.preserve, "preserve-fds", "descriptors from 3 on that the program inherits")
	f.boolean(&o.ignored, "no-subreaper", "", "accepted: exec is no subreaper")
}

func runExec(a *app, f *flagSet) (int, error) {
	id, err := f.id()
	if err != nil {
		return 255, err
	}
	if err := fork.Protect(); err != nil {
		return 255, err
	}
	status, err := a.exec(id, f.args[1:], f.given("no-new-privs"))
	if err != nil {
		return 255, &exitError{255, err}
	}
	return status, nil
}

func (a *app) exec(id string, args []string, setPrivs bool) (int, error) {
	o := &executing
	c, err := a.open(id)
	if err != nil {
		return 0, err
	}
	pidfd, err := c.pidfd()
	if err != nil {
		return 0, fmt.Errorf("cannot exec in a stopped container: %w", err)
	}
	defer unix.Close(pidfd)
	b, err := c.base()
	if err != nil {
		return 0, err
	}
	process, err := o.processOf(b.Process, args, setPrivs)
	if err != nil {
		return 0, err
	}
	switch {
	case process.Terminal && o.consoleSocket == "" && o.detach:
		return 0, errors.New("a terminal needs --console-socket with --detach")
	case !process.Terminal && o.consoleSocket != "":
		return 0, errors.New("--console-socket needs a terminal")
	}
	group, err := c.execGroup(o)
	if err != nil {
		return 0, err
	}
	extra, err := extraFiles(o.preserve)
	if err != nil {
		return 0, err
	}
	plan, err := launch.CompileExec(process, launch.ExecOptions{
		Pidfd: pidfd, Cgroup: group, Preserve: len(extra),
		Filter: b.filter, Personality: b.Personality,
	})
	if err != nil {
		return 0, err
	}
	var signals *relay
	if !o.detach {
		signals = catchSignals()
	}
	proc, err := fork.Start(plan, fork.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Extra: extra})
	if err != nil {
		return 0, explain(err, process)
	}
	if err := c.sendListener(proc, b.linux, statusRunning); err != nil {
		_ = proc.Signal(unix.SIGKILL) // the error says why
		return 0, err
	}
	return a.execStarted(o, proc, process, signals, func() { b.keep(c) })
}

// execStarted lets the process run, and then calls ran.
func (a *app) execStarted(o *execOptions, proc *fork.Process, process *specs.Process, signals *relay, ran func()) (_ int, err error) {
	defer func() {
		if err != nil {
			_ = proc.Signal(unix.SIGKILL) // the error says why
		}
	}()
	for _, w := range proc.Warnings {
		a.warn(w)
	}
	if o.consoleSocket != "" {
		if err := sendConsole(o.consoleSocket, proc.Console); err != nil {
			return 0, err
		}
	}
	signals.ready()
	if err := proc.Exec(); err != nil {
		return 0, explain(err, process)
	}
	if err := writePid(o.pidFile, proc.Pid); err != nil {
		return 0, err
	}
	ran()
	if o.detach {
		return 0, proc.Close()
	}
	exit, err := attend(proc, signals, o.consoleSocket == "")
	return exit.Code, err
}

// execGroup is where the process goes: the container's cgroup, unless a part
// of it is named, and unless it is frozen.
func (c *container) execGroup(o *execOptions) (*cgroup.Group, error) {
	group, err := c.group()
	if err != nil {
		return nil, err
	}
	if !o.ignorePaused {
		if frozen, err := group.Frozen(); err == nil && frozen {
			return nil, errors.New("cannot exec in a paused container (use --ignore-paused to do it anyway)")
		}
	}
	if o.cgroup == "" {
		return group, nil
	}
	if slices.Contains(strings.Split(o.cgroup, "/"), "..") {
		return nil, fmt.Errorf("--cgroup %s: not below the container's", o.cgroup)
	}
	return cgroup.Load(c.Cgroup + "/" + strings.TrimPrefix(o.cgroup, "/"))
}

// processOf is the process to run: of a file, or the container's own with the
// flags applied.
func (o *execOptions) processOf(own *specs.Process, args []string, setPrivs bool) (*specs.Process, error) {
	var p specs.Process
	if o.process != "" {
		raw, err := os.ReadFile(o.process)
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(raw, &p); err != nil {
			return nil, fmt.Errorf("--process %s: %w", o.process, err)
		}
	} else {
		if len(args) == 0 {
			return nil, errors.New("exec: no command")
		}
		p = *own
		p.Args, p.Terminal, p.ConsoleSize = args, false, nil
	}
	if o.cwd != "" {
		p.Cwd = o.cwd
	}
	p.Env = lastWins(append(slices.Clip(p.Env), o.env...))
	p.Terminal = p.Terminal || o.tty
	if setPrivs {
		p.NoNewPrivileges = o.noNewPrivs
	}
	if o.apparmor != "" {
		p.ApparmorProfile = o.apparmor
	}
	if o.label != "" {
		p.SelinuxLabel = o.label
	}
	if len(o.caps) > 0 {
		p.Capabilities = moreCaps(p.Capabilities, o.caps)
	}
	if err := setUser(&p.User, o.user); err != nil {
		return nil, err
	}
	for _, g := range o.groups {
		gid, err := strconv.ParseUint(g, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("--additional-gids %s: %w", g, err)
		}
		p.User.AdditionalGids = append(slices.Clip(p.User.AdditionalGids), uint32(gid))
	}
	return &p, nil
}

// moreCaps adds capabilities to all sets that a process of root works with.
func moreCaps(have *specs.LinuxCapabilities, caps []string) *specs.LinuxCapabilities {
	c := specs.LinuxCapabilities{}
	if have != nil {
		c = *have
	}
	add := func(set []string) []string {
		for _, name := range caps {
			if !strings.HasPrefix(name, "CAP_") {
				name = "CAP_" + strings.ToUpper(name)
			}
			if !slices.Contains(set, name) {
				set = append(slices.Clip(set), name)
			}
		}
		return set
	}
	c.Bounding, c.Effective, c.Permitted = add(c.Bounding), add(c.Effective), add(c.Permitted)
	return &c
}

func setUser(u *specs.User, flag string) error {
	if flag == "" {
		return nil
	}
	uid, gid, both := strings.Cut(flag, ":")
	n, err := strconv.ParseUint(uid, 10, 32)
	if err != nil {
		return fmt.Errorf("--user %s: %w", flag, err)
	}
	u.UID = uint32(n)
	if both {
		if n, err = strconv.ParseUint(gid, 10, 32); err != nil {
			return fmt.Errorf("--user %s: %w", flag, err)
		}
		u.GID = uint32(n)
	}
	return nil
}
