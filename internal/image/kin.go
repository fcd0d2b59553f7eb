package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// bucketDefinitions has how images were built, by target: what SetDefinition was
// given. It is made when the first comes.
var bucketDefinitions = []byte("definitions")

const (
	maxFormer     = 8
	maxDefinition = 256 << 10
)

// remember adds a name that an image had.
func remember(former []string, name string) []string {
	former = slices.DeleteFunc(slices.Clone(former), func(n string) bool { return n == name })
	former = append(former, name)
	return former[max(0, len(former)-maxFormer):]
}

// Familiar is a name as users write it: docker.io/library/debian is debian:latest. What
// is no name is returned as it is.
func Familiar(name string) string {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.FamiliarString(reference.TagNameOnly(n))
}

// All are the images that are listed, each for the platform that would run.
func (s *Store) All(ctx context.Context) ([]*Image, error) {
	s.mu.RLock()
	ids := make([]digest.Digest, 0, len(s.recs))
	for d, r := range s.recs {
		if !r.Forgotten {
			ids = append(ids, d)
		}
	}
	s.mu.RUnlock()
	slices.Sort(ids)
	var out []*Image
	for _, d := range ids {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		img, err := s.Resolve(ctx, d.String(), nil)
		if err != nil {
			s.log.Debug("image not readable", "image", d.String(), "err", err)
			continue
		}
		out = append(out, img)
	}
	return out, nil
}

// Former are the familiar names that an image had and that were given to others,
// the last first.
func (s *Store) Former(img *Image) (out []string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := s.recs[img.Target.Digest]
	if r == nil {
		return nil
	}
	for _, n := range slices.Backward(r.Former) {
		if !slices.Contains(r.Names, n) {
			out = append(out, familiar(n))
		}
	}
	return out
}

// MadeHere tells whether this engine has made the image, rather than got it.
func (s *Store) MadeHere(img *Image) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := s.recs[img.Target.Digest]
	return r != nil && madeHere(r.Source)
}

// SetDefinition remembers how an image was built, in the caller's words, as long as
// the image is there.
func (s *Store) SetDefinition(ctx context.Context, img *Image, def json.RawMessage) error {
	if len(def) > maxDefinition {
		return fmt.Errorf("definition of %s: more than %d bytes: %w", img.Ref(), maxDefinition, errdefs.ErrInvalidArgument)
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(bucketDefinitions)
		if err != nil {
			return err
		}
		_, err = s.dropUnknown(b)
		return errors.Join(err, b.Put([]byte(img.ID), def))
	})
	if err != nil {
		return fmt.Errorf("image store: database: %w", err)
	}
	return nil
}

// Definitions are how images were built, by ID.
func (s *Store) Definitions() (map[string]json.RawMessage, error) {
	out := map[string]json.RawMessage{}
	err := s.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketDefinitions)
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, v []byte) error {
			out[string(k)] = slices.Clone(v)
			return nil
		})
	})
	return out, err
}

// remoteTimeout bounds the question what a name means in its registry.
const remoteTimeout = 30 * time.Second

// Remote asks a registry (or its mirrors) what a name means there: the digest of an
// index or manifest. Nothing is fetched but what the policy needs to see; what it
// refuses is an errdefs.ErrPermissionDenied.
func (s *Store) Remote(ctx context.Context, ref string, auth *registry.AuthConfig) (string, error) {
	named, err := parseRef(ref)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(log.WithLogger(ctx, quiet), remoteTimeout)
	defer cancel()
	rule, err := s.rule("ask for", named)
	if err != nil {
		return "", err
	}
	_, desc, err := s.admitRemote(ctx, "ask for", s.resolver(auth, nil), named, rule, nil)
	if err != nil {
		return "", err
	}
	return desc.Digest.String(), nil
}
