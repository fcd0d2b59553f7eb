package launch

import (
	"encoding/binary"
	"fmt"
	"strings"
	"syscall"
)

// Plan is a compiled specification: what the child is cloned with and the
// instructions that it walks. Only package fork looks inside.
type Plan struct {
	// Clone are the CLONE_* flags of the first clone3.
	Clone uint64
	// JoinPid is the path of a pid namespace that the child is cloned into.
	JoinPid string
	// Target is, for an exec, the pidfd of the process whose namespaces are
	// joined: JoinFlags by setns (in SlotJoinFlags, with the user namespace
	// added if JoinUser and it differs), the pid namespace by the clone.
	Target    int
	JoinFlags uint64
	JoinUser  bool
	JoinPidNS bool
	// CgroupDir is the v2 cgroup directory that the child is cloned into.
	CgroupDir string
	// Steps are the readable steps; Code refers to them by index.
	Steps []Step
	// Code is what the child walks.
	Code []Instr
	// Slots is the number of result slots, the input slots included.
	Slots int
	// OwnCaps says that the capabilities are those of the caller's user
	// namespace: what the caller does not hold cannot be given.
	OwnCaps bool
	// IDMaps are user namespaces that the parent makes for idmapped mounts,
	// their descriptors going to slots.
	IDMaps []IDMapFD
	// Maps is set when the child asks the parent to write its id maps.
	Maps *IDMaps
	// Targets are mount points that the child may ask to have made; those that
	// are made belong to MapRoot.
	Targets []string
	// MapRoot is the host's uid and gid of the container's root.
	MapRoot [2]int
	// Nofile says that the plan sets the limit of open files.
	Nofile bool
	// Preserve is the number of extra descriptors that the program inherits.
	Preserve int
	// Gate says that the barrier is on the caller's descriptors.
	Gate bool
	// Terminal says that a console's master is sent back.
	Terminal bool
	// NetDevices are moved into the child's network namespace by the parent
	// when the namespaces stand: host name to name inside.
	NetDevices map[string]string
	// Mems is the number of Mems that the code points to.
	Mems int
}

// IDMapFD is a user namespace for idmapped mounts.
type IDMapFD struct {
	Slot int
	IDMaps
}

// IDMaps is what the parent writes into the child's /proc directory.
type IDMaps struct {
	UID, GID     string
	DenySetgroup bool
}

// Step is one readable step.
type Step struct {
	// Name is the subject of an error sentence: "mount overlay on /".
	Name string
	// Detail follows it in String: flags, data.
	Detail string
}

// Input slots, set by the parent before the clone.
const (
	SlotSock       = iota // the child's end of the socket to the parent
	SlotGate              // read end of the gate
	SlotGateStatus        // where a failed exec is reported with a gate
	SlotPidfd             // the container's process, for an exec
	SlotJoinFlags         // what an exec joins
	SlotFree              // the first slot for results
)

// Pseudo system calls of the interpreter. Arguments are those of Instr.Args.
const (
	OpBase       = 1 << 20
	OpJump       = OpBase + iota // goes to Ok
	OpTestMem                    // (buffer, offset, size 1|2|4|8, mask, value): equal goes to Ok
	OpTestSlot                   // (slot value, value): equal goes to Ok
	OpPoke                       // (buffer, offset, size 4|8, value): stores value
	OpFail                       // (errno): fails the step
	OpPhase                      // (phase): reports and waits for the parent
	OpBarrier                    // (): reports and waits to be let go
	OpSendFD                     // (message buffer, fd, kind): sends a descriptor to the parent
	OpClone                      // (clone_args): the clone goes on, the caller reports its pid and exits
	OpReport                     // (kind, value): reports a value to the parent
	OpDefaultSig                 // (): all signals to their defaults
	OpLoad                       // (buffer, offset, size 4, mask): its result is what the buffer has
	OpCloseRest                  // (): closes all descriptors but those of the program and the barrier
)

// Kinds of OpReport and OpSendFD.
const (
	ReportListener = 1 // a seccomp listener's descriptor number in the child
	FDConsole      = 1
	FDCopyFrom     = 2 // a directory and the one that it is copied to
	FDCopyTo       = 3
	FDRoot         = 4 // the container's root
)

// Instr is one system call (or pseudo call) of the child.
type Instr struct {
	Nr   uint32
	Args []Arg // at most six
	Out  int   // slot of the result, -1 for none
	Step int
	Ok   int // next instruction on success
	On   []Branch
}

// Branch is where an errno leads; Errno 0 is any.
type Branch struct {
	Errno syscall.Errno
	To    int
	// Warn reports the failure to the parent as a warning.
	Warn bool
}

// Arg is one argument.
type Arg struct {
	Kind ArgKind
	N    uint64
	M    *Mem // for ArgMem; may be shared by arguments; each start has a copy
}

// Mem is memory that an argument points to. Arguments that are to point to the
// same memory have the same Mem.
type Mem struct {
	ID     int // from 1 to Plan.Mems
	B      []byte
	Ptrs   []Ptr    // pointers inside B
	Vector [][]byte // instead of B: an array of pointers to these, NULL at the end
}

// Ptr is a pointer inside an argument's memory: at offset Off the address of B.
type Ptr struct {
	Off int
	B   []byte
}

// ArgKind is the kind of an Arg.
type ArgKind uint8

// The kinds of Arg.
const (
	ArgNumber ArgKind = iota
	ArgSlot           // N is the slot
	ArgMem
)

func num[T ~int | ~uint | ~uintptr | ~uint32 | ~uint64 | ~int32 | ~int64](n T) Arg {
	return Arg{N: uint64(n)}
}

// slot is a result slot.
type slot int

func (s slot) arg() Arg { return Arg{Kind: ArgSlot, N: uint64(s)} }
func mem(b []byte) Arg  { return Arg{Kind: ArgMem, M: &Mem{B: b}} }
func vec(list []string) Arg {
	v := make([][]byte, len(list))
	for i, s := range list {
		v[i] = append([]byte(s), 0)
	}
	return Arg{Kind: ArgMem, M: &Mem{Vector: v}}
}

// statfsSize has room for struct statfs.
const statfsSize = 128

// words packs 64-bit words, as openat2's and mount_setattr's structures are.
func words(w ...uint64) []byte {
	var b []byte
	for _, x := range w {
		b = binary.NativeEndian.AppendUint64(b, x)
	}
	return b
}

var fdcwd = num(-100)

// label is a place in the code that is not known yet.
type label int

// builder appends instructions to a plan. Labels are resolved by finish.
type builder struct {
	p      *Plan
	labels []int

	// Memory that many instructions share: what the kernel only reads, and two
	// buffers that are written and looked at right after.
	strs   map[string]Arg
	hows   map[[2]uint64]Arg
	stat   Arg
	statfs Arg
}

const noLabel = -1

func newBuilder() *builder {
	return &builder{
		p:    &Plan{Slots: SlotFree, Code: make([]Instr, 0, 768), Steps: make([]Step, 0, 96)},
		strs: map[string]Arg{}, hows: map[[2]uint64]Arg{},
		stat: mem(make([]byte, statSize)), statfs: mem(make([]byte, statfsSize)),
	}
}

// str is a string for the kernel; equal ones are one.
func (b *builder) str(s string) Arg {
	a, ok := b.strs[s]
	if !ok {
		a = mem(append([]byte(s), 0))
		b.strs[s] = a
	}
	return a
}

// how is openat2's struct open_how.
func (b *builder) how(flags, resolve uint64) Arg {
	k := [2]uint64{flags, resolve}
	a, ok := b.hows[k]
	if !ok {
		a = mem(words(flags, 0, resolve))
		b.hows[k] = a
	}
	return a
}

func (b *builder) slot() slot {
	b.p.Slots++
	return slot(b.p.Slots - 1)
}

func (b *builder) label() label {
	b.labels = append(b.labels, -1)
	return label(len(b.labels) - 1)
}

func (b *builder) mark(l label) { b.labels[l] = len(b.p.Code) }

// step begins a readable step.
func (b *builder) step(name string, detail ...string) {
	b.p.Steps = append(b.p.Steps, Step{Name: name, Detail: strings.Join(detail, " ")})
}

// ins is an instruction that options are added to.
type ins struct {
	b *builder
	i int
}

// call appends a system call of the current step.
func (b *builder) call(nr int, args ...Arg) ins {
	if len(args) > 6 {
		panic("launch: too many arguments")
	}
	in := Instr{Nr: uint32(nr), Args: args, Out: -1, Step: len(b.p.Steps) - 1, Ok: noLabel}
	b.p.Code = append(b.p.Code, in)
	return ins{b, len(b.p.Code) - 1}
}

// out stores the result in s.
func (i ins) out(s slot) ins { i.b.p.Code[i.i].Out = int(s); return i }

// to goes to l on success.
func (i ins) to(l label) ins { i.b.p.Code[i.i].Ok = int(l); return i }

// on goes to l on errno e (0: any).
func (i ins) on(e syscall.Errno, l label) ins {
	c := &i.b.p.Code[i.i]
	c.On = append(c.On, Branch{Errno: e, To: int(l)})
	return i
}

// ignore goes on after any of the errnos (none given: any).
func (i ins) ignore(es ...syscall.Errno) ins {
	if len(es) == 0 {
		es = []syscall.Errno{0}
	}
	c := &i.b.p.Code[i.i]
	for _, e := range es {
		c.On = append(c.On, Branch{Errno: e, To: noLabel})
	}
	return i
}

// warn reports the errnos as a warning and goes on.
func (i ins) warn(es ...syscall.Errno) ins {
	c := &i.b.p.Code[i.i]
	for _, e := range es {
		c.On = append(c.On, Branch{Errno: e, To: noLabel, Warn: true})
	}
	return i
}

// finish resolves labels.
func (b *builder) finish() *Plan {
	resolve := func(at, l int) int {
		if l == noLabel {
			return at + 1
		}
		if b.labels[l] < 0 {
			panic(fmt.Sprintf("launch: label %d is nowhere", l))
		}
		return b.labels[l]
	}
	for i := range b.p.Code {
		c := &b.p.Code[i]
		for _, a := range c.Args {
			if a.Kind == ArgMem && a.M.ID == 0 {
				b.p.Mems++
				a.M.ID = b.p.Mems
			}
		}
		c.Ok = resolve(i, c.Ok)
		for j := range c.On {
			c.On[j].To = resolve(i, c.On[j].To)
		}
	}
	return b.p
}

// String lists the steps, one a line.
func (p *Plan) String() string {
	var s strings.Builder
	for _, st := range p.Steps {
		s.WriteString(st.Name)
		if st.Detail != "" {
			s.WriteByte(' ')
			s.WriteString(st.Detail)
		}
		s.WriteByte('\n')
	}
	return s.String()
}
