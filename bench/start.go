package main

import "fmt"

// runtimes are the OCI runtime commands, crun first: it is the 1 of all ratios.
var runtimes = []string{"crun", "runc", "tenon-oci"}

func fixed(argv []string) func(int) Request {
	return func(int) Request { return Request{Argv: argv} }
}

func runtimeKind(name string) string {
	if name == "tenon-oci" {
		return "tenon"
	}
	return name
}

// bundleCase runs the busybox bundle by an OCI runtime command.
func (b *Bench) bundleCase(runtime string) *Case {
	e, err := b.env("bare", "tmpfs", nil)
	argv := []string{runtime, "--root", "/run/" + runtime, "run", "--bundle", "/data/bundle", "r{i}"}
	return &Case{Name: runtime, Env: e, Err: err, Request: fixed(argv)}
}

func (b *Bench) runtimeCases() []*Case {
	var cases []*Case
	for _, r := range runtimes {
		if b.wants(runtimeKind(r)) || r == "crun" {
			cases = append(cases, b.bundleCase(r))
		}
	}
	return cases
}

func benchOCI(b *Bench) error {
	cases := b.runtimeCases()
	if b.wants("floor") {
		e, err := b.env("bare", "tmpfs", nil)
		cases = append(cases, &Case{Name: "kernel's floor", Env: e, Err: err,
			Request: func(int) Request { return Request{Measure: "floor"} }})
	}
	b.measure("crun", 3, b.n, cases)
	return nil
}

func benchRun(b *Bench) error {
	cases := []*Case{b.bundleCase("crun")}
	for _, en := range b.chosen() {
		e, err := b.engine(en, "tmpfs", "busybox.tar")
		cases = append(cases, &Case{Name: en.Name, Env: e, Err: err,
			Request: fixed(en.Run(RunOpts{Image: imageBusybox, Args: []string{"true"}}))})
	}
	b.measure("crun", 3, b.n, cases)
	return nil
}

func (b *Bench) chosen() []*Engine {
	var list []*Engine
	for _, en := range engines {
		if b.wants(en.Kind) {
			list = append(list, en)
		}
	}
	return list
}

func benchExec(b *Bench) error {
	bare, err := b.env("bare", "tmpfs", nil)
	if err != nil {
		return err
	}
	var cases []*Case
	for _, r := range runtimes {
		if !b.wants(runtimeKind(r)) && r != "crun" {
			continue
		}
		root := "/run/" + r
		c := &Case{Name: r, Env: bare, Request: fixed([]string{r, "--root", root, "exec", "sleeper-" + r, "true"})}
		_, c.Err = bare.Sh(fmt.Sprintf("%[1]s --root %[2]s run --detach --bundle /data/sleeper sleeper-%[1]s </dev/null >/tmp/out 2>&1 || { cat /tmp/out; exit 1; }", r, root))
		defer bare.Do(Request{Argv: []string{r, "--root", root, "delete", "--force", "sleeper-" + r}})
		cases = append(cases, c)
	}
	for _, en := range b.chosen() {
		e, err := b.engine(en, "tmpfs", "busybox.tar")
		name := "exec-" + en.Client[0]
		c := &Case{Name: en.Name, Env: e, Err: err, Request: fixed(en.Exec(name, "true"))}
		if err == nil {
			_, c.Err = e.Run(en.Run(RunOpts{Name: name, Image: imageBusybox, Detach: true, Args: []string{"sleep", "100000"}})...)
			defer e.Do(Request{Argv: en.Remove(name)})
		}
		cases = append(cases, c)
	}
	b.measure("crun", 3, b.n, cases)
	return nil
}

func benchMany(b *Bench) error {
	const count, parallel = 50, 8
	for _, state := range []string{"tmpfs", "disk"} {
		fmt.Printf("State on %s:\n\n", state)
		bare, err := b.env("bare", state, nil)
		if err != nil {
			return err
		}
		if _, err := bare.Sh("[ -e /state/bundle ] || cp -a /data/bundle /state/"); err != nil {
			return err
		}
		var cases []*Case
		for _, r := range runtimes {
			if b.wants(runtimeKind(r)) || r == "crun" {
				argv := []string{r, "--root", "/run/" + r, "run", "--bundle", "/state/bundle", "m{i}"}
				cases = append(cases, &Case{Name: r, Env: bare,
					Request: func(int) Request { return Request{Argv: argv, Count: count, Parallel: parallel} }})
			}
		}
		for _, en := range b.chosen() {
			e, err := b.engine(en, state, "busybox.tar")
			argv := en.Run(RunOpts{Image: imageBusybox, Args: []string{"true"}})
			cases = append(cases, &Case{Name: en.Name, Env: e, Err: err,
				Request: func(int) Request { return Request{Argv: argv, Count: count, Parallel: parallel} }})
		}
		b.measure("crun", 1, max(b.n/4, 3), cases)
	}
	for _, en := range engines {
		b.release(en.Kind, "disk")
	}
	return nil
}

func benchVersion(b *Bench) error {
	cases := b.clientCases([]string{"--version"}, runtimes...)
	for _, en := range b.chosen() {
		if en.Name == "docker CLI on tenond" {
			continue
		}
		e, err := b.env(en.Kind, "tmpfs", en.Start)
		cases = append(cases, &Case{Name: en.Name, Env: e, Err: err, Request: fixed(en.argv("version"))})
	}
	b.measure("crun", 2, b.n, cases)
	return nil
}

func (b *Bench) clientCases(args []string, names ...string) []*Case {
	var cases []*Case
	for _, name := range names {
		e, err := b.env("bare", "tmpfs", nil)
		cases = append(cases, &Case{Name: name, Env: e, Err: err, Request: fixed(append([]string{name}, args...))})
	}
	return cases
}

func benchMemory(b *Bench) error {
	const count = 20
	fmt.Printf("%-24s %14s %22s\n", "", "daemon, MB", "per idle container, MB")
	for _, en := range b.chosen() {
		if en.Name == "docker CLI on tenond" {
			continue
		}
		if err := b.memoryOf(en, count); err != nil {
			fmt.Printf("%-24s –\n  %v\n", en.Name, err)
		}
	}
	fmt.Println()
	return nil
}

func (b *Bench) memoryOf(en *Engine, count int) error {
	e, err := b.engine(en, "tmpfs", "busybox.tar")
	if err != nil {
		return err
	}
	// One container first: what the first one makes for all is not counted as its own.
	defer e.Do(Request{Argv: en.Remove("idle0")})
	base, err := pssWith(e, en, "idle0")
	if err != nil {
		return err
	}
	var with Result
	for i := range count {
		name := fmt.Sprintf("idle%d", i+1)
		defer e.Do(Request{Argv: en.Remove(name)})
		if i < count-1 {
			_, err = e.Run(idle(en, name)...)
		} else {
			with, err = pssWith(e, en, name)
		}
		if err != nil {
			return err
		}
	}
	fmt.Printf("%-24s %14.1f %22.2f\n", en.Name, float64(base.NS)/1e6, float64(with.NS-base.NS)/1e6/float64(count))
	return nil
}

func idle(en *Engine, name string) []string {
	return en.Run(RunOpts{Name: name, Image: imageBusybox, Detach: true, Args: []string{"sleep", "100000"}})
}

// pssWith starts an idle container, lets helpers settle, and sums the memory.
func pssWith(e *Env, en *Engine, name string) (Result, error) {
	if _, err := e.Run(idle(en, name)...); err != nil {
		return Result{}, err
	}
	if _, err := e.Run("sleep", "2"); err != nil {
		return Result{}, err
	}
	return e.must(Request{Measure: "pss"})
}
