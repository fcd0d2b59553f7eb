package network

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/network/dns/wire"
	"tenon.dev/tenon/internal/network/link"
)

const (
	optIfname  = "com.docker.network.endpoint.ifname"
	optSysctls = "com.docker.network.endpoint.sysctls"
)

var sysctlPattern = regexp.MustCompile(`^net\.(ipv4|ipv6|mpls)\.(conf|neigh)\.IFNAME\.[a-z0-9_]+=-?[0-9]+$`)

// Connect makes a container's network. All of it or nothing is made. Errors:
// InvalidArgument, NotFound (network), FailedPrecondition (no address left),
// AlreadyExists (the container is connected), Conflict (a port is taken).
func (c *Controller) Connect(ctx context.Context, req Request) (_ *Namespace, err error) {
	if req.ContainerID == "" {
		return nil, fmt.Errorf("connect: container id is required: %w", errdefs.ErrInvalidArgument)
	}
	unlock, err := c.keys.lock(ctx, req.ContainerID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	hostDNS := len(req.DNS) == 0
	if err := c.checkRequest(&req); err != nil {
		return nil, err
	}
	r := &contRecord{HostDNS: hostDNS, Version: recordVersion, ID: req.ContainerID, Name: req.Name, Hostname: req.Hostname, Domainname: req.Domainname,
		Mode: req.Mode, Plumbing: req.Plumbing, Owner: req.Owner, ExtraHosts: req.ExtraHosts, Bindings: req.Ports}
	for _, a := range req.DNS {
		r.DNS = append(r.DNS, a.String())
	}
	ready, err := c.enlist(r, req)
	if err != nil {
		return nil, fmt.Errorf("connect container %s: %w", shortID(r.ID), err)
	}
	defer func() {
		if err != nil {
			c.dismiss(r)
			err = fmt.Errorf("connect container %s: %w", shortID(r.ID), err)
		}
	}()
	held, err := c.claimPorts(r)
	defer func() {
		if err != nil {
			closeAll(held)
		}
	}()
	if err != nil {
		return nil, fmt.Errorf("driver failed programming external connectivity on endpoint %s: %w", r.Name, err)
	}
	r.Resolver = c.resolverFor(r, req)
	if err = writeNewJSON(c.contPath(r.ID), r); err != nil {
		return nil, err
	}
	if ready == nil && (r.Mode == ModeBridge || r.Mode == ModeNone) {
		p := c.plumberFor(r)
		if np, ok := p.(*netnsPlumber); ok {
			np.from = req.Namespace
		}
		if err = c.setup(ctx, p, r.NSID, r.Endpoints); err != nil {
			return nil, err
		}
	}
	if len(r.Ports) > 0 {
		if err = c.publish(r); err != nil {
			return nil, err
		}
	}
	defer c.attachLater(r.ID)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sendDNSLocked(r)
	c.dns.hold(r.ID, held)
	for i := range r.Endpoints {
		if n := c.nets[r.Endpoints[i].NetworkID]; n != nil {
			defer c.emitLater("connect", n.rec, r.ID)
		}
	}
	return c.namespaceLocked(r), nil
}

// emitLater emits after the caller's locks are free.
func (c *Controller) emitLater(action string, n netRecord, container string) {
	if c.cfg.OnEvent != nil {
		c.wg.Add(1)
		go func() {
			defer c.wg.Done()
			c.emit(action, n, container)
		}()
	}
}

// checkRequest checks what can be checked without looking at the networks.
func (c *Controller) checkRequest(req *Request) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("connect container %s: "+format+": %w", append(append([]any{shortID(req.ContainerID)}, a...), errdefs.ErrInvalidArgument)...)
	}
	if req.Mode == "" {
		req.Mode = ModeBridge
	}
	if len(req.DNS) == 0 {
		req.DNS = c.cfg.DNS
	}
	if len(req.DNSSearch) == 0 {
		req.DNSSearch = c.cfg.DNSSearch
	}
	switch req.Mode {
	case ModeBridge:
		if len(req.Endpoints) == 0 {
			req.Endpoints = []EndpointRequest{{Network: defaultNetwork}}
		}
	case ModeHost, ModeNone, ModeContainer:
		req.Endpoints, req.Ports = nil, nil
		if req.Mode == ModeContainer && req.Container == "" {
			return bad("the container whose network is shared is missing")
		}
	default:
		return bad("unknown network mode %q", req.Mode)
	}
	if p := req.Plumbing; p != "" && p != PlumbNetns && p != PlumbVM && (p != PlumbTap || req.Mode != ModeBridge) {
		return bad("unknown plumbing %q for network mode %s", p, req.Mode)
	}
	for _, b := range req.Ports {
		if _, err := protoNumber(b.Proto); err != nil {
			return bad("%w", err)
		}
		if b.ContainerPort == 0 || b.HostPortEnd != 0 && b.HostPortEnd < b.HostPort {
			return bad("bad port %d to %d-%d", b.ContainerPort, b.HostPort, b.HostPortEnd)
		}
	}
	for _, h := range req.ExtraHosts {
		if _, _, err := splitHost(h); err != nil {
			return bad("%w", err)
		}
	}
	return nil
}

// enlist allocates addresses and enters the container into the tables. It
// takes a namespace from the pool where one fits.
func (c *Controller) enlist(r *contRecord, req Request) (_ *ready, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conts[r.ID] != nil {
		return nil, fmt.Errorf("container is connected already: %w", errdefs.ErrAlreadyExists)
	}
	switch r.Mode {
	case ModeContainer:
		other := c.conts[req.Container]
		if other == nil {
			return nil, fmt.Errorf("container %s has no network to share: %w", shortID(req.Container), errdefs.ErrNotFound)
		}
		r.Shared = other.ID
	case ModeHost, ModeNone:
		n := c.byNameLocked(map[Mode]string{ModeHost: "host", ModeNone: "none"}[r.Mode])
		r.Endpoints = []Endpoint{{NetworkID: n.rec.ID, NetworkName: n.rec.Name, EndpointID: randomHex(64)}}
		if r.Mode == ModeNone && r.Plumbing != PlumbVM {
			r.NSID = randomHex(8)
		}
	case ModeBridge:
		if c.pooled(req) {
			if rd := c.pool.take(); rd != nil {
				r.NSID = rd.nsid
				rd.ep.Aliases, rd.ep.Links, rd.ep.GwPriority = req.Endpoints[0].Aliases, req.Endpoints[0].Links, req.Endpoints[0].GwPriority
				rd.ep.DNSNames = dnsNames(r, rd.ep.Aliases)
				r.Endpoints = []Endpoint{rd.ep}
				c.enterLocked(r)
				return rd, nil
			}
		}
		if !r.Plumbing.taps() {
			r.NSID = randomHex(8)
		}
		for i, er := range req.Endpoints {
			n, err := c.findLocked(er.Network)
			if err == nil && slices.ContainsFunc(r.Endpoints, func(e Endpoint) bool { return e.NetworkID == n.rec.ID }) {
				err = fmt.Errorf("network %s is named twice: %w", n.rec.Name, errdefs.ErrInvalidArgument)
			}
			var ep Endpoint
			if err == nil {
				port := r.NSID
				if i > 0 || port == "" {
					port = randomHex(8)
				}
				ep, err = c.allocateLocked(n, er, port, i)
			}
			if err != nil {
				for i := range r.Endpoints {
					c.freeAddrsLocked(&r.Endpoints[i])
				}
				return nil, err
			}
			ep.DNSNames = dnsNames(r, er.Aliases)
			r.Endpoints = append(r.Endpoints, ep)
		}
	}
	c.enterLocked(r)
	return nil, nil
}

// pooled says whether a namespace from the pool fits the request.
func (c *Controller) pooled(req Request) bool {
	if len(req.Endpoints) != 1 || req.Plumbing.taps() || req.Namespace != nil {
		return false
	}
	e := req.Endpoints[0]
	n, err := c.findLocked(e.Network)
	return err == nil && c.isDefault(n) && !e.IPv4.IsValid() && !e.IPv6.IsValid() && len(e.LinkLocal) == 0 && e.MAC == nil && e.DriverOpts[optIfname] == "" && e.DriverOpts[optSysctls] == ""
}

// enterLocked makes the container visible.
func (c *Controller) enterLocked(r *contRecord) {
	c.conts[r.ID] = r
	for i := range r.Endpoints {
		if n := c.nets[r.Endpoints[i].NetworkID]; n != nil {
			n.eps[r.ID] = &r.Endpoints[i]
		}
	}
}

// allocateLocked allocates an endpoint's addresses. i is the number of the interface.
func (c *Controller) allocateLocked(n *netw, req EndpointRequest, port string, i int) (_ Endpoint, err error) {
	if n == nil {
		return Endpoint{}, fmt.Errorf("default network is missing: %w", errdefs.ErrFailedPrecondition)
	}
	if n.rec.ConfigOnly {
		return Endpoint{}, fmt.Errorf("cannot create endpoint on configuration-only network %s: %w", n.rec.Name, errdefs.ErrPermissionDenied)
	}
	if n.rec.Driver == "null" || n.rec.Driver == "host" {
		return Endpoint{}, fmt.Errorf("container cannot be connected to network %s besides others: %w", n.rec.Name, errdefs.ErrInvalidArgument)
	}
	ep := Endpoint{NetworkID: n.rec.ID, NetworkName: n.rec.Name, EndpointID: randomHex(64), Interface: "eth" + strconv.Itoa(i),
		HostInterface: c.portName(port), HostIndex: c.index.next(), MAC: req.MAC, Aliases: slices.Clone(req.Aliases), Links: slices.Clone(req.Links),
		DriverOpts: maps.Clone(req.DriverOpts), GwPriority: req.GwPriority, WantIPv4: req.IPv4, WantIPv6: req.IPv6, WantMAC: req.MAC != nil}
	if name := req.DriverOpts[optIfname]; name != "" {
		if !bridgePattern.MatchString(name) || name == "lo" || strings.HasPrefix(name, ".") {
			return Endpoint{}, fmt.Errorf("bad interface name %q: %w", name, errdefs.ErrInvalidArgument)
		}
		ep.Interface = name
	}
	if ep.LinkLocal, err = linkLocal(req.LinkLocal); err != nil {
		return Endpoint{}, err
	}
	for _, kv := range splitSysctls(req.DriverOpts[optSysctls]) {
		if !sysctlPattern.MatchString(kv) {
			return Endpoint{}, fmt.Errorf("bad interface setting %q: want net.ipv4.conf.IFNAME.NAME=NUMBER: %w", kv, errdefs.ErrInvalidArgument)
		}
	}
	defer func() {
		if err != nil {
			n.releaseLocked(&ep)
		}
	}()
	for _, want := range []netip.Addr{req.IPv4, req.IPv6} {
		if want.IsValid() && n.subnetFor(want.Is4()) == nil {
			return Endpoint{}, fmt.Errorf("no configured subnet contains IP address %s: %w", want, errdefs.ErrInvalidArgument)
		}
	}
	for _, s := range n.subnets {
		want := req.IPv4
		if s.Prefix().Addr().Is6() {
			want = req.IPv6
		}
		if want.IsValid() {
			if err := s.Take(want); err != nil {
				return Endpoint{}, fmt.Errorf("network %s: %w: %w", n.rec.Name, err, errdefs.ErrInvalidArgument)
			}
		} else if want, err = s.Next(); err != nil {
			return Endpoint{}, fmt.Errorf("network %s: %w: %w", n.rec.Name, err, errdefs.ErrFailedPrecondition)
		}
		if ghost := n.ghosts[want]; ghost != "" {
			ep.ghosts = append(ep.ghosts, ghost)
			delete(n.ghosts, want)
		}
		p := netip.PrefixFrom(want, s.Prefix().Bits())
		if want.Is4() {
			ep.IPv4, ep.Gateway = p, s.gateway
		} else {
			ep.IPv6, ep.Gateway6 = p, s.gateway
		}
	}
	if ep.MAC == nil {
		if ep.IPv4.IsValid() {
			ep.MAC = macFor(ep.IPv4.Addr())
		} else {
			ep.MAC = macFor(ep.IPv6.Addr())
		}
	}
	if n.rec.Internal {
		ep.Gateway, ep.Gateway6 = netip.Addr{}, netip.Addr{}
	}
	if n.isBridge() {
		if ep.Segment, err = n.placeLocked(); err != nil {
			return Endpoint{}, err
		}
	}
	return ep, nil
}

// linkLocal checks addresses of --link-local-ip and adds their networks' lengths.
func linkLocal(addrs []netip.Addr) (out []netip.Prefix, err error) {
	for _, a := range addrs {
		bits := 64
		if a.Is4() {
			bits = 16
		}
		if !a.IsLinkLocalUnicast() {
			return nil, fmt.Errorf("%s is not a link-local address (169.254.0.0/16, fe80::/10): %w", a, errdefs.ErrInvalidArgument)
		}
		out = append(out, netip.PrefixFrom(a, bits))
	}
	return out, nil
}

// freeAddrsLocked gives an endpoint's addresses and its place back.
func (c *Controller) freeAddrsLocked(ep *Endpoint) {
	if n := c.nets[ep.NetworkID]; n != nil && ep.HostInterface != "" {
		n.releaseLocked(ep)
		n.leaveLocked(ep.Segment)
		for _, p := range []netip.Prefix{ep.IPv4, ep.IPv6} {
			if p.IsValid() && c.isPortName(ep.HostInterface) { // a machine's tap is unplugged already
				n.ghosts[p.Addr()] = ep.HostInterface
			}
		}
	}
}

// releaseLocked gives an endpoint's addresses back.
func (n *netw) releaseLocked(ep *Endpoint) {
	for _, s := range n.subnets {
		for _, p := range []netip.Prefix{ep.IPv4, ep.IPv6} {
			if p.IsValid() && s.Prefix().Contains(p.Addr()) {
				s.Release(p.Addr())
			}
		}
	}
}

func splitSysctls(s string) []string {
	// The docker CLI makes options lower-case.
	s = strings.ReplaceAll(s, ".ifname.", ".IFNAME.")
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// gateways picks the endpoints that have the default routes: highest
// priority, then the network's name. -1 if none.
func gateways(eps []Endpoint) (g4, g6 int) {
	g4, g6 = -1, -1
	better := func(i, j int) bool {
		if j < 0 || eps[i].GwPriority != eps[j].GwPriority {
			return j < 0 || eps[i].GwPriority > eps[j].GwPriority
		}
		return eps[i].NetworkName < eps[j].NetworkName
	}
	for i, e := range eps {
		if e.Gateway.IsValid() && better(i, g4) {
			g4 = i
		}
		if e.Gateway6.IsValid() && better(i, g6) {
			g6 = i
		}
	}
	return g4, g6
}

// plugs describes endpoints to a plumber.
func (c *Controller) plugs(eps []Endpoint) []Plug {
	c.mu.Lock()
	defer c.mu.Unlock()
	g4, g6 := gateways(eps)
	var out []Plug
	for i, e := range eps {
		n := c.nets[e.NetworkID]
		if n == nil || e.HostInterface == "" {
			continue
		}
		bridge := n.rec.Bridge
		if e.Segment > 0 {
			bridge = c.segmentName(n.rec.ID, e.Segment)
		}
		p := Plug{Bridge: bridge, BridgeIndex: n.segments[e.Segment].index, HostInterface: e.HostInterface, HostIndex: e.HostIndex, Interface: e.Interface,
			MAC: e.MAC, MTU: n.rec.MTU, IPv4: e.IPv4, IPv6: e.IPv6, LinkLocal: e.LinkLocal, Sysctls: splitSysctls(e.DriverOpts[optSysctls]), Isolated: !n.optBool(optICC, true)}
		p.Static = n.optBool(optGuard, true) && e.HostIndex != 0
		if n.rec.Driver == "macvlan" {
			p.Parent = n.rec.Options[optParent]
		}
		if i == g4 {
			p.Default4 = e.Gateway
		}
		if i == g6 {
			p.Default6 = e.Gateway6
		}
		out = append(out, p)
	}
	return out
}

// dismiss frees everything that a record names. It is the undo of Connect and
// the work of Disconnect; it works from any partial state.
func (c *Controller) dismiss(r *contRecord) {
	if r.Plumbing == PlumbVM {
		c.leaveTaps(r.Endpoints)
	}
	if ports := tablePorts(r); len(ports) > 0 {
		if err := c.unpublish(ports); err != nil {
			c.log.Warn("published ports are left in the table", "container", r.ID, "err", err)
		}
		c.flushFlows(ports)
	}
	c.mu.Lock()
	shared := false
	for _, o := range c.conts {
		shared = shared || o.Shared == r.ID
	}
	for i := range r.Endpoints {
		if n := c.nets[r.Endpoints[i].NetworkID]; n != nil {
			c.freeAddrsLocked(&r.Endpoints[i])
			delete(n.eps, r.ID)
		}
	}
	for _, p := range r.Ports {
		c.ports.release(p.Proto, p.HostIP, p.HostPort, r.ID)
	}
	if c.conts[r.ID] == r {
		delete(c.conts, r.ID)
	}
	if r.NSID != "" || r.Shared != "" || r.Plumbing.taps() {
		c.dns.send(wire.Message{Op: wire.OpDel, ID: r.ID})
		c.dns.release(r.ID)
	}
	c.mu.Unlock()
	if err := os.Remove(c.contPath(r.ID)); err != nil && !errors.Is(err, os.ErrNotExist) {
		c.log.Warn("endpoint record is left", "container", r.ID, "err", err)
	}
	if r.Plumbing == PlumbTap {
		c.dropTaps(r.Endpoints)
	}
	if r.NSID != "" {
		if shared {
			// Somebody lives on in the namespace, so its interfaces do not go with it.
			var b link.Batch
			for _, e := range r.Endpoints {
				b.DelLink(e.HostInterface)
			}
			c.wg.Add(1)
			go func() {
				defer c.wg.Done()
				_ = c.rtnl.Do(&b) // those that are left go with the namespace
			}()
		}
		c.pool.drop(r.NSID, r.Endpoints)
	}
}

// Disconnect frees a container's names, addresses and ports at once; its
// interfaces and namespace go in the background. Unknown containers are no error.
func (c *Controller) Disconnect(ctx context.Context, containerID string) error {
	unlock, err := c.keys.lock(context.WithoutCancel(ctx), containerID)
	if err != nil {
		return err
	}
	defer unlock()
	c.mu.Lock()
	r := c.conts[containerID]
	var nets []netRecord
	if r != nil {
		for _, e := range r.Endpoints {
			if n := c.nets[e.NetworkID]; n != nil {
				nets = append(nets, n.rec)
			}
		}
	}
	c.mu.Unlock()
	if r == nil {
		return nil
	}
	c.dismiss(r)
	for _, n := range nets {
		c.emitLater("disconnect", n, containerID)
	}
	return nil
}

// dnsNames are the names of a container on a network.
func dnsNames(r *contRecord, aliases []string) []string {
	var out []string
	for _, n := range append([]string{r.Name}, append(slices.Clone(aliases), shortID(r.ID), r.Hostname)...) {
		if n != "" && !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out
}

// namespaceLocked is the record as the caller sees it.
func (c *Controller) namespaceLocked(r *contRecord) *Namespace {
	ns := &Namespace{ContainerID: r.ID, Mode: r.Mode, Resolver: r.Resolver}
	if r.NSID != "" {
		ns.Path = c.nsPath(r.NSID)
	}
	for _, e := range r.Endpoints {
		e.DNSNames, e.Aliases = slices.Clone(e.DNSNames), slices.Clone(e.Aliases)
		e.MAC = append(net.HardwareAddr(nil), e.MAC...)
		ns.Endpoints = append(ns.Endpoints, e)
	}
	for _, p := range r.Ports {
		ns.Ports = append(ns.Ports, p.Published)
	}
	ns.Hosts = c.hostsLocked(r)
	if r.Shared != "" {
		if o := c.conts[r.Shared]; o != nil {
			ns.Path = c.nsPath(o.NSID)
			if o.NSID == "" {
				ns.Path = ""
			}
			ns.Hosts = c.hostsLocked(o)
		}
	}
	return ns
}
