package mux

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"tenon.dev/tenon/internal/channel"
)

// pair is two sessions over a socket pair.
func pair(t testing.TB) (host, guest *Session) {
	t.Helper()
	a, b := pipe(t)
	host, guest = New(a, Config{Host: true}), New(b, Config{})
	t.Cleanup(func() { host.Close(); guest.Close() })
	return host, guest
}

func pipe(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ends := make([]net.Conn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pipe")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return ends[0], ends[1]
}

// open is a stream and its other end.
func open(t testing.TB, from, to *Session) (a, b channel.Conn) {
	t.Helper()
	a, err := from.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c, err := to.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return a, c.(channel.Conn)
}

// limit bounds a test's reads and writes.
func limit(t testing.TB, cs ...channel.Conn) {
	t.Helper()
	for _, c := range cs {
		if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestBothWays(t *testing.T) {
	host, guest := pair(t)
	for _, ends := range [][2]*Session{{host, guest}, {guest, host}} {
		a, b := open(t, ends[0], ends[1])
		limit(t, a, b)
		data := make([]byte, 5*Window+123)
		_, _ = rand.Read(data) // never fails
		var wg sync.WaitGroup
		for _, c := range []channel.Conn{a, b} {
			wg.Go(func() {
				if n, err := c.Write(data); n != len(data) || err != nil {
					t.Errorf("wrote %d: %v", n, err)
				}
				if err := c.CloseWrite(); err != nil {
					t.Error(err)
				}
			})
			wg.Go(func() {
				got, err := io.ReadAll(c)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("read %d bytes: %v", len(got), err)
				}
			})
		}
		wg.Wait()
		if _, err := a.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write after CloseWrite: %v", err)
		}
		a.Close()
		b.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, s := range []*Session{host, guest} {
		if err := s.Ping(ctx); err != nil {
			t.Error(err)
		}
		s.mu.Lock()
		if len(s.streams) != 0 || s.incoming != 0 {
			t.Errorf("%d streams are left, %d incoming", len(s.streams), s.incoming)
		}
		s.mu.Unlock()
	}
}

// TestStalledReader: a stream that nobody reads stops itself alone.
func TestStalledReader(t *testing.T) {
	host, guest := pair(t)
	stalled, reader := open(t, host, guest)
	limit(t, reader)
	wrote := make(chan int)
	go func() {
		n, _ := stalled.Write(make([]byte, 2*Window)) // ends with the session
		wrote <- n
	}()
	for range 20 {
		a, b := open(t, host, guest)
		limit(t, a, b)
		go func() {
			_, _ = a.Write(make([]byte, Window+1)) // the reader counts
			a.Close()
		}()
		if n, err := io.Copy(io.Discard, b); n != Window+1 || err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		b.Close()
	}
	select {
	case n := <-wrote:
		t.Fatalf("wrote %d bytes that nobody read", n)
	default:
	}
	if n, err := io.CopyN(io.Discard, reader, 2*Window); err != nil {
		t.Fatalf("%d bytes: %v", n, err)
	}
	if n := <-wrote; n != 2*Window {
		t.Fatalf("wrote %d", n)
	}
}

// TestCloseEarly: the other end of a closed stream reads what was written, and
// can't write.
func TestCloseEarly(t *testing.T) {
	host, guest := pair(t)
	a, b := open(t, host, guest)
	limit(t, a, b)
	if _, err := a.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if got, err := io.ReadAll(b); string(got) != "last words" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write: %v", err)
	}
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read of a closed stream: %v", err)
	}
	// A writer that waits for credit is woken by the peer's end.
	c, d := open(t, guest, host)
	limit(t, c)
	done := make(chan error)
	go func() {
		_, err := c.Write(make([]byte, 2*Window))
		done <- err
	}()
	if _, err := io.CopyN(io.Discard, d, 10); err != nil {
		t.Fatal(err)
	}
	d.Close()
	if err := <-done; !errors.Is(err, syscall.EPIPE) {
		t.Errorf("waiting write: %v", err)
	}
}

func TestDeadlines(t *testing.T) {
	host, guest := pair(t)
	a, b := open(t, host, guest)
	if err := a.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v", err)
	}
	got := make(chan error)
	go func() {
		_, err := b.Read(make([]byte, 1))
		got <- err
	}()
	if err := b.SetDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v", err)
	}
	// Moved away, it is forgotten.
	limit(t, a, b)
	if _, err := b.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := a.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}

// TestTinyFrames: they come out whole and in order, however they were gathered.
func TestTinyFrames(t *testing.T) {
	host, guest := pair(t)
	a, b := open(t, host, guest)
	limit(t, a, b)
	var want bytes.Buffer
	for i := range 20000 {
		line := bytes.Repeat([]byte{byte(i)}, i%700+1)
		if want.Len()+len(line) > Window {
			break
		}
		want.Write(line)
		if _, err := a.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	a.Close()
	if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, want.Bytes()) {
		t.Errorf("%d bytes of %d, %v", len(got), want.Len(), err)
	}
}

func TestEndOfSession(t *testing.T) {
	host, guest := pair(t)
	a, _ := open(t, host, guest)
	limit(t, a)
	guest.Close()
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && err == nil {
		t.Errorf("read: %v", err)
	}
	<-host.Done()
	if _, err := host.Dial(t.Context()); err == nil {
		t.Error("dialled a session that has ended")
	}
	if _, err := host.Accept(); err == nil {
		t.Error("accepted from a session that has ended")
	}
	if err := host.Ping(t.Context()); err == nil {
		t.Error("pinged it")
	}
}

// TestHostile: what breaks the protocol ends the session, and what is merely
// too much is refused.
func TestHostile(t *testing.T) {
	frame := func(k kind, id uint32, payload string) []byte {
		return append(appendHeader(nil, k, id, len(payload)), payload...)
	}
	flood := func(n int, b []byte) []byte { return bytes.Repeat(b, n) }
	for name, b := range map[string][]byte{
		"unknown kind":      frame(99, 0, ""),
		"zero kind":         frame(0, 0, ""),
		"flags":             {byte(kindPing), 1, 0, 8, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8},
		"too long":          appendHeader(nil, kindData, 1, MaxPayload+1),
		"wrong length":      frame(kindCredit, 1, "xx"),
		"even number":       frame(kindOpen, 2, ""),
		"twice":             append(frame(kindOpen, 1, ""), frame(kindOpen, 1, "")...),
		"more than window":  append(frame(kindOpen, 1, ""), flood(Window/MaxPayload+1, frame(kindData, 1, string(make([]byte, MaxPayload))))...),
		"data after end":    append(append(frame(kindOpen, 1, ""), frame(kindFin, 1, "")...), frame(kindData, 1, "x")...),
		"unearned credit":   append(frame(kindOpen, 1, ""), frame(kindCredit, 1, "\x00\x00\x00\x01")...),
		"pings, never read": flood(1<<20, frame(kindPing, 0, "12345678")),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b2 := pipe(t)
			defer b2.Close()
			s := New(a, Config{Host: true})
			defer s.Close()
			go func() { _, _ = b2.Write(b) }() // fails when the session ends
			select {
			case <-s.Done():
			case <-time.After(time.Minute):
				t.Fatal("the session lives")
			}
			if err := s.Err(); !errors.Is(err, ErrProtocol) {
				t.Error(err)
			}
		})
	}
}

func TestTooManyStreams(t *testing.T) {
	a, b := pipe(t)
	host, guest := New(a, Config{Host: true, MaxIncoming: 2}), New(b, Config{})
	defer host.Close()
	defer guest.Close()
	var last channel.Conn
	for range 3 {
		c, err := guest.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		limit(t, c)
		last = c
	}
	if _, err := last.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("third stream: %v", err)
	}
	if err := host.Ping(t.Context()); err != nil {
		t.Errorf("the session ended: %v", err)
	}
}

// FuzzFrames: whatever a peer sends, a session neither panics nor keeps more
// than it may.
func FuzzFrames(f *testing.F) {
	f.Add(append(appendHeader(nil, kindOpen, 1, 0), appendHeader(nil, kindFin, 1, 0)...))
	f.Add(append(append(appendHeader(nil, kindOpen, 3, 0), appendHeader(nil, kindData, 3, 2)...), "hi"...))
	f.Add(append(appendHeader(nil, kindPing, 0, 8), "12345678"...))
	f.Add(append(appendHeader(nil, kindGone, 1, 0), appendHeader(nil, kindCredit, 1, 4)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := New(&script{r: bytes.NewReader(b)}, Config{Host: true, MaxIncoming: 4})
		for {
			c, err := s.Accept()
			if err != nil {
				break
			}
			go func() {
				_, _ = io.Copy(c, c) // ends with the session
				c.Close()
			}()
		}
		s.Close()
	})
}

// script is a pipe whose peer says what it holds and reads nothing.
type script struct{ r *bytes.Reader }

func (s *script) Read(b []byte) (int, error)  { return s.r.Read(b) }
func (s *script) Write(b []byte) (int, error) { return len(b), nil }
func (s *script) Close() error                { return nil }

func BenchmarkThroughput(b *testing.B) {
	host, guest := pair(b)
	w, r := open(b, host, guest)
	buf := make([]byte, 1<<20)
	b.SetBytes(int64(len(buf)))
	go func() { _, _ = io.Copy(io.Discard, r) }() // ends with the session
	for b.Loop() {
		if _, err := w.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	host, _ := pair(b)
	for b.Loop() {
		if err := host.Ping(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
