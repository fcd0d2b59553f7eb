package seccomp

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// data is struct seccomp_data.
type data struct {
	nr, arch uint32
	args     [6]uint64
}

// interpret runs a program as the kernel does.
func interpret(t testing.TB, prog []insn, d data) uint32 {
	var a uint32
	for pc, steps := 0, 0; ; steps++ {
		if pc >= len(prog) {
			t.Fatalf("the program runs off its end on %+v", d)
		}
		in := prog[pc]
		pc++
		jump := func(yes bool) {
			if yes {
				pc += int(in.jt)
			} else {
				pc += int(in.jf)
			}
		}
		switch in.code {
		case ldAbs:
			switch {
			case in.k == offNr:
				a = d.nr
			case in.k == offArch:
				a = d.arch
			case in.k >= offArgs && in.k < offArgs+48:
				arg := d.args[(in.k-offArgs)/8]
				if (in.k%8 == 4) != bigEndian {
					arg >>= 32
				}
				a = uint32(arg)
			default:
				t.Fatalf("load of %d", in.k)
			}
		case and:
			a &= in.k
		case ja:
			pc += int(in.k)
		case jeq:
			jump(a == in.k)
		case jgt:
			jump(a > in.k)
		case jge:
			jump(a >= in.k)
		case ret:
			return in.k
		default:
			t.Fatalf("instruction %#x", in.code)
		}
	}
}

// decide is the meaning of a profile, as straight as it can be said.
func decide(t testing.TB, s *specs.LinuxSeccomp, a arch, nr uint32, args [6]uint64) uint32 {
	def, err := action(s.DefaultAction, s.DefaultErrnoRet)
	if err != nil {
		t.Fatal(err)
	}
	nums := numbers(a)
	var last uint32
	plain, conditional := -1, []int{}
	for i, sc := range s.Syscalls {
		r, _ := action(sc.Action, sc.ErrnoRet)
		for _, n := range sc.Names {
			if num, ok := nums[n]; ok && num < 0xf0000 {
				last = max(last, num)
			}
			if num, ok := nums[n]; ok && num == nr && r != def {
				if len(sc.Args) == 0 {
					if plain < 0 {
						plain = i
					}
				} else if !slices.Contains(conditional, i) {
					conditional = append(conditional, i)
				}
			}
		}
	}
	if plain >= 0 {
		r, _ := action(s.Syscalls[plain].Action, s.Syscalls[plain].ErrnoRet)
		return r
	}
	holds := func(c specs.LinuxSeccompArg) bool {
		v, x, y := args[c.Index], c.Value, c.ValueTwo
		if a.bits == 32 {
			v, x, y = uint64(uint32(v)), uint64(uint32(x)), uint64(uint32(y))
		}
		switch c.Op {
		case specs.OpEqualTo:
			return v == x
		case specs.OpNotEqual:
			return v != x
		case specs.OpGreaterThan:
			return v > x
		case specs.OpGreaterEqual:
			return v >= x
		case specs.OpLessThan:
			return v < x
		case specs.OpLessEqual:
			return v <= x
		}
		return v&x == y
	}
	for _, i := range conditional {
		sc := s.Syscalls[i]
		all, some, twice := true, false, false
		seen := map[uint]bool{}
		for _, c := range sc.Args {
			h := holds(c)
			all, some = all && h, some || h
			twice = twice || seen[c.Index]
			seen[c.Index] = true
		}
		if all || twice && some {
			r, _ := action(sc.Action, sc.ErrnoRet)
			return r
		}
	}
	if a.mux {
		for name, calls := range map[string]map[string]uint64{"socketcall": socketCalls, "ipc": ipcCalls} {
			if nums[name] != nr {
				continue
			}
			for _, sc := range s.Syscalls {
				r, _ := action(sc.Action, sc.ErrnoRet)
				for _, n := range sc.Names {
					if c, ok := calls[n]; ok && len(sc.Args) == 0 && r != def && uint32(args[0]) == uint32(c) {
						return r
					}
				}
			}
		}
	}
	if nr > last && last > 0 && nr < 0xf0000 {
		switch s.DefaultAction {
		case specs.ActAllow, specs.ActLog, specs.ActTrace:
		default:
			return retErrno | 38
		}
	}
	return def
}

// interesting are the arguments to try for a profile.
func interesting(s *specs.LinuxSeccomp) []uint64 {
	vals := []uint64{0, 1, 0xffffffff, 1 << 32, ^uint64(0)}
	for _, sc := range s.Syscalls {
		for _, a := range sc.Args {
			for _, v := range []uint64{a.Value, a.ValueTwo} {
				vals = append(vals, v, v+1, v-1, v|1<<32, v^0x10)
			}
		}
	}
	slices.Sort(vals)
	return slices.Compact(vals)
}

// compare checks a compiled profile against its meaning.
func compare(t testing.TB, s *specs.LinuxSeccomp, goarch string) int {
	f, err := compileFor(s, goarch)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	vals := interesting(s)
	for i, a := range families[goarch] {
		listed := i == 0 || slices.Contains(s.Architectures, a.name)
		nrs := []uint32{0xffffff, 0xf0007, 0x3fffffff}
		for _, nr := range numbers(a) {
			nrs = append(nrs, nr, nr+1)
		}
		conds := map[uint32]bool{}
		for _, sc := range s.Syscalls {
			for _, name := range sc.Names {
				if nr, ok := numbers(a)[name]; ok && len(sc.Args) > 0 {
					conds[nr] = true
				}
			}
		}
		if a.mux {
			conds[numbers(a)["ipc"]], conds[numbers(a)["socketcall"]] = true, true
		}
		for _, nr := range nrs {
			try := func(args [6]uint64) {
				n++
				d := data{nr: nr, arch: a.audit, args: args}
				if a.x32 {
					d.nr |= x32Bit
				}
				want := uint32(retKillThread)
				if listed {
					want = decide(t, s, a, nr, args)
				}
				if got := interpret(t, f.prog, d); got != want {
					t.Fatalf("%s nr %d args %#x: %#x, want %#x", a.name, nr, args, got, want)
				}
			}
			try([6]uint64{})
			if !conds[nr] {
				continue
			}
			for _, v := range vals {
				for i := range 6 {
					var args [6]uint64
					args[i] = v
					try(args)
				}
				try([6]uint64{v, v, v, v, v, v})
			}
		}
	}
	if got := interpret(t, f.prog, data{arch: 0x12345678}); got != retKillThread {
		t.Errorf("a foreign architecture: %#x", got)
	}
	return n
}

func defaultProfile(t testing.TB) *specs.LinuxSeccomp {
	caps := []string{"CAP_CHOWN", "CAP_SYS_CHROOT"}
	p, err := seccomp.GetDefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestDefaultProfile(t *testing.T) {
	p := defaultProfile(t)
	n := compare(t, p, "amd64")
	f, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d decisions; %s; unknown %v", n, f.Describe(), f.Unknown)
	p.Architectures = []specs.Arch{specs.ArchARM, specs.ArchAARCH64}
	compare(t, p, "arm64")
	p.Architectures = nil
	compare(t, p, "amd64")
}

// TestLibseccomp compares with what libseccomp 2.5.4 makes of the profile in
// testdata: a line is architecture, number, arguments and the filter's answer,
// as its own program gave them (testdata/decide.py).
func TestLibseccomp(t *testing.T) {
	var p specs.LinuxSeccomp
	b, err := os.ReadFile("testdata/profile.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &p); err != nil {
		t.Fatal(err)
	}
	f, err := compileFor(&p, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Open("testdata/libseccomp.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	n := 0
	for s := bufio.NewScanner(file); s.Scan(); n++ {
		w := strings.Fields(s.Text())
		if len(w) != 9 {
			t.Fatalf("line %q", s.Text())
		}
		var v [9]uint64
		for i := range v {
			if v[i], err = strconv.ParseUint(w[i], 0, 64); err != nil {
				t.Fatal(err)
			}
		}
		d := data{arch: uint32(v[0]), nr: uint32(v[1])}
		copy(d.args[:], v[2:8])
		if got := interpret(t, f.prog, d); got != uint32(v[8]) {
			t.Errorf("%s: %#x", s.Text(), got)
		}
	}
	if n < 1000 {
		t.Errorf("%d decisions compared", n)
	}
}

// randomProfile makes rules of all kinds on a few system calls.
func randomProfile(r *rand.Rand) *specs.LinuxSeccomp {
	actions := []specs.LinuxSeccompAction{specs.ActAllow, specs.ActErrno, specs.ActKillProcess, specs.ActTrap, specs.ActLog, specs.ActTrace}
	ops := []specs.LinuxSeccompOperator{specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual}
	names := []string{"read", "write", "clone", "socket", "semop", "openat2", "personality", "listns", "accept4", "nosuchcall"}
	vals := []uint64{0, 1, 7, 0x100000000, 0xffffffff, 1 << 63, ^uint64(0), 0x7f00000001}
	s := &specs.LinuxSeccomp{DefaultAction: actions[r.IntN(len(actions))], Architectures: []specs.Arch{specs.ArchX86, specs.ArchX32}[:r.IntN(3)]}
	for range r.IntN(12) {
		sc := specs.LinuxSyscall{Action: actions[r.IntN(len(actions))]}
		for range 1 + r.IntN(3) {
			sc.Names = append(sc.Names, names[r.IntN(len(names))])
		}
		if e := uint(r.IntN(100)); sc.Action == specs.ActErrno && e > 50 {
			sc.ErrnoRet = &e
		}
		for range r.IntN(4) {
			sc.Args = append(sc.Args, specs.LinuxSeccompArg{
				Index: uint(r.IntN(6)), Value: vals[r.IntN(len(vals))], ValueTwo: vals[r.IntN(len(vals))], Op: ops[r.IntN(len(ops))],
			})
		}
		s.Syscalls = append(s.Syscalls, sc)
	}
	return s
}

func TestRandomProfiles(t *testing.T) {
	for seed := range uint64(150) {
		s := randomProfile(rand.New(rand.NewPCG(seed, 1)))
		t.Run(fmt.Sprint(seed), func(t *testing.T) { compare(t, s, "amd64") })
	}
}

func TestRefused(t *testing.T) {
	big, ret := uint(5000), uint(1)
	for want, s := range map[string]*specs.LinuxSeccomp{
		`defaultAction: "" is unknown`:                    {},
		`defaultAction: "x" is unknown`:                   {DefaultAction: "x"},
		`defaultAction: errnoRet: not for SCMP_ACT_ALLOW`: {DefaultAction: specs.ActAllow, DefaultErrnoRet: &ret},
		`defaultAction: errnoRet: 5000 is above 4095`:     {DefaultAction: specs.ActErrno, DefaultErrnoRet: &big},
		`architectures[0]: "z80" is unknown`:              {DefaultAction: specs.ActAllow, Architectures: []specs.Arch{"z80"}},
		`flags[0]: "f" is unknown`:                        {DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{"f"}},
		`syscalls[0]: names: is empty`:                    {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Action: specs.ActErrno}}},
		`syscalls[0]: args[0].index: 6 is above 5`:        {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 6}}}}},
		`syscalls[0]: args[0].op: "~" is unknown`:         {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: "~"}}}}},
		`SCMP_ACT_NOTIFY needs listenerPath`:              {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActNotify}}},
		`listenerMetadata: without listenerPath`:          {DefaultAction: specs.ActAllow, ListenerMetadata: "x"},
		`syscalls[0]: names: SCMP_ACT_NOTIFY cannot be used for write, which the runtime needs to hand over the listener`: {DefaultAction: specs.ActAllow, ListenerPath: "/x", Syscalls: []specs.LinuxSyscall{{Names: []string{"write"}, Action: specs.ActNotify}}},
	} {
		if _, err := Compile(s); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func FuzzCompile(f *testing.F) {
	b, err := json.Marshal(defaultProfile(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"op":"SCMP_CMP_GT"},{"index":0,"value":9,"op":"SCMP_CMP_LE"}]}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s specs.LinuxSeccomp
		if json.Unmarshal(b, &s) != nil {
			return
		}
		if _, err := compileFor(&s, "amd64"); err == nil {
			compare(t, &s, "amd64")
		}
	})
}

func BenchmarkCompile(b *testing.B) {
	p := defaultProfile(b)
	b.Run("fresh", func(b *testing.B) {
		for b.Loop() {
			if _, err := compileFor(p, "amd64"); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("cached", func(b *testing.B) {
		for b.Loop() {
			if _, err := Compile(p); err != nil {
				b.Fatal(err)
			}
		}
	})
}
