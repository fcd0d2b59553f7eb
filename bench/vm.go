package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"tenon.dev/tenon/internal/vm/kernel"
)

// vmKind is the Env of Tenon's virtual machines: its Debian has QEMU. Two daemons
// run in it, one whose pool of waiting machines is filled before each start, and
// one without a pool.
const vmKind = "vm"

const (
	pooledSock = "unix:///run/pooled/docker.sock"
	emptySock  = "unix:///run/empty/docker.sock"
	vmPool     = 1
)

// The engines of the vm tables. All have their containers on a bridge; gVisor
// runs below Docker for that, and as a bare command below.
var (
	vmProcess = &Engine{Name: "tenon, process", Kind: vmKind, Client: []string{"tenon", "-H", pooledSock}, Start: startVM}
	vmPooled  = &Engine{Name: "tenon, vm", Kind: vmKind, Client: []string{"tenon", "-H", pooledSock}, Start: startVM}
	vmEmpty   = &Engine{Name: "tenon, vm, empty pool", Kind: vmKind, Client: []string{"tenon", "-H", emptySock}, Start: startVM}
	runc      = &Engine{Name: "docker, runc", Kind: "docker", Client: []string{"docker", "-H", dockerSock}, Start: startDocker}
	gvisor    = &Engine{Name: "docker, runsc", Kind: "docker", Client: []string{"docker", "-H", dockerSock}, Start: startDocker}
)

// vmOptions are the options that give a container of an engine its isolation.
func vmOptions(en *Engine) []string {
	switch en {
	case vmPooled, vmEmpty:
		return []string{"--isolation", "vm"}
	case gvisor:
		return []string{"--runtime", "runsc"}
	}
	return nil
}

// startVM starts both daemons.
func startVM(e *Env) error {
	for name, pool := range map[string]int{"pooled": vmPool, "empty": 0} {
		if _, err := e.Sh(fmt.Sprintf("printf '[vm]\\nkernel = \"debian\"\\nkernel-dir = \"/cache/kernel\"\\npool = %d\\n' >/etc/%s.toml", pool, name)); err != nil {
			return err
		}
		if err := e.Start(name, "tenond", "--config", "/etc/"+name+".toml", "--root", "/state/"+name, "--run-root", "/run/"+name,
			"--host", "unix:///run/"+name+"/docker.sock", "--name", "tb"+name[:1]); err != nil {
			return err
		}
		if err := waitFor(e, name, "tenon", "-H", "unix:///run/"+name+"/docker.sock", "version"); err != nil {
			return err
		}
	}
	return nil
}

// vmRun is the command line of a run with the engine's isolation.
func vmRun(en *Engine, o RunOpts) []string {
	o.Options = append(vmOptions(en), o.Options...)
	return en.Run(o)
}

// vmEngines are those of a vm table that are to be measured, in its order.
func (b *Bench) vmEngines(all ...*Engine) []*Engine {
	var list []*Engine
	for _, en := range all {
		kind := map[string]string{vmKind: "tenon", "docker": "docker"}[en.Kind]
		if en == gvisor {
			kind = "gvisor"
		}
		if b.wants(kind) {
			list = append(list, en)
		}
	}
	return list
}

// fillPool returns when a machine waits for the next container; nothing else
// that belongs to an earlier run is then under way.
func fillPool(e *Env) error {
	_, err := e.Sh(fmt.Sprintf("for i in $(seq 1200); do tenon -H %s info | grep -q ' %d ready' && exit 0; sleep 0.05; done; tail -n 20 /log/pooled; exit 1", pooledSock, vmPool))
	return err
}

// bareVM is the bundle run by an OCI runtime command that isolates more than
// crun: gVisor's.
func (b *Bench) bareRunsc(argv ...string) *Case {
	c := b.bundleCase("crun")
	c.Name = "runsc, bare"
	c.Request = fixed(append([]string{"runsc", "--root", "/run/runsc"}, argv...))
	return c
}

func benchVM(b *Bench) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if _, err := kernel.Find(ctx, kernel.Config{Kernel: kernel.Debian, Dir: filepath.Join(b.places.Cache, "kernel")}); err != nil {
		return err // an Env has no network to fetch it by
	}
	if err := b.vmFacts(); err != nil {
		return err
	}
	for _, part := range []func(*Bench) error{vmStart, vmExec, vmMemory, vmMany, vmFiles, vmShares, vmNetwork} {
		if err := part(b); err != nil {
			return err
		}
	}
	b.release(vmKind, "tmpfs")
	fmt.Println("Not measured: virtual machines with KVM, if the accelerator above is tcg.")
	fmt.Println()
	return nil
}

// vmFacts makes the templates and says what machines run on here.
func (b *Bench) vmFacts() error {
	for _, en := range []*Engine{vmPooled, vmEmpty} {
		e, err := b.vmLoaded(en, "busybox.tar")
		if err != nil {
			return err
		}
		begin := time.Now()
		res, err := e.Run(vmRun(en, RunOpts{Image: imageBusybox, Args: []string{"sh", "-c", "cat /proc/version"}})...)
		if err != nil {
			return err
		}
		if en != vmPooled {
			continue
		}
		took := time.Since(begin)
		info, err := e.Sh("tenon -H " + pooledSock + " info | grep -E '^ *Virtual machines'")
		if err != nil {
			return err
		}
		fmt.Printf("%s\n%s\nThe first run of all, which makes the template: %s.\n\n", strings.TrimSpace(info.Out), lastLine(res.Out), ms(took))
	}
	return nil
}

func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// vmLoaded gives an engine's Env with images; the two daemons of an Env have
// stores of their own.
func (b *Bench) vmLoaded(en *Engine, archives ...string) (*Env, error) {
	e, err := b.env(en.Kind, "tmpfs", en.Start)
	if err != nil {
		return nil, err
	}
	for _, a := range archives {
		key := en.Kind + "@tmpfs/" + en.Client[2] + a
		if _, loaded := b.broken[key]; loaded {
			continue
		}
		if _, err := e.Run(en.Load("/data/" + a)...); err != nil {
			return nil, err
		}
		b.broken[key] = nil
	}
	return e, nil
}

// vmCase is a line of a table by an engine.
func (b *Bench) vmCase(en *Engine, request func(*Env) (func(int) Request, error), archives ...string) *Case {
	c := &Case{Name: en.Name}
	if c.Env, c.Err = b.vmLoaded(en, archives...); c.Err != nil {
		return c
	}
	if en == vmPooled {
		c.Before = func(int) error { return fillPool(c.Env) }
	}
	c.Request, c.Err = request(c.Env)
	return c
}

func vmStart(b *Bench) error {
	fmt.Printf("run --rm busybox true; machines wait in the pool unless it says that it is empty:\n\n")
	cases := []*Case{b.bundleCase("crun")}
	if b.wants("gvisor") {
		cases = append(cases, b.bareRunsc("run", "--bundle", "/data/bundle", "r{i}"))
	}
	for _, en := range b.vmEngines(vmProcess, vmPooled, vmEmpty, runc, gvisor) {
		cases = append(cases, b.vmCase(en, func(*Env) (func(int) Request, error) {
			return fixed(vmRun(en, RunOpts{Image: imageBusybox, Args: []string{"true"}})), nil
		}, "busybox.tar"))
	}
	b.measure("crun", 2, b.n, whole(cases))
	return nil
}

func vmExec(b *Bench) error {
	fmt.Printf("exec true in a running container:\n\n")
	bare, err := b.env("bare", "tmpfs", nil)
	if err != nil {
		return err
	}
	var cases []*Case
	bareSleeper := func(name string, run string, c *Case) {
		_, c.Err = bare.Sh(run + " run --detach --bundle /data/sleeper vmsleeper </dev/null >/tmp/out 2>&1 || { cat /tmp/out; exit 1; }")
		cases = append(cases, c)
	}
	const crun, runsc = "crun --root /run/crun", "runsc --root /run/runsc"
	bareSleeper("crun", crun, &Case{Name: "crun", Env: bare, Request: fixed([]string{"crun", "--root", "/run/crun", "exec", "vmsleeper", "true"})})
	defer bare.Do(Request{Argv: append(strings.Fields(crun), "delete", "--force", "vmsleeper")})
	if b.wants("gvisor") {
		bareSleeper("runsc", runsc, b.bareRunsc("exec", "vmsleeper", "true"))
		defer bare.Do(Request{Argv: append(strings.Fields(runsc), "delete", "--force", "vmsleeper")})
	}
	for _, en := range b.vmEngines(vmProcess, vmPooled, runc, gvisor) {
		name := "exec" + strconv.Itoa(len(cases))
		c := b.vmCase(en, func(e *Env) (func(int) Request, error) {
			_, err := e.Run(vmRun(en, RunOpts{Name: name, Image: imageBusybox, Detach: true, Args: []string{"sleep", "100000"}})...)
			return fixed(en.Exec(name, "true")), err
		}, "busybox.tar")
		if c.Err == nil {
			defer c.Env.Do(Request{Argv: en.Remove(name)})
		}
		cases = append(cases, c)
	}
	b.measure("crun", 3, b.n, whole(cases))
	return nil
}

// vmMemory is the memory of the emulator or the user space kernel of each
// container, not of the engine.
func vmMemory(b *Bench) error {
	const count = 5
	fmt.Printf("Memory of idle containers (sleep), mean of %d: private, and with their share of what they share:\n\n", count)
	w := newTable()
	fmt.Fprintf(w, "\tprivate\tPSS\tprivate, waiting in the pool\t\n")
	for _, en := range b.vmEngines(vmPooled, gvisor) {
		m, err := b.vmMemoryOf(en, count)
		if err != nil {
			fmt.Fprintf(w, "%s\t– (%v)\t\t\t\n", en.Name, err)
			continue
		}
		fmt.Fprintf(w, "%s\t%.1f MiB\t%.1f MiB\t%.1f MiB\t\n", en.Name, m.private/(1<<20), m.pss/(1<<20), m.waiting/(1<<20))
	}
	w.Flush()
	fmt.Println()
	return nil
}

// idleMemory is in bytes.
type idleMemory struct{ private, pss, waiting float64 }

func (b *Bench) vmMemoryOf(en *Engine, count int) (m idleMemory, err error) {
	e, err := b.vmLoaded(en, "busybox.tar")
	if err != nil {
		return m, err
	}
	measure := func() (Result, error) {
		if en == vmPooled {
			if err := fillPool(e); err != nil {
				return Result{}, err
			}
		}
		if _, err := e.Run("sleep", "2"); err != nil {
			return Result{}, err
		}
		return e.must(Request{Measure: "private", Argv: []string{"qemu-system-x86_64", "runsc"}})
	}
	before, err := measure()
	if err != nil {
		return m, err
	}
	if n, _ := strconv.Atoi(before.Out); n > 0 {
		m.waiting = float64(before.NS) / float64(n)
	}
	for i := range count {
		name := fmt.Sprintf("vmidle%d", i)
		defer e.Do(Request{Argv: en.Remove(name)})
		if _, err := e.Run(vmRun(en, RunOpts{Name: name, Image: imageBusybox, Detach: true, Args: []string{"sleep", "100000"}})...); err != nil {
			return m, err
		}
	}
	after, err := measure()
	m.private, m.pss = float64(after.NS-before.NS)/float64(count), float64(after.CPUNS-before.CPUNS)/float64(count)
	return m, err
}

func vmMany(b *Bench) error {
	const count, parallel = 20, 4
	fmt.Printf("%d containers, %d at a time, the pool filled before the first only:\n\n", count, parallel)
	bare := b.bundleCase("crun")
	bare.Request = manyOf([]string{"crun", "--root", "/run/crun", "run", "--bundle", "/data/bundle", "m{i}"}, count, parallel)
	cases := []*Case{bare}
	for _, en := range b.vmEngines(vmProcess, vmPooled, runc, gvisor) {
		cases = append(cases, b.vmCase(en, func(*Env) (func(int) Request, error) {
			return manyOf(vmRun(en, RunOpts{Image: imageBusybox, Args: []string{"true"}}), count, parallel), nil
		}, "busybox.tar"))
	}
	b.measure("crun", 0, vmRounds(b), whole(cases))
	return nil
}

// whole counts what daemons and machines do, too: of a command alone that is
// little.
func whole(cases []*Case) []*Case {
	for _, c := range cases {
		c.Whole = true
	}
	return cases
}

func manyOf(argv []string, count, parallel int) func(int) Request {
	return func(int) Request { return Request{Argv: argv, Count: count, Parallel: parallel} }
}
