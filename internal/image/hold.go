package image

import (
	"context"
	"fmt"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An image that somebody uses is not removed. Who is about to use one holds it; who is
// about to remove one makes sure, by leave, that nobody can hold it any more, and only
// then asks whether it is used. So a container never finds its image gone.

// Hold keeps an image (by its ID) from being removed until release is called. If it is
// being removed, it waits for the end of that: what was resolved before may be gone
// then. See Acquire.
func (s *Store) Hold(id string) (release func()) {
	release, _ = s.holdFor(context.Background(), id) // which does not end
	return release
}

// holdFor is Hold; an error is ctx's.
func (s *Store) holdFor(ctx context.Context, id string) (release func(), err error) {
	s.touch(id)
	s.mu.Lock()
	if err = s.awaitLocked(ctx, digest.Digest(id)); err == nil {
		s.held[id]++
	}
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held[id]--; s.held[id] == 0 {
			delete(s.held, id)
		}
	}), nil
}

// Acquire is Resolve and Hold at once: the image is there until release is called, for
// the time until the container that uses it is recorded. Errors are Resolve's.
func (s *Store) Acquire(ctx context.Context, ref string, platform *ocispec.Platform) (img *Image, release func(), err error) {
	for ctx.Err() == nil {
		if img, err = s.Resolve(ctx, ref, platform); err != nil {
			return nil, nil, err
		}
		if release, err = s.holdFor(ctx, img.ID); err != nil {
			break
		}
		s.mu.RLock()
		there := s.recs[img.Target.Digest] != nil
		s.mu.RUnlock()
		if there {
			return img, release, nil
		}
		release() // removed meanwhile; the name may mean another now
	}
	return nil, nil, fmt.Errorf("image %s: %w", ref, context.Cause(ctx))
}

// awaitLocked waits, with mu free, until an image is not being removed. An error is
// ctx's.
func (s *Store) awaitLocked(ctx context.Context, id digest.Digest) error {
	for {
		end := s.leaving[id]
		if end == nil {
			return nil
		}
		s.mu.Unlock()
		var err error
		select {
		case <-end: // of a transaction of the database's
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		s.mu.Lock()
		if err != nil {
			return err
		}
	}
}

// leave prepares the removal of an image. It returns who uses it: then it must not be
// removed. If nobody does, none can hold it until done is called, which the caller does
// soon, in either case. inUse nil means Config.InUse.
func (s *Store) leave(id digest.Digest, inUse func(string) []string) (used []string, done func()) {
	s.mu.Lock()
	_ = s.awaitLocked(context.Background(), id) // which does not end
	held := s.held[id.String()] > 0
	end := make(chan struct{})
	if !held {
		s.leaving[id] = end
	}
	s.mu.Unlock()
	done = sync.OnceFunc(func() {
		if held {
			return
		}
		s.mu.Lock()
		delete(s.leaving, id)
		s.mu.Unlock()
		close(end)
	})
	used = s.containers(id, inUse)
	if held {
		used = append(used, "(being created)")
	} else if len(used) > 0 {
		done()
	}
	return used, done
}

// users names who uses an image at the moment: containers, and operations that hold it.
func (s *Store) users(id digest.Digest) []string {
	out := s.containers(id, nil)
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.held[id.String()] > 0 {
		out = append(out, "(being created)")
	}
	return out
}

func (s *Store) containers(id digest.Digest, inUse func(string) []string) []string {
	if inUse == nil {
		inUse = s.cfg.InUse
	}
	if inUse == nil {
		return nil
	}
	return inUse(id.String())
}
