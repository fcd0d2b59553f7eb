package network

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	mobynet "github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/internal/network/dns/wire"
	"tenon.dev/tenon/internal/network/ipam"
	"tenon.dev/tenon/internal/network/link"
	"tenon.dev/tenon/internal/network/nft"
)

// Names of predefined networks and of Docker's bridge options.
const (
	defaultNetwork = mobynet.NetworkBridge

	optBridgeName = "com.docker.network.bridge.name"
	optICC        = "com.docker.network.bridge.enable_icc"
	optMasquerade = "com.docker.network.bridge.enable_ip_masquerade"
	optHostIPv4   = "com.docker.network.bridge.host_binding_ipv4"
	optDefault    = "com.docker.network.bridge.default_bridge"
	optMTU        = "com.docker.network.driver.mtu"
	optParent     = "parent"
	// optGuard switches off that ports of the bridge are pinned to their
	// endpoints' addresses (for containers that route for others).
	optGuard = "tenon.network.antispoof"
	// optShortcuts has frames go by the bridge although they need not.
	optShortcuts = "tenon.network.shortcuts"
)

func predefined(name string) bool {
	return name == defaultNetwork || name == mobynet.NetworkHost || name == mobynet.NetworkNone
}

// subnet is one prefix of a network.
type subnet struct {
	*ipam.Subnet
	gateway netip.Addr
}

func (n *netw) optBool(key string, def bool) bool {
	v, err := strconv.ParseBool(n.rec.Options[key])
	if err != nil {
		return def
	}
	return v
}

func (n *netw) isBridge() bool { return n.rec.Driver == "bridge" }

// subnetFor returns the network's subnet of a family (nil if none).
func (n *netw) subnetFor(v4 bool) *subnet {
	for _, s := range n.subnets {
		if s.Prefix().Addr().Is4() == v4 {
			return s
		}
	}
	return nil
}

// load makes the address plan of a record.
func newNetw(rec netRecord) (*netw, error) {
	n := &netw{rec: rec, eps: map[string]*Endpoint{}, ghosts: map[netip.Addr]string{}, segments: make([]segment, 1)}
	if rec.ConfigOnly {
		return n, nil
	}
	for _, cfg := range rec.IPAM.Config {
		s, err := ipam.New(cfg.Subnet, cfg.IPRange)
		if err != nil {
			return nil, err
		}
		if cfg.Gateway.IsValid() {
			s.Reserve(cfg.Gateway)
		}
		for _, a := range cfg.AuxAddress {
			s.Reserve(a)
		}
		n.subnets = append(n.subnets, &subnet{Subnet: s, gateway: cfg.Gateway})
	}
	return n, nil
}

// nft describes the network for the table.
func (n *netw) nft() nft.Net {
	out := nft.Net{Bridge: n.rec.Bridge, Index: n.segments[0].index, Internal: n.rec.Internal,
		NoMasquerade: !n.optBool(optMasquerade, true), NoICC: !n.optBool(optICC, true)}
	for _, s := range n.subnets {
		out.Subnets = append(out.Subnets, s.Prefix())
		if s.gateway.IsValid() {
			out.Gateways = append(out.Gateways, s.gateway)
		}
	}
	return out
}

// dns describes the network for the DNS process.
func (n *netw) dns() wire.Network {
	d := wire.Network{ID: n.rec.ID, Name: n.rec.Name, Internal: n.rec.Internal}
	for _, s := range n.subnets {
		d.Subnets = append(d.Subnets, s.Prefix())
		if s.gateway.IsValid() && n.isBridge() {
			d.Listen = append(d.Listen, s.gateway)
		}
	}
	return d
}

func (c *Controller) sortedLocked() []*netw {
	out := make([]*netw, 0, len(c.nets))
	for _, n := range c.nets {
		out = append(out, n)
	}
	sort.Slice(out, func(i, j int) bool {
		a, b := out[i].rec, out[j].rec
		if !a.Created.Equal(b.Created) {
			return a.Created.Before(b.Created)
		}
		return a.ID < b.ID
	})
	return out
}

func (c *Controller) byNameLocked(name string) *netw { return c.nets[c.names[name]] }

// findLocked resolves a name, an id or a unique prefix of an id.
func (c *Controller) findLocked(ref string) (*netw, error) {
	if ref == "default" {
		ref = defaultNetwork
	}
	if n := c.byNameLocked(ref); n != nil {
		return n, nil
	}
	if n := c.nets[ref]; n != nil {
		return n, nil
	}
	var found *netw
	if ref != "" {
		for id, n := range c.nets {
			if strings.HasPrefix(id, ref) {
				if found != nil {
					return nil, fmt.Errorf("network %s is ambiguous: several ids start with it: %w", ref, errdefs.ErrInvalidArgument)
				}
				found = n
			}
		}
	}
	if found == nil {
		return nil, fmt.Errorf("network %s not found: %w", ref, errdefs.ErrNotFound)
	}
	return found, nil
}

// Create makes a network. Errors: InvalidArgument, AlreadyExists (name taken),
// FailedPrecondition (no free subnet, overlap).
func (c *Controller) Create(ctx context.Context, req CreateRequest) (Inspect, error) {
	unlock, err := c.keys.lock(ctx, "networks")
	if err != nil {
		return Inspect{}, err
	}
	defer unlock()
	if predefined(req.Name) {
		return Inspect{}, fmt.Errorf("operation is not permitted on predefined %s network: %w", req.Name, errdefs.ErrPermissionDenied)
	}
	n, err := c.create(req, "")
	if err != nil {
		return Inspect{}, fmt.Errorf("create network %s: %w", req.Name, err)
	}
	c.emit("create", n.rec, "")
	return c.Inspect(ctx, n.rec.ID)
}

func (c *Controller) create(req CreateRequest, bridge string) (*netw, error) {
	rec, err := c.plan(req, bridge)
	if err != nil {
		return nil, err
	}
	n, err := newNetw(rec)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	// The record is the intent: what it names is repaired or removed by Open.
	c.mu.Lock()
	c.nets[rec.ID], c.names[rec.Name] = n, rec.ID
	err = c.saveNetsLocked()
	c.mu.Unlock()
	if err == nil && n.isBridge() {
		if err = c.raise(n); err == nil {
			err = c.table.AddNet(n.nft())
		}
	}
	if err != nil {
		c.forget(n)
		return nil, err
	}
	if n.isBridge() {
		c.dns.sendWait(wire.Message{Op: wire.OpNet, Network: ptr(n.dns())})
	}
	return n, nil
}

func ptr[T any](v T) *T { return &v }

// forget removes a network's things and its record.
func (c *Controller) forget(n *netw) {
	if n.isBridge() {
		names := []string{n.rec.Bridge}
		for seg := 1; seg < len(n.segments); seg++ {
			names = append(names, c.segmentName(n.rec.ID, seg))
		}
		for _, name := range names {
			if err := c.table.RemoveNet(name); err != nil {
				c.log.Warn("network is left in the nftables table", "network", n.rec.Name, "err", err)
			}
		}
		if err := c.lower(n); err != nil {
			c.log.Warn("bridge is left; the next start removes it", "network", n.rec.Name, "err", err)
		}
	}
	c.mu.Lock()
	delete(c.nets, n.rec.ID)
	delete(c.names, n.rec.Name)
	err := c.saveNetsLocked()
	c.mu.Unlock()
	if err != nil {
		c.log.Warn("networks' records could not be written", "err", err)
	}
}

// orphaned says whether a bridge has this engine's mark for a network that it does not
// know: its records were removed while the bridge stood.
func (c *Controller) orphaned(l link.Info) bool {
	id, _, ok := c.parseAlias(l.Alias)
	if !ok {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nets[id] == nil
}

// raise makes the network's bridge, or repairs it. Idempotent.
func (c *Controller) raise(n *netw) error {
	links, err := c.rtnl.Links()
	if err != nil {
		return err
	}
	name, alias := n.rec.Bridge, c.bridgeAlias(n.rec.ID)
	i := slices.IndexFunc(links, func(l link.Info) bool { return l.Name == name })
	if i >= 0 && links[i].Kind == "bridge" && c.orphaned(links[i]) {
		c.log.Warn("bridge of a network that has no record any more is made again", "bridge", name, "network", n.rec.Name)
		var b link.Batch
		b.DelLink(name)
		if err := c.rtnl.Do(&b); err != nil {
			return err
		}
		i = -1
	}
	given := n.rec.Options[optBridgeName] != "" && !c.isDefault(n)
	if i >= 0 && (links[i].Kind != "bridge" || !given && links[i].Alias != alias && links[i].Alias != "") {
		return fmt.Errorf("interface %s exists and is not a bridge of this engine (`ip link delete %s` removes it): %w", name, name, errdefs.ErrFailedPrecondition)
	}
	if i < 0 {
		mac := macFor(netip.AddrFrom4([4]byte([]byte(n.rec.ID)[:4])))
		if s := n.subnetFor(true); s != nil && s.gateway.IsValid() {
			mac = macFor(s.gateway)
		}
		var b link.Batch
		b.AddBridge(name, mac, n.rec.MTU)
		b.SetAlias(name, alias)
		if err := c.rtnl.Do(&b); err != nil {
			return err
		}
		if links, err = c.rtnl.Links(); err != nil {
			return err
		}
		if i = slices.IndexFunc(links, func(l link.Info) bool { return l.Name == name }); i < 0 {
			return fmt.Errorf("bridge %s vanished: %w", name, errdefs.ErrFailedPrecondition)
		}
	}
	c.mu.Lock()
	index := links[i].Index
	n.segments[0].index = index
	own := !given || links[i].Alias == alias
	if n.mac = nil; own {
		n.mac = links[i].MAC
	}
	c.mu.Unlock()
	v6 := "1"
	if n.rec.EnableIPv6 {
		v6 = "0"
		c.forward6()
	}
	for k, v := range map[string]string{"ipv4/conf/%s/route_localnet": "1", "ipv6/conf/%s/disable_ipv6": v6, "ipv6/conf/%s/accept_ra": "0"} {
		if err := link.Sysctl("net/"+fmt.Sprintf(k, name), v); err != nil && !os.IsNotExist(err) {
			c.log.Warn("setting of the bridge could not be made", "setting", k, "network", n.rec.Name, "err", err)
		}
	}
	var b link.Batch
	if links[i].Alias == "" && !given { // a bridge of the administrator's stays that
		b.SetAlias(name, alias)
	}
	for _, s := range n.subnets {
		if s.gateway.IsValid() {
			b.AddAddr(index, netip.PrefixFrom(s.gateway, s.Prefix().Bits()))
		}
	}
	b.SetUp(index)
	if n.rec.EnableIPv6 {
		b.AddLocal(index, netip.IPv6Loopback(), loopbackMetric)
	}
	if err := c.rtnl.Do(&b); err != nil {
		return err
	}
	if own && n.optBool(optShortcuts, true) {
		c.attachBridge(index)
	}
	return nil
}

// loopbackMetric is the preference of ::1 on a bridge: after the true one on lo.
// The kernel takes replies to connections from [::1], whose destination was
// turned back to ::1, only from an interface that has a route to it.
const loopbackMetric = 4096

// lower deletes the bridge, if it is ours.
func (c *Controller) lower(n *netw) error {
	links, err := c.rtnl.Links()
	if err != nil {
		return err
	}
	var b link.Batch
	for _, name := range c.lowerLinks(links, n.rec.ID) {
		b.DelLink(name)
	}
	return c.rtnl.Do(&b)
}

func (c *Controller) isDefault(n *netw) bool { return n.rec.Name == defaultNetwork }

// Remove deletes a network by name or id. Errors: NotFound, PermissionDenied
// (a predefined network), FailedPrecondition (has endpoints).
func (c *Controller) Remove(ctx context.Context, nameOrID string) error {
	unlock, err := c.keys.lock(ctx, "networks")
	if err != nil {
		return err
	}
	defer unlock()
	return c.remove(nameOrID, "destroy")
}

func (c *Controller) remove(ref, action string) error {
	c.mu.Lock()
	n, err := c.findLocked(ref)
	if err == nil && predefined(n.rec.Name) {
		err = fmt.Errorf("%s is a pre-defined network and cannot be removed: %w", n.rec.Name, errdefs.ErrPermissionDenied)
	}
	if err == nil && len(n.eps) > 0 {
		var who []string
		for id := range n.eps {
			name := shortID(id)
			if r := c.conts[id]; r != nil {
				name = r.Name
			}
			who = append(who, fmt.Sprintf("name:%q id:%q", name, shortID(id)))
		}
		slices.Sort(who)
		err = errdefs.ErrPermissionDenied.WithMessage(fmt.Sprintf("error while removing network: network %s has active endpoints (%s)", n.rec.Name, strings.Join(who, ", ")))
	}
	if err == nil {
		if users := c.usersLocked(n); len(users) > 0 {
			err = errdefs.ErrPermissionDenied.WithMessage(fmt.Sprintf("configuration network %q is in use (by %s)", n.rec.Name, strings.Join(users, ", ")))
		}
	}
	if err != nil {
		c.mu.Unlock()
		return err
	}
	// From here on nobody finds it by name any more.
	delete(c.names, n.rec.Name)
	c.mu.Unlock()
	c.dns.send(wire.Message{Op: wire.OpNetDel, ID: n.rec.ID})
	c.forget(n)
	c.emit(action, n.rec, "")
	return nil
}

// Prune removes the networks without endpoints that pass the filters, and
// returns their names.
func (c *Controller) Prune(ctx context.Context, f Filters) ([]string, error) {
	unlock, err := c.keys.lock(ctx, "networks")
	if err != nil {
		return nil, err
	}
	defer unlock()
	until, err := f.until(time.Now())
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	var ids, names []string
	for _, n := range c.sortedLocked() {
		if len(n.eps) == 0 && !predefined(n.rec.Name) && !n.rec.ConfigOnly && f.labels(n.rec.Labels) && (until.IsZero() || n.rec.Created.Before(until)) {
			ids = append(ids, n.rec.ID)
		}
	}
	c.mu.Unlock()
	for _, id := range ids {
		c.mu.Lock()
		n := c.nets[id]
		c.mu.Unlock()
		if n == nil {
			continue
		}
		if err := c.remove(id, "destroy"); err != nil {
			c.log.Warn("network was not pruned", "network", n.rec.Name, "err", err)
			continue
		}
		names = append(names, n.rec.Name)
	}
	c.emit("prune", netRecord{}, "")
	return names, nil
}

// ulaPool is the pool of unique local IPv6 addresses for a controller's name.
func ulaPool(name string) Pool {
	id, _ := os.ReadFile("/etc/machine-id")
	h := sha256.Sum256([]byte(string(id) + "/" + name))
	a := [16]byte{0xfd, h[0], h[1], h[2], h[3], h[4]}
	return Pool{netip.PrefixFrom(netip.AddrFrom16(a), 48), 64}
}
