package cli

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"syscall"
)

// outputs collects small pieces of two streams into large writes. A piece is
// written at the latest when flush is called, and pieces of one stream never
// pass pieces of the other.
type outputs struct {
	out, err *bufio.Writer
	last     *bufio.Writer
}

func newOutputs(out, err io.Writer) *outputs {
	const size = 64 << 10
	return &outputs{out: bufio.NewWriterSize(out, size), err: bufio.NewWriterSize(err, size)}
}

// to returns the writer of a stream, after writing what the other one holds.
func (o *outputs) to(w *bufio.Writer) (*bufio.Writer, error) {
	if o.last != nil && o.last != w {
		if err := o.last.Flush(); err != nil {
			return nil, err
		}
	}
	o.last = w
	return w, nil
}

func (o *outputs) write(w *bufio.Writer, p []byte) error {
	w, err := o.to(w)
	if err == nil {
		_, err = w.Write(p)
	}
	return err
}

func (o *outputs) flush() error {
	if o.last == nil {
		return nil
	}
	return o.last.Flush()
}

// demux copies Docker's multiplexed stream (one byte stream, three zero bytes,
// a big-endian length, the bytes) to out and errOut. It writes what it has
// whenever r has nothing more at hand, so that a follower sees every line at
// once, and a million lines that are there already take few writes.
func demux(out, errOut io.Writer, r io.Reader) error {
	br := bufio.NewReaderSize(r, 64<<10)
	o := newOutputs(out, errOut)
	err := demuxFrames(o, br)
	return errors.Join(err, o.flush())
}

// maxSystemError bounds an error that the server sends inside the stream.
const maxSystemError = 64 << 10

func demuxFrames(o *outputs, br *bufio.Reader) error {
	var hdr [8]byte
	for {
		if br.Buffered() == 0 {
			if err := o.flush(); err != nil {
				return err
			}
		}
		if _, err := io.ReadFull(br, hdr[:]); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
				return nil // a stream may be cut with its connection
			}
			return err
		}
		n := int64(binary.BigEndian.Uint32(hdr[4:]))
		var w *bufio.Writer
		switch hdr[0] {
		case 0, 1:
			w = o.out
		case 2:
			w = o.err
		case 3:
			msg, _ := io.ReadAll(io.LimitReader(br, min(n, maxSystemError))) // a cut message is better than none
			return fmt.Errorf("error from daemon in stream: %s", msg)
		default:
			return fmt.Errorf("the daemon's stream is not understood: stream %d", hdr[0])
		}
		w, err := o.to(w)
		if err != nil {
			return err
		}
		if err := copyFrame(w, br, n); err != nil {
			return err
		}
	}
}

// copyFrame copies n bytes. It shows what has come of a frame whose rest is
// still on its way.
func copyFrame(w *bufio.Writer, br *bufio.Reader, n int64) error {
	for n > 0 {
		if br.Buffered() == 0 {
			if err := w.Flush(); err != nil {
				return err
			}
			if _, err := br.Peek(1); err != nil {
				if errors.Is(err, io.EOF) {
					return nil
				}
				return err
			}
		}
		part, err := br.Peek(int(min(n, int64(br.Buffered()))))
		if err != nil {
			return err
		}
		if _, err := w.Write(part); err != nil {
			return err
		}
		n -= int64(len(part))
		_, _ = br.Discard(len(part)) // they were just seen
	}
	return nil
}
