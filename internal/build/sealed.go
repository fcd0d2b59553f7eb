package build

import (
	"context"
	"fmt"
	"io"
	"maps"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image"
)

// Builds stand on encrypted images that are here, by the keys of the daemon's settings.
// Their layers stay what they are in the results: BuildKit keeps of a layer what its
// blob's labels say, and there it finds the wrapped keys. So nothing in the clear of what
// came encrypted is in an image, a registry or a cache that a build writes.

// Labels by which BuildKit knows a blob's media type and the annotations of its descriptor.
const (
	labelMediaType  = "buildkit.io/blob/mediatype"
	labelAnnotation = "buildkit.io/blob/annotation."
)

// withSeal adds to what is known of a blob what it is an encrypted layer by.
func withSeal(images *image.Store, i content.Info) content.Info {
	d, ok := images.SealedLayer(i.Digest)
	if !ok {
		return i
	}
	l := maps.Clone(i.Labels)
	if l == nil {
		l = map[string]string{}
	}
	l[labelMediaType] = d.MediaType
	for k, v := range d.Annotations {
		l[labelAnnotation+k] = v
	}
	i.Labels = l
	return i
}

// unseal unpacks an encrypted layer.
func (a *applier) unseal(ctx context.Context, desc ocispec.Descriptor, r io.Reader, dir string, lower []string) (dgst digest.Digest, size int64, err error) {
	seal, ok := a.images.SealedLayer(desc.Digest)
	if !ok {
		return "", 0, fmt.Errorf("layer %s is encrypted, and its image is not here: pull it first (tenon pull), with the key or as the daemon has it in its settings: %w", desc.Digest, errdefs.ErrFailedPrecondition)
	}
	dgst, size, err = a.images.UnpackSealedOnto(ctx, seal, r, dir, lower)
	if err != nil {
		err = fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	return dgst, size, err
}
