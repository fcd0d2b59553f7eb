package serve

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
)

const (
	// A registry that was not reached is asked once only for a while, and must answer
	// soon (a small part of the time that reads have): the kernel makes several reads
	// of one that failed, one after the other.
	downTime   = 15 * time.Second
	downPart   = 16
	firstDelay = 100 * time.Millisecond
	lastDelay  = 3 * time.Second
	// drain is what is read of an answer that is no longer needed, in bytes.
	drain = 64 << 10
	// mismatches is how often what comes may be wrong: a mirror's may be, where the
	// registry's is right.
	mismatches = 3
)

// errWrong says that something else came than the table of contents promises.
var errWrong = fmt.Errorf("what came is not what the image's table of contents promises: %w", errdefs.ErrDataLoss)

// fetch brings a group of chunks, which lie together, and ends their flights.
func (c *chain) fetch(group []int) {
	total := c.s.o.ReadTime * 19 / 20 // less than a read waits
	ctx, cancel := context.WithTimeoutCause(c.s.ctx, total, fmt.Errorf("it did not come in %v: %w", total, errdefs.ErrUnavailable))
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var size int64
	for _, i := range group {
		ch := &c.m.Chunks[i]
		size = max(size, int64(ch.Size)) + int64(ch.Inner)/16
	}
	size = min(size, memory)
	err := c.slots.Acquire(ctx, 1)
	if err == nil {
		defer c.slots.Release(1)
		if err = c.s.memory.Acquire(ctx, size); err == nil {
			defer c.s.memory.Release(size)
		}
	}
	if err != nil {
		c.land(group, fmt.Errorf("too much is fetched at a time: %w", context.Cause(ctx)))
		return
	}
	c.mu.Lock()
	once := time.Since(c.down) < downTime
	c.mu.Unlock()
	stall := c.s.o.StallTime
	if once {
		stall /= downPart
	}
	alive := time.AfterFunc(stall, func() {
		stop(fmt.Errorf("the registry sent nothing for %v: %w", stall, errdefs.ErrUnavailable))
	})
	defer alive.Stop()
	progress := func() { alive.Reset(stall) }
	wrong := 0
	for try, delay := 0, firstDelay; ; try, delay = try+1, min(2*delay, lastDelay) {
		var n int
		n, err = c.attempt(ctx, group, wrong, progress)
		group = group[n:]
		if len(group) == 0 {
			c.mu.Lock()
			c.down = time.Time{}
			c.mu.Unlock()
			return
		}
		if errors.Is(err, errWrong) {
			wrong++
		}
		if n > 0 {
			delay, once = firstDelay, false
		}
		if ctx.Err() != nil || once || wrong == mismatches || final(err) {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(delay):
		}
	}
	if ctx.Err() != nil && c.s.ctx.Err() == nil && !errors.Is(err, errWrong) {
		err = fmt.Errorf("%w (at last: %w)", context.Cause(ctx), err)
	}
	if errdefs.IsUnavailable(err) {
		c.mu.Lock()
		c.down = time.Now()
		c.mu.Unlock()
	}
	c.land(group, err)
}

// final tells whether trying again is of no use.
func final(err error) bool {
	return !errdefs.IsUnavailable(err) && (errdefs.IsNotFound(err) || errdefs.IsPermissionDenied(err) || errdefs.IsFailedPrecondition(err) || errdefs.IsInvalidArgument(err))
}

// land ends the flights of chunks that do not come.
func (c *chain) land(group []int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, i := range group {
		f := c.flights[i]
		delete(c.flights, i)
		f.err = err
		close(f.done)
	}
}

// attempt fetches a group with one request. It returns how many chunks have come.
func (c *chain) attempt(ctx context.Context, group []int, skip int, progress func()) (came int, err error) {
	first, last := &c.m.Chunks[group[0]], &c.m.Chunks[group[len(group)-1]]
	c.mu.Lock()
	repo := c.repo
	c.stats.Requests++
	c.mu.Unlock()
	body, err := repo.Range(ctx, c.blobs[first.Layer].Digest, first.Offset, last.Offset+int64(last.Len)-first.Offset, skip)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	in := &counted{c: c, r: body, progress: progress}
	pos := first.Offset
	for came < len(group) {
		// All chunks of one gzip member.
		at := c.m.Chunks[group[came]]
		n := 1
		for came+n < len(group) && c.m.Chunks[group[came+n]].Offset == at.Offset {
			n++
		}
		if _, err := io.CopyN(io.Discard, in, at.Offset-pos); err != nil {
			return came, late(ctx, err)
		}
		member := &io.LimitedReader{R: in, N: int64(at.Len)}
		n, err := c.member(ctx, bufio.NewReaderSize(member, 64<<10), group[came:came+n])
		came += n
		if err != nil {
			return came, late(ctx, err)
		}
		if came < len(group) {
			if _, err := io.Copy(io.Discard, member); err != nil {
				return came, late(ctx, err)
			}
		}
		pos = at.Offset + int64(at.Len)
	}
	// What is behind the last chunk (headers of the next files), so that the connection
	// is used again.
	_, _ = io.CopyN(io.Discard, in, drain)
	return came, nil
}

// late is why reading a body failed, as a class: it may go better later.
func late(ctx context.Context, err error) error {
	if errors.Is(err, errWrong) {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("registry: %w: %w", err, errdefs.ErrUnavailable)
}

// wrongOr tells a damaged stream from one that broke off.
func wrongOr(in *bufio.Reader, err error) error {
	if _, perr := in.Peek(1); perr != nil && !errors.Is(perr, io.EOF) {
		return perr
	}
	return fmt.Errorf("%w (%w)", errWrong, err)
}

// member reads the chunks in a gzip member, verifies and keeps them.
func (c *chain) member(ctx context.Context, in *bufio.Reader, chunks []int) (came int, err error) {
	z, err := gzip.NewReader(in)
	if err != nil {
		return 0, wrongOr(in, err)
	}
	defer z.Close()
	z.Multistream(false)
	pos := int64(0)
	for _, i := range chunks {
		ch := &c.m.Chunks[i]
		if _, err := io.CopyN(io.Discard, z, int64(ch.Inner)-pos); err != nil {
			return came, wrongOr(in, err)
		}
		b := make([]byte, ch.Size)
		if _, err := io.ReadFull(z, b); err != nil {
			return came, wrongOr(in, err)
		}
		pos = int64(ch.Inner) + int64(ch.Size)
		if sha256.Sum256(b) != ch.Sum {
			return came, errWrong
		}
		c.keep(i, b)
		came++
		if ctx.Err() != nil {
			return came, context.Cause(ctx)
		}
	}
	return came, nil
}

// keep writes a verified chunk into the file, and ends its flight. If the disk cannot
// take it, those who wait get it all the same.
func (c *chain) keep(i int, b []byte) {
	_, err := c.file.WriteAt(b, c.m.Chunks[i].At)
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.flights[i]
	delete(c.flights, i)
	if err != nil {
		f.bytes = b
		c.stats.Err, c.stats.At = fmt.Sprintf("not kept: %v", err), time.Now().UTC()
	} else {
		c.bits.Set(i)
		c.dirty = true
		select {
		case c.s.dirty <- struct{}{}:
		default:
		}
	}
	close(f.done)
}

// counted counts what comes.
type counted struct {
	c        *chain
	r        io.Reader
	progress func()
}

func (r *counted) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if n > 0 {
		r.progress()
	}
	r.c.mu.Lock()
	r.c.stats.Fetched += int64(n)
	r.c.mu.Unlock()
	return n, err
}
