package build

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/image"
)

// names is the image store as containerd's: what FROM finds. Results of builds get
// their names from the exporter.
type names struct{ images *image.Store }

// Get finds an image by its name.
func (n names) Get(ctx context.Context, name string) (images.Image, error) {
	target, err := n.images.Lookup(name)
	if err != nil {
		return images.Image{}, err
	}
	if err := n.images.CompleteTarget(ctx, target.Digest); err != nil {
		return images.Image{}, err
	}
	// Its encrypted layers are known from here on. The platform is chosen later.
	if err := n.images.AuthorizeAll(ctx, target); err != nil {
		return images.Image{}, fmt.Errorf("%s: %w", name, err)
	}
	return images.Image{Name: name, Target: target}, nil
}

// List lists all images, by their digests: whoever asks wants to know what they need.
func (n names) List(context.Context, ...string) ([]images.Image, error) {
	var out []images.Image
	for _, target := range n.images.AllTargets() {
		out = append(out, images.Image{Name: target.Digest.String(), Target: target})
	}
	return out, nil
}

// Create is not used: exporter makes images.
func (n names) Create(context.Context, images.Image) (images.Image, error) {
	return images.Image{}, errdefs.ErrNotImplemented
}

// Update is not used.
func (n names) Update(context.Context, images.Image, ...string) (images.Image, error) {
	return images.Image{}, errdefs.ErrNotImplemented
}

// Delete is not used.
func (n names) Delete(context.Context, string, ...images.DeleteOpt) error {
	return errdefs.ErrNotImplemented
}
