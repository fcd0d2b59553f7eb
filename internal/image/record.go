package image

import (
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// finish makes what an operation wrote an image: one transaction. It returns
// the Image for the platform.
func (s *Store) finish(img *Image, names []string, source, parent string) (*Image, error) {
	img.Parent = parent
	if err := s.recordLoaded([]loadedImage{{img, names}}, source); err != nil {
		return nil, err
	}
	s.mu.RLock()
	rec := s.recs[img.Target.Digest]
	s.mu.RUnlock()
	if rec == nil {
		return nil, fmt.Errorf("image %s was removed at once: %w", img.ID, errdefs.ErrNotFound)
	}
	p := img.Platform
	if made, err := s.build(rec, &p); !errdefs.IsNotFound(err) {
		return made, err
	}
	return s.build(rec, nil) // a config that names no platform
}

// recordLoaded makes images known in one transaction, and brings their files
// to the disk in the background.
func (s *Store) recordLoaded(all []loadedImage, source string) error {
	now := time.Now().UTC()
	err := s.update(func(b *batch) error {
		for _, li := range all {
			if len(li.names) == 0 {
				b.put(li.img.Target, "", source, now)
			}
			for _, n := range li.names {
				b.put(li.img.Target, n, source, now)
			}
			if source == "pull" {
				for _, n := range li.names {
					if p, err := reference.ParseNormalizedNamed(n); err == nil {
						b.record(li.img.Target.Digest).addRemote(p.Name())
					}
				}
			}
			if li.img.Parent != "" {
				b.record(li.img.Target.Digest).Parent = li.img.Parent
			}
			b.saveLayers(li.img.ChainIDs)
		}
		return nil
	})
	if err == nil {
		s.flushSoon()
	}
	return err
}
