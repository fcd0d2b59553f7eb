// Package seccomp compiles the seccomp section of an OCI runtime specification
// into a BPF program (seccomp(2)) that finds a system call's rules by binary
// search over its number.
//
// Meaning, where the specification leaves it open, is libseccomp's as runc uses
// it: a rule without arguments wins over rules with some; rules of one system
// call are alternatives, in their order; conditions of one rule must all hold,
// unless two are on the same argument, which makes alternatives of them all.
// Names that no table knows are system calls of other machines and match
// nothing (Filter.Unknown lists them). A system call that is newer than all
// that the rules name fails with ENOSYS rather than the default action's errno,
// so that C libraries fall back to older ones. A caller of an architecture that
// is not listed is killed.
package seccomp

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Filter is a compiled program. It is immutable.
type Filter struct {
	// Unknown are the names that no system call of the machine has.
	Unknown []string

	prog   []insn
	bytes  []byte
	flags  uint
	notify bool
	text   string
}

// insn is struct sock_filter.
type insn struct {
	code   uint16
	jt, jf uint8
	k      uint32
}

// Bytes is the program as an array of struct sock_filter, not to be changed.
func (f *Filter) Bytes() []byte { return f.bytes }

// Flags are those of seccomp(2), SECCOMP_FILTER_FLAG_NEW_LISTENER included.
func (f *Filter) Flags() uint { return f.flags }

// Notify tells whether the filter has a listener.
func (f *Filter) Notify() bool { return f.notify }

// Describe is one line about the filter.
func (f *Filter) Describe() string { return f.text }

// Return values of a filter (linux/seccomp.h).
const (
	retKillProcess = 0x80000000
	retKillThread  = 0x00000000
	retTrap        = 0x00030000
	retErrno       = 0x00050000
	retUserNotif   = 0x7fc00000
	retTrace       = 0x7ff00000
	retLog         = 0x7ffc0000
	retAllow       = 0x7fff0000
)

// arch is an architecture as the kernel names it to the filter.
type arch struct {
	name  specs.Arch
	audit uint32 // AUDIT_ARCH_*
	table string
	x32   bool
	bits  int
	mux   bool // socketcall(2) and ipc(2)
}

var (
	amd64 = arch{name: specs.ArchX86_64, audit: 0xc000003e, table: tableAmd64, bits: 64}
	i386  = arch{name: specs.ArchX86, audit: 0x40000003, table: table386, bits: 32, mux: true}
	x32   = arch{name: specs.ArchX32, audit: 0xc000003e, table: tableX32, bits: 32, x32: true}
	arm64 = arch{name: specs.ArchAARCH64, audit: 0xc00000b7, table: tableArm64, bits: 64}
	arm   = arch{name: specs.ArchARM, audit: 0x40000028, table: tableArm + armPrivate, bits: 32}
)

const (
	x32Bit     = 0x40000000
	armPrivate = " breakpoint 983041 cacheflush 983042 usr26 983043 usr32 983044 set_tls 983045 get_tls 983046"
)

// families are the architectures whose system calls a kernel of GOARCH takes,
// the native one first.
var families = map[string][]arch{
	"amd64":   {amd64, i386, x32},
	"386":     {i386},
	"arm64":   {arm64, arm},
	"arm":     {arm},
	"riscv64": {{name: specs.ArchRISCV64, audit: 0xc00000f3, table: tableRiscv64, bits: 64}},
	"ppc64le": {{name: specs.ArchPPC64LE, audit: 0xc0000015, table: tablePpc64le, bits: 64}},
	"s390x":   {{name: specs.ArchS390X, audit: 0x80000016, table: tableS390x, bits: 64}},
	"loong64": {{name: specs.ArchLOONGARCH64, audit: 0xc0000102, table: tableLoong64, bits: 64}},
}

var knownArches = []specs.Arch{
	specs.ArchX86, specs.ArchX86_64, specs.ArchX32, specs.ArchARM, specs.ArchAARCH64, specs.ArchMIPS,
	specs.ArchMIPS64, specs.ArchMIPS64N32, specs.ArchMIPSEL, specs.ArchMIPSEL64, specs.ArchMIPSEL64N32,
	specs.ArchPPC, specs.ArchPPC64, specs.ArchPPC64LE, specs.ArchS390, specs.ArchS390X, specs.ArchPARISC,
	specs.ArchPARISC64, specs.ArchRISCV64, specs.ArchLOONGARCH64, specs.ArchM68K, specs.ArchSH, specs.ArchSHEB,
}

// rule is one alternative of a system call.
type rule struct {
	ret   uint32
	conds []specs.LinuxSeccompArg
}

// cache holds the filters compiled last: containers mostly share a profile.
var cache struct {
	sync.Mutex
	filters map[[sha256.Size]byte]*Filter
	// lasting are profiles that nobody changes, with what they have become.
	lasting map[*specs.LinuxSeccomp]*Filter
}

const maxCached = 16

// Lasting says that nobody will change s: Compile knows it by its address.
func Lasting(s *specs.LinuxSeccomp) {
	cache.Lock()
	defer cache.Unlock()
	if len(cache.lasting) >= maxCached || cache.lasting == nil {
		cache.lasting = map[*specs.LinuxSeccomp]*Filter{}
	}
	cache.lasting[s] = nil
}

// Compile compiles a seccomp section.
func Compile(s *specs.LinuxSeccomp) (f *Filter, err error) {
	cache.Lock()
	f, lasting := cache.lasting[s]
	cache.Unlock()
	if f != nil {
		return f, nil
	}
	if lasting {
		defer func() {
			if err == nil {
				cache.Lock()
				cache.lasting[s] = f
				cache.Unlock()
			}
		}()
	}
	key, err := fingerprint(s)
	if err != nil {
		return nil, err
	}
	cache.Lock()
	f = cache.filters[key]
	cache.Unlock()
	if f != nil {
		return f, nil
	}
	if f, err = compileFor(s, runtime.GOARCH); err != nil {
		return nil, err
	}
	cache.Lock()
	if len(cache.filters) >= maxCached || cache.filters == nil {
		cache.filters = map[[sha256.Size]byte]*Filter{}
	}
	cache.filters[key] = f
	cache.Unlock()
	return f, nil
}

func fingerprint(s *specs.LinuxSeccomp) (key [sha256.Size]byte, err error) {
	b, err := json.Marshal(s)
	if err != nil {
		return key, err
	}
	return sha256.Sum256(b), nil
}

func compileFor(s *specs.LinuxSeccomp, goarch string) (*Filter, error) {
	family, ok := families[goarch]
	if !ok {
		return nil, fmt.Errorf("no system call table for %s", goarch)
	}
	for i, a := range s.Architectures {
		if !slices.Contains(knownArches, a) {
			return nil, fmt.Errorf("architectures[%d]: %q is unknown", i, a)
		}
	}
	if s.ListenerPath == "" && s.ListenerMetadata != "" {
		return nil, fmt.Errorf("listenerMetadata: without listenerPath")
	}
	f := &Filter{}
	if err := f.setFlags(s.Flags); err != nil {
		return nil, err
	}
	def, err := action(s.DefaultAction, s.DefaultErrnoRet)
	if err != nil {
		return nil, fmt.Errorf("defaultAction: %w", err)
	}
	if s.DefaultAction == specs.ActNotify {
		return nil, fmt.Errorf("defaultAction: SCMP_ACT_NOTIFY would stop the program from being started")
	}
	c := compiler{filter: f, def: def}
	for i, sc := range s.Syscalls {
		if err := checkRule(s, &sc); err != nil {
			return nil, fmt.Errorf("syscalls[%d]: %w", i, err)
		}
		if sc.Action == specs.ActNotify {
			f.notify = true
		}
	}
	if f.notify {
		if s.ListenerPath == "" {
			return nil, fmt.Errorf("SCMP_ACT_NOTIFY needs listenerPath")
		}
		f.flags |= unix.SECCOMP_FILTER_FLAG_NEW_LISTENER
	}
	used := 0
	var names []string
	var blocks []block
	for i, a := range family {
		if i > 0 && !slices.Contains(s.Architectures, a.name) {
			continue
		}
		b, n, err := c.block(s, a)
		if err != nil {
			return nil, err
		}
		blocks = append(blocks, b)
		used += n
		names = append(names, strings.ToLower(strings.TrimPrefix(string(a.name), "SCMP_ARCH_")))
	}
	f.Unknown = unknownNames(s, family)
	f.prog = c.join(blocks)
	if len(f.prog) > unix.BPF_MAXINSNS {
		return nil, fmt.Errorf("the filter has %d instructions, the kernel takes %d", len(f.prog), unix.BPF_MAXINSNS)
	}
	for _, in := range f.prog {
		f.bytes = binary.NativeEndian.AppendUint16(f.bytes, in.code)
		f.bytes = append(f.bytes, in.jt, in.jf)
		f.bytes = binary.NativeEndian.AppendUint32(f.bytes, in.k)
	}
	f.text = fmt.Sprintf("default %s, %d system calls on %s, %d instructions", s.DefaultAction, used, strings.Join(names, ","), len(f.prog))
	return f, nil
}

func (f *Filter) setFlags(flags []specs.LinuxSeccompFlag) error {
	if flags == nil {
		// As the other runtimes: a filter alone does not cost the program the
		// processor's speculation.
		f.flags = unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		return nil
	}
	for i, fl := range flags {
		switch fl {
		case specs.LinuxSeccompFlagLog:
			f.flags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			f.flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		case specs.LinuxSeccompFlagWaitKillableRecv:
			f.flags |= unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
		case "SECCOMP_FILTER_FLAG_TSYNC":
			f.flags |= unix.SECCOMP_FILTER_FLAG_TSYNC
		default:
			return fmt.Errorf("flags[%d]: %q is unknown", i, fl)
		}
	}
	return nil
}

func checkRule(s *specs.LinuxSeccomp, sc *specs.LinuxSyscall) error {
	if len(sc.Names) == 0 {
		return fmt.Errorf("names: is empty")
	}
	if _, err := action(sc.Action, sc.ErrnoRet); err != nil {
		return fmt.Errorf("action: %w", err)
	}
	if sc.Action == specs.ActNotify {
		for _, n := range sc.Names {
			if n == "write" {
				return fmt.Errorf("names: SCMP_ACT_NOTIFY cannot be used for write, which the runtime needs to hand over the listener")
			}
		}
	}
	for i, a := range sc.Args {
		if a.Index > 5 {
			return fmt.Errorf("args[%d].index: %d is above 5", i, a.Index)
		}
		switch a.Op {
		case specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo, specs.OpGreaterEqual,
			specs.OpGreaterThan, specs.OpMaskedEqual:
		default:
			return fmt.Errorf("args[%d].op: %q is unknown", i, a.Op)
		}
	}
	return nil
}

// action is the filter's return value of an action.
func action(a specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	ret := uint32(unix.EPERM)
	if errno != nil {
		if *errno > 0xffff {
			return 0, fmt.Errorf("errnoRet: %d is above 65535", *errno)
		}
		ret = uint32(*errno)
	}
	switch a {
	case specs.ActErrno:
		if ret > 4095 {
			return 0, fmt.Errorf("errnoRet: %d is above 4095", ret)
		}
		return retErrno | ret, nil
	case specs.ActTrace:
		return retTrace | ret, nil
	}
	if errno != nil {
		return 0, fmt.Errorf("errnoRet: not for %s", a)
	}
	switch a {
	case specs.ActKill, specs.ActKillThread:
		return retKillThread, nil
	case specs.ActKillProcess:
		return retKillProcess, nil
	case specs.ActTrap:
		return retTrap, nil
	case specs.ActAllow:
		return retAllow, nil
	case specs.ActLog:
		return retLog, nil
	case specs.ActNotify:
		return retUserNotif, nil
	}
	return 0, fmt.Errorf("%q is unknown", a)
}

// numbers parses a table, once for each.
func numbers(a arch) map[string]uint32 {
	key := a.name
	if m, ok := tables.Load(key); ok {
		return m.(map[string]uint32)
	}
	m := make(map[string]uint32, 480)
	parseTable(m, a.table, 0)
	if a.x32 {
		// Those of recent years have one number everywhere.
		parseTable(m, tableAmd64, 424)
	}
	tables.Store(key, m)
	return m
}

var tables sync.Map

func parseTable(m map[string]uint32, table string, from uint32) {
	for table != "" {
		var name, num string
		name, table, _ = strings.Cut(table, " ")
		num, table, _ = strings.Cut(table, " ")
		if name == "" {
			name, num = num, ""
			num, table, _ = strings.Cut(table, " ")
		}
		var n uint32
		for _, d := range []byte(num) {
			n = n*10 + uint32(d-'0')
		}
		if n >= from {
			m[name] = n
		}
	}
}

func unknownNames(s *specs.LinuxSeccomp, family []arch) (list []string) {
	for _, sc := range s.Syscalls {
	names:
		for _, n := range sc.Names {
			for _, a := range family {
				if _, ok := numbers(a)[n]; ok {
					continue names
				}
			}
			list = append(list, n)
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}
