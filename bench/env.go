package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// Env is the place one peer runs in: its own network, mount, pid, ipc and uts
// namespaces and its own cgroups, with a Debian of the newest packages as root.
// It ends with its agent, and nothing of it remains on the system.
type Env struct {
	Name  string
	State string // "tmpfs" or "disk": what /state lies on

	dir     string   // removed by Close
	cgroups []string // removed by Close
	cmd     *exec.Cmd
	in      *json.Encoder
	out     *bufio.Reader
	closeIn func() error
}

// Places are the directories of the system that an Env shows, all absolute.
type Places struct {
	Cache string // TENON_CACHE: root-sid, bin, registry
	Bin   string // Tenon's binaries
	Data  string // bundles and images made by the bench, read-only to peers
}

// rootOf is the Debian that an Env of a kind has as its root.
func rootOf(kind string) string {
	if kind == vmKind {
		return "root-vm"
	}
	return "root-sid"
}

// setup is what the child needs to build its root; it travels by environment.
type setup struct {
	Dir, State, Root, Cache, Bin, Data string
	Cgroups                            []string
}

// StartEnv makes an Env and returns when its agent answers.
func StartEnv(places Places, name, state string) (_ *Env, err error) {
	e := &Env{Name: name, State: state}
	defer func() {
		if err != nil {
			e.Close()
		}
	}()
	if e.dir, err = os.MkdirTemp(places.Cache, "env-"+name+"-"); err != nil {
		return nil, err
	}
	if e.cgroups, err = makeCgroups("tenon-bench-" + filepath.Base(e.dir)); err != nil {
		return nil, err
	}
	raw, err := json.Marshal(setup{
		Dir: e.dir, State: state, Root: filepath.Join(places.Cache, rootOf(name)),
		Cache: places.Cache, Bin: places.Bin, Data: places.Data, Cgroups: e.cgroups,
	})
	if err != nil {
		return nil, err
	}
	e.cmd = exec.Command("/proc/self/exe", "enter")
	e.cmd.Env = append(os.Environ(), "TENON_BENCH_SETUP="+string(raw))
	e.cmd.Stderr = os.Stderr
	e.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID |
			syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		Pdeathsig: syscall.SIGKILL,
	}
	in, err := e.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := e.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := e.cmd.Start(); err != nil {
		return nil, fmt.Errorf("environment %s: %w", name, err)
	}
	e.in, e.out, e.closeIn = json.NewEncoder(in), bufio.NewReader(out), in.Close
	if r, err := e.Do(Request{Argv: []string{"true"}}); err != nil || r.RC != 0 {
		return nil, fmt.Errorf("environment %s does not answer: %v %s", name, err, r.Out)
	}
	return e, nil
}

// Do has the agent carry out one request and waits for its answer.
func (e *Env) Do(r Request) (Result, error) {
	if err := e.in.Encode(r); err != nil {
		return Result{}, fmt.Errorf("environment %s: %w", e.Name, err)
	}
	line, err := e.out.ReadBytes('\n')
	if err != nil {
		return Result{}, fmt.Errorf("environment %s: agent gone: %w", e.Name, err)
	}
	var res Result
	if err := json.Unmarshal(line, &res); err != nil {
		return Result{}, fmt.Errorf("environment %s: agent said %q: %w", e.Name, line, err)
	}
	return res, nil
}

// Run runs a command and fails if it does.
func (e *Env) Run(argv ...string) (Result, error) {
	return e.must(Request{Argv: argv})
}

// Sh runs a shell script and fails if it does.
func (e *Env) Sh(script string) (Result, error) {
	return e.must(Request{Argv: []string{"sh", "-ec", script}})
}

// Start starts a daemon with its output in /log/NAME.
func (e *Env) Start(name string, argv ...string) error {
	_, err := e.must(Request{Argv: argv, Background: name})
	return err
}

func (e *Env) must(r Request) (Result, error) {
	res, err := e.Do(r)
	if err == nil && res.RC != 0 {
		err = fmt.Errorf("%s: %s: exit %d: %s", e.Name, strings.Join(r.Argv, " "), res.RC, tail(res.Out, 600))
	}
	return res, err
}

// Close ends everything that runs in the Env and removes what it left.
func (e *Env) Close() {
	if e.closeIn != nil {
		_ = e.closeIn() // the agent ends at end of input, and its pid namespace with it
	}
	if e.cmd != nil && e.cmd.Process != nil {
		_ = e.cmd.Process.Kill() // pid 1 of the namespace: everything in it dies too
		_ = e.cmd.Wait()
	}
	for _, c := range e.cgroups {
		removeCgroup(c)
	}
	if e.dir != "" {
		_ = os.RemoveAll(e.dir)
	}
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

// makeCgroups makes one cgroup in each mounted hierarchy and returns their
// paths. With the unified hierarchy alone there is one.
func makeCgroups(name string) ([]string, error) {
	var made []string
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		dir := "/sys/fs/cgroup/" + name
		return []string{dir}, os.Mkdir(dir, 0o755)
	}
	entries, err := os.ReadDir("/sys/fs/cgroup")
	if err != nil {
		return nil, err
	}
	known, err := os.ReadFile("/proc/cgroups")
	if err != nil {
		return nil, err
	}
	for _, ent := range entries {
		// Version 1's, and no others that somebody has mounted here: crun refuses a
		// hybrid layout.
		if ent.Name() != "systemd" && !strings.Contains(string(known), "\n"+ent.Name()+"\t") {
			continue
		}
		if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", ent.Name(), "cgroup.procs")); err != nil {
			continue // no hierarchy
		}
		dir := filepath.Join("/sys/fs/cgroup", ent.Name(), name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return made, err
		}
		made = append(made, dir)
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			if raw, err := os.ReadFile(filepath.Join(filepath.Dir(dir), f)); err == nil {
				_ = os.WriteFile(filepath.Join(dir, f), raw, 0o644)
			}
		}
	}
	return made, nil
}

func removeCgroup(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, ent := range entries {
		if ent.IsDir() {
			removeCgroup(filepath.Join(dir, ent.Name()))
		}
	}
	_ = os.Remove(dir)
}
