package wire

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// ErrClientGone is the cause of a session context's end when the client has
// closed the connection.
var ErrClientGone = errors.New("the client has closed the connection")

// lingerTime is how long a finished session waits for the client to close its
// side. Closing with unread input would turn the client's end of file into a
// reset.
const lingerTime = 2 * time.Second

// maxBody is the longest body of an upgrade that is not taken for its stream.
const maxBody = 1 << 20

// Session is a connection taken over from HTTP. Its context ends when the
// request's does or when the client is gone. End must be called.
type Session struct {
	conn   net.Conn
	head   *bufio.Reader // what HTTP had read already; nil when used up
	cancel context.CancelCauseFunc
	unhook func() bool
	stop   func()

	begin sync.Once
	began atomic.Bool
	intro string
	apart bool // nothing may follow the header before the client has read it
	ended atomic.Bool
	gone  atomic.Bool
}

// Hijack takes the request's connection over. intro is the answer's header,
// which Begin sends (Accept, Refuse or the first write call it).
func Hijack(w http.ResponseWriter, r *http.Request, intro string) (*Session, context.Context, error) {
	// A body of its own is not the stream: some clients repeat the query in it.
	if n := r.ContentLength; n > 0 && n <= maxBody {
		_, _ = io.CopyN(io.Discard, r.Body, n) // what is missing shows in the stream
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, fmt.Errorf("take over the connection: %w", err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		_ = conn.Close() // dead already
		return nil, nil, fmt.Errorf("take over the connection: %w", err)
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	s := &Session{conn: conn, intro: intro, apart: readsAhead(r), cancel: cancel}
	if rw.Reader.Buffered() > 0 {
		s.head = rw.Reader
	}
	// A write that the client doesn't take must not outlive the session.
	s.unhook = context.AfterFunc(ctx, func() { _ = conn.SetWriteDeadline(time.Now().Add(lingerTime)) })
	s.stop = WatchHangup(conn, func() {
		s.gone.Store(true)
		_ = conn.SetDeadline(time.Unix(1, 0)) // wakes whoever reads or writes
		cancel(ErrClientGone)
	})
	return s, ctx, nil
}

// Gone ends the session's context as if the client had closed.
func (s *Session) Gone() { s.cancel(ErrClientGone) }

// Begin sends the answer's header, once. What follows it may be sent when Begin
// has returned, whoever called it first.
func (s *Session) Begin() {
	s.begin.Do(func() {
		s.began.Store(true)
		_, _ = io.WriteString(s.conn, s.intro) // the next write fails as well
		if s.apart {
			headerRead(s.conn)
		}
	})
}

// Began tells whether the header has been sent.
func (s *Session) Began() bool { return s.began.Load() }

// Refuse answers with an error instead, if the answer has not begun.
func (s *Session) Refuse(err error) {
	s.begin.Do(func() {
		s.began.Store(true)
		status, body := Status(err), ErrorBody(Message(err))
		if status == http.StatusNotModified {
			body = nil
		}
		_, _ = io.WriteString(s.conn, "HTTP/1.1 "+strconv.Itoa(status)+" "+http.StatusText(status)+
			"\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: "+
			strconv.Itoa(len(body))+"\r\n\r\n"+string(body)) // the client may be gone
	})
}

// Read reads what the client sends; io.EOF when it has shut its sending side.
func (s *Session) Read(p []byte) (int, error) {
	if s.ended.Load() {
		return 0, io.EOF
	}
	if h := s.head; h != nil {
		n, err := h.Read(p[:min(len(p), h.Buffered())])
		if h.Buffered() == 0 {
			s.head = nil
		}
		return n, err
	}
	return s.conn.Read(p)
}

// Write sends p, after the header.
func (s *Session) Write(p []byte) (int, error) {
	s.Begin()
	return s.conn.Write(p)
}

// Conn is the connection, for writers that use writev. The header must have
// been sent.
func (s *Session) Conn() net.Conn { return s.conn }

// End ends the answer: the client sees the end of the stream, is given a
// moment to close its side, and the connection is closed.
func (s *Session) End() {
	s.ended.Store(true)
	s.unhook()
	s.stop()
	s.cancel(nil)
	defer func() { _ = s.conn.Close() }() // nothing is left to be lost
	if s.gone.Load() {
		return
	}
	if cw, ok := s.conn.(interface{ CloseWrite() error }); ok {
		if cw.CloseWrite() != nil {
			return
		}
	}
	if s.conn.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
		return
	}
	// Whatever it still sends. Not io.Discard: its buffers would be the largest
	// part of a session that waits.
	var b [256]byte
	for {
		if _, err := s.conn.Read(b[:]); err != nil {
			return
		}
	}
}
