package network

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/network/link"
)

// PlumbVM is for a container whose machine has taps of its own: Connect plans
// everything and plugs nothing in, since the machine may not be there yet;
// [Controller.PlugTap] does it, endpoint by endpoint. The taps are never made and
// never deleted here. They may not have names as portName makes them.
const PlumbVM Plumbing = "vm"

// taps says whether the endpoints' other ends are not in the host's kernel.
func (p Plumbing) taps() bool { return p == PlumbTap || p == PlumbVM }

// vmPlumber plugs nothing in: the machine's holder does, by PlugTap.
type vmPlumber struct{ rtnl *link.Socket }

var _ Plumber = vmPlumber{}

// Setup refuses networks that a machine can't be on.
func (p vmPlumber) Setup(ctx context.Context, ns string, plugs []Plug) error {
	for _, pl := range plugs {
		if err := p.Attach(ctx, ns, pl); err != nil {
			return err
		}
	}
	return nil
}

// Attach is like Setup.
func (p vmPlumber) Attach(_ context.Context, _ string, pl Plug) error {
	if pl.Parent != "" {
		return fmt.Errorf("a virtual machine on a macvlan network: %w", errdefs.ErrNotImplemented)
	}
	return nil
}

// Detach takes a tap out of its bridge.
func (p vmPlumber) Detach(_ context.Context, _ string, pl Plug) error {
	var b link.Batch
	b.UnplugTap(pl.HostInterface)
	return p.rtnl.Do(&b)
}

// Default does nothing: routes are the guest's.
func (p vmPlumber) Default(context.Context, string, []Plug) error { return nil }

// PlugTap plugs the tap of a virtual machine into the network's bridge, guarded
// like every port, for the endpoint that the container (of PlumbVM) has there. It
// returns what the guest has to give its interface. A second call for the same
// endpoint moves it to the other tap. Errors: NotFound (container, endpoint, tap),
// Conflict (another endpoint has the tap), FailedPrecondition (no PlumbVM).
func (c *Controller) PlugTap(ctx context.Context, containerID, networkID, tap string) (Plug, error) {
	unlock, err := c.keys.lock(ctx, containerID)
	if err != nil {
		return Plug{}, err
	}
	defer unlock()
	p, err := c.plugTap(containerID, networkID, tap)
	if err != nil {
		return Plug{}, fmt.Errorf("plug %s into network %s for container %s: %w", tap, networkID, shortID(containerID), err)
	}
	return p, nil
}

func (c *Controller) plugTap(containerID, networkID, tap string) (Plug, error) {
	index, missing := link.IndexOf(tap)
	if missing != nil && !link.IsMissing(missing) {
		return Plug{}, missing
	}
	c.mu.Lock()
	r, at, err := c.vmEndpointLocked(containerID, networkID)
	if err == nil && (c.isPortName(tap) || !bridgePattern.MatchString(tap)) {
		err = fmt.Errorf("bad name of a tap: %w", errdefs.ErrInvalidArgument)
	}
	if err == nil && missing != nil {
		err = fmt.Errorf("no such tap: %w: %w", missing, errdefs.ErrNotFound)
	}
	if err == nil {
		err = c.freeTapLocked(r, networkID, tap)
	}
	if err != nil {
		c.mu.Unlock()
		return Plug{}, err
	}
	before, beforeIndex := r.Endpoints[at].HostInterface, r.Endpoints[at].HostIndex
	r.Endpoints[at].HostInterface, r.Endpoints[at].HostIndex = tap, index
	ep := r.Endpoints[at]
	moved := before != tap || beforeIndex != index // a tap may have been made again
	c.mu.Unlock()

	undo := func(err error) (Plug, error) {
		c.mu.Lock()
		r.Endpoints[at].HostInterface, r.Endpoints[at].HostIndex = before, beforeIndex
		c.mu.Unlock()
		c.unplugTaps([]string{tap})
		return Plug{}, err
	}
	if moved {
		c.unplugTaps([]string{before, tap}) // whatever was there
	}
	// First of all: what dies next, the next start finds the tap by its name.
	if err := writeJSON(c.contPath(r.ID), r, false); err != nil {
		return undo(err)
	}
	plugs := c.plugs(r.Endpoints)
	i := slices.IndexFunc(plugs, func(p Plug) bool { return p.HostInterface == tap })
	if i < 0 {
		return undo(fmt.Errorf("network is gone: %w", errdefs.ErrNotFound))
	}
	if moved {
		if err := c.pin([]Endpoint{ep}); err != nil {
			return undo(err)
		}
	}
	var b link.Batch
	b.PlugTap(tap, index, plugs[i].BridgeIndex, plugs[i].MTU)
	setPort(&b, plugs[i], false)
	if err := c.rtnl.Do(&b); err != nil {
		if link.IsMissing(err) {
			err = fmt.Errorf("no such tap: %w: %w", err, errdefs.ErrNotFound)
		}
		return undo(err)
	}
	c.attachLater(r.ID)
	if len(r.Ports) > 0 {
		if err := c.hairpin(r); err != nil {
			return undo(err)
		}
	}
	return plugs[i], nil
}

// unplugged says that an endpoint of a machine still waits for its tap.
func (c *Controller) unplugged(r *contRecord, port string) bool {
	return r.Plumbing == PlumbVM && c.isPortName(port)
}

// vmEndpointLocked finds a machine's endpoint on a network.
func (c *Controller) vmEndpointLocked(containerID, networkID string) (*contRecord, int, error) {
	r := c.conts[containerID]
	if r == nil {
		return nil, 0, fmt.Errorf("container has no network: %w", errdefs.ErrNotFound)
	}
	if r.Plumbing != PlumbVM {
		return nil, 0, fmt.Errorf("container is on no virtual machine: %w", errdefs.ErrFailedPrecondition)
	}
	at := slices.IndexFunc(r.Endpoints, func(e Endpoint) bool { return e.NetworkID == networkID && e.HostInterface != "" })
	if at < 0 {
		return nil, 0, fmt.Errorf("container has no endpoint there: %w", errdefs.ErrNotFound)
	}
	return r, at, nil
}

// freeTapLocked checks that no other endpoint has the tap.
func (c *Controller) freeTapLocked(r *contRecord, networkID, tap string) error {
	for _, o := range c.conts {
		for _, e := range o.Endpoints {
			if e.HostInterface == tap && (o != r || e.NetworkID != networkID) {
				return fmt.Errorf("container %s has it on network %s: %w", shortID(o.ID), e.NetworkName, errdefs.ErrConflict)
			}
		}
	}
	return nil
}

// Plugs describes a container's endpoints as they are now, with the default
// routes where they belong. NotFound.
func (c *Controller) Plugs(containerID string) ([]Plug, error) {
	c.mu.Lock()
	r := c.conts[containerID]
	var eps []Endpoint
	if r != nil {
		eps = slices.Clone(r.Endpoints)
	}
	c.mu.Unlock()
	if r == nil {
		return nil, fmt.Errorf("container %s has no network: %w", shortID(containerID), errdefs.ErrNotFound)
	}
	return c.plugs(eps), nil
}

// unplugTaps takes taps out of their bridges, and then their guards away.
func (c *Controller) unplugTaps(taps []string) {
	var b link.Batch
	for _, t := range taps {
		b.UnplugTap(t)
	}
	if err := c.rtnl.Do(&b); err != nil {
		c.log.Warn("taps are left in their bridges, guarded", "taps", taps, "err", err)
		return
	}
	if err := c.unpin(taps...); err != nil {
		c.log.Warn("guards of ports are left in the table", "err", err)
	}
}

// leaveTaps unplugs a container's taps, at once, before their addresses are free:
// their machine may go on.
func (c *Controller) leaveTaps(eps []Endpoint) {
	var taps []string
	for _, e := range eps {
		if e.HostInterface != "" {
			taps = append(taps, e.HostInterface)
		}
	}
	c.unplugTaps(taps)
}

// NamespaceSysctls are the settings of a network namespace with these endpoints,
// by their names, to be made before its interfaces: what containers in the host's
// kernel have too.
func NamespaceSysctls(plugs []Plug) map[string]string {
	s := map[string]string{
		"net.ipv4.ping_group_range":           "0 2147483647",
		"net.ipv4.ip_unprivileged_port_start": "0",
	}
	if slices.ContainsFunc(plugs, func(p Plug) bool { return p.v6() }) {
		s["net.ipv6.conf.default.accept_dad"], s["net.ipv6.conf.default.accept_ra"] = "0", "0"
	} else {
		s["net.ipv6.conf.default.disable_ipv6"] = "1"
	}
	return s
}
