package serve

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Of include/uapi/linux/fuse.h. A file system of one directory with read-only files
// needs little of it; all else is answered by ENOSYS, which the kernel remembers.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opStatfs      = 17
	opRelease     = 18
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42

	inHeader  = 40
	outHeader = 16

	flagAsyncRead    = 1 << 0
	flagBigWrites    = 1 << 5
	flagParallelDirs = 1 << 18
	flagMaxPages     = 1 << 22
	flagInitExt      = 1 << 30
	flagTimeout      = 1 << (42 - 32) // of flags2
	openDirect       = 1 << 0
	kernelMajor      = 7
	ourMinor         = 31

	rootNode = 1
	// maxRead is what the kernel asks for at most, in bytes.
	maxRead = 1 << 20
	// maxWrite is the least that the protocol allows: nothing is written.
	maxWrite = 4096
	inBuffer = 64 << 10
	readers  = 2
	// background is how many read-aheads the kernel has under way.
	background = 128
	// hangTime is how long the kernel waits for this program if it can tell; then it
	// ends the connection.
	hangTime = 120 * time.Second
	// attrTime is how long the kernel knows a file's attributes.
	attrTime = 24 * 3600 // seconds
)

var ne = binary.NativeEndian

// request is the kernel's, with what is behind the header.
type request struct {
	op     uint32
	unique uint64
	node   uint64
	body   []byte
}

// conn is the connection to the kernel.
type conn struct {
	s   *Server
	dev *os.File
	wg  sync.WaitGroup
	buf sync.Pool // of *[]byte for answers
	// ended is closed when nothing is answered any more.
	ended chan struct{}
}

// ServeFUSE answers the kernel's requests until the file system is unmounted, or
// the connection ends otherwise. The descriptor is the connection's from now.
func (s *Server) ServeFUSE(fd int) error {
	if err := unix.SetNonblock(fd, true); err != nil { // so that waiting takes no thread
		return os.NewSyscallError("fcntl", err)
	}
	c := &conn{s: s, dev: os.NewFile(uintptr(fd), "/dev/fuse"), ended: make(chan struct{})}
	defer close(c.ended)
	s.mu.Lock()
	closed := s.closed
	s.served = append(s.served, c)
	s.mu.Unlock()
	if closed {
		c.dev.Close()
		return nil
	}
	c.buf.New = func() any { b := make([]byte, outHeader+128<<10); return &b }
	errs := make(chan error, readers)
	for range readers {
		go func() { errs <- c.loop() }()
	}
	err := <-errs
	c.dev.Close() // ends the others
	for range readers - 1 {
		<-errs
	}
	c.wg.Wait()
	return err
}

func (c *conn) loop() error {
	buf := make([]byte, inBuffer)
	for {
		n, err := c.dev.Read(buf)
		switch {
		case errors.Is(err, unix.ENODEV), errors.Is(err, os.ErrClosed):
			return nil // unmounted
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue // the request was interrupted before it was read
		case err != nil:
			return fmt.Errorf("fuse: %w", err)
		}
		if n < inHeader {
			return fmt.Errorf("fuse: a request of %d bytes", n)
		}
		r := request{op: ne.Uint32(buf[4:]), unique: ne.Uint64(buf[8:]), node: ne.Uint64(buf[16:]), body: buf[inHeader:n]}
		if r.op == opDestroy {
			c.reply(&r, 0, nil)
			return nil
		}
		c.serve(&r)
	}
}

// reply answers a request.
func (c *conn) reply(r *request, errno unix.Errno, body []byte) {
	b := make([]byte, outHeader, outHeader+len(body))
	c.send(r, errno, append(b, body...))
}

// send answers with b, which has room for the header at its beginning.
func (c *conn) send(r *request, errno unix.Errno, b []byte) {
	if errno != 0 {
		b = b[:outHeader]
	}
	ne.PutUint32(b, uint32(len(b)))
	ne.PutUint32(b[4:], uint32(-int32(errno)))
	ne.PutUint64(b[8:], r.unique)
	// ENOENT: nobody waits any more. Other errors end the loops.
	_, _ = c.dev.Write(b)
}

func (c *conn) serve(r *request) {
	need := func(n int) bool {
		if len(r.body) >= n {
			return true
		}
		c.reply(r, unix.EINVAL, nil)
		return false
	}
	switch r.op {
	case opInit:
		if need(16) {
			c.init(r)
		}
	case opLookup:
		c.lookup(r)
	case opForget:
		if len(r.body) >= 8 {
			c.s.forget(r.node, ne.Uint64(r.body))
		}
	case opBatchForget:
		if len(r.body) >= 8 {
			for b := r.body[8:]; len(b) >= 16; b = b[16:] {
				c.s.forget(ne.Uint64(b), ne.Uint64(b[8:]))
			}
		}
	case opGetattr:
		c.getattr(r)
	case opOpen:
		if need(8) {
			c.open(r)
		}
	case opRead:
		if need(24) {
			c.read(r)
		}
	case opRelease:
		c.s.release(r.node)
		c.reply(r, 0, nil)
	case opOpendir:
		c.reply(r, 0, make([]byte, 16))
	case opReaddir:
		if need(24) {
			c.readdir(r)
		}
	case opReleasedir:
		c.reply(r, 0, nil)
	case opStatfs:
		b := make([]byte, 80)
		ne.PutUint32(b[40:], 4096) // block size
		ne.PutUint32(b[44:], unix.NAME_MAX)
		ne.PutUint32(b[48:], 4096)
		c.reply(r, 0, b)
	case opInterrupt: // no answer; the read ends by itself
	default:
		c.reply(r, unix.ENOSYS, nil)
	}
}

func (c *conn) init(r *request) {
	major, minor, ahead, flags := ne.Uint32(r.body), ne.Uint32(r.body[4:]), ne.Uint32(r.body[8:]), ne.Uint32(r.body[12:])
	if major < kernelMajor || major == kernelMajor && minor < 23 {
		c.reply(r, unix.EPROTO, nil)
		return
	}
	var flags2 uint32
	if flags&flagInitExt != 0 && len(r.body) >= 20 {
		flags2 = ne.Uint32(r.body[16:])
	}
	b := make([]byte, 64)
	ne.PutUint32(b[0:], kernelMajor)
	// That of the structures used here; INIT's flags say what else there is.
	ne.PutUint32(b[4:], ourMinor)
	ne.PutUint32(b[8:], ahead)
	ne.PutUint32(b[12:], flags&(flagAsyncRead|flagBigWrites|flagParallelDirs|flagMaxPages|flagInitExt))
	ne.PutUint16(b[16:], background)
	ne.PutUint16(b[18:], background*3/4)
	ne.PutUint32(b[20:], maxWrite)
	ne.PutUint32(b[24:], 1)
	ne.PutUint16(b[28:], maxRead/4096)
	ne.PutUint32(b[32:], flags2&flagTimeout)
	if flags2&flagTimeout != 0 {
		ne.PutUint16(b[40:], uint16(hangTime/time.Second))
	}
	c.reply(r, 0, b)
}

// attr is a struct fuse_attr: of the directory, or of a chain's file.
func (c *conn) attr(ch *chain) []byte {
	b := make([]byte, 88)
	mode, links := uint32(unix.S_IFDIR|0o755), uint32(2)
	ne.PutUint64(b[0:], rootNode)
	if ch != nil {
		mode, links = unix.S_IFREG|0o444, 1
		ne.PutUint64(b[0:], ch.node)
		ne.PutUint64(b[8:], uint64(ch.m.Size))
		ne.PutUint64(b[16:], uint64(ch.m.Size+511)/512)
	}
	ne.PutUint32(b[60:], mode)
	ne.PutUint32(b[64:], links)
	ne.PutUint32(b[80:], 4096)
	return b
}

func (c *conn) lookup(r *request) {
	name, _, _ := strings.Cut(string(bytes.TrimRight(r.body, "\x00")), ".") // see lazy.Client.Path
	if r.node != rootNode {
		c.reply(r, unix.ENOTDIR, nil)
		return
	}
	c.s.mu.Lock()
	ch := c.s.names[name]
	if ch != nil {
		ch.lookups++
	}
	c.s.mu.Unlock()
	if ch == nil {
		c.reply(r, unix.ENOENT, nil) // not remembered: it may come
		return
	}
	b := make([]byte, 40, 128)
	ne.PutUint64(b[0:], ch.node)
	// The name is looked up each time, since it may go.
	ne.PutUint64(b[24:], attrTime)
	c.reply(r, 0, append(b, c.attr(ch)...))
}

func (s *Server) forget(node, n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ch := s.nodes[node]; ch != nil {
		ch.lookups -= min(n, ch.lookups)
		s.dropLocked(ch)
	}
}

func (s *Server) node(n uint64) *chain {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nodes[n]
}

func (c *conn) getattr(r *request) {
	b := make([]byte, 16, 104)
	var ch *chain
	if r.node != rootNode {
		if ch = c.s.node(r.node); ch == nil {
			c.reply(r, unix.ESTALE, nil)
			return
		}
		ne.PutUint64(b, attrTime)
	}
	c.reply(r, 0, append(b, c.attr(ch)...))
}

func (c *conn) open(r *request) {
	flags := ne.Uint32(r.body)
	if flags&unix.O_ACCMODE != unix.O_RDONLY {
		c.reply(r, unix.EROFS, nil)
		return
	}
	c.s.mu.Lock()
	ch := c.s.nodes[r.node]
	if ch != nil {
		ch.opens++
	}
	c.s.mu.Unlock()
	if ch == nil {
		c.reply(r, unix.ESTALE, nil)
		return
	}
	b := make([]byte, 16)
	// What is above caches and reads ahead, within each file, and the file below is
	// cached too. The kernel's FUSE would do so beyond a file's end, into the next one's
	// contents, which nobody wants yet.
	ne.PutUint32(b[8:], openDirect)
	c.reply(r, 0, b)
}

func (s *Server) release(node uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ch := s.nodes[node]; ch != nil && ch.opens > 0 {
		ch.opens--
		s.dropLocked(ch)
	}
}

// read answers at once what is here, and else when it has come.
func (c *conn) read(r *request) {
	off, size := int64(ne.Uint64(r.body[8:])), int64(ne.Uint32(r.body[16:]))
	ch := c.s.node(r.node)
	if ch == nil {
		c.reply(r, unix.ESTALE, nil)
		return
	}
	if size > maxRead || off < 0 {
		c.reply(r, unix.EINVAL, nil)
		return
	}
	end := min(off+size, ch.m.Size)
	if end <= off {
		c.reply(r, 0, nil)
		return
	}
	if ch.here(off, end) {
		c.answer(*r, ch, off, end, nil, nil)
		return
	}
	began := time.Now()
	own := request{op: r.op, unique: r.unique, node: r.node} // the body is read over
	c.wg.Add(1)
	go func() {
		defer c.wg.Done()
		ctx, cancel := context.WithDeadlineCause(c.s.ctx, began.Add(c.s.o.ReadTime), errLate)
		defer cancel()
		unkept, err := ch.come(ctx, off, end)
		c.answer(own, ch, off, end, unkept, err)
	}()
}

// answer answers a read of what has come; or, with an error, of what has not.
func (c *conn) answer(r request, ch *chain, off, end int64, unkept []wait, err error) {
	bp := c.buf.Get().(*[]byte)
	defer c.buf.Put(bp)
	size := outHeader + end - off
	if int64(len(*bp)) < size {
		*bp = make([]byte, size)
	}
	b := (*bp)[:size]
	if err == nil {
		err = ch.read(b[outHeader:], off, unkept)
	}
	errno := unix.Errno(0)
	if err != nil {
		errno = unix.EIO
		if ch.failed(err) {
			c.s.log.Warn("a read of a lazy image fails", "chain", ch.id, "offset", off, "err", err)
		}
	}
	c.send(&r, errno, b)
}

var errLate = errors.New("what is read did not come in time")

func (c *conn) readdir(r *request) {
	off, size := ne.Uint64(r.body[8:]), int(ne.Uint32(r.body[16:]))
	c.s.mu.Lock()
	type ent struct {
		name string
		node uint64
		mode uint32
	}
	all := []ent{{".", rootNode, unix.S_IFDIR}, {"..", rootNode, unix.S_IFDIR}}
	for _, ch := range c.s.nodes {
		if name := ch.id.Encoded(); c.s.names[name] == ch {
			all = append(all, ent{name, ch.node, unix.S_IFREG})
		}
	}
	c.s.mu.Unlock()
	// An entry's offset is its node behind those of the dots, so that it stays the
	// same when others come and go.
	place := func(i int) uint64 {
		if i < 2 {
			return uint64(i + 1)
		}
		return all[i].node + 2
	}
	slices.SortFunc(all[2:], func(a, b ent) int { return cmp.Compare(a.node, b.node) })
	var b []byte
	for i, e := range all {
		if place(i) <= off {
			continue
		}
		if len(b)+(24+len(e.name)+7)&^7 > size {
			break
		}
		b = ne.AppendUint64(b, e.node)
		b = ne.AppendUint64(b, place(i))
		b = ne.AppendUint32(b, uint32(len(e.name)))
		b = ne.AppendUint32(b, e.mode>>12)
		b = append(b, e.name...)
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
	}
	c.reply(r, 0, b)
}
