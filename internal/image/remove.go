package image

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
)

// Remove removes a name; with its last name, or asked for by ID, the image. An
// image that containers use is not removed (errdefs.ErrConflict); with Force it
// loses its names and goes with the next prune; asked for by ID it is forgotten,
// unless one of them runs (Docker's rules): nobody sees it any more, but for those
// containers, with the last of which it goes. inUse nil means Config.InUse.
func (s *Store) Remove(ctx context.Context, ref string, opts RemoveOptions, inUse func(id string) []string) ([]image.DeleteResponse, error) {
	if len(opts.Platforms) > 0 {
		return s.removePlatforms(ctx, ref, opts.Platforms, inUse)
	}
	id, name, err := s.lookup(ref)
	if err != nil {
		return nil, err
	}
	used, done := s.leave(id, inUse)
	defer done()
	var out []image.DeleteResponse
	err = s.update(func(b *batch) error {
		r := b.record(id)
		if r == nil || r.Forgotten || name != "" && !slices.Contains(r.Names, name) {
			return missing(ref)
		}
		gone := r.Names
		if name != "" {
			gone = []string{name}
		} else if repos := repositories(r.Names); len(repos) > 1 && !opts.Force {
			return fmt.Errorf("conflict: unable to delete %s (must be forced) - image is referenced in multiple repositories: %w", shortDigest(id), errdefs.ErrConflict)
		}
		last := len(gone) == len(r.Names)
		if name == "" && opts.Running != nil {
			if running := opts.Running(id.String()); len(running) > 0 {
				return fmt.Errorf("conflict: unable to delete %s (cannot be forced) - image is being used by running container %s: %w",
					shortDigest(id), hexPrefix(running[0]), errdefs.ErrConflict)
			}
		}
		if last && len(used) > 0 {
			if name != "" && !opts.Force {
				return fmt.Errorf("conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s: %w",
					ref, hexPrefix(used[0]), shortDigest(id), errdefs.ErrConflict)
			}
			if !opts.Force {
				return fmt.Errorf("conflict: unable to delete %s (must be forced) - image is being used by container %s: %w",
					shortDigest(id), hexPrefix(used[0]), errdefs.ErrConflict)
			}
		}
		for _, n := range gone {
			out = append(out, image.DeleteResponse{Untagged: familiar(n)})
		}
		r.Names = slices.DeleteFunc(r.Names, func(n string) bool { return slices.Contains(gone, n) })
		switch {
		case last && len(used) == 0:
			b.recs[id] = nil
		case name == "":
			r.Forgotten = true
		}
		if b.recs[id] == nil || r.Forgotten {
			out = append(out, image.DeleteResponse{Deleted: id.String()})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.tell(id, out)
	s.gcSoon()
	return out, nil
}

// Released tells the store that a container which used an image is gone.
func (s *Store) Released(id string) {
	s.mu.RLock()
	r := s.recs[digest.Digest(id)]
	s.mu.RUnlock()
	if r != nil && r.Forgotten {
		s.gcSoon()
	}
}

// dropForgotten removes the records of forgotten images that nobody uses any more.
func (s *Store) dropForgotten() error {
	var gone []digest.Digest
	s.mu.RLock()
	for d, r := range s.recs {
		if r.Forgotten {
			gone = append(gone, d)
		}
	}
	s.mu.RUnlock()
	var ends []func()
	gone = slices.DeleteFunc(gone, func(d digest.Digest) bool {
		used, end := s.leave(d, nil)
		ends = append(ends, end)
		return len(used) > 0
	})
	defer func() {
		for _, end := range ends {
			end()
		}
	}()
	if len(gone) == 0 {
		return nil
	}
	return s.update(func(b *batch) error {
		for _, d := range gone {
			if r := b.record(d); r != nil && r.Forgotten { // not pulled again meanwhile
				b.recs[d] = nil
			}
		}
		return nil
	})
}

// tell sends the events of a removal.
func (s *Store) tell(id digest.Digest, out []image.DeleteResponse) {
	for _, o := range out {
		if o.Untagged != "" {
			s.event("untag", id.String(), o.Untagged, nil)
		} else {
			s.event("delete", o.Deleted, o.Deleted, nil)
		}
	}
}

func repositories(names []string) map[string]bool {
	out := map[string]bool{}
	for _, n := range names {
		if p, err := reference.ParseNormalizedNamed(n); err == nil {
			out[p.Name()] = true
		}
	}
	return out
}

// Prune removes images that nobody uses: those without a name, or with the
// filter dangling=false all. It returns what was removed and the bytes that
// this frees. inUse nil means Config.InUse.
func (s *Store) Prune(ctx context.Context, f Filters, inUse func(id string) []string) ([]image.DeleteResponse, uint64, error) {
	sel, err := s.selector(f, "dangling", "label", "label!", "until")
	if err != nil {
		return nil, 0, err
	}
	if sel.dangling == nil {
		t := true
		sel.dangling = &t
	} else if !*sel.dangling {
		sel.dangling = nil // all
	}
	end, err := s.begin() // nothing is collected before it has been counted
	if err != nil {
		return nil, 0, err
	}
	defer end()
	s.mu.RLock()
	recs := make([]*record, 0, len(s.recs))
	for _, r := range s.recs {
		if !r.Forgotten { // those go by themselves
			recs = append(recs, r)
		}
	}
	s.mu.RUnlock()
	var out []image.DeleteResponse
	var removed []*record
	for _, r := range recs {
		if err := ctx.Err(); err != nil {
			return out, 0, context.Cause(ctx)
		}
		img, err := s.build(r, nil)
		if err != nil {
			img = &Image{ID: r.Target.Digest.String(), Target: r.Target}
		}
		if !sel.match(r, img) || s.pinned(r) {
			continue
		}
		used, done := s.leave(r.Target.Digest, inUse)
		if len(used) > 0 {
			done()
			continue
		}
		var one []image.DeleteResponse
		err = s.update(func(b *batch) error {
			if now := b.record(r.Target.Digest); now == nil || !slices.Equal(now.Names, r.Names) || now.Pinned {
				return fmt.Errorf("changed meanwhile: %w", errdefs.ErrAborted)
			}
			b.recs[r.Target.Digest] = nil
			return nil
		})
		done()
		if errdefs.IsAborted(err) {
			continue
		}
		if err != nil {
			return out, 0, err
		}
		for _, n := range r.Names {
			one = append(one, image.DeleteResponse{Untagged: familiar(n)})
		}
		one = append(one, image.DeleteResponse{Deleted: r.Target.Digest.String()})
		s.tell(r.Target.Digest, one)
		out = append(out, one...)
		removed = append(removed, r)
	}
	freed := s.freed(removed)
	s.gcSoon()
	return out, freed, nil
}

// freed sums what only the removed images needed.
func (s *Store) freed(removed []*record) (n uint64) {
	if len(removed) == 0 {
		return 0
	}
	blobs, chains, err := s.marked()
	if err != nil {
		return 0
	}
	for _, r := range removed {
		b, c, err := s.reach(r.Target)
		if err != nil {
			continue
		}
		for d, size := range b {
			if !blobs[d] {
				blobs[d] = true
				n += uint64(max(size, 0))
			}
		}
		s.mu.RLock()
		for _, d := range c {
			if l := s.layers[d]; l != nil && !chains[d] {
				chains[d] = true
				n += uint64(l.Size)
			}
		}
		s.mu.RUnlock()
	}
	return n
}

// parseTime reads a filter's time: a duration before now, a Unix time, or
// RFC 3339 with parts left out.
func parseTime(v string) (time.Time, error) {
	if d, err := time.ParseDuration(v); err == nil {
		return time.Now().Add(-d), nil
	}
	var sec, nsec int64
	if n, err := fmt.Sscanf(v, "%d.%d", &sec, &nsec); err == nil || n == 1 && !strings.ContainsAny(v, "-T:") {
		return time.Unix(sec, nsec), nil
	}
	for _, f := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04Z07:00", "2006-01-02T15:04", "2006-01-02Z07:00", "2006-01-02"} {
		if t, err := time.ParseInLocation(f, v, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("invalid time %q: %w", v, errdefs.ErrInvalidArgument)
}
