// Package oci is the command tenon-oci: an OCI runtime with the command line
// of runc and crun, which Docker, Podman and containerd can use in their place.
//
// It is the shim's launcher (packages launch, fork, cgroup) behind one-shot
// commands. What has to outlive a command lies below the root directory:
//
//	ROOT/ID/state.json    version, pid and start time, bundle, cgroup (rewritten atomically)
//	ROOT/ID/config.json   the specification as it was at create
//	ROOT/ID/gate          FIFO: between create and start, the container's
//	                      process waits for a byte of it
//	ROOT/ID/gate.status   FIFO: a failed exec is told to start
//
// Commands that change a container hold an flock on its directory. Everything
// else about a container is asked of the kernel each time: its process by pid
// and start time, its cgroup, its state by the freezer and the gate.
//
// Commands start in about a millisecond: nothing here or below may have costly
// package initialisation.
package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"
)

// Version is the version that --version prints; the program sets it.
var Version = "dev"

// app is one invocation: the global flags and where output goes.
type app struct {
	name      string
	root      string
	log       string
	logFormat string
	debug     bool
	systemd   bool // cgroup paths are slice:prefix:name
	stdin     io.Reader
	stdout    io.Writer
	stderr    io.Writer
	waits     bool // run without --detach
}

// command is one subcommand.
type command struct {
	name, args, about string
	flags             func(*flagSet)
	run               func(a *app, f *flagSet) (int, error)
	raw               bool // arguments after the first belong to the container's program
}

// exitError is a failure with a status of its own.
type exitError struct {
	status int
	err    error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func commands() []command {
	return []command{
		{"create", "ID", "make a container; its program waits for start", createFlags, runCreate, false},
		{"start", "ID", "start the program of a created container", nil, runStart, false},
		{"run", "ID", "create and start; without --detach wait for its end", runFlags, runRun, false},
		{"exec", "ID [COMMAND [ARG…]]", "run a further process in a container", execFlags, runExec, true},
		{"state", "ID", "print the state as JSON", nil, runState, false},
		{"kill", "ID [SIGNAL]", "send a signal (default TERM)", killFlags, runKill, false},
		{"delete", "ID", "remove a stopped container", deleteFlags, runDelete, false},
		{"list", "", "list containers", listFlags, runList, false},
		{"ps", "ID [PS-OPTION…]", "list the processes of a container", psFlags, runPs, true},
		{"pause", "ID", "freeze a container", nil, runPause, false},
		{"resume", "ID", "let a paused container go on", nil, runResume, false},
		{"update", "ID", "change resource limits", updateFlags, runUpdate, false},
		{"events", "ID", "print statistics and out-of-memory events", eventsFlags, runEvents, false},
		{"spec", "", "write an example config.json", specFlags, runSpec, false},
		{"features", "", "print what this runtime supports as JSON", nil, runFeatures, false},
		{"checkpoint", "ID", "not supported", anyFlags, refuse("checkpoint"), true},
		{"restore", "ID", "not supported", anyFlags, refuse("restore"), true},
	}
}

func anyFlags(f *flagSet) { f.any = true }

func refuse(what string) func(*app, *flagSet) (int, error) {
	return func(*app, *flagSet) (int, error) {
		return 1, fmt.Errorf("%s: not supported by this runtime (it needs CRIU, which tenon-oci does not drive)", what)
	}
}

// Main runs the command line args (without the program's name) and returns the
// exit status.
func Main(args []string) int {
	debug.SetGCPercent(-1) // a command lives for milliseconds; run and exec turn it on while they wait
	a := &app{name: "tenon-oci", stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	status, err := a.main(args)
	if err != nil {
		var exit *exitError
		if errors.As(err, &exit) {
			status = exit.status
		} else if status == 0 {
			status = 1
		}
		a.report(err)
	}
	return status
}

func (a *app) main(args []string) (int, error) {
	g := newFlagSet("tenon-oci")
	g.inOrder = true
	g.str(&a.root, "root", "", "directory of the containers' state (default /run/tenon-oci)")
	g.str(&a.log, "log", "", "file that errors are written to")
	g.str(&a.logFormat, "log-format", "text", "text or json")
	g.boolean(&a.debug, "debug", "", "log more")
	g.boolean(&a.systemd, "systemd-cgroup", "", "cgroup paths are slice:prefix:name")
	var manager, ignored, rootless string
	g.str(&manager, "cgroup-manager", "", "cgroupfs, systemd or disabled")
	g.str(&rootless, "rootless", "auto", "only false and auto")
	g.str(&ignored, "criu", "", "ignored")
	g.str(&ignored, "log-level", "", "ignored; see --debug")
	var help, version bool
	g.boolean(&help, "help", "h", "this text")
	g.boolean(&version, "version", "v", "print the version")
	if err := g.parse(args); err != nil {
		return 1, err
	}
	switch {
	case version:
		fmt.Fprintf(a.stdout, "tenon-oci version %s\nspec: %s\n", Version, specVersion)
		return 0, nil
	case help || len(g.args) == 0:
		a.usage(g)
		return 0, nil
	case rootless == "true":
		return 1, errors.New("--rootless=true: this runtime needs root")
	}
	switch manager {
	case "", "cgroupfs":
	case "systemd":
		a.systemd = true
	default:
		return 1, fmt.Errorf("--cgroup-manager %s: not supported (cgroupfs, systemd)", manager)
	}
	if a.root == "" {
		a.root = "/run/tenon-oci"
	}
	root, err := filepath.Abs(a.root)
	if err != nil {
		return 1, err
	}
	a.root = root
	return a.dispatch(g.args)
}

func (a *app) dispatch(args []string) (int, error) {
	if args[0] == "help" {
		args = []string{"--help"}
		a.usage(newFlagSet("tenon-oci"))
		return 0, nil
	}
	for _, c := range commands() {
		if c.name != args[0] {
			continue
		}
		f := newFlagSet(c.name)
		f.inOrder = c.raw
		if c.flags != nil {
			c.flags(f)
		}
		var help bool
		f.boolean(&help, "help", "h", "this text")
		if err := f.parse(args[1:]); err != nil {
			return 1, err
		}
		if help {
			fmt.Fprintf(a.stdout, "tenon-oci %s [flags] %s\n  %s\n\n%s", c.name, c.args, c.about, f.usage())
			return 0, nil
		}
		return c.run(a, f)
	}
	return 1, fmt.Errorf("unknown command %q (see tenon-oci --help)", args[0])
}

func (a *app) usage(g *flagSet) {
	fmt.Fprintf(a.stdout, "tenon-oci [global flags] COMMAND [flags] …: an OCI runtime\n\nCommands:\n")
	for _, c := range commands() {
		fmt.Fprintf(a.stdout, "  %-11s %s\n", c.name, c.about)
	}
	fmt.Fprintf(a.stdout, "\nGlobal flags:\n%s", g.usage())
}

// report writes an error where the caller looks for it: to standard error, and
// to the log in the format that containerd, Docker and Podman parse.
func (a *app) report(err error) {
	fmt.Fprintf(a.stderr, "%s: %v\n", a.name, err)
	a.logf("error", err.Error())
}

// logf appends one line to the log file, if there is one.
func (a *app) logf(level, message string) {
	if a.log == "" {
		return
	}
	f, err := os.OpenFile(a.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		fmt.Fprintf(a.stderr, "%s: %v\n", a.name, err)
		return
	}
	defer f.Close()
	line := fmt.Sprintf("time=%q level=%s msg=%q\n", time.Now().Format(time.RFC3339Nano), level, message)
	if a.logFormat == "json" {
		raw, err := json.Marshal(struct {
			Level string `json:"level"`
			Msg   string `json:"msg"`
			Time  string `json:"time"`
		}{level, message, time.Now().Format(time.RFC3339Nano)})
		if err != nil {
			return
		}
		line = string(raw) + "\n"
	}
	_, _ = f.WriteString(line) // standard error has it too
}

// warn tells of something that did not stop the command.
func (a *app) warn(message string) {
	a.logf("warning", message)
	if a.debug {
		fmt.Fprintf(a.stderr, "%s: warning: %s\n", a.name, message)
	}
}
