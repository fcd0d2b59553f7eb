package engine

import (
	"context"
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
)

// enterMachine is a container's place on a machine that lasts.
func (e *Engine) enterMachine(ctx context.Context, c *ctr, u *undo) (*guest, error) {
	m := e.machOf(c.record())
	if m == nil {
		return nil, conflict("container %s: its %s is gone", c.id, machineText(c.record()))
	}
	k, err := m.running()
	if err != nil {
		return nil, err
	}
	if k.machine.Holds(c.id) { // what is left of its last run could not be taken back then
		if err := k.machine.Release(ctx, c.id); err != nil {
			return nil, fmt.Errorf("what is left of its last run: %w", err)
		}
	}
	g := &guest{kernel: k}
	c.setMachine(g)
	u.add("machine", func(ctx context.Context) error { return e.leaveMachine(ctx, c, g) })
	return g, nil
}

// leaveMachine takes back what a container had of a machine that lasts.
func (e *Engine) leaveMachine(ctx context.Context, c *ctr, g *guest) error {
	c.mu.Lock()
	ran := c.guest == g
	if ran {
		c.guest = nil
	}
	c.mu.Unlock()
	if ran { // before its interfaces are another container's
		c.setNetwork(nil)
		if err := e.cfg.Networks.Disconnect(ctx, c.id); err != nil {
			return err
		}
	}
	if isClosed(g.over) || isClosed(g.machine.Ended()) {
		return nil // it went with the machine
	}
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTime)
	defer cancel()
	err := g.machine.Release(rctx, c.id)
	if err != nil && isClosed(g.machine.Ended()) {
		return nil
	}
	return err
}

// discard removes what a container has written on its machine, and what its last
// run could not give back. If the machine does not run, its next start does it.
func (e *Engine) discard(ctx context.Context, c *ctr) error {
	m := e.machOf(c.record())
	if m == nil {
		return nil
	}
	k := m.current()
	if k == nil || isClosed(k.over) {
		return nil
	}
	dctx, cancel := context.WithTimeout(ctx, removeTime)
	defer cancel()
	var err error
	if k.machine.Holds(c.id) {
		err = k.machine.Release(dctx, c.id)
	}
	if err == nil {
		err = k.machine.Discard(dctx, c.id)
	}
	if err != nil && !isClosed(k.machine.Ended()) && !isClosed(k.over) {
		return fmt.Errorf("its files on machine %s: %w", m.record().Name, err)
	}
	return nil
}

// findPeers finds the containers whose namespaces are joined on a machine that
// lasts, and says early if it does not run.
func (e *Engine) findPeers(ctx context.Context, c *ctr, p *prepared) error {
	r := c.record()
	if machine.Named(r.Isolation) == "" {
		return nil
	}
	m := e.machOf(r)
	if m == nil {
		return conflict("container %s: its %s is gone", c.id, machineText(r))
	}
	k, err := m.started(ctx)
	if err != nil {
		return err
	}
	h := r.HostConfig
	for _, x := range []struct{ what, ref string }{
		{"network", h.NetworkMode.ConnectedContainer()}, {"IPC", h.IpcMode.Container()}, {"PID namespace", h.PidMode.Container()},
		{"user namespace", r.UserNSOf},
	} {
		if x.ref == "" {
			continue
		}
		peer, err := e.peer(r, x.ref, x.what)
		if err != nil {
			return err
		}
		pid, err := guestPid(ctx, k, peer.ID)
		if err != nil {
			return err
		}
		if p.pids == nil {
			p.pids = map[string]int{}
		}
		p.pids[peer.ID] = pid
		switch x.what {
		case "network":
			p.netPeer = k.machine.NamespacePath(pid, specs.NetworkNamespace)
		case "user namespace":
			p.userPeer = k.machine.NamespacePath(pid, specs.UserNamespace)
		}
	}
	return nil
}

// guestPid is a container's first process as its kernel counts.
func guestPid(ctx context.Context, k *kernel, id string) (int, error) {
	client, err := k.link.get(ctx)
	if err != nil {
		return 0, err
	}
	procs, _, err := client.List(ctx, id)
	if err != nil {
		return 0, err
	}
	t := initTasks(procs)[id]
	if t == nil || t.Pid == 0 {
		return 0, conflict("container %s does not run", id)
	}
	return int(t.Pid), nil
}

// pidOf is the first process of a container that is joined.
func (p *prepared) pidOf(peer *container.Record) int {
	if pid, ok := p.pids[peer.ID]; ok {
		return pid
	}
	return peer.Facts.Pid
}
