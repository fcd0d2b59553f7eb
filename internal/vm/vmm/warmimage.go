package vmm

import (
	"encoding/binary"
	"strings"

	"golang.org/x/sys/unix"
)

// What runs in a machine that is warmed is a small program, on a file system with
// nothing else. It does what the C library of nearly every program does first, and is
// large enough to be read in parts.

const (
	warmText, warmData = 384 << 10, 8 << 10 // bytes in the file
	warmBSS            = 16 << 10           // behind them, in memory
	warmBase           = 0x400000
	warmDataAt         = 0x500000
)

// tinyProgram is a static program for x86-64 that prints a line, and with an
// argument waits for ever: an ELF header, two segments, its code.
func tinyProgram() []byte {
	const headers = 64 + 2*56
	code := []byte{
		// brk twice, arch_prctl, set_tid_address, set_robust_list, rseq, prlimit64, readlink,
		// getrandom and mprotect; pages of the text are read, and some of data and bss written.
		0xb8, 0x0c, 0x00, 0x00, 0x00, // mov $0xc,%eax
		0x31, 0xff, // xor %edi,%edi
		0x0f, 0x05, // syscall
		0x48, 0x8d, 0xb8, 0x00, 0x20, 0x02, 0x00, // lea 0x22000(%rax),%rdi
		0xb8, 0x0c, 0x00, 0x00, 0x00, // mov $0xc,%eax
		0x0f, 0x05, // syscall
		0xc6, 0x80, 0x00, 0xf0, 0xff, 0xff, 0x01, // movb $0x1,-0x1000(%rax)
		0xb8, 0x9e, 0x00, 0x00, 0x00, // mov $0x9e,%eax
		0xbf, 0x02, 0x10, 0x00, 0x00, // mov $0x1002,%edi
		0xbe, 0x00, 0x00, 0x50, 0x00, // mov $0x500000,%esi
		0x0f, 0x05, // syscall
		0xb8, 0xda, 0x00, 0x00, 0x00, // mov $0xda,%eax
		0xbf, 0x00, 0x01, 0x50, 0x00, // mov $0x500100,%edi
		0x0f, 0x05, // syscall
		0xb8, 0x11, 0x01, 0x00, 0x00, // mov $0x111,%eax
		0xbf, 0x00, 0x0b, 0x50, 0x00, // mov $0x500b00,%edi
		0xbe, 0x18, 0x00, 0x00, 0x00, // mov $0x18,%esi
		0x0f, 0x05, // syscall
		0xb8, 0x4e, 0x01, 0x00, 0x00, // mov $0x14e,%eax
		0xbf, 0x00, 0x1a, 0x50, 0x00, // mov $0x501a00,%edi
		0xbe, 0x20, 0x00, 0x00, 0x00, // mov $0x20,%esi
		0x31, 0xd2, // xor %edx,%edx
		0x41, 0xba, 0x53, 0x30, 0x05, 0x53, // mov $0x53053053,%r10d
		0x0f, 0x05, // syscall
		0xb8, 0x2e, 0x01, 0x00, 0x00, // mov $0x12e,%eax
		0x31, 0xff, // xor %edi,%edi
		0xbe, 0x03, 0x00, 0x00, 0x00, // mov $0x3,%esi
		0x31, 0xd2, // xor %edx,%edx
		0x41, 0xba, 0x00, 0x03, 0x50, 0x00, // mov $0x500300,%r10d
		0x0f, 0x05, // syscall
		0xb8, 0x59, 0x00, 0x00, 0x00, // mov $0x59,%eax
		0x48, 0x8d, 0x3d, 0x91, 0x00, 0x00, 0x00, // lea 0x91(%rip),%rdi
		0xbe, 0x00, 0x08, 0x50, 0x00, // mov $0x500800,%esi
		0xba, 0xff, 0x00, 0x00, 0x00, // mov $0xff,%edx
		0x0f, 0x05, // syscall
		0xb8, 0x3e, 0x01, 0x00, 0x00, // mov $0x13e,%eax
		0xbf, 0x00, 0x06, 0x50, 0x00, // mov $0x500600,%edi
		0xbe, 0x08, 0x00, 0x00, 0x00, // mov $0x8,%esi
		0xba, 0x01, 0x00, 0x00, 0x00, // mov $0x1,%edx
		0x0f, 0x05, // syscall
		0xb8, 0x0a, 0x00, 0x00, 0x00, // mov $0xa,%eax
		0xbf, 0x00, 0x00, 0x50, 0x00, // mov $0x500000,%edi
		0xbe, 0x00, 0x10, 0x00, 0x00, // mov $0x1000,%esi
		0xba, 0x01, 0x00, 0x00, 0x00, // mov $0x1,%edx
		0x0f, 0x05, // syscall
		0xbb, 0x00, 0x00, 0x40, 0x00, // mov $0x400000,%ebx
		0x8a, 0x03, // mov (%rbx),%al
		0x81, 0xc3, 0x00, 0x40, 0x00, 0x00, // add $0x4000,%ebx
		0x81, 0xfb, 0x00, 0x00, 0x46, 0x00, // cmp $0x460000,%ebx
		0x72, 0xf0, // jb again
		0xc6, 0x04, 0x25, 0x00, 0x10, 0x50, 0x00, 0x01, // movb $0x1,0x501000
		0xc6, 0x04, 0x25, 0x00, 0x40, 0x50, 0x00, 0x01, // movb $0x1,0x504000
		0xb8, 0x01, 0x00, 0x00, 0x00, // mov $0x1,%eax
		0xbf, 0x01, 0x00, 0x00, 0x00, // mov $0x1,%edi
		0x48, 0x8d, 0x35, 0x20, 0x00, 0x00, 0x00, // lea 0x20(%rip),%rsi
		0xba, 0x03, 0x00, 0x00, 0x00, // mov $0x3,%edx
		0x0f, 0x05, // syscall
		0x48, 0x83, 0x3c, 0x24, 0x01, // cmpq $0x1,(%rsp)
		0x75, 0x09, // jne wait
		0xb8, 0xe7, 0x00, 0x00, 0x00, // mov $0xe7,%eax
		0x31, 0xff, // xor %edi,%edi
		0x0f, 0x05, // syscall
		0xb8, 0x22, 0x00, 0x00, 0x00, // mov $0x22,%eax
		0x0f, 0x05, // syscall
		0xeb, 0xf7, // jmp wait
		'o', 'k', '\n',
	}
	code = append(code, "/proc/self/exe\x00"...)
	le := binary.LittleEndian
	b := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	b = le.AppendUint16(b, 2)  // ET_EXEC
	b = le.AppendUint16(b, 62) // EM_X86_64
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, warmBase+headers) // entry
	b = le.AppendUint64(b, 64)               // program headers
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, 0)
	for _, n := range []uint16{64, 56, 2, 0, 0, 0} {
		b = le.AppendUint16(b, n)
	}
	for _, s := range []struct {
		flags                  uint32 // 1: executable, 2: writable, 4: readable
		at, address, size, mem uint64
	}{{5, 0, warmBase, warmText, warmText}, {6, warmText, warmDataAt, warmData, warmData + warmBSS}} {
		b = le.AppendUint32(b, 1) // PT_LOAD
		b = le.AppendUint32(b, s.flags)
		for _, n := range []uint64{s.at, s.address, s.address, s.size, s.mem, 4096} {
			b = le.AppendUint64(b, n)
		}
	}
	b = append(b, code...)
	return append(b, make([]byte, warmText+warmData-len(b))...)
}

// tinyImage is a file system (Linux's Documentation/filesystems/erofs.rst) with the
// tiny program as /bin/w, twice more as /bin/y and /bin/z, with a link /bin/x to w, as images of
// BusyBox have, and two empty directories: one block, and the program's.
func tinyImage() []byte {
	const (
		block, super, slot = 4096, 1024, 32
		plain, inline      = 0 << 1, 2 << 1 // small inodes: their data in blocks, or behind them
	)
	program := tinyProgram()
	le := binary.LittleEndian
	b := make([]byte, block, block+len(program))
	type entry struct {
		name string
		kind byte // 1: file, 2: directory, 7: symbolic link
		nid  uint64
	}
	const first = super + 128 // behind the super block
	const (
		root = first / slot // each inode takes one slot, and those of its data
		bin  = root + 4
		etc  = bin + 4
		usr  = etc + 2
		link = usr + 2
		file = link + 2
		more = file + 1
		last = more + 1
	)
	inode := func(nid int, layout, mode, links uint16, size int, data []byte) {
		at := nid * slot
		le.PutUint16(b[at:], layout)
		le.PutUint16(b[at+4:], mode)
		le.PutUint16(b[at+6:], links)
		le.PutUint32(b[at+8:], uint32(size))
		le.PutUint32(b[at+20:], uint32(nid-root+1))
		copy(b[at+slot:], data)
	}
	directory := func(nid int, links uint16, list ...entry) {
		list = append([]entry{{".", 2, uint64(nid)}, {"..", 2, root}}, list...)
		names := 12 * len(list)
		var dir []byte
		var text strings.Builder
		for _, e := range list {
			dir = le.AppendUint64(dir, e.nid)
			dir = le.AppendUint16(dir, uint16(names+text.Len()))
			dir = append(dir, e.kind, 0)
			text.WriteString(e.name)
		}
		dir = append(dir, text.String()...)
		inode(nid, inline, unix.S_IFDIR|0o755, links, len(dir), dir)
	}
	directory(root, 5, entry{"bin", 2, bin}, entry{"etc", 2, etc}, entry{"usr", 2, usr})
	directory(bin, 2, entry{"w", 1, file}, entry{"x", 7, link}, entry{"y", 1, more}, entry{"z", 1, last})
	directory(etc, 2)
	directory(usr, 2)
	inode(link, inline, unix.S_IFLNK|0o777, 1, 1, []byte("w"))
	for _, nid := range []int{file, more, last} {
		inode(nid, plain, unix.S_IFREG|0o755, 1, len(program), nil)
		le.PutUint32(b[nid*slot+16:], 1) // its first block
	}

	le.PutUint32(b[super:], 0xe0f5e1e2)
	b[super+12] = 12 // the block's bits
	le.PutUint16(b[super+14:], root)
	le.PutUint64(b[super+16:], 8)                            // inodes
	le.PutUint32(b[super+36:], uint32(1+len(program)/block)) // blocks
	return append(b, program...)
}
