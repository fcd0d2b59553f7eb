package packages

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
)

// readSQLite calls f with the blob in a column of each row of a table, in a file of
// SQLite's format 3 (https://www.sqlite.org/fileformat2.html). A write-ahead log beside it
// is not read: who has closed the database has written it back.
func readSQLite(r io.ReaderAt, size int64, table string, column int, f func([]byte) bool) error {
	var head [100]byte
	if _, err := r.ReadAt(head[:], 0); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	s := &sqlite{r: r, page: int64(binary.BigEndian.Uint16(head[16:])), left: maxRead, rows: maxRows}
	if s.page == 1 {
		s.page = 65536
	}
	s.usable = s.page - int64(head[20])
	if s.page < 512 || s.page&(s.page-1) != 0 || s.usable < 480 {
		return fmt.Errorf("pages of %d bytes: %w", s.page, errRPM)
	}
	s.pages = size / s.page
	root := int64(0)
	_, err := s.walk(1, 0, func(row []byte) bool {
		if string(field(row, 0)) == "table" && string(field(row, 1)) == table {
			for _, b := range field(row, 3) {
				root = root<<8 | int64(b)
			}
		}
		return root == 0
	})
	if err != nil || root == 0 {
		return err
	}
	_, err = s.walk(root, 0, func(row []byte) bool { return f(field(row, column)) })
	return err
}

const (
	maxRows  = 1 << 18 // that are looked at
	maxLevel = 20
)

type sqlite struct {
	r                   io.ReaderAt
	page, usable, pages int64
	left                int64 // bytes that may still be read
	rows                int
}

func (s *sqlite) read(n int64) ([]byte, error) {
	if s.left -= s.page; n < 1 || n > s.pages || s.left < 0 {
		return nil, fmt.Errorf("page %d of %d: %w", n, s.pages, errRPM)
	}
	b := make([]byte, s.page)
	_, err := s.r.ReadAt(b, (n-1)*s.page)
	return b, err
}

// walk calls f for each row of the B-tree of a table; more is false once f was.
func (s *sqlite) walk(n int64, level int, f func([]byte) bool) (more bool, err error) {
	b, err := s.read(n)
	if err != nil {
		return false, err
	}
	h := 0
	if n == 1 {
		h = 100
	}
	cells, kind := int(binary.BigEndian.Uint16(b[h+3:])), b[h]
	at := h + 8
	if kind == interior {
		at = h + 12
	}
	if kind != interior && kind != leaf || level > maxLevel || at+2*cells > len(b) {
		return false, fmt.Errorf("page %d is of no table: %w", n, errRPM)
	}
	for i := range cells {
		off := int(binary.BigEndian.Uint16(b[at+2*i:]))
		if off+4 > len(b) {
			return false, fmt.Errorf("page %d: a cell outside of it: %w", n, errRPM)
		}
		if s.rows--; s.rows < 0 { // cells may lead to the same place again and again
			return false, fmt.Errorf("more than %d rows: %w", maxRows, errRPM)
		}
		if kind == interior {
			more, err = s.walk(int64(binary.BigEndian.Uint32(b[off:])), level+1, f)
		} else {
			var row []byte
			if row, err = s.row(b[off:]); err == nil {
				more = f(row)
			}
		}
		if err != nil || !more {
			return false, err
		}
	}
	if kind == interior {
		return s.walk(int64(binary.BigEndian.Uint32(b[h+8:])), level+1, f)
	}
	return true, nil
}

const interior, leaf = 0x05, 0x0d

// row is the payload of a leaf's cell: what the page has of it, and what overflows.
func (s *sqlite) row(cell []byte) ([]byte, error) {
	size, n := varint(cell)
	_, k := varint(cell[n:]) // the row's number
	cell = cell[n+k:]
	if n == 0 || k == 0 || size > maxHeader {
		return nil, fmt.Errorf("a row of %d bytes: %w", size, errRPM)
	}
	local := int64(size)
	if limit := s.usable - 35; local > limit {
		least := (s.usable-12)*32/255 - 23
		local = least + (int64(size)-least)%(s.usable-4)
		if local > limit {
			local = least
		}
	} else {
		if local > int64(len(cell)) {
			return nil, fmt.Errorf("a row outside of its page: %w", errRPM)
		}
		return cell[:local], nil
	}
	if local+4 > int64(len(cell)) {
		return nil, fmt.Errorf("a row outside of its page: %w", errRPM)
	}
	out := make([]byte, 0, size)
	out = append(out, cell[:local]...)
	for next := int64(binary.BigEndian.Uint32(cell[local:])); int64(len(out)) < int64(size); {
		b, err := s.read(next)
		if err != nil {
			return nil, err
		}
		next = int64(binary.BigEndian.Uint32(b))
		out = append(out, b[4:4+min(s.usable-4, int64(size)-int64(len(out)))]...)
	}
	return out, nil
}

// field is a column of a row, as its bytes; nil if it is not there.
func field(row []byte, column int) []byte {
	size, n := varint(row)
	if n == 0 || size > uint64(len(row)) || size < uint64(n) {
		return nil
	}
	types, data := row[n:size], row[size:]
	for i := 0; len(types) > 0; i++ {
		t, n := varint(types)
		if n == 0 {
			return nil
		}
		types = types[n:]
		width := uint64(0)
		switch {
		case t >= 12:
			width = (t - 12) / 2
		case t < 8:
			width = []uint64{0, 1, 2, 3, 4, 6, 8, 8}[t]
		}
		if width > uint64(len(data)) {
			return nil
		}
		if i == column {
			return data[:width]
		}
		data = data[width:]
	}
	return nil
}

// varint reads SQLite's integers: big-endian, seven bits a byte, the ninth has eight. n is
// 0 if b ends before it does.
func varint(b []byte) (v uint64, n int) {
	for n < len(b) && n < 8 {
		v = v<<7 | uint64(b[n]&0x7f)
		if n++; b[n-1] < 0x80 {
			return v, n
		}
	}
	if n < len(b) {
		return min(v<<8|uint64(b[n]), math.MaxInt64), n + 1
	}
	return 0, 0
}
