package engine

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"
	mobynet "github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/rootfs"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
)

// StepIsolation says what a step runs in that asks for this, with the daemon's
// default. Errors: InvalidArgument, FailedPrecondition (no virtual machines here),
// Conflict (the machine does not run).
func (e *Engine) StepIsolation(ctx context.Context, asked string) (string, error) {
	iso, _, err := e.isolation(ctx, mobycontainer.Isolation(asked))
	if err == nil && iso == sandbox.OwnSystem {
		return "", invalid("a build's steps can't run with --isolation machine, which boots disk images: use process, vm or machine=NAME")
	}
	if err != nil || machine.Named(iso) == "" {
		return iso, err
	}
	_, err = e.stepKernelOn(ctx, iso)
	return iso, err
}

// stepKernelOn is the machine that lasts which a step is to run on.
func (e *Engine) stepKernelOn(ctx context.Context, isolation string) (*kernel, error) {
	m := e.machOf(&container.Record{Isolation: isolation})
	if m == nil {
		return nil, notFound("there is no machine %s", machine.Named(isolation))
	}
	return m.started(ctx)
}

// runStepVM runs a step on a machine of its own, or one that lasts. The machine gets
// the layers as one read-only file system and a place to write, and tells in the end
// what has changed, as a tar: the host mounts nothing that a guest has written.
func (e *Engine) runStepVM(ctx context.Context, st *Step, u *undo) (exit task.Exit, err error) {
	if st.HostConfig.NetworkMode.IsHost() {
		if machine.Named(st.Isolation) != "" {
			return exit, errdefs.ErrNotImplemented.WithMessage("a step on a machine can't have its kernel's network, which leads nowhere: use the default one")
		}
		st.HostConfig.NetworkMode = mobynet.NetworkBridge // the guest's own, which reaches out by that
	}
	if names, err := os.ReadDir(st.Upper); err != nil || len(names) > 0 {
		return exit, errdefs.ErrNotImplemented.WithMessage("a step on a virtual machine can't go on with a root that has been written to")
	}
	if _, err := e.machines(ctx); err != nil {
		return exit, err
	}
	r := stepRecord(st)
	ns, files, err := e.stepNetwork(ctx, r, network.PlumbVM, u)
	if err != nil {
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
	mounts, sockets, kernel, err := e.stepHandover(ctx, st, g, disks, ns, files)
	if err != nil {
		return exit, err
	}
	var client *task.Client
	ending := u
	if g.machine.Lasting() {
		client, err = g.link.get(ctx)
	} else {
		ending = new(undo) // the machine's end is the task's
		client, _, err = g.connect(ctx)
	}
	if err != nil {
		return exit, err
	}
	req, err := e.stepRequest(st, r, stepKernel{kernel, g.machine.Facts(), e.defaultsOf(st.Isolation)}, files, mounts)
	if err != nil {
		return exit, err
	}
	for _, s := range sockets {
		if err := s.serve(ctx, client, u); err != nil {
			return exit, err
		}
	}
	exit, err = e.runStepOn(ctx, client, st, req, g.machine.Ended(), ending)
	if err != nil || exit.Status != 0 {
		return exit, err // what a step that has failed has written is not wanted
	}
	return exit, e.stepChanges(ctx, client, st, g, disks)
}

// stepMachine makes a step's machine with its disks, or takes the one that lasts.
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
	if machine.Named(st.Isolation) != "" {
		k, err := e.stepKernelOn(ctx, st.Isolation)
		if err != nil {
			return nil, disks, err
		}
		g := &guest{kernel: k}
		u.add("place on the machine", func(ctx context.Context) error { return e.leaveStep(ctx, st.ID, g) })
		return g, disks, nil
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

// leaveStep takes back what a step had of a machine that lasts, and what it wrote there.
func (e *Engine) leaveStep(ctx context.Context, id string, g *guest) error {
	if err := e.cfg.Networks.Disconnect(ctx, id); err != nil { // before its interfaces are another's
		return err
	}
	if isClosed(g.over) || isClosed(g.machine.Ended()) {
		return nil // it went with the machine
	}
	err := g.machine.Release(ctx, id)
	if err == nil {
		err = g.machine.Discard(ctx, id)
	}
	if err != nil && isClosed(g.machine.Ended()) {
		return nil
	}
	return err
}

// stepHandover gives the machine what the step needs and returns the step's mounts as
// the machine sees them; the sources of files are changed to that.
func (e *Engine) stepHandover(ctx context.Context, st *Step, g *guest, disks sandbox.Disks, ns *network.Namespace, files []spec.Mount) (mounts []spec.Mount, sockets []stepSocket, kernel sandbox.Prepared, err error) {
	h := sandbox.MachineHandover{ID: st.ID, Disks: disks}
	if g.machine.Lasting() {
		h.SizeLimit = e.cfg.DiskLimit
	}
	taps := g.machine.Taps(st.ID)
	for _, ep := range ns.Endpoints {
		if ep.HostInterface == "" {
			continue
		}
		i := len(h.NICs)
		if i == len(taps) {
			tap, err := g.machine.AddTap(ctx, st.ID)
			if err != nil {
				return nil, nil, kernel, err
			}
			taps = append(taps, tap)
		}
		plug, err := e.cfg.Networks.PlugTap(ctx, st.ID, ep.NetworkID, taps[i])
		if err != nil {
			return nil, nil, kernel, err
		}
		h.NICs = append(h.NICs, sandbox.NIC{Tap: taps[i], Plug: plug})
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
	lent := make([]spec.Mount, 0, len(mounts))
	served := map[int]bool{}
	for i, m := range mounts {
		s, err := socketOf(st.ID, i, m)
		if err != nil {
			return nil, nil, kernel, err
		}
		if s == nil {
			lent = append(lent, m)
			continue
		}
		sockets, served[i] = append(sockets, *s), true
		mounts[i].Source = s.there.Path
	}
	if h.Shares, err = machineShares(lent); err != nil {
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
		if mounts[i].Type == "bind" && !served[i] {
			mounts[i].Source, shares = shares[0], shares[1:]
		}
	}
	return mounts, sockets, mp.Prepared, nil
}

// stepSocket is a socket of the host that a step on a machine has: an agent of the
// build's client. Its connections are carried to the machine.
type stepSocket struct {
	here  string
	there task.Socket
}

// socketOf is the socket that is mounted; nil if it is none.
func socketOf(id string, n int, m spec.Mount) (*stepSocket, error) {
	if m.Type != "bind" {
		return nil, nil
	}
	var st unix.Stat_t
	if err := unix.Lstat(m.Source, &st); err != nil {
		return nil, fmt.Errorf("mount on %s: %w", m.Destination, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, nil
	}
	return &stepSocket{here: m.Source, there: task.Socket{
		Path: fmt.Sprintf("/run/tenon/served/%s/%d", id, n), Mode: st.Mode & 0o777, UID: st.Uid, GID: st.Gid,
	}}, nil
}

// serve has the machine make the socket, for as long as the step lasts.
func (s stepSocket) serve(ctx context.Context, client *task.Client, u *undo) error {
	done, err := client.Serve(ctx, s.there, channel.Unix(s.here).Dial)
	if errdefs.IsNotImplemented(err) {
		err = fmt.Errorf("its guest is of an older build, which serves no sockets: start the machine again: %w", err)
	}
	if err != nil {
		return fmt.Errorf("socket of a step: %w", err)
	}
	u.add("socket", func(context.Context) error { done(); return nil })
	return nil
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
