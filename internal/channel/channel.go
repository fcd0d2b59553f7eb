// Package channel carries byte streams beside the Task API on one transport.
//
// A shim listens at one place (a unix socket on the host, a multiplexed virtio
// port of a VM). What a connection is for is told by its first byte: ttrpc
// frames begin with the high byte of a 32-bit length, which their size limit
// keeps at 0; a stream connection begins with 'S'.
//
//	client                                   shim
//	'S' len32 StreamHeader  ───────────────►
//	                        ◄─────────────── len32 StreamReply
//	raw bytes, both ways, each half closed on its own
//
// Lengths are big-endian. Messages are bounded (MaxMessage); the reply's error,
// if any, ends the connection.
//
// Transports are behind Dialer and net.Listener; package channel knows none.
package channel

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"

	"google.golang.org/protobuf/proto"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// Magic is the first byte of a stream connection.
const Magic = 'S'

// MaxMessage bounds a header or reply: a Root with some hundred mounts fits.
const MaxMessage = 1 << 20

// Conn is a connection whose writing half can be closed alone.
type Conn interface {
	net.Conn
	// CloseWrite tells the peer that no more bytes come.
	CloseWrite() error
}

// Dialer opens connections to one shim. It is safe for concurrent use.
type Dialer interface {
	Dial(ctx context.Context) (Conn, error)
}

// Unix dials a unix socket at the path it holds.
type Unix string

var _ Dialer = Unix("")

// Dial connects to the socket.
func (u Unix) Dial(ctx context.Context) (Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", string(u))
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

// Open dials, sends the header and reads the reply. The reply's error field is
// the caller's to judge; if it is set, the connection is closed and nil.
func Open(ctx context.Context, d Dialer, h *taskv1.StreamHeader) (Conn, *taskv1.StreamReply, error) {
	c, err := d.Dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	reply, err := handshake(c, h)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, nil, fmt.Errorf("stream: %w", err)
	}
	if reply.Error != "" || reply.Code != 0 {
		c.Close()
		return nil, reply, nil
	}
	return c, reply, nil
}

func handshake(c Conn, h *taskv1.StreamHeader) (*taskv1.StreamReply, error) {
	if err := writeMessage(c, []byte{Magic}, h); err != nil {
		return nil, err
	}
	reply := new(taskv1.StreamReply)
	if err := ReadMessage(c, reply); err != nil {
		return nil, err
	}
	return reply, nil
}

// ReadMessage reads one length-prefixed message, taking no byte after it.
func ReadMessage(r io.Reader, m proto.Message) error {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(n[:])
	if size > MaxMessage {
		return fmt.Errorf("message of %d bytes exceeds %d", size, MaxMessage)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(r, b); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return proto.Unmarshal(b, m)
}

// WriteMessage writes one length-prefixed message in one write.
func WriteMessage(w io.Writer, m proto.Message) error {
	return writeMessage(w, nil, m)
}

func writeMessage(w io.Writer, prefix []byte, m proto.Message) error {
	b := make([]byte, len(prefix)+4, len(prefix)+4+proto.Size(m))
	copy(b, prefix)
	b, err := proto.MarshalOptions{}.MarshalAppend(b, m)
	if err != nil {
		return err
	}
	size := len(b) - len(prefix) - 4
	if size > MaxMessage {
		return fmt.Errorf("message of %d bytes exceeds %d", size, MaxMessage)
	}
	binary.BigEndian.PutUint32(b[len(prefix):], uint32(size))
	_, err = w.Write(b)
	return err
}
