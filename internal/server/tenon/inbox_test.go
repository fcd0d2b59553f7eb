package tenon

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

func TestInbox(t *testing.T) {
	b := newInbox()
	want := make([]byte, 5<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range want {
		want[i] = byte(rng.Uint32())
	}
	go func() {
		for p := want; len(p) > 0; {
			n := min(len(p), 1+rng.IntN(100000))
			b.put(p[:n])
			p = p[n:]
		}
		b.close(io.EOF)
	}()
	got, err := io.ReadAll(iotest.HalfReader(b))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	if cap(b.buf) > 4*inboxSize {
		t.Errorf("the buffer grew to %d", cap(b.buf))
	}
	if b.put([]byte("x")) {
		t.Error("a closed box takes more")
	}
}

func TestInboxClose(t *testing.T) {
	b := newInbox()
	b.put([]byte("rest"))
	full := make(chan bool)
	go func() {
		for b.put(make([]byte, inboxSize)) {
		}
		full <- true
	}()
	boom := errors.New("boom")
	b.close(boom) // wakes the writer
	b.close(io.EOF)
	<-full
	got, err := io.ReadAll(b)
	if !errors.Is(err, boom) || !bytes.HasPrefix(got, []byte("rest")) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
}
