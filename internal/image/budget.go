package image

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// KeepLabel, set in the configuration of an image that was made here to anything but ""
// and "false", pins it. Of an image that came from elsewhere it says nothing: it would
// be a stranger who pins what he sends.
const KeepLabel = "dev.tenon.keep"

// Cache is what shares the disk budget with the images: the build cache.
type Cache interface {
	// Bytes is what it takes on the disk beside images; it may be somewhat old.
	Bytes(ctx context.Context) int64
	// Shrink frees about so many bytes of what was not used for that long.
	Shrink(ctx context.Context, bytes int64, unusedFor time.Duration) error
}

// SetCache says what shares the budget. It must not be nil, and is called from then on.
func (s *Store) SetCache(c Cache) {
	s.mu.Lock()
	s.cache = c
	s.mu.Unlock()
	if s.cfg.Budget > 0 {
		s.gcSoon()
	}
}

// Pin keeps an image from being removed by Prune and the budget, or lets it go again.
// Remove removes it all the same.
func (s *Store) Pin(_ context.Context, ref string, pinned bool) error {
	id, _, err := s.lookup(ref)
	if err != nil {
		return err
	}
	return s.update(func(b *batch) error {
		r := b.record(id)
		if r == nil {
			return fmt.Errorf("No such image: %s: %w", ref, errdefs.ErrNotFound)
		}
		r.Pinned = pinned
		return nil
	})
}

// Pinned lists the images that are pinned, by Pin or KeepLabel: their names, or IDs.
func (s *Store) Pinned(context.Context) []string {
	s.mu.RLock()
	recs := make([]*record, 0, len(s.recs))
	for _, r := range s.recs {
		recs = append(recs, r)
	}
	s.mu.RUnlock()
	out := []string{}
	for _, r := range recs {
		switch {
		case r.Forgotten || !s.pinned(r):
		case len(r.Names) == 0:
			out = append(out, r.Target.Digest.String())
		default:
			for _, n := range r.Names {
				out = append(out, familiar(n))
			}
		}
	}
	slices.Sort(out)
	return out
}

func (s *Store) pinned(r *record) bool {
	if r.Pinned {
		return true
	}
	if !madeHere(r.Source) {
		return false
	}
	img, err := s.build(r, nil)
	if err != nil {
		return false
	}
	v, ok := img.Config.Config.Labels[KeepLabel]
	return ok && v != "" && v != "false"
}

// madeHere tells of a record's source whether this engine has made the image.
func madeHere(source string) bool {
	switch source {
	case "build", "commit", "import", "bootstrap":
		return true
	}
	return false
}

// budgetTurn says when the budget is looked at. But for wanted it is the collector's.
type budgetTurn struct {
	wanted atomic.Bool
	last   time.Time // when it was looked at
	vain   time.Time // when the cache had nothing to give
}

const (
	// budgetEvery is how often the budget is looked at: for that all images are walked.
	budgetEvery = time.Second
	// newestFor is how long what came, or was used, last stays, whatever it takes: who has
	// pulled it is about to run it.
	newestFor = time.Minute
	// vainFor is how long the cache is left alone that has nothing to give.
	vainFor = 30 * time.Second
)

// budgetDue tells the collector whether to look at the budget now; if that is wanted
// but too early, the collector is woken when it is time.
func (s *Store) budgetDue() bool {
	if s.cfg.Budget <= 0 || !s.budget.wanted.Load() {
		return false
	}
	if next := s.budget.last.Add(budgetEvery); time.Now().Before(next) {
		s.kickAt(next)
		return false
	}
	s.budget.wanted.Store(false)
	s.budget.last = time.Now()
	return true
}

// budgetItem is an image with what it takes.
type budgetItem struct {
	rec  *record
	last time.Time
	need []digest.Digest
}

// balance is what images take together.
type balance struct {
	items []budgetItem            // longest unused first
	sizes map[digest.Digest]int64 // see diskOf
	users map[digest.Digest]int   // how many images need it
	total int64
}

// weigh counts what images take; what the registry keeps beside them counts too.
func (s *Store) weigh(ctx context.Context) *balance {
	b := &balance{sizes: map[digest.Digest]int64{}, users: map[digest.Digest]int{}}
	s.mu.RLock()
	for _, r := range s.recs {
		b.items = append(b.items, budgetItem{rec: r, last: s.lastUsed(r)})
	}
	s.mu.RUnlock()
	need := func(d digest.Digest, n int64) {
		b.sizes[d] = n
		if b.users[d]++; b.users[d] == 1 {
			b.total += n
		}
	}
	ofImages := map[digest.Digest]bool{}
	for i := range b.items {
		it := &b.items[i]
		ofImages[it.rec.Target.Digest] = true
		blobs, chains, err := s.reach(it.rec.Target)
		if err != nil {
			s.log.Warn("disk budget: image not readable", "image", it.rec.Target.Digest.String(), "err", err)
			continue
		}
		for d, n := range s.diskOf(ctx, blobs, chains) {
			need(d, n)
			it.need = append(it.need, d)
		}
	}
	pushed, expected := s.shelved()
	for _, t := range pushed {
		if ofImages[t.Digest] {
			continue // it goes with the image
		}
		if blobs, chains, err := s.reach(t); err == nil {
			for d, n := range s.diskOf(ctx, blobs, chains) {
				need(d, n)
			}
		}
	}
	for d := range expected {
		need(d, s.blobDisk(d))
	}
	slices.SortFunc(b.items, func(a, c budgetItem) int {
		return cmp.Or(a.last.Compare(c.last), strings.Compare(a.rec.Target.Digest.String(), c.rec.Target.Digest.String()))
	})
	return b
}

// shrinkCache asks the cache, before any image is removed, for what was not used since
// the image that would be the first to go; afterwards for the rest. The gate must not
// be held. It returns what the cache takes.
func (s *Store) shrinkCache(ctx context.Context, last bool) int64 {
	s.mu.RLock()
	c := s.cache
	s.mu.RUnlock()
	if c == nil || s.cfg.Budget <= 0 {
		return 0
	}
	held := c.Bytes(ctx)
	if held == 0 || time.Since(s.budget.vain) < vainFor {
		return held
	}
	b := s.weigh(ctx)
	over := b.total + held - s.cfg.Budget
	if over <= 0 {
		return held
	}
	var unused time.Duration
	if !last {
		i := slices.IndexFunc(b.items, s.expendable)
		if i >= 0 {
			unused = time.Since(b.items[i].last)
		}
	}
	if err := c.Shrink(ctx, min(over, held), unused); err != nil {
		s.log.Warn("disk budget: build cache not reduced", "err", err)
		s.budget.vain = time.Now()
		return held
	}
	now := c.Bytes(ctx)
	if now >= held && unused == 0 {
		s.budget.vain = time.Now() // what is left is in use
	}
	if now < held {
		s.log.Info("build cache reduced to keep the disk budget", "freed", held-now, "left", now, "budget", s.cfg.Budget)
	}
	return now
}

// expendable tells whether nobody uses or wants to keep an image.
func (s *Store) expendable(it budgetItem) bool {
	return len(s.users(it.rec.Target.Digest)) == 0 && !s.pinned(it.rec)
}

// keepBudget removes the images that nobody has used for longest until the rest, with
// the cache's bytes, fits Config.Budget. Images that containers use, that are held or
// pinned, stay. It tells whether it was not enough. The gate must be held alone.
func (s *Store) keepBudget(ctx context.Context, cache int64) (over bool) {
	if s.cfg.Budget <= 0 {
		return false
	}
	b := s.weigh(ctx)
	for i, it := range b.items {
		if b.total+cache <= s.cfg.Budget {
			return false
		}
		if !s.expendable(it) {
			continue
		}
		if i == len(b.items)-1 && time.Since(it.last) < newestFor {
			s.budget.wanted.Store(true) // after that time again
			s.kickAt(it.last.Add(newestFor))
			break
		}
		before := b.total
		if !s.collectImage(it) {
			continue
		}
		for _, n := range it.need {
			if b.users[n]--; b.users[n] == 0 {
				b.total -= b.sizes[n]
			}
		}
		s.log.Info("image removed to keep the disk budget", "image", it.rec.Target.Digest.String(), "names", it.rec.Names,
			"last", it.last, "freed", before-b.total, "left", b.total+cache, "budget", s.cfg.Budget)
		s.tellCollected(it.rec, before-b.total)
		s.gcWanted.Store(true)
	}
	if b.total+cache > s.cfg.Budget {
		s.log.Warn("images in use, pinned images and build cache take more than the disk budget", "bytes", b.total+cache, "budget", s.cfg.Budget)
		return cache > 0
	}
	return false
}

// collectImage removes an image, unless it has changed meanwhile.
func (s *Store) collectImage(it budgetItem) bool {
	d := it.rec.Target.Digest
	used, done := s.leave(d, nil)
	defer done()
	if len(used) > 0 {
		return false
	}
	err := s.update(func(b *batch) error {
		if r := b.record(d); r == nil || !slices.Equal(r.Names, it.rec.Names) || !r.Tagged.Equal(it.rec.Tagged) || r.Pinned != it.rec.Pinned {
			return fmt.Errorf("changed meanwhile: %w", errdefs.ErrAborted)
		}
		b.recs[d] = nil
		return nil
	})
	if err != nil {
		if !errdefs.IsAborted(err) {
			s.log.Warn("disk budget: image not removed", "image", d.String(), "err", err)
		}
		return false
	}
	s.used.Delete(d.String())
	return true
}

// tellCollected sends the events of an image that the budget has removed.
func (s *Store) tellCollected(r *record, freed int64) {
	id := r.Target.Digest
	for _, n := range r.Names {
		s.event("untag", id.String(), familiar(n), map[string]string{"reason": "image-budget"})
	}
	s.event("delete", id.String(), id.String(), map[string]string{"reason": "image-budget", "freed": strconv.FormatInt(freed, 10)})
}
