// Package runproto is the wire format of POST /tenon/v1/run: create, start,
// attach and wait for a container in one round trip; and of POST
// /tenon/v1/exec, which does the same for a further process.
//
// The request is an HTTP/1.1 POST with "Connection: Upgrade", "Upgrade:
// tenon-run" and a Request as its JSON body. The server answers "101 UPGRADED"
// as soon as it has understood the body; from then on both sides exchange
// frames over the same connection:
//
//	byte 0     type
//	bytes 1-3  zero
//	bytes 4-7  length of the payload, big-endian
//	bytes 8-   payload
//
// (the header of Docker's multiplexed streams, with more types). The order of
// frames a client sees is
//
//	[Progress]*  Created  [Stdout|Stderr]*  (Exit | Error)
//
// where Error may come at any point and, like Exit, is the last frame; Created
// is missing when creation failed. An exec has no Progress and takes no Signal;
// its Created, with the exec's ID, says that the process runs, and the payloads
// are otherwise the same. docs/tenon-api.md describes the whole
// exchange. Reader and Writer speak it; a Writer may be used by several
// goroutines, a Reader by one.
//
// The package depends on the standard library alone, so that client and server
// share it without sharing anything else.
package runproto

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Path is the endpoint of a run, Upgrade its protocol name in the Upgrade
// headers; ExecPath and ExecUpgrade are those of an exec.
const (
	Path        = "/tenon/v1/run"
	Upgrade     = "tenon-run"
	ExecPath    = "/tenon/v1/exec"
	ExecUpgrade = "tenon-exec"
)

// Frame types that the server sends.
const (
	// Stdout carries bytes of the container's output (all of it with a TTY).
	Stdout byte = 1
	// Stderr carries bytes of the container's standard error.
	Stderr byte = 2
	// Created carries a CreatedMessage; sent once, before any output.
	Created byte = 3
	// Progress carries one Docker JSON message of an image pull.
	Progress byte = 4
	// Exit carries an ExitMessage; the last frame.
	Exit byte = 5
	// Error carries an ErrorMessage; the last frame.
	Error byte = 6
)

// Frame types that the client sends.
const (
	// Stdin carries bytes for the container's standard input.
	Stdin byte = 1
	// StdinEOF closes the container's standard input; no payload.
	StdinEOF byte = 2
	// Resize carries a ResizeMessage.
	Resize byte = 3
	// Signal carries a SignalMessage.
	Signal byte = 4
	// Detach tells that the client leaves on purpose and that the container
	// goes on; no payload, the last frame. The server closes the connection.
	Detach byte = 5
)

// HeaderLen is the length of a frame's header in bytes.
const HeaderLen = 8

// MaxPayload bounds the payload of one frame in bytes, so that a hostile peer
// cannot make the other side allocate without limit. Streams are cut into
// frames of any size below it; the JSON messages are far smaller.
const MaxPayload = 1 << 20

// Request is the body of the POST.
type Request struct {
	// Name of the container; empty lets the server choose one.
	Name string `json:"name,omitempty"`
	// Platform as os[/arch[/variant]]; empty is the server's own.
	Platform string `json:"platform,omitempty"`
	// Pull is "missing" (also when empty), "always", "never", or "lazy": if it is
	// missing, as a lazy image.
	Pull string `json:"pull,omitempty"`
	// Detach asks for an Exit frame as soon as the container is started.
	Detach bool `json:"detach,omitempty"`
	// Config is the body of POST /containers/create, unchanged.
	Config json.RawMessage `json:"config"`
	// TTY and Stdin repeat Config.Tty and Config.OpenStdin: how the client
	// will use the connection.
	TTY   bool `json:"tty,omitempty"`
	Stdin bool `json:"stdin,omitempty"`
	// Attach lists the streams the client wants: "stdin", "stdout", "stderr".
	Attach []string `json:"attach,omitempty"`
	// ConsoleSize is the terminal's height and width in cells, with TTY.
	ConsoleSize *[2]uint `json:"consoleSize,omitempty"`
}

// ExecRequest is the body of the POST of an exec.
type ExecRequest struct {
	// Container is the name, the ID or a unique prefix of the ID of a running
	// container.
	Container string `json:"container"`
	// Detach asks for an Exit frame as soon as the process is started.
	Detach bool `json:"detach,omitempty"`
	// Config is the body of POST /containers/{id}/exec, unchanged.
	Config json.RawMessage `json:"config"`
}

// CreatedMessage is the payload of Created.
type CreatedMessage struct {
	ID       string   `json:"id"`
	Warnings []string `json:"warnings,omitempty"`
}

// ExitMessage is the payload of Exit.
type ExitMessage struct {
	// ID is set when the run was detached.
	ID string `json:"id,omitempty"`
	// Code is the exit code of the container's first process (128+n when a
	// signal ended it); 0 for a detached run.
	Code int `json:"code"`
	// Error tells why the wait failed, if it did.
	Error string `json:"error,omitempty"`
}

// ErrorMessage is the payload of Error.
type ErrorMessage struct {
	// Status is the HTTP status that the same failure has in the Docker API.
	Status int `json:"status"`
	// Message is the sentence for the user.
	Message string `json:"message"`
	// Kind, if not empty, tells what the failure is about: "image" when the
	// image is not there, "start" when the container was created but did not
	// start (the client then exits with 126 or 127 by the message).
	Kind string `json:"kind,omitempty"`
	// Code is the exit code that the client should end with; 0 leaves it to
	// the client (125).
	Code int `json:"code,omitempty"`
}

// ResizeMessage is the payload of Resize, in cells.
type ResizeMessage struct {
	H uint `json:"h"`
	W uint `json:"w"`
}

// SignalMessage is the payload of Signal: a name with SIG in front ("SIGTERM")
// or a decimal number.
type SignalMessage struct {
	Signal string `json:"signal"`
}

// ErrTooLarge reports a frame whose length exceeds MaxPayload.
var ErrTooLarge = errors.New("run frame exceeds the size limit")

// ErrHeader reports a frame header with non-zero reserved bytes.
var ErrHeader = errors.New("run frame header is malformed")

// Reader reads frames. It is not safe for concurrent use.
type Reader struct {
	r   io.Reader
	hdr [HeaderLen]byte
	buf []byte
}

// NewReader returns a Reader over r, which should be buffered.
func NewReader(r io.Reader) *Reader { return &Reader{r: r} }

// Next returns the next frame. The payload is valid until the next call. The
// error is io.EOF when the stream ended between two frames and
// io.ErrUnexpectedEOF when it ended inside one.
func (r *Reader) Next() (typ byte, payload []byte, err error) {
	if _, err := io.ReadFull(r.r, r.hdr[:]); err != nil {
		return 0, nil, err
	}
	if r.hdr[1]|r.hdr[2]|r.hdr[3] != 0 {
		return 0, nil, ErrHeader
	}
	n := binary.BigEndian.Uint32(r.hdr[4:])
	if n > MaxPayload {
		return 0, nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, n)
	}
	if uint32(cap(r.buf)) < n {
		r.buf = make([]byte, max(n, 4096))
	}
	payload = r.buf[:n]
	if _, err := io.ReadFull(r.r, payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return r.hdr[0], payload, nil
}

// Writer writes frames, each with one Write to the underlying writer. It is
// safe for concurrent use.
type Writer struct {
	mu  sync.Mutex
	w   io.Writer
	buf bytes.Buffer
}

// NewWriter returns a Writer over w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Write writes payload as one frame, or as several when it exceeds MaxPayload.
func (w *Writer) Write(typ byte, payload []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		part := payload[:min(len(payload), MaxPayload)]
		payload = payload[len(part):]
		var hdr [HeaderLen]byte
		hdr[0] = typ
		binary.BigEndian.PutUint32(hdr[4:], uint32(len(part)))
		w.buf.Reset()
		w.buf.Write(hdr[:])
		w.buf.Write(part)
		if _, err := w.w.Write(w.buf.Bytes()); err != nil {
			return err
		}
		if len(payload) == 0 {
			return nil
		}
	}
}

// WriteJSON writes v, encoded as JSON, as one frame. It refuses a message
// larger than MaxPayload with ErrTooLarge.
func (w *Writer) WriteJSON(typ byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode run frame: %w", err)
	}
	if len(b) > MaxPayload {
		return fmt.Errorf("%w: %d bytes", ErrTooLarge, len(b))
	}
	return w.Write(typ, b)
}

// Stream returns an io.Writer that sends all it is given as frames of type typ.
func (w *Writer) Stream(typ byte) io.Writer { return stream{w: w, typ: typ} }

type stream struct {
	w   *Writer
	typ byte
}

func (s stream) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.w.Write(s.typ, p); err != nil {
		return 0, err
	}
	return len(p), nil
}
