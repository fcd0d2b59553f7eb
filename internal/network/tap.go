package network

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/network/link"
)

// Plumbing says how a container's endpoints are plugged in.
type Plumbing string

const (
	// PlumbNetns is a network namespace with veth pairs (the default).
	PlumbNetns Plumbing = "netns"
	// PlumbTap is a tap interface for each endpoint, in the network's bridge:
	// Endpoint.HostInterface is its name. The guest on it gives itself the
	// endpoint's hardware address, addresses and routes.
	PlumbTap Plumbing = "tap"
)

// tapPlumber plugs taps into bridges, for virtual machines.
type tapPlumber struct {
	rtnl  *link.Socket
	owner uint32
}

var _ Plumber = tapPlumber{}

// Setup makes a tap for each endpoint.
func (p tapPlumber) Setup(ctx context.Context, ns string, plugs []Plug) error {
	for _, pl := range plugs {
		if err := p.Attach(ctx, ns, pl); err != nil {
			return err
		}
	}
	return nil
}

// Attach makes one more tap.
func (p tapPlumber) Attach(ctx context.Context, ns string, pl Plug) error {
	if pl.Parent != "" {
		return fmt.Errorf("a virtual machine on a macvlan network: %w", errdefs.ErrNotImplemented)
	}
	var b link.Batch
	b.DelLink(pl.HostInterface) // of a former try: it would keep its index
	if err := p.rtnl.Do(&b); err != nil {
		return err
	}
	if err := link.MakeTap(pl.HostInterface, pl.HostIndex, p.owner); err != nil {
		return err
	}
	b = link.Batch{}
	b.PlugTap(pl.HostInterface, pl.HostIndex, pl.BridgeIndex, pl.MTU)
	setPort(&b, pl, false)
	return p.rtnl.Do(&b)
}

// Detach deletes a tap.
func (p tapPlumber) Detach(ctx context.Context, ns string, pl Plug) error {
	var b link.Batch
	b.DelLink(pl.HostInterface)
	return p.rtnl.Do(&b)
}

// Default does nothing: routes are the guest's.
func (p tapPlumber) Default(ctx context.Context, ns string, plugs []Plug) error { return nil }

// plumberFor is what plugs a container's endpoints in.
func (c *Controller) plumberFor(r *contRecord) Plumber {
	if r.Plumbing == PlumbTap {
		return tapPlumber{c.rtnl, r.Owner}
	}
	if r.Plumbing == PlumbVM {
		return vmPlumber{c.rtnl}
	}
	return c.plumber()
}

// dropTaps deletes a container's taps in the background.
func (c *Controller) dropTaps(eps []Endpoint) {
	var b link.Batch
	var ports []string
	for _, e := range eps {
		if e.HostInterface != "" {
			b.DelLink(e.HostInterface)
			ports = append(ports, e.HostInterface)
		}
	}
	c.wg.Add(1)
	go func() {
		defer c.wg.Done()
		if err := c.rtnl.Do(&b); err != nil {
			c.log.Warn("taps are left; the next start removes them", "err", err)
		}
		if err := c.unpin(ports...); err != nil {
			c.log.Warn("guards of ports are left in the table", "err", err)
		}
	}()
}
