package engine

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// The files of a container with a kernel of its own lie in a file system that a
// guest has written. The host never mounts it: while the container does not run,
// its files are reached through a machine that is made for the purpose, has the
// same disks, and runs nothing but the shim. It stays for the next operation (a
// `docker cp` is two), and is gone before the container starts.

const (
	// offlineSuffix makes the machine's name, from the container's machine's.
	offlineSuffix = "files"
	// offlineTime is how long it stays unused.
	offlineTime = 3 * time.Second
	// powerOffTime bounds the writing back of its disks.
	powerOffTime = 30 * time.Second
)

func offlineID(id string) string { return machineID(id) + offlineSuffix }

// isOffline says whether a machine was made for files alone.
func isOffline(m sandbox.Machine) bool { return strings.HasSuffix(m.ID(), offlineSuffix) }

// offline is a container's machine for its files.
type offline struct {
	guard lock // held by who makes or ends it

	mu     sync.Mutex
	guest  *guest // nil: there is none
	client *task.Client
	users  int
	last   time.Time     // when it was used last
	unused chan struct{} // closed when the last user has gone; nil: nobody waits
}

func newOffline() *offline { return &offline{guard: newLock()} }

// offlineFiles makes the root of a container that does not run available, by the
// shim of a machine, until release is called. It waits for what is left of the
// last run. running says that the container runs, so that its own machine is the
// one to ask.
func (e *Engine) offlineFiles(ctx context.Context, c *ctr) (client *task.Client, root *taskv1.Root, release func(), running bool, err error) {
	o := c.offline
	for {
		if running, err := c.stillRuns(ctx); running || err != nil {
			return nil, nil, nil, running, err
		}
		if err := o.guard.lock(ctx); err != nil {
			return nil, nil, nil, false, err
		}
		if c.rests() { // a start from here on ends what is made
			break
		}
		o.guard.unlock()
	}
	defer o.guard.unlock()
	o.mu.Lock()
	g := o.guest
	o.mu.Unlock()
	if g != nil && isClosed(g.machine.Ended()) {
		if err := e.endOfflineLocked(ctx, c); err != nil {
			return nil, nil, nil, false, err
		}
		g = nil
	}
	if g == nil {
		if g, err = e.makeOffline(ctx, c); err != nil && machine.Named(c.record().Isolation) != "" {
			return nil, nil, nil, false, fmt.Errorf("container %s: %w", c.id, err)
		} else if err != nil {
			return nil, nil, nil, false, fmt.Errorf("container %s: a machine for its files: %w", c.id, err)
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.users++
	return o.client, g.root, sync.OnceFunc(o.leave), false, nil
}

// leave is the end of one use.
func (o *offline) leave() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.users--
	o.last = time.Now()
	if o.users == 0 && o.unused != nil {
		close(o.unused)
		o.unused = nil
	}
}

// stillRuns waits until nothing is left of the container's last run, unless it
// runs.
func (c *ctr) stillRuns(ctx context.Context) (bool, error) {
	c.mu.Lock()
	rn := c.run
	c.mu.Unlock()
	if rn == nil {
		return false, nil
	}
	select {
	case <-rn.settled: // a start is under way
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	if !isClosed(rn.exited) {
		return true, nil
	}
	select {
	case <-rn.done:
		return false, nil
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
}

// rests says that nothing is left of the container's last run, and no start is
// under way.
func (c *ctr) rests() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.run == nil || isClosed(c.run.done)
}

// makeOffline makes the machine, with the root's disks and the host's
// directories that are mounted in it.
func (e *Engine) makeOffline(ctx context.Context, c *ctr) (_ *guest, err error) {
	r := c.record()
	if _, err := e.machines(ctx); err != nil {
		return nil, err
	}
	g, err := e.offlineMachine(c)
	if err != nil {
		return nil, err
	}
	disks, err := e.machineDisks(ctx, r)
	if err != nil {
		return nil, err
	}
	mounts, err := e.specMounts(r)
	if err != nil {
		return nil, err
	}
	if g == nil {
		m, err := e.cfg.Machines.Create(ctx, sandbox.MachineRequest{ID: offlineID(c.id), Hostname: r.Config.Hostname, Disks: disks})
		if err != nil {
			return nil, err
		}
		g = e.newGuest(m)
	}
	m := g.machine
	defer func() {
		if err != nil {
			_ = e.endMachine(context.WithoutCancel(ctx), c, g, false) // the first error says more
		}
	}()
	release, err := e.holdMounts(r, mounts)
	if err != nil {
		return nil, err
	}
	defer release()
	shares, err := machineShares(mounts)
	if err != nil {
		return nil, err
	}
	h := sandbox.MachineHandover{ID: c.id, Disks: disks, NoNet: true, Shares: shares, Images: machineImages(mounts)}
	files := e.writtenFiles(r, mounts)
	if h.Files, err = machineFiles(files); err != nil {
		return nil, err
	}
	if m.Lasting() {
		if h.SizeLimit, err = spec.DiskLimit(r.HostConfig); err != nil {
			return nil, err
		}
	}
	p, err := m.Handover(ctx, h)
	if err != nil {
		return nil, err
	}
	g.root = m.Root(c.id, disks.Image != "")
	for i := range mounts {
		if mounts[i].Type == "bind" {
			mounts[i].Source, p.Shares = p.Shares[0], p.Shares[1:]
		}
	}
	mountGuestImages(mounts, p.Images, false)
	for i := range files {
		files[i].Source = p.Files[i]
	}
	for _, x := range append(mounts, files...) {
		if x.Type != "bind" {
			continue
		}
		o := x.Options
		if x.ReadOnly {
			o = append(o[:len(o):len(o)], "ro")
		}
		if x.Beneath != "" {
			o = append(o[:len(o):len(o)], spec.BeneathOption+x.Beneath)
		}
		g.root.Volumes = append(g.root.Volumes, &taskv1.Mount{Type: x.Type, Source: x.Source, Target: x.Destination, Options: o})
	}
	var client *task.Client
	if m.Lasting() {
		client, err = g.link.get(ctx)
	} else {
		client, _, err = g.connect(ctx)
	}
	if err != nil {
		return nil, err
	}
	c.offline.mu.Lock()
	c.offline.guest, c.offline.client, c.offline.last = g, client, time.Now()
	c.offline.mu.Unlock()
	e.spawn(func() { e.tendOffline(c, g) })
	return g, nil
}

// offlineMachine is the place of a container that does not run on its machine that
// lasts, which must run for that; nil: it has none.
func (e *Engine) offlineMachine(c *ctr) (*guest, error) {
	m := e.machOf(c.record())
	if m == nil {
		return nil, nil
	}
	k, err := m.running()
	if err != nil {
		return nil, fmt.Errorf("its files are on its machine's disk: %w", err)
	}
	return &guest{kernel: k}, nil
}

// tendOffline ends the machine when nobody has used it for a while, or the engine
// ends.
func (e *Engine) tendOffline(c *ctr, g *guest) {
	t := time.NewTicker(offlineTime / 3)
	defer t.Stop()
	for {
		select {
		case <-g.over:
			return
		case <-g.machine.Ended():
		case <-e.ctx.Done():
		case <-t.C:
			c.offline.mu.Lock()
			busy := c.offline.users > 0 || time.Since(c.offline.last) < offlineTime
			c.offline.mu.Unlock()
			if busy {
				continue
			}
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), powerOffTime)
		err := e.endOffline(ctx, c, false)
		cancel()
		if err != nil {
			e.log.Error("a machine for files is left; the next start of the daemon removes it", "container", c.id, "err", err)
		}
		return
	}
}

// endOffline writes the container's disks back and removes the machine for its
// files, if there is one. With wait it lets those finish who use it.
func (e *Engine) endOffline(ctx context.Context, c *ctr, wait bool) error {
	if onHost(c.record()) {
		return nil
	}
	if err := c.offline.guard.lock(ctx); err != nil {
		return err
	}
	defer c.offline.guard.unlock()
	for wait {
		c.offline.mu.Lock()
		if c.offline.users == 0 {
			c.offline.mu.Unlock()
			break
		}
		if c.offline.unused == nil {
			c.offline.unused = make(chan struct{})
		}
		unused := c.offline.unused
		c.offline.mu.Unlock()
		select {
		case <-unused:
		case <-ctx.Done():
			return fmt.Errorf("container %s: its files are in use: %w", c.id, context.Cause(ctx))
		}
	}
	return e.endOfflineLocked(ctx, c)
}

// endOfflineLocked is the end with the guard held.
func (e *Engine) endOfflineLocked(ctx context.Context, c *ctr) error {
	c.offline.mu.Lock()
	g := c.offline.guest
	c.offline.guest, c.offline.client = nil, nil
	c.offline.mu.Unlock()
	if g == nil {
		return nil
	}
	return e.endMachine(ctx, c, g, !isClosed(g.machine.Ended()))
}

// endAllOffline is endOffline for all containers, before all machines end.
func (e *Engine) endAllOffline(ctx context.Context) {
	var wg sync.WaitGroup
	for _, c := range e.all() {
		wg.Go(func() {
			if err := e.endOffline(ctx, c, false); err != nil {
				e.log.Warn("what was written to a container's files may be lost", "container", c.id, "err", err)
			}
		})
	}
	wg.Wait()
}

// powerOff has a machine write its disks back.
func powerOff(ctx context.Context, m sandbox.Machine) error {
	ctx, cancel := context.WithTimeout(ctx, powerOffTime)
	defer cancel()
	return m.PowerOff(ctx)
}
