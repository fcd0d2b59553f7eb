package fork

import (
	"syscall"
	"unsafe"
)

// branch is an errno's way on.
type branch struct {
	errno uint16 // 0: any
	warn  uint16
	to    int32
}

// instr is an instruction as the child reads it.
type instr struct {
	a     [6]uintptr
	nr    uint32
	step  uint32
	out   int32
	ok    int32
	slots uint16 // bit i: a[i] is a slot's number
	n     uint16 // used branches
	on    [maxBranches]branch
}

const maxBranches = 4

// message is what the child writes to the parent.
type message struct {
	kind, step uint32
	value      uint64
}

const (
	msgPhase = iota + 1
	msgBarrier
	msgError
	msgWarn
	msgPid
	msgFD
	msgReport
)

// machine is all that the child needs. It and all that it points to lie in a
// block: there are no pointers into Go's heap, which the child does not have.
type machine struct {
	code    unsafe.Pointer // *instr
	slots   unsafe.Pointer // *uintptr
	pc      int32          // the first instruction
	passed  bool           // the barrier
	sock    uintptr
	gate    uintptr // where the barrier waits
	status  uintptr // where errors go after the barrier
	msg     message
	go1     [8]byte
	sa      [4]uint64      // sigaction SIG_DFL
	gaps    unsafe.Pointer // *uintptr: pairs of descriptors to close from and to
	gapsLen uintptr
	second  unsafe.Pointer // *machine of a child that the child clones
}

//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

// cloneArgs is struct clone_args (clone3(2)).
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// fork clones; the child walks the machine. The caller has locked the thread.
//
//go:norace
//go:nosplit
//go:noinline
func fork(m *machine, args *cloneArgs) (pid uintptr, errno syscall.Errno) {
	// All signals are blocked on this thread and the goroutine cannot be
	// preempted until afterFork. The child is cloned with CLONE_CLEAR_SIGHAND
	// and never comes back into Go's runtime.
	beforeFork()
	pid, e := cloneWalk(args, unsafe.Sizeof(*args), m)
	afterFork()
	return pid, syscall.Errno(e)
}

// walk is the child: it does the instructions one after the other. It must not
// allocate, grow its stack, store a pointer, or touch anything of the runtime:
// of this program's memory it has the block alone.
//
//go:norace
//go:nosplit
//go:noinline
func walk(m *machine) {
	if m.second == nil {
		// The parent must know whom it hears before the next message.
		hear(m, m.sock)
	}
	pc := m.pc
	var a [6]uintptr
	for {
		in := (*instr)(unsafe.Add(m.code, uintptr(pc)*unsafe.Sizeof(instr{})))
		a = in.a
		for i := uintptr(0); i < 6; i++ {
			if in.slots>>i&1 != 0 {
				p := (*uintptr)(unsafe.Add(unsafe.Pointer(&a), i*8))
				*p = *(*uintptr)(unsafe.Add(m.slots, *p*8))
			}
		}
		var r uintptr
		var e syscall.Errno
		if in.nr < opBase {
			for {
				r, _, e = syscall.RawSyscall6(uintptr(in.nr), a[0], a[1], a[2], a[3], a[4], a[5])
				if e != syscall.EINTR {
					break
				}
			}
		} else {
			taken := false
			r, e, taken = pseudo(m, in, &a)
			if e == 0 && !taken {
				pc++
				continue
			}
		}
		if e == 0 {
			if in.out >= 0 {
				*(*uintptr)(unsafe.Add(m.slots, uintptr(in.out)*8)) = r
			}
			pc = in.ok
			continue
		}
		found := false
		for i := uint16(0); i < in.n; i++ {
			b := (*branch)(unsafe.Add(unsafe.Pointer(&in.on), uintptr(i)*unsafe.Sizeof(branch{})))
			if b.errno == 0 || uintptr(b.errno) == uintptr(e) {
				if b.warn != 0 {
					say(m, m.sock, msgWarn, in.step, uint64(e))
				}
				pc = b.to
				found = true
				break
			}
		}
		if !found {
			to := m.sock
			if m.passed {
				to = m.status
			}
			say(m, to, msgError, in.step, uint64(e))
			exit(1)
		}
	}
}

//go:norace
//go:nosplit
//go:noinline
func say(m *machine, fd uintptr, kind, step uint32, value uint64) {
	m.msg.kind = kind
	m.msg.step = step
	m.msg.value = value
	_, _, e := syscall.RawSyscall(syscall.SYS_WRITE, fd, uintptr(unsafe.Pointer(&m.msg)), unsafe.Sizeof(m.msg))
	if e != 0 && kind != msgError && !m.passed {
		exit(1) // the parent is gone
	}
}

// hear waits for the byte that lets the child go on.
//
//go:norace
//go:nosplit
//go:noinline
func hear(m *machine, fd uintptr) {
	for {
		n, _, e := syscall.RawSyscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(&m.go1)), 1)
		if e == syscall.EINTR {
			continue
		}
		if e != 0 || n != 1 {
			exit(1)
		}
		return
	}
}

//go:norace
//go:nosplit
//go:noinline
func exit(code uintptr) {
	for {
		syscall.RawSyscall(syscall.SYS_EXIT_GROUP, code, 0, 0)
	}
}

// pseudo does a pseudo call; without an error, taken says whether to go to in.ok
// (all but tests that do not hold) or to the next instruction.
//
//go:norace
//go:nosplit
//go:noinline
func pseudo(m *machine, in *instr, a *[6]uintptr) (r uintptr, e syscall.Errno, taken bool) {
	switch in.nr {
	case opJump:
		return 0, 0, true
	case opTestMem:
		p := unsafe.Add(*(*unsafe.Pointer)(unsafe.Pointer(&a[0])), a[1])
		var v uint64
		switch a[2] {
		case 1:
			v = uint64(*(*uint8)(p))
		case 2:
			v = uint64(*(*uint16)(p))
		case 4:
			v = uint64(*(*uint32)(p))
		default:
			v = *(*uint64)(p)
		}
		return 0, 0, v&uint64(a[3]) == uint64(a[4])
	case opTestSlot:
		return 0, 0, a[0] == a[1]
	case opPoke:
		p := unsafe.Add(*(*unsafe.Pointer)(unsafe.Pointer(&a[0])), a[1])
		if a[2] == 4 {
			*(*uint32)(p) = uint32(a[3])
		} else {
			*(*uint64)(p) = uint64(a[3])
		}
		return 0, 0, true
	case opLoad:
		p := unsafe.Add(*(*unsafe.Pointer)(unsafe.Pointer(&a[0])), a[1])
		return uintptr(*(*uint32)(p)) & a[3], 0, true
	case opFail:
		return 0, syscall.Errno(a[0]), false
	case opPhase:
		say(m, m.sock, msgPhase, in.step, uint64(a[0]))
		hear(m, m.sock)
		return 0, 0, true
	case opBarrier:
		say(m, m.sock, msgBarrier, in.step, 0)
		m.passed = true
		hear(m, m.gate)
		return 0, 0, true
	case opSendFD:
		// a[0] is a fdMessage, whose control message has room for one descriptor
		// at a[2].
		m.msg.kind = msgFD
		m.msg.step = in.step
		m.msg.value = uint64(a[3])
		iov := unsafe.Add(*(*unsafe.Pointer)(unsafe.Pointer(&a[0])), unsafe.Offsetof(fdMessage{}.iov))
		*(*uintptr)(iov) = uintptr(unsafe.Pointer(&m.msg))
		*(*int32)(*(*unsafe.Pointer)(unsafe.Pointer(&a[2]))) = int32(a[1])
		_, _, e = syscall.RawSyscall(syscall.SYS_SENDMSG, m.sock, a[0], 0)
		return 0, e, true
	case opClone:
		// The clone has a stack and a machine of its own, in the same block.
		next := (*machine)(m.second)
		next.pc = in.ok
		next.passed = m.passed
		pid, e := cloneWalk(*(**cloneArgs)(unsafe.Pointer(&a[0])), unsafe.Sizeof(cloneArgs{}), next)
		if e != 0 {
			return 0, syscall.Errno(e), false
		}
		say(m, m.sock, msgPid, in.step, uint64(pid))
		exit(0)
	case opReport:
		say(m, m.sock, msgReport, in.step, uint64(a[0])<<32|uint64(uint32(a[1])))
		return 0, 0, true
	case opCloseRest:
		for i := uintptr(0); i < m.gapsLen; i += 2 {
			from := *(*uintptr)(unsafe.Add(m.gaps, i*8))
			to := *(*uintptr)(unsafe.Add(m.gaps, i*8+8))
			if _, _, e := syscall.RawSyscall(sysCloseRange, from, to, 0); e != 0 {
				return 0, e, false
			}
		}
		return 0, 0, true
	case opDefaultSig:
		for sig := uintptr(1); sig < 65; sig++ {
			syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&m.sa)), 0, 8, 0, 0)
		}
		return 0, 0, true
	}
	return 0, syscall.ENOSYS, false
}
