package network

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/network/link"
)

// ConnectNetwork attaches a running container to one more network. Errors:
// NotFound, InvalidArgument, AlreadyExists (it is on that network),
// FailedPrecondition (it has no namespace of its own).
func (c *Controller) ConnectNetwork(ctx context.Context, containerID string, req EndpointRequest) (_ Endpoint, err error) {
	unlock, err := c.keys.lock(ctx, containerID)
	if err != nil {
		return Endpoint{}, err
	}
	defer unlock()
	fail := func(err error) (Endpoint, error) {
		return Endpoint{}, fmt.Errorf("connect container %s to network %s: %w", shortID(containerID), req.Network, err)
	}
	c.mu.Lock()
	r, n, err := c.attachableLocked(containerID, req.Network)
	var ep Endpoint
	if err == nil {
		port := randomHex(8)
		ep, err = c.allocateLocked(n, req, port, freeIndex(r.Endpoints))
	}
	if err == nil && slices.ContainsFunc(r.Endpoints, func(e Endpoint) bool { return e.Interface == ep.Interface }) {
		c.freeAddrsLocked(&ep)
		err = fmt.Errorf("interface %s exists in the container: %w", ep.Interface, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		c.mu.Unlock()
		return fail(err)
	}
	ep.DNSNames = dnsNames(r, req.Aliases)
	old := r.Endpoints
	next := slices.DeleteFunc(slices.Clone(old), func(e Endpoint) bool { return e.HostInterface == "" }) // not "none" any more
	c.setEndpointsLocked(r, append(next, ep))
	c.mu.Unlock()

	err = writeJSON(c.contPath(r.ID), r, false)
	if err == nil {
		err = c.raiseSegments(ctx, []Endpoint{ep})
	}
	plugs := c.plugs(r.Endpoints)
	if err == nil {
		err = c.evict([]Endpoint{ep})
	}
	if err == nil {
		err = c.pin([]Endpoint{ep})
	}
	if err == nil {
		plug := plugs[len(plugs)-1]
		err = c.plumberFor(r).Attach(ctx, r.NSID, plug)
	}
	if err == nil {
		err = c.plumberFor(r).Default(ctx, r.NSID, plugs)
	}
	if err == nil {
		err = c.republish(r)
	}
	if err != nil {
		_ = c.plumberFor(r).Detach(context.WithoutCancel(ctx), r.NSID, plugs[len(plugs)-1]) // it may not have come so far
		c.mu.Lock()
		c.freeAddrsLocked(&ep)
		c.setEndpointsLocked(r, old)
		c.mu.Unlock()
		if werr := writeJSON(c.contPath(r.ID), r, false); werr != nil {
			c.log.Warn("endpoint record is out of date", "container", r.ID, "err", werr)
		}
		return fail(err)
	}
	c.mu.Lock()
	if r.Mode == ModeNone {
		r.Mode = ModeBridge
	}
	c.sendDNSLocked(r)
	rec := n.rec
	c.mu.Unlock()
	c.attachLater(r.ID)
	c.emit("connect", rec, containerID)
	return ep, nil
}

// attachableLocked checks that the container can join the network.
func (c *Controller) attachableLocked(id, network string) (*contRecord, *netw, error) {
	r := c.conts[id]
	if r == nil {
		return nil, nil, fmt.Errorf("container has no network: %w", errdefs.ErrNotFound)
	}
	n, err := c.findLocked(network)
	if err != nil {
		return nil, nil, err
	}
	if r.NSID == "" && !r.Plumbing.taps() {
		return nil, nil, fmt.Errorf("container sharing network namespace with another container or host cannot be connected to any other network: %w", errdefs.ErrFailedPrecondition)
	}
	if slices.ContainsFunc(r.Endpoints, func(e Endpoint) bool { return e.NetworkID == n.rec.ID }) {
		return nil, nil, fmt.Errorf("endpoint with name %s already exists in network %s: %w", r.Name, n.rec.Name, errdefs.ErrAlreadyExists)
	}
	return r, n, nil
}

// freeIndex is the lowest number without an ethN.
func freeIndex(eps []Endpoint) int {
	for i := 0; ; i++ {
		if !slices.ContainsFunc(eps, func(e Endpoint) bool { return e.Interface == "eth"+strconv.Itoa(i) }) {
			return i
		}
	}
}

// setEndpointsLocked replaces a container's endpoints.
func (c *Controller) setEndpointsLocked(r *contRecord, eps []Endpoint) {
	for _, e := range r.Endpoints {
		if n := c.nets[e.NetworkID]; n != nil {
			delete(n.eps, r.ID)
		}
	}
	r.Endpoints = eps
	for i := range r.Endpoints {
		if n := c.nets[r.Endpoints[i].NetworkID]; n != nil {
			n.eps[r.ID] = &r.Endpoints[i]
		}
	}
}

// republish lets published ports follow the container's default gateway.
func (c *Controller) republish(r *contRecord) error {
	if len(r.Bindings) == 0 {
		return nil
	}
	before := tablePorts(r)
	c.mu.Lock()
	g4, g6 := c.publishEnds(r)
	for i := range r.Ports {
		g := g4
		if r.Ports[i].HostIP.Is6() {
			g = g6
		}
		if g >= 0 {
			r.Ports[i].NetworkID = r.Endpoints[g].NetworkID
		}
	}
	c.mu.Unlock()
	if len(r.Ports) == 0 {
		held, err := c.claimPorts(r)
		if err != nil {
			closeAll(held)
			return err
		}
		c.dns.hold(r.ID, held)
	}
	after := tablePorts(r)
	if slices.Equal(before, after) {
		return nil
	}
	if err := c.unpublish(before); err != nil {
		return err
	}
	if err := c.publish(r); err != nil {
		return err
	}
	return writeJSON(c.contPath(r.ID), r, false)
}

// DisconnectNetwork takes a running container off a network. With force it is
// no error if the container is not there.
func (c *Controller) DisconnectNetwork(ctx context.Context, containerID, network string, force bool) error {
	unlock, err := c.keys.lock(ctx, containerID)
	if err != nil {
		return err
	}
	defer unlock()
	c.mu.Lock()
	r := c.conts[containerID]
	n, err := c.findLocked(network)
	at := -1
	if r != nil && n != nil {
		at = slices.IndexFunc(r.Endpoints, func(e Endpoint) bool { return e.NetworkID == n.rec.ID })
	}
	switch {
	case err != nil:
	case at < 0 && force:
		c.mu.Unlock()
		return nil
	case at < 0:
		err = fmt.Errorf("container %s is not connected to network %s: %w", shortID(containerID), n.rec.Name, errdefs.ErrFailedPrecondition)
	case r.Endpoints[at].HostInterface == "":
		err = fmt.Errorf("container cannot be disconnected from network %s: %w", n.rec.Name, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		c.mu.Unlock()
		return err
	}
	ep := r.Endpoints[at]
	rec := n.rec
	before := tablePorts(r)
	c.setEndpointsLocked(r, slices.Delete(slices.Clone(r.Endpoints), at, at+1))
	c.sendDNSLocked(r) // the name goes before the address
	c.mu.Unlock()

	if err := c.unpublish(before); err != nil {
		return err
	}
	// The kernel takes milliseconds to delete the pair; its end in the bridge
	// goes down first of all, and the rest is nobody's business to wait for.
	var b link.Batch
	b.SetDownName(ep.HostInterface)
	if err := c.rtnl.Do(&b); err != nil {
		c.log.Warn("endpoint could not be taken down", "container", containerID, "err", err)
	}
	gone := Plug{Interface: ep.Interface, HostInterface: ep.HostInterface}
	if err := c.plumberFor(r).Detach(ctx, r.NSID, gone); err != nil {
		return fmt.Errorf("disconnect container %s from network %s: %w", shortID(containerID), rec.Name, err)
	}
	if err := c.plumberFor(r).Default(ctx, r.NSID, c.plugs(r.Endpoints)); err != nil {
		return fmt.Errorf("disconnect container %s from network %s: %w", shortID(containerID), rec.Name, err)
	}
	if err := c.unpin(ep.HostInterface); err != nil {
		c.log.Warn("guard of a port is left in the table", "err", err)
	}
	c.mu.Lock()
	c.freeAddrsLocked(&ep)
	c.mu.Unlock()
	if err := c.republishAfter(r); err != nil {
		return err
	}
	if err := writeJSON(c.contPath(r.ID), r, false); err != nil {
		return err
	}
	c.emit("disconnect", rec, containerID)
	return nil
}

// republishAfter publishes ports again that were taken out of the table,
// where the container has a gateway left.
func (c *Controller) republishAfter(r *contRecord) error {
	if len(r.Ports) == 0 {
		return nil
	}
	c.mu.Lock()
	g4, g6 := c.publishEnds(r)
	for i := range r.Ports {
		g := g4
		if r.Ports[i].HostIP.Is6() {
			g = g6
		}
		r.Ports[i].NetworkID = ""
		if g >= 0 {
			r.Ports[i].NetworkID = r.Endpoints[g].NetworkID
		}
	}
	c.mu.Unlock()
	return c.publish(r)
}
