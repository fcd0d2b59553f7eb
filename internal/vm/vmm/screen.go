package vmm

import (
	"encoding/binary"
	"sync"
	"time"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/logs"
)

// screen carries what a system's console says to its log and to those who are
// attached. Its zero value is ready.
type screen struct {
	mu       sync.Mutex
	sink     logs.Sink
	stream   *logs.Stream
	terminal bool
	viewers  []*viewer
	ended    bool
}

// viewer is one who is attached.
type viewer struct {
	conn channel.Conn
	over chan struct{} // closed when nothing more is sent
	sent chan struct{} // closed when all is sent, and the end
	once sync.Once
	want chan struct{} // has an element while there is something to do

	quiet bool // it gets no output

	mu     sync.Mutex
	buf    []byte
	ending bool
}

const (
	// viewerBuffer bounds what waits for one who does not read; then it is cut off.
	viewerBuffer = 4 << 20
	// viewerTime is how long one who does not read may take after the end.
	viewerTime = 10 * time.Second
)

// setLog says where output is kept from now on; nil: nowhere.
func (s *screen) setLog(sink logs.Sink, terminal bool) {
	s.mu.Lock()
	old, stream := s.sink, s.stream
	s.sink, s.stream, s.terminal = sink, nil, terminal
	if sink != nil {
		s.stream = sink.Stream(logs.Stdout)
	}
	s.mu.Unlock()
	if stream != nil {
		stream.Close()
	}
	if old != nil {
		_ = old.Close() // errors were told while it was written
	}
}

func (s *screen) write(b []byte) {
	if len(b) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stream != nil {
		s.stream.Write(b)
	}
	for _, v := range s.viewers {
		v.send(b, s.terminal)
	}
}

// sync returns when everything is in the log.
func (s *screen) sync() {
	s.mu.Lock()
	sink := s.sink
	s.mu.Unlock()
	if sink != nil {
		sink.Sync()
	}
}

// end says that no more comes.
func (s *screen) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stream != nil {
		s.stream.Close()
		s.stream = nil
	}
	s.ended = true
	for _, v := range s.viewers {
		v.end()
	}
	s.viewers = nil
}

// attach adds one; without output it is told the end only.
func (s *screen) attach(c channel.Conn, output bool) *viewer {
	v := &viewer{conn: c, over: make(chan struct{}), sent: make(chan struct{}), want: make(chan struct{}, 1), quiet: !output}
	go v.run()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		v.end()
	} else {
		s.viewers = append(s.viewers, v)
	}
	return v
}

// detach takes it away and closes its connection.
func (s *screen) detach(v *viewer) {
	s.mu.Lock()
	for i, x := range s.viewers {
		if x == v {
			s.viewers = append(s.viewers[:i:i], s.viewers[i+1:]...)
			break
		}
	}
	s.mu.Unlock()
	v.stop()
}

func (v *viewer) stop() {
	v.once.Do(func() {
		v.conn.Close()
		close(v.over)
	})
}

// send keeps output to be sent; one that has too much waiting is cut off.
func (v *viewer) send(b []byte, terminal bool) {
	if v.quiet {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.buf)+len(b) > viewerBuffer {
		v.stop()
		return
	}
	if !terminal {
		v.buf = binary.BigEndian.AppendUint32(append(v.buf, byte(logs.Stdout), 0, 0, 0), uint32(len(b)))
	}
	v.buf = append(v.buf, b...)
	v.wake()
}

// end has the connection end when everything is sent.
func (v *viewer) end() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ending = true
	_ = v.conn.SetWriteDeadline(time.Now().Add(viewerTime)) // else it waits, no worse
	v.wake()
}

func (v *viewer) wake() {
	select {
	case v.want <- struct{}{}:
	default:
	}
}

// run sends until the end.
func (v *viewer) run() {
	for {
		select {
		case <-v.over:
			return
		case <-v.want:
		}
		v.mu.Lock()
		b, ending := v.buf, v.ending
		v.buf = nil
		v.mu.Unlock()
		if len(b) > 0 {
			if _, err := v.conn.Write(b); err != nil {
				v.stop()
				return
			}
		}
		if ending { // whoever reads the end closes
			_ = v.conn.CloseWrite()
			_ = v.conn.SetReadDeadline(time.Now().Add(viewerTime))
			close(v.sent)
			return
		}
	}
}

// settle returns when everything is sent, or nobody takes it.
func (v *viewer) settle() {
	select {
	case <-v.sent:
	case <-v.over:
	case <-time.After(viewerTime):
	}
}
