package engine

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"time"

	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	mobynet "github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/network"
)

// List shows containers, newest first.
func (e *Engine) List(ctx context.Context, o ListOptions) ([]mobycontainer.Summary, error) {
	if err := checkFilters(o.Filters, listFilters...); err != nil {
		return nil, err
	}
	s := &selector{f: o.Filters, networks: e.networkNames}
	if err := s.parse(); err != nil {
		return nil, err
	}
	if err := e.resolveSelector(ctx, s, o.Tenant); err != nil {
		return nil, err
	}
	ctrs := e.all()
	slices.SortFunc(ctrs, func(a, b *ctr) int {
		if c := b.record().Created.Compare(a.record().Created); c != 0 {
			return c
		}
		return cmp.Compare(a.id, b.id)
	})
	now := time.Now()
	links := linkNames(ctrs)
	out := []mobycontainer.Summary{}
	for _, c := range ctrs {
		r := c.record()
		if o.Tenant != "" && r.Isolation != machine.Prefix+o.Tenant {
			continue
		}
		if !r.Running() && !r.Facts.Restarting && !o.All && o.Limit <= 0 && !s.all() {
			continue
		}
		ns := c.namespace()
		ports := portSummaries(r, ns)
		if !s.match(r, ports) {
			continue
		}
		s := e.summary(ctx, c, r, ns, ports, o.Size, now)
		s.Names = append(s.Names, append(links[r.Name], links[r.ID]...)...)
		out = append(out, s)
		if o.Limit > 0 && len(out) == o.Limit {
			break
		}
	}
	return out, nil
}

// resolveSelector looks up what before, since and ancestor name.
func (e *Engine) resolveSelector(ctx context.Context, s *selector, tenant string) error {
	for key, at := range map[string]*time.Time{"before": &s.before, "since": &s.since} {
		for _, ref := range s.f[key] {
			if tenant != "" {
				var err error
				if ref, err = e.TenantContainer(tenant, ref); err != nil {
					return err
				}
			}
			c, err := e.find(ref)
			if err != nil {
				return err
			}
			*at = c.record().Created
		}
	}
	if len(s.f["ancestor"]) == 0 {
		return nil
	}
	s.images = map[string]bool{}
	for _, ref := range s.f["ancestor"] {
		if img, err := e.cfg.Images.Resolve(ctx, ref, nil); err == nil {
			s.images[img.ID] = true
			e.addChildren(ctx, s.images, img.ChainIDs)
		}
	}
	return nil
}

// addChildren adds the images of containers that stand on the same layers.
func (e *Engine) addChildren(ctx context.Context, ids map[string]bool, chain []chainID) {
	if len(chain) == 0 {
		return
	}
	for _, c := range e.all() {
		r := c.record()
		img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
		if err == nil && slices.Contains(img.ChainIDs, chain[len(chain)-1]) {
			ids[r.Image.ID] = true
		}
	}
}

func (e *Engine) summary(ctx context.Context, c *ctr, r *container.Record, ns *network.Namespace, ports []mobycontainer.PortSummary, size bool, now time.Time) mobycontainer.Summary {
	s := mobycontainer.Summary{
		ID: r.ID, Names: []string{"/" + r.Name}, Image: r.Image.Ref, ImageID: r.Image.ID, ImageManifestDescriptor: r.Image.Manifest,
		Command: r.Command(), Created: r.Created.Unix(), Ports: ports, Labels: r.Config.Labels,
		State: r.State(), Status: r.Status(now), Mounts: mountPoints(r),
		NetworkSettings: &mobycontainer.NetworkSettingsSummary{Networks: e.endpoints(r, ns)},
	}
	if s.Labels == nil {
		s.Labels = map[string]string{}
	}
	s.HostConfig.NetworkMode = string(r.HostConfig.NetworkMode)
	s.HostConfig.Annotations = r.HostConfig.Annotations
	s.Health = &mobycontainer.HealthSummary{Status: mobycontainer.NoHealthcheck}
	if h := r.Facts.Health; h != nil {
		s.Health = &mobycontainer.HealthSummary{Status: h.Status, FailingStreak: h.FailingStreak}
	}
	if size {
		rw, root := e.sizes(ctx, c)
		s.SizeRw, s.SizeRootFs = rw, root
	}
	return s
}

// linkNames lists the names that links give, by the name or ID they point at.
func linkNames(ctrs []*ctr) map[string][]string {
	out := map[string][]string{}
	for _, c := range ctrs {
		r := c.record()
		for _, l := range r.HostConfig.Links {
			target, alias := splitLink(l)
			out[target] = append(out[target], "/"+r.Name+"/"+alias)
		}
	}
	return out
}

// sizes are the bytes of the writable layer, and with the image's layers.
func (e *Engine) sizes(ctx context.Context, c *ctr) (rw, root int64) {
	r := c.record()
	rw = e.written(ctx, c)
	if img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform); err == nil {
		root = img.Size
	}
	return rw, rw + root
}

// sizeTime bounds the question how much a container on a machine has written.
const sizeTime = 10 * time.Second

// written is the size of a container's writable layer, bytes; 0 if it has none yet,
// or if it is on a machine that does not run.
func (e *Engine) written(ctx context.Context, c *ctr) int64 {
	var n int64
	var err error
	if m := e.machOf(c.record()); m != nil {
		k := m.current()
		if k == nil {
			return 0
		}
		ctx, cancel := context.WithTimeout(ctx, sizeTime)
		defer cancel()
		n, err = k.machine.Written(ctx, c.id)
	} else {
		n, _, err = e.cfg.Roots.Usage(ctx, c.id)
	}
	if err != nil {
		return 0
	}
	return n
}

func mountPoints(r *container.Record) []mobycontainer.MountPoint {
	out := []mobycontainer.MountPoint{}
	for _, m := range r.Mounts {
		p := mobycontainer.MountPoint{Type: m.Type, Name: m.Name, Source: m.Source, Destination: m.Destination, Driver: m.Driver, Mode: m.Mode, RW: m.RW, Propagation: m.Propagation}
		if m.Type != mount.TypeVolume {
			p.Driver = ""
		}
		if m.Type == mount.TypeVolume && m.Spec == nil && p.Mode == "" {
			p.Mode = "z"
		}
		if m.Type == mount.TypeVolume && m.Anonymous && m.Spec == nil {
			p.Mode = ""
		}
		out = append(out, p)
	}
	return out
}

func portSummaries(r *container.Record, ns *network.Namespace) []mobycontainer.PortSummary {
	out := []mobycontainer.PortSummary{}
	if ns == nil || !r.Running() {
		return out
	}
	for port, bs := range portMap(r, ns) {
		p := mobycontainer.PortSummary{PrivatePort: port.Num(), Type: string(port.Proto())}
		if len(bs) == 0 {
			out = append(out, p)
		}
		for _, b := range bs {
			p.IP = b.HostIP
			n, _ := strconv.ParseUint(b.HostPort, 10, 16) // written from a number
			p.PublicPort = uint16(n)
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b mobycontainer.PortSummary) int {
		return cmp.Or(cmp.Compare(a.PrivatePort, b.PrivatePort), cmp.Compare(a.Type, b.Type), cmp.Compare(a.PublicPort, b.PublicPort), a.IP.Compare(b.IP))
	})
	return out
}

// endpoints are the networks asked for, with what they are while it runs.
func (e *Engine) endpoints(r *container.Record, ns *network.Namespace) map[string]*mobynet.EndpointSettings {
	out := map[string]*mobynet.EndpointSettings{}
	for name, s := range r.Networks {
		out[name] = endpointSettings(s, endpointOf(ns, name))
		if out[name].NetworkID == "" && r.Facts.Run > 0 { // it was there once
			if n, err := e.cfg.Networks.Inspect(e.ctx, name); err == nil {
				out[name].NetworkID = n.ID
			}
		}
	}
	return out
}

func endpointOf(ns *network.Namespace, name string) *network.Endpoint {
	if ns == nil {
		return nil
	}
	for i := range ns.Endpoints {
		if ns.Endpoints[i].NetworkName == name || ns.Endpoints[i].NetworkID == name {
			return &ns.Endpoints[i]
		}
	}
	return nil
}

func (e *Engine) networkNames(r *container.Record) []string {
	var out []string
	for name := range r.Networks {
		out = append(out, name)
		if n, err := e.cfg.Networks.Inspect(e.ctx, name); err == nil {
			out = append(out, n.ID, n.Name)
		}
	}
	return out
}
