package wire

import (
	"encoding/binary"
	"io"
	"net"
	"sync"
)

// Frames writes frames with Docker's 8-byte header (type, three zeros, length
// big-endian), which /tenon/v1/run shares. A frame goes out by one writev where
// the connection can, without a copy of the payload. Safe for concurrent use.
type Frames struct {
	mu   sync.Mutex
	w    io.Writer
	hdr  [8]byte
	vec  [2][]byte
	bufs net.Buffers
}

// maxFrame keeps payloads below what readers of either protocol accept.
const maxFrame = 1 << 20

// NewFrames returns a Frames over w.
func NewFrames(w io.Writer) *Frames { return &Frames{w: w} }

// WriteFrame sends p as one frame, or as several if it is longer than 1 MiB.
func (f *Frames) WriteFrame(typ byte, p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		part := p[:min(len(p), maxFrame)]
		p = p[len(part):]
		f.hdr = [8]byte{typ}
		binary.BigEndian.PutUint32(f.hdr[4:], uint32(len(part)))
		f.vec = [2][]byte{f.hdr[:], part}
		f.bufs = f.vec[:]
		if _, err := f.bufs.WriteTo(f.w); err != nil {
			return err
		}
		if len(p) == 0 {
			f.vec[1] = nil
			return nil
		}
	}
}

// Stream returns a writer that sends frames of one type.
func (f *Frames) Stream(typ byte) io.Writer { return frameStream{f, typ} }

type frameStream struct {
	f   *Frames
	typ byte
}

func (s frameStream) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.f.WriteFrame(s.typ, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Stream types of Docker's multiplexed streams.
const (
	Stdout byte = 1
	Stderr byte = 2
	// SystemError carries a message of the daemon; clients fail with it.
	SystemError byte = 3
)
