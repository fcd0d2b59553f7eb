package shortcut

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

var native = binary.NativeEndian

// Commands, types and flags of bpf(2).
const (
	cmdMapCreate = 0
	cmdMapUpdate = 2
	cmdMapDelete = 3
	cmdProgLoad  = 5
	cmdBTFLoad   = 18
	cmdLink      = 28
	mapHash      = 1
	mapSocket    = 24
	noPrealloc   = 1
	schedCls     = 3
	sockAddr     = 18
)

// Where programs are attached to cgroups.
const (
	connect4 = 10
	connect6 = 11
	getPeer4 = 29
	getPeer6 = 30
	getSock4 = 31
	getSock6 = 32
)

// call is bpf(2).
func call(cmd uintptr, attr []byte) (int, error) {
	for tries := 0; ; tries++ {
		r, _, e := unix.Syscall(unix.SYS_BPF, cmd, uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
		runtime.KeepAlive(attr)
		if e == unix.EAGAIN && cmd == cmdProgLoad && tries < 100 {
			continue // a signal has interrupted the verifier; Go's scheduler sends some
		}
		if e != 0 {
			return -1, e
		}
		return int(r), nil
	}
}

// newMap makes a hash table that takes memory as it fills.
func newMap(name string, key, value, size int) (int, error) {
	attr := make([]byte, 72)
	native.PutUint32(attr[0:], mapHash)
	native.PutUint32(attr[4:], uint32(key))
	native.PutUint32(attr[8:], uint32(value))
	native.PutUint32(attr[12:], uint32(size))
	native.PutUint32(attr[16:], noPrealloc)
	copy(attr[28:28+15], name)
	fd, err := call(cmdMapCreate, attr)
	if err != nil {
		return -1, fmt.Errorf("make the map %s: %w", name, err)
	}
	return fd, nil
}

// setElement puts an element into a map; a nil value deletes it, and one that is
// not there is no error then.
func setElement(m int, key, value []byte) error {
	var pin runtime.Pinner // the kernel reads through addresses in attr
	defer pin.Unpin()
	pin.Pin(&key[0])
	attr := make([]byte, 32)
	native.PutUint32(attr[0:], uint32(m))
	native.PutUint64(attr[8:], uint64(uintptr(unsafe.Pointer(&key[0]))))
	cmd := uintptr(cmdMapDelete)
	if value != nil {
		pin.Pin(&value[0])
		native.PutUint64(attr[16:], uint64(uintptr(unsafe.Pointer(&value[0]))))
		cmd = cmdMapUpdate
	}
	_, err := call(cmd, attr)
	if err == unix.ENOENT && value == nil {
		err = nil
	}
	return err
}

// load hands a program that sees frames to the kernel.
func load(name string, code []byte) (int, error) { return loadAs(name, code, schedCls, 0) }

// loadAs hands a program to the kernel that will be attached in only one way.
func loadAs(name string, code []byte, kind, attach uint32) (int, error) {
	license := []byte("Apache-2.0\x00")
	log := make([]byte, 64<<10)
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&code[0])
	pin.Pin(&license[0])
	pin.Pin(&log[0])
	attr := make([]byte, 72)
	native.PutUint32(attr[0:], kind)
	native.PutUint32(attr[4:], uint32(len(code)/8))
	native.PutUint64(attr[8:], uint64(uintptr(unsafe.Pointer(&code[0]))))
	native.PutUint64(attr[16:], uint64(uintptr(unsafe.Pointer(&license[0]))))
	copy(attr[48:48+15], name)
	native.PutUint32(attr[68:], attach)
	fd, err := call(cmdProgLoad, attr)
	if err == nil {
		return fd, nil
	}
	// Once more, for the verifier's reason.
	native.PutUint32(attr[24:], 1)
	native.PutUint32(attr[28:], uint32(len(log)))
	native.PutUint64(attr[32:], uint64(uintptr(unsafe.Pointer(&log[0]))))
	if again, err := call(cmdProgLoad, attr); err == nil {
		return again, nil
	}
	said, _, _ := bytes.Cut(log, []byte{0})
	if len(said) > 500 {
		said = said[len(said)-500:]
	}
	return -1, fmt.Errorf("load the program %s: %w %s", name, err, bytes.TrimSpace(said))
}

// loadBTF hands a description of types to the kernel.
func loadBTF(blob []byte) (int, error) {
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&blob[0])
	attr := make([]byte, 32)
	native.PutUint64(attr[0:], uint64(uintptr(unsafe.Pointer(&blob[0]))))
	native.PutUint32(attr[16:], uint32(len(blob)))
	return call(cmdBTFLoad, attr)
}

// attachCgroup has a program see what is done below the cgroup, besides others'
// programs, until what it returns is closed.
func attachCgroup(prog, cgroup int, attach uint32) (int, error) {
	attr := make([]byte, 16)
	native.PutUint32(attr[0:], uint32(prog))
	native.PutUint32(attr[4:], uint32(cgroup))
	native.PutUint32(attr[8:], attach)
	fd, err := call(cmdLink, attr)
	if err != nil {
		return -1, fmt.Errorf("attach a program to cgroups: %w", err)
	}
	return fd, nil
}

// Operations of instructions.
const (
	ldB, ldH, ldW, ldD     = 0x71, 0x69, 0x61, 0x79 // dst = *(src + off)
	stH, stW, stD          = 0x6b, 0x63, 0x7b       // *(dst + off) = src
	setI, set              = 0xb7, 0xbf             // dst = imm, dst = src
	addI, andI             = 0x07, 0x57             // dst += imm, dst &= imm
	jeqI, jneI             = 0x15, 0x55             // compare with imm
	jneW                   = 0x56                   // compare 32 bits with imm
	jeq, jne, jgt          = 0x1d, 0x5d, 0x2d       // compare with src
	callHelper, exit, goTo = 0x85, 0x95, 0x05
)

// Helpers.
const (
	helpLookup      = 1
	helpRedirect    = 23
	helpBind        = 64
	helpStorage     = 107
	helpNetnsCookie = 122
)

// program is a program in the making. Jumps go forward, to labels.
type program struct {
	code   []byte
	labels map[string]int
	jumps  map[int]string // instruction to label
}

func newProgram() *program { return &program{labels: map[string]int{}, jumps: map[int]string{}} }

func (p *program) op(code byte, dst, src byte, off int16, imm int32) {
	regs := dst | src<<4
	if littleEndian() {
		p.code = append(p.code, code, regs)
	} else {
		p.code = append(p.code, code, dst<<4|src)
	}
	p.code = native.AppendUint16(p.code, uint16(off))
	p.code = native.AppendUint32(p.code, uint32(imm))
}

func littleEndian() bool { return native.Uint16([]byte{1, 0}) == 1 }

// jump goes to the label if the comparison holds.
func (p *program) jump(code byte, dst, src byte, imm int32, label string) {
	p.jumps[len(p.code)/8] = label
	p.op(code, dst, src, 0, imm)
}

func (p *program) label(name string) { p.labels[name] = len(p.code) / 8 }

// lookup leaves the address of the element in r0, or 0. The key is on the stack
// at off from r10.
func (p *program) lookup(m int, off int32) {
	p.op(0x18, 1, 1, 0, int32(m)) // r1 = map, in two slots
	p.op(0, 0, 0, 0, 0)
	p.op(set, 2, 10, 0, 0)
	p.op(addI, 2, 0, 0, off)
	p.op(callHelper, 0, 0, 0, helpLookup)
}

// bytes is the finished program.
func (p *program) bytes() []byte {
	for at, name := range p.jumps {
		native.PutUint16(p.code[at*8+2:], uint16(p.labels[name]-at-1))
	}
	return p.code
}

// net16 is a number as the network has it in two bytes, when loaded here.
func net16(v uint16) int32 { return int32(native.Uint16(binary.BigEndian.AppendUint16(nil, v))) }
