package tenon

import (
	"io"
	"sync"
)

// inboxSize is how many bytes of standard input wait for a container at most.
// Beyond it the connection is not read, and signals behind the input wait too.
const inboxSize = 1 << 20

// inbox hands standard input from the connection's reader to the engine. It is
// a bounded pipe whose writer doesn't wait for each read.
type inbox struct {
	mu   sync.Mutex
	cond sync.Cond
	buf  []byte
	off  int
	err  error
}

func newInbox() *inbox {
	b := &inbox{}
	b.cond.L = &b.mu
	return b
}

// put copies p in; it waits while the box is full and reports whether anybody
// may still read.
func (b *inbox) put(p []byte) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.buf)-b.off >= inboxSize && b.err == nil {
		b.cond.Wait()
	}
	if b.err != nil {
		return false
	}
	if b.off > len(b.buf)/2 { // what is left is the smaller part: move it
		b.buf, b.off = b.buf[:copy(b.buf, b.buf[b.off:])], 0
	}
	b.buf = append(b.buf, p...)
	b.cond.Broadcast()
	return true
}

// close ends the box: what is in it is still read, then err. The first err counts.
func (b *inbox) close(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.err = err
	}
	b.cond.Broadcast()
}

// Read implements io.Reader.
func (b *inbox) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.off == len(b.buf) && b.err == nil {
		b.cond.Wait()
	}
	if b.off == len(b.buf) {
		return 0, b.err
	}
	n := copy(p, b.buf[b.off:])
	b.off += n
	b.cond.Broadcast()
	return n, nil
}

var _ io.Reader = (*inbox)(nil)
