package lazy

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"os"
	"sort"

	"github.com/containerd/errdefs"
)

// A map's file:
//
//	block 0          magic, version, counts, sizes, the records' sha256
//	from 4096        the layers' sizes, 8 bytes each
//	                 a record of 64 bytes for each chunk, in the order of their places
//	then             a bit for each chunk: it is here
//
// Numbers are little-endian. The bits are the program's to write (package serve); all
// else stays as Index has written it.
const (
	mapMagic   = "TENONLZM"
	mapVersion = 1
	mapHead    = 4096
	recordSize = 64
	// maxChunks bounds what the program keeps in memory of one image: 64 MiB.
	maxChunks = 1 << 20
)

// Map says where an EROFS file's contents are.
type Map struct {
	// Size is the EROFS file's, Total that of all chunks: bytes.
	Size, Total int64
	// Blobs are the sizes of the layers' blobs.
	Blobs []int64
	// Chunks are sorted by At and do not overlap.
	Chunks []Chunk
}

// Chunk is what is fetched and verified as a whole.
type Chunk struct {
	At    int64  // place in the EROFS file
	Size  uint32 // bytes there
	Layer uint32
	// Offset and Len are where, in the layer's blob, the gzip member is that the
	// chunk lies in; Inner is where it begins in the member's uncompressed bytes.
	Offset     int64
	Len, Inner uint32
	Sum        [32]byte // sha256 of the chunk
}

// End is the place behind the chunk.
func (c *Chunk) End() int64 { return c.At + int64(c.Size) }

func (m *Map) write(f *os.File) error {
	if len(m.Chunks) > maxChunks {
		return fmt.Errorf("%d pieces, more than %d: %w", len(m.Chunks), maxChunks, errdefs.ErrResourceExhausted)
	}
	le := binary.LittleEndian
	var body []byte
	for _, s := range m.Blobs {
		body = le.AppendUint64(body, uint64(s))
	}
	for i := range m.Chunks {
		c := &m.Chunks[i]
		body = le.AppendUint64(body, uint64(c.At))
		body = le.AppendUint64(body, uint64(c.Offset))
		body = le.AppendUint32(body, c.Size)
		body = le.AppendUint32(body, c.Layer)
		body = le.AppendUint32(body, c.Len)
		body = le.AppendUint32(body, c.Inner)
		body = append(body, c.Sum[:]...)
	}
	head := make([]byte, mapHead)
	copy(head, mapMagic)
	le.PutUint32(head[8:], mapVersion)
	le.PutUint32(head[12:], uint32(len(m.Blobs)))
	le.PutUint64(head[16:], uint64(len(m.Chunks)))
	le.PutUint64(head[24:], uint64(m.Size))
	le.PutUint64(head[32:], uint64(m.Total))
	sum := sha256.Sum256(body)
	copy(head[64:], sum[:])
	if _, err := f.WriteAt(append(head, body...), 0); err != nil {
		return err
	}
	return f.Truncate(m.bitsAt() + int64(len(m.Chunks)+7)/8)
}

// bitsAt is where the bits are in the file.
func (m *Map) bitsAt() int64 {
	return mapHead + int64(len(m.Blobs))*8 + int64(len(m.Chunks))*recordSize
}

// ReadMap reads a map. ErrDataLoss for one that is damaged.
func ReadMap(f io.ReaderAt) (*Map, error) {
	damaged := func(what string) error { return fmt.Errorf("lazy: map: %s: %w", what, errdefs.ErrDataLoss) }
	head := make([]byte, mapHead)
	if err := readFull(f, head, 0); err != nil {
		return nil, fmt.Errorf("lazy: map: %w", err)
	}
	le := binary.LittleEndian
	if string(head[:8]) != mapMagic || le.Uint32(head[8:]) != mapVersion {
		return nil, damaged("it is none, or of another version")
	}
	blobs, chunks := le.Uint32(head[12:]), le.Uint64(head[16:])
	if blobs > maxLayers || chunks > maxChunks {
		return nil, damaged("its counts")
	}
	m := &Map{Size: int64(le.Uint64(head[24:])), Total: int64(le.Uint64(head[32:])),
		Blobs: make([]int64, blobs), Chunks: make([]Chunk, chunks)}
	body := make([]byte, m.bitsAt()-mapHead)
	if err := readFull(f, body, mapHead); err != nil {
		return nil, fmt.Errorf("lazy: map: %w", err)
	}
	if sum := sha256.Sum256(body); string(sum[:]) != string(head[64:96]) {
		return nil, damaged("its sum")
	}
	for i := range m.Blobs {
		m.Blobs[i] = int64(le.Uint64(body[i*8:]))
	}
	body = body[len(m.Blobs)*8:]
	var end, total int64
	for i := range m.Chunks {
		c, b := &m.Chunks[i], body[i*recordSize:]
		c.At, c.Offset = int64(le.Uint64(b)), int64(le.Uint64(b[8:]))
		c.Size, c.Layer, c.Len, c.Inner = le.Uint32(b[16:]), le.Uint32(b[20:]), le.Uint32(b[24:]), le.Uint32(b[28:])
		copy(c.Sum[:], b[32:64])
		if c.At < end || c.Size == 0 || c.Size > maxChunk || c.Inner > maxChunk || int(c.Layer) >= len(m.Blobs) ||
			c.Offset < 0 || c.Len == 0 || c.Offset+int64(c.Len) > m.Blobs[c.Layer] || c.Offset+int64(c.Len) < 0 {
			return nil, damaged("a record")
		}
		end = c.End()
		total += int64(c.Size)
	}
	if end > m.Size || total != m.Total {
		return nil, damaged("its sizes")
	}
	return m, nil
}

// Find returns the chunks that have bytes between start and end: from <= i < to.
func (m *Map) Find(start, end int64) (from, to int) {
	from = sort.Search(len(m.Chunks), func(i int) bool { return m.Chunks[i].End() > start })
	to = from + sort.Search(len(m.Chunks)-from, func(i int) bool { return m.Chunks[from+i].At >= end })
	return from, to
}

// Bits are a map's bits of what is here. They are not safe for concurrent use.
type Bits struct {
	m    *Map
	b    []byte
	Here int64 // bytes of the chunks that are here
	N    int   // how many those are
}

// ReadBits reads a map's bits; bits that are not in the file are not set.
func ReadBits(f io.ReaderAt, m *Map) (*Bits, error) {
	x := &Bits{m: m, b: make([]byte, (len(m.Chunks)+7)/8)}
	n, err := f.ReadAt(x.b, m.bitsAt())
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("lazy: map: %w", err)
	}
	clear(x.b[n:])
	if r := len(m.Chunks) % 8; r > 0 {
		x.b[len(x.b)-1] &= 1<<r - 1
	}
	for i, b := range x.b {
		for ; b != 0; b &= b - 1 {
			x.Here += int64(m.Chunks[i*8+bits.TrailingZeros8(b)].Size)
			x.N++
		}
	}
	return x, nil
}

// Has tells whether a chunk is here.
func (x *Bits) Has(i int) bool { return x.b[i/8]>>(i%8)&1 == 1 }

// Set notes that a chunk is here.
func (x *Bits) Set(i int) {
	if !x.Has(i) {
		x.b[i/8] |= 1 << (i % 8)
		x.Here += int64(x.m.Chunks[i].Size)
		x.N++
	}
}

// All tells whether all are here.
func (x *Bits) All() bool { return x.N == len(x.m.Chunks) }

// Snapshot is the bits' bytes now, for Write.
func (x *Bits) Snapshot() []byte { return append([]byte(nil), x.b...) }

// WriteBits writes a snapshot to the map's file. What it says is here must have been
// brought to the disk before.
func (m *Map) WriteBits(f io.WriterAt, snapshot []byte) error {
	if _, err := f.WriteAt(snapshot, m.bitsAt()); err != nil {
		return fmt.Errorf("lazy: map: %w", err)
	}
	return nil
}
