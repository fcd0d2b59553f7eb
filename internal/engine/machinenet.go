package engine

import (
	"context"
	"fmt"
	"path/filepath"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
)

// plugsOf are the endpoints of a container with a machine, as its interfaces
// have them; nil for one on the host's kernel.
func (e *Engine) plugsOf(c *ctr) []network.Plug {
	if c.onMachine() == nil {
		return nil
	}
	plugs, err := e.cfg.Networks.Plugs(c.id)
	if err != nil {
		return nil // it has no network
	}
	return plugs
}

// replug makes the interfaces of a container's machine agree with its
// endpoints, which were before as given.
func (e *Engine) replug(ctx context.Context, c *ctr, before []network.Plug) error {
	g := c.onMachine()
	if g == nil {
		return nil
	}
	after, err := e.cfg.Networks.Plugs(c.id)
	if err != nil {
		return err
	}
	find := func(list []network.Plug, name string) *network.Plug {
		for i := range list {
			if list[i].Interface == name {
				return &list[i]
			}
		}
		return nil
	}
	for _, b := range before {
		if a := find(after, b.Interface); a == nil {
			if err := g.machine.Unplug(ctx, c.id, sandbox.NIC{Tap: b.HostInterface, Plug: b}, true); err != nil {
				return err
			}
		} else if a.Default4 != b.Default4 || a.Default6 != b.Default6 { // its routes go with it
			if err := g.machine.Unplug(ctx, c.id, sandbox.NIC{Tap: b.HostInterface, Plug: b}, false); err != nil {
				return err
			}
			if err := g.machine.Plug(ctx, c.id, sandbox.NIC{Tap: b.HostInterface, Plug: *a}); err != nil {
				return err
			}
		}
	}
	ns, err := e.cfg.Networks.Namespace(c.id)
	if err != nil {
		return err
	}
	for _, ep := range ns.Endpoints {
		if ep.HostInterface != "" && find(before, ep.Interface) == nil {
			if err := e.plugNew(ctx, c, g, ep.NetworkID, after); err != nil {
				return fmt.Errorf("network %s: %w", ep.NetworkName, err)
			}
		}
	}
	return nil
}

// plugNew gives an endpoint an interface of the machine: one that nobody uses,
// or a new one.
func (e *Engine) plugNew(ctx context.Context, c *ctr, g *guest, networkID string, used []network.Plug) error {
	tap := ""
	for _, t := range g.machine.Taps(c.id) {
		free := true
		for _, p := range used {
			free = free && p.HostInterface != t
		}
		if free {
			tap = t
			break
		}
	}
	if tap == "" {
		var err error
		if tap, err = g.machine.AddTap(ctx, c.id); err != nil {
			return err
		}
	}
	plug, err := e.cfg.Networks.PlugTap(ctx, c.id, networkID, tap)
	if err != nil {
		return err
	}
	return g.machine.Plug(ctx, c.id, sandbox.NIC{Tap: tap, Plug: plug})
}

// refreshFiles writes a machine's copies of the engine's files again.
func (e *Engine) refreshFiles(ctx context.Context, c *ctr) error {
	g := c.onMachine()
	if g == nil {
		return nil
	}
	var list []spec.Mount
	for _, name := range []string{"hosts", "resolv.conf"} {
		list = append(list, spec.Mount{Source: filepath.Join(e.runDir(c.id), name)})
	}
	files, err := machineFiles(list)
	if err != nil {
		return err
	}
	for _, other := range e.all() { // those that share its network have copies of their own
		if o := other.onMachine(); o != nil && o.kernel == g.kernel && other.record().HostConfig.NetworkMode.ConnectedContainer() == c.id {
			if err := g.machine.Files(ctx, other.id, files); err != nil {
				return err
			}
		}
	}
	return g.machine.Files(ctx, c.id, files)
}

// reachOf are the containers whose interfaces a process of this one can change if it
// has the capabilities, the first itself; all: everybody's on its kernel.
func (e *Engine) reachOf(r *container.Record) (ids []string, all bool) {
	ids = []string{r.ID}
	for _, peer := range []string{r.HostConfig.NetworkMode.ConnectedContainer(), r.HostConfig.PidMode.Container()} {
		if c, err := e.find(peer); peer != "" && err == nil {
			ids = append(ids, c.id)
		}
	}
	return ids, r.HostConfig.PidMode.IsHost()
}
