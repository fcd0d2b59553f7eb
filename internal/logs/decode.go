package logs

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// decode takes one record from the front of b. n is 0 if b holds no whole
// record. A record that is damaged has a length (it can be skipped) and an
// error; if even that is unknown, n is 0 with an error. m.Line may be part of b.
func decode(driver string, b []byte, m *Message) (n int, err error) {
	if driver == Local {
		return decodeLocal(b, m)
	}
	return decodeJSON(b, m)
}

func damaged(what string) error {
	return fmt.Errorf("log record: %s: %w", what, errdefs.ErrDataLoss)
}

func decodeLocal(b []byte, m *Message) (n int, err error) {
	if len(b) < 4 {
		return 0, nil
	}
	size := binary.BigEndian.Uint32(b)
	if size > maxRecord {
		return 0, damaged("impossible length")
	}
	n = int(size) + 8
	if len(b) < n {
		return 0, nil
	}
	if binary.BigEndian.Uint32(b[n-4:]) != size {
		return 0, damaged("lengths differ")
	}
	return n, decodeEntry(b[4:n-4], m)
}

// decodeEntry reads a LogEntry.
func decodeEntry(b []byte, m *Message) error {
	*m = Message{Source: Stdout}
	for len(b) > 0 {
		tag, k := binary.Uvarint(b)
		if k <= 0 {
			return damaged("tag")
		}
		b = b[k:]
		var num uint64
		var data []byte
		switch tag & 7 {
		case 0:
			if num, k = binary.Uvarint(b); k <= 0 {
				return damaged("number")
			}
			b = b[k:]
		case 1:
			if len(b) < 8 {
				return damaged("short")
			}
			b = b[8:]
		case 2:
			if num, k = binary.Uvarint(b); k <= 0 || num > uint64(len(b)-k) {
				return damaged("length of a field")
			}
			data, b = b[k:k+int(num)], b[k+int(num):]
		case 5:
			if len(b) < 4 {
				return damaged("short")
			}
			b = b[4:]
		default:
			return damaged("wire type")
		}
		switch tag {
		case tagSource:
			if string(data) == "stderr" {
				m.Source = Stderr
			}
		case tagTime:
			m.Time = time.Unix(0, int64(num)).UTC()
		case tagLine:
			m.Line = data
		case tagMeta:
			m.Partial = !lastPiece(data)
		}
	}
	return nil
}

// lastPiece reads PartialLogEntryMetadata's field "last".
func lastPiece(b []byte) bool {
	// The writers put it first, or leave it out if it is false.
	return len(b) >= 2 && b[0] == tagMetaLast && b[1] != 0
}

func decodeJSON(b []byte, m *Message) (n int, err error) {
	i := bytes.IndexByte(b, '\n')
	if i < 0 {
		if len(b) > maxRecord {
			return 0, damaged("impossible length")
		}
		return 0, nil
	}
	n = i + 1
	if decodeOurs(b[:i], m) {
		return n, nil
	}
	var r struct {
		Log    string            `json:"log"`
		Raw    []byte            `json:"raw"`
		Stream string            `json:"stream"`
		Attrs  map[string]string `json:"attrs"`
		Time   time.Time         `json:"time"`
	}
	if err := json.Unmarshal(b[:i], &r); err != nil {
		return n, damaged(err.Error())
	}
	*m = Message{Source: Stdout, Time: r.Time, Attrs: r.Attrs}
	if r.Stream == "stderr" {
		m.Source = Stderr
	}
	line := []byte(r.Log)
	line, ok := bytes.CutSuffix(line, []byte{'\n'})
	m.Partial = !ok
	if r.Raw != nil {
		line = r.Raw
	}
	m.Line = line
	return n, nil
}

// decodeOurs reads a record as our writer makes most of them: without
// attributes and other than simple escapes. It reports false for all else.
func decodeOurs(b []byte, m *Message) bool {
	rest, ok := bytes.CutPrefix(b, []byte(`{"log":"`))
	if !ok {
		return false
	}
	end := bytes.IndexByte(rest, '"')
	if end < 0 {
		return false
	}
	line := rest[:end]
	if i := bytes.IndexByte(line, '\\'); i >= 0 && i != end-2 {
		return false
	}
	for _, c := range line {
		if c < 0x20 {
			return false
		}
	}
	if !utf8.Valid(line) {
		return false
	}
	rest = rest[end+1:]
	source := Stdout
	if rest, ok = bytes.CutPrefix(rest, []byte(`,"stream":"std`)); !ok {
		return false
	}
	if tail, ok := bytes.CutPrefix(rest, []byte(`out","time":"`)); ok {
		rest = tail
	} else if tail, ok := bytes.CutPrefix(rest, []byte(`err","time":"`)); ok {
		rest, source = tail, Stderr
	} else {
		return false
	}
	if rest, ok = bytes.CutSuffix(rest, []byte(`"}`)); !ok {
		return false
	}
	t, err := time.Parse(time.RFC3339Nano, string(rest))
	if err != nil {
		return false
	}
	line, whole := bytes.CutSuffix(line, []byte(`\n`))
	if !whole && bytes.IndexByte(line, '\\') >= 0 {
		return false
	}
	*m = Message{Source: source, Time: t, Line: line, Partial: !whole}
	return true
}
