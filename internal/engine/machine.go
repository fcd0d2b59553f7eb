package engine

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/mount"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/layered"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/rootfs"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// guest is a container's machine, from its creation until it is removed.
type guest struct {
	machine sandbox.Machine
	link    *link
	root    *taskv1.Root  // as the machine sees it
	over    chan struct{} // closed when the engine removes the machine
	once    sync.Once

	mu      sync.Mutex
	streams []*task.Attachment
}

func (e *Engine) newGuest(m sandbox.Machine) *guest {
	return &guest{machine: m, link: newLink(e.ctx, m, e.log), over: make(chan struct{})}
}

// machineID names a container's machine: short, since sockets lie in a
// directory of that name.
func machineID(id string) string { return id[:20] }

// onMachine is the container's machine; nil: it has none.
func (c *ctr) onMachine() *guest {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.guest
}

// onMachineLocked is onMachine with mu held.
func (c *ctr) onMachineLocked() *guest { return c.guest }

func (c *ctr) setMachine(g *guest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.guest = g
}

// track remembers streams whose last bytes are to arrive before the machine
// goes.
func (c *ctr) track(a *task.Attachment) {
	g := c.onMachine()
	if g == nil || a == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.streams = slices.DeleteFunc(g.streams, func(x *task.Attachment) bool { return isClosed(x.Done()) })
	g.streams = append(g.streams, a)
}

// drainTime bounds how long an ended container's machine waits for clients that
// do not read.
const drainTime = 30 * time.Second

func (g *guest) drain(ctx context.Context) {
	g.mu.Lock()
	list := slices.Clone(g.streams)
	g.mu.Unlock()
	t := time.NewTimer(drainTime)
	defer t.Stop()
	for _, a := range list {
		select {
		case <-a.Done():
		case <-t.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// endTask lets the shim forget an ended container; its machine, if it has one,
// ends with it. client is nil if the shim is gone.
func (e *Engine) endTask(ctx context.Context, client *task.Client, c *ctr) error {
	g := c.onMachine()
	if g != nil && client != nil {
		g.drain(ctx)
		_ = client.FlushLog(ctx, c.id) // the log ends with the task at the latest
	}
	var errs []error
	if client != nil {
		if _, err := client.Delete(ctx, c.id, ""); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	if g != nil {
		errs = append(errs, e.endMachine(ctx, c, g, client != nil && !c.record().HostConfig.AutoRemove))
	}
	return errors.Join(errs...)
}

// endMachine removes a container's machine; with write its disks are written
// back first.
func (e *Engine) endMachine(ctx context.Context, c *ctr, g *guest, write bool) error {
	g.once.Do(func() { close(g.over) })
	if write {
		if err := g.machine.PowerOff(ctx); err != nil {
			e.log.Warn("virtual machine does not power off", "container", c.id, "err", err)
		}
	}
	g.link.close()
	c.mu.Lock()
	if c.guest == g {
		c.guest = nil
	}
	c.mu.Unlock()
	return g.machine.Remove(ctx)
}

// prepareMachine is prepare for a container with a kernel of its own: it makes
// the machine, gives it what the container needs, and connects to its shim.
func (e *Engine) prepareMachine(ctx context.Context, c *ctr, rn *run, u *undo) (_ *prepared, _ *task.Client, err error) {
	r := c.record()
	if _, err := e.machines(ctx); err != nil {
		return nil, nil, err
	}
	q, err := e.networkRequest(r)
	if err != nil {
		return nil, nil, err
	}
	q.Plumbing = plumbVM
	u.add("network", func(ctx context.Context) error {
		c.setNetwork(nil)
		return e.cfg.Networks.Disconnect(ctx, c.id)
	})
	p := &prepared{}
	netDone := make(chan error, 1)
	go func() {
		var err error
		p.ns, err = e.cfg.Networks.Connect(ctx, q)
		netDone <- err
	}()
	g, disks, machineErr := e.makeMachine(ctx, c, u)
	if err := <-netDone; err != nil {
		return nil, nil, err
	}
	c.setNetwork(p.ns)
	if machineErr != nil {
		return nil, nil, machineErr
	}
	p.on = g.machine
	defer func() {
		if err != nil && isClosed(g.machine.Ended()) {
			err = fmt.Errorf("the container's virtual machine ended (%s): %w", g.machine.End(), err)
		}
	}()
	if err := failpoint("start-network"); err != nil {
		return nil, nil, err
	}
	h, err := e.machineHandover(ctx, c, p, g, disks)
	if err != nil {
		return nil, nil, err
	}
	mp, err := g.machine.Handover(ctx, h)
	if err != nil {
		return nil, nil, err
	}
	p.kernel = mp.Prepared
	for i := range p.files {
		p.files[i].Source = mp.Files[i]
	}
	shares := mp.Shares
	for i := range p.mounts {
		if p.mounts[i].Type == "bind" {
			p.mounts[i].Source, shares = shares[0], shares[1:]
		}
	}
	g.root = g.machine.Root(c.id, disks.Image != "")
	client, seq, err := g.connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	p.accounts, err = e.machineAccounts(ctx, c, g, client)
	if err != nil {
		return nil, nil, err
	}
	e.spawn(func() { e.watchMachine(c, rn, g, client, seq) })
	return p, client, nil
}

// makeMachine makes a container's machine with its disks.
func (e *Engine) makeMachine(ctx context.Context, c *ctr, u *undo) (*guest, sandbox.Disks, error) {
	r := c.record()
	disks, err := e.machineDisks(ctx, r)
	if err != nil {
		return nil, disks, err
	}
	req := sandbox.MachineRequest{ID: machineID(c.id), Hostname: r.Config.Hostname, Memory: r.HostConfig.Memory, Disks: disks}
	l, err := e.logSettings(r)
	if err != nil {
		return nil, disks, err
	}
	if l != nil {
		if err := os.MkdirAll(filepath.Dir(l.Path), 0o700); err != nil {
			return nil, disks, fmt.Errorf("container log: %w", err)
		}
		req.Logs = map[string]*taskv1.Log{c.id: l}
	}
	m, err := e.cfg.Machines.Create(ctx, req)
	if err != nil {
		return nil, disks, err
	}
	g := e.newGuest(m)
	c.setMachine(g)
	u.add("machine", func(ctx context.Context) error { return e.endMachine(ctx, c, g, false) })
	return g, disks, nil
}

// machineDisks makes, or finds again, the disks of a container's root.
func (e *Engine) machineDisks(ctx context.Context, r *container.Record) (sandbox.Disks, error) {
	img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
	if err != nil {
		return sandbox.Disks{}, fmt.Errorf("container %s: its image: %w", r.ID, err)
	}
	limit, err := spec.DiskLimit(r.HostConfig)
	if err != nil {
		return sandbox.Disks{}, err
	}
	d, err := e.cfg.Roots.PrepareDisks(ctx, r.ID, img, rootfs.Options{Volatile: r.HostConfig.AutoRemove, SizeLimit: limit})
	if err != nil {
		return sandbox.Disks{}, err
	}
	return sandbox.Disks{Image: d.Image, Upper: d.Upper, Volatile: d.Volatile}, nil
}

// machineHandover plugs the machine in and lists what its container gets.
func (e *Engine) machineHandover(ctx context.Context, c *ctr, p *prepared, g *guest, disks sandbox.Disks) (sandbox.MachineHandover, error) {
	r := c.record()
	h := sandbox.MachineHandover{ID: c.id, Disks: disks}
	taps := g.machine.Taps()
	for i, ep := range p.ns.Endpoints {
		if i == len(taps) {
			tap, err := g.machine.AddTap(ctx)
			if err != nil {
				return h, err
			}
			taps = append(taps, tap)
		}
		plug, err := e.plugTap(ctx, c.id, ep.NetworkID, taps[i])
		if err != nil {
			return h, err
		}
		h.NICs = append(h.NICs, sandbox.NIC{Tap: taps[i], Plug: plug})
	}
	var err error
	if p.files, err = e.writeFiles(r, p.ns); err != nil {
		return h, err
	}
	if h.Files, err = machineFiles(p.files); err != nil {
		return h, err
	}
	if p.mounts, err = e.specMounts(r); err != nil {
		return h, err
	}
	for _, m := range p.mounts {
		if m.Type != "bind" {
			continue
		}
		st, err := os.Stat(m.Source)
		if err != nil {
			return h, fmt.Errorf("bind mount: %w", err)
		}
		h.Shares = append(h.Shares, sandbox.Share{Path: m.Source, ReadOnly: m.ReadOnly, File: !st.IsDir()})
	}
	return h, nil
}

// machineFiles reads the engine's files of a container.
func machineFiles(files []spec.Mount) ([]sandbox.File, error) {
	var out []sandbox.File
	for _, f := range files {
		b, err := os.ReadFile(f.Source)
		if err != nil {
			return nil, fmt.Errorf("container's files: %w", err)
		}
		out = append(out, sandbox.File{Name: path.Base(f.Source), Mode: 0o644, Data: b})
	}
	return out, nil
}

// connect connects to the machine's shim and says up to which event nothing has
// been missed.
func (g *guest) connect(ctx context.Context) (*task.Client, uint64, error) {
	client, _, err := g.machine.Connect(ctx)
	if err != nil {
		return nil, 0, err
	}
	_, seq, err := client.List(ctx, "")
	if err != nil {
		client.Close()
		return nil, 0, err
	}
	g.link.set(client)
	return client, seq, nil
}

// silentTime is how long a machine that runs may not answer before it is given
// up.
const silentTime = 15 * time.Second

// watchMachine follows the events of a machine's shim until the machine is gone.
func (e *Engine) watchMachine(c *ctr, rn *run, g *guest, client *task.Client, seq uint64) {
	for {
		err := client.Events(e.ctx, seq, func(ev *taskv1.Event) error {
			seq = ev.Sequence
			return e.onEvent(client, ev)
		})
		if e.ctx.Err() != nil || isClosed(g.over) {
			return
		}
		if !errors.Is(err, errGap) {
			g.link.clear()
		}
		next, n, err := e.reconnectMachine(c, rn, g)
		switch {
		case e.ctx.Err() != nil || isClosed(g.over):
			return
		case err != nil:
			e.machineLost(c, rn, g, err)
			return
		}
		client, seq = next, n
	}
}

// reconnectMachine connects again to the shim of a machine that runs.
func (e *Engine) reconnectMachine(c *ctr, rn *run, g *guest) (*task.Client, uint64, error) {
	ctx, cancel := context.WithTimeout(e.ctx, silentTime)
	defer cancel()
	for {
		select { // a machine that has ended is known to have at once, or a moment later
		case <-g.machine.Ended():
			return nil, 0, errors.New(g.machine.End())
		case <-g.over:
			return nil, 0, errors.New("removed")
		case <-time.After(20 * time.Millisecond):
		}
		if isClosed(g.machine.Ended()) {
			continue
		}
		g.link.clear()
		client, seq, err := g.connect(ctx)
		if err == nil {
			var procs []*taskv1.Process
			if procs, _, err = client.List(ctx, c.id); err == nil {
				if t := initTasks(procs)[c.id]; t != nil && t.Status == taskv1.Status_STATUS_STOPPED {
					x := exitFacts{code: int(t.ExitStatus), at: time.Unix(0, t.ExitedAt), oom: t.OomKilled}
					e.spawn(func() { e.exited(client, c, rn, x) })
				}
				return client, seq, nil
			}
		}
		if ctx.Err() != nil {
			if !isClosed(g.machine.Ended()) {
				err = fmt.Errorf("it did not answer for %v: %w", silentTime, err)
			}
			return nil, 0, err
		}
	}
}

// machineLost ends the run of a container whose machine is gone.
func (e *Engine) machineLost(c *ctr, rn *run, g *guest, why error) {
	text := g.machine.End()
	if text == "" {
		text = why.Error()
	}
	e.log.Warn("a container's virtual machine ended", "container", c.id, "reason", text)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanTime)
	defer cancel()
	if err := e.endMachine(ctx, c, g, false); err != nil {
		e.log.Error("something of a virtual machine is left", "container", c.id, "err", err)
	}
	e.exited(nil, c, rn, exitFacts{code: 137, at: time.Now(), unknown: "the container's virtual machine ended: " + text})
}

// accounts are /etc/passwd and /etc/group of a container's root.
type accounts struct{ passwd, group []byte }

// machineAccounts reads them: from the image, or if the container may have
// changed them, by its machine.
func (e *Engine) machineAccounts(ctx context.Context, c *ctr, g *guest, client *task.Client) (*accounts, error) {
	r := c.record()
	if r.Facts.Run <= 1 && !r.Facts.Changed {
		img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
		if err != nil {
			return nil, fmt.Errorf("container %s: its image: %w", r.ID, err)
		}
		layers, err := e.cfg.Images.Layers(ctx, img)
		if err != nil {
			return nil, err
		}
		a := new(accounts)
		if a.passwd, err = readAccounts(layered.Stack(layers), "/etc/passwd"); err == nil {
			a.group, err = readAccounts(layered.Stack(layers), "/etc/group")
		}
		return a, err
	}
	return readMachineAccounts(ctx, client, task.Files{ID: c.id, Root: g.root})
}

func readMachineAccounts(ctx context.Context, client *task.Client, f task.Files) (*accounts, error) {
	a := new(accounts)
	var err error
	if a.passwd, err = readMachineFile(ctx, client, f, "/etc/passwd"); err == nil {
		a.group, err = readMachineFile(ctx, client, f, "/etc/group")
	}
	return a, err
}

// readMachineFile reads a small file of a container by its shim, following
// links; nil if there is none.
func readMachineFile(ctx context.Context, client *task.Client, f task.Files, name string) ([]byte, error) {
	for range 8 {
		body, st, err := client.ReadFiles(ctx, f, name)
		if errdefs.IsNotFound(err) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if st.LinkTarget != "" {
			body.Close()
			to := st.LinkTarget
			if !path.IsAbs(to) {
				to = path.Join(path.Dir(name), to)
			}
			name = to
			continue
		}
		b, err := readOneFile(body)
		body.Close()
		return b, err
	}
	return nil, nil // links without end: an image without accounts
}

func readOneFile(r io.Reader) ([]byte, error) {
	t := tar.NewReader(r)
	h, err := t.Next()
	if err != nil {
		return nil, fmt.Errorf("accounts: %w", err)
	}
	if h.Typeflag != tar.TypeReg {
		return nil, nil
	}
	return spec.ReadAccounts(t)
}

// machineFacts are what a record keeps of the machine that its container runs
// on.
func (e *Engine) machineFacts(g *guest) *container.Machine {
	p, f := g.machine.Proof(), g.machine.Facts()
	return &container.Machine{
		ID: g.machine.ID(), Pid: p.Pid, Accel: p.Accel, Kernel: f.KernelRelease, KernelLog: p.KernelLog, HostBoot: e.cfg.Kernel.Facts().BootID,
	}
}

// checkMachine refuses what a container on a kernel of its own can't have, or
// not yet, before anything is made.
func checkMachine(r *container.Record) error {
	h := r.HostConfig
	no := func(what string) error {
		return errdefs.ErrNotImplemented.WithMessage(what + " can't be had with --isolation vm in this release; nothing was started")
	}
	switch {
	case h.Privileged:
		return no("--privileged")
	case len(h.Devices) > 0:
		return no("--device (a device of the host)")
	case len(h.DeviceRequests) > 0:
		return no("--gpus and other device requests")
	case len(h.BlkioDeviceReadBps)+len(h.BlkioDeviceWriteBps)+len(h.BlkioDeviceReadIOps)+len(h.BlkioDeviceWriteIOps)+len(h.BlkioWeightDevice) > 0:
		return no("a limit of a block device")
	case h.NetworkMode.IsHost():
		return no("--network host")
	case h.NetworkMode.IsContainer():
		return no("--network container:… (the other container runs on another kernel)")
	case h.PidMode != "":
		return no("--pid " + string(h.PidMode))
	case h.IpcMode.IsHost() || h.IpcMode.IsContainer():
		return no("--ipc " + string(h.IpcMode))
	case h.UTSMode.IsHost():
		return no("--uts host")
	case h.CgroupnsMode.IsHost():
		return no("--cgroupns host")
	case h.UsernsMode != "" && h.UsernsMode != "host":
		return no("--userns " + string(h.UsernsMode))
	case h.CgroupParent != "":
		return no("--cgroup-parent")
	case h.Runtime != "" && h.Runtime != "tenon":
		return no("--runtime " + h.Runtime)
	case h.Init != nil && *h.Init:
		return no("--init")
	}
	for _, m := range r.Mounts {
		switch {
		case m.Type == mount.TypeTmpfs:
		case m.Type == mount.TypeBind && strings.HasSuffix(string(m.Propagation), "private"), m.Type == mount.TypeVolume:
			return no("a mount of the host's files (" + m.Destination + ")")
		case m.Type == mount.TypeBind:
			return no("mount propagation (" + m.Destination + ")")
		default:
			return no("a mount of type " + string(m.Type) + " (" + m.Destination + ")")
		}
	}
	return nil
}

// foundMachine is what recovery knows of a container with a kernel of its own.
type foundMachine struct {
	verdict verdict
	machine sandbox.Machine // nil: there is none
	guest   *guest          // connected; nil: it does not answer, or there is none
	client  *task.Client
	task    *taskv1.Process
	seq     uint64
}

// findMachines judges the containers with kernels of their own by the machines
// that an earlier engine left; what belongs to nobody is removed.
func (e *Engine) findMachines(ctx context.Context) map[*ctr]*foundMachine {
	machines := map[string]sandbox.Machine{}
	if e.cfg.Machines != nil {
		list, err := e.cfg.Machines.List(ctx)
		if err != nil {
			e.log.Error("virtual machines are not known; containers on them are taken for lost", "err", err)
		}
		for _, m := range list {
			machines[m.ID()] = m
		}
	}
	out := map[*ctr]*foundMachine{}
	for _, c := range e.all() {
		if onHost(c.record()) {
			continue
		}
		f := &foundMachine{machine: machines[machineID(c.id)]}
		delete(machines, machineID(c.id))
		if f.machine != nil && !isClosed(f.machine.Ended()) {
			e.findTask(ctx, c, f)
		}
		f.verdict = decide(seen{record: c.record(), task: f.task, run: runOf(f.task)})
		out[c] = f
	}
	for _, m := range machines {
		e.log.Warn("virtual machine without a container is ended", "machine", m.ID())
		if err := m.Remove(ctx); err != nil {
			e.log.Error("virtual machine without a container is left", "machine", m.ID(), "err", err)
		}
	}
	return out
}

// findTask asks a machine's shim for the container.
func (e *Engine) findTask(ctx context.Context, c *ctr, f *foundMachine) {
	ctx, cancel := context.WithTimeout(ctx, silentTime)
	defer cancel()
	g := e.newGuest(f.machine)
	client, seq, err := g.connect(ctx)
	var procs []*taskv1.Process
	if err == nil {
		procs, seq, err = client.List(ctx, "")
	}
	if err != nil {
		e.log.Error("virtual machine does not answer", "container", c.id, "machine", f.machine.ID(), "err", err)
		g.link.close()
		return
	}
	f.guest, f.client, f.seq, f.task = g, client, seq, initTasks(procs)[c.id]
	g.root = f.machine.Root(c.id, e.hasLayers(ctx, c.record()))
}

// hasLayers says whether a container's root has a disk for its image.
func (e *Engine) hasLayers(ctx context.Context, r *container.Record) bool {
	img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
	if err != nil {
		return true
	}
	layers, err := e.cfg.Images.Layers(ctx, img)
	return err != nil || len(layers) > 0
}

// applyMachines acts on the verdicts and returns when each has been acted on.
func (e *Engine) applyMachines(ctx context.Context, found map[*ctr]*foundMachine) {
	slots := make(chan struct{}, recoverParallel)
	var wg sync.WaitGroup
	for c, f := range found {
		if f.verdict == settled && f.machine == nil {
			continue
		}
		e.log.Info("container found again", "container", c.id, "name", c.record().Name, "isolation", sandbox.VM, "verdict", f.verdict.String())
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := e.actMachine(ctx, c, f); err != nil {
				e.log.Error("container could not be taken over", "container", c.id, "verdict", f.verdict.String(), "err", err)
			}
		})
	}
	wg.Wait()
}

// actMachine does what a verdict says for one container with a kernel of its
// own.
func (e *Engine) actMachine(ctx context.Context, c *ctr, f *foundMachine) error {
	if (f.verdict == adopt || f.verdict == exited) && f.guest != nil {
		c.setMachine(f.guest)
		if err := e.act(ctx, f.client, c, f.verdict, f.task); err != nil || f.verdict == exited {
			return err
		}
		rn := c.runOrNew()
		e.spawn(func() { e.watchMachine(c, rn, f.guest, f.client, f.seq) })
		return nil
	}
	var reason string
	if f.machine != nil {
		reason = f.machine.End()
		if f.guest != nil {
			f.guest.link.close()
		}
		if err := f.machine.Remove(ctx); err != nil {
			return err
		}
	}
	if f.verdict == lost && reason != "" {
		e.exited(nil, c, c.runOrNew(), exitFacts{code: 137, at: time.Now(), unknown: "the container's virtual machine ended: " + reason})
		return nil
	}
	return e.act(ctx, nil, c, f.verdict, nil)
}

// plumbVM is the plumbing whose taps are plugged in one by one.
const plumbVM network.Plumbing = "vm"

// plugTap puts a machine's tap into a network's bridge.
func (e *Engine) plugTap(ctx context.Context, id, networkID, tap string) (network.Plug, error) {
	p, ok := any(e.cfg.Networks).(interface {
		PlugTap(ctx context.Context, id, networkID, tap string) (network.Plug, error)
	})
	if !ok {
		return network.Plug{}, errdefs.ErrNotImplemented.WithMessage("networks of virtual machines are not available in this release")
	}
	return p.PlugTap(ctx, id, networkID, tap)
}
