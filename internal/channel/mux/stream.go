package mux

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"tenon.dev/tenon/internal/channel"
)

// stream is one stream's end.
//
// Lock order: rlock or wlock before mu; no lock of the session is taken under
// mu.
type stream struct {
	s        *Session
	id       uint32
	incoming bool

	rlock, wlock sync.Mutex    // one reader, one writer at a time
	readable     chan struct{} // something changed for the reader
	writable     chan struct{} // … for the writer
	rdead, wdead deadline

	mu     sync.Mutex
	chunks [][]byte // received, unread
	unread int
	taken  int // read since the last credit was given
	send   int // bytes that may be sent
	fin    bool
	gone   bool
	closed bool // here
	ended  bool // written to the end here
	err    error
}

var _ channel.Conn = (*stream)(nil)

func newStream(s *Session, id uint32, incoming bool) *stream {
	st := &stream{s: s, id: id, incoming: incoming, send: Window, readable: make(chan struct{}, 1), writable: make(chan struct{}, 1)}
	st.rdead.c, st.wdead.c = make(chan struct{}), make(chan struct{})
	return st
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// smallChunk is what tiny frames are gathered in, bytes.
const smallChunk = 4096

// data takes received bytes.
func (st *stream) data(b []byte) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.fin || st.unread+st.taken+len(b) > Window {
		return fmt.Errorf("%w: stream %d has sent too much", ErrProtocol, st.id)
	}
	if len(b) == 0 || st.closed {
		return nil
	}
	st.unread += len(b)
	signal(st.readable)
	if n := len(st.chunks) - 1; n >= 0 && len(b) < smallChunk/8 { // many tiny frames cost no more than their bytes
		if last := st.chunks[n]; cap(last)-len(last) >= len(b) {
			st.chunks[n] = append(last, b...)
			return nil
		}
		b = append(make([]byte, 0, smallChunk), b...)
	}
	st.chunks = append(st.chunks, b)
	return nil
}

// credit takes the peer's word for what was read.
func (st *stream) credit(n uint32) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if int64(st.send)+int64(n) > Window {
		return fmt.Errorf("%w: stream %d is given credit for what was not sent", ErrProtocol, st.id)
	}
	st.send += int(n)
	signal(st.writable)
	return nil
}

// end notes that the peer writes no more, or is gone altogether.
func (st *stream) end(gone bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.fin = true
	st.gone = st.gone || gone
	signal(st.readable)
	signal(st.writable)
}

// fail ends the stream with its session.
func (st *stream) fail(err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.err == nil {
		st.err = err
	}
	signal(st.readable)
	signal(st.writable)
}

// Read reads what has come. What came before the peer's end, or the session's,
// can still be read.
func (st *stream) Read(b []byte) (int, error) {
	st.rlock.Lock()
	defer st.rlock.Unlock()
	for {
		n, credit, err := st.take(b)
		if credit > 0 {
			st.s.enqueue(kindCredit, st.id, binary.BigEndian.AppendUint32(nil, uint32(credit)))
		}
		if n > 0 || err != nil || len(b) == 0 {
			return n, err
		}
		select {
		case <-st.readable:
		case <-st.rdead.wait():
			return 0, os.ErrDeadlineExceeded
		}
	}
}

// take copies what there is, and says how much credit is to be given.
func (st *stream) take(b []byte) (n, credit int, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return 0, 0, net.ErrClosed
	}
	if st.rdead.passed() {
		return 0, 0, os.ErrDeadlineExceeded
	}
	for len(st.chunks) > 0 && n < len(b) {
		m := copy(b[n:], st.chunks[0])
		n += m
		if st.chunks[0] = st.chunks[0][m:]; len(st.chunks[0]) == 0 {
			st.chunks[0] = nil
			st.chunks = st.chunks[1:]
		}
	}
	if len(st.chunks) == 0 {
		st.chunks = nil
	}
	st.unread -= n
	st.taken += n
	if n > 0 {
		if st.taken >= Window/2 && !st.fin {
			credit, st.taken = st.taken, 0
		}
		return n, credit, nil
	}
	switch {
	case st.fin:
		return 0, 0, io.EOF
	case st.err != nil:
		return 0, 0, st.err
	}
	return 0, 0, nil
}

// Write sends b, waiting for credit. A peer that is gone is EPIPE.
func (st *stream) Write(b []byte) (int, error) {
	st.wlock.Lock()
	defer st.wlock.Unlock()
	sent := 0
	for {
		n, err := st.reserve(len(b) - sent)
		if err != nil {
			return sent, err
		}
		if n > 0 {
			if err := st.s.write(kindData, st.id, b[sent:sent+n]); err != nil {
				return sent, err
			}
			sent += n
		}
		if sent == len(b) {
			return sent, nil
		}
		if n > 0 {
			continue
		}
		select {
		case <-st.writable:
		case <-st.wdead.wait():
			return sent, os.ErrDeadlineExceeded
		}
	}
}

// reserve takes credit for one frame of at most want bytes.
func (st *stream) reserve(want int) (int, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.closed:
		return 0, net.ErrClosed
	case st.gone || st.ended:
		return 0, syscall.EPIPE
	case st.err != nil:
		return 0, st.err
	case st.wdead.passed():
		return 0, os.ErrDeadlineExceeded
	}
	n := min(want, st.send, MaxPayload)
	st.send -= n
	return n, nil
}

// CloseWrite tells the peer that no more bytes come.
func (st *stream) CloseWrite() error {
	st.wlock.Lock()
	defer st.wlock.Unlock()
	st.mu.Lock()
	if st.closed || st.ended || st.err != nil {
		st.mu.Unlock()
		return nil
	}
	st.ended = true
	gone := st.gone
	st.mu.Unlock()
	if gone {
		return nil
	}
	return st.s.write(kindFin, st.id, nil)
}

// Close ends both halves. What was written before still arrives.
func (st *stream) Close() error {
	st.mu.Lock()
	if st.closed {
		st.mu.Unlock()
		return nil
	}
	st.closed = true
	st.chunks, st.unread = nil, 0
	tell := st.err == nil && !st.gone
	signal(st.readable)
	signal(st.writable)
	st.mu.Unlock()
	st.s.forget(st)
	st.rdead.set(time.Time{})
	st.wdead.set(time.Time{})
	if !tell {
		return nil
	}
	if !st.wlock.TryLock() { // a Write that has its credit goes first, however long the pipe takes
		go func() {
			st.wlock.Lock()
			defer st.wlock.Unlock()
			st.s.enqueue(kindGone, st.id, nil)
		}()
		return nil
	}
	defer st.wlock.Unlock()
	st.s.enqueue(kindGone, st.id, nil)
	return nil
}

func (st *stream) LocalAddr() net.Addr  { return addr{} }
func (st *stream) RemoteAddr() net.Addr { return addr{} }

func (st *stream) SetDeadline(t time.Time) error {
	st.rdead.set(t)
	st.wdead.set(t)
	return nil
}

func (st *stream) SetReadDeadline(t time.Time) error {
	st.rdead.set(t)
	return nil
}

func (st *stream) SetWriteDeadline(t time.Time) error {
	st.wdead.set(t)
	return nil
}

// deadline is a channel that is closed at a time that can be moved.
type deadline struct {
	mu    sync.Mutex
	c     chan struct{}
	moved int // times: a timer that comes too late does nothing
}

// set moves the deadline; the zero time is never.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.moved++
	select {
	case <-d.c:
		d.c = make(chan struct{})
	default:
	}
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		close(d.c)
		return
	}
	moved := d.moved
	time.AfterFunc(wait, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.moved == moved {
			close(d.c)
		}
	})
}

// wait is closed when the deadline has passed.
func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.c
}

func (d *deadline) passed() bool {
	select {
	case <-d.wait():
		return true
	default:
		return false
	}
}
