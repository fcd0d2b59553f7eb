package tenant

import (
	"context"
	"maps"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/internal/engine"
	tnet "tenon.dev/tenon/internal/network"
)

// Networks are the machine's own and the predefined ones.
type Networks struct {
	c *tnet.Controller
	s *Scope
}

// find returns a network that the tenants see.
func (n *Networks) find(ctx context.Context, ref string) (tnet.Inspect, error) {
	in, err := n.c.Inspect(ctx, ref)
	if err != nil || !n.sees(&in) {
		return tnet.Inspect{}, errdefs.ErrNotFound.WithMessage("network " + ref + " not found")
	}
	return in, nil
}

func (n *Networks) sees(in *tnet.Inspect) bool {
	return in.Labels[engine.MachineLabel] == n.s.name || slices.Contains([]string{network.NetworkBridge, network.NetworkHost, network.NetworkNone}, in.Name)
}

// shown is a network with the machine's own endpoints alone.
func (n *Networks) shown(in tnet.Inspect) tnet.Inspect {
	own := map[string]network.EndpointResource{}
	for id, ep := range in.Containers {
		if _, err := n.s.own(id); err == nil {
			own[id] = ep
		}
	}
	in.Containers = own
	if in.Labels[engine.MachineLabel] != n.s.name {
		in.Status = nil // how many others are there
	}
	return in
}

// List lists them.
func (n *Networks) List(ctx context.Context, f tnet.Filters) ([]tnet.Inspect, error) {
	list, err := n.c.List(ctx, f)
	if err != nil {
		return nil, err
	}
	out := []tnet.Inspect{}
	for i := range list {
		if n.sees(&list[i]) {
			out = append(out, n.shown(list[i]))
		}
	}
	return out, nil
}

// Inspect describes one.
func (n *Networks) Inspect(ctx context.Context, ref string) (tnet.Inspect, error) {
	in, err := n.find(ctx, ref)
	if err != nil {
		return in, err
	}
	return n.shown(in), nil
}

// Create makes a bridge whose addresses the daemon chooses: one that a tenant
// chose could be those of the host's own networks.
func (n *Networks) Create(ctx context.Context, req tnet.CreateRequest) (tnet.Inspect, error) {
	switch {
	case req.Driver != "" && req.Driver != "bridge" && req.Driver != "default":
		return tnet.Inspect{}, n.s.denied("a network of driver %s can't be had", req.Driver)
	case len(req.Options) > 0:
		return tnet.Inspect{}, n.s.denied("a network with driver options can't be had")
	case req.IPAM != nil && (len(req.IPAM.Config) > 0 || len(req.IPAM.Options) > 0 || req.IPAM.Driver != "" && req.IPAM.Driver != "default"):
		return tnet.Inspect{}, n.s.denied("a network's addresses can't be chosen")
	case req.ConfigFrom != nil || req.ConfigOnly || req.Ingress || req.Scope != "" && req.Scope != "local":
		return tnet.Inspect{}, n.s.denied("such a network can't be had")
	}
	own := tnet.CreateRequest{ // what is not known here is not passed on
		Name: req.Name, Driver: "bridge", EnableIPv4: req.EnableIPv4, EnableIPv6: req.EnableIPv6,
		Internal: req.Internal, Attachable: req.Attachable, Labels: maps.Clone(req.Labels),
	}
	if own.Labels == nil {
		own.Labels = map[string]string{}
	}
	own.Labels[engine.MachineLabel] = n.s.name
	n.s.making.Lock() // the last that may be made is made once
	defer n.s.making.Unlock()
	if most := n.s.eng.TenantLimits().Networks; most > 0 {
		list, err := n.c.List(ctx, tnet.Filters(n.s.labelled(nil)))
		if err != nil {
			return tnet.Inspect{}, err
		}
		if len(list) >= most {
			return tnet.Inspect{}, engine.TooMany(n.s.name, "networks", most)
		}
	}
	return n.c.Create(ctx, own)
}

// Remove removes one of the machine's own.
func (n *Networks) Remove(ctx context.Context, ref string) error {
	in, err := n.find(ctx, ref)
	if err != nil {
		return err
	}
	if in.Labels[engine.MachineLabel] != n.s.name {
		return n.s.denied("the network %s can't be removed", in.Name)
	}
	return n.c.Remove(ctx, in.ID)
}

// Prune removes those of the machine's own that nobody uses.
func (n *Networks) Prune(ctx context.Context, f tnet.Filters) ([]string, error) {
	return n.c.Prune(ctx, tnet.Filters(n.s.labelled(engine.Filters(f))))
}
