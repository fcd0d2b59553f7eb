package cli

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// setPorts reads -p, -P and --expose.
func (c *containerFlags) setPorts(conf *container.Config, h *container.HostConfig) error {
	h.PublishAllPorts = c.publishAll
	exposed, bound := network.PortSet{}, network.PortMap{}
	for _, s := range c.expose {
		r, err := network.ParsePortRange(s)
		if err != nil {
			return fmt.Errorf("invalid range format for --expose: %w", err)
		}
		for p := range r.All() {
			exposed[p] = struct{}{}
		}
	}
	for _, s := range c.publish {
		if err := addPublish(s, exposed, bound); err != nil {
			return fmt.Errorf("invalid publish %q: %w", s, err)
		}
	}
	if len(exposed) > 0 {
		conf.ExposedPorts = exposed
	}
	if len(bound) > 0 {
		h.PortBindings = bound
	}
	return nil
}

// addPublish reads [[IP:]HOST_PORT:]PORT[/PROTO], each port perhaps a range,
// or the long form published=…,target=…,protocol=…,host_ip=….
func addPublish(s string, exposed network.PortSet, bound network.PortMap) error {
	if strings.Contains(s, "=") {
		var err error
		if s, err = longPublish(s); err != nil {
			return err
		}
	}
	ip, hostPorts, target, proto, err := splitPublish(s)
	if err != nil {
		return err
	}
	var addr netip.Addr
	if ip != "" {
		if addr, err = netip.ParseAddr(ip); err != nil {
			return fmt.Errorf("invalid IP address: %s", ip)
		}
	}
	r, err := network.ParsePortRange(target + "/" + proto)
	if err != nil {
		return fmt.Errorf("invalid containerPort: %s", target)
	}
	n := int(r.End()) - int(r.Start()) + 1
	first, last := 0, 0
	if hostPorts != "" {
		if first, last, err = portRange(hostPorts); err != nil {
			return fmt.Errorf("invalid hostPort: %s", hostPorts)
		}
		// One container port may take any of a range of host ports; else the
		// two ranges go in step.
		if last-first+1 != n && n != 1 {
			return fmt.Errorf("invalid ranges specified for container and host Ports: %s and %s", target, hostPorts)
		}
	}
	i := 0
	for p := range r.All() {
		b := network.PortBinding{HostIP: addr}
		switch {
		case hostPorts == "":
		case n == 1 && first != last:
			b.HostPort = hostPorts
		default:
			b.HostPort = strconv.Itoa(first + i)
		}
		exposed[p] = struct{}{}
		bound[p] = append(bound[p], b)
		i++
	}
	return nil
}

func splitPublish(s string) (ip, hostPorts, target, proto string, err error) {
	s, proto, has := strings.Cut(s, "/")
	if !has {
		proto = "tcp"
	}
	proto = strings.ToLower(proto)
	switch proto {
	case "tcp", "udp", "sctp":
	default:
		return "", "", "", "", fmt.Errorf("invalid proto: %s", proto)
	}
	if strings.HasPrefix(s, "[") {
		end := strings.Index(s, "]:")
		if end < 0 {
			return "", "", "", "", errors.New("invalid IP address")
		}
		ip, s = s[1:end], s[end+2:]
		hostPorts, target, has = strings.Cut(s, ":")
		if !has {
			hostPorts, target = "", s
		}
	} else if i := strings.LastIndex(s, ":"); i >= 0 {
		hostPorts, target = s[:i], s[i+1:]
		if j := strings.LastIndex(hostPorts, ":"); j >= 0 {
			ip, hostPorts = hostPorts[:j], hostPorts[j+1:]
		}
	} else {
		target = s
	}
	if target == "" {
		return "", "", "", "", errors.New("no port specified")
	}
	return ip, hostPorts, target, proto, nil
}

func portRange(s string) (first, last int, err error) {
	a, b, has := strings.Cut(s, "-")
	if !has {
		b = a
	}
	x, err1 := strconv.ParseUint(a, 10, 16)
	y, err2 := strconv.ParseUint(b, 10, 16)
	if err := errors.Join(err1, err2); err != nil {
		return 0, 0, err
	}
	if y < x {
		return 0, 0, errors.New("range is backwards")
	}
	return int(x), int(y), nil
}

func longPublish(s string) (string, error) {
	fields, err := csvFields(s)
	if err != nil {
		return "", err
	}
	proto, ip, published, target := "tcp", "", "", ""
	for _, f := range fields {
		k, v, _ := strings.Cut(f, "=")
		switch k {
		case "protocol":
			proto = v
		case "mode":
		case "target":
			target = v
		case "published":
			published = v
		case "host_ip":
			ip = v
		default:
			return "", fmt.Errorf("invalid field key: %s", k)
		}
	}
	out := target + "/" + proto
	if published != "" || ip != "" {
		out = published + ":" + out
	}
	if ip != "" {
		out = "[" + ip + "]:" + out
	}
	return out, nil
}

// networkOpt is one --network: a name, or name=…,alias=….
type networkOpt struct {
	name     string
	endpoint network.EndpointSettings
}

func parseNetworkOpt(s string) (networkOpt, error) {
	if !strings.Contains(s, "=") {
		return networkOpt{name: s}, nil
	}
	var o networkOpt
	fields, err := csvFields(s)
	if err != nil {
		return o, err
	}
	for _, f := range fields {
		k, v, ok := strings.Cut(f, "=")
		if !ok {
			return o, fmt.Errorf("invalid field %s", f)
		}
		switch strings.ToLower(k) {
		case "name":
			o.name = v
		case "alias":
			o.endpoint.Aliases = append(o.endpoint.Aliases, v)
		case "driver-opt":
			name, value, ok := strings.Cut(v, "=")
			if !ok {
				return o, errors.New("invalid key value pair format in driver options")
			}
			if o.endpoint.DriverOpts == nil {
				o.endpoint.DriverOpts = map[string]string{}
			}
			o.endpoint.DriverOpts[name] = value
		case "ip", "ip6", "link-local-ip":
			if err := setAddress(&o.endpoint, k, v); err != nil {
				return o, err
			}
		case "mac-address":
			if err := setMAC(&o.endpoint, v); err != nil {
				return o, err
			}
		case "gw-priority":
			if o.endpoint.GwPriority, err = strconv.Atoi(v); err != nil {
				return o, fmt.Errorf("invalid gw-priority: %s", v)
			}
		default:
			return o, fmt.Errorf("invalid field key %s", k)
		}
	}
	if o.name == "" {
		return o, errors.New("network name/id is not specified")
	}
	return o, nil
}

// setAddress sets an address of the endpoint; kind is ip, ip6 or link-local-ip.
func setAddress(ep *network.EndpointSettings, kind, v string) error {
	a, err := netip.ParseAddr(v)
	if err != nil || kind == "ip" && !a.Is4() || kind == "ip6" && !a.Is6() {
		return fmt.Errorf("--%s: %q is not such an address", kind, v)
	}
	if ep.IPAMConfig == nil {
		ep.IPAMConfig = &network.EndpointIPAMConfig{}
	}
	switch kind {
	case "ip":
		ep.IPAMConfig.IPv4Address = a
	case "ip6":
		ep.IPAMConfig.IPv6Address = a
	default:
		ep.IPAMConfig.LinkLocalIPs = append(ep.IPAMConfig.LinkLocalIPs, a)
	}
	return nil
}

func setMAC(ep *network.EndpointSettings, v string) error {
	hw, err := net.ParseMAC(strings.TrimSpace(v))
	if err != nil || len(hw) != 6 {
		return fmt.Errorf("%s is not a valid mac address", v)
	}
	ep.MacAddress = network.HardwareAddr(hw)
	return nil
}

// setNetworks reads --network and the flags that concern the first network.
func (c *containerFlags) setNetworks(h *container.HostConfig) (map[string]*network.EndpointSettings, error) {
	opts := []networkOpt{{name: network.NetworkDefault}}
	if len(c.networks) > 0 {
		opts = opts[:0]
	}
	userDefined, other := false, false
	for _, s := range c.networks {
		o, err := parseNetworkOpt(s)
		if err != nil {
			return nil, fmt.Errorf("invalid argument %q for --network: %w", s, err)
		}
		if container.NetworkMode(o.name).IsUserDefined() {
			userDefined = true
		} else {
			other = true
		}
		opts = append(opts, o)
	}
	if userDefined && other {
		return nil, errors.New("conflicting options: cannot attach both user-defined and non-user-defined network-modes")
	}
	if err := c.applyToFirst(&opts[0]); err != nil {
		return nil, err
	}
	h.NetworkMode = container.NetworkMode(opts[0].name)
	eps := map[string]*network.EndpointSettings{}
	for _, o := range opts {
		if _, twice := eps[o.name]; twice {
			return nil, fmt.Errorf("conflicting options: network %q is specified multiple times", o.name)
		}
		if len(opts) == 1 && reflect.DeepEqual(o.endpoint, network.EndpointSettings{}) {
			continue
		}
		if h.NetworkMode.IsContainer() {
			return nil, errors.New("conflicting options: network settings can't be used with --network container:NAME")
		}
		ep := o.endpoint
		eps[o.name] = &ep
	}
	return eps, nil
}

func (c *containerFlags) applyToFirst(o *networkOpt) error {
	ep := &o.endpoint
	if len(c.networkAliases) > 0 {
		if len(ep.Aliases) > 0 {
			return errors.New("conflicting options: cannot specify both --network-alias and per-network alias")
		}
		ep.Aliases = c.networkAliases
	}
	if len(c.links) > 0 && container.NetworkMode(o.name).IsUserDefined() {
		ep.Links = c.links
	}
	for kind, v := range map[string]string{"ip": c.ip, "ip6": c.ip6} {
		if v != "" {
			if err := setAddress(ep, kind, v); err != nil {
				return err
			}
		}
	}
	for _, v := range c.linkLocalIP {
		if err := setAddress(ep, "link-local-ip", v); err != nil {
			return err
		}
	}
	if c.macAddress != "" {
		if len(ep.MacAddress) > 0 {
			return errors.New("conflicting options: cannot specify both --mac-address and per-network MAC address")
		}
		return setMAC(ep, c.macAddress)
	}
	return nil
}
