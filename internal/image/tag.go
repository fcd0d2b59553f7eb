package image

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// taggable refuses names that images cannot be given: digests, and what reads
// as an ID.
func taggable(n reference.Named) error {
	if _, ok := n.(reference.Digested); ok {
		return fmt.Errorf("refusing to create a tag with a digest reference: %w", errdefs.ErrInvalidArgument)
	}
	if n.Name() == "docker.io/library/sha256" {
		return fmt.Errorf("refusing to create a tag with the name of a digest algorithm: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// Tag gives the image that ref resolves to the name target, which is taken from
// the image that had it.
func (s *Store) Tag(ctx context.Context, ref, target string) error {
	n, err := parseRef(target)
	if err != nil {
		return err
	}
	if err := taggable(n); err != nil {
		return err
	}
	id, _, err := s.lookup(ref)
	if err != nil {
		return err
	}
	err = s.update(func(b *batch) error {
		r := b.record(id)
		if r == nil {
			return missing(ref)
		}
		b.put(r.Target, canonical(n), "", time.Now().UTC())
		return nil
	})
	if err != nil {
		return err
	}
	s.event("tag", id.String(), reference.FamiliarString(n), nil)
	return nil
}
