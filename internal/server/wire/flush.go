package wire

import (
	"bufio"
	"net/http"
	"sync"
	"time"
)

// flushDelay is how long output may wait in a Stream for more of it.
const flushDelay = 2 * time.Millisecond

// streamBuffer is how much a Stream collects at most, in bytes.
const streamBuffer = 64 << 10

// Stream is the body of an answer that is produced over time. What is written
// reaches the client at once if nothing was written for a while, and else in
// batches within a few milliseconds: a million lines don't cost a million
// flushes. The header is sent with the first byte, or by Start. Safe for
// concurrent use. Close must be called.
type Stream struct {
	mu     sync.Mutex
	w      http.ResponseWriter
	rc     *http.ResponseController
	ct     string
	buf    *bufio.Writer
	timer  *time.Timer
	last   time.Time
	live   bool
	armed  bool // the timer will flush
	began  bool
	closed bool
	err    error
}

// NewStream returns a stream over w with the given content type. live streams
// are flushed as described; others only when their buffer is full.
func NewStream(w http.ResponseWriter, contentType string, live bool) *Stream {
	s := &Stream{w: w, rc: http.NewResponseController(w), ct: contentType, live: live}
	s.buf = bufio.NewWriterSize(w, streamBuffer)
	return s
}

func (s *Stream) beginLocked() {
	if s.began {
		return
	}
	s.began = true
	s.w.Header().Set("Content-Type", s.ct)
	s.w.WriteHeader(http.StatusOK)
}

// StartWithin sends the header after d if nothing has been sent by then.
func (s *Stream) StartWithin(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.began && !s.closed {
		s.armLocked(d)
	}
}

// armLocked makes tick run in d.
func (s *Stream) armLocked(d time.Duration) {
	s.armed = true
	if s.timer == nil {
		s.timer = time.AfterFunc(d, s.tick)
		return
	}
	s.timer.Reset(d)
}

func (s *Stream) tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.beginLocked()
	s.flushLocked()
}

func (s *Stream) flushLocked() {
	if s.err != nil {
		return
	}
	s.armed = false
	if s.err = s.buf.Flush(); s.err == nil {
		s.err = s.rc.Flush()
	}
	s.last = time.Now()
}

// Write implements io.Writer.
func (s *Stream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, s.err
	}
	s.beginLocked()
	n, err := s.buf.Write(p)
	if err != nil {
		s.err = err
		return n, err
	}
	if s.live {
		if time.Since(s.last) > flushDelay {
			s.flushLocked()
		} else if !s.armed {
			s.armLocked(flushDelay)
		}
	}
	return n, s.err
}

// Began tells whether the header has been sent.
func (s *Stream) Began() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.began
}

// Close sends what is left. With start the header is sent even if nothing was
// written.
func (s *Stream) Close(start bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	if s.timer != nil {
		s.timer.Stop()
	}
	if start {
		s.beginLocked()
	}
	if s.began && s.err == nil {
		s.err = s.buf.Flush()
	}
}
