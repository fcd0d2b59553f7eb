package engine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/rootfs"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
)

// StepIsolation says what a step runs in that asks for this, with the daemon's
// default. A step has a machine of its own or none.
func (e *Engine) StepIsolation(asked string) (string, error) {
	if asked == "" {
		asked = firstOf(e.cfg.DefaultIsolation, sandbox.Process)
	}
	level, err := spec.Isolation(mobycontainer.Isolation(asked))
	if err != nil {
		return "", err
	}
	if level == "" {
		level = sandbox.Process
	}
	if level != sandbox.Process && level != sandbox.VM {
		return "", errdefs.ErrNotImplemented.WithMessage("steps of builds run in isolation process or vm, not " + level)
	}
	return level, nil
}

// runStepVM runs a step on a machine of its own. The machine gets the layers as one
// read-only file system and a writable disk, and tells in the end what has changed,
// as a tar: the host mounts nothing that a guest has written.
func (e *Engine) runStepVM(ctx context.Context, st *Step, u *undo) (exit task.Exit, err error) {
	if st.HostConfig.NetworkMode.IsHost() {
		return exit, errdefs.ErrNotImplemented.WithMessage("a step on a virtual machine can't have the host's network")
	}
	if names, err := os.ReadDir(st.Upper); err != nil || len(names) > 0 {
		return exit, errdefs.ErrNotImplemented.WithMessage("a step on a virtual machine can't go on with a root that has been written to")
	}
	if _, err := e.machines(ctx); err != nil {
		return exit, err
	}
	r := &container.Record{ID: st.ID, Name: "build-" + st.ID, Config: st.Config, HostConfig: st.HostConfig, Isolation: sandbox.VM}
	q := network.Request{ContainerID: st.ID, Name: r.Name, Hostname: st.Config.Hostname, Mode: network.ModeBridge, Plumbing: network.PlumbVM, ExtraHosts: st.HostConfig.ExtraHosts}
	if st.HostConfig.NetworkMode.IsNone() {
		q.Mode = network.ModeNone
	}
	u.add("network", func(ctx context.Context) error { return e.cfg.Networks.Disconnect(ctx, st.ID) })
	ns, err := e.cfg.Networks.Connect(ctx, q)
	if err != nil {
		return exit, fmt.Errorf("step's network: %w", err)
	}
	u.add("files", func(context.Context) error { return removeDir(e.runDir(st.ID)) })
	if err := writeNetworkFiles(e.runDir(st.ID), r, ns); err != nil {
		return exit, err
	}
	g, disks, err := e.stepMachine(ctx, st, u)
	if err != nil {
		return exit, err
	}
	defer func() {
		if err != nil && isClosed(g.machine.Ended()) && ctx.Err() == nil {
			err = fmt.Errorf("the step's virtual machine ended (%s): %w", g.machine.End(), err)
		}
	}()
	mounts, files, kernel, err := e.stepHandover(ctx, st, g, disks, ns)
	if err != nil {
		return exit, err
	}
	client, _, err := g.connect(ctx)
	if err != nil {
		return exit, err
	}
	facts := g.machine.Facts()
	in := spec.Input{
		ID: st.ID, Config: st.Config, HostConfig: st.HostConfig, Defaults: e.defaultsOf(sandbox.VM), NetReady: kernel.NetNS != "", Hostname: st.Config.Hostname,
		Mounts: withoutShadowed(append(files, mounts...), mounts), NetNS: kernel.NetNS, CgroupPath: e.cgroupPath(r), CgroupV2: facts.CgroupV2, Capabilities: facts.Capabilities,
	}
	if in.User, err = e.resolveUser(e.stepRoot(st), nil, st.Config.User, nil); err != nil {
		return exit, err
	}
	s, err := spec.Build(in)
	if err != nil {
		return exit, err
	}
	s.Process.Env = stepEnv(st.Config.Env, in.User.Home)
	req := task.CreateRequest{ID: st.ID, Rootfs: kernel.Rootfs, Terminal: st.Config.Tty, Stdin: st.Stdin != nil, StdinOnce: true, Owner: "build"}
	if req.Spec, err = spec.Encode(s); err != nil {
		return exit, err
	}
	var ending undo // the machine's end is the task's
	exit, err = e.runStepOn(ctx, client, st, req, g.machine.Ended(), &ending)
	if err != nil || exit.Status != 0 {
		return exit, err // what a step that has failed has written is not wanted
	}
	return exit, e.stepChanges(ctx, client, st, g, disks)
}

// stepMachine makes a step's machine with its disks.
func (e *Engine) stepMachine(ctx context.Context, st *Step, u *undo) (*guest, sandbox.Disks, error) {
	disks := sandbox.Disks{Volatile: true}
	if len(st.Lower) > 0 {
		path, release, err := st.Image(ctx)
		if err != nil {
			return nil, disks, err
		}
		u.add("image", func(context.Context) error { release(); return nil })
		disks.Image = path
	}
	u.add("disk", func(context.Context) error { return e.cfg.Roots.Remove(st.ID) })
	var err error
	if disks.Upper, err = e.cfg.Roots.PrepareUpper(ctx, st.ID, st.Lower, rootfs.Options{Volatile: true, SizeLimit: e.cfg.DiskLimit}); err != nil {
		return nil, disks, err
	}
	m, err := e.cfg.Machines.Create(ctx, sandbox.MachineRequest{
		ID: machineID(st.ID), Hostname: st.Config.Hostname, Memory: st.HostConfig.Memory, CPUs: cpusFor(&st.HostConfig.Resources), Disks: disks,
	})
	if err != nil {
		return nil, disks, err
	}
	g := e.newGuest(m)
	u.add("machine", func(ctx context.Context) error {
		g.once.Do(func() { close(g.over) })
		g.link.close()
		return m.Remove(ctx)
	})
	return g, disks, nil
}

// stepHandover gives the machine what the step needs and returns the step's mounts and
// the engine's files as the machine sees them.
func (e *Engine) stepHandover(ctx context.Context, st *Step, g *guest, disks sandbox.Disks, ns *network.Namespace) (mounts, files []spec.Mount, kernel sandbox.Prepared, err error) {
	h := sandbox.MachineHandover{ID: st.ID, Disks: disks}
	taps := g.machine.Taps(st.ID)
	for i, ep := range ns.Endpoints {
		if ep.HostInterface == "" {
			continue
		}
		if i >= len(taps) {
			return nil, nil, kernel, errdefs.ErrResourceExhausted.WithMessage("the step's virtual machine has no interface left")
		}
		plug, err := e.cfg.Networks.PlugTap(ctx, st.ID, ep.NetworkID, taps[i])
		if err != nil {
			return nil, nil, kernel, err
		}
		h.NICs = append(h.NICs, sandbox.NIC{Tap: taps[i], Plug: plug})
	}
	for _, name := range networkFiles {
		files = append(files, spec.Mount{Type: "bind", Source: filepath.Join(e.runDir(st.ID), name), Destination: "/etc/" + name, ReadOnly: st.HostConfig.ReadonlyRootfs, Engine: true})
	}
	if h.Files, err = machineFiles(files); err != nil {
		return nil, nil, kernel, err
	}
	mounts = append(mounts, st.Mounts...)
	for i := range mounts {
		if mounts[i].Type == "bind" && mounts[i].Beneath != "" {
			return nil, nil, kernel, errdefs.ErrInvalidArgument.WithMessage("mount on " + mounts[i].Destination + ": its directory was not looked up")
		}
	}
	if h.Shares, err = machineShares(mounts); err != nil {
		return nil, nil, kernel, err
	}
	mp, err := g.machine.Handover(ctx, h)
	if err != nil {
		return nil, nil, kernel, err
	}
	for i := range files {
		files[i].Source = mp.Files[i]
	}
	shares := mp.Shares
	for i := range mounts {
		if mounts[i].Type == "bind" {
			mounts[i].Source, shares = shares[0], shares[1:]
		}
	}
	return mounts, files, mp.Prepared, nil
}

// stepChanges brings what a step has written to the host.
func (e *Engine) stepChanges(ctx context.Context, client *task.Client, st *Step, g *guest, disks sandbox.Disks) error {
	if err := deleteTask(ctx, client, st.ID); err != nil {
		return err
	}
	f := task.Files{ID: st.ID, Root: g.machine.Root(st.ID, disks.Image != ""), Skip: append([]string(nil), engineFiles...)}
	for _, m := range st.Mounts {
		f.Skip = append(f.Skip, m.Destination)
	}
	diff, err := client.Diff(ctx, f)
	if err != nil {
		return fmt.Errorf("changes of a step: %w", err)
	}
	defer diff.Close()
	if err := st.Apply(ctx, diff); err != nil {
		return fmt.Errorf("changes of a step: %w", err)
	}
	return nil
}
