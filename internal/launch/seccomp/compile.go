package seccomp

import (
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Classic BPF as far as it is needed.
const (
	ldAbs = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	and   = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	ja    = unix.BPF_JMP | unix.BPF_JA
	jeq   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jgt   = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
	jge   = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	ret   = unix.BPF_RET | unix.BPF_K
)

// Offsets in struct seccomp_data.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

type compiler struct {
	filter *Filter
	def    uint32
}

// block is the code for one architecture; it begins with the number loaded.
type block struct {
	arch arch
	code []insn
}

// span is a range of numbers with the same code, up to the next span's from.
type span struct {
	from  uint32
	rules []rule // nil: ret
	ret   uint32
}

func (s span) same(t span) bool { return s.rules == nil && t.rules == nil && s.ret == t.ret }

// privateFrom is where arm's private system calls begin, far above those to come.
const privateFrom = 0x0f0000

// socketCalls are the calls of socketcall(2), by number.
var socketCalls = map[string]uint64{
	"socket": 1, "bind": 2, "connect": 3, "listen": 4, "accept": 5, "getsockname": 6, "getpeername": 7,
	"socketpair": 8, "send": 9, "recv": 10, "sendto": 11, "recvfrom": 12, "shutdown": 13, "setsockopt": 14,
	"getsockopt": 15, "sendmsg": 16, "recvmsg": 17, "accept4": 18, "recvmmsg": 19, "sendmmsg": 20,
}

// ipcCalls are the calls of ipc(2).
var ipcCalls = map[string]uint64{
	"semop": 1, "semget": 2, "semctl": 3, "semtimedop": 4, "msgsnd": 11, "msgrcv": 12, "msgget": 13,
	"msgctl": 14, "shmat": 21, "shmdt": 22, "shmget": 23, "shmctl": 24,
}

// rulesOf collects the alternatives of every system call of an architecture.
func (c *compiler) rulesOf(s *specs.LinuxSeccomp, a arch) (map[uint32][]rule, uint32) {
	nums := numbers(a)
	rules := map[uint32][]rule{}
	var last uint32
	add := func(nr, ret uint32, conds []specs.LinuxSeccompArg) {
		old := rules[nr]
		switch {
		case len(old) == 1 && old[0].conds == nil: // settled without arguments
		case len(conds) == 0:
			rules[nr] = []rule{{ret: ret}}
		case repeats(conds):
			for i := range conds {
				old = append(old, rule{ret, conds[i : i+1]})
			}
			rules[nr] = old
		default:
			rules[nr] = append(old, rule{ret, conds})
		}
	}
	for _, sc := range s.Syscalls {
		ret, _ := action(sc.Action, sc.ErrnoRet) // checked before
		for _, name := range sc.Names {
			nr, ok := nums[name]
			if ok && nr < privateFrom {
				last = max(last, nr)
			}
			if ret == c.def {
				continue // as libseccomp: it says nothing
			}
			if ok {
				add(nr, ret, sc.Args)
			}
			if a.mux && len(sc.Args) == 0 {
				if n, ok := socketCalls[name]; ok {
					add(nums["socketcall"], ret, []specs.LinuxSeccompArg{{Index: 0, Value: n, Op: specs.OpEqualTo}})
				}
				if n, ok := ipcCalls[name]; ok {
					add(nums["ipc"], ret, []specs.LinuxSeccompArg{{Index: 0, Value: n, Op: specs.OpEqualTo}})
				}
			}
		}
	}
	return rules, last
}

// repeats tells whether two conditions are on one argument.
func repeats(conds []specs.LinuxSeccompArg) bool {
	seen := 0
	for _, c := range conds {
		if seen&(1<<c.Index) != 0 {
			return true
		}
		seen |= 1 << c.Index
	}
	return false
}

// block compiles one architecture and counts its system calls with rules.
func (c *compiler) block(s *specs.LinuxSeccomp, a arch) (block, int, error) {
	rules, last := c.rulesOf(s, a)
	nrs := make([]uint32, 0, len(rules))
	for nr := range rules {
		nrs = append(nrs, nr)
	}
	slices.Sort(nrs)
	spans := []span{{ret: c.def}}
	put := func(sp span) {
		prev := &spans[len(spans)-1]
		switch {
		case prev.from == sp.from:
			*prev = sp
			if n := len(spans); n > 1 && spans[n-2].same(sp) {
				spans = spans[:n-1]
			}
		case !prev.same(sp):
			spans = append(spans, sp)
		}
	}
	base := uint32(0)
	if a.x32 {
		base = x32Bit
		spans[0].from = base
	}
	newer := func() {
		if c.newerIsNosys() && last > 0 {
			put(span{from: base + last + 1, ret: retErrno | uint32(unix.ENOSYS)})
			put(span{from: base + privateFrom, ret: c.def})
			last = 0
		}
	}
	for _, nr := range nrs {
		if nr > last {
			newer()
		}
		sp := span{from: base + nr}
		if r := rules[nr]; len(r) == 1 && r[0].conds == nil {
			sp.ret = r[0].ret
		} else {
			sp.rules = r
		}
		put(sp)
		put(span{from: base + nr + 1, ret: c.def})
	}
	newer()
	return block{a, c.tree(spans, a.bits)}, len(rules), nil
}

// newerIsNosys tells whether system calls that are newer than the profile fail
// with ENOSYS: not where the default lets them pass or says so itself.
func (c *compiler) newerIsNosys() bool {
	return c.def != retAllow && c.def != retLog && c.def != retErrno|uint32(unix.ENOSYS) && c.def&0xffff0000 != retTrace
}

// tree is a binary search for the number in the accumulator.
func (c *compiler) tree(spans []span, bits int) []insn {
	if len(spans) == 1 {
		return c.leaf(spans[0], bits)
	}
	mid := len(spans) / 2
	left, right := c.tree(spans[:mid], bits), c.tree(spans[mid:], bits)
	var code []insn
	if len(left) <= 255 {
		code = append(code, insn{jge, uint8(len(left)), 0, spans[mid].from})
	} else {
		code = append(code, insn{jge, 0, 1, spans[mid].from}, insn{ja, 0, 0, uint32(len(left))})
	}
	return append(append(code, left...), right...)
}

// leaf tries the alternatives in turn.
func (c *compiler) leaf(s span, bits int) []insn {
	if s.rules == nil {
		return []insn{{ret, 0, 0, s.ret}}
	}
	var code []insn
	for _, r := range s.rules {
		code = append(code, matchRule(r, bits)...)
	}
	return append(code, insn{ret, 0, 0, c.def})
}

// Jump targets before they are known.
const (
	toNext = 254 // the next condition
	toFail = 255 // the next alternative
)

// matchRule returns the rule's action if all conditions hold and falls through
// else.
func matchRule(r rule, bits int) []insn {
	var code []insn
	for _, cond := range r.conds {
		part := condition(cond, bits)
		for i := range part {
			// Jumps out of the part: to its end.
			for _, j := range []*uint8{&part[i].jt, &part[i].jf} {
				if *j == toNext {
					*j = uint8(len(part) - i - 1)
				}
			}
		}
		code = append(code, part...)
	}
	code = append(code, insn{ret, 0, 0, r.ret})
	for i := range code {
		if code[i].jt == toFail {
			code[i].jt = uint8(len(code) - i - 1)
		}
		if code[i].jf == toFail {
			code[i].jf = uint8(len(code) - i - 1)
		}
	}
	return code
}

// condition compares a 64-bit argument in halves; on a 32-bit architecture the
// high half is nothing of the caller's.
func condition(a specs.LinuxSeccompArg, bits int) []insn {
	lo := uint32(offArgs + 8*a.Index)
	hi := lo + 4
	if bigEndian {
		lo, hi = hi, lo
	}
	v, v2 := a.Value, a.ValueTwo
	wide := bits == 64
	h, l := uint32(v>>32), uint32(v)
	loadHi, loadLo := insn{ldAbs, 0, 0, hi}, insn{ldAbs, 0, 0, lo}
	switch a.Op {
	case specs.OpEqualTo:
		if !wide {
			return []insn{loadLo, {jeq, 0, toFail, l}}
		}
		return []insn{loadHi, {jeq, 0, toFail, h}, loadLo, {jeq, 0, toFail, l}}
	case specs.OpNotEqual:
		if !wide {
			return []insn{loadLo, {jeq, toFail, 0, l}}
		}
		return []insn{loadHi, {jeq, 0, toNext, h}, loadLo, {jeq, toFail, 0, l}}
	case specs.OpGreaterThan:
		if !wide {
			return []insn{loadLo, {jgt, 0, toFail, l}}
		}
		return []insn{loadHi, {jgt, toNext, 0, h}, {jeq, 0, toFail, h}, loadLo, {jgt, 0, toFail, l}}
	case specs.OpGreaterEqual:
		if !wide {
			return []insn{loadLo, {jge, 0, toFail, l}}
		}
		return []insn{loadHi, {jgt, toNext, 0, h}, {jeq, 0, toFail, h}, loadLo, {jge, 0, toFail, l}}
	case specs.OpLessThan:
		if !wide {
			return []insn{loadLo, {jge, toFail, 0, l}}
		}
		return []insn{loadHi, {jgt, toFail, 0, h}, {jeq, 0, toNext, h}, loadLo, {jge, toFail, 0, l}}
	case specs.OpLessEqual:
		if !wide {
			return []insn{loadLo, {jgt, toFail, 0, l}}
		}
		return []insn{loadHi, {jgt, toFail, 0, h}, {jeq, 0, toNext, h}, loadLo, {jgt, toFail, 0, l}}
	default: // SCMP_CMP_MASKED_EQ: argument & value == valueTwo
		low := []insn{loadLo, {and, 0, 0, l}, {jeq, 0, toFail, uint32(v2)}}
		if !wide {
			return low
		}
		return append([]insn{loadHi, {and, 0, 0, h}, {jeq, 0, toFail, uint32(v2 >> 32)}}, low...)
	}
}

// join puts the blocks behind a look at the caller's architecture.
func (c *compiler) join(blocks []block) []insn {
	code := []insn{{ldAbs, 0, 0, offArch}}
	for i := 0; i < len(blocks); i++ {
		b := blocks[i]
		if b.arch.x32 {
			continue // with its 64-bit sister
		}
		body := []insn{{ldAbs, 0, 0, offNr}}
		if b.arch.audit == amd64.audit {
			var other []insn
			for _, x := range blocks {
				if x.arch.x32 {
					other = x.code
				}
			}
			if other == nil {
				other = []insn{{ret, 0, 0, retKillThread}}
			}
			body = append(body, insn{jge, 0, 1, x32Bit}, insn{ja, 0, 0, uint32(len(b.code))})
			body = append(body, b.code...)
			body = append(body, other...)
		} else {
			body = append(body, b.code...)
		}
		code = append(code, insn{jeq, 1, 0, b.arch.audit}, insn{ja, 0, 0, uint32(len(body))})
		code = append(code, body...)
	}
	return append(code, insn{ret, 0, 0, retKillThread})
}
