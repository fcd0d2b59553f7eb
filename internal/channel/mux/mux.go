// Package mux carries many streams over one byte pipe: the virtio port of a
// virtual machine, on which the daemon's side and the guest's shim speak.
//
// A frame is a header of eight bytes and a payload of at most MaxPayload:
//
//	kind (1)  zero (1)  payload's length (2)  stream (4)     big-endian
//
//	open    a new stream; the host's numbers are even, the guest's odd
//	data    bytes of a stream
//	credit  the receiver has taken n more bytes (4 bytes)
//	fin     the sender writes no more
//	gone    the sender neither reads nor writes any more
//	ping    answered by pong with the same 8 bytes
//
// Flow control is by stream: a sender may have Window bytes under way that the
// receiver's user has not read. So a reader that stalls stops its own stream
// and no other, and memory is bounded by Window times the number of streams.
//
// Streams that were closed leave no state behind, so that a saved and restored
// peer whose streams were all closed goes on with a new session at the other
// end. The peer is not trusted: what breaks the protocol ends the session.
package mux

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"

	"tenon.dev/tenon/internal/channel"
)

const (
	// Window is how many bytes of a stream may be under way, unread.
	Window = 256 << 10
	// MaxPayload is the largest frame's payload.
	MaxPayload = 32 << 10

	headerSize = 8
	backlog    = 256  // streams that were opened by the peer and not yet accepted
	maxAnswers = 4096 // frames that the peer made this end write and that wait for the pipe
)

type kind byte

const (
	kindOpen kind = iota + 1
	kindData
	kindCredit
	kindFin
	kindGone
	kindPing
	kindPong
)

// ErrProtocol is what a session ends with whose peer broke the protocol.
var ErrProtocol = errors.New("mux: protocol error")

// Config says which end a session is.
type Config struct {
	Host bool // the end whose streams have even numbers
	// MaxIncoming bounds the streams that the peer has open. 0: 1024.
	MaxIncoming int
}

// Session is one end. Its methods are safe for concurrent use. It is a
// net.Listener for the streams that the peer opens.
type Session struct {
	rw  io.ReadWriteCloser
	max int

	wmu  sync.Mutex // held while a frame is written
	wbuf []byte

	cmu      sync.Mutex
	controls []byte // frames that wait for the control writer
	answers  int    // of them, that the peer asked for
	wake     chan struct{}

	mu       sync.Mutex
	streams  map[uint32]*stream
	next     uint32
	parity   uint32 // of this end's numbers
	incoming int
	pings    map[uint64]chan struct{}
	nonce    uint64
	err      error

	accept chan *stream
	done   chan struct{}
	wg     sync.WaitGroup
}

var (
	_ net.Listener   = (*Session)(nil)
	_ channel.Dialer = (*Session)(nil)
)

// New starts a session over rw, which it owns from now on.
func New(rw io.ReadWriteCloser, c Config) *Session {
	s := &Session{
		rw: rw, max: c.MaxIncoming, wbuf: make([]byte, 0, headerSize+MaxPayload), wake: make(chan struct{}, 1),
		streams: map[uint32]*stream{}, pings: map[uint64]chan struct{}{},
		accept: make(chan *stream, backlog), done: make(chan struct{}),
	}
	if s.max == 0 {
		s.max = 1024
	}
	if !c.Host {
		s.parity = 1
	}
	// A restored peer may be about to close streams of the session that it was
	// saved in: numbers are not used twice.
	s.next = rand.Uint32()&^1 | s.parity
	s.wg.Add(2)
	go s.read()
	go s.control()
	return s
}

// Dial opens a stream. It does not wait for the peer.
func (s *Session) Dial(ctx context.Context) (channel.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	if s.err != nil {
		defer s.mu.Unlock()
		return nil, s.err
	}
	for s.streams[s.next] != nil {
		s.next += 2
	}
	st := newStream(s, s.next, false)
	s.streams[st.id] = st
	s.next += 2
	s.mu.Unlock()
	if err := s.write(kindOpen, st.id, nil); err != nil {
		return nil, err
	}
	return st, nil
}

// Accept returns the next stream that the peer opened.
func (s *Session) Accept() (net.Conn, error) {
	select {
	case st := <-s.accept:
		return st, nil
	case <-s.done:
		return nil, s.Err()
	}
}

// Addr says what this is.
func (s *Session) Addr() net.Addr { return addr{} }

type addr struct{}

func (addr) Network() string { return "mux" }
func (addr) String() string  { return "mux" }

// Ping returns when the peer has answered.
func (s *Session) Ping(ctx context.Context) error {
	c := make(chan struct{})
	s.mu.Lock()
	s.nonce++
	n := s.nonce
	s.pings[n] = c
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.pings, n)
		s.mu.Unlock()
	}()
	if err := s.write(kindPing, 0, binary.BigEndian.AppendUint64(nil, n)); err != nil {
		return err
	}
	select {
	case <-c:
		return nil
	case <-s.done:
		return s.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err is why the session ended: net.ErrClosed after Close, io.EOF when the pipe
// ended, ErrProtocol. It is nil while it lives.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close ends the session and all its streams and waits for its goroutines.
func (s *Session) Close() error {
	s.fail(net.ErrClosed)
	s.wg.Wait()
	return nil
}

// fail ends the session once.
func (s *Session) fail(err error) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err = err
	streams := s.streams
	s.streams = nil
	s.mu.Unlock()
	close(s.done)
	_ = s.rw.Close() // it is gone either way
	for _, st := range streams {
		st.fail(err)
	}
}

// write writes one frame, in whole.
func (s *Session) write(k kind, id uint32, payload []byte) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.wbuf = append(appendHeader(s.wbuf[:0], k, id, len(payload)), payload...)
	return s.flush(s.wbuf)
}

func (s *Session) flush(b []byte) error {
	select {
	case <-s.done:
		return s.Err()
	default:
	}
	if _, err := s.rw.Write(b); err != nil {
		s.fail(fmt.Errorf("mux: write: %w", err))
		return s.Err()
	}
	return nil
}

func appendHeader(b []byte, k kind, id uint32, n int) []byte {
	b = append(b, byte(k), 0)
	b = binary.BigEndian.AppendUint16(b, uint16(n))
	return binary.BigEndian.AppendUint32(b, id)
}

// enqueue hands a control frame to the control writer: neither the reading
// goroutine nor a stream's reader ever waits for the pipe.
func (s *Session) enqueue(k kind, id uint32, payload []byte) {
	s.cmu.Lock()
	s.controls = append(appendHeader(s.controls, k, id, len(payload)), payload...)
	s.cmu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// answer enqueues what the peer can ask for without end.
func (s *Session) answer(k kind, id uint32, payload []byte) error {
	s.cmu.Lock()
	s.answers++
	over := s.answers > maxAnswers
	s.cmu.Unlock()
	if over {
		return fmt.Errorf("%w: the peer asks for answers and does not read them", ErrProtocol)
	}
	s.enqueue(k, id, payload)
	return nil
}

func (s *Session) control() {
	defer s.wg.Done()
	var b []byte
	for {
		select {
		case <-s.wake:
		case <-s.done:
			return
		}
		s.cmu.Lock()
		b, s.controls = s.controls, b[:0]
		s.answers = 0
		s.cmu.Unlock()
		s.wmu.Lock()
		err := s.flush(b)
		s.wmu.Unlock()
		if err != nil {
			return
		}
		if cap(b) > MaxPayload {
			b = nil
		}
	}
}

// read takes frames from the pipe until it ends.
func (s *Session) read() {
	defer s.wg.Done()
	err := s.frames()
	if err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
		err = io.EOF
	}
	s.fail(err)
	for { // nobody accepts what is left
		select {
		case st := <-s.accept:
			st.Close()
		default:
			return
		}
	}
}

func (s *Session) frames() error {
	r := bufio.NewReaderSize(s.rw, headerSize+MaxPayload) // many small frames are one read
	var h [headerSize]byte
	for {
		if _, err := io.ReadFull(r, h[:]); err != nil {
			return err
		}
		k, n, id := kind(h[0]), int(binary.BigEndian.Uint16(h[2:])), binary.BigEndian.Uint32(h[4:])
		if n > MaxPayload {
			return fmt.Errorf("%w: payload of %d bytes", ErrProtocol, n)
		}
		if want, ok := fixed[k]; h[1] != 0 || k < kindOpen || k > kindPong || ok && n != want {
			return fmt.Errorf("%w: frame %x", ErrProtocol, h)
		}
		var payload []byte
		if n > 0 {
			payload = make([]byte, n)
			if _, err := io.ReadFull(r, payload); err != nil {
				return err
			}
		}
		if err := s.handle(k, id, payload); err != nil {
			return err
		}
	}
}

// fixed are the lengths of payloads that have one.
var fixed = map[kind]int{kindOpen: 0, kindCredit: 4, kindFin: 0, kindGone: 0, kindPing: 8, kindPong: 8}

func (s *Session) handle(k kind, id uint32, payload []byte) error {
	switch k {
	case kindOpen:
		return s.opened(id)
	case kindPing:
		return s.answer(kindPong, 0, payload)
	case kindPong:
		n := binary.BigEndian.Uint64(payload)
		s.mu.Lock()
		defer s.mu.Unlock()
		if c := s.pings[n]; c != nil {
			close(c)
			delete(s.pings, n)
		}
		return nil
	}
	s.mu.Lock()
	st := s.streams[id]
	s.mu.Unlock()
	if st == nil {
		return nil // closed here; the peer will hear of it
	}
	switch k {
	case kindData:
		return st.data(payload)
	case kindCredit:
		return st.credit(binary.BigEndian.Uint32(payload))
	case kindFin:
		st.end(false)
	case kindGone:
		st.end(true)
	}
	return nil
}

func (s *Session) opened(id uint32) error {
	if id&1 == s.parity {
		return fmt.Errorf("%w: stream %d opened with a number of this end", ErrProtocol, id)
	}
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return s.err
	}
	if s.streams[id] != nil {
		s.mu.Unlock()
		return fmt.Errorf("%w: stream %d opened twice", ErrProtocol, id)
	}
	if s.incoming >= s.max {
		s.mu.Unlock()
		return s.answer(kindGone, id, nil)
	}
	st := newStream(s, id, true)
	select {
	case s.accept <- st:
		s.streams[id] = st
		s.incoming++
		s.mu.Unlock()
	default:
		s.mu.Unlock()
		return s.answer(kindGone, id, nil)
	}
	return nil
}

// forget drops a stream that was closed here.
func (s *Session) forget(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.streams[st.id] == st {
		delete(s.streams, st.id)
		if st.incoming {
			s.incoming--
		}
	}
}
