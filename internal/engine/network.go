package engine

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	mobynet "github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/network"
)

// planNetworks decides which endpoints a new container asks for.
func (e *Engine) planNetworks(ctx context.Context, r *container.Record, req *mobynet.NetworkingConfig) (map[string]*mobynet.EndpointSettings, error) {
	mode := r.HostConfig.NetworkMode
	out := map[string]*mobynet.EndpointSettings{}
	if mode.IsContainer() {
		return out, nil
	}
	if req != nil {
		for name, s := range req.EndpointsConfig {
			if name == "default" {
				name = string(mode)
			}
			out[name] = s.Copy()
		}
	}
	// A client may name a network by its ID, or by ID here and by name there.
	for key, s := range out {
		if name := e.networkName(ctx, key); name != key {
			delete(out, key)
			out[name] = s
		}
	}
	if main := e.networkName(ctx, string(mode)); out[main] == nil {
		out[main] = &mobynet.EndpointSettings{}
	}
	for name, s := range out {
		if s == nil {
			s = &mobynet.EndpointSettings{}
			out[name] = s
		}
		if err := checkEndpoint(name, s); err != nil {
			return nil, err
		}
		if err := e.checkAddresses(ctx, name, s); err != nil {
			return nil, err
		}
	}
	if (mode.IsHost() || mode.IsNone()) && len(out) > 1 {
		return nil, invalid("conflicting options: cannot attach both user-defined and non-user-defined network-modes")
	}
	return out, nil
}

// networkName is the name of the network that ref means; ref itself if there is
// none (the start will say so).
func (e *Engine) networkName(ctx context.Context, ref string) string {
	switch ref {
	case mobynet.NetworkBridge, mobynet.NetworkHost, mobynet.NetworkNone:
		return ref
	}
	if n, err := e.cfg.Networks.Inspect(ctx, ref); err == nil {
		return n.Name
	}
	return ref
}

// checkAddresses refuses addresses that no subnet of the network has. A network
// that is not there yet is asked again by the start.
func (e *Engine) checkAddresses(ctx context.Context, name string, s *mobynet.EndpointSettings) error {
	if s.IPAMConfig == nil {
		return nil
	}
	for _, a := range []netip.Addr{s.IPAMConfig.IPv4Address, s.IPAMConfig.IPv6Address} {
		if !a.IsValid() {
			continue
		}
		n, err := e.cfg.Networks.Inspect(ctx, name)
		if err != nil {
			return nil
		}
		if !slices.ContainsFunc(n.IPAM.Config, func(c mobynet.IPAMConfig) bool { return c.Subnet.Contains(a) }) {
			return invalid("invalid config for network %s: invalid endpoint settings:\nno configured subnet contains IP address %s", name, a)
		}
	}
	return nil
}

func checkEndpoint(name string, s *mobynet.EndpointSettings) error {
	user := name != "bridge" && name != "host" && name != "none"
	if s.IPAMConfig != nil && (s.IPAMConfig.IPv4Address.IsValid() || s.IPAMConfig.IPv6Address.IsValid()) && !user {
		return invalid("user specified IP address is supported on user defined networks only")
	}
	if s.IPAMConfig != nil {
		for _, a := range s.IPAMConfig.LinkLocalIPs {
			if !a.IsLinkLocalUnicast() {
				return invalid("%s is not a link-local address (169.254.0.0/16, fe80::/10)", a)
			}
		}
	}
	if len(s.Aliases) > 0 && !user {
		return invalid("network-scoped aliases are only supported for user-defined networks")
	}
	return nil
}

// endpointRequest is an endpoint as the controller wants it.
func (e *Engine) endpointRequest(r *container.Record, name string, s *mobynet.EndpointSettings) (network.EndpointRequest, error) {
	q := network.EndpointRequest{Network: name, DriverOpts: s.DriverOpts, GwPriority: s.GwPriority}
	q.Aliases = append(q.Aliases, s.Aliases...)
	if name != "bridge" {
		q.Aliases = appendNew(q.Aliases, r.ID[:12])
	}
	if len(s.MacAddress) > 0 {
		q.MAC = net.HardwareAddr(s.MacAddress)
	}
	if c := s.IPAMConfig; c != nil {
		q.IPv4, q.IPv6, q.LinkLocal = c.IPv4Address, c.IPv6Address, c.LinkLocalIPs
	}
	q.Links = slices.Clone(s.Links)
	if name == e.networkName(e.ctx, string(r.HostConfig.NetworkMode)) {
		for _, l := range r.HostConfig.Links {
			target, alias := splitLink(l)
			c, err := e.find(target)
			if err != nil {
				return q, invalid("could not get container for %s: %v", target, err)
			}
			q.Links = append(q.Links, c.record().Name+":"+alias)
		}
	}
	return q, nil
}

func appendNew(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

func splitLink(l string) (target, alias string) {
	l = strings.TrimPrefix(l, "/")
	target, alias, ok := strings.Cut(l, ":")
	if !ok {
		alias = target
	}
	return target, alias[strings.LastIndexByte(alias, '/')+1:]
}

// networkRequest is a container's whole network as the controller wants it.
func (e *Engine) networkRequest(r *container.Record) (network.Request, error) {
	h := r.HostConfig
	q := network.Request{
		ContainerID: r.ID, Name: r.Name, Hostname: r.Config.Hostname, Domainname: r.Config.Domainname,
		Mode: network.ModeBridge, DNS: h.DNS, DNSSearch: h.DNSSearch, DNSOptions: h.DNSOptions, ExtraHosts: h.ExtraHosts,
	}
	switch {
	case ownHost(r):
		q.Endpoints = []network.EndpointRequest{{Network: mobynet.NetworkBridge}}
		return q, nil
	case h.NetworkMode.IsHost():
		q.Mode = network.ModeHost
		return q, nil
	case h.NetworkMode.IsNone() || r.Config.NetworkDisabled:
		q.Mode = network.ModeNone
		return q, nil
	case h.NetworkMode.IsContainer():
		q.Mode, q.Container = network.ModeContainer, h.NetworkMode.ConnectedContainer()
		return q, nil
	}
	names := slices.Sorted(maps.Keys(r.Networks))
	main := e.networkName(e.ctx, string(h.NetworkMode))
	slices.SortStableFunc(names, func(a, b string) int { // the main one first
		return boolInt(b == main) - boolInt(a == main)
	})
	for _, name := range names {
		ep, err := e.endpointRequest(r, name, r.Networks[name])
		if err != nil {
			return q, err
		}
		q.Endpoints = append(q.Endpoints, ep)
	}
	var err error
	q.Ports, err = bindings(r)
	return q, err
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// bindings are the ports to publish: -p, and with -P every exposed one.
func bindings(r *container.Record) ([]network.Binding, error) {
	h := r.HostConfig
	if h.NetworkMode.IsHost() || h.NetworkMode.IsNone() || h.NetworkMode.IsContainer() {
		return nil, nil
	}
	var out []network.Binding
	for port, bs := range h.PortBindings {
		for _, b := range bs {
			x, err := binding(port, b)
			if err != nil {
				return nil, err
			}
			out = append(out, x)
		}
	}
	if h.PublishAllPorts {
		for port := range r.Config.ExposedPorts {
			if len(h.PortBindings[port]) == 0 {
				out = append(out, network.Binding{Proto: string(port.Proto()), ContainerPort: port.Num()})
			}
		}
	}
	slices.SortFunc(out, func(a, b network.Binding) int {
		if a.ContainerPort != b.ContainerPort {
			return int(a.ContainerPort) - int(b.ContainerPort)
		}
		return strings.Compare(a.Proto, b.Proto)
	})
	return out, nil
}

func binding(port mobynet.Port, b mobynet.PortBinding) (network.Binding, error) {
	x := network.Binding{Proto: string(port.Proto()), ContainerPort: port.Num(), HostIP: b.HostIP}
	switch x.Proto {
	case "tcp", "udp", "sctp":
	default:
		return x, invalid("invalid port specification: %q: unknown protocol", port)
	}
	if b.HostPort == "" {
		return x, nil
	}
	lo, hi, isRange := strings.Cut(b.HostPort, "-")
	first, err := strconv.ParseUint(lo, 10, 16)
	if err != nil {
		return x, invalid("invalid port specification: %q", b.HostPort)
	}
	x.HostPort = uint16(first)
	if isRange {
		last, err := strconv.ParseUint(hi, 10, 16)
		if err != nil || last < first {
			return x, invalid("invalid port specification: %q", b.HostPort)
		}
		x.HostPortEnd = uint16(last)
	}
	return x, nil
}

// endpointSettings shows an endpoint in Docker's words; ep is nil if the
// container does not run.
func endpointSettings(asked *mobynet.EndpointSettings, ep *network.Endpoint) *mobynet.EndpointSettings {
	s := &mobynet.EndpointSettings{}
	if asked != nil {
		s = asked.Copy()
	}
	s.NetworkID, s.EndpointID = "", ""
	s.IPAddress, s.Gateway, s.IPv6Gateway, s.GlobalIPv6Address = netip.Addr{}, netip.Addr{}, netip.Addr{}, netip.Addr{}
	s.IPPrefixLen, s.GlobalIPv6PrefixLen = 0, 0
	if ep == nil {
		return s
	}
	s.NetworkID, s.EndpointID = ep.NetworkID, ep.EndpointID
	s.Gateway, s.IPv6Gateway = ep.Gateway, ep.Gateway6
	if ep.IPv4.IsValid() {
		s.IPAddress, s.IPPrefixLen = ep.IPv4.Addr(), ep.IPv4.Bits()
	}
	if ep.IPv6.IsValid() {
		s.GlobalIPv6Address, s.GlobalIPv6PrefixLen = ep.IPv6.Addr(), ep.IPv6.Bits()
	}
	s.MacAddress = mobynet.HardwareAddr(ep.MAC)
	s.DNSNames = ep.DNSNames
	return s
}

// portMap is NetworkSettings.Ports: what is published, and what is exposed only.
func portMap(r *container.Record, ns *network.Namespace) mobynet.PortMap {
	out := mobynet.PortMap{}
	if ns == nil {
		return out
	}
	for p := range r.Config.ExposedPorts {
		out[p] = nil
	}
	for _, p := range ns.Ports {
		port, ok := mobynet.PortFrom(p.ContainerPort, mobynet.IPProtocol(p.Proto))
		if !ok {
			continue
		}
		out[port] = append(out[port], mobynet.PortBinding{HostIP: p.HostIP, HostPort: strconv.Itoa(int(p.HostPort))})
	}
	return out
}

// linkEnv is what Docker's links add to the environment, on the default bridge.
func (e *Engine) linkEnv(r *container.Record) []string {
	if r.HostConfig.NetworkMode != mobynet.NetworkBridge {
		return nil
	}
	var env []string
	for _, l := range r.HostConfig.Links {
		target, alias := splitLink(l)
		c, err := e.find(target)
		if err != nil {
			continue
		}
		up := strings.ToUpper(strings.ReplaceAll(alias, "-", "_"))
		env = append(env, fmt.Sprintf("%s_NAME=/%s/%s", up, r.Name, alias))
		ep := endpointOf(c.namespace(), mobynet.NetworkBridge)
		if ep == nil || !ep.IPv4.IsValid() {
			continue
		}
		ip := ep.IPv4.Addr()
		ports := slices.SortedFunc(maps.Keys(c.record().Config.ExposedPorts), func(a, b mobynet.Port) int { return int(a.Num()) - int(b.Num()) })
		for i, p := range ports {
			url := fmt.Sprintf("%s://%s:%d", p.Proto(), ip, p.Num())
			if i == 0 {
				env = append(env, up+"_PORT="+url)
			}
			key := fmt.Sprintf("%s_PORT_%d_%s", up, p.Num(), strings.ToUpper(string(p.Proto())))
			env = append(env, key+"="+url, key+"_ADDR="+ip.String(), fmt.Sprintf("%s_PORT=%d", key, p.Num()), key+"_PROTO="+string(p.Proto()))
		}
		for _, kv := range c.record().Config.Env {
			if k, v, ok := strings.Cut(kv, "="); ok && k != "HOME" && k != "PATH" {
				env = append(env, fmt.Sprintf("%s_ENV_%s=%s", up, k, v))
			}
		}
	}
	return env
}
