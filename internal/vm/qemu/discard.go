package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A copy's memory is a private mapping of a template's. What its guest frees QEMU
// gives back by two system calls (ram_block_discard_range): fallocate punches a
// hole into the file, and if that went well madvise(MADV_DONTNEED) drops this
// process's pages of it. The first must never happen, since the file is all the
// copies', and can't, since it is sealed; but then the second would not happen
// either, and a copy would only ever grow. So the kernel is told to answer that one
// call, for that one descriptor, with success and to do nothing (seccomp(2),
// SECCOMP_RET_ERRNO with 0). What the guest then finds in a page that it had freed
// is the template's, where it expects nothing in particular.
//
// QEMU opens the file itself, under a number that depends on its build and its
// arguments. The number is found out by a first process, and looked at again in
// each: were it another file's, one that is a disk, an answer would be a lie.

// Start starts QEMU and greets it. The guest runs at once, or waits for Restore
// if c.Incoming. When ctx ends before that, nothing is left running.
func (l *Launcher) Start(ctx context.Context, c Config) (*Process, error) {
	if !c.Incoming || c.Share {
		return l.start(ctx, c)
	}
	shape := fmt.Sprint(c.Binary.Build, " ", c.Hardware, " ", len(c.Taps))
	l.mu.Lock()
	fd, known := l.ramFDs[shape]
	l.mu.Unlock()
	if !known {
		p, err := l.start(ctx, c)
		if err != nil {
			return nil, err
		}
		fd = p.ramFD()
		l.mu.Lock()
		l.ramFDs[shape] = fd
		l.mu.Unlock()
		if fd == 0 {
			return p, nil
		}
		p.Close()
	}
	c.Jail.keepRAM = fd
	p, err := l.start(ctx, c)
	if err != nil || fd == 0 || p.ramFD() == fd {
		return p, err
	}
	p.Close()
	c.Jail.keepRAM = 0 // what is freed stays with the machine
	return l.start(ctx, c)
}

// ramFD is the descriptor under which QEMU has opened the guest's memory; 0: it
// can't be told.
func (p *Process) ramFD() int {
	dir := fmt.Sprintf("/proc/%d/fd", p.PID())
	list, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	fd := 0
	for _, e := range list {
		n, err := strconv.Atoi(e.Name())
		to, lerr := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || lerr != nil || n == p.inheritedRAM || !strings.HasPrefix(to, "/memfd:"+ramName) {
			continue
		}
		if fd != 0 {
			return 0
		}
		fd = n
	}
	return fd
}

// keepHoles makes fallocate(fd, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE) succeed
// and do nothing, in this thread and whatever it becomes.
func keepHoles(fd int) error {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
		// offsets in struct seccomp_data
		number, arch, first, second = 0, 4, 16, 24
	)
	filter := []unix.SockFilter{
		{Code: load, K: arch}, {Code: equal, K: unix.AUDIT_ARCH_X86_64, Jf: 7},
		{Code: load, K: number}, {Code: equal, K: unix.SYS_FALLOCATE, Jf: 5},
		{Code: load, K: first}, {Code: equal, K: uint32(fd), Jf: 3},
		{Code: load, K: second}, {Code: equal, K: unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE, Jf: 1},
		{Code: ret, K: unix.SECCOMP_RET_ERRNO},
		{Code: ret, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); e != 0 {
		return os.NewSyscallError("seccomp", e)
	}
	return nil
}
