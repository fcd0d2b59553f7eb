package docker

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"tenon.dev/tenon/internal/server/wire"
)

// ParseFilters decodes the filters parameter: {"key":{"value":true}}, or the
// form of clients before 1.22, {"key":["value"]}. Keys must be among accepted
// (none: any).
func ParseFilters(s string, accepted ...string) (map[string][]string, error) {
	f := map[string][]string{}
	if s == "" {
		return f, nil
	}
	var sets map[string]map[string]bool
	if err := json.Unmarshal([]byte(s), &sets); err == nil {
		for k, set := range sets {
			for v, on := range set {
				if on {
					f[k] = append(f[k], v)
				}
			}
			slices.Sort(f[k])
			if len(f[k]) == 0 {
				delete(f, k)
			}
		}
	} else {
		var lists map[string][]string
		if err := json.Unmarshal([]byte(s), &lists); err != nil {
			return nil, wire.Invalid("invalid filter: write it as {\"key\":{\"value\":true}}")
		}
		for k, l := range lists {
			if len(l) > 0 {
				f[k] = slices.Compact(slices.Sorted(slices.Values(l)))
			}
		}
	}
	if len(accepted) > 0 {
		for _, k := range slices.Sorted(maps.Keys(f)) {
			if !slices.Contains(accepted, k) {
				return nil, wire.Invalid("invalid filter '%s': known here are %s", k, strings.Join(accepted, ", "))
			}
		}
	}
	return f, nil
}

// filters is the call's filters parameter.
func (c *call) filters(accepted ...string) (map[string][]string, error) {
	return ParseFilters(c.str("filters"), accepted...)
}
