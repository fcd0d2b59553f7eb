package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/layer"
)

const (
	chunkBytes = 256 << 10 // handed from decompression to unpacking
	chunkQueue = 8
	// layerNameLen gives names of 50 random bits, short so that many of them
	// fit into the page that mount options may take.
	layerNameLen = 10
	// zstdMemory bounds the decoder's window: 128 MiB is zstd's --ultra limit.
	zstdMemory = 128 << 20
)

type compression int

const (
	uncompressed compression = iota
	gzipped
	zstandard
	unknownFormat // neither compressed nor a tar
)

// sniff tells a blob's format from its first bytes (up to 512).
func sniff(b []byte) compression {
	switch {
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
		return gzipped
	case bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(b) >= 8 && b[0]&0xf0 == 0x50 && bytes.Equal(b[1:4], []byte{0x2a, 0x4d, 0x18}): // skippable frame
		return zstandard
	case len(b) >= 262 && bytes.Equal(b[257:262], []byte("ustar")),
		len(b) >= 512 && allZeros(b[:512]): // an empty layer
		return uncompressed
	case len(b) >= 512 && oldTar(b):
		return uncompressed
	}
	return unknownFormat
}

func allZeros(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// oldTar checks the checksum of a header without the ustar magic (V7).
func oldTar(b []byte) bool {
	var sum, want int64
	for i, c := range b[:512] {
		if i >= 148 && i < 156 {
			c = ' '
		}
		sum += int64(c)
	}
	for _, c := range b[148:156] {
		if c >= '0' && c <= '7' {
			want = want*8 + int64(c-'0')
		}
	}
	return sum == want && b[0] != 0
}

// decompress returns the plain bytes of r, and what r was.
func decompress(r io.Reader) (io.ReadCloser, compression, error) {
	br := bufio.NewReaderSize(r, chunkBytes)
	head, err := br.Peek(512)
	if err != nil && err != io.EOF {
		return nil, unknownFormat, err
	}
	switch c := sniff(head); c {
	case gzipped:
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, c, fmt.Errorf("gzip: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return z, c, nil
	case zstandard:
		z, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(zstdMemory), zstd.WithDecoderMaxMemory(1<<62), zstd.WithDecoderConcurrency(2))
		if err != nil {
			return nil, c, fmt.Errorf("zstd: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return z.IOReadCloser(), c, nil
	default:
		return io.NopCloser(br), c, nil
	}
}

// unpacked is a layer that has been unpacked under layers/tmp and has no place yet.
type unpacked struct {
	dir    string
	res    layer.Result
	diffID digest.Digest // "" if the layer was not compressed: the blob's digest
	format compression
	proof  string // of an encrypted layer's key
}

// unpackStream unpacks a layer's blob (compressed or not) into a directory of
// its own. It reads r to its end. It takes one of the operation's slots (nil: they
// are not limited).
func (s *Store) unpackStream(ctx context.Context, slots chan struct{}, r io.Reader) (_ *unpacked, err error) {
	release, err := slot(ctx, slots)
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	zr, format, err := decompress(r)
	if err != nil {
		return nil, err
	}
	u := &unpacked{dir: filepath.Join(s.layerTmp(), rand.Text()), format: format}
	if err := os.Mkdir(u.dir, 0o755); err != nil {
		zr.Close()
		return nil, fmt.Errorf("unpack layer: %w", err)
	}
	defer func() {
		if err != nil {
			s.discard(u.dir)
		}
	}()
	// What a bomb decompresses to, with headers and padding.
	lim := s.cfg.Limits
	bound := &boundReader{r: zr, left: lim.LayerBytes + lim.LayerEntries*1024, what: lim.LayerBytes}
	var plain io.Reader = bound
	var h hash.Hash
	if format != uncompressed {
		h = sha256.New()
		ra := newReadahead(io.TeeReader(bound, h))
		plain = ra
	}
	u.res, err = layer.Unpack(ctx, plain, u.dir, layer.Limits{Bytes: lim.LayerBytes, Entries: lim.LayerEntries, FreeBytes: lim.FreeBytes})
	if err == nil {
		_, err = io.Copy(io.Discard, plain)
	}
	cancel(nil)
	if ra, ok := plain.(*readahead); ok {
		ra.stop() // before the decoder that it reads is closed
	}
	zr.Close()
	if err != nil {
		return nil, err
	}
	if h != nil {
		u.diffID = digest.NewDigest(digest.SHA256, h)
	}
	return u, nil
}

// boundReader ends with an error when too much comes.
type boundReader struct {
	r    io.Reader
	left int64
	what int64
}

func (b *boundReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return n, fmt.Errorf("layer is larger than %d bytes: %w", b.what, errdefs.ErrResourceExhausted)
	}
	return n, err
}

// readahead reads in a goroutine of its own.
type readahead struct {
	full, empty chan []byte
	quit        chan struct{}
	done        chan struct{}
	stopped     bool
	cur, rest   []byte
	err         error
}

func newReadahead(r io.Reader) *readahead {
	a := &readahead{
		full: make(chan []byte, chunkQueue), empty: make(chan []byte, chunkQueue),
		quit: make(chan struct{}), done: make(chan struct{}),
	}
	for range chunkQueue {
		a.empty <- nil
	}
	go func() {
		defer close(a.done)
		defer close(a.full)
		for {
			var b []byte
			select {
			case b = <-a.empty:
			case <-a.quit:
				return
			}
			if b == nil {
				b = make([]byte, chunkBytes)
			}
			n, err := 0, error(nil)
			for n < chunkBytes && err == nil {
				var m int
				m, err = r.Read(b[n:chunkBytes])
				n += m
			}
			if n > 0 {
				a.full <- b[:n] // never more chunks than the queue holds
			}
			if err != nil {
				if err != io.EOF {
					a.err = err
				}
				return
			}
		}
	}()
	return a
}

// Read returns the next bytes; the source's error comes after all of them.
func (a *readahead) Read(p []byte) (int, error) {
	if len(a.rest) == 0 {
		if a.cur != nil {
			a.empty <- a.cur
			a.cur = nil
		}
		b, ok := <-a.full
		if !ok {
			if a.err != nil {
				return 0, a.err
			}
			return 0, io.EOF
		}
		a.cur, a.rest = b, b
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// stop ends the goroutine; safe twice.
func (a *readahead) stop() {
	if a.stopped {
		return
	}
	a.stopped = true
	close(a.quit)
	for range a.full {
	}
	<-a.done
}

// discard removes a directory or file in the background, by way of the trash.
func (s *Store) discard(path string) {
	to := filepath.Join(s.trashDir(), rand.Text())
	if err := os.Rename(path, to); err != nil {
		if !isNotExist(err) {
			s.log.Warn("garbage not moved away", "path", path, "err", err)
		}
		return
	}
	s.gcSoon()
}

// discardAll empties a directory into the trash.
func (s *Store) discardAll(dir string) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		s.log.Warn("directory not read", "path", dir, "err", err)
	}
	for _, e := range ents {
		s.discard(filepath.Join(dir, e.Name()))
	}
}

// chainIDs computes the chain IDs of stacked diff IDs (image-spec config.md,
// "Layer ChainID").
func chainIDs(diffs []digest.Digest) []digest.Digest {
	out := make([]digest.Digest, len(diffs))
	for i, d := range diffs {
		if i == 0 {
			out[i] = d
		} else {
			out[i] = digest.FromString(out[i-1].String() + " " + d.String())
		}
	}
	return out
}

// hasLayer tells whether the chain's topmost layer is unpacked.
func (s *Store) hasLayer(chain digest.Digest) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.layers[chain] != nil
}

// publish gives an unpacked layer its place on its parents, which have theirs.
// It is a no-op (u is discarded) if the chain is there already.
func (s *Store) publish(ctx context.Context, u *unpacked, diffs, chains []digest.Digest, i int) error {
	unlock, err := s.locks.lock(ctx, "chain "+chains[i].String())
	if err != nil {
		return err
	}
	defer unlock()
	if s.hasLayer(chains[i]) {
		s.discard(u.dir)
		return nil
	}
	var lowers []string
	for j := i - 1; j >= 0; j-- {
		lowers = append(lowers, s.layerDir(chains[j]))
	}
	if err := layer.Settle(u.dir, u.res, lowers); err != nil {
		return err
	}
	name := strings.ToLower(rand.Text()[:layerNameLen])
	dir := filepath.Join(s.layersDir(), name)
	// Not onto anything: rename would replace an empty directory.
	if err := unix.Renameat2(unix.AT_FDCWD, u.dir, unix.AT_FDCWD, dir, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("layer %s: %w", chains[i], &os.LinkError{Op: "rename", Old: u.dir, New: dir, Err: err})
	}
	rec := &layerRecord{DiffID: diffs[i], Dir: name, Size: u.res.Bytes, Entries: u.res.Entries, Boot: s.boot, Proof: u.proof}
	if i > 0 {
		rec.Parent = chains[i-1]
	}
	s.mu.Lock()
	s.layers[chains[i]] = rec
	s.mu.Unlock()
	return nil
}

// unpackBlob unpacks a layer that is here as a blob, and checks its diff ID.
func (s *Store) unpackBlob(ctx context.Context, slots chan struct{}, desc ocispec.Descriptor, diffID digest.Digest) (*unpacked, error) {
	f, err := s.openBlob(desc.Digest)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	u, err := s.unpackLayer(ctx, slots, desc, f)
	if err != nil {
		return nil, fmt.Errorf("unpack layer %s: %w", desc.Digest, err)
	}
	return u, s.checkDiffID(u, desc.Digest, diffID)
}

// checkDiffID refuses a layer that is not what the config says it is.
func (s *Store) checkDiffID(u *unpacked, blob, want digest.Digest) error {
	got := u.diffID
	if got == "" {
		got = blob
	}
	if got != want {
		s.discard(u.dir)
		return fmt.Errorf("layer %s: its uncompressed bytes have the digest %s, the config says %s: %w", blob, got, want, errdefs.ErrDataLoss)
	}
	return nil
}

// unpackImage brings all layers to their places, from their blobs.
func (s *Store) unpackImage(ctx context.Context, img *Image) error {
	if err := s.complete1(ctx, img); err != nil {
		return err
	}
	if !slices.ContainsFunc(img.ChainIDs, func(c digest.Digest) bool { return !s.hasLayer(c) }) {
		return nil
	}
	unlock, err := s.locks.lock(ctx, "image "+img.ChainID.String()) // the second who wants it need not work
	if err != nil {
		return err
	}
	defer unlock()
	for i := range img.ChainIDs {
		if s.hasLayer(img.ChainIDs[i]) {
			continue
		}
		u, err := s.unpackBlob(ctx, nil, img.LayerDescs[i], img.DiffIDs[i])
		if err != nil {
			return err
		}
		if err := s.publish(ctx, u, img.DiffIDs, img.ChainIDs, i); err != nil {
			s.discard(u.dir)
			return err
		}
	}
	return nil
}

// saveLayers puts the image's layers that the database does not know into it.
func (b *batch) saveLayers(chains []digest.Digest) {
	for _, c := range chains {
		if l := b.layer(c); l != nil && !l.saved {
			b.layers[c] = l
		}
	}
}
