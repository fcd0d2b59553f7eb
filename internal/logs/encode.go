package logs

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"time"
	"unicode/utf8"
)

// partial is the place of a record in a line that was cut.
type partial struct {
	id      uint64 // of the line, in this stream; 0: the line is whole
	ordinal int    // from 1
	last    bool
}

// encoder appends records of one moment and stream to a buffer.
type encoder struct {
	driver string
	attrs  []byte // json-file: `"attrs":{…},`
	// the following hold for one batch
	source Source
	nano   int64
	head   []byte // local: source and time, encoded
	tail   []byte // json-file: `,"stream":…}\n`
}

func newEncoder(driver string, attrs map[string]string) (*encoder, error) {
	e := &encoder{driver: driver}
	if driver == JSONFile && len(attrs) > 0 {
		b, err := json.Marshal(attrs)
		if err != nil {
			return nil, err
		}
		e.attrs = append(append([]byte(`"attrs":`), b...), ',')
	}
	return e, nil
}

// LogEntry's field tags (moby's daemon/logger/internal/logdriver/entry.proto).
const (
	tagSource    = 1<<3 | 2
	tagTime      = 2<<3 | 0
	tagLine      = 3<<3 | 2
	tagPartial   = 4<<3 | 0
	tagMeta      = 5<<3 | 2
	tagMetaLast  = 1<<3 | 0
	tagMetaID    = 2<<3 | 2
	tagMetaOrder = 3<<3 | 0
)

// begin prepares for records of source at t. The time is encoded once.
func (e *encoder) begin(source Source, t time.Time) {
	nano := t.UnixNano()
	if e.source == source && e.nano == nano {
		return
	}
	e.source, e.nano = source, nano
	if e.driver == Local {
		e.head = append(e.head[:0], tagSource, 6)
		e.head = append(e.head, source.String()...)
		e.head = append(e.head, tagTime)
		e.head = binary.AppendUvarint(e.head, uint64(nano))
		return
	}
	e.tail = append(e.tail[:0], `,"stream":"`...)
	e.tail = append(e.tail, source.String()...)
	e.tail = append(e.tail, `",`...)
	e.tail = append(e.tail, e.attrs...)
	e.tail = append(e.tail, `"time":"`...)
	e.tail = t.UTC().AppendFormat(e.tail, time.RFC3339Nano)
	e.tail = append(e.tail, "\"}\n"...)
}

func (e *encoder) record(out, line []byte, p partial) []byte {
	if e.driver == Local {
		return e.local(out, line, p)
	}
	return e.json(out, line, p)
}

func (e *encoder) local(out, line []byte, p partial) []byte {
	start := len(out)
	out = append(out, 0, 0, 0, 0)
	out = append(out, e.head...)
	if len(line) > 0 {
		out = append(out, tagLine)
		out = binary.AppendUvarint(out, uint64(len(line)))
		out = append(out, line...)
	}
	if p.id != 0 {
		out = append(out, tagPartial, 1)
		var meta [40]byte
		m := meta[:0]
		if p.last {
			m = append(m, tagMetaLast, 1)
		}
		m = append(m, tagMetaID, 16)
		m = appendHex(m, p.id)
		m = append(m, tagMetaOrder)
		m = binary.AppendUvarint(m, uint64(p.ordinal))
		out = append(out, tagMeta, byte(len(m)))
		out = append(out, m...)
	}
	n := uint32(len(out) - start - 4)
	binary.BigEndian.PutUint32(out[start:], n)
	return binary.BigEndian.AppendUint32(out, n)
}

const hexDigits = "0123456789abcdef"

func appendHex(b []byte, v uint64) []byte {
	for i := 60; i >= 0; i -= 4 {
		b = append(b, hexDigits[v>>i&15])
	}
	return b
}

func (e *encoder) json(out, line []byte, p partial) []byte {
	out = append(out, `{"log":"`...)
	out, valid := appendJSON(out, line)
	if p.id == 0 || p.last {
		out = append(out, `\n`...)
	}
	out = append(out, '"')
	if !valid {
		out = append(out, `,"raw":"`...)
		out = base64.StdEncoding.AppendEncode(out, line)
		out = append(out, '"')
	}
	return append(out, e.tail...)
}

// plain tells the bytes that need no escape (Docker escapes the HTML ones).
var plain = func() (t [256]bool) {
	for b := 0x20; b < utf8.RuneSelf; b++ {
		t[b] = b != '"' && b != '\\' && b != '<' && b != '>' && b != '&'
	}
	return
}()

// appendJSON appends s as the inside of a JSON string. Bytes that are no UTF-8
// become U+FFFD, and valid is false.
func appendJSON(out, s []byte) (_ []byte, valid bool) {
	valid = true
	start := 0
	for i := 0; i < len(s); {
		b := s[i]
		if plain[b] {
			i++
			continue
		}
		if b < utf8.RuneSelf {
			out = append(out, s[start:i]...)
			switch b {
			case '"', '\\':
				out = append(out, '\\', b)
			case '\n':
				out = append(out, '\\', 'n')
			case '\r':
				out = append(out, '\\', 'r')
			case '\t':
				out = append(out, '\\', 't')
			default:
				out = append(out, '\\', 'u', '0', '0', hexDigits[b>>4], hexDigits[b&15])
			}
			i++
			start = i
			continue
		}
		r, n := utf8.DecodeRune(s[i:])
		if r == utf8.RuneError && n == 1 || r == '\u2028' || r == '\u2029' {
			out = append(out, s[start:i]...)
			if n == 1 {
				valid = false
				out = append(out, `\ufffd`...)
			} else {
				out = append(out, `\u202`...)
				out = append(out, hexDigits[r&15])
			}
			i += n
			start = i
			continue
		}
		i += n
	}
	return append(out, s[start:]...), valid
}
