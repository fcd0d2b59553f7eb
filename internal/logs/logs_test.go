package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var drivers = []string{Local, JSONFile}

func config(t testing.TB, driver string) Config {
	return Config{Driver: driver, Path: filepath.Join(t.TempDir(), "c.log")}
}

func write(t testing.TB, c Config, chunks ...string) {
	t.Helper()
	w, err := Open(c, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	s := w.Stream(Stdout)
	for _, b := range chunks {
		s.Write([]byte(b))
	}
	s.Close()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w.packs.Wait()
}

// read joins messages to lines, as a log's user does.
func read(t testing.TB, c Config, o ReadOptions) string {
	t.Helper()
	var b strings.Builder
	err := Read(t.Context(), c, o, func(m *Message) error {
		b.Write(m.Line)
		if !m.Partial {
			b.WriteByte('\n')
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestRoundTrip(t *testing.T) {
	long := strings.Repeat("0123456789", 4000)
	binary := make([]byte, 512)
	for i := range binary {
		binary[i] = byte(i)
	}
	for name, chunks := range map[string][]string{
		"lines":      {"a\nb\n", "c\n"},
		"split":      {"a", "b", "\n", "c\nd", "\n"},
		"empty":      {"\n\n", "\n"},
		"no newline": {"a\nend"},
		"long":       {"before\n" + long + "\nafter\n"},
		"long split": {"x" + long[:100], long[100:30000], long[30000:], "\ny\n"},
		"exact":      {long[:MaxLine] + "\n", long[:2*MaxLine] + "\n", long[:MaxLine-1] + "\n"},
		"binary":     {string(binary), "\n"},
		"html":       {`<a href="x">&</a>\ "` + "\u2028\u2029\r\t\x00\n"},
		"utf8":       {"grüße 世界 🎉\n"},
	} {
		for _, d := range drivers {
			t.Run(name+"/"+d, func(t *testing.T) {
				c := config(t, d)
				write(t, c, chunks...)
				want := strings.Join(chunks, "")
				if got := read(t, c, ReadOptions{}); got != want {
					t.Errorf("read %.200q, want %.200q (%d, %d bytes)", got, want, len(got), len(want))
				}
			})
		}
	}
}

func TestPartialFlags(t *testing.T) {
	for _, d := range drivers {
		c := config(t, d)
		write(t, c, strings.Repeat("x", 2*MaxLine+5)+"\nshort\n")
		var got []string
		if err := Read(t.Context(), c, ReadOptions{}, func(m *Message) error {
			got = append(got, fmt.Sprint(len(m.Line), m.Partial, m.Continued))
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprint([]string{"16384 true false", "16384 true true", "5 false true", "5 false false"})
		if fmt.Sprint(got) != want {
			t.Errorf("%s: got %v, want %v", d, got, want)
		}
	}
}

func TestTornRecord(t *testing.T) {
	for _, d := range drivers {
		c := config(t, d)
		write(t, c, "one\ntwo\nthree\n")
		whole, err := os.ReadFile(c.Path)
		if err != nil {
			t.Fatal(err)
		}
		for cut := 1; cut < 30; cut++ {
			if err := os.WriteFile(c.Path, whole[:len(whole)-cut], 0o600); err != nil {
				t.Fatal(err)
			}
			if got := read(t, c, ReadOptions{}); got != "one\ntwo\n" {
				t.Fatalf("%s: cut by %d: read %q", d, cut, got)
			}
			if got := read(t, c, ReadOptions{Tail: 1}); got != "two\n" {
				t.Fatalf("%s: cut by %d: tail %q", d, cut, got)
			}
			write(t, c, "four\n")
			if got := read(t, c, ReadOptions{}); got != "one\ntwo\nfour\n" {
				t.Fatalf("%s: cut by %d, then written: read %q", d, cut, got)
			}
		}
	}
}

func TestRotation(t *testing.T) {
	for _, d := range drivers {
		for _, compress := range []bool{false, true} {
			for _, files := range []int{1, 2, 5, 1000} {
				c := config(t, d)
				c.MaxSize, c.MaxFiles, c.Compress = 4096, files, compress
				const n = 2000
				var chunks []string
				for i := range n {
					chunks = append(chunks, fmt.Sprintf("line %d\n", i))
				}
				write(t, c, chunks[:n/2]...)
				write(t, c, chunks[n/2:]...)
				got := read(t, c, ReadOptions{})
				all := strings.Join(chunks, "")
				if !strings.HasSuffix(all, got) || got == "" && files > 1 {
					t.Fatalf("%s, %d files: not the end of what was written: %.100q…", d, files, got)
				}
				if files == 1000 && got != all {
					t.Fatalf("%s, compress %v: %d bytes of %d", d, compress, len(got), len(all))
				}
				names, err := os.ReadDir(filepath.Dir(c.Path))
				if err != nil || len(names) > files {
					t.Errorf("%s, compress %v: %d files of at most %d (%v)", d, compress, len(names), files, err)
				}
				for _, tail := range []int{1, 7, 300} {
					want := strings.Join(chunks[n-tail:], "")
					if got := read(t, c, ReadOptions{Tail: tail}); got != want && (files == 1000 || tail == 7 && files > 1) {
						t.Errorf("%s, compress %v, %d files: tail %d: %.100q", d, compress, files, tail, got)
					}
				}
				if err := Remove(c.Path); err != nil {
					t.Error(err)
				}
				if names, _ := os.ReadDir(filepath.Dir(c.Path)); len(names) > 0 {
					t.Errorf("left behind: %v", names)
				}
			}
		}
	}
}

// TestFollow follows a log that is rotated while it is read.
func TestFollow(t *testing.T) {
	for _, d := range drivers {
		for _, compress := range []bool{false, true} {
			c := config(t, d)
			c.MaxSize, c.MaxFiles, c.Compress = 20_000, 10_000, compress
			done := make(chan struct{})
			type result struct {
				text string
				err  error
			}
			results := make(chan result, 1)
			first := make(chan struct{})
			go func() {
				var b bytes.Buffer
				err := Read(t.Context(), c, ReadOptions{Follow: true, Done: done}, func(m *Message) error {
					if b.Len() == 0 {
						close(first)
					}
					b.Write(m.Line)
					b.WriteByte('\n')
					return nil
				})
				results <- result{b.String(), err}
			}()
			w, err := Open(c, func(err error) { t.Error(err) })
			if err != nil {
				t.Fatal(err)
			}
			s := w.Stream(Stderr)
			var want strings.Builder
			for i := range 20_000 {
				line := fmt.Sprintf("line %d of many\n", i)
				want.WriteString(line)
				s.Write([]byte(line))
				if i == 0 {
					<-first // the reader has come to the end and waits
				}
			}
			w.Close()
			close(done)
			r := <-results
			w.packs.Wait()
			if r.err != nil || r.text != want.String() {
				t.Errorf("%s, compress %v: %v, read %d bytes of %d", d, compress, r.err, len(r.text), want.Len())
			}
		}
	}
}

func TestFollowEnds(t *testing.T) {
	c := config(t, Local)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	errs := make(chan error, 1)
	got := make(chan string, 1)
	go func() {
		errs <- Read(ctx, c, ReadOptions{Follow: true}, func(m *Message) error {
			got <- string(m.Line)
			return nil
		})
	}()
	// The log comes into being while it is followed, or just before.
	write(t, c, "hello\n")
	select {
	case l := <-got:
		if l != "hello" {
			t.Errorf("got %q", l)
		}
	case <-ctx.Done():
		t.Error("nothing came")
	}
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("err %v, want canceled", err)
	}
}

func TestSinceUntil(t *testing.T) {
	for _, d := range drivers {
		c := config(t, d)
		write(t, c, "a\n")
		time.Sleep(time.Millisecond) // two moments
		mid := time.Now()
		write(t, c, "b\n")
		if got := read(t, c, ReadOptions{Since: mid}); got != "b\n" {
			t.Errorf("%s: since: %q", d, got)
		}
		if got := read(t, c, ReadOptions{Until: mid}); got != "a\n" {
			t.Errorf("%s: until: %q", d, got)
		}
	}
}

func TestAttrs(t *testing.T) {
	for _, d := range drivers {
		c := config(t, d)
		c.Attrs = map[string]string{"k": "v\"<"}
		write(t, c, "a\n")
		if err := Read(t.Context(), c, ReadOptions{}, func(m *Message) error {
			if m.Attrs["k"] != "v\"<" {
				t.Errorf("%s: attrs %v", d, m.Attrs)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
}

func TestOpenRefusesLinks(t *testing.T) {
	c := config(t, Local)
	victim := c.Path + ".victim"
	if err := os.WriteFile(victim, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, c.Path); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(c, nil); err == nil {
		t.Error("opened through a link")
	}
	if err := Read(t.Context(), c, ReadOptions{}, func(*Message) error { return nil }); err == nil {
		t.Error("read through a link")
	}
}

func FuzzDecode(f *testing.F) {
	for _, d := range drivers {
		c := config(f, d)
		write(f, c, "one\n"+strings.Repeat("x", 20000)+"\n\xff\n<&>\n")
		b, err := os.ReadFile(c.Path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(d == Local, b)
	}
	f.Add(false, []byte(`{"log":"a","stream":"stderr","attrs":{"a":"b"},"time":"2026-01-02T03:04:05.678Z"}`+"\n"))
	f.Fuzz(func(t *testing.T, local bool, b []byte) {
		d := JSONFile
		if local {
			d = Local
		}
		var m Message
		for len(b) > 0 {
			n, err := decode(d, b, &m)
			if n < 0 || n > len(b) {
				t.Fatalf("%d of %d bytes", n, len(b))
			}
			if n == 0 {
				return
			}
			b = b[n:]
			_ = err
		}
	})
}

func FuzzRead(f *testing.F) {
	f.Add(true, []byte("\x00\x00\x00\x02ab\x00\x00\x00\x02"), 1)
	f.Add(false, []byte("{}\n\n{"), 2)
	f.Fuzz(func(t *testing.T, local bool, b []byte, tail int) {
		c := config(t, JSONFile)
		if local {
			c.Driver = Local
		}
		if err := os.WriteFile(c.Path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		_ = Read(t.Context(), c, ReadOptions{Tail: tail}, func(*Message) error { return nil })
		w, err := Open(c, nil)
		if err != nil {
			t.Fatal(err)
		}
		w.Stream(Stdout).Write([]byte("end\n"))
		w.Close()
		last := ""
		if err := Read(t.Context(), c, ReadOptions{}, func(m *Message) error { last = string(m.Line); return nil }); err != nil {
			t.Fatal(err)
		}
		if local && last != "end" && len(b) == 0 {
			t.Fatalf("last line %q", last)
		}
	})
}

func BenchmarkWrite(b *testing.B) {
	for _, d := range drivers {
		b.Run(d, func(b *testing.B) {
			c := config(b, d)
			c.MaxSize, c.MaxFiles = 20<<20, 5
			w, err := Open(c, nil)
			if err != nil {
				b.Fatal(err)
			}
			defer w.Close()
			s := w.Stream(Stdout)
			chunk := bytes.Repeat([]byte(strings.Repeat("x", 99)+"\n"), 655)
			b.SetBytes(int64(len(chunk)))
			for b.Loop() {
				s.Write(chunk)
			}
		})
	}
}

func BenchmarkRead(b *testing.B) {
	for _, d := range drivers {
		b.Run(d, func(b *testing.B) {
			c := config(b, d)
			w, err := Open(c, nil)
			if err != nil {
				b.Fatal(err)
			}
			s := w.Stream(Stdout)
			chunk := bytes.Repeat([]byte(strings.Repeat("x", 99)+"\n"), 655)
			for range 100 {
				s.Write(chunk)
			}
			w.Close()
			b.SetBytes(int64(100 * len(chunk)))
			for b.Loop() {
				if err := Read(b.Context(), c, ReadOptions{}, func(*Message) error { return nil }); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
