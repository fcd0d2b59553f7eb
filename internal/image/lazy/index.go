package lazy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/erofs"
)

// ErrNotLazy is what Index's errors wrap if a layer is not made for being read in
// pieces. It is a FailedPrecondition.
var ErrNotLazy error = notLazy{}

type notLazy struct{}

func (notLazy) Error() string {
	return "the layer cannot be read in pieces: it is no eStargz with a table of contents that its manifest names"
}
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
	// MaxSize, in bytes, is what the file system may take with all contents; 0: what
	// the format allows.
	MaxSize int64
	// MaxEntries, of all layers together, directories included that the tables only
	// imply; default 1 Mi.
	MaxEntries int
	// MaxTOC, in bytes, of all layers' tables together, uncompressed; default 256 MiB.
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

// Index reads the layers' tables of contents (lowest layer first, as in a manifest)
// and writes the file system without the files' contents into dst, which is empty,
// and into mapFile, empty too, where the contents are. It syncs neither. ErrNotLazy if
// a layer is not made for it, ErrInvalidArgument for tables that nobody should
// believe, ErrDataLoss for one that is not the manifest's, ErrResourceExhausted for
// those that are too large.
func Index(ctx context.Context, layers []Layer, dst, mapFile *os.File, o Options) (Info, error) {
	var info Info
	if len(layers) > maxLayers {
		return info, fmt.Errorf("lazy: %d layers, more than %d: %w", len(layers), maxLayers, errdefs.ErrResourceExhausted)
	}
	left, leftTOC := cmp.Or(o.MaxEntries, defaultEntries), cmp.Or(o.MaxTOC, defaultTOC)
	merged := newDir()
	for i, l := range layers {
		if err := ctx.Err(); err != nil {
			return info, context.Cause(ctx)
		}
		n, size, err := readLayer(i, l, leftTOC, left, merged)
		if err != nil {
			return info, fmt.Errorf("lazy: %w", err)
		}
		left, leftTOC = left-n, leftTOC-size
		info.Blobs += l.Desc.Size
	}
	root, files := grown(merged)
	size, err := erofs.WriteSparse(ctx, dst, root, erofs.Options{UUID: o.UUID, MaxSize: o.MaxSize})
	if err != nil {
		return info, fmt.Errorf("lazy: %w", err)
	}
	var chunks []Chunk
	for _, f := range files {
		// A file below may have got other names in many layers, each with all its pieces.
		if len(f.content.pieces) > maxChunks-len(chunks) {
			return info, fmt.Errorf("lazy: more than %d pieces: %w", maxChunks, errdefs.ErrResourceExhausted)
		}
		for _, p := range f.content.pieces {
			chunks = append(chunks, Chunk{At: f.node.At + p.at, Size: uint32(p.size), Layer: uint32(f.content.layer),
				Offset: p.off, Len: uint32(p.end - p.off), Inner: uint32(p.inner), Sum: p.sum})
			info.Total += p.size
		}
	}
	slices.SortFunc(chunks, func(a, b Chunk) int { return cmp.Compare(a.At, b.At) })
	m := Map{Size: size, Total: info.Total, Chunks: chunks}
	for _, l := range layers {
		m.Blobs = append(m.Blobs, l.Desc.Size)
	}
	if err := m.write(mapFile); err != nil {
		return info, fmt.Errorf("lazy: map: %w", err)
	}
	info.Size, info.Chunks = size, len(chunks)
	return info, nil
}

// readLayer lays a layer over those merged before. It returns how many entries its
// table has, and bytes.
func readLayer(i int, l Layer, maxTable int64, limit int, merged *file) (n int, size int64, err error) {
	table, end, err := readTable(l, maxTable)
	if err != nil {
		return 0, 0, err
	}
	n, err = mergeTable(i, table, end, limit, merged)
	if err != nil {
		return n, 0, fmt.Errorf("layer %s: %w", l.Desc.Digest, err)
	}
	return n, int64(len(table)), nil
}

func mergeTable(i int, table []byte, end int64, limit int, merged *file) (int, error) {
	t := newLayerTree(i, limit)
	n, err := parseTable(table, limit, t.add)
	if err != nil {
		return n, err
	}
	if err := t.finish(merged); err != nil {
		return n, err
	}
	n += t.implied
	if err := ends(t.all, end); err != nil {
		return n, err
	}
	put(merged, t.root)
	return n, nil
}

// grown turns the merged tree into that of package erofs, and lists the files with
// contents.
func grown(root *file) (*erofs.Node, []*file) {
	var files []*file
	seen := map[*erofs.Node]bool{}
	for queue := []*file{root}; len(queue) > 0; queue = queue[1:] {
		d := queue[0]
		d.node.Names = make(map[string]*erofs.Node, len(d.names))
		for name, f := range d.names {
			d.node.Names[name] = f.node
			switch {
			case f.isDir():
				queue = append(queue, f)
			case f.content != nil && f.node.Mode&unix.S_IFMT == unix.S_IFREG && f.node.Size > 0 && !seen[f.node]:
				seen[f.node] = true
				files = append(files, f)
			}
		}
	}
	return root.node, files
}

// IsNotLazy tells whether an error says that a layer is not made for it.
func IsNotLazy(err error) bool { return errors.Is(err, ErrNotLazy) }
