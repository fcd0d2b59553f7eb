package vmm

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	// consoleFile bounds a file of the kernel's log: bytes. When it is full it
	// becomes kernel.log.1, in the place of the one before.
	consoleFile = 256 << 10
	// consoleEarly bounds what is kept of a machine that is not in use yet.
	consoleEarly = 32 << 10
	// consoleEnd is how long the last output of a machine that has ended may
	// take to arrive.
	consoleEnd = time.Second
	// consoleLine bounds a line that is looked at for a panic.
	consoleLine = 1 << 10
)

// console keeps what the guest's kernel writes.
type console struct {
	done chan struct{} // closed when no more comes

	mu    sync.Mutex
	early []byte
	path  string
	more  bool // what the file has stays
	f     *os.File
	size  int
	line  []byte // the one that is being written
	panic string // the first that told of the end
}

func newConsole() *console { return &console{done: make(chan struct{})} }

// collect takes output until it ends.
func (c *console) collect(r io.Reader) {
	defer close(c.done)
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		c.write(buf[:n])
		if err != nil {
			return
		}
	}
}

func (c *console) write(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lookLocked(b)
	if c.f == nil {
		if c.path == "" {
			c.early = append(c.early, b...)
			if n := len(c.early) - consoleEarly; n > 0 {
				c.early = append(c.early[:0], c.early[n:]...)
			}
		}
		return
	}
	if c.size+len(b) > consoleFile {
		if os.Rename(c.path, c.path+".1") != nil || c.openLocked() != nil { // the next file is a new one
			return
		}
	}
	n, _ := c.f.Write(b) // a full disk loses a part of a log
	c.size += n
}

func (c *console) openLocked() error {
	if c.f != nil {
		c.f.Close()
		c.f = nil
	}
	flags := os.O_CREATE | os.O_WRONLY | os.O_TRUNC
	if c.more {
		flags = os.O_CREATE | os.O_WRONLY | os.O_APPEND
	}
	f, err := os.OpenFile(c.path, flags, 0o600)
	if err != nil {
		return fmt.Errorf("kernel log: %w", err)
	}
	c.f, c.size = f, 0
	if st, err := f.Stat(); err == nil {
		c.size = int(st.Size())
	}
	return nil
}

// lookLocked looks for the kernel's last words.
func (c *console) lookLocked(b []byte) {
	for len(b) > 0 {
		part, rest, whole := bytes.Cut(b, []byte("\n"))
		if room := consoleLine - len(c.line); room > 0 {
			c.line = append(c.line, part[:min(room, len(part))]...)
		}
		if b = rest; !whole {
			return
		}
		if i := bytes.Index(c.line, []byte("Kernel panic - not syncing: ")); i >= 0 && c.panic == "" {
			text := strings.TrimSpace(strings.ToValidUTF8(string(c.line[i:]), "?"))
			c.panic = "kernel panic: " + strings.TrimPrefix(text, "Kernel panic - not syncing: ")
		}
		c.line = c.line[:0]
	}
}

// file is where it is kept.
func (c *console) file() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.path
}

// keep writes what has come and what comes to a file; with more, what is there
// already stays.
func (c *console) keep(path string, more bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.path, c.more = path, more
	if err := c.openLocked(); err != nil {
		return err
	}
	n, err := c.f.Write(c.early)
	c.size, c.early = c.size+n, nil
	if err != nil {
		return fmt.Errorf("kernel log: %w", err)
	}
	return nil
}

// lastWords are the kernel's, empty if it has said none, once everything has
// come.
func (c *console) lastWords() string {
	select {
	case <-c.done:
	case <-time.After(consoleEnd):
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.panic
}

func (c *console) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.path, c.early = "closed", nil
	if c.f != nil {
		c.f.Close()
		c.f = nil
	}
}
