package docker

import (
	"net/http"
	"slices"
	"strings"
	"time"

	apibuild "github.com/moby/moby/api/types/build"

	"tenon.dev/tenon/internal/build/api"
	"tenon.dev/tenon/internal/server/wire"
)

// cacheFields are what records of the build cache can be chosen by.
var cacheFields = []string{"id", "parent", "type", "description", "inuse", "shared", "private"}

func (a *API) buildPrune(c *call) error {
	if a.cfg.Tenant != nil || a.cfg.Builder == nil { // `docker system prune` ends well
		return c.json(http.StatusOK, apibuild.CachePruneReport{CachesDeleted: []string{}})
	}
	req, err := c.pruneRequest()
	if err != nil {
		return err
	}
	rep, err := a.cfg.Builder.Prune(c.ctx, req)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, apibuild.CachePruneReport{
		CachesDeleted: nonNil(rep.Deleted), SpaceReclaimed: uint64(max(rep.Reclaimed, 0)),
	})
}

// pruneRequest reads the parameters of POST /build/prune.
func (c *call) pruneRequest() (api.PruneRequest, error) {
	req := api.PruneRequest{All: c.flag("all")}
	f, err := c.filters(append([]string{"until", "unused-for", "label", "label!"}, cacheFields...)...)
	if err != nil {
		return req, err
	}
	until := append(f["until"], f["unused-for"]...)
	switch {
	case len(f["until"]) > 0 && len(f["unused-for"]) > 0:
		return req, wire.Invalid(`conflicting filters: "until" and "unused-for"`)
	case len(until) > 1:
		return req, wire.Invalid("filters expect only one value")
	case len(until) == 1:
		if req.UnusedFor, err = unusedFor(until[0]); err != nil {
			return req, err
		}
	}
	var parts []string
	for _, k := range cacheFields {
		v := f[k]
		if len(v) == 0 {
			continue
		}
		if len(v) > 1 {
			return req, wire.Invalid("filters expect only one value")
		}
		if strings.ContainsAny(v[0], `,"\`) {
			return req, wire.Invalid("invalid filter '%s=%s'", k, v[0])
		}
		switch k {
		case "id", "description":
			parts = append(parts, k+"~="+v[0])
		case "parent":
			parts = append(parts, "parents~="+v[0])
		case "type":
			parts = append(parts, "type=="+v[0])
		default: // a flag: BuildKit asks for its presence
			on := v[0] == "1" || strings.EqualFold(v[0], "true")
			switch {
			case on:
				parts = append(parts, k)
			case k == "shared":
				parts = append(parts, "private")
			case k == "private":
				parts = append(parts, "shared")
			}
		}
	}
	if len(parts) > 0 {
		req.Filter = []string{strings.Join(parts, ",")}
	}
	sizes := map[string]*int64{"keep-storage": &req.ReservedSpace}
	if !c.v.before(48) {
		if c.has("reserved-space") {
			delete(sizes, "keep-storage")
		}
		sizes["reserved-space"], sizes["max-used-space"], sizes["min-free-space"] = &req.ReservedSpace, &req.MaxUsedSpace, &req.MinFreeSpace
	}
	return req, c.sizes(sizes)
}

// unusedFor is a time, or how long ago it was.
func unusedFor(s string) (time.Duration, error) {
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return d, nil
	}
	t, ok := parseUnixTime(s)
	if !ok {
		return 0, wire.Invalid("filter until=%s: give a duration like 24h, or a time", s)
	}
	return max(time.Since(t), 0), nil
}

// buildUsage is the build cache in /system/df.
func (a *API) buildUsage(c *call) (*apibuild.DiskUsage, error) {
	u := &apibuild.DiskUsage{}
	if a.cfg.Tenant != nil || a.cfg.Builder == nil {
		return u, nil
	}
	list, err := a.cfg.Builder.DiskUsage(c.ctx)
	if err != nil {
		return nil, err
	}
	for _, r := range list {
		u.Items = append(u.Items, apibuild.CacheRecord{
			ID: r.ID, Parents: r.Parents, Type: r.Type, Description: r.Description, InUse: r.InUse, Shared: r.Shared,
			Size: r.Size, CreatedAt: r.CreatedAt, LastUsedAt: r.LastUsedAt, UsageCount: r.UsageCount,
		})
		u.TotalCount++
		if r.InUse {
			u.ActiveCount++
		}
		if r.Shared {
			continue // counted with the images that have it
		}
		u.TotalSize += r.Size
		if !r.InUse {
			u.Reclaimable += r.Size
		}
	}
	slices.SortStableFunc(u.Items, func(x, y apibuild.CacheRecord) int { return x.CreatedAt.Compare(y.CreatedAt) })
	return u, nil
}
