package fork

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// cloneWalk clones with args, which have a stack, and gives the child's number or
// an errno. The child walks m on that stack. All lies in a block.
func cloneWalk(args *cloneArgs, size uintptr, m *machine) (pid, errno uintptr)

// firstStack has the child run on the block's stack, and the thread register
// point into the block: Go's is on the heap.
func (b *block) firstStack(args *cloneArgs) {
	h := b.head()
	args.flags |= unix.CLONE_SETTLS
	args.tls = uint64(uintptr(unsafe.Pointer(&h.tls))) + uint64(len(h.tls))
	args.stack, args.stackSize = uint64(uintptr(unsafe.Pointer(&h.stack))), stackSize
}

// secondStack has a child's child run on a stack of its own.
func (b *block) secondStack(args *cloneArgs) {
	args.stack, args.stackSize = uint64(uintptr(unsafe.Pointer(&b.head().secondStack))), stackSize
}
