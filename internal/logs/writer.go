package logs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// flushSize bounds what is encoded before it is written.
const flushSize = 128 << 10

// encodeBuffers are used while something is written, never kept by a Writer.
var encodeBuffers = sync.Pool{New: func() any {
	b := make([]byte, 0, flushSize+2*MaxLine)
	return &b
}}

// Writer appends to a log. It holds no buffer while nothing is written. It is
// safe for concurrent use; only one Writer may have a log open.
type Writer struct {
	conf    Config
	onError func(error)

	mu     sync.Mutex
	f      *os.File // nil until there is something in it
	size   int64
	seq    uint64 // of the last rotated file
	lineID uint64
	enc    *encoder
	failed time.Time // when onError was last called
	packs  sync.WaitGroup
	closed bool
}

// errorInterval is the least time between two reports of failed writes.
const errorInterval = 10 * time.Second

// Open opens a log for appending; one that is not there is created when there is
// something to write, in a directory that must be there. A torn record at its end
// is cut off. onError, if not nil, is told of output that could not be
// kept, at most every ten seconds.
func Open(c Config, onError func(error)) (*Writer, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	enc, err := newEncoder(c.Driver, c.Attrs)
	if err != nil {
		return nil, fmt.Errorf("log %s: %w", c.Path, err)
	}
	w := &Writer{conf: c, onError: onError, enc: enc}
	if w.conf.MaxFiles < 1 {
		w.conf.MaxFiles = 1
	}
	if w.f, err = openAppend(c.Path, 0); err == nil {
		if w.size, err = mend(w.f, c.Driver); err != nil {
			w.f.Close()
			return nil, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if c.MaxSize > 0 || w.f == nil {
		list, err := listRotated(c.Path)
		if err != nil {
			if w.f != nil {
				w.f.Close()
			}
			return nil, err
		}
		if n := len(list); n > 0 {
			w.seq = list[n-1].seq
		}
	}
	return w, nil
}

func openAppend(path string, create int) (*os.File, error) {
	return os.OpenFile(path, create|os.O_RDWR|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
}

// mend cuts off a torn last record and returns the size.
func mend(f *os.File, driver string) (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !st.Mode().IsRegular() {
		return 0, &os.PathError{Op: "open log", Path: f.Name(), Err: errors.New("not a regular file")}
	}
	size := st.Size()
	if size == 0 {
		return 0, nil
	}
	good, err := lastGood(f, size, driver)
	if err != nil {
		return 0, err
	}
	if good != size {
		if err := f.Truncate(good); err != nil {
			return 0, err
		}
	}
	return good, nil
}

// lastGood returns where the last whole record ends.
func lastGood(f io.ReaderAt, size int64, driver string) (int64, error) {
	if driver == JSONFile {
		return lastNewline(f, size)
	}
	var b [4]byte
	if size >= 8 {
		if _, err := f.ReadAt(b[:], size-4); err != nil {
			return 0, err
		}
		n := int64(binary.BigEndian.Uint32(b[:]))
		if n <= maxRecord && n+8 <= size {
			if _, err := f.ReadAt(b[:], size-8-n); err != nil {
				return 0, err
			}
			if int64(binary.BigEndian.Uint32(b[:])) == n {
				return size, nil
			}
		}
	}
	// Torn: walk from the start.
	var off int64
	r := bufReaderAt{f: f, size: size}
	for {
		n, err := r.uint32(off)
		if err != nil || int64(n) > maxRecord {
			return off, ignoreEOF(err)
		}
		m, err := r.uint32(off + 4 + int64(n))
		if err != nil || m != n {
			return off, ignoreEOF(err)
		}
		off += 8 + int64(n)
	}
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// bufReaderAt reads small pieces that mostly go forward.
type bufReaderAt struct {
	f    io.ReaderAt
	size int64
	buf  []byte
	at   int64
}

func (r *bufReaderAt) uint32(off int64) (uint32, error) {
	if off+4 > r.size {
		return 0, io.EOF
	}
	if r.buf == nil || off < r.at || off+4 > r.at+int64(len(r.buf)) {
		n := min(int64(64<<10), r.size-off)
		if int64(cap(r.buf)) < n {
			r.buf = make([]byte, n)
		}
		r.buf = r.buf[:n]
		m, err := r.f.ReadAt(r.buf, off)
		if m < 4 {
			if err == nil {
				err = io.EOF
			}
			return 0, err
		}
		r.buf, r.at = r.buf[:m], off
	}
	return binary.BigEndian.Uint32(r.buf[off-r.at:]), nil
}

func lastNewline(f io.ReaderAt, size int64) (int64, error) {
	buf := make([]byte, 4096)
	for end := size; end > 0; {
		n := min(int64(len(buf)), end)
		if _, err := f.ReadAt(buf[:n], end-n); err != nil {
			return 0, err
		}
		if i := bytes.LastIndexByte(buf[:n], '\n'); i >= 0 {
			return end - n + int64(i) + 1, nil
		}
		end -= n
	}
	return 0, nil
}

// Stream is one of a process's output streams, on its way into the log. Its
// methods are for one goroutine.
type Stream struct {
	w      *Writer
	remote *Remote // instead of w
	source Source
	tail   []byte // of a line whose end has not come; at most MaxLine
	part   partial
}

// Stream returns a stream that writes to w. With w nil, it discards.
func (w *Writer) Stream(source Source) *Stream { return &Stream{w: w, source: source} }

// Write keeps the whole lines of p and remembers the rest. All that one call
// keeps has one time and goes to the file in as few writes as possible.
// Failures are told to onError; the stream goes on.
func (s *Stream) Write(p []byte) {
	if s.remote != nil && len(p) > 0 {
		s.remote.send(frameData, s.source, p)
		return
	}
	if s.w == nil || len(p) == 0 {
		return
	}
	if len(s.tail)+len(p) < MaxLine && bytes.IndexByte(p, '\n') < 0 {
		s.tail = append(s.tail, p...)
		return
	}
	w := s.w
	w.mu.Lock()
	defer w.mu.Unlock()
	b := w.beginLocked(s.source)
	for len(p) > 0 {
		i := bytes.IndexByte(p, '\n')
		room := MaxLine - len(s.tail)
		if i < 0 && len(p) < room {
			s.tail = append(s.tail, p...)
			break
		}
		var line []byte
		whole := i >= 0 && i <= room
		if whole {
			line, p = p[:i], p[i+1:]
		} else {
			line, p = p[:room], p[room:]
		}
		if len(s.tail) > 0 {
			line = append(s.tail, line...)
			s.tail = nil
		}
		*b = w.enc.record(*b, line, s.next(whole))
		w.flushLocked(b, false)
	}
	w.flushLocked(b, true)
}

// next moves on in the line and returns the piece's place.
func (s *Stream) next(last bool) partial {
	if s.part.id == 0 {
		if last {
			return partial{}
		}
		s.w.lineID++
		s.part.id = uint64(time.Now().UnixNano()) + s.w.lineID
	}
	s.part.ordinal++
	p := s.part
	p.last = last
	if last {
		s.part = partial{}
	}
	return p
}

// Close keeps what is left of an unfinished line, flagged as partial: there is
// no newline to give back.
func (s *Stream) Close() {
	if s.remote != nil {
		s.remote.send(frameEnd, s.source, nil)
		return
	}
	if s.w == nil || len(s.tail) == 0 {
		return
	}
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	b := s.w.beginLocked(s.source)
	*b = s.w.enc.record(*b, s.tail, s.next(false))
	s.tail = nil
	s.w.flushLocked(b, true)
}

func (w *Writer) beginLocked(source Source) *[]byte {
	w.enc.begin(source, time.Now())
	b := encodeBuffers.Get().(*[]byte)
	*b = (*b)[:0]
	return b
}

// flushLocked writes what is encoded, if it is much, or a file's fill, or all.
func (w *Writer) flushLocked(b *[]byte, all bool) {
	full := w.conf.MaxSize > 0 && w.size+int64(len(*b)) >= w.conf.MaxSize
	if all || full || len(*b) >= flushSize {
		w.writeLocked(*b)
		*b = (*b)[:0]
	}
	if w.conf.MaxSize > 0 && w.size >= w.conf.MaxSize {
		if err := w.rotateLocked(); err != nil {
			w.report(fmt.Errorf("log %s: rotate: %w", w.conf.Path, err))
		}
	}
	if all {
		encodeBuffers.Put(b)
	}
}

func (w *Writer) writeLocked(b []byte) {
	if len(b) == 0 {
		return
	}
	if w.closed {
		return
	}
	if w.f == nil {
		f, err := openAppend(w.conf.Path, os.O_CREATE)
		if err != nil {
			w.report(err)
			return
		}
		w.f = f
	}
	n, err := w.f.Write(b)
	if err != nil {
		if n > 0 {
			// A torn record in the middle would hide all that follow.
			if terr := w.f.Truncate(w.size); terr != nil {
				err = errors.Join(err, terr)
			}
		}
		w.report(err)
		return
	}
	w.size += int64(n)
}

func (w *Writer) report(err error) {
	if w.onError == nil || time.Since(w.failed) < errorInterval {
		return
	}
	w.failed = time.Now()
	w.onError(err)
}

// Sync returns when everything written before is in the file.
func (w *Writer) Sync() {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
}

// Close closes the file. Streams that are still open discard from now on;
// compression goes on by itself.
func (w *Writer) Close() error {
	if w == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	w.closed = true
	if w.f == nil {
		return nil
	}
	return w.f.Close()
}
