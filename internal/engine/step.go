package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/rootfs"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
)

// Step is a process that runs once on a root of its own, with the defaults of
// containers, and of which nothing stays: a build's. It is no container: nobody lists
// it, and a daemon that finds one that an earlier daemon has begun ends it.
type Step struct {
	ID string // unlike every container's; letters and digits
	// Config has Cmd, Env (all of it but HOME), User, WorkingDir, Hostname and Tty.
	Config *mobycontainer.Config
	// HostConfig has NetworkMode (bridge, host, none), limits, ExtraHosts and what
	// protects the host.
	HostConfig *mobycontainer.HostConfig
	// Upper, Work and Lower (topmost first) are the overlay that is the root.
	Upper, Work string
	Lower       []string
	Mounts      []spec.Mount
	// Isolation is what StepIsolation has answered.
	Isolation string
	// Image makes the file with what is in Lower as a file system for virtual machines;
	// release is called when it is not needed any more. Apply unpacks what a step on
	// one has changed into Upper. Not for isolation "process".
	Image func(ctx context.Context) (path string, release func(), err error)
	Apply func(ctx context.Context, tar io.Reader) error

	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Started        func() // called once it runs; may be nil
	Resize         <-chan [2]uint32
	Signal         <-chan syscall.Signal

	cancel context.CancelCauseFunc
	over   chan struct{} // closed when nothing is left of it
}

// steps are those under way, by ID.
type steps struct {
	mu   sync.Mutex
	list map[string]*Step
}

func (s *steps) add(st *Step) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.list[st.ID] != nil {
		return errdefs.ErrAlreadyExists.WithMessage("step " + st.ID + " runs already")
	}
	if s.list == nil {
		s.list = map[string]*Step{}
	}
	s.list[st.ID] = st
	return nil
}

func (s *steps) drop(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.list, id)
}

// end ends all steps and waits until nothing is left of them.
func (s *steps) end(ctx context.Context) {
	s.mu.Lock()
	var all []*Step
	for _, st := range s.list {
		st.cancel(errdefs.ErrUnavailable.WithMessage("the daemon is shutting down"))
		all = append(all, st)
	}
	s.mu.Unlock()
	for _, st := range all {
		select {
		case <-st.over:
		case <-ctx.Done():
			return
		}
	}
}

func (s *steps) get(id string) *Step {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.list[id]
}

// RunStep runs a step to its end. When ctx ends it is killed, with all that it has
// started, and the error is ctx's. Nothing of it is left but what it wrote.
func (e *Engine) RunStep(ctx context.Context, st *Step) (exit task.Exit, err error) {
	ctx, st.cancel = context.WithCancelCause(ctx)
	defer st.cancel(nil)
	st.over = make(chan struct{})
	if err := e.steps.add(st); err != nil {
		return exit, err
	}
	defer close(st.over)
	defer e.steps.drop(st.ID)
	if e.isClosing() {
		return exit, errdefs.ErrUnavailable.WithMessage("the daemon is shutting down")
	}
	var u undo
	defer func() {
		// All is taken down whether it has worked or not.
		if left, uerr := u.all(ctx); len(left) > 0 {
			e.log.Warn("something of a build's step is left", "step", st.ID, "err", uerr)
			e.undoLater("rest of a build's step "+st.ID, left)
		}
	}()
	if st.Isolation != sandbox.Process && st.Isolation != "" {
		return e.runStepVM(ctx, st, &u)
	}
	client, err := e.shim.get(ctx)
	if err != nil {
		return exit, err
	}
	req, err := e.prepareStep(ctx, st, &u)
	if err != nil {
		return exit, err
	}
	return e.runStepOn(ctx, client, st, req, nil, &u)
}

// runStepOn creates a step's task, starts it and waits for its end. ended is closed
// when the kernel that it runs on is gone.
func (e *Engine) runStepOn(ctx context.Context, client *task.Client, st *Step, req task.CreateRequest, ended <-chan struct{}, u *undo) (exit task.Exit, err error) {
	if err := failpoint("step-prepared"); err != nil {
		return exit, err
	}
	u.add("task", func(ctx context.Context) error {
		err := deleteTask(ctx, client, st.ID)
		if isClosed(ended) {
			return nil // it went with its kernel
		}
		return err
	})
	// A shim goes on with what it was asked for, and what it has not made yet can't be
	// deleted: a build that is cancelled waits for that. A machine of the step's own
	// ends with all that it has.
	sctx, cancel := context.WithCancel(ctx)
	if st.Isolation != sandbox.VM {
		cancel()
		sctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), startTime)
	}
	defer cancel()
	if _, err = client.Create(sctx, req); err != nil {
		return exit, fmt.Errorf("step: %s: %w", commandText(st.ID, err), err)
	}
	att, err := client.Attach(ctx, st.ID, "", task.Stdio{Stdin: st.Stdin, Stdout: st.Stdout, Stderr: st.Stderr, Terminal: st.Config.Tty})
	if err != nil {
		return exit, err
	}
	defer att.Close()
	if _, err := client.Start(sctx, st.ID, ""); err != nil {
		return exit, stepError(st.ID, err)
	}
	if err := failpoint("step-started"); err != nil {
		return exit, err
	}
	if st.Started != nil {
		st.Started()
	}
	return e.waitStep(ctx, client, st.ID, "", att, ended, st)
}

func stepError(id string, err error) error {
	return fmt.Errorf("%s: %w", commandText(id, err), err)
}

// waitStep waits for a process of a step and passes on what the build sends it.
func (e *Engine) waitStep(ctx context.Context, client *task.Client, id, execID string, att *task.Attachment, ended <-chan struct{}, st *Step) (task.Exit, error) {
	resize, signals := st.Resize, st.Signal
	type result struct {
		exit task.Exit
		err  error
	}
	done := make(chan result, 1)
	wctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	e.spawn(func() {
		x, err := client.Wait(wctx, id, execID)
		if err == nil {
			err = att.Wait(wctx)
		}
		done <- result{x, err}
	})
	for {
		select {
		case r := <-done:
			return r.exit, r.err
		case <-ctx.Done():
			return task.Exit{}, context.Cause(ctx)
		case <-ended:
			return task.Exit{}, errdefs.ErrUnavailable.WithMessage("the step's virtual machine ended")
		case <-e.ctx.Done():
			return task.Exit{}, errdefs.ErrUnavailable.WithMessage("the daemon is ending")
		case size, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			if err := client.Resize(ctx, id, execID, size[0], size[1]); err != nil {
				e.log.Debug("step not resized", "step", id, "err", err)
			}
		case sig, ok := <-signals:
			if !ok {
				signals = nil
				continue
			}
			if err := client.Kill(ctx, id, execID, sig, false); err != nil {
				e.log.Debug("step not signalled", "step", id, "err", err)
			}
		}
	}
}

// stepRecord is a step as those see it who know containers.
func stepRecord(st *Step) *container.Record {
	return &container.Record{ID: st.ID, Name: "build-" + st.ID, Config: st.Config, HostConfig: st.HostConfig, Isolation: st.Isolation}
}

// stepNetwork makes the step's network, and the files that go with it.
func (e *Engine) stepNetwork(ctx context.Context, r *container.Record, plumbing network.Plumbing, u *undo) (ns *network.Namespace, files []spec.Mount, err error) {
	q := network.Request{ContainerID: r.ID, Name: r.Name, Hostname: r.Config.Hostname, Mode: network.ModeBridge, Plumbing: plumbing, ExtraHosts: r.HostConfig.ExtraHosts}
	switch m := r.HostConfig.NetworkMode; {
	case m.IsHost():
		q.Mode = network.ModeHost
	case m.IsNone():
		q.Mode = network.ModeNone
	}
	u.add("network", func(ctx context.Context) error { return e.cfg.Networks.Disconnect(ctx, r.ID) })
	if ns, err = e.cfg.Networks.Connect(ctx, q); err != nil {
		return nil, nil, fmt.Errorf("step's network: %w", err)
	}
	u.add("files", func(context.Context) error { return removeDir(e.runDir(r.ID)) })
	if err := writeNetworkFiles(e.runDir(r.ID), r, ns); err != nil {
		return nil, nil, err
	}
	for _, name := range networkFiles {
		files = append(files, spec.Mount{Type: "bind", Source: filepath.Join(e.runDir(r.ID), name), Destination: "/etc/" + name, ReadOnly: r.HostConfig.ReadonlyRootfs, Engine: true})
	}
	return ns, files, nil
}

// prepareStep makes the step's network, files and specification.
func (e *Engine) prepareStep(ctx context.Context, st *Step, u *undo) (task.CreateRequest, error) {
	var req task.CreateRequest
	r := stepRecord(st)
	ns, files, err := e.stepNetwork(ctx, r, "", u)
	if err != nil {
		return req, err
	}
	u.add("kernel", func(ctx context.Context) error { return e.cfg.Kernel.Release(ctx, st.ID) })
	kernel, err := e.cfg.Kernel.Prepare(ctx, sandbox.Handover{ID: st.ID, Root: taskMounts(e.stepRoot(st)), NetNS: ns.Path})
	if err != nil {
		return req, err
	}
	return e.stepRequest(st, r, stepKernel{kernel, e.cfg.Kernel.Facts(), e.def}, files, st.Mounts)
}

// stepKernel is what a step runs on.
type stepKernel struct {
	sandbox.Prepared
	facts    sandbox.Facts
	defaults spec.Defaults
}

// stepRequest is what the shim is asked; files and mounts are as its kernel sees them.
func (e *Engine) stepRequest(st *Step, r *container.Record, k stepKernel, files, mounts []spec.Mount) (req task.CreateRequest, err error) {
	in := spec.Input{
		ID: st.ID, Config: st.Config, HostConfig: st.HostConfig, Defaults: k.defaults, NetReady: k.NetNS != "", Hostname: st.Config.Hostname,
		Mounts: withoutShadowed(append(slices.Clone(mounts), files...), mounts), NetNS: k.NetNS, CgroupPath: e.cgroupPath(r), CgroupV2: k.facts.CgroupV2, Capabilities: k.facts.Capabilities,
	}
	if in.User, err = e.resolveUser(e.stepRoot(st), nil, st.Config.User, nil); err != nil {
		return req, err
	}
	s, err := spec.Build(in)
	if err != nil {
		return req, err
	}
	s.Process.Env = stepEnv(st.Config.Env, in.User.Home)
	req = task.CreateRequest{ID: st.ID, Rootfs: k.Rootfs, Terminal: st.Config.Tty, Stdin: st.Stdin != nil, StdinOnce: true, Owner: "build"}
	req.Spec, err = spec.Encode(s)
	return req, err
}

// stepRoot is the overlay of a step, with the mount points that every container has
// below all layers.
func (e *Engine) stepRoot(st *Step) *rootfs.Root {
	lower := append(slices.Clone(st.Lower), e.cfg.Roots.Base())
	return &rootfs.Root{
		Upper: st.Upper, Work: st.Work, Lower: lower,
		Mounts: []rootfs.Mount{{Type: "overlay", Source: "overlay", Options: []string{
			"lowerdir=" + strings.Join(lower, ":"), "upperdir=" + st.Upper, "workdir=" + st.Work, "index=off",
		}}},
	}
}

// stepEnv is the build's environment, with HOME as programs expect it.
func stepEnv(env []string, home string) []string {
	if home == "" {
		home = "/"
	}
	if slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, "HOME=") }) {
		return env
	}
	return append(slices.Clone(env), "HOME="+home)
}

// ExecStep runs one more process in a step that runs. NotFound if there is none.
func (e *Engine) ExecStep(ctx context.Context, id, execID string, x *Step) (exit task.Exit, err error) {
	st := e.steps.get(id)
	if st == nil {
		return exit, errdefs.ErrNotFound.WithMessage("no such step: " + id)
	}
	if st.Isolation != sandbox.Process && st.Isolation != "" {
		return exit, errdefs.ErrNotImplemented.WithMessage("a step on a virtual machine runs one process only")
	}
	client, err := e.shim.get(ctx)
	if err != nil {
		return exit, err
	}
	user, err := e.resolveUser(e.stepRoot(st), nil, x.Config.User, nil)
	if err != nil {
		return exit, err
	}
	h := st.HostConfig
	caps, err := spec.Capabilities(h.CapAdd, h.CapDrop, h.Privileged, e.cfg.Kernel.Facts().Capabilities)
	if err != nil {
		return exit, err
	}
	p := specs.Process{
		Terminal: x.Config.Tty, Args: x.Config.Cmd, Cwd: firstOf(x.Config.WorkingDir, "/"),
		User: specs.User{UID: user.UID, GID: user.GID, AdditionalGids: user.Additional},
		Env:  stepEnv(x.Config.Env, user.Home), Capabilities: spec.ProcessCapabilities(caps, user.UID),
		NoNewPrivileges: spec.NoNewPrivileges(h), Rlimits: spec.Rlimits(h.Ulimits),
	}
	b, err := json.Marshal(p)
	if err != nil {
		return exit, err
	}
	att, _, err := client.Execute(ctx, task.ExecRequest{ID: id, ExecID: execID, Process: b, Terminal: x.Config.Tty, Stdin: x.Stdin != nil},
		task.Stdio{Stdin: x.Stdin, Stdout: x.Stdout, Stderr: x.Stderr, Terminal: x.Config.Tty})
	if err != nil {
		return exit, stepError(id, err)
	}
	defer func() {
		att.Close()
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTime)
		defer cancel()
		if err != nil {
			if kerr := client.Kill(cctx, id, execID, syscall.SIGKILL, false); kerr == nil {
				_, _ = client.Wait(cctx, id, execID) // it is to be deleted, whatever it said
			}
		}
		if _, derr := client.Delete(cctx, id, execID); derr != nil && !errdefs.IsNotFound(derr) {
			e.log.Warn("a step's exec is left in the shim", "step", id, "exec", execID, "err", derr)
		}
	}()
	return e.waitStep(ctx, client, id, execID, att, nil, x)
}
