package build

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/image/crypt"
)

// allContent is what BuildKit sees: the blobs of the image store are there, and
// become known to the metadata store (which leases them) when they are more than read.
type allContent struct {
	content.Store // containerd's metadata store
	blobs         *blobs
}

// adopt makes a blob of the image store's known.
func (c *allContent) adopt(ctx context.Context, d digest.Digest) bool {
	if d.Validate() != nil || !c.blobs.images.HasBlob(d) {
		return false
	}
	i, err := c.blobs.Info(ctx, d)
	if err != nil {
		return false
	}
	w, err := c.Store.Writer(ctx, content.WithRef("image-"+d.String()), content.WithDescriptor(ocispec.Descriptor{Digest: d, Size: i.Size}))
	if err != nil {
		return errdefs.IsAlreadyExists(err)
	}
	defer w.Close()
	err = w.Commit(ctx, i.Size, d)
	return err == nil || errdefs.IsAlreadyExists(err)
}

// Info tells about a blob.
func (c *allContent) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	i, err := c.Store.Info(ctx, d)
	if errdefs.IsNotFound(err) && c.adopt(ctx, d) {
		i, err = c.Store.Info(ctx, d)
	}
	return withSeal(c.blobs.images, i), err
}

// Update changes a blob's labels.
func (c *allContent) Update(ctx context.Context, info content.Info, fieldpaths ...string) (content.Info, error) {
	i, err := c.Store.Update(ctx, info, fieldpaths...)
	if errdefs.IsNotFound(err) && c.adopt(ctx, info.Digest) {
		return c.Store.Update(ctx, info, fieldpaths...)
	}
	return i, err
}

// ReaderAt opens a blob.
func (c *allContent) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r, err := c.Store.ReaderAt(ctx, desc)
	if errdefs.IsNotFound(err) {
		if f, oerr := c.blobs.images.OpenBlob(desc.Digest); oerr == nil {
			return newBlobReader(f)
		}
	}
	return r, err
}

// Writer writes a blob, unless it is here.
func (c *allContent) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	if o.Desc.Digest != "" {
		c.adopt(ctx, o.Desc.Digest)
	}
	return c.Store.Writer(ctx, opts...)
}

// applier unpacks layers as the image store does, with its checks and limits, and
// leaves alone what is an unpacked layer of an image already.
type applier struct {
	content content.Provider
	images  *image.Store
}

// Apply unpacks a layer into a new snapshot.
func (a *applier) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, _ ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	out := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Size: desc.Size}
	if len(mounts) != 1 {
		return out, fmt.Errorf("layer %s: %d mounts where one was expected: %w", desc.Digest, len(mounts), errdefs.ErrNotImplemented)
	}
	m := mounts[0]
	if m.Type == layerType {
		var err error
		out.Digest, err = a.images.LayerDiffID(filepath.Base(m.Source))
		return out, err
	}
	lower, dir, _ := overlayDirs(m)
	if m.Type != "overlay" {
		lower, dir = nil, m.Source
	}
	r, err := a.content.ReaderAt(ctx, desc)
	if err != nil {
		return out, err
	}
	defer r.Close()
	if crypt.Encrypted(desc.MediaType) {
		out.Digest, out.Size, err = a.unseal(ctx, desc, content.NewReader(r), dir, lower)
		return out, err
	}
	if out.Digest, out.Size, err = a.images.UnpackOnto(ctx, content.NewReader(r), dir, lower); err != nil {
		return out, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	return out, nil
}
