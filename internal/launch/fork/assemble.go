package fork

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch"
)

// assembly is a plan made ready for one start: pointers and descriptors filled in.
type assembly struct {
	*block
	mine  int // our end of the socket
	child []int
	code  []instr // in the block
	slots []uintptr
	mems  []uintptr // addresses by Mem.ID

	maskCaps bool
	warnings []string
}

// fdMessage is a message that carries a descriptor.
type fdMessage struct {
	hdr unix.Msghdr
	iov unix.Iovec
	ctl struct {
		hdr unix.Cmsghdr
		fd  int32
		_   int32
	}
}

func (a *assembly) takeSock() int {
	fd := a.mine
	a.mine = -1
	return fd
}

// closeChild closes what only the child needs.
func (a *assembly) closeChild() {
	for _, fd := range a.child {
		unix.Close(fd)
	}
	a.child = nil
}

func (a *assembly) close() {
	a.closeChild()
	if a.mine >= 0 {
		unix.Close(a.mine)
		a.mine = -1
	}
	if a.block != nil {
		a.release(true)
		a.block = nil
	}
}

// file is f's descriptor; the caller keeps f alive and open over the start.
func file(f *os.File) int { return int(f.Fd()) }

// above duplicates fd to a number of at least low, for the child only.
func (a *assembly) above(fd, low int) (int, error) {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, low)
	if err != nil {
		return -1, os.NewSyscallError("fcntl", err)
	}
	a.child = append(a.child, n)
	return n, nil
}

// prologue is the number of instructions before the plan's that does not depend
// on it, and the one behind the plan's.
const prologue = 9

// startSlack is the timer slack, in nanoseconds, that this program was started with. A
// child has it, whatever the thread that forks has by now. 0: unknown.
var startSlack, _ = unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0) // 0 with an error

func assemble(plan *launch.Plan, stdio Stdio) (_ *assembly, err error) {
	blk, err := newBlock()
	if err != nil {
		return nil, err
	}
	a := &assembly{block: blk, mine: -1, mems: make([]uintptr, plan.Mems+1)}
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	a.mine = sp[0]
	a.child = append(a.child, sp[1])

	low := 3 + plan.Preserve
	a.maskCaps = plan.OwnCaps
	a.slots = allocate[uintptr](blk, plan.Slots)
	a.code = allocate[instr](blk, len(plan.Code)+prologue+3+plan.Preserve)[:0]
	sock := sp[1]
	if sock < low {
		if sock, err = a.above(sock, low); err != nil {
			return nil, err
		}
	}
	needed := []int{sock}
	a.slots[launch.SlotSock] = uintptr(sock)
	a.m.sock, a.m.gate, a.m.status = uintptr(sock), uintptr(sock), uintptr(sock)
	if plan.Gate {
		g, err := a.above(file(stdio.Gate), low)
		if err != nil {
			return nil, err
		}
		s, err := a.above(file(stdio.GateStatus), low)
		if err != nil {
			return nil, err
		}
		needed = append(needed, g, s)
		a.m.gate, a.m.status = uintptr(g), uintptr(s)
		a.slots[launch.SlotGate], a.slots[launch.SlotGateStatus] = uintptr(g), uintptr(s)
	}
	if plan.Target > 0 {
		fd := plan.Target
		if fd < low {
			if fd, err = a.above(fd, low); err != nil {
				return nil, err
			}
		}
		needed = append(needed, fd)
		a.slots[launch.SlotPidfd] = uintptr(fd)
		flags := plan.JoinFlags
		if plan.JoinUser {
			differs, err := otherUserNS(plan.Target)
			if err != nil {
				return nil, err
			}
			if differs {
				flags |= unix.CLONE_NEWUSER
				a.maskCaps = false
			}
		}
		a.slots[launch.SlotJoinFlags] = uintptr(flags)
	}

	for _, m := range plan.IDMaps {
		ns, err := userNamespace(m.IDMaps)
		if err != nil {
			return nil, fmt.Errorf("idmapped mount: %w", err)
		}
		defer unix.Close(ns) // the child has the duplicate
		fd, err := a.above(ns, low)
		if err != nil {
			return nil, err
		}
		needed = append(needed, fd)
		a.slots[m.Slot] = uintptr(fd)
	}

	// The prologue: signals, dumpable, descriptors.
	last := uint32(len(plan.Steps))
	pro := func(nr uint32, args ...uintptr) {
		in := instr{nr: nr, out: -1, step: last, ok: int32(len(a.code) + 1)}
		copy(in.a[:], args)
		a.code = append(a.code, in)
	}
	pro(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0)
	pro(opDefaultSig)
	if startSlack > 0 {
		pro(unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, uintptr(startSlack))
	}
	if lim := inheritedNofile(plan); lim != nil {
		b := binary.NativeEndian.AppendUint64(nil, lim.Cur)
		pro(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, a.bytes(binary.NativeEndian.AppendUint64(b, lim.Max)), 0)
	}
	std := []*os.File{stdio.In, stdio.Out, stdio.Err}
	if plan.Terminal {
		std = []*os.File{nil, nil, nil}
	}
	src := make([]int, 0, 3+plan.Preserve)
	null := -1
	for _, f := range append(std, stdio.Extra...) {
		if f != nil {
			src = append(src, file(f))
			continue
		}
		if null < 0 {
			if null, err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
				return nil, fmt.Errorf("open /dev/null: %w", err)
			}
			a.child = append(a.child, null)
		}
		src = append(src, null)
	}
	for i, fd := range src {
		// A source among the targets would be overwritten by an earlier dup.
		if fd < low && fd != i {
			if src[i], err = a.above(fd, low); err != nil {
				return nil, err
			}
		}
	}
	for i, fd := range src {
		if fd == i {
			pro(unix.SYS_FCNTL, uintptr(fd), unix.F_SETFD, 0)
		} else {
			pro(unix.SYS_DUP3, uintptr(fd), uintptr(i), 0)
		}
	}
	// The gaps between the descriptors that stay.
	slices.Sort(needed)
	var gaps []uintptr
	from := low
	for _, fd := range needed {
		if fd > from {
			gaps = append(gaps, uintptr(from), uintptr(fd-1))
		}
		from = fd + 1
	}
	gaps = append(gaps, uintptr(from), uintptr(^uint32(0)))
	kept := allocate[uintptr](blk, len(gaps))
	copy(kept, gaps)
	a.m.gaps, a.m.gapsLen = unsafe.Pointer(unsafe.SliceData(kept)), uintptr(len(kept))
	pro(opCloseRest)

	base := len(a.code)
	for i := range plan.Code {
		in, err := a.instr(&plan.Code[i], base)
		if err != nil {
			return nil, err
		}
		a.code = append(a.code, in)
	}
	// Walking off the end would be our mistake; it must not run on.
	a.code = append(a.code, instr{nr: opFail, a: [6]uintptr{uintptr(syscall.ENOSYS)}, out: -1, step: last})
	a.m.code = unsafe.Pointer(unsafe.SliceData(a.code))
	a.m.slots = unsafe.Pointer(unsafe.SliceData(a.slots))
	if blk.err != nil {
		return nil, blk.err
	}
	second := blk.second
	*second = *a.m
	a.m.second = unsafe.Pointer(second)
	return a, nil
}

func (a *assembly) instr(c *launch.Instr, base int) (_ instr, err error) {
	in := instr{nr: c.Nr, out: int32(c.Out), step: uint32(c.Step), ok: int32(c.Ok + base)}
	if len(c.On) > maxBranches {
		return in, fmt.Errorf("fork: %d branches", len(c.On))
	}
	for i, arg := range c.Args {
		switch arg.Kind {
		case launch.ArgNumber:
			in.a[i] = uintptr(arg.N)
		case launch.ArgSlot:
			in.a[i] = uintptr(arg.N)
			in.slots |= 1 << i
		case launch.ArgMem:
			if in.a[i], err = a.mem(c, i, arg.M); err != nil {
				return in, err
			}
		}
	}
	if c.Nr == launch.OpSendFD {
		a.sendFD(&in)
	}
	for i, b := range c.On {
		in.on[i] = branch{errno: uint16(b.Errno), to: int32(b.To + base)}
		if b.Warn {
			in.on[i].warn = 1
		}
	}
	in.n = uint16(len(c.On))
	return in, nil
}

// mem is where the argument's memory lies in the block.
func (a *assembly) mem(c *launch.Instr, i int, m *launch.Mem) (addr uintptr, err error) {
	if addr := a.mems[m.ID]; addr != 0 && m.ID != 0 {
		return addr, nil
	}
	b := m.B
	if c.Nr == unix.SYS_CAPSET && i == 1 && a.maskCaps {
		if b, err = a.ownCaps(b); err != nil {
			return 0, err
		}
	}
	switch {
	case m.Vector != nil:
		ptrs := allocate[uintptr](a.block, len(m.Vector)+1)
		for i, s := range m.Vector {
			ptrs[i] = a.bytes(s)
		}
		ptrs[len(m.Vector)] = 0
		addr = uintptr(unsafe.Pointer(unsafe.SliceData(ptrs)))
	case c.Nr == launch.OpClone:
		args := allocate[cloneArgs](a.block, 1)
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&args[0])), unsafe.Sizeof(args[0])), b)
		a.secondStack(&args[0])
		addr = uintptr(unsafe.Pointer(&args[0]))
	default:
		kept := a.copied(b)
		for _, p := range m.Ptrs {
			binary.NativeEndian.PutUint64(kept[p.Off:], uint64(a.bytes(p.B)))
		}
		addr = uintptr(unsafe.Pointer(unsafe.SliceData(kept)))
	}
	a.mems[m.ID] = addr
	return addr, nil
}

// sendFD fills in a message that carries a descriptor: Args are (_, fd, _, kind).
// Its iovec is the child's to fill in.
func (a *assembly) sendFD(in *instr) {
	m := &allocate[fdMessage](a.block, 1)[0]
	*(*uintptr)(unsafe.Pointer(&m.hdr.Iov)) = uintptr(unsafe.Pointer(&m.iov))
	m.iov.SetLen(int(unsafe.Sizeof(message{})))
	m.hdr.SetIovlen(1)
	*(*uintptr)(unsafe.Pointer(&m.hdr.Control)) = uintptr(unsafe.Pointer(&m.ctl))
	m.hdr.SetControllen(int(unsafe.Sizeof(m.ctl)))
	m.ctl.hdr.Level = unix.SOL_SOCKET
	m.ctl.hdr.Type = unix.SCM_RIGHTS
	m.ctl.hdr.SetLen(unix.CmsgLen(4))
	in.a[0] = uintptr(unsafe.Pointer(&m.hdr))
	in.a[2] = uintptr(unsafe.Pointer(&m.ctl.fd))
}

// otherUserNS tells whether the process has another user namespace than we.
func otherUserNS(pidfd int) (bool, error) {
	pid, err := pidfdPid(pidfd)
	if err != nil {
		return false, err
	}
	var own, its unix.Stat_t
	if err := unix.Stat("/proc/self/ns/user", &own); err != nil {
		return false, fmt.Errorf("own user namespace: %w", err)
	}
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/user", pid), &its); err != nil {
		return false, fmt.Errorf("user namespace of %d: %w", pid, err)
	}
	// The number could have gone to another process meanwhile.
	if err := unix.PidfdSendSignal(pidfd, 0, nil, 0); err != nil {
		return false, fmt.Errorf("process %d: %w", pid, err)
	}
	return own.Ino != its.Ino || own.Dev != its.Dev, nil
}

// pidfdPid reads a pidfd's process number from procfs (proc(5), fdinfo).
func pidfdPid(pidfd int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", pidfd))
	if err != nil {
		return 0, fmt.Errorf("pidfd: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pid:"); ok {
			pid, err := strconv.Atoi(strings.TrimSpace(v))
			if err != nil {
				return 0, fmt.Errorf("pidfd: %w", err)
			}
			if pid <= 0 {
				return 0, fmt.Errorf("pidfd: %w", unix.ESRCH)
			}
			return pid, nil
		}
	}
	return 0, fmt.Errorf("pidfd: %w", unix.EBADF)
}

// ownCaps takes out of capset's data what this process does not hold, and so
// cannot give: on some machines root lacks capabilities. Each is a warning.
func (a *assembly) ownCaps(data []byte) ([]byte, error) {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var own [2]unix.CapUserData
	if err := unix.Capget(&hdr, &own[0]); err != nil {
		return nil, os.NewSyscallError("capget", err)
	}
	data = slices.Clone(data)
	for i := range own {
		for j := range 3 {
			word := data[12*i+4*j:]
			v := binary.NativeEndian.Uint32(word)
			lost := v &^ own[i].Permitted
			if lost == 0 {
				continue
			}
			binary.NativeEndian.PutUint32(word, v&own[i].Permitted)
			w := "capabilities: not held by the runtime itself: " + launch.CapNames(uint64(lost)<<(32*i))
			if !slices.Contains(a.warnings, w) {
				a.warnings = append(a.warnings, w)
			}
		}
	}
	return data, nil
}

// userNamespace makes a user namespace with the maps and gives a descriptor of it.
func userNamespace(maps launch.IDMaps) (int, error) {
	fd := -1
	err := hold(launch.UserNamespace(maps), func(pid int) (err error) {
		if fd, err = unix.Open(fmt.Sprintf("/proc/%d/ns/user", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("user namespace: %w", err)
		}
		return nil
	})
	return fd, err
}

// hold starts a process that stops at its barrier, and ends it after f.
func hold(plan *launch.Plan, f func(pid int) error) error {
	p, err := Start(plan, Stdio{})
	if err != nil {
		return err
	}
	defer p.abort()
	return f(p.Pid)
}

// UserNamespace makes a user namespace with the maps. f is called with the path of it,
// which is good until f returns.
func UserNamespace(maps launch.IDMaps, f func(path string) error) error {
	return hold(launch.UserNamespace(maps), func(pid int) error { return f(fmt.Sprintf("/proc/%d/ns/user", pid)) })
}

// NetNamespace makes a network namespace that belongs to the user namespace at a path.
// f is called with the path of it, which is good until f returns.
func NetNamespace(user string, f func(path string) error) error {
	return hold(launch.NetNamespace(user), func(pid int) error { return f(fmt.Sprintf("/proc/%d/ns/net", pid)) })
}
