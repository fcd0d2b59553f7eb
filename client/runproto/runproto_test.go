package runproto

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	var buf bytes.Buffer
	w := NewWriter(&buf)
	big := bytes.Repeat([]byte("x"), MaxPayload+5)
	if err := w.Write(Stdout, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := w.Write(StdinEOF, nil); err != nil {
		t.Fatal(err)
	}
	if err := w.WriteJSON(Exit, ExitMessage{Code: 7}); err != nil {
		t.Fatal(err)
	}
	if n, err := w.Stream(Stderr).Write(big); n != len(big) || err != nil {
		t.Fatalf("stream wrote %d, %v", n, err)
	}
	r := NewReader(&buf)
	want := []struct {
		typ byte
		len int
	}{{Stdout, 5}, {StdinEOF, 0}, {Exit, len(`{"code":7}`)}, {Stderr, MaxPayload}, {Stderr, 5}}
	for i, x := range want {
		typ, p, err := r.Next()
		if err != nil || typ != x.typ || len(p) != x.len {
			t.Fatalf("frame %d: got type %d, %d bytes, %v; want %+v", i, typ, len(p), err, x)
		}
	}
	if _, _, err := r.Next(); !errors.Is(err, io.EOF) {
		t.Fatalf("end: %v", err)
	}
}

func TestReaderRefuses(t *testing.T) {
	for _, x := range []struct {
		name string
		in   []byte
		want error
	}{
		{"reserved bytes", []byte{1, 0, 1, 0, 0, 0, 0, 0}, ErrHeader},
		{"too large", []byte{1, 0, 0, 0, 0xff, 0, 0, 0}, ErrTooLarge},
		{"cut header", []byte{1, 0, 0}, io.ErrUnexpectedEOF},
		{"cut payload", []byte{1, 0, 0, 0, 0, 0, 0, 5, 'a'}, io.ErrUnexpectedEOF},
		{"no payload", []byte{1, 0, 0, 0, 0, 0, 0, 5}, io.ErrUnexpectedEOF},
		{"empty", nil, io.EOF},
	} {
		t.Run(x.name, func(t *testing.T) {
			if _, _, err := NewReader(bytes.NewReader(x.in)).Next(); !errors.Is(err, x.want) {
				t.Errorf("got %v, want %v", err, x.want)
			}
		})
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 1, 'a', 2, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := NewReader(bytes.NewReader(in))
		var out bytes.Buffer
		w := NewWriter(&out)
		for {
			typ, p, err := r.Next()
			if err != nil {
				break
			}
			if err := w.Write(typ, p); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.HasPrefix(in, out.Bytes()) {
			t.Fatalf("round trip differs: %x from %x", out.Bytes(), in)
		}
	})
}
