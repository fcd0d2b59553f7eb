package image

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
)

// touch remembers that an image was used just now. What a process remembers is
// enough: after a restart images count as used when they came.
func (s *Store) touch(id string) { s.used.Store(id, time.Now()) }

// keepBudget removes the images that nobody has used for longest until the rest
// fits Config.Budget. Images that containers use, or that are held, stay.
func (s *Store) keepBudget() {
	if s.cfg.Budget <= 0 {
		return
	}
	type item struct {
		rec  *record
		last time.Time
	}
	var items []item
	sizes := map[digest.Digest]int64{} // of blobs; of layers and file systems by "chain "+ID, "erofs "+ID
	needs := map[digest.Digest][]digest.Digest{}
	s.mu.RLock()
	for _, r := range s.recs {
		it := item{rec: r, last: r.Created}
		if r.Tagged.After(it.last) {
			it.last = r.Tagged
		}
		if t, ok := s.used.Load(r.Target.Digest.String()); ok && t.(time.Time).After(it.last) {
			it.last = t.(time.Time)
		}
		items = append(items, it)
	}
	s.mu.RUnlock()
	users := map[digest.Digest]int{}
	total := int64(0)
	for _, it := range items {
		blobs, chains, err := s.reach(it.rec.Target)
		if err != nil {
			s.log.Warn("disk budget: image not readable", "image", it.rec.Target.Digest.String(), "err", err)
			continue
		}
		var need []digest.Digest
		for d, n := range blobs {
			sizes[d] = n
			need = append(need, d)
		}
		own := map[digest.Digest]int64{}
		s.chainSizes(own, chains)
		for d, n := range own {
			sizes[d] = n
			need = append(need, d)
		}
		for _, d := range need {
			if users[d]++; users[d] == 1 {
				total += sizes[d]
			}
		}
		needs[it.rec.Target.Digest] = need
	}
	slices.SortFunc(items, func(a, b item) int {
		return cmp.Or(a.last.Compare(b.last), strings.Compare(a.rec.Target.Digest.String(), b.rec.Target.Digest.String()))
	})
	for _, it := range items {
		if total <= s.cfg.Budget {
			return
		}
		d := it.rec.Target.Digest
		if len(s.users(d, nil)) > 0 {
			continue
		}
		err := s.update(func(b *batch) error {
			if r := b.record(d); r == nil || !slices.Equal(r.Names, it.rec.Names) || !r.Tagged.Equal(it.rec.Tagged) {
				return fmt.Errorf("changed meanwhile: %w", errdefs.ErrAborted)
			}
			b.recs[d] = nil
			return nil
		})
		if err != nil {
			if !errdefs.IsAborted(err) {
				s.log.Warn("disk budget: image not removed", "image", d.String(), "err", err)
			}
			continue
		}
		s.used.Delete(d.String())
		s.log.Info("image removed to keep the disk budget", "image", d.String(), "names", it.rec.Names, "last", it.last)
		var out []image.DeleteResponse
		for _, n := range it.rec.Names {
			out = append(out, image.DeleteResponse{Untagged: familiar(n)})
		}
		s.tell(d, append(out, image.DeleteResponse{Deleted: d.String()}))
		s.gcWanted.Store(true)
		for _, n := range needs[d] {
			if users[n]--; users[n] == 0 {
				total -= sizes[n]
			}
		}
	}
	if total > s.cfg.Budget {
		s.log.Warn("images in use take more than the disk budget", "bytes", total, "budget", s.cfg.Budget)
	}
}
