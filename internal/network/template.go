package network

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	mobynet "github.com/moby/moby/api/types/network"
)

// planTemplate settles a network that is only the configuration of others
// (--config-only): its addresses are checked, but taken by those alone.
func planTemplate(req CreateRequest) (netRecord, error) {
	rec := netRecord{ID: randomHex(64), Name: req.Name, Driver: "null", Created: time.Now().UTC(), ConfigOnly: true, EnableIPv4: true,
		Options: maps.Clone(req.Options), Labels: maps.Clone(req.Labels)}
	if req.Ingress || req.Internal || req.Attachable || req.Scope != "" {
		return rec, fmt.Errorf("configuration network can only contain network specific fields. Network operator fields like [ ingress | internal | attachable | scope ] are not supported: %w", errdefs.ErrPermissionDenied)
	}
	if req.ConfigFrom != nil && req.ConfigFrom.Network != "" {
		return rec, fmt.Errorf("a configuration network cannot depend on another configuration network: %w", errdefs.ErrPermissionDenied)
	}
	if rec.Options == nil {
		rec.Options = map[string]string{}
	}
	if rec.Labels == nil {
		rec.Labels = map[string]string{}
	}
	if req.EnableIPv4 != nil {
		rec.EnableIPv4 = *req.EnableIPv4
	}
	if req.EnableIPv6 != nil {
		rec.EnableIPv6 = *req.EnableIPv6
	}
	rec.IPAM = mobynet.IPAM{Driver: "default", Config: []mobynet.IPAMConfig{}}
	if req.IPAM == nil {
		return rec, nil
	}
	if d := req.IPAM.Driver; d != "" && d != "default" {
		return rec, fmt.Errorf("IPAM driver %q is not supported, only default: %w", d, errdefs.ErrInvalidArgument)
	}
	rec.IPAM.Options = maps.Clone(req.IPAM.Options)
	rec.IPAM.Config = append(rec.IPAM.Config, req.IPAM.Config...)
	for _, cfg := range rec.IPAM.Config {
		if !cfg.Subnet.IsValid() {
			return rec, fmt.Errorf("invalid network config: a gateway or range needs a subnet: %w", errdefs.ErrInvalidArgument)
		}
		if err := checkIPAM(&cfg); err != nil { // cfg is a copy: the gateway is picked by those that use it
			return rec, fmt.Errorf("invalid network config: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	return rec, nil
}

// configured completes a request by the configuration network that it names
// (--config-from). Such a request has no settings of its own but those of an
// operator: internal, attachable.
func (c *Controller) configured(req CreateRequest) (CreateRequest, error) {
	if req.ConfigFrom == nil || req.ConfigFrom.Network == "" {
		req.ConfigFrom = nil
		return req, nil
	}
	own := len(req.Labels) > 0 || req.EnableIPv4 != nil && !*req.EnableIPv4 || req.EnableIPv6 != nil && *req.EnableIPv6
	if p := req.IPAM; p != nil {
		own = own || p.Driver != "" && p.Driver != "default" || len(p.Options) > 0 || len(p.Config) > 0
	}
	if own {
		return req, fmt.Errorf("user-specified configurations are not supported if the network depends on a configuration network: %w", errdefs.ErrPermissionDenied)
	}
	if len(req.Options) > 0 {
		return req, fmt.Errorf("network driver options are not supported if the network depends on a configuration network: %w", errdefs.ErrPermissionDenied)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	from := c.byNameLocked(req.ConfigFrom.Network)
	if from == nil || !from.rec.ConfigOnly {
		return req, fmt.Errorf("configuration network %q does not exist: %w", req.ConfigFrom.Network, errdefs.ErrNotFound)
	}
	r := from.rec
	v4, v6 := r.EnableIPv4, r.EnableIPv6
	req.EnableIPv4, req.EnableIPv6 = &v4, &v6
	req.Options, req.Labels = maps.Clone(r.Options), maps.Clone(r.Labels)
	ipam := r.IPAM
	ipam.Options, ipam.Config = maps.Clone(ipam.Options), slices.Clone(ipam.Config)
	req.IPAM = &ipam
	return req, nil
}

// usersLocked are the networks that were made from the configuration network n.
func (c *Controller) usersLocked(n *netw) []string {
	var names []string
	for _, other := range c.nets {
		if n.rec.ConfigOnly && other.rec.ConfigFrom == n.rec.Name {
			names = append(names, other.rec.Name)
		}
	}
	slices.Sort(names)
	return names
}
