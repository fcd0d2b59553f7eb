package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var killAll bool

func killFlags(f *flagSet) {
	f.boolean(&killAll, "all", "a", "to all processes of the container")
}

func runKill(a *app, f *flagSet) (int, error) {
	id, err := f.id()
	if err != nil {
		return 1, err
	}
	sig := unix.SIGTERM
	if len(f.args) > 1 {
		if sig, err = parseSignal(f.args[1]); err != nil {
			return 1, err
		}
	}
	c, err := a.open(id)
	if err != nil {
		return 1, err
	}
	return 0, c.signal(sig)
}

// signal sends to the first process, or to all: when told to, and with
// SIGKILL where no pid namespace takes the others along.
func (c *container) signal(sig unix.Signal) error {
	all := killAll
	if sig == unix.SIGKILL && !all {
		if s, err := c.spec(); err == nil {
			all = !hasNamespace(s, specs.PIDNamespace)
		}
	}
	if all {
		g, err := c.group()
		if err != nil {
			return errNotRunning
		}
		if err := g.Kill(sig); err != nil {
			return err
		}
		return nil
	}
	fd, err := c.pidfd()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err == unix.ESRCH {
		return errNotRunning
	} else if err != nil {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	if sig == unix.SIGKILL {
		// A frozen process of cgroup v1 would die only when it is thawed.
		if g, err := c.group(); err == nil {
			if frozen, err := g.Frozen(); err == nil && frozen {
				ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
				defer cancel()
				return g.Thaw(ctx)
			}
		}
	}
	return nil
}

// parseSignal reads a number or a name, with or without SIG.
func parseSignal(s string) (unix.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 0 || n > 64 {
			return 0, fmt.Errorf("signal %s is unknown", s)
		}
		return unix.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return n, nil
	}
	for base, first := range map[string]int{"SIGRTMIN": 34, "SIGRTMAX": 64} {
		if rest, ok := strings.CutPrefix(name, base); ok {
			n := 0
			if rest != "" {
				var err error
				if n, err = strconv.Atoi(rest); err != nil {
					break
				}
			}
			if n += first; n >= 34 && n <= 64 {
				return unix.Signal(n), nil
			}
		}
	}
	return 0, fmt.Errorf("signal %s is unknown", s)
}

func runState(a *app, f *flagSet) (int, error) {
	id, err := f.id()
	if err != nil {
		return 1, err
	}
	c, err := a.open(id)
	if err != nil {
		return 1, err
	}
	return 0, a.printJSON(listed(c))
}

func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// listEntry is the state with what runc and crun add to it.
type listEntry struct {
	specs.State
	// The pid is 0 for a stopped container: runc prints it, the
	// specification's own type leaves it out.
	Pid     int       `json:"pid"`
	Rootfs  string    `json:"rootfs"`
	Created time.Time `json:"created"`
	Owner   string    `json:"owner"`
}

func listed(c *container) listEntry {
	s := c.state()
	return listEntry{State: s, Pid: s.Pid, Rootfs: c.Rootfs, Created: c.Created, Owner: c.Owner}
}

var listFormat string
var listQuiet bool

func listFlags(f *flagSet) {
	f.str(&listFormat, "format", "table", "table or json")
	f.short("f")
	f.boolean(&listQuiet, "quiet", "q", "ids only")
}

func runList(a *app, _ *flagSet) (int, error) {
	dirs, err := os.ReadDir(a.root)
	if err != nil && !os.IsNotExist(err) {
		return 1, err
	}
	list := []listEntry{}
	for _, d := range dirs {
		c, err := a.open(d.Name())
		if errors.Is(err, errNotExist) {
			continue
		} else if err != nil {
			a.warn(err.Error())
			continue
		}
		list = append(list, listed(c))
	}
	switch {
	case listQuiet:
		for _, e := range list {
			fmt.Fprintln(a.stdout, e.ID)
		}
		return 0, nil
	case listFormat == "json":
		return 0, json.NewEncoder(a.stdout).Encode(list)
	case listFormat != "table":
		return 1, fmt.Errorf("list: format %q (table, json)", listFormat)
	}
	w := tabwriter.NewWriter(a.stdout, 12, 1, 3, ' ', 0)
	fmt.Fprintln(w, "ID\tPID\tSTATUS\tBUNDLE\tCREATED\tOWNER")
	for _, e := range list {
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", e.ID, e.Pid, e.Status, e.Bundle, e.Created.Format(time.RFC3339Nano), e.Owner)
	}
	return 0, w.Flush()
}

var psFormat string

func psFlags(f *flagSet) {
	f.str(&psFormat, "format", "table", "table or json")
	f.short("f")
}

// runPs lists processes: json prints their ids, table filters what ps prints.
// Flags may stand behind the id too, as containerd puts them.
func runPs(a *app, f *flagSet) (int, error) {
	id, err := f.id()
	if err != nil {
		return 1, err
	}
	c, err := a.open(id)
	if err != nil {
		return 1, err
	}
	g, err := c.group()
	if err != nil {
		return 1, err
	}
	pids, err := g.Pids()
	if err != nil {
		return 1, err
	}
	options := f.args[1:]
	if psFormat == "json" || slices.Equal(options, []string{"--format", "json"}) {
		if pids == nil {
			pids = []int{}
		}
		return 0, json.NewEncoder(a.stdout).Encode(pids)
	}
	if len(options) == 0 {
		options = []string{"-ef"}
	}
	out, err := exec.Command("ps", options...).Output()
	if err != nil {
		return 1, fmt.Errorf("ps %s: %w", strings.Join(options, " "), err)
	}
	return 0, filterPs(a, string(out), pids)
}

func filterPs(a *app, out string, pids []int) error {
	head, rest, _ := strings.Cut(out, "\n")
	column := slices.Index(strings.Fields(head), "PID")
	if column < 0 {
		return errors.New("ps prints no column PID")
	}
	fmt.Fprintln(a.stdout, head)
	for line := range strings.Lines(rest) {
		fields := strings.Fields(line)
		if len(fields) <= column {
			continue
		}
		if pid, err := strconv.Atoi(fields[column]); err == nil && slices.Contains(pids, pid) {
			fmt.Fprint(a.stdout, line)
		}
	}
	return nil
}

func runPause(a *app, f *flagSet) (int, error)  { return a.freeze(f, statusRunning) }
func runResume(a *app, f *flagSet) (int, error) { return a.freeze(f, statusPaused) }

// freeze pauses a running container or resumes a paused one.
func (a *app) freeze(f *flagSet, from specs.ContainerState) (int, error) {
	id, err := f.id()
	if err != nil {
		return 1, err
	}
	c, err := a.openLocked(id)
	if err != nil {
		return 1, err
	}
	defer c.close()
	s := c.status()
	if s != from && (from != statusRunning || s != statusCreated) {
		if s == statusStopped {
			return 1, errNotRunning
		}
		return 1, &stateError{f.command, c.ID, "that is not " + string(from), s}
	}
	g, err := c.group()
	if err != nil {
		return 1, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
	defer cancel()
	if from == statusRunning {
		return 0, g.Freeze(ctx)
	}
	return 0, g.Thaw(ctx)
}
