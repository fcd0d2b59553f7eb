package launch

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var schedPolicies = map[specs.LinuxSchedulerPolicy]uint32{
	"SCHED_OTHER": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_ISO": 4, "SCHED_IDLE": 5, "SCHED_DEADLINE": 6,
}

var schedFlags = map[specs.LinuxSchedulerFlag]uint64{
	"SCHED_FLAG_RESET_ON_FORK": 0x01, "SCHED_FLAG_RECLAIM": 0x02, "SCHED_FLAG_DL_OVERRUN": 0x04,
	"SCHED_FLAG_KEEP_POLICY": 0x08, "SCHED_FLAG_KEEP_PARAMS": 0x10,
	"SCHED_FLAG_UTIL_CLAMP_MIN": 0x20, "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}

var ioClasses = map[specs.IOPriorityClass]int{
	specs.IOPRIO_CLASS_RT: 1, specs.IOPRIO_CLASS_BE: 2, specs.IOPRIO_CLASS_IDLE: 3,
}

// schedule sets processor and disk priorities.
func (b *builder) schedule(p *specs.Process) error {
	if s := p.Scheduler; s != nil {
		policy, ok := schedPolicies[s.Policy]
		if !ok {
			return fmt.Errorf("process.scheduler.policy: %q is unknown", s.Policy)
		}
		var flags uint64
		for i, f := range s.Flags {
			bit, ok := schedFlags[f]
			if !ok {
				return fmt.Errorf("process.scheduler.flags[%d]: %q is unknown", i, f)
			}
			flags |= bit
		}
		if s.Nice < -20 || s.Nice > 19 {
			return fmt.Errorf("process.scheduler.nice: %d is not between -20 and 19", s.Nice)
		}
		if s.Priority != 0 && policy != 1 && policy != 2 {
			return fmt.Errorf("process.scheduler.priority: only for SCHED_FIFO and SCHED_RR")
		}
		if policy != 6 && (s.Runtime != 0 || s.Deadline != 0 || s.Period != 0) {
			return fmt.Errorf("process.scheduler.runtime, deadline, period: only for SCHED_DEADLINE")
		}
		// struct sched_attr (sched_setattr(2)), its first version.
		var attr []byte
		attr = binary.NativeEndian.AppendUint32(attr, 48)
		attr = binary.NativeEndian.AppendUint32(attr, policy)
		attr = binary.NativeEndian.AppendUint64(attr, flags)
		attr = binary.NativeEndian.AppendUint32(attr, uint32(s.Nice))
		attr = binary.NativeEndian.AppendUint32(attr, uint32(s.Priority))
		for _, v := range []uint64{s.Runtime, s.Deadline, s.Period} {
			attr = binary.NativeEndian.AppendUint64(attr, v)
		}
		b.step("scheduler "+string(s.Policy), fmt.Sprintf("nice %d priority %d", s.Nice, s.Priority))
		b.call(unix.SYS_SCHED_SETATTR, num(0), mem(attr), num(0))
	}
	if io := p.IOPriority; io != nil {
		class, ok := ioClasses[io.Class]
		if !ok {
			return fmt.Errorf("process.ioPriority.class: %q is unknown", io.Class)
		}
		if io.Priority < 0 || io.Priority > 7 {
			return fmt.Errorf("process.ioPriority.priority: %d is not between 0 and 7", io.Priority)
		}
		b.step(fmt.Sprintf("I/O priority %s %d", io.Class, io.Priority))
		b.call(unix.SYS_IOPRIO_SET, num(1 /* IOPRIO_WHO_PROCESS */), num(0), num(class<<13|io.Priority))
	}
	return nil
}

var personalityDomains = map[specs.LinuxPersonalityDomain]int{specs.PerLinux: 0, specs.PerLinux32: 8}

func (b *builder) personality(p *specs.LinuxPersonality) error {
	if p == nil {
		return nil
	}
	domain, ok := personalityDomains[p.Domain]
	if !ok {
		return fmt.Errorf("linux.personality.domain: %q is unknown", p.Domain)
	}
	if len(p.Flags) > 0 {
		return fmt.Errorf("linux.personality.flags: the specification knows none")
	}
	b.step("personality " + string(p.Domain))
	b.call(unix.SYS_PERSONALITY, num(domain))
	return nil
}

var memoryModes = map[specs.MemoryPolicyModeType]int{
	specs.MpolDefault: 0, specs.MpolPreferred: 1, specs.MpolBind: 2, specs.MpolInterleave: 3,
	specs.MpolLocal: 4, specs.MpolPreferredMany: 5, specs.MpolWeightedInterleave: 6,
}

var memoryFlags = map[specs.MemoryPolicyFlagType]int{
	specs.MpolFNumaBalancing: 1 << 13, specs.MpolFRelativeNodes: 1 << 14, specs.MpolFStaticNodes: 1 << 15,
}

// memoryPolicy is set_mempolicy(2).
func (b *builder) memoryPolicy(m *specs.LinuxMemoryPolicy) error {
	if m == nil {
		return nil
	}
	mode, ok := memoryModes[m.Mode]
	if !ok {
		return fmt.Errorf("linux.memoryPolicy.mode: %q is unknown", m.Mode)
	}
	for i, f := range m.Flags {
		bit, ok := memoryFlags[f]
		if !ok {
			return fmt.Errorf("linux.memoryPolicy.flags[%d]: %q is unknown", i, f)
		}
		mode |= bit
	}
	nodes, err := parseList(m.Nodes, 1024)
	if err != nil {
		return fmt.Errorf("linux.memoryPolicy.nodes: %w", err)
	}
	b.step("memory policy "+string(m.Mode), m.Nodes)
	if len(nodes) == 0 {
		b.call(unix.SYS_SET_MEMPOLICY, num(mode), num(0), num(0))
	} else {
		// The kernel takes one bit less than it is told of.
		b.call(unix.SYS_SET_MEMPOLICY, num(mode), mem(nodes), num(len(nodes)*8+1))
	}
	return nil
}

// execAffinity sets the processors for the time until the exec and gives those
// for the program.
func (c *compiler) execAffinity(p *specs.Process) (final []byte, err error) {
	a := p.ExecCPUAffinity
	if a == nil {
		return nil, nil
	}
	initial, err := parseList(a.Initial, 8192)
	if err != nil {
		return nil, fmt.Errorf("process.execCPUAffinity.initial: %w", err)
	}
	if final, err = parseList(a.Final, 8192); err != nil {
		return nil, fmt.Errorf("process.execCPUAffinity.final: %w", err)
	}
	c.affinity("initial", initial)
	return final, nil
}

func (b *builder) affinity(when string, mask []byte) {
	if len(mask) == 0 {
		return
	}
	b.step("processors, " + when)
	b.call(unix.SYS_SCHED_SETAFFINITY, num(0), num(len(mask)), mem(mask))
}

// parseList parses "0-3,7" into a bit mask of whole words; nil for "".
func parseList(s string, limit int) ([]byte, error) {
	s = strings.TrimSpace(s)
	if s == "" {
		return nil, nil
	}
	var mask []byte
	for part := range strings.SplitSeq(s, ",") {
		from, to, isRange := strings.Cut(strings.TrimSpace(part), "-")
		a, err := strconv.ParseUint(from, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%q is no list", s)
		}
		b := a
		if isRange {
			if b, err = strconv.ParseUint(to, 10, 32); err != nil {
				return nil, fmt.Errorf("%q is no list", s)
			}
		}
		if b < a || b >= uint64(limit) {
			return nil, fmt.Errorf("%q: %s", s, part)
		}
		for n := a; n <= b; n++ {
			for uint64(len(mask)) <= n/8 {
				mask = append(mask, make([]byte, 8)...)
			}
			mask[n/8] |= 1 << (n % 8)
		}
	}
	return mask, nil
}
