package image

import (
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// gcSoon asks the collector to look for garbage when nothing is being written.
func (s *Store) gcSoon() {
	s.gcWanted.Store(true)
	s.budget.wanted.Store(s.cfg.Budget > 0)
	s.kick()
}

// kickAt wakes the collector at a time, unless it is to be woken before; then that is
// for nothing, or it asks again.
func (s *Store) kickAt(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil || s.laterAt.After(time.Now()) && !t.Before(s.laterAt) {
		return
	}
	s.laterAt = t
	if s.later == nil {
		s.later = time.AfterFunc(time.Until(t), s.kick)
	} else {
		s.later.Reset(time.Until(t))
	}
}

func (s *Store) kick() {
	select {
	case s.gcKick <- struct{}{}:
	default:
	}
}

func (s *Store) collector() {
	defer s.wg.Done()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.gcKick:
		}
		s.emptyTrash()
		due := s.budgetDue()
		if !s.gcWanted.Load() && !due {
			continue
		}
		var cache int64
		if due {
			cache = s.shrinkCache(s.ctx, false)
		}
		if !s.gate.TryLock() {
			if due {
				s.budget.wanted.Store(true)
			}
			continue // the end of the operation kicks again
		}
		over := due && s.keepBudget(s.ctx, cache)
		s.gcWanted.Store(false)
		n, err := s.collect()
		s.gate.Unlock()
		s.settleLazy()
		if over {
			s.shrinkCache(s.ctx, true)
		}
		if err != nil {
			s.log.Error("garbage not collected", "err", err)
		} else if n > 0 {
			s.log.Debug("garbage collected", "objects", n)
		}
		s.emptyTrash()
	}
}

func (s *Store) emptyTrash() {
	ents, err := os.ReadDir(s.trashDir())
	if err != nil {
		return
	}
	for _, e := range ents {
		if s.ctx.Err() != nil {
			return
		}
		if err := os.RemoveAll(filepath.Join(s.trashDir(), e.Name())); err != nil {
			s.log.Warn("garbage not deleted", "path", e.Name(), "err", err)
		}
	}
}

// collect moves blobs and layers that no image needs into the trash. The gate
// must be held alone.
func (s *Store) collect() (n int, err error) {
	if err := s.dropForgotten(); err != nil {
		return 0, err
	}
	blobs, chains, expected, err := s.needed()
	if err != nil {
		return 0, err
	}
	// A blob that clients keep by asking for it counts once no manifest needs it any more.
	maps.DeleteFunc(expected, func(d digest.Digest, _ wait) bool { return blobs[d] })
	s.countLoose(expected)
	for d := range expected {
		blobs[d] = true
	}
	trash := func(path string) {
		if err := os.Rename(path, filepath.Join(s.trashDir(), filepath.Base(path))); err != nil {
			_ = os.RemoveAll(path) // something of that name is in the trash already
		}
		n++
	}
	dirs := map[string]bool{"tmp": true}
	held, err := s.HeldLayerDirs()
	if err != nil {
		return 0, err
	}
	for _, name := range held {
		dirs[name] = true
	}
	var gone []digest.Digest
	s.mu.RLock()
	for c, l := range s.layers {
		if chains[c] {
			dirs[l.Dir] = true
		} else {
			gone = append(gone, c)
			s.sizes.Delete(l.Dir)
		}
	}
	s.mu.RUnlock()
	if len(gone) > 0 {
		// First the records, then the files.
		err := s.update(func(b *batch) error {
			for _, c := range gone {
				b.layers[c] = nil
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	ents, err := os.ReadDir(s.layersDir())
	if err != nil {
		return n, err
	}
	for _, e := range ents {
		if !dirs[e.Name()] {
			trash(filepath.Join(s.layersDir(), e.Name()))
		}
	}
	if err := s.collectEROFS(chains, trash); err != nil {
		return n, err
	}
	s.collectLazy(chains, trash)
	if err := s.collectDisks(blobs, trash); err != nil {
		return n, err
	}
	for _, a := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		ents, err := os.ReadDir(s.blobDir(a))
		if isNotExist(err) {
			continue
		}
		if err != nil {
			return n, err
		}
		for _, e := range ents {
			if !blobs[digest.NewDigestFromEncoded(a, e.Name())] {
				trash(filepath.Join(s.blobDir(a), e.Name()))
			}
		}
	}
	return n, nil
}

// marked lists what the images need, and what is expected.
func (s *Store) marked() (blobs, chains map[digest.Digest]bool, err error) {
	blobs, chains, expected, err := s.needed()
	for d := range expected {
		blobs[d] = true
	}
	return blobs, chains, err
}

// needed lists what the images need, and apart from that the blobs that are expected.
func (s *Store) needed() (blobs, chains map[digest.Digest]bool, expected map[digest.Digest]wait, err error) {
	blobs, chains = map[digest.Digest]bool{}, map[digest.Digest]bool{}
	s.mu.RLock()
	targets := make([]ocispec.Descriptor, 0, len(s.recs))
	for _, r := range s.recs {
		targets = append(targets, r.Target)
	}
	s.mu.RUnlock()
	pushed, expected := s.shelved()
	for _, t := range append(targets, pushed...) {
		b, c, err := s.reach(t)
		if errdefs.IsNotFound(err) {
			continue // its very target is gone: it needs nothing
		}
		if err != nil {
			// An image that cannot be read keeps everything, until it is removed.
			return nil, nil, nil, err
		}
		for d := range b {
			blobs[d] = true
		}
		for _, d := range c {
			chains[d] = true
		}
	}
	return blobs, chains, expected, nil
}
