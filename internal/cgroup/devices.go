package cgroup

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func checkDevices(rules []specs.LinuxDeviceCgroup) error {
	for i, r := range rules {
		switch r.Type {
		case "", "a", "b", "c":
		default:
			return fmt.Errorf("cgroup: devices[%d]: type %q: %w", i, r.Type, errdefs.ErrInvalidArgument)
		}
		if strings.Trim(r.Access, "rwm") != "" {
			return fmt.Errorf("cgroup: devices[%d]: access %q: %w", i, r.Access, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// deviceNumber is a rule's major or minor; -1 is any.
func deviceNumber(n *int64) int64 {
	if n == nil || *n < 0 {
		return -1
	}
	return *n
}

func access(r specs.LinuxDeviceCgroup) string {
	if r.Access == "" {
		return "rwm"
	}
	return r.Access
}

// devicesV1 writes the rules in their order (cgroup-v1/devices.rst).
func devicesV1(d string, rules []specs.LinuxDeviceCgroup) error {
	star := func(n int64) string {
		if n < 0 {
			return "*"
		}
		return strconv.FormatInt(n, 10)
	}
	files := [2]string{filepath.Join(d, "devices.deny"), filepath.Join(d, "devices.allow")}
	fds := [2]int{-1, -1}
	defer func() {
		for _, fd := range fds {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
	}()
	for _, r := range rules {
		to := 0
		if r.Allow {
			to = 1
		}
		if fds[to] < 0 {
			var err error
			if fds[to], err = open(files[to], unix.O_WRONLY); err != nil {
				return err
			}
		}
		types := []string{r.Type}
		major, minor := deviceNumber(r.Major), deviceNumber(r.Minor)
		if r.Type == "" || r.Type == "a" {
			types = []string{"a"}
			if major >= 0 || minor >= 0 || len(access(r)) < 3 {
				types = []string{"b", "c"} // "a" is all of everything there
			}
		}
		for _, t := range types {
			line := t + " " + star(major) + ":" + star(minor) + " " + access(r)
			if t == "a" {
				line = "a"
			}
			if err := write(fds[to], files[to], line); err != nil {
				return err
			}
		}
	}
	return nil
}

// eBPF as far as the device program needs it (bpf(2), instruction-set.rst).
type bpfInsn struct {
	code uint8
	regs uint8 // dst | src<<4
	off  int16
	imm  int32
}

const (
	bpfLdxW    = 0x61 // dst = *(u32 *)(src + off)
	bpfMov32R  = 0xbc // w dst = w src
	bpfMov32I  = 0xb4
	bpfAnd32I  = 0x54
	bpfRsh32I  = 0x74
	bpfJne32I  = 0x56 // jump if w dst != imm
	bpfJeq32I  = 0x16
	bpfJset32I = 0x46 // jump if w dst & imm
	bpfExit    = 0x95
)

// deviceProgram is the rules as a BPF_PROG_TYPE_CGROUP_DEVICE program: from the
// last rule to the first, each settles those of the wanted accesses that no
// later rule has settled; what no rule speaks of is allowed, as without rules.
func deviceProgram(rules []specs.LinuxDeviceCgroup) []bpfInsn {
	// r1 is struct bpf_cgroup_dev_ctx: u32 access<<16|type, major, minor.
	// r2 type, r3 the accesses still to settle, r4 major, r5 minor.
	p := []bpfInsn{
		{bpfLdxW, 3 | 1<<4, 0, 0},
		{bpfMov32R, 2 | 3<<4, 0, 0},
		{bpfAnd32I, 2, 0, 0xffff},
		{bpfRsh32I, 3, 0, 16},
		{bpfLdxW, 4 | 1<<4, 4, 0},
		{bpfLdxW, 5 | 1<<4, 8, 0},
	}
	const (
		blk, chr           = 1, 2
		mknod, read, write = 1, 2, 4
	)
	verdict := func(v int32) []bpfInsn { return []bpfInsn{{bpfMov32I, 0, 0, v}, {bpfExit, 0, 0, 0}} }
	for i := len(rules) - 1; i >= 0; i-- {
		r := rules[i]
		var bits int32
		for _, a := range access(r) {
			switch a {
			case 'r':
				bits |= read
			case 'w':
				bits |= write
			case 'm':
				bits |= mknod
			}
		}
		var body []bpfInsn
		if r.Allow {
			body = append(body, bpfInsn{bpfAnd32I, 3, 0, ^bits & 7}, bpfInsn{bpfJne32I, 3, 2, 0})
			body = append(body, verdict(1)...)
		} else {
			// Denied if one of the bits is wanted: skip the verdict else.
			body = append(body, bpfInsn{bpfJset32I, 3, 1, bits}, bpfInsn{0x05, 0, 2, 0})
			body = append(body, verdict(0)...)
		}
		var head []bpfInsn
		switch r.Type {
		case "b":
			head = append(head, bpfInsn{bpfJne32I, 2, 0, blk})
		case "c":
			head = append(head, bpfInsn{bpfJne32I, 2, 0, chr})
		}
		if n := deviceNumber(r.Major); n >= 0 {
			head = append(head, bpfInsn{bpfJne32I, 4, 0, int32(n)})
		}
		if n := deviceNumber(r.Minor); n >= 0 {
			head = append(head, bpfInsn{bpfJne32I, 5, 0, int32(n)})
		}
		for j := range head {
			head[j].off = int16(len(head) - j - 1 + len(body))
		}
		p = append(p, head...)
		p = append(p, body...)
	}
	return append(p, verdict(1)...)
}

// Commands and types of bpf(2).
const (
	bpfProgLoad      = 5
	bpfProgAttach    = 8
	bpfProgDetach    = 9
	bpfProgGetFDByID = 13
	bpfProgQuery     = 16
	progCgroupDevice = 15
	attachDevice     = 6
	allowMulti       = 2
)

func bpf(cmd uintptr, attr []byte) (int, error) {
	r, _, e := unix.Syscall(unix.SYS_BPF, cmd, uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
	runtime.KeepAlive(attr)
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// loadTries is how often an interrupted load is repeated.
const loadTries = 100

func loadProgram(p []bpfInsn) (int, error) {
	loaded.Lock()
	defer loaded.Unlock()
	if loaded.fd > 0 && slices.Equal(loaded.program, p) {
		return unix.FcntlInt(uintptr(loaded.fd), unix.F_DUPFD_CLOEXEC, 0)
	}
	fd, err := verifyProgram(p)
	if err != nil {
		return -1, err
	}
	keep, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fd, nil // it is loaded again the next time
	}
	if loaded.fd > 0 {
		unix.Close(loaded.fd)
	}
	loaded.fd, loaded.program = keep, slices.Clone(p)
	return fd, nil
}

// loaded is the program that came last: nearly all containers have the same rules, and
// having the kernel verify one takes longer than attaching it.
var loaded struct {
	sync.Mutex
	program []bpfInsn
	fd      int // 0: none
}

func verifyProgram(p []bpfInsn) (int, error) {
	buf := make([]byte, 0, len(p)*8)
	for _, in := range p {
		buf = append(buf, in.code, in.regs)
		buf = binary.NativeEndian.AppendUint16(buf, uint16(in.off))
		buf = binary.NativeEndian.AppendUint32(buf, uint32(in.imm))
	}
	license := []byte("Apache-2.0\x00")
	// The kernel reads through addresses in attr: nothing may move till then.
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&buf[0])
	pin.Pin(&license[0])
	attr := make([]byte, 128)
	binary.NativeEndian.PutUint32(attr[0:], progCgroupDevice)
	binary.NativeEndian.PutUint32(attr[4:], uint32(len(p)))
	*(*uintptr)(unsafe.Pointer(&attr[8])) = uintptr(unsafe.Pointer(&buf[0]))
	*(*uintptr)(unsafe.Pointer(&attr[16])) = uintptr(unsafe.Pointer(&license[0]))
	fd, err := bpf(bpfProgLoad, attr)
	for range loadTries {
		// A signal has interrupted the verifier; Go's scheduler sends some.
		if err != unix.EAGAIN {
			break
		}
		fd, err = bpf(bpfProgLoad, attr)
	}
	if err != nil {
		return -1, fmt.Errorf("load the device program: %w", err)
	}
	return fd, nil
}

// devicesV2 attaches the program of the rules and takes earlier ones away.
func (g *Group) devicesV2(rules []specs.LinuxDeviceCgroup) error {
	d := g.V2()
	if d == "" {
		return fmt.Errorf("devices: the machine has no devices controller: %w", errdefs.ErrFailedPrecondition)
	}
	cg, err := unix.Open(d, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: d, Err: err}
	}
	defer unix.Close(cg)
	old, err := attached(cg)
	if err != nil {
		return err
	}
	load := loadProgram
	if len(old) > 0 { // one can't be attached twice
		load = verifyProgram
	}
	prog, err := load(deviceProgram(rules))
	if err != nil {
		return err
	}
	defer unix.Close(prog)
	attr := make([]byte, 32)
	binary.NativeEndian.PutUint32(attr[0:], uint32(cg))
	binary.NativeEndian.PutUint32(attr[4:], uint32(prog))
	binary.NativeEndian.PutUint32(attr[8:], attachDevice)
	binary.NativeEndian.PutUint32(attr[12:], allowMulti)
	if _, err := bpf(bpfProgAttach, attr); err != nil {
		return fmt.Errorf("attach the device program: %w", err)
	}
	for _, id := range old {
		get := make([]byte, 16)
		binary.NativeEndian.PutUint32(get, id)
		fd, err := bpf(bpfProgGetFDByID, get)
		if err != nil {
			return fmt.Errorf("the old device program: %w", err)
		}
		det := make([]byte, 32)
		binary.NativeEndian.PutUint32(det[0:], uint32(cg))
		binary.NativeEndian.PutUint32(det[4:], uint32(fd))
		binary.NativeEndian.PutUint32(det[8:], attachDevice)
		_, err = bpf(bpfProgDetach, det)
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("detach the old device program: %w", err)
		}
	}
	return nil
}

// attached lists the ids of device programs on the group itself.
func attached(cg int) ([]uint32, error) {
	ids := make([]uint32, 64)
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&ids[0])
	attr := make([]byte, 64)
	binary.NativeEndian.PutUint32(attr[0:], uint32(cg))
	binary.NativeEndian.PutUint32(attr[4:], attachDevice)
	*(*uintptr)(unsafe.Pointer(&attr[16])) = uintptr(unsafe.Pointer(&ids[0]))
	binary.NativeEndian.PutUint32(attr[24:], uint32(len(ids)))
	_, err := bpf(bpfProgQuery, attr)
	if err != nil {
		return nil, fmt.Errorf("list device programs: %w", err)
	}
	n := binary.NativeEndian.Uint32(attr[24:])
	return ids[:min(int(n), len(ids))], nil
}
