package serve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/lazy"
	"tenon.dev/tenon/internal/image/lazy/remote"
)

// chain is one chain's file.
type chain struct {
	s        *Server
	id       digest.Digest
	blobs    []lazy.Blob
	file     *os.File
	mapFile  *os.File
	dev, ino uint64
	m        *lazy.Map
	slots    *semaphore.Weighted // for requests

	// Of Server.mu.
	node    uint64
	opens   int
	lookups uint64

	flushMu sync.Mutex // one flush at a time, and no close meanwhile
	closed  bool
	lost    bool // what is here can't be noted any more

	mu      sync.Mutex
	repo    *remote.Repository
	bits    *lazy.Bits
	dirty   bool
	flights map[int]*flight // by chunk
	down    time.Time       // when the registry was last found away
	stats   lazy.State
	logged  time.Time
}

// flight is a chunk on its way.
type flight struct {
	done chan struct{}
	// After done: why it did not come, or, if the disk could not take it, its bytes.
	err   error
	bytes []byte
}

func newChain(s *Server, id digest.Digest, blobs []lazy.Blob, repo *remote.Repository, file, mapFile *os.File, st *unix.Stat_t) (*chain, error) {
	m, err := lazy.ReadMap(mapFile)
	if err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != m.Size {
		return nil, fmt.Errorf("chain %s: its file has %d bytes, its map is for %d: %w", id, st.Size, m.Size, errdefs.ErrDataLoss)
	}
	if len(blobs) != len(m.Blobs) {
		return nil, fmt.Errorf("chain %s: %d blobs, its map is for %d: %w", id, len(blobs), len(m.Blobs), errdefs.ErrInvalidArgument)
	}
	for i, b := range blobs {
		if err := b.Digest.Validate(); err != nil || b.Size != m.Blobs[i] {
			return nil, fmt.Errorf("chain %s: blob %.100q: %w", id, b.Digest, errdefs.ErrInvalidArgument)
		}
	}
	bits, err := lazy.ReadBits(mapFile, m)
	if err != nil {
		return nil, err
	}
	return &chain{s: s, id: id, blobs: blobs, file: file, mapFile: mapFile, dev: uint64(st.Dev), ino: st.Ino,
		m: m, slots: semaphore.NewWeighted(parallel), repo: repo, bits: bits, flights: map[int]*flight{}}, nil
}

func (c *chain) close() {
	c.flushMu.Lock()
	defer c.flushMu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	c.file.Close()
	c.mapFile.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.repo.Close()
}

// flush brings what has come to the disk, and then notes that it is here.
func (c *chain) flush(log *slog.Logger) {
	c.flushMu.Lock()
	defer c.flushMu.Unlock()
	if c.closed || c.lost {
		return
	}
	c.mu.Lock()
	dirty := c.dirty
	snap := c.bits.Snapshot()
	c.dirty = false
	c.mu.Unlock()
	if !dirty {
		return
	}
	err := unix.Fdatasync(int(c.file.Fd()))
	if err == nil {
		err = c.m.WriteBits(c.mapFile, snap)
	} else if bits, rerr := lazy.ReadBits(c.mapFile, c.m); rerr == nil {
		// What was written may be lost, and the disk says so only once: it is fetched
		// again, and not noted the next time.
		c.mu.Lock()
		c.bits = bits
		c.mu.Unlock()
	} else {
		c.lost = true
	}
	if err != nil {
		log.Warn("what has come of a lazy image was not noted", "chain", c.id, "err", err)
	}
}

// state is what there is to tell, but for who has it open.
func (c *chain) state() lazy.State {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := c.stats
	st.ID, st.Total, st.Here, st.Complete = c.id, c.m.Total, c.bits.Here, c.bits.All()
	return st
}

// logEvery bounds how often one chain's failures are logged: programs try again and
// again, and the log lies in memory.
const logEvery = time.Second

// failed notes why a read failed. It tells whether to log it.
func (c *chain) failed(err error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.Failed++
	c.stats.Err, c.stats.At = err.Error(), time.Now().UTC()
	log := time.Since(c.logged) > logEvery
	if log {
		c.logged = time.Now()
	}
	return log
}

// here tells whether all between start and end is here.
func (c *chain) here(start, end int64) bool {
	from, to := c.m.Find(start, end)
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := from; i < to; i++ {
		if !c.bits.Has(i) {
			return false
		}
	}
	return true
}

// come waits until what is between start and end has come. It returns the chunks that
// the disk could not take; for read.
func (c *chain) come(ctx context.Context, start, end int64) (unkept []wait, err error) {
	for _, w := range c.need(start, end) {
		select {
		case <-w.f.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if w.f.err != nil {
			return nil, w.f.err
		}
		if w.f.bytes != nil {
			unkept = append(unkept, w)
		}
	}
	return unkept, nil
}

// read reads from the file what has come, and what the disk could not take.
func (c *chain) read(b []byte, off int64, unkept []wait) error {
	if n, err := c.file.ReadAt(b, off); n < len(b) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	for _, w := range unkept {
		at := c.m.Chunks[w.chunk].At
		if at >= off {
			copy(b[at-off:], w.f.bytes)
		} else {
			copy(b, w.f.bytes[off-at:])
		}
	}
	return nil
}

// wait is for a chunk that a reader needs.
type wait struct {
	chunk int
	f     *flight
}

// need sees to it that the chunks between start and end come, and returns those that
// are on their way.
func (c *chain) need(start, end int64) []wait {
	from, to := c.m.Find(start, end)
	c.mu.Lock()
	defer c.mu.Unlock()
	var waits []wait
	var missing []int
	for i := from; i < to; i++ {
		if c.bits.Has(i) {
			continue
		}
		f := c.flights[i]
		if f == nil {
			f = c.takeOffLocked(i)
			missing = append(missing, i)
		}
		waits = append(waits, wait{i, f})
	}
	missing = c.widenLocked(missing)
	if ahead := c.aheadLocked(from, to); ahead >= 0 {
		c.takeOffLocked(ahead)
		missing = append(missing, ahead)
	}
	for _, g := range c.groups(missing) {
		c.s.wg.Add(1)
		go func() {
			defer c.s.wg.Done()
			c.fetch(g)
		}()
	}
	return waits
}

func (c *chain) takeOffLocked(i int) *flight {
	f := &flight{done: make(chan struct{})}
	c.flights[i] = f
	return f
}

// wide is up to how much is fetched at once when little was asked for: many small
// files lie together, and a request costs more than they do. Compressed bytes.
const wide = 128 << 10

// widenLocked adds what follows in the blob, if little is fetched.
func (c *chain) widenLocked(missing []int) []int {
	if len(missing) == 0 {
		return missing
	}
	total := int64(0)
	for _, i := range missing {
		total += int64(c.m.Chunks[i].Len)
	}
	for last := missing[len(missing)-1]; last+1 < len(c.m.Chunks); last++ {
		a, b := &c.m.Chunks[last], &c.m.Chunks[last+1]
		if total += int64(b.Len); total > wide || !follows(a, b) || c.bits.Has(last+1) || c.flights[last+1] != nil {
			break
		}
		c.takeOffLocked(last + 1)
		missing = append(missing, last+1)
	}
	return missing
}

// large is a chunk's size from which on a reader of consecutive ones is met halfway.
const large = 1 << 20

// aheadLocked returns the chunk that a sequential reader will want next; -1: none.
func (c *chain) aheadLocked(from, to int) int {
	if from >= to {
		return -1
	}
	i := to - 1
	if i == 0 || i+1 >= len(c.m.Chunks) {
		return -1
	}
	before, at, next := &c.m.Chunks[i-1], &c.m.Chunks[i], &c.m.Chunks[i+1]
	if at.Size < large || before.End() != at.At || at.End() != next.At || !follows(before, at) || !follows(at, next) ||
		!c.bits.Has(i-1) || c.bits.Has(i+1) || c.flights[i+1] != nil {
		return -1
	}
	return i + 1
}

const (
	// gap is what lies between two chunks at most for them to come in one request.
	gap = 32 << 10
	// most is what one request asks for, unless one chunk is larger.
	most = 8 << 20
)

// follows tells whether b comes behind a in the same blob, with little between.
func follows(a, b *lazy.Chunk) bool {
	if a.Layer != b.Layer {
		return false
	}
	if a.Offset == b.Offset {
		return uint64(b.Inner) >= uint64(a.Inner)+uint64(a.Size) && a.Len == b.Len
	}
	d := b.Offset - (a.Offset + int64(a.Len))
	return d >= 0 && d <= gap
}

// groups divides chunks into those that come with one request.
func (c *chain) groups(chunks []int) [][]int {
	var out [][]int
	for n, i := range chunks {
		if n > 0 {
			g := out[len(out)-1]
			first, last, at := &c.m.Chunks[g[0]], &c.m.Chunks[g[len(g)-1]], &c.m.Chunks[i]
			if follows(last, at) && at.Offset+int64(at.Len)-first.Offset <= most {
				out[len(out)-1] = append(g, i)
				continue
			}
		}
		out = append(out, []int{i})
	}
	return out
}
