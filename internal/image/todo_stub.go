package image

import (
	"context"
	"errors"
	"io"

	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var errSkeleton = errors.New("not built yet")

// Push sends ref to its registry.
func (s *Store) Push(ctx context.Context, ref string, opts PushOptions) error { return errSkeleton }

// Save writes images as an archive that is both an OCI layout and a docker archive.
func (s *Store) Save(ctx context.Context, w io.Writer, refs []string, platform *ocispec.Platform) error {
	return errSkeleton
}

// Remove removes a name, and the image with its last name.
func (s *Store) Remove(ctx context.Context, ref string, opts RemoveOptions, inUse func(id string) []string) ([]image.DeleteResponse, error) {
	return nil, errSkeleton
}

// List returns the images that pass the filters, newest first.
func (s *Store) List(ctx context.Context, opts ListOptions) ([]image.Summary, error) {
	return nil, errSkeleton
}

// History returns an image's history, newest first.
func (s *Store) History(ctx context.Context, ref string, platform *ocispec.Platform) ([]image.HistoryResponseItem, error) {
	return nil, errSkeleton
}

// Inspect returns an image as the Docker API's inspect shows it.
func (s *Store) Inspect(ctx context.Context, ref string, platform *ocispec.Platform, manifests bool) (*image.InspectResponse, error) {
	return nil, errSkeleton
}

// Prune removes unused images: dangling ones, or with the filter dangling=false all that no container uses.
// It returns what was removed and the bytes freed.
func (s *Store) Prune(ctx context.Context, f Filters, inUse func(id string) []string) ([]image.DeleteResponse, uint64, error) {
	return nil, 0, errSkeleton
}

// DiskUsage tells what images take; verbose adds the items.
func (s *Store) DiskUsage(ctx context.Context, verbose bool) (*image.DiskUsage, error) {
	return nil, errSkeleton
}

// Search is answered with errdefs.ErrNotImplemented: there is no registry to ask.
func (s *Store) Search(ctx context.Context, term string) error { return errSkeleton }

// Distribution asks the registry about ref without pulling it.
func (s *Store) Distribution(ctx context.Context, ref string, auth *registry.AuthConfig) (*registry.DistributionInspect, error) {
	return nil, errSkeleton
}

// CheckAuth tries credentials at their server; it returns Docker's status line.
func (s *Store) CheckAuth(ctx context.Context, auth registry.AuthConfig) (string, error) {
	return "", errSkeleton
}
