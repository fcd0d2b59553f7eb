package dns

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/network/dns/wire"
)

// ErrQuit says that the daemon asked the process to end.
var ErrQuit = errors.New("asked to quit")

// maxLine bounds one message: the state of some ten thousand containers.
const maxLine = 64 << 20

// control is a connection of the daemon.
type control struct {
	conn *net.UnixConn
	raw  syscall.RawConn
	buf  []byte
	fds  []int // that came and belong to an OpHold to come
}

// Serve takes the daemon's connections until one asks to quit (ErrQuit) or the
// listener fails.
func (s *Server) Serve(l *net.UnixListener) error {
	quit := make(chan error, 1)
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				select {
				case quit <- err:
				default:
				}
				return
			}
			go func() {
				defer c.Close()
				err := s.control(c)
				if errors.Is(err, ErrQuit) {
					select {
					case quit <- err:
					default:
					}
				} else if err != nil && !errors.Is(err, io.EOF) {
					s.log.Warn("daemon's connection ended", "err", err)
				}
			}()
		}
	}()
	return <-quit
}

// control reads messages. They are applied under the lock that is taken before
// they are read, so that a question which finds the connection drained (see
// barrier) sees all that was sent before it was asked.
func (s *Server) control(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	c := &control{conn: conn, raw: raw}
	s.cmu.Lock()
	s.controls[c] = struct{}{}
	s.cmu.Unlock()
	defer func() {
		s.cmu.Lock()
		delete(s.controls, c)
		s.cmu.Unlock()
	}()
	chunk := make([]byte, 64<<10)
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	defer func() {
		for _, fd := range c.fds {
			unix.Close(fd)
		}
	}()
	for {
		var acks []wire.Message
		relisten := false
		var fail error
		err := raw.Read(func(fd uintptr) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			n, oobn, _, _, err := unix.Recvmsg(int(fd), chunk, oob, unix.MSG_CMSG_CLOEXEC)
			switch {
			case err == unix.EAGAIN || err == unix.EINTR:
				return false
			case err != nil:
				fail = os.NewSyscallError("read", err)
			case n == 0:
				fail = io.EOF
			default:
				c.rights(oob[:oobn])
				c.buf = append(c.buf, chunk[:n]...)
				var msgs []wire.Message
				msgs, fail = c.lines()
				for _, m := range msgs {
					if m.Op == wire.OpHold {
						n := max(0, min(m.Files, len(c.fds)))
						s.holds[m.ID] = append(s.holds[m.ID], c.fds[:n]...)
						c.fds = c.fds[n:]
					}
					relisten = s.applyLocked(m) || relisten
					if m.Ack || m.Op == wire.OpQuit {
						acks = append(acks, m)
					}
				}
			}
			return true
		})
		if err := errors.Join(err, fail); err != nil {
			return err
		}
		reply := wire.Reply{PID: os.Getpid()}
		if relisten {
			if err := s.listen(); err != nil {
				reply.Err = err.Error()
			}
		}
		reply.Ports = s.ports()
		for _, m := range acks {
			if m.Op == wire.OpQuit {
				return ErrQuit
			}
			b, err := json.Marshal(reply)
			if err != nil {
				return err
			}
			if err := conn.SetWriteDeadline(time.Now().Add(5 * time.Second)); err != nil {
				return err
			}
			if _, err := conn.Write(append(b, '\n')); err != nil {
				return err
			}
		}
	}
}

// maxFiles come with one message: the kernel's limit.
const maxFiles = 253

// rights keeps the descriptors that came along.
func (c *control) rights(oob []byte) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	for i := range msgs {
		if fds, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			c.fds = append(c.fds, fds...)
		}
	}
}

// lines takes the whole messages out of the buffer.
func (c *control) lines() ([]wire.Message, error) {
	var out []wire.Message
	for {
		i := bytes.IndexByte(c.buf, '\n')
		if i < 0 {
			break
		}
		var m wire.Message
		if err := json.Unmarshal(c.buf[:i], &m); err != nil {
			return out, fmt.Errorf("bad message: %w", err)
		}
		out = append(out, m)
		c.buf = c.buf[i+1:]
	}
	if len(c.buf) > maxLine {
		return out, errors.New("message too long")
	}
	if len(c.buf) == 0 {
		c.buf = nil
	}
	return out, nil
}

// barrier waits until everything that the daemon wrote before now is read: a
// container may ask for a name the moment after the daemon told it.
func (s *Server) barrier() {
	s.cmu.Lock()
	list := make([]*control, 0, len(s.controls))
	for c := range s.controls {
		list = append(list, c)
	}
	s.cmu.Unlock()
	for _, c := range list {
		for i := range 100 {
			pending := 0
			if err := c.raw.Control(func(fd uintptr) { pending, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }); err != nil || pending == 0 {
				break
			}
			if i < 10 {
				runtime.Gosched()
			} else {
				time.Sleep(100 * time.Microsecond)
			}
		}
	}
}
