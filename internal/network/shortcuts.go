package network

import (
	"net/netip"
	"os"
	"strings"

	"tenon.dev/tenon/internal/network/link"
	"tenon.dev/tenon/internal/network/shortcut"
)

// Shortcuts lead frames past the bridges (see package shortcut). They are an
// addition: the guard, the bridges and their tables are complete without them,
// and whatever goes wrong with a shortcut leaves its port as it was without.

// openShortcuts loads the programs, or says why there are none.
func (c *Controller) openShortcuts() {
	if c.cfg.NoShortcuts {
		return
	}
	p, err := shortcut.Open()
	if err != nil {
		c.log.Warn("frames between containers go by the bridges, which is slower: the kernel takes no BPF programs", "err", err)
		return
	}
	c.path = p
}

// pin guards endpoints' ports and gives them shortcuts, in this order.
func (c *Controller) pin(eps []Endpoint) error {
	if err := c.table.Guard(c.guards(eps)...); err != nil {
		return err
	}
	c.shorten(eps)
	return nil
}

// unpin takes the shortcuts of ports away, and then their guards.
func (c *Controller) unpin(ports ...string) error {
	if err := c.path.Remove(ports...); err != nil {
		c.log.Warn("shortcuts of ports are left", "err", err)
	}
	return c.table.Unguard(ports...)
}

// shorten gives endpoints shortcuts.
func (c *Controller) shorten(eps []Endpoint) {
	if c.path == nil {
		return
	}
	for _, e := range eps {
		c.mu.Lock()
		p, ok := c.shortcutLocked(e)
		c.mu.Unlock()
		if !ok {
			continue
		}
		if err := c.path.Add(e.HostInterface, p); err != nil {
			c.log.Warn("a container has no shortcuts", "interface", e.HostInterface, "err", err)
		}
	}
}

// shortcutLocked describes an endpoint, if it is guarded and in a bridge of ours.
func (c *Controller) shortcutLocked(e Endpoint) (shortcut.Port, bool) {
	n := c.nets[e.NetworkID]
	if len(c.guardsLocked([]Endpoint{e})) == 0 || !n.optBool(optShortcuts, true) || len(n.mac) != 6 || len(e.MAC) != 6 {
		return shortcut.Port{}, false
	}
	p := shortcut.Port{Index: e.HostIndex, Bridge: n.segments[e.Segment].index, MAC: e.MAC, Peers: n.optBool(optICC, true)}
	if p.Bridge == 0 {
		return p, false
	}
	if e.Segment == 0 {
		p.Host = n.mac
	}
	for _, a := range []netip.Prefix{e.IPv4, e.IPv6} {
		switch {
		case a.Addr().Is4():
			p.IPv4 = a.Addr()
		case a.Addr().Is6():
			p.IPv6 = a.Addr()
		}
	}
	return p, true
}

// attach has the programs see what comes in by the given ports.
func (c *Controller) attach(ports ...int) {
	if c.path == nil || c.plain.Load() || len(ports) == 0 {
		return
	}
	var b link.Batch
	for _, index := range ports {
		b.AddFilter(index, false, c.path.In)
	}
	c.filter(&b)
}

// filter attaches programs. A kernel that refuses it does so again and again.
func (c *Controller) filter(b *link.Batch) {
	err := c.rtnl.Do(b)
	if err == nil || link.IsMissing(err) {
		return
	}
	if !c.plain.Swap(true) {
		c.log.Warn("frames of new containers go by the bridges, which is slower", "err", err)
	}
}

// attachBridge has them see what the host sends into a bridge.
func (c *Controller) attachBridge(index int) {
	if c.path == nil || c.plain.Load() {
		return
	}
	var b link.Batch
	b.AddFilter(index, true, c.path.Out)
	c.filter(&b)
}

// takeShortcuts gives the containers of a former daemon this one's programs, or
// takes the former's away.
func (c *Controller) takeShortcuts() error {
	links, err := c.rtnl.Links()
	if err != nil {
		return err
	}
	if c.path == nil {
		var b link.Batch
		for _, l := range c.ourPorts(links) {
			b.DelFilter(l.Index, false)
		}
		for _, l := range links {
			if c.ownsBridge(l) {
				b.DelFilter(l.Index, true)
			}
		}
		_ = c.rtnl.Do(&b) // those without are errors
		return nil
	}
	c.mu.Lock()
	var eps []Endpoint
	for _, r := range c.conts {
		eps = append(eps, r.Endpoints...)
	}
	c.mu.Unlock()
	c.shorten(eps)
	var ports []int
	for _, l := range c.ourPorts(links) {
		ports = append(ports, l.Index)
	}
	c.attach(ports...)
	return nil
}

// switchShortcuts switches shortcuts on unless rules that others made would see
// frames that take them.
func (c *Controller) switchShortcuts() {
	if c.path == nil {
		return
	}
	why, err := c.othersRules()
	if err != nil {
		c.log.Warn("rules of others cannot be listed", "err", err)
		why = "unknown"
	}
	changed, err := c.path.Switch(why == "")
	if err != nil {
		c.log.Warn("some containers have no shortcuts", "err", err)
	}
	if changed {
		c.log.Info("shortcuts past the bridges", "on", why == "", "rules", why)
	}
}

// othersRules names rules of others that frames in our bridges meet.
func (c *Controller) othersRules() (string, error) {
	routed := brNetfilter("iptables") || brNetfilter("ip6tables")
	if what, err := c.table.Others(routed); what != "" || err != nil {
		return what, err
	}
	var old []string
	if routed {
		old = append(old, "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")
	}
	for _, file := range old {
		if b, err := os.ReadFile(file); err == nil && len(b) > 0 {
			return file, nil
		}
	}
	if b, err := os.ReadFile("/proc/modules"); err == nil {
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, "ebtable_") {
				return "ebtables", nil
			}
		}
	}
	return "", nil
}
