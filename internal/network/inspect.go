package network

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	mobynet "github.com/moby/moby/api/types/network"
)

// Inspect describes a network by name, id or unique prefix of the id.
func (c *Controller) Inspect(ctx context.Context, nameOrID string) (Inspect, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, err := c.findLocked(nameOrID)
	if err != nil {
		return Inspect{}, err
	}
	return c.inspectLocked(n), nil
}

func (c *Controller) inspectLocked(n *netw) Inspect {
	r := n.rec
	out := Inspect{Network: mobynet.Network{Name: r.Name, ID: r.ID, Created: r.Created, Scope: "local", Driver: r.Driver,
		EnableIPv4: r.EnableIPv4, EnableIPv6: r.EnableIPv6, Internal: r.Internal, Attachable: r.Attachable,
		IPAM: r.IPAM, Options: maps.Clone(r.Options), Labels: maps.Clone(r.Labels),
		ConfigOnly: r.ConfigOnly, ConfigFrom: mobynet.ConfigReference{Network: r.ConfigFrom}},
		Containers: map[string]mobynet.EndpointResource{}}
	out.IPAM.Config = slices.Clone(r.IPAM.Config)
	for id, ep := range n.eps {
		name := ""
		if cr := c.conts[id]; cr != nil {
			name = cr.Name
		}
		out.Containers[id] = mobynet.EndpointResource{Name: name, EndpointID: ep.EndpointID,
			MacAddress: mobynet.HardwareAddr(ep.MAC), IPv4Address: ep.IPv4, IPv6Address: ep.IPv6}
	}
	if len(n.subnets) > 0 {
		out.Status = &mobynet.Status{IPAM: mobynet.IPAMStatus{Subnets: mobynet.SubnetStatuses{}}}
		for _, s := range n.subnets {
			out.Status.IPAM.Subnets[s.Prefix()] = mobynet.SubnetStatus{IPsInUse: s.InUse(), DynamicIPsAvailable: s.Free()}
		}
	}
	return out
}

// List describes all networks that pass the filters, oldest first.
func (c *Controller) List(ctx context.Context, f Filters) ([]Inspect, error) {
	until, err := f.until(time.Now())
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	out := []Inspect{}
	for _, n := range c.sortedLocked() {
		ok, err := f.match(n)
		if err != nil {
			return nil, err
		}
		if ok && (until.IsZero() || n.rec.Created.Before(until)) {
			out = append(out, c.inspectLocked(n))
		}
	}
	return out, nil
}

func (f Filters) match(n *netw) (bool, error) {
	any := func(key string, ok func(v string) bool) bool {
		vals := f[key]
		return len(vals) == 0 || slices.ContainsFunc(vals, ok)
	}
	for k := range f {
		switch k {
		case "name", "id", "driver", "label", "scope", "type", "dangling", "until", "label!":
		default:
			return false, fmt.Errorf("invalid filter '%s': %w", k, errdefs.ErrInvalidArgument)
		}
	}
	for _, v := range f["type"] {
		if v != "builtin" && v != "custom" {
			return false, fmt.Errorf("invalid filter: 'type'='%s': %w", v, errdefs.ErrInvalidArgument)
		}
	}
	for _, v := range f["dangling"] {
		if !slices.Contains([]string{"true", "false", "1", "0"}, v) {
			return false, fmt.Errorf("invalid filter 'dangling=%s': %w", v, errdefs.ErrInvalidArgument)
		}
	}
	dangling := len(n.eps) == 0 && !predefined(n.rec.Name)
	return any("name", func(v string) bool { return matches(v, n.rec.Name) }) &&
		any("id", func(v string) bool { return matches(v, n.rec.ID) }) &&
		any("driver", func(v string) bool { return n.rec.Driver == v }) &&
		any("scope", func(v string) bool { return v == "local" }) &&
		any("type", func(v string) bool { return (v == "builtin") == predefined(n.rec.Name) }) &&
		any("dangling", func(v string) bool { return (v == "true" || v == "1") == dangling }) &&
		f.labels(n.rec.Labels), nil
}

// matches holds if what is wanted is contained, or matches as a regular expression,
// as Docker has it.
func matches(want, have string) bool {
	if strings.Contains(have, want) {
		return true
	}
	re, err := regexp.Compile(want)
	return err == nil && re.MatchString(have)
}

func (f Filters) labels(have map[string]string) bool {
	has := func(want string) bool {
		k, v, eq := strings.Cut(want, "=")
		got, ok := have[k]
		return ok && (!eq || got == v)
	}
	for _, want := range f["label"] {
		if !has(want) {
			return false
		}
	}
	for _, not := range f["label!"] {
		if has(not) {
			return false
		}
	}
	return true
}

// until parses the until filter: a time before which things count.
func (f Filters) until(now time.Time) (time.Time, error) {
	vals := f["until"]
	if len(vals) == 0 {
		return time.Time{}, nil
	}
	v := vals[0]
	if d, err := time.ParseDuration(v); err == nil {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.Parse(layout, v); err == nil {
			return t, nil
		}
	}
	var sec int64
	if _, err := fmt.Sscanf(v, "%d", &sec); err == nil {
		return time.Unix(sec, 0), nil
	}
	return time.Time{}, fmt.Errorf("invalid filter 'until=%s': %w", v, errdefs.ErrInvalidArgument)
}
