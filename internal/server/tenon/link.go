package tenon

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"time"

	"tenon.dev/tenon/client/runproto"
	"tenon.dev/tenon/internal/server/wire"
)

// link is the connection of a run or an exec, once it speaks frames.
type link struct {
	sess *wire.Session
	out  *wire.Frames
	tty  bool
	ctl  *control // nil: nothing to control
}

func (l *link) send(typ byte, v any) {
	b, err := json.Marshal(v)
	if err == nil {
		err = l.out.WriteFrame(typ, b)
	}
	if err != nil {
		l.sess.Gone()
	}
}

func (l *link) fail(err error, kind string, code int) {
	l.send(runproto.Error, runproto.ErrorMessage{Status: wire.Status(err), Message: wire.Message(err), Kind: kind, Code: code})
}

// read handles what the client sends until the connection ends.
func (l *link) read(in *inbox, cancel context.CancelCauseFunc) {
	err := l.frames(in)
	if in != nil {
		in.close(err)
	}
	cancel(wire.ErrClientGone)
}

var errLeft = errors.New("the client detached")

// frames returns errLeft for a client that detached, io.EOF for one that is
// lost (its process's stdin ends then, unless it is a terminal).
func (l *link) frames(in *inbox) error {
	fr := runproto.NewReader(bufio.NewReaderSize(l.sess, 16<<10))
	for {
		typ, p, err := fr.Next()
		if err != nil {
			if l.tty {
				return errLeft
			}
			return io.EOF
		}
		switch typ {
		case runproto.Stdin:
			if in != nil && !in.put(p) {
				in = nil // nobody reads any more
			}
		case runproto.StdinEOF:
			if in != nil && !l.tty {
				in.close(io.EOF)
			}
		case runproto.Resize:
			var m runproto.ResizeMessage
			if json.Unmarshal(p, &m) == nil {
				l.ctl.resize(m.H, m.W)
			}
		case runproto.Signal:
			var m runproto.SignalMessage
			if json.Unmarshal(p, &m) == nil && m.Signal != "" {
				l.ctl.signal(m.Signal)
			}
		case runproto.Detach:
			return errLeft
		}
	}
}

// retryFor bounds how long a resize waits for its container to run.
const retryFor = 2 * time.Second
