package lazy_test

import (
	"fmt"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkRead reads a large file: first from the registry, then what is here.
func BenchmarkRead(b *testing.B) {
	const size = 128 << 20
	s := newSet(b)
	l, _ := simple(b, size)
	h := newHub(b, l)
	chain, _ := s.index(h, l)
	p := s.add(h, chain)
	read := func(b *testing.B) {
		at := s.mount(p) // with no cache
		if v := os.Getenv("RA"); v != "" {
			var st unix.Stat_t
			must(b, unix.Stat(at, &st))
			if err := os.WriteFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev)), []byte(v), 0); err != nil {
				b.Log(err)
			}
		}
		f, err := os.Open(at + "/f0")
		must(b, err)
		defer f.Close()
		b.StartTimer()
		n, err := io.Copy(io.Discard, struct{ io.Reader }{f})
		b.StopTimer()
		if err != nil || n != size {
			b.Fatal(n, err)
		}
	}
	b.Run("fetched", func(b *testing.B) {
		b.SetBytes(size)
		b.StopTimer()
		read(b)
		if b.N > 1 {
			b.N = 1 // it is here now
		}
	})
	b.Run("here", func(b *testing.B) {
		b.SetBytes(size)
		b.StopTimer()
		for range b.N {
			read(b)
		}
	})
}
