// Package rootfs makes a container's root file system from an image's layers
// and a writable pair of directories that is named by the container.
//
// The pair is not a snapshot: there is no database and no transaction, it is
// found again by listing <root>/containers. Nothing here waits for the disk.
package rootfs

import (
	"context"
	"errors"
	"log/slog"

	"tenon.dev/tenon/internal/image"
)

// Config configures a Store.
type Config struct {
	// Root is the state directory; the writable pairs lie in
	// <Root>/containers/<id>/rootfs, removed ones in <Root>/trash until they
	// are deleted.
	Root   string
	Images *image.Store
	Log    *slog.Logger
}

// Store makes and removes containers' writable layers. Safe for concurrent use.
type Store struct{ cfg Config }

// Mount is one mount(8) to make, as in an OCI bundle or a Task API request.
type Mount struct {
	Type, Source string
	Options      []string
}

// Options are the options of Prepare.
type Options struct {
	// ReadOnly mounts the root read-only. A writable pair is made all the same,
	// since mount points may have to be made in it.
	ReadOnly bool
	// Volatile leaves out every sync of the writable layer: for containers that
	// do not outlive the machine's crash (--rm).
	Volatile bool
	// SizeLimit, in bytes, is refused with errdefs.ErrNotImplemented unless 0.
	SizeLimit int64
}

// Root is what Prepare made.
type Root struct {
	Mounts []Mount
	// Upper and Work are the overlay's directories, Lower its lower ones,
	// topmost first.
	Upper, Work string
	Lower       []string
}

var errSkeleton = errors.New("not built yet")

// Open opens the store and starts deleting what lies in the trash.
func Open(cfg Config) (*Store, error) { return &Store{cfg: cfg}, nil }

// Close waits for deletions under way to stop.
func (s *Store) Close() error { return nil }

// Prepare makes (or finds again) the writable pair of a container and returns
// the mounts of its root.
func (s *Store) Prepare(ctx context.Context, id string, img *image.Image, opts Options) (*Root, error) {
	return nil, errSkeleton
}

// Remove takes the container's writable layer away at once and deletes it in
// the background. It is not an error if there is none.
func (s *Store) Remove(id string) error { return errSkeleton }

// List returns the containers that have a writable layer.
func (s *Store) List() ([]string, error) { return nil, errSkeleton }

// Usage returns the bytes and inodes that the writable layer takes.
func (s *Store) Usage(ctx context.Context, id string) (bytes, inodes int64, err error) {
	return 0, 0, errSkeleton
}
