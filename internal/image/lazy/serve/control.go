package serve

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/lazy"
)

const (
	controlTime = 10 * time.Second
	maxMessage  = 8 << 20
	maxConns    = 64
)

// ErrQuit says that the daemon wants the program to end.
var ErrQuit = errors.New("told to end")

// ServeControl answers the daemon until it says that the program is to end: ErrQuit.
func (s *Server) ServeControl(l *net.UnixListener) error {
	quit := make(chan struct{}, 1)
	slots := make(chan struct{}, maxConns)
	failed := make(chan error, 1)
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				failed <- err
				return
			}
			slots <- struct{}{} // each is freed in controlTime
			go func() {
				defer func() { <-slots }()
				defer conn.Close()
				if s.answer(conn) {
					select {
					case quit <- struct{}{}:
					default:
					}
				}
			}()
		}
	}()
	defer l.Close()
	select {
	case <-quit:
		return ErrQuit
	case err := <-failed:
		return err
	}
}

// answer does one request. It returns whether the program is to end.
func (s *Server) answer(conn *net.UnixConn) (quit bool) {
	if err := conn.SetDeadline(time.Now().Add(controlTime)); err != nil {
		return false
	}
	req, files, err := receive(conn)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	rep := lazy.Reply{PID: os.Getpid()}
	if err == nil {
		switch req.Op {
		case lazy.OpAdd:
			if len(files) != 2 || req.Access == nil {
				err = fmt.Errorf("%d files: %w", len(files), errdefs.ErrInvalidArgument)
				break
			}
			file, mapFile := files[0], files[1]
			files = nil
			err = s.add(req.ID, req.Blobs, *req.Access, file, mapFile)
		case lazy.OpRemove:
			s.remove(req.ID)
		case lazy.OpState:
			rep.Chains, err = s.states(req.ID)
		case lazy.OpQuit:
			if !req.Force && s.busy() {
				err = fmt.Errorf("files are open: %w", errdefs.ErrFailedPrecondition)
			} else {
				quit = true
			}
		default:
			err = fmt.Errorf("unknown request %.40q: %w", req.Op, errdefs.ErrInvalidArgument)
		}
	}
	rep.SetErr(err)
	b, err := json.Marshal(rep)
	if err == nil {
		_, _ = conn.Write(append(b, '\n')) // the daemon may have gone
	}
	return quit
}

// receive reads a request, and the files that come with it.
func receive(conn *net.UnixConn) (req lazy.Request, files []*os.File, err error) {
	var line []byte
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*4))
	for !bytes.HasSuffix(line, []byte("\n")) {
		n, on, _, _, err := conn.ReadMsgUnix(buf, oob)
		if on > 0 {
			msgs, perr := unix.ParseSocketControlMessage(oob[:on])
			if perr != nil {
				return req, files, perr
			}
			for _, m := range msgs {
				fds, perr := unix.ParseUnixRights(&m)
				if perr != nil {
					continue
				}
				for _, fd := range fds {
					unix.CloseOnExec(fd)
					files = append(files, os.NewFile(uintptr(fd), "received"))
				}
			}
		}
		if err != nil {
			return req, files, err
		}
		if n == 0 {
			return req, files, errors.New("the connection ended")
		}
		if line = append(line, buf[:n]...); len(line) > maxMessage {
			return req, files, fmt.Errorf("a request of more than %d bytes: %w", maxMessage, errdefs.ErrInvalidArgument)
		}
	}
	if err := json.Unmarshal(line, &req); err != nil {
		return req, files, fmt.Errorf("request: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return req, files, nil
}
