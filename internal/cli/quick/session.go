package quick

import (
	"syscall"
	"unsafe"

	"tenon.dev/tenon/client/runproto"
)

// ending is how a session ends for this package.
type ending int

const (
	more  ending = iota // not yet: more has to be read
	done                // the process ends with the code
	leave               // Go goes on with the connection
	again               // nothing has happened: Go begins from the beginning
)

// session is the exchange behind a request: the answer's head, then frames
// (runproto). Payloads of output that follow each other are moved together and
// written at once, when nothing more is at hand.
type session struct {
	conn, signals int
	to            [3]int // descriptors by the type of frame
	exec, detach  bool
	code          int // the exit code

	buf        [72 << 10]byte
	head       int // length of the answer's head, 0: not complete
	start, end int // what was read and not dealt with
	part       int // of the payload of an output frame that has begun: what is missing
	stream     byte
	// Output that is not written yet.
	held, heldEnd int
	heldStream    byte
	// Frame headers for handOver.
	heldHeader, partHeader [runproto.HeaderLen]byte

	mask uint64 // the signal mask that the process began with
}

// theSession is static: it is too large for a stack, and there is no heap.
var theSession session

// send writes p to the connection.
func (s *session) send(p []byte) bool {
	for len(p) > 0 {
		n, _, errno := syscall.RawSyscall6(syscall.SYS_SENDTO, uintptr(s.conn), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), syscall.MSG_NOSIGNAL, 0, 0)
		if errno == syscall.EINTR {
			continue
		}
		if errno != 0 {
			return false
		}
		p = p[n:]
	}
	return true
}

// talk reads and handles what the daemon sends, until something ends it.
func (s *session) talk() ending {
	if !s.exec && !s.detach && !s.catch() {
		return leave
	}
	for {
		if s.signals >= 0 && !s.wait(s.conn, pollIn) {
			return leave
		}
		if s.end == len(s.buf) {
			return leave // a message that does not fit
		}
		n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(s.conn), uintptr(unsafe.Pointer(&s.buf[s.end])), uintptr(len(s.buf)-s.end), 0, 0, 0)
		if errno == syscall.EINTR {
			continue
		}
		if errno != 0 || n == 0 {
			return leave
		}
		s.end += int(n)
		if e := s.feed(); e != more {
			return e
		}
	}
}

// feed deals with what has been read.
func (s *session) feed() ending {
	if s.head == 0 {
		if !s.answered() {
			return leave
		}
		if s.head == 0 {
			return more
		}
	}
	for {
		e := s.frame()
		if e == more {
			break
		}
		if e == leave {
			s.flush() // handOver has what is not written
		}
		if e != next {
			return e
		}
	}
	if !s.flush() {
		return leave
	}
	if s.start > s.head {
		s.end = s.head + copy(s.buf[s.head:], s.buf[s.start:s.end])
		s.start = s.head
	}
	return more
}

// next says, inside feed, that there may be another frame.
const next ending = -1

// answered looks for the end of the answer's head, and reports whether the
// daemon may still agree.
func (s *session) answered() bool {
	const agreed = "HTTP/1.1 101 "
	for i := 0; i < min(s.end, len(agreed)); i++ {
		if s.buf[i] != agreed[i] {
			return false
		}
	}
	for i := len(agreed); i+4 <= s.end; i++ {
		if s.buf[i] == '\r' && s.buf[i+1] == '\n' && s.buf[i+2] == '\r' && s.buf[i+3] == '\n' {
			s.head, s.start = i+4, i+4
			return true
		}
	}
	return s.end < 4<<10
}

// frame deals with a frame, or with a part of an output frame. more: it is not
// there.
func (s *session) frame() ending {
	if s.part > 0 {
		n := min(s.part, s.end-s.start)
		if n == 0 {
			return more
		}
		s.hold(n)
		s.part -= n
		s.start += n
		return next
	}
	if s.end-s.start < runproto.HeaderLen {
		return more
	}
	h := s.buf[s.start : s.start+runproto.HeaderLen]
	n := int(h[4])<<24 | int(h[5])<<16 | int(h[6])<<8 | int(h[7])
	if h[1]|h[2]|h[3] != 0 || n > runproto.MaxPayload {
		return leave
	}
	typ := h[0]
	if typ == runproto.Stdout || typ == runproto.Stderr {
		if s.heldEnd > s.held && s.heldStream != typ && !s.flush() {
			return leave
		}
		s.start += runproto.HeaderLen
		s.part, s.stream = n, typ
		return next
	}
	if s.end-s.start < runproto.HeaderLen+n {
		return more // or it never fits, which talk sees
	}
	payload := unsafe.String(&s.buf[s.start], runproto.HeaderLen+n)[runproto.HeaderLen:]
	switch typ {
	case runproto.Created:
		if id := between(payload, `{"id":"`, `"}`); id == "" || !plain(id) {
			return leave // it has warnings
		}
		s.start += runproto.HeaderLen + n
		return next
	case runproto.Exit:
		if !s.flush() {
			return leave
		}
		return s.exit(payload)
	case runproto.Error:
		// A quote inside the message would have a backslash in front.
		if !s.exec && contains(payload, `"kind":"image"`) {
			return again
		}
	}
	return leave
}

// exit handles an ExitMessage without an error.
func (s *session) exit(payload string) ending {
	if s.detach {
		id := between(payload, `{"id":"`, `","code":0}`)
		if id == "" || !plain(id) {
			return leave
		}
		if s.exec {
			return done
		}
		// The ID lies in the buffer, and so does a byte behind it.
		line := unsafe.Slice(unsafe.StringData(id), len(id)+1)
		line[len(id)] = '\n'
		if s.write(s.to[runproto.Stdout], line) < len(line) {
			line[len(id)] = '"'
			return leave
		}
		return done
	}
	digits := between(payload, `{"code":`, `}`)
	if digits == "" || len(digits) > 3 {
		return leave
	}
	code := 0
	for i := 0; i < len(digits); i++ {
		if digits[i] < '0' || digits[i] > '9' {
			return leave
		}
		code = 10*code + int(digits[i]-'0')
	}
	s.code = code
	return done
}

// hold keeps n bytes from start on to be written.
func (s *session) hold(n int) {
	if s.held == s.heldEnd {
		s.held, s.heldEnd, s.heldStream = s.start, s.start, s.stream
	}
	s.heldEnd += copy(s.buf[s.heldEnd:], s.buf[s.start:s.start+n])
}

// flush writes what is held and reports whether all of it could be written.
func (s *session) flush() bool {
	if s.held < s.heldEnd {
		s.held += s.write(s.to[s.heldStream], s.buf[s.held:s.heldEnd])
	}
	return s.held == s.heldEnd
}

// handOver describes to l what this package has not dealt with.
func (s *session) handOver(l *leftover) {
	l.is, l.fd = true, s.conn
	l.parts[0] = s.buf[:s.head]
	if n := s.heldEnd - s.held; n > 0 {
		putHeader(&s.heldHeader, s.heldStream, n)
		l.parts[1], l.parts[2] = s.heldHeader[:], s.buf[s.held:s.heldEnd]
	}
	if s.part > 0 {
		putHeader(&s.partHeader, s.stream, s.part)
		l.parts[3] = s.partHeader[:]
	}
	l.parts[4] = s.buf[s.start:s.end]
}

func putHeader(h *[runproto.HeaderLen]byte, typ byte, n int) {
	h[0] = typ
	h[4], h[5], h[6], h[7] = byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
}

// between returns what stands between prefix and suffix, or "".
func between(s, prefix, suffix string) string {
	if !hasPrefix(s, prefix) || len(s) < len(prefix)+len(suffix) || s[len(s)-len(suffix):] != suffix {
		return ""
	}
	return s[len(prefix) : len(s)-len(suffix)]
}

// plain tells whether s consists of letters and digits.
func plain(s string) bool {
	for i := 0; i < len(s); i++ {
		if b := s[i]; (b < '0' || b > '9') && (b < 'a' || b > 'z') {
			return false
		}
	}
	return true
}

func contains(s, what string) bool {
	for i := 0; i+len(what) <= len(s); i++ {
		if s[i:i+len(what)] == what {
			return true
		}
	}
	return false
}
