package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/rootfs"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// kernel is a machine that runs, and the connection to its shim.
type kernel struct {
	machine sandbox.Machine
	link    *link
	over    chan struct{} // closed when the engine removes the machine
	gone    chan struct{} // closed when one that lasts has ended by itself, and was removed
	once    sync.Once
	givenUp atomic.Bool // it did not answer, and was removed for it
}

// guest is a container on a machine: its own, from its creation until it is
// removed, or one that lasts, while it runs there.
type guest struct {
	*kernel
	root *taskv1.Root // as the machine sees it

	mu      sync.Mutex
	streams []*task.Attachment
}

func (e *Engine) newKernel(m sandbox.Machine) *kernel {
	return &kernel{machine: m, link: newLink(e.ctx, m, e.log), over: make(chan struct{}), gone: make(chan struct{})}
}

func (e *Engine) newGuest(m sandbox.Machine) *guest { return &guest{kernel: e.newKernel(m)} }

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

// machineRoot is the container's root as its machine sees it; nil: it has none.
func (c *ctr) machineRoot() *taskv1.Root {
	if g := c.onMachine(); g != nil {
		return g.root
	}
	return nil
}

func (c *ctr) setMachine(g *guest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.guest = g
}

// track remembers streams whose last bytes are to arrive before the machine
// goes.
func (c *ctr) track(a *task.Attachment) {
	if a == nil {
		return
	}
	c.mu.Lock()
	c.attached = slices.DeleteFunc(c.attached, func(x *task.Attachment) bool { return isClosed(x.Done()) })
	c.attached = append(c.attached, a)
	c.mu.Unlock()
	g := c.onMachine()
	if g == nil {
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
		fctx, cancel := context.WithTimeout(ctx, flushTime)
		_ = client.FlushLog(fctx, c.id) // the log ends with the task at the latest
		cancel()
	}
	var errs []error
	if client != nil {
		dctx, cancel := ctx, context.CancelFunc(func() {})
		if g != nil {
			dctx, cancel = context.WithTimeout(ctx, silentTime)
		}
		_, err := client.Delete(dctx, c.id, "")
		cancel()
		if err != nil && !errdefs.IsNotFound(err) && g == nil { // a machine ends whatever it has
			errs = append(errs, err)
		}
	}
	if g != nil {
		errs = append(errs, e.endMachine(ctx, c, g, client != nil && (!c.record().HostConfig.AutoRemove || c.held()))) // a restart finds its files again
	}
	return errors.Join(errs...)
}

// endMachine removes a container's machine; with write its disks are written
// back first. One that lasts only takes back what the container had of it.
func (e *Engine) endMachine(ctx context.Context, c *ctr, g *guest, write bool) error {
	if g.machine.Lasting() {
		return e.leaveMachine(ctx, c, g)
	}
	g.once.Do(func() { close(g.over) })
	if write {
		pctx, cancel := context.WithTimeout(ctx, powerOffTime)
		if err := g.machine.PowerOff(pctx); err != nil {
			e.log.Warn("virtual machine does not power off", "container", c.id, "err", err)
		}
		cancel()
	}
	g.link.close()
	c.mu.Lock()
	if c.guest == g {
		c.guest = nil
	}
	c.mu.Unlock()
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTime) // whatever the rest has taken
	defer cancel()
	return g.machine.Remove(rctx)
}

// removeTime bounds the removal of a machine.
const removeTime = 30 * time.Second

// prepareMachine is prepare for a container that runs on a machine: it makes the
// machine, unless that lasts, gives it what the container needs, and connects to
// its shim.
func (e *Engine) prepareMachine(ctx context.Context, c *ctr, rn *run, u *undo) (_ *prepared, _ *task.Client, err error) {
	r := c.record()
	if _, err := e.machines(ctx); err != nil {
		return nil, nil, err
	}
	q, err := e.networkRequest(r)
	if err != nil {
		return nil, nil, err
	}
	q.Plumbing = network.PlumbVM
	p := &prepared{held: func() {}}
	defer func() { p.held() }()
	if err := e.findPeers(ctx, c, p); err != nil {
		return nil, nil, err
	}
	u.add("network", func(ctx context.Context) error {
		c.setNetwork(nil)
		return e.cfg.Networks.Disconnect(ctx, c.id)
	})
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
			err = fmt.Errorf("%s ended (%s): %w", machineText(r), g.machine.End(), err)
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
	if h.NetAdmin {
		g.machine.Taint(e.reachOf(r))
	}
	if p.kernel = mp.Prepared; p.netPeer != "" {
		p.kernel.NetNS = p.netPeer
	}
	for i := range p.files {
		p.files[i].Source = mp.Files[i]
	}
	if len(mp.Files) > len(p.files) {
		p.init = mp.Files[len(p.files)]
	}
	shares := mp.Shares
	for i := range p.mounts {
		if p.mounts[i].Type == "bind" {
			p.mounts[i].Source, shares = shares[0], shares[1:]
		}
	}
	mountGuestImages(p.mounts, mp.Images, r.UserNS != nil)
	p.usernsPath = mp.UserNS
	g.root = g.machine.Root(c.id, disks.Image != "")
	client, watch, err := e.guestClient(ctx, c, rn, g)
	if err != nil {
		return nil, nil, err
	}
	if g.machine.Lasting() {
		if err := e.prepareShm(ctx, r, p); err != nil {
			return nil, nil, err
		}
	}
	p.accounts, err = e.machineAccounts(ctx, c, g, client)
	if err != nil {
		return nil, nil, err
	}
	if err := machineDevices(ctx, client, r.HostConfig, p); err != nil {
		return nil, nil, err
	}
	e.spawn(watch)
	return p, client, nil
}

// guestClient connects to the shim of a container's machine. watch follows its
// events; for a machine that lasts somebody does already.
func (e *Engine) guestClient(ctx context.Context, c *ctr, rn *run, g *guest) (client *task.Client, watch func(), err error) {
	if g.machine.Lasting() {
		client, err = g.link.get(ctx)
		return client, func() {}, err
	}
	client, seq, err := g.connect(ctx)
	return client, func() { e.watchMachine(g.kernel, client, seq, onlyGuest{e, c, rn, g}) }, err
}

// machineText names the machine of a container in a sentence.
func machineText(r *container.Record) string {
	if name := machine.Named(r.Isolation); name != "" {
		return "machine " + name
	}
	return "the container's virtual machine"
}

// makeMachine makes a container's machine with its disks, or takes the one that
// lasts.
func (e *Engine) makeMachine(ctx context.Context, c *ctr, u *undo) (*guest, sandbox.Disks, error) {
	r := c.record()
	disks, err := e.machineDisks(ctx, r)
	if err != nil {
		return nil, disks, err
	}
	if machine.Named(r.Isolation) != "" {
		g, err := e.enterMachine(ctx, c, u)
		return g, disks, err
	}
	req := sandbox.MachineRequest{ID: machineID(c.id), Hostname: r.Config.Hostname, Memory: r.HostConfig.Memory, CPUs: cpusFor(&r.HostConfig.Resources), Disks: disks}
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

// lastingHandover adds what a machine that lasts has to know of a container.
func (e *Engine) lastingHandover(r *container.Record, h *sandbox.MachineHandover) (err error) {
	if h.SizeLimit, err = spec.DiskLimit(r.HostConfig); err != nil {
		return err
	}
	hc := r.HostConfig
	caps, err := spec.Capabilities(hc.CapAdd, hc.CapDrop, hc.Privileged, e.factsOf(r.Isolation).Capabilities)
	if err != nil {
		return err
	}
	h.NetAdmin = slices.Contains(caps, "CAP_NET_ADMIN")
	if h.Log, err = e.logSettings(r); err != nil || h.Log == nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(h.Log.Path), 0o700); err != nil {
		return fmt.Errorf("container log: %w", err)
	}
	return nil
}

// machineDisks makes, or finds again, the disks of a container's root.
func (e *Engine) machineDisks(ctx context.Context, r *container.Record) (sandbox.Disks, error) {
	img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
	if err != nil {
		return sandbox.Disks{}, fmt.Errorf("container %s: its image: %w", r.ID, err)
	}
	if machine.Named(r.Isolation) != "" { // what it writes is on the machine's own disk
		path, err := e.cfg.Images.EROFS(ctx, img)
		return sandbox.Disks{Image: path, Volatile: r.HostConfig.AutoRemove}, err
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
	h := sandbox.MachineHandover{ID: c.id, Disks: disks, NoNet: r.HostConfig.NetworkMode.IsHost() && !ownHost(r) || p.netPeer != ""}
	if g.machine.Lasting() {
		if err := e.lastingHandover(r, &h); err != nil {
			return h, err
		}
	}
	taps := g.machine.Taps(c.id)
	for _, ep := range p.ns.Endpoints {
		if ep.HostInterface == "" { // "none": no interface
			continue
		}
		i := len(h.NICs)
		if i == len(taps) {
			tap, err := g.machine.AddTap(ctx, c.id)
			if err != nil {
				return h, err
			}
			taps = append(taps, tap)
		}
		plug, err := e.cfg.Networks.PlugTap(ctx, c.id, ep.NetworkID, taps[i])
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
	if r.HostConfig.Init != nil && *r.HostConfig.Init {
		program, err := e.cfg.Kernel.Init()
		if err != nil {
			return h, err
		}
		b, err := os.ReadFile(program)
		if err != nil {
			return h, fmt.Errorf("init: %w", err)
		}
		h.Files = append(h.Files, sandbox.File{Name: "init", Mode: 0o755, Data: b})
	}
	if p.mounts, err = e.specMounts(r); err != nil {
		return h, err
	}
	release, err := e.holdMounts(r, p.mounts)
	if err != nil {
		return h, err
	}
	p.held = release
	h.Images = machineImages(p.mounts)
	if h.Shares, err = machineShares(p.mounts); err != nil {
		return h, err
	}
	err = e.mapMachine(r, p, &h)
	return h, err
}

// machineShares are the host's directories and files among the mounts, in their
// order.
func machineShares(mounts []spec.Mount) ([]sandbox.Share, error) {
	var out []sandbox.Share
	for _, m := range mounts {
		if m.Type != "bind" {
			continue
		}
		st, err := os.Stat(m.Source)
		if err != nil {
			return nil, fmt.Errorf("bind mount: %w", err)
		}
		out = append(out, sandbox.Share{Path: m.Source, ReadOnly: m.ReadOnly, File: !st.IsDir()})
	}
	return out, nil
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
func (g *kernel) connect(ctx context.Context) (*task.Client, uint64, error) {
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

// silentTime is how long a machine may not answer what somebody waits for before
// it is given up.
const silentTime = 15 * time.Second

// keeper is told what becomes of a machine.
type keeper interface {
	// found is called when the connection was lost and is there again, with what
	// the shim has.
	found(client *task.Client, procs []*taskv1.Process)
	// lost is called once if the machine is gone, and was not removed by the engine.
	lost(why error)
}

// watchMachine follows the events of a machine's shim until the machine is gone.
func (e *Engine) watchMachine(k *kernel, client *task.Client, seq uint64, to keeper) {
	for {
		err := client.Events(e.ctx, seq, func(ev *taskv1.Event) error {
			seq = ev.Sequence
			return e.onEvent(client, ev)
		})
		if e.ctx.Err() != nil || isClosed(k.over) {
			return
		}
		if !errors.Is(err, errGap) {
			k.link.clear()
		}
		next, n, err := e.reconnectMachine(k, to)
		switch {
		case e.ctx.Err() != nil || isClosed(k.over):
			return
		case err != nil:
			to.lost(err)
			return
		}
		client, seq = next, n
	}
}

// reconnectTime bounds how long the shim of a machine that runs may refuse
// connections. A guest that hangs tenon-vmm ends, after a time that is set.
const reconnectTime = 10 * time.Minute

// reconnectMachine connects again to the shim of a machine that runs.
func (e *Engine) reconnectMachine(k *kernel, to keeper) (*task.Client, uint64, error) {
	ctx, cancel := context.WithTimeout(e.ctx, reconnectTime)
	defer cancel()
	for {
		select { // a machine that has ended is known to have at once, or a moment later
		case <-k.machine.Ended():
			return nil, 0, errors.New(k.machine.End())
		case <-k.over:
			return nil, 0, errors.New("removed")
		case <-time.After(20 * time.Millisecond):
		}
		if isClosed(k.machine.Ended()) {
			continue
		}
		k.link.clear()
		client, seq, err := k.connect(ctx)
		if err == nil {
			var procs []*taskv1.Process
			if procs, _, err = client.List(ctx, ""); err == nil {
				to.found(client, procs)
				return client, seq, nil
			}
		}
		if ctx.Err() != nil {
			if !isClosed(k.machine.Ended()) {
				err = fmt.Errorf("it did not answer for %v: %w", reconnectTime, err)
			}
			return nil, 0, err
		}
	}
}

// end is why a machine is gone.
func (k *kernel) end(why error) string {
	switch text := k.machine.End(); {
	case k.givenUp.Load():
		return "it did not answer"
	case text == "":
		return why.Error()
	default:
		return text
	}
}

// ended acts on the end of a container's run that a shim knows of.
func (e *Engine) ended(client *task.Client, c *ctr, rn *run, t *taskv1.Process) {
	if t == nil || t.Status != taskv1.Status_STATUS_STOPPED {
		return
	}
	x := exitFacts{code: int(t.ExitStatus), at: time.Unix(0, t.ExitedAt), oom: t.OomKilled}
	e.spawn(func() { e.exited(client, c, rn, x) })
}

// onlyGuest keeps the machine of one container.
type onlyGuest struct {
	e  *Engine
	c  *ctr
	rn *run
	g  *guest
}

func (o onlyGuest) found(client *task.Client, procs []*taskv1.Process) {
	o.e.ended(client, o.c, o.rn, initTasks(procs)[o.c.id])
}

// lost ends the run of a container whose machine is gone.
func (o onlyGuest) lost(why error) {
	e, text := o.e, o.g.end(why)
	e.log.Warn("a container's virtual machine ended", "container", o.c.id, "reason", text)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanTime)
	defer cancel()
	if err := e.endMachine(ctx, o.c, o.g, false); err != nil {
		e.log.Error("something of a virtual machine is left", "container", o.c.id, "err", err)
	}
	e.exited(nil, o.c, o.rn, exitFacts{code: 137, at: time.Now(), unknown: "the container's virtual machine ended: " + text})
}

// machineFacts are what a record keeps of the machine that its container runs
// on.
func (e *Engine) machineFacts(g *guest) *container.Machine {
	p, f := g.machine.Proof(), g.machine.Facts()
	return &container.Machine{
		ID: g.machine.ID(), Pid: p.Pid, Accel: p.Accel, Kernel: f.KernelRelease, KernelLog: p.KernelLog, HostBoot: e.cfg.Kernel.Facts().BootID,
	}
}
