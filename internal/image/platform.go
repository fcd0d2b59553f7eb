package image

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// gateTime is how long a removal of platforms waits for pulls and loads to end.
const gateTime = 10 * time.Second

// alone waits until nothing writes or reads whole images.
func (s *Store) alone(ctx context.Context) (release func(), err error) {
	for end := time.Now().Add(gateTime); !s.gate.TryLock(); {
		if time.Now().After(end) {
			return nil, fmt.Errorf("images are being pulled, loaded or saved: try again when that has ended: %w", errdefs.ErrConflict)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
	return s.gate.Unlock, nil
}

// removePlatforms takes single platforms out of an image; its index, names and
// ID stay, and a pull brings them back. What containers use, what another image
// is made of, and the last one are not removed.
func (s *Store) removePlatforms(ctx context.Context, ref string, list []ocispec.Platform, inUse func(id string) []string) ([]image.DeleteResponse, error) {
	release, err := s.alone(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	id, _, err := s.lookup(ref)
	if err != nil {
		return nil, err
	}
	used, done := s.leave(id, inUse)
	defer done()
	if len(used) > 0 {
		return nil, fmt.Errorf("conflict: unable to remove platforms of %s - image is being used by container %s: %w", shortDigest(id), hexPrefix(used[0]), errdefs.ErrConflict)
	}
	var out []image.DeleteResponse
	err = s.update(func(b *batch) error {
		r := b.record(id)
		if r == nil {
			return missing(ref)
		}
		gone, err := s.platformManifests(r.Target, list)
		if err != nil {
			return err
		}
		for _, d := range gone {
			if other, err := s.alsoIn(d, id); err != nil || other != "" {
				if err == nil {
					err = fmt.Errorf("conflict: unable to remove %s - image %s is made of it too: %w", shortDigest(d), shortDigest(other), errdefs.ErrConflict)
				}
				return err
			}
		}
		for _, d := range gone {
			path := s.blobPath(d)
			if err := os.Rename(path, filepath.Join(s.trashDir(), filepath.Base(path))); err != nil {
				return fmt.Errorf("remove %s: %w", shortDigest(d), err)
			}
			out = append(out, image.DeleteResponse{Deleted: d.String()})
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

// platformManifests finds the manifests of platforms, each of which must be here.
func (s *Store) platformManifests(target ocispec.Descriptor, list []ocispec.Platform) ([]digest.Digest, error) {
	all, err := s.candidates(target, 0)
	if err != nil {
		return nil, err
	}
	var gone []digest.Digest
	here := 0
	for _, c := range all {
		if c.available {
			here++
		}
	}
	for _, p := range list {
		match := platforms.OnlyStrict(platforms.Normalize(p))
		i := slices.IndexFunc(all, func(c candidate) bool { return c.available && match.Match(c.platform) })
		if i < 0 {
			return nil, fmt.Errorf("it is not here for platform %s: %w", platforms.Format(p), ErrPlatform)
		}
		if !slices.Contains(gone, all[i].desc.Digest) {
			gone = append(gone, all[i].desc.Digest)
		}
	}
	if len(gone) == here {
		return nil, fmt.Errorf("conflict: nothing would be left of the image: remove it without naming platforms: %w", errdefs.ErrConflict)
	}
	return gone, nil
}

// alsoIn names another image that has the blob.
func (s *Store) alsoIn(d, but digest.Digest) (digest.Digest, error) {
	s.mu.RLock()
	recs := make([]*record, 0, len(s.recs))
	for id, r := range s.recs {
		if id != but {
			recs = append(recs, r)
		}
	}
	s.mu.RUnlock()
	for _, r := range recs {
		blobs, _, err := s.reach(r.Target)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return "", err
		}
		if _, ok := blobs[d]; ok {
			return r.Target.Digest, nil
		}
	}
	return "", nil
}
