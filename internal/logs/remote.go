package logs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Sink is where a process's output is kept: a Writer, or a Remote whose Writer
// is on another kernel. It is safe for concurrent use.
type Sink interface {
	// Stream returns one output stream's way into the log.
	Stream(Source) *Stream
	// Sync returns when everything written before is in the file.
	Sync()
	// Close ends the log, after what was written before.
	Close() error
}

var (
	_ Sink = (*Writer)(nil)
	_ Sink = (*Remote)(nil)
)

// The frames between a Remote and Receive: kind (1), source (1), length (4,
// big-endian), bytes. A sync is answered by one zero byte.
const (
	frameData = iota
	frameEnd  // of a source
	frameSync

	frameHead = 6
	maxFrame  = 64 << 10
)

// syncTime bounds the waiting for the other side's answer.
const syncTime = 10 * time.Second

// Remote sends output over a connection to the side that keeps it (Receive).
// A slow keeper slows the writers: nothing is dropped while the connection
// lives.
type Remote struct {
	c       net.Conn
	onError func(error)

	mu     sync.Mutex
	buf    []byte
	closed bool
	failed time.Time
}

// NewRemote returns a Remote that owns c. onError is told, at most every ten
// seconds, of output that could not be kept.
func NewRemote(c net.Conn, onError func(error)) *Remote { return &Remote{c: c, onError: onError} }

// Stream returns a stream that is sent as it comes; the keeper finds its lines.
func (r *Remote) Stream(source Source) *Stream { return &Stream{remote: r, source: source} }

func (r *Remote) send(kind byte, source Source, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		n := min(len(p), maxFrame)
		if r.closed || r.frameLocked(kind, source, p[:n]) != nil {
			return
		}
		if p = p[n:]; len(p) == 0 {
			return
		}
	}
}

func (r *Remote) frameLocked(kind byte, source Source, p []byte) error {
	r.buf = append(r.buf[:0], kind, byte(source))
	r.buf = binary.BigEndian.AppendUint32(r.buf, uint32(len(p)))
	r.buf = append(r.buf, p...)
	_, err := r.c.Write(r.buf)
	if cap(r.buf) > 4096 {
		r.buf = nil // an idle log holds no buffer
	}
	if err != nil && r.onError != nil && time.Since(r.failed) >= errorInterval {
		r.failed = time.Now()
		r.onError(err)
	}
	return err
}

// Sync waits until the keeper has everything, or is gone.
func (r *Remote) Sync() {
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.syncLocked() // its failure is the next write's
}

func (r *Remote) syncLocked() error {
	if r.closed {
		return nil
	}
	if err := r.frameLocked(frameSync, 0, nil); err != nil {
		return err
	}
	if err := r.c.SetReadDeadline(time.Now().Add(syncTime)); err != nil {
		return err
	}
	var b [1]byte
	_, err := io.ReadFull(r.c, b[:])
	return err
}

// Close waits until the keeper has everything and ends the connection.
func (r *Remote) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	err := r.syncLocked()
	r.closed = true
	return errors.Join(err, r.c.Close())
}

// Receive keeps in w what a Remote sends over c, until it ends. What comes is
// not trusted. It closes neither. With w nil, it is discarded.
func Receive(c io.ReadWriter, w *Writer) error {
	streams := map[Source]*Stream{Stdout: w.Stream(Stdout), Stderr: w.Stream(Stderr)}
	defer func() {
		for _, s := range streams {
			s.Close()
		}
	}()
	r := bufio.NewReaderSize(c, 4096)
	var buf []byte
	for {
		var h [frameHead]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			if err == io.EOF {
				return nil
			}
			return fmt.Errorf("log stream: %w", err)
		}
		n := binary.BigEndian.Uint32(h[2:])
		s := streams[Source(h[1])]
		switch {
		case h[0] == frameSync && n == 0:
			if w != nil {
				w.Sync()
			}
			if _, err := c.Write([]byte{0}); err != nil {
				return fmt.Errorf("log stream: %w", err)
			}
			continue
		case h[0] == frameEnd && n == 0 && s != nil:
			s.Close()
			continue
		case h[0] != frameData || n > maxFrame || s == nil:
			return fmt.Errorf("log stream: bad frame %x", h)
		}
		if int(n) > cap(buf) {
			buf = make([]byte, n)
		}
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return fmt.Errorf("log stream: %w", err)
		}
		s.Write(buf[:n])
		if cap(buf) > 4096 {
			buf = nil
		}
	}
}
