// Package hostfs serves a directory, or a single file, of the host to a guest,
// by FUSE messages over a byte stream.
//
// The guest's kernel is hostile. So a server runs in a process of its own that
// sees nothing but the tree it serves (package vm's jail), and inside of that:
// each name is one component that is looked up below a directory's descriptor
// without following links; nodes and handles are numbers in tables here; device
// nodes are not made; what is asked at once is bounded.
//
//	hostfs.go  the stream, and what is open
//	nodes.go   the table of nodes
//	names.go   looking up, making, renaming, removing, reading directories
//	files.go   opening, reading, writing
//	attrs.go   attributes, extended attributes
//	ids.go     ids of users and groups, which a guest may have others of
//	foretell.go what is told before it is asked
//	locks.go   locks, which hold between guests and the host's processes
//	confine.go the system calls that a server may make
//
// Permissions are checked in the guest (default_permissions); what it makes
// belongs to the user who made it there.
package hostfs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel/ahead"
)

const (
	// maxWrite is the most data of one message, in bytes; the guest's side takes
	// up to a MiB.
	maxWrite   = 512 << 10
	maxMessage = maxWrite + 4096
	// inFlight is how many requests are worked on at once.
	inFlight = 32
	// maxWaiting is how many may wait for locks.
	maxWaiting = 1024
	// maxFiles is as much as a limit of descriptors counts for.
	maxFiles = 1 << 20
)

// Options say how a tree is served.
type Options struct {
	// Root is a descriptor of the tree's root (O_PATH will do). The server owns
	// it.
	Root     int
	ReadOnly bool
	// Cache is how long the guest may keep names and attributes. With 0 it sees
	// at once what others change; else it does when it opens a file, or takes a
	// lock on it.
	Cache time.Duration
	// IDs map the guest's ids.
	IDs IDs
}

// handle is an open file or directory.
type handle struct {
	f    *os.File
	fd   int
	node *node

	mu     sync.Mutex // of a directory's position
	pos    int64
	rest   []byte          // entries that were read and not given
	owners map[uint64]bool // who has asked for POSIX locks by it
	closed bool
}

// server is the file system. It implements fuse.RawFileSystem.
type server struct {
	fuse.RawFileSystem // answers ENOSYS to what is not here
	opts               Options

	// use is held shared while descriptors of nodes are used, and alone while
	// they are closed.
	use sync.RWMutex

	mu      sync.Mutex
	nodes   map[uint64]*node
	byKey   map[key]*node
	next    uint64
	open    int   // nodes with a descriptor
	clock   int64 // counts the uses of nodes
	dead    []int // descriptors of forgotten nodes, to be closed
	handles map[uint64]*handle
	nextFH  uint64
	locks   map[lockKey]*lockFile
	owners  atomic.Int64 // of all handles
	// What is to be sent with the answers of requests, by their numbers; and the
	// devices on which closing says nothing.
	foretold map[uint64][]byte
	silentOn map[uint64]bool

	changes changes

	// What of each there may be: a share of the process's descriptors.
	maxOpen, maxHandles, maxLocks int

	done chan struct{}  // closed when the stream has ended
	send func(b []byte) // sends a message to the guest; nil: nobody listens
}

// Serve answers the guest's messages on conn until it ends, and frees
// everything. A guest that breaks the protocol is an error. The process needs
// /proc and a umask of 0, as the guest's kernel has applied its callers', and
// should discard the log package's output, to which the library writes.
func Serve(conn io.ReadWriter, o Options) error {
	s := newServer(o)
	defer s.close()
	if err := s.enterRoot(); err != nil {
		return err
	}
	return s.loop(conn, s.protocol())
}

func newServer(o Options) *server {
	files := 1024
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err == nil {
		files = int(min(lim.Cur, maxFiles))
	}
	return &server{
		maxOpen: files / 2, maxHandles: files / 4, maxLocks: files / 8,
		RawFileSystem: fuse.NewDefaultRawFileSystem(), opts: o,
		nodes: map[uint64]*node{}, byKey: map[key]*node{}, next: fuse.FUSE_ROOT_ID + 1,
		handles: map[uint64]*handle{}, locks: map[lockKey]*lockFile{},
		foretold: map[uint64][]byte{}, silentOn: map[uint64]bool{}, done: make(chan struct{}),
	}
}

// protocol takes messages apart.
func (s *server) protocol() *fuse.ProtocolServer {
	return fuse.NewProtocolServer(s, &fuse.MountOptions{
		MaxWrite: maxWrite, MaxReadAhead: maxWrite, EnableLocks: true, MaxBackground: inFlight, Logger: log.New(io.Discard, "", 0),
		ExtraCapabilities: fuse.CAP_ATOMIC_O_TRUNC,
	})
}

// Buffers hold whole messages. Most are small, and a request that waits for a
// lock keeps its own.
var large, small = pool(maxMessage), pool(smallMessage)

const smallMessage = 8 << 10

func pool(size int) *sync.Pool {
	return &sync.Pool{New: func() any {
		b := make([]byte, size)
		return &b
	}}
}

// forRequest and forAnswer choose a buffer's size.
func forRequest(size int) *sync.Pool {
	if size > smallMessage {
		return large
	}
	return small
}

func forAnswer(opcode uint32) *sync.Pool {
	switch opcode {
	case opReadlink, opRead, opGetXAttr, opListXAttr, opReadDir, opReadDirPlus:
		return large
	}
	return small
}

// loop reads requests and answers each in a goroutine of its own.
func (s *server) loop(conn io.ReadWriter, proto *fuse.ProtocolServer) (err error) {
	var (
		wg   sync.WaitGroup
		wmu  sync.Mutex
		slot = make(chan struct{}, inFlight)
		wait = make(chan struct{}, maxWaiting)
	)
	defer wg.Wait()
	defer close(s.done) // wakes who waits for a lock
	s.send = func(b []byte) {
		wmu.Lock()
		defer wmu.Unlock()
		_, _ = conn.Write(b) // its failure is the next read's
	}
	r := bufio.NewReaderSize(conn, 2*smallMessage) // several messages are one read
	for {
		var head [4]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("hostfs: %w", err)
		}
		n := binary.NativeEndian.Uint32(head[:])
		if n < inHeaderSize || n > maxMessage {
			return fmt.Errorf("hostfs: request of %d bytes", n)
		}
		ins := forRequest(int(n))
		in := ins.Get().(*[]byte)
		copy(*in, head[:])
		if _, err := io.ReadFull(r, (*in)[4:n]); err != nil {
			return fmt.Errorf("hostfs: %w", err)
		}
		opcode, unique := binary.NativeEndian.Uint32((*in)[4:]), binary.NativeEndian.Uint64((*in)[8:])
		quiet, end := ahead.Quiet((*in)[:n]), s.changes.begin((*in)[:n])
		serve := func() {
			defer ins.Put(in)
			outs := forAnswer(opcode)
			out := outs.Get().(*[]byte)
			defer outs.Put(out)
			wait := opcode == opSetLkw // takes s.use itself
			if !wait {
				s.use.RLock()
			}
			size := answer(proto, (*in)[:n], *out)
			if !wait {
				s.use.RUnlock()
			}
			end()
			s.tidy()
			told := s.foretellings(unique)
			switch {
			case size == 0 || quiet:
			case len(told) > 0: // before the answer, upon which it is asked for
				s.send(append(told, (*out)[:size]...))
			default:
				s.send((*out)[:size])
			}
		}
		switch opcode {
		case opInit, opForget, opBatchForget, opInterrupt:
			serve() // in their order
			continue
		}
		slot := slot
		if opcode == opSetLkw {
			slot = wait // an unlock must not wait behind it
		}
		slot <- struct{}{}
		wg.Go(func() {
			defer func() { <-slot }()
			serve()
		})
	}
}

// Of struct fuse_in_header and enum fuse_opcode (include/uapi/linux/fuse.h).
const (
	inHeaderSize  = 40
	outHeaderSize = 16

	opForget      = 2
	opReadlink    = 5
	opRead        = 15
	opGetXAttr    = 22
	opListXAttr   = 23
	opInit        = 26
	opReadDir     = 28
	opSetLkw      = 33
	opCreate      = 35
	opInterrupt   = 36
	opBatchForget = 42
	opReadDirPlus = 44
)

// answer returns the reply's size, 0 if there is none. A request that the
// library can't parse is answered EIO.
func answer(proto *fuse.ProtocolServer, in, out []byte) (size int) {
	opcode, unique := binary.NativeEndian.Uint32(in[4:]), binary.NativeEndian.Uint64(in[8:])
	failed := func() int {
		if opcode == opForget || opcode == opBatchForget || opcode == opInterrupt {
			return 0
		}
		binary.NativeEndian.PutUint32(out, outHeaderSize)
		binary.NativeEndian.PutUint32(out[4:], ^uint32(unix.EIO)+1) // negative
		binary.NativeEndian.PutUint64(out[8:], unique)
		return outHeaderSize
	}
	defer func() {
		if recover() != nil { // the library trusts kernels
			size = failed()
		}
	}()
	n, status := proto.HandleRequest([][]byte{in}, [][]byte{out})
	if !status.Ok() {
		return failed()
	}
	return n
}

// close frees what a guest has left.
func (s *server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.handles {
		h.f.Close()
	}
	for _, l := range s.locks {
		l.f.Close()
	}
	for _, n := range s.nodes {
		if n.fd >= 0 {
			unix.Close(n.fd)
		}
	}
	for _, fd := range s.dead {
		unix.Close(fd)
	}
	s.nodes, s.byKey, s.handles, s.locks, s.dead = nil, nil, nil, nil, nil
}

func (s *server) String() string { return "hostfs" }

// errno is the error as FUSE has it.
func errno(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	var e syscall.Errno
	if errors.As(err, &e) {
		return fuse.Status(e)
	}
	return fuse.EIO
}

// addHandle puts an open file into the table; it owns f.
func (s *server) addHandle(f *os.File, n *node) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.handles) >= s.maxHandles {
		f.Close()
		return 0, unix.ENFILE
	}
	n.users++
	s.nextFH++
	s.handles[s.nextFH] = &handle{f: f, fd: int(f.Fd()), node: n}
	return s.nextFH, nil
}

func (s *server) handle(fh uint64) (*handle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.handles[fh]
	if h == nil {
		return nil, unix.EBADF
	}
	return h, nil
}

func (s *server) dropHandle(fh uint64) {
	s.mu.Lock()
	h := s.handles[fh]
	delete(s.handles, fh)
	if h != nil {
		h.node.users--
	}
	s.mu.Unlock()
	if h == nil {
		return
	}
	h.f.Close()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	s.owners.Add(-int64(len(h.owners)))
	for owner := range h.owners {
		s.dropLocks(h.node.id, owner)
	}
}

// writable says whether changes may be made.
func (s *server) writable() error {
	if s.opts.ReadOnly {
		return unix.EROFS
	}
	return nil
}
