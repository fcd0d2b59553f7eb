package build

import (
	"context"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"

	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/snapshot/imagerefchecker"
	"github.com/opencontainers/go-digest"
)

// checkShared has the cache know exactly what of it images have, too. BuildKit's own
// check takes a result whose blob has not been made yet for the image below it: it would
// neither be counted nor ever be collected. The cache's manager is of a type that has no
// name outside of BuildKit; its field has.
func (r *running) checkShared(m cache.Manager) error {
	var own cache.ExternalRefCheckerFunc = func() (cache.ExternalRefChecker, error) {
		blobs, err := imagerefchecker.New(imagerefchecker.Opt{ImageStore: names{r.images}, ContentStore: r.content})()
		return &sharedLayers{r: r, dirs: r.images.LayerDirs(), blobs: blobs}, err
	}
	v := reflect.ValueOf(m)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		return fmt.Errorf("the build cache is a %T", m)
	}
	f := v.Elem().FieldByName("PruneRefChecker")
	if !f.IsValid() || !f.CanSet() || f.Type() != reflect.TypeOf(own) {
		return fmt.Errorf("the build cache, a %T, can't be told what images have", m)
	}
	f.Set(reflect.ValueOf(own))
	return nil
}

// sharedLayers knows the layers of images, for one look at the cache.
type sharedLayers struct {
	r     *running
	dirs  map[string]bool // layers' directories
	blobs cache.ExternalRefChecker
}

// Exists tells whether an image has what a record is.
func (s *sharedLayers) Exists(key string, blobs []digest.Digest) bool {
	if info, err := s.r.snapshots.Stat(context.Background(), key); err == nil {
		return s.dirs[filepath.Base(info.Labels[labelDir])]
	}
	return !slices.Contains(blobs, "") && s.blobs.Exists(key, blobs)
}
