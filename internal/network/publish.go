package network

import (
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/network/link"
	"tenon.dev/tenon/internal/network/nft"
)

// claimPorts reserves the host's ports for the record's bindings.
// The sockets that hold them are the caller's, after an error as well.
func (c *Controller) claimPorts(r *contRecord) (held []*os.File, err error) {
	if len(r.Bindings) == 0 {
		return nil, nil
	}
	c.mu.Lock()
	g4, g6 := c.publishEnds(r)
	def := c.cfg.HostBindingIPv4
	if g4 >= 0 {
		if a, err := netip.ParseAddr(c.nets[r.Endpoints[g4].NetworkID].rec.Options[optHostIPv4]); err == nil {
			def = a
		}
	}
	c.mu.Unlock()
	if g4 < 0 && g6 < 0 {
		return nil, nil // only internal networks: like Docker, nothing is published
	}
	for _, b := range r.Bindings {
		var ips []netip.Addr
		switch ip := b.HostIP.Unmap(); {
		case !ip.IsValid() && def.IsValid() && !def.IsUnspecified():
			ips = []netip.Addr{def}
		case !ip.IsValid():
			if g4 >= 0 {
				ips = append(ips, netip.IPv4Unspecified())
			}
			if g6 >= 0 {
				ips = append(ips, netip.IPv6Unspecified())
			}
		default:
			ips = []netip.Addr{ip.WithZone("")}
		}
		for _, ip := range ips {
			if ip.Is4() && g4 < 0 || ip.Is6() && g6 < 0 {
				return held, fmt.Errorf("port %d/%s cannot be published on %s: the container has no address of that family (create its network with --ipv6): %w", b.ContainerPort, b.Proto, ip, errdefs.ErrInvalidArgument)
			}
		}
		got, files, err := c.claim(b, ips, r.ID)
		if err != nil {
			return held, err
		}
		held = append(held, files...)
		for _, p := range got {
			g := g4
			if p.HostIP.Is6() {
				g = g6
			}
			r.Ports = append(r.Ports, portRecord{p, r.Endpoints[g].NetworkID})
		}
	}
	return held, nil
}

// publishEnds are the endpoints that published ports lead to.
func (c *Controller) publishEnds(r *contRecord) (g4, g6 int) {
	eps := slices.Clone(r.Endpoints)
	for i, e := range eps {
		if n := c.nets[e.NetworkID]; n == nil || !n.isBridge() {
			eps[i].Gateway, eps[i].Gateway6 = netip.Addr{}, netip.Addr{}
		}
	}
	return gateways(eps)
}

// tablePorts are the record's ports as the nftables table has them.
func tablePorts(r *contRecord) []nft.Port {
	var out []nft.Port
	for _, p := range r.Ports {
		i := slices.IndexFunc(r.Endpoints, func(e Endpoint) bool { return e.NetworkID == p.NetworkID })
		proto, err := protoNumber(p.Proto)
		if i < 0 || err != nil {
			continue
		}
		to := r.Endpoints[i].IPv4
		if p.HostIP.Is6() {
			to = r.Endpoints[i].IPv6
		}
		if to.IsValid() {
			out = append(out, nft.Port{Proto: proto, HostIP: p.HostIP, HostPort: p.HostPort, To: netip.AddrPortFrom(to.Addr(), p.ContainerPort)})
		}
	}
	return out
}

func (c *Controller) publish(r *contRecord) error {
	ports := tablePorts(r)
	if err := c.table.Publish(ports); err != nil {
		return err
	}
	c.flushFlows(ports)
	c.lead(r)
	return c.hairpin(r)
}

// unpublish is the undo of publish for ports that may lead elsewhere by now.
func (c *Controller) unpublish(ports []nft.Port) error {
	c.shut(ports)
	return c.table.Unpublish(ports)
}

// hairpin lets a container reach itself by a published port where
// br_netfilter is on: there such a frame is bridged, not routed, and a bridge
// does not send a frame back to the port that it came from.
func (c *Controller) hairpin(r *contRecord) error {
	if !brNetfilter("iptables") && !brNetfilter("ip6tables") {
		return nil
	}
	var b link.Batch
	for _, p := range c.plugs(r.Endpoints) {
		if p.Parent == "" && !c.unplugged(r, p.HostInterface) {
			setPort(&b, p, true)
		}
	}
	return c.rtnl.Do(&b)
}
