package network

import (
	"maps"
	"net/netip"
	"os"
	"slices"

	mobynet "github.com/moby/moby/api/types/network"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/network/link"
	"tenon.dev/tenon/internal/network/nft"
	"tenon.dev/tenon/internal/network/shortcut"
)

// Doors lead the host's own connections to published ports of TCP straight to
// the containers (see package shortcut). Like shortcuts they are an addition:
// the rules publish every port, with its door or without.

// doorsOf are the record's doors.
func (c *Controller) doorsOf(r *contRecord) []shortcut.Door {
	var doors []shortcut.Door
	for _, p := range tablePorts(r) {
		if p.Proto == unix.IPPROTO_TCP && c.hasDoors(r, p.HostIP, p.To.Addr()) {
			doors = append(doors, shortcut.Door{On: netip.AddrPortFrom(p.HostIP, p.HostPort), To: p.To})
		}
	}
	return doors
}

// lead makes doors of the record's published ports. The programs, which see every
// connect on the machine, are there only from the first door on, and a moment
// later: nobody waits for them.
func (c *Controller) lead(r *contRecord) {
	if c.path == nil || c.ctx.Err() != nil {
		return
	}
	doors := c.doorsOf(r)
	if len(doors) == 0 {
		return
	}
	if err := c.doors.Load().Set(doors...); err != nil {
		c.log.Warn("connections to a published port are translated packet by packet", "container", r.ID, "err", err)
	}
	c.doorsOnce.Do(func() {
		c.wg.Add(1)
		go func() {
			defer c.wg.Done()
			c.openDoors()
		}()
	})
}

// openDoors loads the programs, or says why there are none, makes doors of all
// that is published, and watches the host's addresses until the controller ends.
func (c *Controller) openDoors() {
	d, err := shortcut.OpenDoors()
	if err != nil {
		c.log.Info("the host's own connections to published ports are translated packet by packet", "err", err)
		return
	}
	c.doors.Store(d)
	c.mu.Lock()
	ids := slices.Collect(maps.Keys(c.conts))
	c.mu.Unlock()
	for _, id := range ids {
		unlock, err := c.keys.lock(c.ctx, id) // nobody takes its ports away meanwhile
		if err != nil {
			return
		}
		c.mu.Lock()
		r := c.conts[id]
		c.mu.Unlock()
		if r != nil {
			c.lead(r)
		}
		unlock()
	}
	c.switchDoors()
	if err := link.WatchAddresses(c.ctx, c.listAddresses); err != nil {
		c.log.Warn("the host's addresses are not watched: only 127.0.0.1 has doors to published ports", "err", err)
		_ = d.Locals(nil)
	}
}

// hasDoors says whether the network that the record's address belongs to has shortcuts,
// and the port is not one of a bridge's own address.
func (c *Controller) hasDoors(r *contRecord, on, to netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range c.nets {
		if slices.ContainsFunc(n.rec.IPAM.Config, func(cfg mobynet.IPAMConfig) bool { return cfg.Gateway == on }) {
			return false
		}
	}
	for _, e := range r.Endpoints {
		if e.IPv4.Addr() == to {
			n := c.nets[e.NetworkID]
			return n != nil && n.optBool(optShortcuts, true)
		}
	}
	return false
}

// shut takes the doors of ports away.
func (c *Controller) shut(ports []nft.Port) {
	var on []netip.AddrPort
	for _, p := range ports {
		if p.Proto == unix.IPPROTO_TCP {
			on = append(on, netip.AddrPortFrom(p.HostIP, p.HostPort))
		}
	}
	if err := c.doors.Load().Remove(on...); err != nil {
		c.log.Error("connections to a port that is not published any more are still led to the container", "err", err)
	}
}

// switchDoors opens the doors unless others' rules would see packets differently.
func (c *Controller) switchDoors() {
	if c.doors.Load() == nil {
		return
	}
	c.switching.Lock()
	defer c.switching.Unlock()
	why, err := c.table.OthersOutput()
	if err != nil {
		c.log.Warn("rules of others cannot be listed", "err", err)
		why = "unknown"
	}
	const old = "/proc/net/ip_tables_names"
	if b, err := os.ReadFile(old); why == "" && err == nil && len(b) > 0 {
		why = old
	}
	changed, err := c.doors.Load().Switch(why == "")
	if err != nil {
		c.log.Error("some published ports are led to containers otherwise than intended", "err", err)
	}
	if changed {
		c.log.Info("doors to published ports", "on", why == "", "rules", why)
	}
}

// listAddresses tells doors which addresses the host has. The bridges' own are
// left to the rules, which give their clients another address than that.
func (c *Controller) listAddresses() {
	addrs := map[netip.Addr]bool{}
	links, err := c.rtnl.Links()
	var list []netlink.Addr
	if err == nil {
		list, err = netlink.AddrList(nil, unix.AF_INET)
	}
	if err != nil {
		c.log.Warn("the host's addresses cannot be listed", "err", err)
	}
	bridges := map[int]bool{}
	for _, l := range links {
		bridges[l.Index] = c.ownsBridge(l)
	}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok && !bridges[a.LinkIndex] {
			addrs[ip] = true
		}
	}
	if err := c.doors.Load().Locals(addrs); err != nil {
		c.log.Warn("doors to published ports are not on all of the host's addresses", "err", err)
	}
}
