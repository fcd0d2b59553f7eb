package vmm

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/vm/qemu"
)

// viewerPair is a connection as a viewer has it, and the client's end.
func viewerPair(t *testing.T) (channel.Conn, net.Conn) {
	t.Helper()
	a, f, err := qemu.Socketpair()
	if err != nil {
		t.Fatal(err)
	}
	b, err := net.FileConn(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	if err := b.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// TestScreen: who is attached gets all output, framed without a terminal, and the end;
// who does not read is cut off and stops nobody.
func TestScreen(t *testing.T) {
	for _, terminal := range []bool{true, false} {
		var s screen
		s.setLog(nil, terminal)
		c, client := viewerPair(t)
		s.attach(c, true)
		slow, stuck := viewerPair(t)
		lazy := s.attach(slow, true)
		quiet, silent := viewerPair(t)
		s.attach(quiet, false)
		want := bytes.Repeat([]byte("0123456789abcdef"), viewerBuffer/16*3)
		read := make(chan []byte, 1)
		go func() {
			b, err := io.ReadAll(client)
			if err != nil {
				t.Error(err)
			}
			read <- b
		}()
		deadline := time.Now().Add(30 * time.Second)
		for at := 0; at < len(want); at += 32 << 10 {
			s.write(want[at : at+32<<10])
			for s.waiting(0) > viewerBuffer/2 { // as fast as the client reads
				if time.Now().After(deadline) {
					t.Fatal("the client reads nothing")
				}
				time.Sleep(time.Millisecond)
			}
		}
		s.end()
		got := <-read
		if !terminal {
			var plain []byte
			for len(got) >= 8 {
				n := int(got[4])<<24 | int(got[5])<<16 | int(got[6])<<8 | int(got[7])
				if got[0] != 1 || len(got) < 8+n {
					t.Fatalf("frame % x", got[:8])
				}
				plain, got = append(plain, got[8:8+n]...), got[8+n:]
			}
			got = plain
		}
		if !bytes.Equal(got, want) {
			t.Errorf("terminal %t: %d bytes of %d", terminal, len(got), len(want))
		}
		if !isClosed(lazy.over) {
			t.Error("who does not read is still attached")
		}
		stuck.Close()
		if b, err := io.ReadAll(silent); err != nil || len(b) > 0 {
			t.Errorf("who wants no output got %d bytes, %v", len(b), err)
		}
		late, last := viewerPair(t)
		s.attach(late, true)
		if b, err := io.ReadAll(last); err != nil || len(b) > 0 {
			t.Errorf("who comes after the end got %d bytes, %v", len(b), err)
		}
	}
}

// waiting is what the i-th viewer has not taken.
func (s *screen) waiting(i int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i >= len(s.viewers) {
		return 0
	}
	v := s.viewers[i]
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.buf)
}
