package fork

import (
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	stackSize = 8 << 10
	chunkSize = 192 << 10 // what the plan of a usual container needs, and some
	maxSpare  = 8         // blocks kept for the next starts
)

// block is the memory of a child until it executes the program: its stacks, its
// machine and all that the machine points to. The child runs in it and in the
// program's text alone, so that nothing else has to be copied for it; and nothing
// else of this program can be found in it, such as another container's secrets.
//
// It is shared with the child rather than copied on write: neither side pays
// for a fault. This side writes before the clone only, and gives the block to
// another start after the child's exec or end only; when that is not known, it
// is unmapped here, and freed by the child's end.
type block struct {
	m      *machine
	second *machine // of a child that the child clones
	chunks [][]byte // the first begins with the stacks
	rest   []byte   // of the last one
	err    error    // there was no memory
}

// head is the beginning of a block.
type head struct {
	stack       [stackSize]byte
	secondStack [stackSize]byte
	tls         [64]byte // what the thread register points behind; never written
	m, second   machine
	args        cloneArgs
	pidfd       int32 // the kernel writes it before there is a child
}

var spare struct {
	mu   sync.Mutex
	list []*block
}

func mapChunk(size int) ([]byte, error) {
	// Populated, so that no page is charged to the container's memory.
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	return b, os.NewSyscallError("mmap", err)
}

func newBlock() (*block, error) {
	spare.mu.Lock()
	var b *block
	if n := len(spare.list); n > 0 {
		b, spare.list = spare.list[n-1], spare.list[:n-1]
	}
	spare.mu.Unlock()
	if b == nil {
		c, err := mapChunk(chunkSize)
		if err != nil {
			return nil, err
		}
		b = &block{chunks: [][]byte{c}}
	}
	h := b.head()
	b.m, b.second = &h.m, &h.second
	h.m, h.second = machine{}, machine{}
	b.rest = b.chunks[0][unsafe.Sizeof(*h):]
	return b, nil
}

func (b *block) head() *head { return (*head)(unsafe.Pointer(unsafe.SliceData(b.chunks[0]))) }

// release frees the block; reuse says that no child has it any more.
func (b *block) release(reuse bool) {
	for _, c := range b.chunks[1:] {
		_ = unix.Munmap(c) // mapped by us
	}
	b.chunks = b.chunks[:1]
	b.rest, b.err = nil, nil
	if reuse {
		spare.mu.Lock()
		if len(spare.list) < maxSpare {
			spare.list = append(spare.list, b)
			b = nil
		}
		spare.mu.Unlock()
	}
	if b != nil {
		_ = unix.Munmap(b.chunks[0])
	}
}

// FreeMemory gives what is kept for the next starts back to the kernel.
func FreeMemory() {
	spare.mu.Lock()
	list := spare.list
	spare.list = nil
	spare.mu.Unlock()
	for _, b := range list {
		_ = unix.Munmap(b.chunks[0])
	}
}

const align = 16

// take gives n bytes, which are not cleared.
func (b *block) take(n int) []byte {
	n = (max(n, 1) + align - 1) &^ (align - 1)
	if n > len(b.rest) {
		size := (max(n, chunkSize) + os.Getpagesize() - 1) &^ (os.Getpagesize() - 1)
		c, err := mapChunk(size)
		if err != nil {
			// What is filled in then is not used.
			b.err = err
			return make([]byte, n)
		}
		b.chunks = append(b.chunks, c)
		b.rest = c
	}
	p := b.rest[:n:n]
	b.rest = b.rest[n:]
	return p
}

// allocate gives n values, cleared. They must not be or have Go pointers.
func allocate[T any](b *block, n int) []T {
	var v T
	mem := b.take(n * int(unsafe.Sizeof(v)))
	clear(mem)
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(mem))), n)
}

// copied is a copy of p, or something that may be pointed to.
func (b *block) copied(p []byte) []byte {
	mem := b.take(max(len(p), 8))
	if len(p) == 0 {
		clear(mem)
	}
	copy(mem, p)
	return mem
}

// bytes is the address of a copy of p.
func (b *block) bytes(p []byte) uintptr {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b.copied(p))))
}
