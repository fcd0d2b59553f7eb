package lazy

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrNotLazy is what Index's errors wrap if a layer is not made for being read in
// pieces. It is a FailedPrecondition.
var ErrNotLazy error = notLazy{}

type notLazy struct{}

func (notLazy) Error() string { return "the layer is no eStargz" }
func (notLazy) Unwrap() error { return errdefs.ErrFailedPrecondition }

// Layer is one layer of an image for Index.
type Layer struct {
	// Desc is the manifest's. Its annotation containerd.io/snapshot/stargz/toc.digest
	// says what table of contents is believed.
	Desc ocispec.Descriptor
	// Blob reads Desc.Size bytes; see [OpenBlob].
	Blob io.ReaderAt
}

// Options are Index's. The zero value is good.
type Options struct {
	// UUID is the file system's.
	UUID [16]byte
	// MaxSize, in bytes, is what the files' contents may take; 0: what the format
	// allows.
	MaxSize int64
	// MaxEntries, of all layers together; default 4 Mi.
	MaxEntries int
	// MaxTOC, in bytes, of one layer's table uncompressed; default 256 MiB.
	MaxTOC int64
}

// Info is what Index found.
type Info struct {
	// Size is the EROFS file's, Total that of the contents in it: both in bytes, as
	// if all were here.
	Size, Total int64
	// Blobs is the sum of the layers' sizes, in bytes.
	Blobs int64
	// Chunks is how many pieces the contents come in.
	Chunks int
}

// Check tells by its descriptor alone whether a layer can be lazy: the manifest must
// say which table of contents it has. The error wraps ErrNotLazy.
func Check(d ocispec.Descriptor) error { return errors.ErrUnsupported }

// Index reads the layers' tables of contents (lowest layer first, as in a manifest)
// and writes the file system without the files' contents into dst, which is empty,
// and into mapFile, empty too, where the contents are. It syncs neither. ErrNotLazy if
// a layer is not made for it, ErrInvalidArgument for tables that nobody should
// believe, ErrResourceExhausted for those that are too large.
func Index(ctx context.Context, layers []Layer, dst, mapFile *os.File, o Options) (Info, error) {
	return Info{}, errors.ErrUnsupported
}
