package lazy

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Of eStargz (github.com/containerd/stargz-snapshotter, docs/estargz.md): a layer's
// blob is a sequence of gzip members, each of which begins with a piece of a file;
// then comes a member with a tar of one file, the table of contents, and then a footer
// that says where that member is.
const (
	tableAnnotation = "containerd.io/snapshot/stargz/toc.digest"
	tableName       = "stargz.index.json"
	footerSize      = 51
	footerMagic     = "STARGZ"

	// maxTableBlob bounds the member with the table, compressed.
	maxTableBlob = 64 << 20
	// maxChunk bounds what is decompressed at once; writers make 4 MiB.
	maxChunk = 64 << 20
	// maxLayers is more than an overlay could stack.
	maxLayers = 1 << 10

	defaultEntries = 1 << 20
	defaultTOC     = 256 << 20
)

// tableEntry is what is used of an entry of a table.
type tableEntry struct {
	Name        string            `json:"name"`
	Type        string            `json:"type"`
	Size        int64             `json:"size"`
	ModTime     string            `json:"modtime"`
	LinkName    string            `json:"linkName"`
	Mode        int64             `json:"mode"`
	UID         int64             `json:"uid"`
	GID         int64             `json:"gid"`
	DevMajor    int64             `json:"devMajor"`
	DevMinor    int64             `json:"devMinor"`
	Xattrs      map[string][]byte `json:"xattrs"`
	Digest      string            `json:"digest"`
	Offset      int64             `json:"offset"`
	InnerOffset int64             `json:"innerOffset"`
	ChunkOffset int64             `json:"chunkOffset"`
	ChunkSize   int64             `json:"chunkSize"`
	ChunkDigest string            `json:"chunkDigest"`
}

// why makes an error that wraps ErrNotLazy.
func why(format string, a ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), ErrNotLazy)
}

// bad makes an error for a table that nobody should believe.
func bad(format string, a ...any) error {
	return fmt.Errorf("table of contents: %s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}

// Check tells by its descriptor alone whether a layer can be lazy: the manifest must
// say which table of contents it has. The error wraps ErrNotLazy.
func Check(d ocispec.Descriptor) error {
	if strings.HasSuffix(d.MediaType, "+encrypted") {
		return why("layer %s is encrypted", d.Digest)
	}
	t := d.Annotations[tableAnnotation]
	if t == "" {
		return why("layer %s: the manifest names no table of contents", d.Digest)
	}
	if _, err := sha256Of(t); err != nil {
		return why("layer %s: the manifest names the table of contents %.100q", d.Digest, t)
	}
	return nil
}

// Table is the digest of the table of contents that a layer's manifest names; "" if it
// names none.
func Table(d ocispec.Descriptor) string { return d.Annotations[tableAnnotation] }

// sha256Of is the sum in a digest.
func sha256Of(s string) (sum [32]byte, err error) {
	d, err := digest.Parse(s)
	if err != nil {
		return sum, err
	}
	if d.Algorithm() != digest.SHA256 {
		return sum, fmt.Errorf("digest %.100q is no sha256: %w", s, errdefs.ErrInvalidArgument)
	}
	for i := range sum {
		v, err := strconv.ParseUint(d.Encoded()[2*i:2*i+2], 16, 8)
		if err != nil {
			return sum, err
		}
		sum[i] = byte(v)
	}
	return sum, nil
}

// readTable reads and verifies a layer's table. It returns the table's JSON, and where
// in the blob the pieces of files end.
func readTable(l Layer, limit int64) (table []byte, end int64, err error) {
	if err := Check(l.Desc); err != nil {
		return nil, 0, err
	}
	if l.Desc.Size < footerSize {
		return nil, 0, why("layer %s is too small", l.Desc.Digest)
	}
	foot := make([]byte, footerSize)
	if err := readFull(l.Blob, foot, l.Desc.Size-footerSize); err != nil {
		return nil, 0, fmt.Errorf("layer %s: footer: %w", l.Desc.Digest, err)
	}
	end, err = parseFooter(foot)
	if err != nil {
		return nil, 0, fmt.Errorf("layer %s: %w", l.Desc.Digest, err)
	}
	size := l.Desc.Size - footerSize - end
	if end < 0 || size <= 0 {
		return nil, 0, fmt.Errorf("layer %s: %w", l.Desc.Digest, bad("it is at %d of %d bytes", end, l.Desc.Size))
	}
	if size > maxTableBlob {
		return nil, 0, fmt.Errorf("layer %s: table of contents: %d bytes, more than %d: %w", l.Desc.Digest, size, maxTableBlob, errdefs.ErrResourceExhausted)
	}
	packed := make([]byte, size)
	if err := readFull(l.Blob, packed, end); err != nil {
		return nil, 0, fmt.Errorf("layer %s: table of contents: %w", l.Desc.Digest, err)
	}
	if table, err = unpackTable(packed, limit); err != nil {
		return nil, 0, fmt.Errorf("layer %s: %w", l.Desc.Digest, err)
	}
	if got, want := digest.FromBytes(table), l.Desc.Annotations[tableAnnotation]; got.String() != want {
		return nil, 0, fmt.Errorf("layer %s: table of contents: it has the digest %s, the manifest says %s: %w", l.Desc.Digest, got, want, errdefs.ErrDataLoss)
	}
	return table, end, nil
}

func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// parseFooter returns where the table is: an empty gzip member's extra field has it.
func parseFooter(b []byte) (int64, error) {
	if len(b) != footerSize || b[0] != 0x1f || b[1] != 0x8b || b[2] != 8 || b[3]&4 == 0 {
		return 0, why("it has no footer")
	}
	const field = 16 + len(footerMagic)
	extra := b[12:]
	if binary.LittleEndian.Uint16(b[10:]) != 4+uint16(field) || extra[0] != 'S' || extra[1] != 'G' ||
		binary.LittleEndian.Uint16(extra[2:]) != uint16(field) || string(extra[4+16:4+field]) != footerMagic {
		return 0, why("it has no footer")
	}
	off, err := strconv.ParseInt(string(extra[4:4+16]), 16, 64)
	if err != nil {
		return 0, why("its footer is %.60q", extra[4:4+field])
	}
	return off, nil
}

func unpackTable(packed []byte, limit int64) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, bad("%v", err)
	}
	defer z.Close()
	z.Multistream(false)
	t := tar.NewReader(io.LimitReader(z, limit+1<<20))
	h, err := t.Next()
	if err != nil {
		return nil, bad("%v", err)
	}
	if h.Name != tableName || h.Typeflag != tar.TypeReg {
		return nil, bad("the file %.100q is in its place", h.Name)
	}
	if h.Size > limit {
		return nil, fmt.Errorf("table of contents: %d bytes, more than %d: %w", h.Size, limit, errdefs.ErrResourceExhausted)
	}
	var b bytes.Buffer // not made as large as the header says
	if _, err := io.Copy(&b, t); err != nil {
		return nil, bad("%v", err)
	}
	return b.Bytes(), nil
}

// parseTable calls f for each entry. It returns how many there were.
func parseTable(b []byte, limit int, f func(*tableEntry) error) (n int, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	fail := func(err error) (int, error) { return n, bad("%v", err) }
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return fail(fmt.Errorf("no object: %v", err))
	}
	seen := false
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return fail(err)
		}
		if key != "entries" || seen {
			if seen && key == "entries" {
				return fail(errors.New("two lists of entries"))
			}
			var skip json.RawMessage
			if err := d.Decode(&skip); err != nil {
				return fail(err)
			}
			if key == "version" && string(skip) != "1" {
				return n, why("its table of contents has version %.20s", skip)
			}
			continue
		}
		seen = true
		t, err := d.Token()
		if err != nil || t != nil && t != json.Delim('[') {
			return fail(fmt.Errorf("entries are no list: %v", err))
		}
		if t == nil {
			continue // null: an empty layer
		}
		for d.More() {
			if n++; n > limit {
				return n, fmt.Errorf("table of contents: more than %d entries: %w", limit, errdefs.ErrResourceExhausted)
			}
			var e tableEntry
			if err := d.Decode(&e); err != nil {
				return fail(err)
			}
			if err := f(&e); err != nil {
				return n, err
			}
		}
		if _, err := d.Token(); err != nil {
			return fail(err)
		}
	}
	if _, err := d.Token(); err != nil {
		return fail(err)
	}
	return n, nil
}

// piece is a part of a file, as a layer's blob has it.
type piece struct {
	at    int64 // in the file
	size  int64
	off   int64 // of the gzip member in the blob
	end   int64 // of that, known when all of the table is
	inner int64 // in the member's uncompressed bytes
	sum   [32]byte
}

// content is a regular file's.
type content struct {
	layer  int
	size   int64
	pieces []piece
}

// add appends an entry's piece. first is that of type "reg".
func (c *content) add(e *tableEntry, first bool) error {
	next := int64(0)
	if n := len(c.pieces); n > 0 {
		next = c.pieces[n-1].at + c.pieces[n-1].size
	}
	size := e.ChunkSize
	if size == 0 {
		size = c.size - e.ChunkOffset
	}
	if e.ChunkOffset != next || size <= 0 || size > c.size-next {
		return bad("file %.200q: its piece at %d of %d bytes does not follow that before it", e.Name, e.ChunkOffset, size)
	}
	if size > maxChunk || e.InnerOffset < 0 || e.InnerOffset > maxChunk {
		return why("file %.200q comes in pieces of more than %d bytes", e.Name, maxChunk)
	}
	text := e.ChunkDigest
	if text == "" && first && size == c.size {
		text = e.Digest
	}
	if text == "" {
		return why("its table of contents has no digests of pieces")
	}
	sum, err := sha256Of(text)
	if err != nil {
		return bad("file %.200q: %v", e.Name, err)
	}
	c.pieces = append(c.pieces, piece{at: next, size: size, off: e.Offset, inner: e.InnerOffset, sum: sum})
	return nil
}

// whole tells whether all pieces are there.
func (c *content) whole() bool {
	if c == nil || c.size == 0 {
		return true
	}
	n := len(c.pieces)
	return n > 0 && c.pieces[n-1].at+c.pieces[n-1].size == c.size
}

// ends finds out where the gzip members end: where the next begins.
func ends(all []*content, end int64) error {
	var begins []int64
	for _, c := range all {
		for _, p := range c.pieces {
			if p.off < 0 || p.off >= end {
				return bad("a piece at %d of %d bytes", p.off, end)
			}
			begins = append(begins, p.off)
		}
	}
	slices.Sort(begins)
	begins = append(slices.Compact(begins), end)
	for _, c := range all {
		for i := range c.pieces {
			p := &c.pieces[i]
			n, _ := slices.BinarySearch(begins, p.off+1)
			p.end = begins[n]
			// What comes behind the piece, tar headers, does not matter; nor does what
			// a hostile table puts there.
			if most := 2*(p.inner+p.size) + 1<<20; p.end-p.off > most {
				p.end = p.off + most
			}
		}
	}
	return nil
}

// modTime reads an entry's time; the zero time is 1970's beginning.
func (e *tableEntry) modTime() (time.Time, error) {
	if e.ModTime == "" {
		return time.Unix(0, 0), nil
	}
	t, err := time.Parse(time.RFC3339, e.ModTime)
	if err != nil {
		return t, bad("entry %.200q: time %.60q", e.Name, e.ModTime)
	}
	if s := t.Unix(); s < 0 || s >= 1<<34 {
		t = time.Unix(0, 0)
	}
	return t, nil
}

// owner checks an entry's numbers.
func (e *tableEntry) owner() (uid, gid uint32, err error) {
	if e.UID < 0 || e.GID < 0 || e.UID >= math.MaxUint32 || e.GID >= math.MaxUint32 {
		return 0, 0, bad("entry %.200q: owner %d:%d is out of range", e.Name, e.UID, e.GID)
	}
	return uint32(e.UID), uint32(e.GID), nil
}
