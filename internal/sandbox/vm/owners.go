package vm

import (
	"context"
	"errors"
	"slices"
)

// releaseOthers takes back what a machine that lasts has lent to containers, and to
// steps of builds, that are not listed: a daemon that was killed had begun them.
func (m *machine) releaseOthers(ctx context.Context, ids []string) error {
	var errs []error
	for _, id := range m.owners() {
		if !slices.Contains(ids, id) {
			errs = append(errs, m.Release(ctx, id))
		}
	}
	return errors.Join(errs...)
}

// owners are those that have something of a machine that lasts.
func (m *machine) owners() []string {
	var out []string
	m.lasting.mu.Lock()
	for id := range m.lasting.holds {
		out = append(out, id)
	}
	m.lasting.mu.Unlock()
	m.mu.Lock()
	for _, n := range m.nics {
		if n.Owner != "" {
			out = append(out, n.Owner)
		}
	}
	m.mu.Unlock()
	slices.Sort(out)
	return slices.Compact(out)
}
