package network

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"tenon.dev/tenon/internal/network/dns/wire"
)

// splitHost parses "name:address" or "name=address".
func splitHost(s string) (name, addr string, err error) {
	name, addr, ok := strings.Cut(s, "=")
	if !ok {
		name, addr, ok = strings.Cut(s, ":")
	}
	addr = strings.TrimSuffix(strings.TrimPrefix(addr, "["), "]")
	if !ok || name == "" || strings.ContainsAny(name, " \t\n#") {
		return "", "", fmt.Errorf("bad format for add-host: %q", s)
	}
	if addr != "host-gateway" {
		if _, err := netip.ParseAddr(addr); err != nil {
			return "", "", fmt.Errorf("invalid IP address in add-host: %q", addr)
		}
	}
	return name, addr, nil
}

// hostsLocked are the lines of a container's hosts file.
func (c *Controller) hostsLocked(r *contRecord) []string {
	var out []string
	if r.Mode == ModeHost {
		if b, err := os.ReadFile("/etc/hosts"); err == nil {
			out = strings.Split(strings.TrimRight(string(b), "\n"), "\n")
		}
	} else {
		out = []string{"127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", "fe00::\tip6-localnet",
			"ff00::\tip6-mcastprefix", "ff02::1\tip6-allnodes", "ff02::2\tip6-allrouters"}
	}
	for _, h := range r.ExtraHosts {
		name, addr, err := splitHost(h)
		if err != nil {
			continue // was refused by Connect
		}
		if addr == "host-gateway" {
			for _, gw := range c.hostGatewaysLocked(r) {
				out = append(out, gw.String()+"\t"+name)
			}
			continue
		}
		out = append(out, addr+"\t"+name)
	}
	for _, e := range r.Endpoints {
		for alias, a := range c.linksLocked(e) {
			out = append(out, a.String()+"\t"+alias)
		}
	}
	host := r.Hostname
	if host == "" {
		host = shortID(r.ID)
	}
	if r.Domainname != "" {
		host = host + "." + r.Domainname + " " + host
	}
	for _, e := range r.Endpoints {
		for _, p := range []netip.Prefix{e.IPv4, e.IPv6} {
			if p.IsValid() {
				out = append(out, p.Addr().String()+"\t"+host)
			}
		}
	}
	return out
}

// hostGatewaysLocked are the addresses by which the container reaches the host.
func (c *Controller) hostGatewaysLocked(r *contRecord) []netip.Addr {
	if r.Mode == ModeHost {
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	}
	nets := []*netw{c.byNameLocked(defaultNetwork)}
	if g4, _ := gateways(r.Endpoints); g4 >= 0 {
		nets = append([]*netw{c.nets[r.Endpoints[g4].NetworkID]}, nets...)
	}
	for _, n := range nets {
		if n == nil {
			continue
		}
		if s := n.subnetFor(true); s != nil && s.gateway.IsValid() && n.isBridge() {
			return []netip.Addr{s.gateway}
		}
	}
	return nil
}

// linksLocked resolves an endpoint's links: alias (and name) to address.
func (c *Controller) linksLocked(e Endpoint) map[string]netip.Addr {
	out := map[string]netip.Addr{}
	for _, l := range e.Links {
		name, alias, ok := strings.Cut(strings.TrimPrefix(l, "/"), ":")
		if !ok {
			alias = name
		}
		alias = alias[strings.LastIndexByte(alias, '/')+1:]
		n := c.nets[e.NetworkID]
		if n == nil {
			continue
		}
		for id, other := range n.eps {
			r := c.conts[id]
			if r == nil || r.Name != name && r.ID != name && shortID(r.ID) != name {
				continue
			}
			a := other.IPv4.Addr()
			if !a.IsValid() {
				a = other.IPv6.Addr()
			}
			if a.IsValid() {
				out[alias] = a
			}
		}
	}
	return out
}

// resolverFor is what the container's resolv.conf shall say.
func (c *Controller) resolverFor(r *contRecord, req Request) (res Resolver) {
	host := c.hostRes.get()
	res = Resolver{Search: host.Search, Options: host.Options, Nameservers: host.Nameservers}
	if len(req.DNSSearch) > 0 {
		res.Search = slices.DeleteFunc(slices.Clone(req.DNSSearch), func(s string) bool { return s == "." })
	}
	if len(req.DNSOptions) > 0 {
		res.Options = slices.Clone(req.DNSOptions)
	}
	if len(req.DNS) > 0 {
		res.Nameservers = slices.Clone(req.DNS)
	}
	switch r.Mode {
	case ModeHost:
		// The host's file as it is: the stub on its loopback can be reached.
		if len(req.DNS) == 0 {
			res.Nameservers = readResolver("/etc/resolv.conf").Nameservers
		}
		return res
	case ModeContainer:
		c.mu.Lock()
		defer c.mu.Unlock()
		if o := c.conts[r.Shared]; o != nil {
			return o.Resolver
		}
		return res
	}
	// The container's own 127.0.0.1, where it runs a resolver, comes first.
	var own []netip.Addr
	if !r.HostDNS {
		own = slices.DeleteFunc(slices.Clone(req.DNS), func(a netip.Addr) bool { return !a.IsLoopback() })
	}
	defer func() { res.Nameservers = append(own, res.Nameservers...) }()
	c.mu.Lock()
	defer c.mu.Unlock()
	if gw := c.dnsAddrLocked(r); gw.IsValid() && c.dns.running() {
		res.Nameservers = []netip.Addr{gw}
		// A container's name is asked for as it is before the search list is tried.
		if !slices.ContainsFunc(res.Options, func(o string) bool { return strings.HasPrefix(o, "ndots:") }) {
			res.Options = append(slices.Clone(res.Options), "ndots:0")
		}
	} else {
		res.Nameservers = slices.DeleteFunc(slices.Clone(res.Nameservers), netip.Addr.IsLoopback)
	}
	return res
}

// dnsAddrLocked is the address where the container's names are answered.
func (c *Controller) dnsAddrLocked(r *contRecord) netip.Addr {
	g4, g6 := gateways(r.Endpoints)
	order := slices.Clone(r.Endpoints)
	for _, g := range []int{g6, g4} {
		if g > 0 {
			order = append([]Endpoint{r.Endpoints[g]}, order...)
		}
	}
	for _, v4 := range []bool{true, false} {
		for _, e := range order {
			n := c.nets[e.NetworkID]
			if n == nil || !n.isBridge() {
				continue
			}
			if s := n.subnetFor(v4); s != nil && s.gateway.IsValid() {
				return s.gateway
			}
		}
	}
	return netip.Addr{}
}

// hostResolv is the host's resolver, read again when its file changes.
type hostResolv struct {
	mu    sync.Mutex
	mtime time.Time
	size  int64
	res   Resolver
}

func (h *hostResolv) get() Resolver {
	h.mu.Lock()
	defer h.mu.Unlock()
	st, err := os.Stat("/etc/resolv.conf")
	if err != nil {
		return Resolver{}
	}
	if !st.ModTime().Equal(h.mtime) || st.Size() != h.size {
		h.res, h.mtime, h.size = hostResolver(), st.ModTime(), st.Size()
	}
	return h.res
}

// hostResolver reads the host's resolv.conf; behind systemd-resolved's stub,
// the file with the true servers.
func hostResolver() Resolver {
	r := readResolver("/etc/resolv.conf")
	if len(r.Nameservers) > 0 && !slices.ContainsFunc(r.Nameservers, func(a netip.Addr) bool { return !a.IsLoopback() }) {
		if real := readResolver("/run/systemd/resolve/resolv.conf"); len(real.Nameservers) > 0 {
			return real
		}
	}
	return r
}

func readResolver(path string) Resolver {
	var r Resolver
	b, err := os.ReadFile(path)
	if err != nil {
		return r
	}
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(f[1]); err == nil {
				r.Nameservers = append(r.Nameservers, a)
			}
		case "search", "domain":
			r.Search = f[1:]
		case "options":
			r.Options = append(r.Options, f[1:]...)
		}
	}
	return r
}

// sendDNSLocked tells the DNS process a container's names.
func (c *Controller) sendDNSLocked(r *contRecord) {
	if r.Mode != ModeBridge {
		return
	}
	c.dns.send(wire.Message{Op: wire.OpSet, Container: ptr(c.dnsContainerLocked(r))})
}

func (c *Controller) dnsContainerLocked(r *contRecord) wire.Container {
	w := wire.Container{ID: r.ID, HostLoopback: r.HostDNS}
	for _, s := range r.DNS {
		if a, err := netip.ParseAddr(s); err == nil {
			w.Upstreams = append(w.Upstreams, a)
		}
	}
	for _, e := range r.Endpoints {
		w.Endpoints = append(w.Endpoints, wire.Endpoint{Network: e.NetworkID, IPv4: e.IPv4.Addr(), IPv6: e.IPv6.Addr(),
			Names: e.DNSNames, Private: c.linksLocked(e)})
	}
	return w
}
