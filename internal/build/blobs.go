package build

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image"
)

// blobs is the back end of the content store: a file for each blob, and what the
// image store has, which gets a second name here when it is asked for. Nothing is
// synced to the disk: the image store does that for what becomes an image's, and the
// rest is a cache (see Builder.freshAfterCrash). It is containerd's metadata store
// that knows labels, leases and garbage.
//
//	<dir>/blobs/sha256/<hex>
//	<dir>/ingest/<hash of the ref>-<number>
type blobs struct {
	images *image.Store
	dir    string

	mu      sync.Mutex
	ingests map[string]*ingest // by ref
	begun   uint64             // how many there have been
}

func openBlobs(images *image.Store, dir string) (*blobs, error) {
	b := &blobs{images: images, dir: dir, ingests: map[string]*ingest{}}
	if err := os.RemoveAll(b.ingestDir()); err != nil { // of a daemon that has ended
		return nil, err
	}
	return b, errors.Join(os.MkdirAll(filepath.Dir(b.path(digest.FromString(""))), 0o700), os.MkdirAll(b.ingestDir(), 0o700))
}

func (b *blobs) ingestDir() string { return filepath.Join(b.dir, "ingest") }

// path is where a blob lies.
func (b *blobs) path(d digest.Digest) string {
	return filepath.Join(b.dir, "blobs", d.Algorithm().String(), d.Encoded())
}

func known(d digest.Digest) error {
	if err := d.Validate(); err != nil || d.Algorithm() != digest.SHA256 {
		return fmt.Errorf("blob %.100q: %w", d, errdefs.ErrNotFound)
	}
	return nil
}

// link gives a blob of the image store's a name here.
func (b *blobs) link(d digest.Digest) error {
	if err := known(d); err != nil {
		return err
	}
	return b.images.LinkBlob(d, b.path(d))
}

// Info tells about a blob.
func (b *blobs) Info(_ context.Context, d digest.Digest) (content.Info, error) {
	if err := known(d); err != nil {
		return content.Info{}, err
	}
	st, err := os.Lstat(b.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		if err := b.link(d); err != nil {
			return content.Info{}, fmt.Errorf("blob %s: %w", d, errdefs.ErrNotFound)
		}
		st, err = os.Lstat(b.path(d))
	}
	if err != nil {
		return content.Info{}, err
	}
	return content.Info{Digest: d, Size: st.Size(), CreatedAt: st.ModTime(), UpdatedAt: st.ModTime()}, nil
}

// Update is not for the back end: labels are the metadata store's.
func (b *blobs) Update(ctx context.Context, info content.Info, _ ...string) (content.Info, error) {
	return b.Info(ctx, info.Digest)
}

// Walk calls f for each blob that lies here.
func (b *blobs) Walk(_ context.Context, f content.WalkFunc, _ ...string) error {
	ents, err := os.ReadDir(filepath.Dir(b.path(digest.FromString(""))))
	if err != nil {
		return err
	}
	for _, e := range ents {
		st, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		d := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
		if known(d) != nil {
			continue
		}
		if err := f(content.Info{Digest: d, Size: st.Size(), CreatedAt: st.ModTime(), UpdatedAt: st.ModTime()}); err != nil {
			return err
		}
	}
	return nil
}

// Delete removes a blob's name here.
func (b *blobs) Delete(_ context.Context, d digest.Digest) error {
	if err := known(d); err != nil {
		return err
	}
	err := os.Remove(b.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("blob %s: %w", d, errdefs.ErrNotFound)
	}
	return err
}

// ReaderAt opens a blob.
func (b *blobs) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if _, err := b.Info(ctx, desc.Digest); err != nil {
		return nil, err
	}
	f, err := os.Open(b.path(desc.Digest))
	if err != nil {
		return nil, err
	}
	return newBlobReader(f)
}

func newBlobReader(f *os.File) (content.ReaderAt, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &blobReader{File: f, size: st.Size()}, nil
}

type blobReader struct {
	*os.File
	size int64
}

// Size is the blob's.
func (r *blobReader) Size() int64 { return r.size }

// Status tells about a blob being written.
func (b *blobs) Status(_ context.Context, ref string) (content.Status, error) {
	b.mu.Lock()
	w := b.ingests[ref]
	b.mu.Unlock()
	if w == nil {
		return content.Status{}, fmt.Errorf("ingest %q: %w", ref, errdefs.ErrNotFound)
	}
	return w.Status()
}

// ListStatuses lists the blobs being written.
func (b *blobs) ListStatuses(context.Context, ...string) ([]content.Status, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []content.Status
	for _, w := range b.ingests {
		s, _ := w.Status()
		out = append(out, s)
	}
	return out, nil
}

// Abort gives up a blob being written.
func (b *blobs) Abort(_ context.Context, ref string) error {
	b.mu.Lock()
	w := b.ingests[ref]
	b.mu.Unlock()
	if w == nil {
		return fmt.Errorf("ingest %q: %w", ref, errdefs.ErrNotFound)
	}
	return w.Close()
}

// Writer begins to write a blob. What was written of it earlier is not gone on with.
func (b *blobs) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	if o.Ref == "" {
		return nil, fmt.Errorf("ref must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	if o.Desc.Digest != "" {
		if _, err := b.Info(ctx, o.Desc.Digest); err == nil {
			return nil, fmt.Errorf("blob %s: %w", o.Desc.Digest, errdefs.ErrAlreadyExists)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ingests[o.Ref] != nil {
		return nil, fmt.Errorf("ref %s is being written: %w", o.Ref, errdefs.ErrUnavailable)
	}
	// Each has a file of its own: an earlier one of that ref may be on its way to its place.
	b.begun++
	name := fmt.Sprintf("%s-%d", digest.FromString(o.Ref).Encoded(), b.begun)
	f, err := os.OpenFile(filepath.Join(b.ingestDir(), name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	w := &ingest{b: b, f: f, ref: o.Ref, hash: sha256.New(), total: o.Desc.Size, began: now, last: now}
	b.ingests[o.Ref] = w
	return w, nil
}

// ingest is a blob being written.
type ingest struct {
	b    *blobs
	ref  string
	hash hash.Hash

	mu          sync.Mutex
	f           *os.File // nil: it is over
	n, total    int64
	began, last time.Time
}

var errIngestOver = fmt.Errorf("the blob has been given up or committed: %w", errdefs.ErrFailedPrecondition)

// Write appends.
func (w *ingest) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return 0, errIngestOver
	}
	n, err := w.f.Write(p)
	w.hash.Write(p[:n])
	w.n += int64(n)
	w.last = time.Now()
	return n, err
}

// Digest is that of what has been written.
func (w *ingest) Digest() digest.Digest {
	w.mu.Lock()
	defer w.mu.Unlock()
	return digest.NewDigest(digest.SHA256, w.hash)
}

// Truncate begins anew.
func (w *ingest) Truncate(size int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return errIngestOver
	}
	if size != 0 {
		return fmt.Errorf("truncate to %d: %w", size, errdefs.ErrNotImplemented)
	}
	if err := w.f.Truncate(0); err != nil {
		return err
	}
	if _, err := w.f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	w.hash.Reset()
	w.n = 0
	return nil
}

// Status tells how far it is.
func (w *ingest) Status() (content.Status, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return content.Status{Ref: w.ref, Offset: w.n, Total: w.total, StartedAt: w.began, UpdatedAt: w.last}, nil
}

// over ends it and returns its file's name; "" if it was over.
func (w *ingest) over() string {
	if w.f == nil {
		return ""
	}
	name := w.f.Name()
	w.f.Close()
	w.f = nil
	w.b.mu.Lock()
	delete(w.b.ingests, w.ref)
	w.b.mu.Unlock()
	return name
}

// Close gives it up, unless it was committed.
func (w *ingest) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if name := w.over(); name != "" {
		return os.Remove(name)
	}
	return nil
}

// Commit gives the blob its place, if it is what is wanted.
func (w *ingest) Commit(_ context.Context, size int64, expected digest.Digest, _ ...content.Opt) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return errIngestOver
	}
	got := digest.NewDigest(digest.SHA256, w.hash)
	var err error
	switch {
	case size > 0 && size != w.n:
		err = fmt.Errorf("blob %s: %d bytes came, %d were announced: %w", expected, w.n, size, errdefs.ErrFailedPrecondition)
	case expected != "" && expected != got:
		err = fmt.Errorf("blob %s: the bytes have the digest %s: %w", expected, got, errdefs.ErrFailedPrecondition)
	}
	name := w.over()
	if err != nil {
		return errors.Join(err, os.Remove(name))
	}
	if _, serr := os.Lstat(w.b.path(got)); serr == nil {
		if err := os.Remove(name); err != nil {
			return err
		}
		return fmt.Errorf("blob %s: %w", got, errdefs.ErrAlreadyExists)
	}
	return os.Rename(name, w.b.path(got))
}
