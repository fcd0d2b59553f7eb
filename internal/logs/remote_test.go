package logs

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// receiver keeps what comes over the connection that it returns.
func receiver(t testing.TB, c Config) (net.Conn, chan error) {
	t.Helper()
	w, err := Open(c, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	done := make(chan error, 1)
	go func() {
		err := Receive(b, w)
		b.Close()
		_ = w.Close() // the test reads the file
		done <- err
	}()
	return a, done
}

func TestRemote(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	c, done := receiver(t, Config{Driver: JSONFile, Path: path})
	r := NewRemote(c, func(err error) { t.Error(err) })
	out, errs := r.Stream(Stdout), r.Stream(Stderr)
	var want []string
	for i := range 1000 {
		line := fmt.Sprintf("line %d %s\n", i, bytes.Repeat([]byte{'x'}, i))
		out.Write([]byte(line[:3]))
		out.Write([]byte(line[3:]))
		want = append(want, line)
	}
	errs.Write([]byte("no newline"))
	errs.Close()
	r.Sync()
	var got []string
	read := func() {
		t.Helper()
		got = nil
		err := Read(t.Context(), Config{Driver: JSONFile, Path: path}, ReadOptions{}, func(m *Message) error {
			line := string(m.Line)
			if !m.Partial {
				line += "\n"
			}
			got = append(got, line)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	read()
	if len(got) != 1001 || got[1000] != "no newline" {
		t.Fatalf("%d lines after Sync", len(got))
	}
	for i, w := range want {
		if got[i] != w {
			t.Fatalf("line %d is %q", i, got[i])
		}
	}
	out.Write([]byte("last\n"))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if read(); len(got) != 1002 {
		t.Errorf("%d lines after Close", len(got))
	}
	if err := r.Close(); err != nil {
		t.Error("second Close:", err)
	}
}

// TestRemoteKeeperGone: output whose keeper is gone is told of, and does not
// stop its writer.
func TestRemoteKeeperGone(t *testing.T) {
	a, b := net.Pipe()
	b.Close()
	told := 0
	r := NewRemote(a, func(error) { told++ })
	s := r.Stream(Stdout)
	for range 10 {
		s.Write([]byte("x\n"))
	}
	r.Sync()
	if told != 1 {
		t.Errorf("told %d times", told)
	}
}

func FuzzReceive(f *testing.F) {
	f.Add([]byte{0, 1, 0, 0, 0, 3, 'a', 'b', '\n', 2, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0})
	f.Add([]byte{9, 9, 9, 9, 9, 9})
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		w, err := Open(Config{Driver: Local, Path: filepath.Join(dir, fmt.Sprint(time.Now().UnixNano()))}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		_ = Receive(struct {
			io.Reader
			io.Writer
		}{bytes.NewReader(b), io.Discard}, w) // whatever it says, it ends
	})
}
