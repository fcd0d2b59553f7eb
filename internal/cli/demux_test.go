package cli

import (
	"bytes"
	"encoding/binary"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/moby/moby/api/pkg/stdcopy"
)

func frame(stream byte, text string) string {
	n := len(text)
	return string([]byte{stream, 0, 0, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}) + text
}

// countingWriter counts writes.
type countingWriter struct {
	bytes.Buffer
	writes int
}

func (c *countingWriter) Write(p []byte) (int, error) { c.writes++; return c.Buffer.Write(p) }

func TestDemux(t *testing.T) {
	in := frame(1, "one\n") + frame(2, "two\n") + frame(1, strings.Repeat("x", 200_000)) + frame(0, "in") + frame(1, "")
	for name, r := range map[string]io.Reader{"whole": strings.NewReader(in), "byte by byte": iotest.OneByteReader(strings.NewReader(in))} {
		var out, errOut countingWriter
		if err := demux(&out, &errOut, r); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if out.String() != "one\n"+strings.Repeat("x", 200_000)+"in" || errOut.String() != "two\n" {
			t.Errorf("%s: %d and %q", name, out.Len(), errOut.String())
		}
	}
	// Both streams into one: the order stays.
	var both countingWriter
	if err := demux(&both, &both, strings.NewReader(strings.Repeat(frame(1, "a")+frame(2, "b"), 100))); err != nil || both.String() != strings.Repeat("ab", 100) {
		t.Errorf("got %q, %v", both.String(), err)
	}
	var many countingWriter
	if err := demux(&many, io.Discard, strings.NewReader(strings.Repeat(frame(1, "a line\n"), 10_000))); err != nil || many.writes > 10 {
		t.Errorf("%d writes, %v", many.writes, err)
	}
	if err := demux(io.Discard, io.Discard, strings.NewReader(frame(3, "broken"))); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("got %v", err)
	}
}

func FuzzDemux(f *testing.F) {
	f.Add([]byte(frame(1, "one") + frame(2, "two")))
	f.Add([]byte(frame(3, "error")))
	f.Add([]byte{9, 0, 0, 0, 0, 0, 0, 1, 'x'})
	f.Add([]byte{1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 'x'})
	f.Fuzz(func(t *testing.T, in []byte) {
		var out, errOut, wantOut, wantErr bytes.Buffer
		err := demux(&out, &errOut, bytes.NewReader(in))
		for rest := in; len(rest) >= 8; {
			n := int(binary.BigEndian.Uint32(rest[4:]))
			if n > 1<<20 {
				return // the reference would allocate that much
			}
			rest = rest[min(8+n, len(rest)):]
		}
		_, want := stdcopy.StdCopy(&wantOut, &wantErr, bytes.NewReader(in))
		// The reference drops a frame that is cut; here its begin is shown.
		if !bytes.HasPrefix(out.Bytes(), wantOut.Bytes()) || !bytes.HasPrefix(errOut.Bytes(), wantErr.Bytes()) {
			t.Fatalf("got %q and %q, want %q and %q", out.Bytes(), errOut.Bytes(), wantOut.Bytes(), wantErr.Bytes())
		}
		if err == nil && want != nil {
			t.Fatalf("got %v, want %v", err, want)
		}
	})
}
