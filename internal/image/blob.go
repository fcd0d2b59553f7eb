package image

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// ingest is a blob being written. What has been written can be read at the same
// time through reader. One goroutine writes.
type ingest struct {
	s    *Store
	f    *os.File
	alg  digest.Algorithm
	hash hash.Hash
	max  int64
	uses atomic.Int32 // of f: the writer, and each reader

	mu   sync.Mutex
	more sync.Cond
	n    int64
	end  bool
	err  error // why there is no more
}

func (s *Store) newIngest(alg digest.Algorithm) (*ingest, error) {
	var h hash.Hash
	switch alg {
	case digest.SHA256:
		h = sha256.New()
	case digest.SHA512:
		h = sha512.New()
	default:
		return nil, fmt.Errorf("digest algorithm %q: %w", alg, errdefs.ErrNotImplemented)
	}
	f, err := os.OpenFile(filepath.Join(s.ingestDir(), rand.Text()), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return nil, fmt.Errorf("write blob: %w", err)
	}
	w := &ingest{s: s, f: f, alg: alg, hash: h, max: s.cfg.Limits.BlobBytes}
	w.more.L = &w.mu
	w.uses.Store(1)
	return w, nil
}

// Write appends to the blob.
func (w *ingest) Write(p []byte) (int, error) {
	if w.n+int64(len(p)) > w.max {
		return 0, fmt.Errorf("blob is larger than %d bytes: %w", w.max, errdefs.ErrResourceExhausted)
	}
	if w.n>>26 != (w.n+int64(len(p)))>>26 {
		if err := w.s.checkFree(); err != nil {
			return 0, err
		}
	}
	n, err := w.f.Write(p)
	w.hash.Write(p[:n])
	w.mu.Lock()
	w.n += int64(n)
	w.mu.Unlock()
	w.more.Broadcast()
	return n, err
}

// finish ends the writing: readers meet io.EOF, or err.
func (w *ingest) finish(err error) {
	w.mu.Lock()
	if !w.end {
		w.end, w.err = true, err
	}
	w.mu.Unlock()
	w.more.Broadcast()
}

func (w *ingest) digest() digest.Digest { return digest.NewDigest(w.alg, w.hash) }

// commit gives the blob its place, if it is what is wanted (an empty digest or
// a negative size want nothing). The ingest is used up either way, but for its
// readers.
func (w *ingest) commit(want digest.Digest, size int64) (digest.Digest, error) {
	got := w.digest()
	if size >= 0 && w.n != size {
		err := fmt.Errorf("blob %s: %d bytes came, %d were announced: %w", want, w.n, size, errdefs.ErrDataLoss)
		w.abort(err)
		return "", err
	}
	if want != "" && got != want {
		err := fmt.Errorf("blob %s: the bytes have the digest %s: %w", want, got, errdefs.ErrDataLoss)
		w.abort(err)
		return "", err
	}
	if w.alg != digest.SHA256 {
		if err := os.MkdirAll(w.s.blobDir(w.alg), 0o700); err != nil {
			w.abort(err)
			return "", err
		}
	}
	if err := os.Rename(w.f.Name(), w.s.blobPath(got)); err != nil {
		w.abort(err)
		return "", fmt.Errorf("commit blob: %w", err)
	}
	w.finish(nil)
	return got, nil
}

// abort removes what was written; readers meet err.
func (w *ingest) abort(err error) {
	if err == nil {
		err = errors.New("blob given up")
	}
	w.finish(err)
	_ = os.Remove(w.f.Name()) // the name may be gone; Open collects the rest
}

// close drops one use of the descriptor: the writer's, or a reader's.
func (w *ingest) close() {
	if w.uses.Add(-1) == 0 {
		w.f.Close()
	}
}

// reader reads the blob from its start, waiting for what is not written yet.
// It is to be closed.
func (w *ingest) reader(ctx context.Context) *ingestReader {
	w.uses.Add(1)
	return &ingestReader{w: w, ctx: ctx}
}

// Close gives up reading; it must be called once.
func (r *ingestReader) Close() error {
	r.w.close()
	return nil
}

type ingestReader struct {
	w   *ingest
	ctx context.Context
	off int64
}

func (r *ingestReader) Read(p []byte) (int, error) {
	w := r.w
	w.mu.Lock()
	for r.off >= w.n && !w.end {
		w.more.Wait()
	}
	n, end, err := w.n, w.end, w.err
	w.mu.Unlock()
	if cerr := r.ctx.Err(); cerr != nil {
		return 0, context.Cause(r.ctx)
	}
	if end && err != nil {
		return 0, err
	}
	if r.off >= n {
		return 0, io.EOF
	}
	m, err := w.f.ReadAt(p[:min(int64(len(p)), n-r.off)], r.off)
	r.off += int64(m)
	if err == io.EOF && m > 0 {
		err = nil
	}
	return m, err
}

func (s *Store) checkFree() error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Root, &st); err != nil {
		return os.NewSyscallError("statfs", err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < s.cfg.Limits.FreeBytes {
		return fmt.Errorf("image store: only %d bytes are free on the disk, %d must stay free: %w", free, s.cfg.Limits.FreeBytes, unix.ENOSPC)
	}
	return nil
}

// openBlob opens a blob for reading.
func (s *Store) openBlob(d digest.Digest) (*os.File, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("blob %.100q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	f, err := os.Open(s.blobPath(d))
	if isNotExist(err) {
		return nil, fmt.Errorf("blob %s is not here: %w", d, errdefs.ErrNotFound)
	}
	return f, err
}

// hasBlob tells whether a blob is here; size < 0 is any.
func (s *Store) hasBlob(d digest.Digest, size int64) bool {
	if d.Validate() != nil {
		return false
	}
	st, err := os.Lstat(s.blobPath(d))
	return err == nil && (size < 0 || st.Size() == size)
}

// putBlob stores small data.
func (s *Store) putBlob(mediaType string, data []byte) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if s.hasBlob(desc.Digest, desc.Size) {
		return desc, nil
	}
	w, err := s.newIngest(digest.SHA256)
	if err != nil {
		return desc, err
	}
	defer w.close()
	if _, err := w.Write(data); err != nil {
		w.abort(err)
		return desc, fmt.Errorf("write blob: %w", err)
	}
	_, err = w.commit(desc.Digest, desc.Size)
	return desc, err
}

func (s *Store) putJSON(mediaType string, v any) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return s.putBlob(mediaType, b)
}

// readBlob reads a small blob whole.
func (s *Store) readBlob(d ocispec.Descriptor) ([]byte, error) {
	f, err := s.openBlob(d.Digest)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, s.cfg.Limits.ManifestBytes+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > s.cfg.Limits.ManifestBytes {
		return nil, fmt.Errorf("blob %s is larger than %d bytes: %w", d.Digest, s.cfg.Limits.ManifestBytes, errdefs.ErrResourceExhausted)
	}
	return b, nil
}

func shortDigest(d digest.Digest) string { return hexPrefix(d.Encoded()) }

func hexPrefix(h string) string {
	if _, err := hex.DecodeString(h); err == nil && len(h) > 12 {
		return h[:12]
	}
	return h
}
