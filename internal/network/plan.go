package network

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	mobynet "github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/internal/network/ipam"
)

// plan checks a request and settles everything that it left open. Nothing is
// changed. bridge is the interface's name for the default network.
func (c *Controller) plan(req CreateRequest, bridge string) (netRecord, error) {
	if err := checkName(req.Name); err != nil {
		return netRecord{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if req.ConfigOnly {
		rec, err := planTemplate(req)
		if err != nil {
			return netRecord{}, err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		return rec, c.freeNameLocked(rec.Name)
	}
	req, err := c.configured(req)
	if err != nil {
		return netRecord{}, err
	}
	rec := netRecord{ID: randomHex(64), Name: req.Name, Driver: req.Driver, Created: time.Now().UTC(),
		Internal: req.Internal, Attachable: req.Attachable, EnableIPv4: true,
		Options: maps.Clone(req.Options), Labels: maps.Clone(req.Labels), MTU: c.cfg.MTU}
	if rec.Options == nil {
		rec.Options = map[string]string{}
	}
	if rec.Labels == nil {
		rec.Labels = map[string]string{}
	}
	bad := func(format string, a ...any) (netRecord, error) {
		return netRecord{}, fmt.Errorf(format+": %w", append(a, errdefs.ErrInvalidArgument)...)
	}
	if req.ConfigFrom != nil {
		rec.ConfigFrom = req.ConfigFrom.Network
	}
	if rec.Driver == "" || rec.Driver == "default" {
		rec.Driver = "bridge"
	}
	switch rec.Driver {
	case "bridge", "macvlan", "null", "host":
	case "overlay":
		return bad("This node is not a swarm manager: the driver overlay is not supported; use bridge")
	case "ipvlan":
		return netRecord{}, fmt.Errorf("ipvlan networks are not built; a macvlan network also extends an interface of the host: %w", errdefs.ErrNotImplemented)
	default:
		return netRecord{}, fmt.Errorf("could not find a network driver named %q; there are bridge and macvlan: %w", rec.Driver, errdefs.ErrNotFound)
	}
	if (rec.Driver == "null" || rec.Driver == "host") && !predefined(req.Name) {
		return netRecord{}, fmt.Errorf("only one instance of %q network is allowed: %w", rec.Driver, errdefs.ErrPermissionDenied)
	}
	if req.Scope != "" && req.Scope != "local" {
		return bad("scope %q is not supported, only local", req.Scope)
	}
	if req.Ingress {
		return bad("ingress networks need a swarm and are not supported")
	}
	if req.EnableIPv4 != nil {
		rec.EnableIPv4 = *req.EnableIPv4
	}
	if req.EnableIPv6 != nil {
		rec.EnableIPv6 = *req.EnableIPv6
	}
	if v := rec.Options[optMTU]; v != "" {
		mtu, err := strconv.Atoi(v)
		if err != nil || mtu < 68 || mtu > 65535 {
			return bad("bad MTU %q", v)
		}
		rec.MTU = mtu
	}
	for _, k := range []string{optICC, optMasquerade, optGuard, optShortcuts} {
		if v, ok := rec.Options[k]; ok {
			if _, err := strconv.ParseBool(v); err != nil {
				return bad("option %s: bad value %q", k, v)
			}
		}
	}
	if v, ok := rec.Options[optHostIPv4]; ok {
		if a, err := netip.ParseAddr(v); err != nil || !a.Is4() {
			return bad("option %s: bad address %q", optHostIPv4, v)
		}
	}
	if rec.Driver == "macvlan" {
		if m := rec.Options["macvlan_mode"]; m != "" && m != "bridge" {
			return bad("macvlan mode %q is not supported, only bridge", m)
		}
		if p := rec.Options[optParent]; !bridgePattern.MatchString(p) {
			return bad("a macvlan network needs the option parent, the host's interface that it extends (-o parent=eth0)")
		} else if i, err := net.InterfaceByName(p); err != nil {
			return bad("parent interface %s: %w", p, err)
		} else if i.Flags&net.FlagLoopback != 0 {
			return bad("parent interface %s: a macvlan network can't extend the loopback interface", p)
		}
	}
	if rec.Driver == "bridge" {
		rec.Bridge = c.bridgeName(rec.ID)
		if bridge != "" {
			rec.Bridge = bridge
		}
		if v := rec.Options[optBridgeName]; v != "" {
			if !bridgePattern.MatchString(v) || v == "." || v == ".." {
				return bad("bad bridge name %q", v)
			}
			rec.Bridge = v
		}
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.freeNameLocked(rec.Name); err != nil {
		return netRecord{}, err
	}
	for _, n := range c.nets {
		if rec.Bridge != "" && n.rec.Bridge == rec.Bridge {
			return netRecord{}, fmt.Errorf("bridge name %s is used by network %s: %w", rec.Bridge, n.rec.Name, errdefs.ErrAlreadyExists)
		}
	}
	rec.IPAM.Driver, rec.IPAM.Options = "default", nil
	if req.IPAM != nil {
		if d := req.IPAM.Driver; d != "" && d != "default" {
			return bad("IPAM driver %q is not supported, only default", d)
		}
		rec.IPAM.Options = maps.Clone(req.IPAM.Options)
		rec.IPAM.Config = append(rec.IPAM.Config, req.IPAM.Config...)
	}
	if rec.Driver == "null" || rec.Driver == "host" {
		rec.IPAM.Config = []mobynet.IPAMConfig{}
		return rec, nil
	}
	if !rec.EnableIPv4 && !rec.EnableIPv6 {
		return bad("IPv4 or IPv6 must be enabled")
	}
	if err := c.planSubnetsLocked(&rec); err != nil {
		return netRecord{}, err
	}
	return rec, nil
}

// freeNameLocked refuses a name that a network has. Error: AlreadyExists.
func (c *Controller) freeNameLocked(name string) error {
	if _, ok := c.names[name]; ok {
		return fmt.Errorf("network with name %s already exists: %w", name, errdefs.ErrAlreadyExists)
	}
	return nil
}

// planSubnetsLocked checks the wanted subnets and adds those that are missing.
func (c *Controller) planSubnetsLocked(rec *netRecord) error {
	var used []netip.Prefix
	for _, n := range c.nets {
		for _, s := range n.subnets {
			used = append(used, s.Prefix())
		}
	}
	have := map[bool]bool{}
	for i := range rec.IPAM.Config {
		cfg := &rec.IPAM.Config[i]
		if !cfg.Subnet.IsValid() {
			if cfg.Gateway.IsValid() || cfg.IPRange.IsValid() {
				return fmt.Errorf("invalid network config: a gateway or range needs a subnet: %w", errdefs.ErrInvalidArgument)
			}
			p, err := c.pickLocked(cfg.Subnet.Addr().Is6(), used)
			if err != nil {
				return err
			}
			cfg.Subnet = p
		}
		if err := checkIPAM(cfg); err != nil {
			return fmt.Errorf("invalid network config: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		v4 := cfg.Subnet.Addr().Is4()
		if have[v4] {
			return fmt.Errorf("invalid network config: only one subnet per address family is supported: %w", errdefs.ErrInvalidArgument)
		}
		if !v4 && !rec.EnableIPv6 {
			return fmt.Errorf("invalid network config: IPv6 subnet %s on a network without IPv6: %w", cfg.Subnet, errdefs.ErrInvalidArgument)
		}
		have[v4] = true
		for _, u := range used {
			if u.Overlaps(cfg.Subnet) && rec.Driver == "bridge" {
				return fmt.Errorf("invalid pool request: Pool overlaps with other one on this address space (%s and %s): %w", cfg.Subnet, u, errdefs.ErrFailedPrecondition)
			}
		}
		used = append(used, cfg.Subnet)
	}
	for _, v6 := range []bool{false, true} {
		if v6 && !rec.EnableIPv6 || !v6 && !rec.EnableIPv4 || have[!v6] {
			continue
		}
		p, err := c.pickLocked(v6, used)
		if err != nil {
			return err
		}
		used = append(used, p)
		cfg := mobynet.IPAMConfig{Subnet: p}
		if err := checkIPAM(&cfg); err != nil {
			return err
		}
		rec.IPAM.Config = append(rec.IPAM.Config, cfg)
	}
	return nil
}

// checkIPAM checks one subnet's settings and picks its gateway.
func checkIPAM(cfg *mobynet.IPAMConfig) error {
	if cfg.Subnet != cfg.Subnet.Masked() {
		return fmt.Errorf("invalid subnet %s: it should be %s", cfg.Subnet, cfg.Subnet.Masked())
	}
	if cfg.Subnet.Bits() > cfg.Subnet.Addr().BitLen()-2 {
		return fmt.Errorf("invalid subnet %s: too small", cfg.Subnet)
	}
	if cfg.IPRange.IsValid() {
		if !cfg.Subnet.Contains(cfg.IPRange.Addr()) || cfg.IPRange.Bits() < cfg.Subnet.Bits() {
			return fmt.Errorf("invalid ip-range %s: not in subnet %s", cfg.IPRange, cfg.Subnet)
		}
		cfg.IPRange = cfg.IPRange.Masked()
	}
	if !cfg.Gateway.IsValid() {
		cfg.Gateway = cfg.Subnet.Addr().Next()
		for taken := true; taken; {
			taken = false
			for _, a := range cfg.AuxAddress {
				if a == cfg.Gateway {
					cfg.Gateway, taken = cfg.Gateway.Next(), true
				}
			}
		}
	}
	if !cfg.Subnet.Contains(cfg.Gateway) {
		return fmt.Errorf("invalid gateway %s: not in subnet %s", cfg.Gateway, cfg.Subnet)
	}
	for name, a := range cfg.AuxAddress {
		if !cfg.Subnet.Contains(a) {
			return fmt.Errorf("invalid auxiliary address %s=%s: not in subnet %s", name, a, cfg.Subnet)
		}
	}
	return nil
}

// pickLocked cuts a free subnet from the pools, avoiding the host's routes.
func (c *Controller) pickLocked(v6 bool, used []netip.Prefix) (netip.Prefix, error) {
	routes, err := c.rtnl.Routes()
	if err != nil {
		return netip.Prefix{}, err
	}
	used = append(append([]netip.Prefix(nil), used...), routes...)
	pools := c.cfg.Pools
	if v6 {
		pools = c.cfg.Pools6
	}
	for _, p := range pools {
		got, err := ipam.FreeSubnet(p.Base, p.Size, used)
		if err == nil {
			return got, nil
		}
		if !errors.Is(err, ipam.ErrNoSubnet) {
			return netip.Prefix{}, err
		}
	}
	return netip.Prefix{}, fmt.Errorf("%w; remove unused networks, name a subnet, or configure more address pools: %w", ipam.ErrNoSubnet, errdefs.ErrFailedPrecondition)
}
