package qmp

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// MaxMessage bounds one message of QEMU. The longest that a command of ours
// brings are lists of devices, some kilobytes.
const MaxMessage = 1 << 20

// message is anything that QEMU sends; which fields are set says what it is.
type message struct {
	Greeting *struct {
		Version struct {
			QEMU struct {
				Major int `json:"major"`
				Minor int `json:"minor"`
				Micro int `json:"micro"`
			} `json:"qemu"`
			Package string `json:"package"`
		} `json:"version"`
	} `json:"QMP"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	ID        *uint64         `json:"id"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// Decoder reads QEMU's messages from a stream.
type Decoder struct{ r *bufio.Reader }

// NewDecoder reads from r.
func NewDecoder(r io.Reader) *Decoder { return &Decoder{bufio.NewReaderSize(r, 16<<10)} }

// next returns the next message. After an error the stream is of no use.
func (d *Decoder) next() (m message, err error) {
	for {
		line, err := d.line()
		if err != nil {
			return m, err
		}
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		if err := json.Unmarshal(line, &m); err != nil {
			return m, fmt.Errorf("message: %w", err)
		}
		kinds := 0
		for _, is := range []bool{m.Greeting != nil, m.Return != nil, m.Error != nil, m.Event != ""} {
			if is {
				kinds++
			}
		}
		if kinds != 1 {
			return m, errors.New("message: neither greeting, answer nor event")
		}
		return m, nil
	}
}

// line reads one line of at most MaxMessage bytes.
func (d *Decoder) line() ([]byte, error) {
	var long []byte
	for {
		part, err := d.r.ReadSlice('\n')
		if len(long)+len(part) > MaxMessage {
			return nil, fmt.Errorf("message exceeds %d bytes", MaxMessage)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			long = append(long, part...)
			continue
		case err == io.EOF && len(long)+len(part) > 0:
			return nil, io.ErrUnexpectedEOF
		case err != nil:
			return nil, err
		case long == nil:
			return part, nil
		}
		return append(long, part...), nil
	}
}
