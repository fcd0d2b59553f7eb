package logs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// begin opens the file to start with, at the place to start at.
func (r *reader) begin() error {
	newest, seq, err := r.openNewest()
	if errors.Is(err, fs.ErrNotExist) {
		return nil // next will see
	}
	if err != nil {
		return err
	}
	list, err := listRotated(r.conf.Path)
	if err != nil {
		newest.Close()
		return err
	}
	if r.conf.MaxFiles <= 1 {
		list = nil
	}
	switch {
	case r.opts.Tail < 0:
		if _, err := newest.Seek(0, io.SeekEnd); err != nil {
			newest.Close()
			return err
		}
		r.use(newest, newest, seq, true)
		return nil
	case r.opts.Tail == 0:
		for _, f := range list {
			if f.seq >= seq || r.old(f.seq) {
				continue
			}
			file, in, err := r.openRotated(f.seq)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			newest.Close()
			if err != nil {
				return err
			}
			r.use(file, in, f.seq, false)
			return nil
		}
		r.use(newest, newest, seq, true)
		return nil
	}
	return r.beginTail(newest, seq, list)
}

// old tells whether all of a rotated file is before Since.
func (r *reader) old(seq uint64) bool {
	if r.opts.Since.IsZero() {
		return false
	}
	name := rotatedName(r.conf.Path, seq)
	st, err := os.Lstat(name)
	if err != nil {
		st, err = os.Lstat(name + ".gz") // written later, so this is safe
	}
	return err == nil && st.ModTime().Before(r.opts.Since)
}

// beginTail walks back over the files until there are enough lines.
func (r *reader) beginTail(newest *os.File, seq uint64, list []rotated) error {
	want := r.opts.Tail
	off, got, err := tailOffset(r.conf.Driver, newest, want)
	if err != nil {
		newest.Close()
		return err
	}
	r.use(newest, newest, seq, true)
	for i := len(list) - 1; i >= 0 && got < want; i-- {
		if list[i].seq >= seq {
			continue
		}
		file, in, err := r.openRotated(list[i].seq)
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return err
		}
		if in != io.Reader(file) {
			plain, err := unpack(in, filepath.Dir(r.conf.Path))
			file.Close()
			if err != nil {
				return fmt.Errorf("log %s: %w", file.Name(), err)
			}
			file = plain
		}
		var n int
		off, n, err = tailOffset(r.conf.Driver, file, want-got)
		if err != nil {
			file.Close()
			return err
		}
		got += n
		r.use(file, file, list[i].seq, false)
	}
	_, err = r.file.Seek(off, io.SeekStart)
	return err
}

// unpack writes in to a file without a name.
func unpack(in io.Reader, dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
	if err != nil {
		if f, err = os.CreateTemp(dir, ".unpacked-"); err != nil {
			return nil, err
		}
		if err := os.Remove(f.Name()); err != nil {
			f.Close()
			return nil, err
		}
	}
	if _, err := io.Copy(f, in); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// tailOffset returns where the last want lines of a file begin, and how many
// there are if it has fewer. Pieces of a cut line count as one.
func tailOffset(driver string, f *os.File, want int) (off int64, got int, err error) {
	st, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	end, err := lastGood(f, st.Size(), driver)
	if err != nil {
		return 0, 0, err
	}
	back := &backward{f: f, off: end}
	first := true
	for back.off > 0 {
		at := back.off
		rec, err := back.record(driver)
		if err != nil {
			return at, got, nil // what is before cannot be read
		}
		var m Message
		n, derr := decode(driver, rec, &m)
		if n > 0 && derr == nil && (!m.Partial || first) {
			if got == want {
				return at, got, nil
			}
			got++
		}
		first = false
	}
	return 0, got, nil
}

// backward reads records from the end of a file to its start, through a window.
type backward struct {
	f      *os.File
	off    int64 // the record read last begins here
	window []byte
	start  int64 // of window in the file
}

// bytes returns the n bytes before end.
func (b *backward) bytes(end, n int64) ([]byte, error) {
	if n > end {
		return nil, io.ErrUnexpectedEOF
	}
	if b.window == nil || end-n < b.start || end > b.start+int64(len(b.window)) {
		size := min(max(n, readSize), end)
		b.window = make([]byte, size)
		b.start = end - size
		if _, err := b.f.ReadAt(b.window, b.start); err != nil {
			return nil, err
		}
	}
	return b.window[end-n-b.start : end-b.start], nil
}

func (b *backward) record(driver string) ([]byte, error) {
	if driver == Local {
		tail, err := b.bytes(b.off, 4)
		if err != nil {
			return nil, err
		}
		n := int64(binary.BigEndian.Uint32(tail))
		if n > maxRecord {
			return nil, damaged("impossible length")
		}
		rec, err := b.bytes(b.off, n+8)
		if err != nil {
			return nil, err
		}
		b.off -= n + 8
		return rec, nil
	}
	// The newline that ends the record is at off-1; find the one before.
	for n := int64(1 << 10); ; n *= 2 {
		n = min(n, b.off)
		rec, err := b.bytes(b.off, n)
		if err != nil {
			return nil, err
		}
		if i := bytes.LastIndexByte(rec[:n-1], '\n'); i >= 0 {
			b.off -= n - int64(i) - 1
			return rec[i+1:], nil
		}
		if n == b.off {
			b.off = 0
			return rec, nil
		}
		if n > maxRecord {
			return nil, damaged("impossible length")
		}
	}
}
