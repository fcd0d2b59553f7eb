package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// completeLater completes an image in the background, some time after its first use.
func (s *Store) completeLater(img *Image, c *lazyChain) {
	if s.cfg.Lazy.CompleteAfter <= 0 {
		return
	}
	s.lazy.mu.Lock()
	defer s.lazy.mu.Unlock()
	if c.asked {
		return
	}
	c.asked = true
	s.wg.Go(func() {
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(s.cfg.Lazy.CompleteAfter):
		}
		if _, err := s.Resolve(s.ctx, img.ID, &img.Platform); err != nil {
			return // it was removed
		}
		err := s.Complete(s.ctx, img)
		if err != nil && s.ctx.Err() == nil {
			s.log.Warn("lazy image not completed: its files go on coming when they are read", "image", img.Ref(), "err", err)
		}
		if err != nil {
			s.lazy.mu.Lock()
			c.asked = false // the next use asks again
			s.lazy.mu.Unlock()
		}
	})
}

// Complete brings here what a lazy image has left at its registry: it is like others
// then. It does nothing for those. Errors are Pull's.
func (s *Store) Complete(ctx context.Context, img *Image) error {
	if s.lazyOf(img) == nil {
		return nil
	}
	end, err := s.begin()
	if err != nil {
		return err
	}
	defer end()
	return s.complete1(ctx, img)
}

// complete1 is Complete, within an operation.
func (s *Store) complete1(ctx context.Context, img *Image) error {
	c := s.lazyOf(img)
	if c == nil {
		return nil
	}
	unlock, err := s.locks.lock(ctx, "complete "+img.ChainID.String())
	if err != nil {
		return err
	}
	defer unlock()
	if s.whole(img) {
		return nil // another has done it meanwhile
	}
	ctx, cancel := context.WithCancel(log.WithLogger(ctx, quiet))
	defer cancel()
	stop := context.AfterFunc(s.ctx, cancel)
	defer stop()
	began := time.Now()
	c.mu.Lock()
	from, auths := c.source.repositories(), maps.Clone(c.auths)
	c.mu.Unlock()
	var errs []error
	for _, repository := range from {
		err := s.layersFrom(ctx, img, repository, auths[repository])
		if err == nil {
			errs = nil
			break
		}
		if errs = append(errs, err); ctx.Err() != nil {
			break
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("image %s is lazy, and its layers are needed now: %w", img.Ref(), err)
	}
	if err := s.update(func(b *batch) error { b.saveLayers(img.ChainIDs); return nil }); err != nil {
		return err
	}
	s.flushSoon()
	s.wg.Go(func() { // an operation keeps the store open
		select {
		case <-time.After(lazyGrace + time.Second):
			s.gcSoon()
		case <-s.ctx.Done():
		}
	})
	s.log.Debug("lazy image completed", "image", img.Ref(), "took", time.Since(began))
	return nil
}

// layersFrom pulls an image's layers from a repository.
func (s *Store) layersFrom(ctx context.Context, img *Image, repository string, auth *registry.AuthConfig) error {
	named, err := reference.ParseNormalizedNamed(repository)
	if err != nil {
		return err
	}
	fetcher, err := s.resolver(auth, nil).Fetcher(ctx, repository+"@"+img.Manifest.Digest.String())
	if err == nil {
		_, err = s.newPuller(fetcher, serial(nil)).layers(ctx, img)
	}
	if err != nil {
		return registryError("pull", reference.FamiliarName(named), err)
	}
	return nil
}

// CompleteTarget is Complete by what a name stands for, for the default platform. Targets
// that are no image are left alone.
func (s *Store) CompleteTarget(ctx context.Context, target digest.Digest) error {
	s.lazy.mu.Lock()
	n := len(s.lazy.chains)
	s.lazy.mu.Unlock()
	if n == 0 {
		return nil
	}
	img, err := s.Resolve(ctx, target.String(), nil)
	if err != nil {
		return nil
	}
	return s.Complete(ctx, img)
}

// completeBlob completes the lazy image of a repository that a blob is a layer of.
func (s *Store) completeBlob(r *Repositories, repo string, d digest.Digest) error {
	s.lazy.mu.Lock()
	n := len(s.lazy.chains)
	s.lazy.mu.Unlock()
	if n == 0 || s.hasBlob(d, -1) {
		return nil
	}
	roots, _ := r.roots(repo, "")
	for _, t := range roots {
		if r.find([]ocispec.Descriptor{t}, d, false) == nil {
			continue
		}
		if err := s.CompleteTarget(s.ctx, t.Digest); err != nil {
			return err
		}
	}
	return nil
}

// superseded tells whether all that a lazy image stands for is here otherwise.
func (s *Store) superseded(c *lazyChain) bool {
	if !s.hasLayer(c.source.Chain) {
		return false
	}
	for _, b := range c.source.Blobs {
		if !s.hasBlob(b.Digest, b.Size) {
			return false
		}
	}
	return true
}
