package network

import (
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

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

// latecomers are containers whose ports the programs are to be attached to. That
// and its undoing cost a tenth of a millisecond, which those that are gone in a
// moment do not pay, and those that last do not notice.
type latecomers struct {
	kick chan struct{} // the list is not empty any more
	mu   sync.Mutex
	list []latecomer
}

type latecomer struct {
	id   string
	when time.Time
}

// attachLater has the programs see what comes in by a container's ports, before long.
func (c *Controller) attachLater(id string) {
	if c.path == nil || c.plain.Load() {
		return
	}
	if c.cfg.ShortcutDelay < 0 {
		c.attach(id)
		return
	}
	c.late.mu.Lock()
	c.late.list = append(c.late.list, latecomer{id, time.Now().Add(c.cfg.ShortcutDelay)})
	first := len(c.late.list) == 1
	c.late.mu.Unlock()
	if first {
		select {
		case c.late.kick <- struct{}{}:
		default:
		}
	}
}

// due takes those out whose time has come. It says when the next one's is.
func (l *latecomers) due(now time.Time) (ids []string, next time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.list) > 0 && !l.list[0].when.After(now) {
		ids, l.list = append(ids, l.list[0].id), l.list[1:]
	}
	if len(l.list) > 0 {
		next = l.list[0].when.Sub(now)
	} else {
		l.list = nil
	}
	return ids, next
}

// watchLate attaches the programs when it is time.
func (c *Controller) watchLate() {
	c.wg.Add(1)
	go func() {
		defer c.wg.Done()
		timer := time.NewTimer(time.Hour)
		defer timer.Stop()
		for {
			select {
			case <-c.ctx.Done():
				return
			case <-c.late.kick:
			case <-timer.C:
			}
			ids, next := c.late.due(time.Now())
			c.attach(ids...)
			if next == 0 {
				next = time.Hour
			}
			timer.Reset(next)
		}
	}()
}

// attach has the programs see what comes in by the containers' ports. Containers
// that are gone are no error.
func (c *Controller) attach(ids ...string) {
	if c.path == nil || c.plain.Load() {
		return
	}
	var b link.Batch
	c.mu.Lock()
	for _, id := range ids {
		r := c.conts[id]
		if r == nil {
			continue
		}
		for _, e := range r.Endpoints {
			if _, ok := c.shortcutLocked(e); ok {
				b.AddFilter(e.HostIndex, false, c.path.In)
			}
		}
	}
	c.mu.Unlock()
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
	if c.path == nil {
		links, err := c.rtnl.Links()
		if err != nil {
			return err
		}
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
	ids := slices.Collect(maps.Keys(c.conts))
	c.mu.Unlock()
	c.shorten(eps)
	c.attach(ids...)
	return nil
}

// switchShortcuts switches shortcuts on unless rules that others made would see
// frames that take them.
func (c *Controller) switchShortcuts() {
	if c.path == nil {
		return
	}
	c.switchDoors()
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
