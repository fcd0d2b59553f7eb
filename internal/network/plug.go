package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/network/link"
	"tenon.dev/tenon/internal/network/nft"
)

// Plug is an endpoint as a [Plumber] sees it: where it goes and what it says.
type Plug struct {
	// Bridge is the name and BridgeIndex the index of the network's bridge.
	Bridge      string
	BridgeIndex int
	// Parent is the host's interface for a macvlan network.
	Parent string
	// HostInterface is the name of the end on the host (veth or tap), HostIndex
	// the index that it gets.
	HostInterface string
	HostIndex     int
	// Interface is the name inside.
	Interface string
	MAC       net.HardwareAddr
	MTU       int
	IPv4      netip.Prefix
	IPv6      netip.Prefix
	// LinkLocal are further addresses.
	LinkLocal []netip.Prefix
	// Default4 and Default6 are the gateways, where this endpoint has the default route.
	Default4, Default6 netip.Addr
	// Sysctls are "net.ipv4.conf.IFNAME.log_martians=1" settings of the interface.
	Sysctls []string
	// Isolated endpoints reach the host but not each other.
	Isolated bool
	// Static endpoints have one hardware address: the guard sees to that, and
	// the bridge need not learn it from each frame.
	Static bool

	index int // of Interface; 0: the kernel chooses it
}

// innerIndex is the index of the first interface of a new namespace. Some kernel
// modules give each namespace interfaces, by which the first numbers are taken.
const innerIndex = 64

// v6 says whether the interface speaks IPv6.
func (p *Plug) v6() bool {
	return p.IPv6.IsValid() || slices.ContainsFunc(p.LinkLocal, func(a netip.Prefix) bool { return a.Addr().Is6() })
}

// Plumber plugs endpoints into bridges. Addresses, names and published ports
// are not its business. The controller has one for network namespaces; that of
// virtual machines makes a tap in the same bridge.
type Plumber interface {
	// Setup makes the place ns for the endpoints and plugs them in.
	Setup(ctx context.Context, ns string, plugs []Plug) error
	// Attach plugs one more endpoint into a place that is in use.
	Attach(ctx context.Context, ns string, p Plug) error
	// Detach takes an endpoint out.
	Detach(ctx context.Context, ns string, p Plug) error
	// Default moves the default routes to the given gateways and interfaces.
	Default(ctx context.Context, ns string, plugs []Plug) error
}

// netnsPlumber plugs veth pairs into network namespaces bound below dir.
type netnsPlumber struct {
	rtnl *link.Socket // of the host's namespace
	dir  string
	from *os.File // the namespace that Setup takes instead of making one; nil: none
}

var _ Plumber = (*netnsPlumber)(nil)

func (p *netnsPlumber) path(ns string) string { return filepath.Join(p.dir, ns) }

// Setup makes a network namespace with its interfaces.
func (p *netnsPlumber) Setup(ctx context.Context, ns string, plugs []Plug) error {
	for i := range plugs {
		if plugs[i].Parent == "" {
			plugs[i].index = innerIndex + i
		}
	}
	return link.NewNetns(p.path(ns), p.from, func(fd int, s *link.Socket) error {
		v6 := false
		for _, pl := range plugs {
			v6 = v6 || pl.v6()
		}
		// What Docker's containers have: ping and low ports without privilege.
		settings := []struct{ k, v string }{
			{"net/ipv4/ping_group_range", "0 2147483647"},
			{"net/ipv4/ip_unprivileged_port_start", "0"},
		}
		if v6 {
			settings = append(settings, struct{ k, v string }{"net/ipv6/conf/default/accept_dad", "0"}, struct{ k, v string }{"net/ipv6/conf/default/accept_ra", "0"})
		} else {
			settings = append(settings, struct{ k, v string }{"net/ipv6/conf/default/disable_ipv6", "1"})
		}
		for _, kv := range settings {
			if err := link.Sysctl(kv.k, kv.v); err != nil && !os.IsNotExist(err) {
				return fmt.Errorf("set %s: %w", kv.k, err)
			}
		}
		return p.plug(fd, s, plugs, true)
	})
}

// plug makes the interfaces; s is a socket in the namespace fd.
func (p *netnsPlumber) plug(fd int, s *link.Socket, plugs []Plug, lo bool) error {
	var host, in link.Batch
	for _, pl := range plugs {
		if pl.Parent != "" {
			links, err := p.rtnl.Links() // this thread is in the container's namespace
			if err != nil {
				return err
			}
			i := slices.IndexFunc(links, func(l link.Info) bool { return l.Name == pl.Parent })
			if i < 0 {
				return fmt.Errorf("parent interface %s: %w", pl.Parent, errdefs.ErrNotFound)
			}
			host.AddMacvlan(pl.HostInterface, links[i].Index, fd, pl.MAC, 4)
			continue
		}
		host.AddVeth(link.Veth{Host: pl.HostInterface, HostIndex: pl.HostIndex, Bridge: pl.BridgeIndex,
			NetnsFD: fd, Peer: pl.Interface, PeerIndex: pl.index, MAC: pl.MAC, MTU: pl.MTU})
		setPort(&host, pl, false)
	}
	if err := p.rtnl.Do(&host); err != nil {
		return err
	}
	var links []link.Info // in the namespace
	if slices.ContainsFunc(plugs, func(pl Plug) bool { return pl.index == 0 }) {
		var err error
		if links, err = s.Links(); err != nil {
			return err
		}
	}
	if lo {
		in.SetUp(1)
	}
	for _, pl := range plugs {
		arrived := pl.Interface
		if pl.Parent != "" {
			arrived = pl.HostInterface
		}
		index := pl.index
		if index == 0 {
			i := slices.IndexFunc(links, func(l link.Info) bool { return l.Name == arrived })
			if i < 0 {
				return fmt.Errorf("interface %s did not arrive", arrived)
			}
			index = links[i].Index
		}
		if pl.Parent != "" {
			var b link.Batch
			b.Rename(index, pl.Interface)
			if err := s.Do(&b); err != nil {
				return err
			}
		}
		in.SetUp(index)
		if len(plugs) > 1 || !lo {
			v := "1"
			if pl.v6() {
				v = "0"
			}
			if err := link.Sysctl("net/ipv6/conf/"+pl.Interface+"/disable_ipv6", v); err != nil && !os.IsNotExist(err) {
				return err
			}
		}
		for _, kv := range pl.Sysctls {
			k, v, _ := strings.Cut(kv, "=")
			if err := link.Sysctl(strings.ReplaceAll(strings.ReplaceAll(k, ".", "/"), "IFNAME", pl.Interface), v); err != nil {
				return fmt.Errorf("set %s: %w", strings.ReplaceAll(k, "IFNAME", pl.Interface), err)
			}
		}
		for _, a := range append([]netip.Prefix{pl.IPv4, pl.IPv6}, pl.LinkLocal...) {
			if a.IsValid() {
				in.AddAddr(index, a)
			}
		}
		for _, gw := range []netip.Addr{pl.Default4, pl.Default6} {
			if gw.IsValid() {
				in.AddDefault(index, gw)
			}
		}
	}
	return s.Do(&in)
}

// setPort says how an endpoint sits in its bridge.
func setPort(b *link.Batch, pl Plug, hairpin bool) {
	b.SetPort(pl.HostInterface, link.Port{Isolated: pl.Isolated, Static: pl.Static, Hairpin: hairpin})
	if pl.Static {
		b.AddStatic(pl.HostIndex, pl.MAC)
	}
}

// Attach plugs one more interface into a namespace in use.
func (p *netnsPlumber) Attach(ctx context.Context, ns string, pl Plug) error {
	return link.InNetns(p.path(ns), func(fd int, s *link.Socket) error {
		return p.plug(fd, s, []Plug{pl}, false)
	})
}

// Detach deletes an interface.
func (p *netnsPlumber) Detach(ctx context.Context, ns string, pl Plug) error {
	return link.InNetns(p.path(ns), func(fd int, s *link.Socket) error {
		var b link.Batch
		b.DelLink(pl.Interface)
		return s.Do(&b)
	})
}

// Default replaces the default routes.
func (p *netnsPlumber) Default(ctx context.Context, ns string, plugs []Plug) error {
	return link.InNetns(p.path(ns), func(fd int, s *link.Socket) error {
		links, err := s.Links()
		if err != nil {
			return err
		}
		var b link.Batch
		for _, pl := range plugs {
			for _, l := range links {
				if l.Name != pl.Interface {
					continue
				}
				for _, gw := range []netip.Addr{pl.Default4, pl.Default6} {
					if gw.IsValid() {
						b.AddDefault(l.Index, gw)
					}
				}
			}
		}
		return s.Do(&b)
	})
}

// ready is a namespace on the default bridge that waits for a container.
type ready struct {
	nsid string
	ep   Endpoint
}

// readyPool keeps complete namespaces at hand. Filling happens in the
// background; nobody waits for it.
type readyPool struct {
	c    *Controller
	full chan *ready
	kick chan struct{}

	mu      sync.Mutex
	release []string // namespaces to let go
	ports   []string // their ends on the host
}

func startPool(c *Controller) *readyPool {
	p := &readyPool{c: c, full: make(chan *ready, max(c.cfg.PoolSize, 0)), kick: make(chan struct{}, 1)}
	c.wg.Add(1)
	go p.run()
	p.wake()
	return p
}

func (p *readyPool) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// take hands out a ready namespace or nil.
func (p *readyPool) take() *ready {
	select {
	case r := <-p.full:
		p.wake()
		return r
	default:
		return nil
	}
}

// drop lets a namespace go in the background.
func (p *readyPool) drop(nsid string, eps []Endpoint) {
	p.mu.Lock()
	p.release = append(p.release, nsid)
	for _, e := range eps {
		p.ports = append(p.ports, e.HostInterface)
	}
	p.mu.Unlock()
	p.wake()
}

// releaseDelay is how long dead namespaces are gathered: the kernel tears down
// those that die together in one go, and holds up whoever makes interfaces
// meanwhile.
const releaseDelay = 50 * time.Millisecond

func (p *readyPool) run() {
	defer p.c.wg.Done()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	due := false // the timer runs
	for {
		select {
		case <-timer.C:
			due = false
			p.reap()
			continue
		case <-p.c.ctx.Done():
			p.reap()
			for {
				select {
				case r := <-p.full:
					p.c.freeReady(r)
					p.reap()
				default:
					return
				}
			}
		case <-p.kick:
		}
		for p.c.ctx.Err() == nil && len(p.full) < cap(p.full) {
			// cannot block: nobody else sends
			if err := p.c.makeReady(cap(p.full)-len(p.full), func(r *ready) { p.full <- r }); err != nil {
				p.c.log.Warn("no namespace could be made ahead", "err", err)
				break
			}
		}
		p.mu.Lock()
		pending := len(p.release) > 0
		p.mu.Unlock()
		if pending && !due {
			due = true
			timer.Reset(releaseDelay)
		}
	}
}

func (p *readyPool) reap() {
	p.mu.Lock()
	list, ports := p.release, p.ports
	p.release, p.ports = nil, nil
	p.mu.Unlock()
	if len(list) == 0 {
		return
	}
	for _, ns := range list {
		if err := link.ReleaseNetns(p.c.nsPath(ns)); err != nil {
			p.c.log.Warn("network namespace is left; the next start removes it", "namespace", ns, "err", err)
		}
	}
	if err := p.c.unpin(ports...); err != nil {
		p.c.log.Warn("guards of ports are left in the table", "err", err)
	}
}

// makeReady makes n namespaces on the default bridge, guarded in one
// transaction, and calls each as soon as one is ready.
func (c *Controller) makeReady(n int, each func(*ready)) error {
	var list []*ready
	var eps []Endpoint
	var full error
	c.mu.Lock()
	for range n {
		r := &ready{nsid: randomHex(8)}
		if r.ep, full = c.allocateLocked(c.byNameLocked(defaultNetwork), EndpointRequest{}, r.nsid, 0); full != nil {
			break
		}
		list, eps = append(list, r), append(eps, r.ep)
	}
	c.mu.Unlock()
	if len(list) == 0 {
		return full
	}
	err := c.prepare(c.ctx, eps)
	for i, r := range list {
		if err == nil {
			err = c.plugIn(c.ctx, c.plumber(), r.nsid, eps[i:i+1])
			r.ep = eps[i]
		}
		if err != nil {
			c.freeReady(r)
			continue
		}
		each(r)
	}
	return errors.Join(err, full)
}

func (c *Controller) freeReady(r *ready) {
	c.mu.Lock()
	c.freeAddrsLocked(&r.ep)
	c.mu.Unlock()
	c.pool.drop(r.nsid, []Endpoint{r.ep})
}

// setup plugs a container's endpoints in, their ports guarded before.
func (c *Controller) setup(ctx context.Context, p Plumber, nsid string, eps []Endpoint) error {
	if err := c.prepare(ctx, eps); err != nil {
		return err
	}
	return c.plugIn(ctx, p, nsid, eps)
}

// prepare makes everything ready for endpoints to be plugged in.
func (c *Controller) prepare(ctx context.Context, eps []Endpoint) error {
	if err := c.raiseSegments(ctx, eps); err != nil {
		return err
	}
	if err := c.evict(eps); err != nil {
		return err
	}
	return c.pin(eps)
}

// plugIn plugs a container's endpoints in that are prepared.
func (c *Controller) plugIn(ctx context.Context, p Plumber, nsid string, eps []Endpoint) error {
	for try := 0; ; try++ {
		err := p.Setup(ctx, nsid, c.plugs(eps))
		if !errors.Is(err, unix.EBUSY) || try == 3 {
			return err
		}
		if err := c.renumber(eps); err != nil { // another interface has one of the indexes
			return err
		}
		if err := c.pin(eps); err != nil {
			return err
		}
	}
}

// renumber gives endpoints that were not plugged in other indexes.
func (c *Controller) renumber(eps []Endpoint) error {
	var ports []string
	c.mu.Lock()
	for i := range eps {
		eps[i].HostIndex = c.index.next()
		ports = append(ports, eps[i].HostInterface)
	}
	c.mu.Unlock()
	return c.unpin(ports...)
}

// evict takes the ports of dead endpoints down whose addresses are used again:
// the kernel may not have destroyed them yet, and would answer for them.
func (c *Controller) evict(eps []Endpoint) error {
	var b link.Batch
	for _, e := range eps {
		for _, port := range e.ghosts {
			b.SetDownName(port)
		}
	}
	return c.rtnl.Do(&b)
}

// guards are the ports that are pinned to their addresses.
func (c *Controller) guards(eps []Endpoint) []nft.Guarded {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.guardsLocked(eps)
}

func (c *Controller) guardsLocked(eps []Endpoint) []nft.Guarded {
	var out []nft.Guarded
	for _, e := range eps {
		n := c.nets[e.NetworkID]
		if n == nil || !n.isBridge() || e.HostInterface == "" || e.HostIndex == 0 || !n.optBool(optGuard, true) {
			continue
		}
		g := nft.Guarded{Port: e.HostInterface, Index: e.HostIndex, MAC: e.MAC}
		for _, p := range append([]netip.Prefix{e.IPv4, e.IPv6}, e.LinkLocal...) {
			if p.IsValid() {
				g.Addrs = append(g.Addrs, p.Addr())
			}
		}
		out = append(out, g)
	}
	return out
}

func (c *Controller) plumber() *netnsPlumber {
	return &netnsPlumber{rtnl: c.rtnl, dir: filepath.Join(c.cfg.RunDir, "netns")}
}
