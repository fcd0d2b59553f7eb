package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// weightV2 is cpu.shares (2…262144, 1024) as cpu.weight (1…10000, 100), by the
// curve that the other runtimes use.
func weightV2(shares uint64) uint64 {
	if shares <= 2 {
		return 1
	}
	if shares >= 262144 {
		return 10000
	}
	l := math.Log2(float64(shares))
	return uint64(math.Ceil(math.Pow(10, (l*l+125*l)/612.0-7.0/34.0)))
}

func maxOr(v int64) string {
	if v < 0 {
		return "max"
	}
	return strconv.FormatInt(v, 10)
}

func (g *Group) applyV2(d string, res *specs.LinuxResources) error {
	s := setter{dir: d}
	if m := res.Memory; m != nil {
		if err := memoryV2(d, m); err != nil {
			return err
		}
	}
	if c := res.CPU; c != nil {
		if c.RealtimePeriod != nil || c.RealtimeRuntime != nil {
			return fmt.Errorf("cpu.realtimeRuntime, realtimePeriod: cgroup v2 has no such limit: %w", errdefs.ErrFailedPrecondition)
		}
		if c.Cpus != "" {
			s.set("cpuset.cpus", c.Cpus)
		}
		if c.Mems != "" {
			s.set("cpuset.mems", c.Mems)
		}
		setNumber(&s, "cpu.idle", c.Idle)
		if c.Shares != nil && *c.Shares > 0 && (c.Idle == nil || *c.Idle == 0) {
			s.set("cpu.weight", strconv.FormatUint(weightV2(*c.Shares), 10))
		}
		if c.Quota != nil && *c.Quota != 0 || c.Period != nil && *c.Period > 0 {
			q := "max"
			old, _ := readFile(filepath.Join(d, "cpu.max")) // as it is, unless it is set
			if f := strings.Fields(string(old)); c.Quota == nil && len(f) > 0 {
				q = f[0]
			}
			if c.Quota != nil && *c.Quota > 0 {
				q = strconv.FormatInt(*c.Quota, 10)
			}
			if c.Period != nil && *c.Period > 0 {
				q += fmt.Sprintf(" %d", *c.Period)
			}
			s.set("cpu.max", q)
		}
		setNumber(&s, "cpu.max.burst", c.Burst)
	}
	if res.Pids != nil && res.Pids.Limit != nil {
		s.set("pids.max", pidsMax(*res.Pids.Limit))
	}
	if s.err != nil {
		return s.err
	}
	if b := res.BlockIO; b != nil {
		if err := ioV2(d, b); err != nil {
			return err
		}
	}
	for _, h := range res.HugepageLimits {
		if err := hugetlbV2(d, h); err != nil {
			return err
		}
	}
	if n := res.Network; n != nil && (n.ClassID != nil || len(n.Priorities) > 0) {
		return fmt.Errorf("network: cgroup v2 has no such limit: %w", errdefs.ErrFailedPrecondition)
	}
	if err := rdma(d, res.Rdma); err != nil {
		return err
	}
	if err := unifiedV2(d, res.Unified); err != nil {
		return err
	}
	if len(res.Devices) > 0 {
		return g.devicesV2(res.Devices)
	}
	return nil
}

func memoryV2(d string, m *specs.LinuxMemory) error {
	s := setter{dir: d}
	switch {
	case m.Kernel != nil && *m.Kernel > 0, m.KernelTCP != nil && *m.KernelTCP > 0:
		return fmt.Errorf("memory.kernel: cgroup v2 has no such limit: %w", errdefs.ErrFailedPrecondition)
	case m.Swappiness != nil:
		return fmt.Errorf("memory.swappiness: cgroup v2 has no such setting: %w", errdefs.ErrFailedPrecondition)
	case m.DisableOOMKiller != nil && *m.DisableOOMKiller:
		return fmt.Errorf("memory.disableOOMKiller: cgroup v2 has no such setting: %w", errdefs.ErrFailedPrecondition)
	}
	if m.Swap != nil && *m.Swap != 0 {
		swap := *m.Swap
		if swap > 0 {
			limit := int64(-1)
			if m.Limit != nil {
				limit = *m.Limit
			} else if n, err := readUint(filepath.Join(d, "memory.max")); err == nil && n <= math.MaxInt64 {
				limit = int64(n)
			}
			if limit < 0 || limit > swap {
				return fmt.Errorf("memory.swap: %d is less than the memory limit: %w", swap, errdefs.ErrInvalidArgument)
			}
			swap -= limit
		}
		s.set("memory.swap.max", maxOr(swap))
		if errors.Is(s.err, fs.ErrNotExist) && swap <= 0 {
			s.err = nil // a kernel without swap accounting gives none anyway
		}
	}
	if m.Limit != nil && *m.Limit != 0 {
		s.set("memory.max", maxOr(*m.Limit))
	}
	if m.Reservation != nil && *m.Reservation != 0 {
		s.set("memory.low", maxOr(*m.Reservation))
	}
	return s.err
}

func ioV2(d string, b *specs.LinuxBlockIO) error {
	s := setter{dir: d}
	if b.LeafWeight != nil && *b.LeafWeight > 0 {
		return fmt.Errorf("blockIO.leafWeight: cgroup v2 has no such weight: %w", errdefs.ErrFailedPrecondition)
	}
	bfq := filepath.Join(d, "io.bfq.weight")
	_, err := os.Stat(bfq)
	hasBFQ := err == nil
	weight := func(prefix string, w uint16) {
		if hasBFQ {
			s.set("io.bfq.weight", prefix+strconv.Itoa(int(w)))
			return
		}
		// 10…1000 as 1…10000.
		s.set("io.weight", prefix+strconv.FormatUint(1+(uint64(w)-10)*9999/990, 10))
	}
	if b.Weight != nil && *b.Weight > 0 {
		if *b.Weight < 10 || *b.Weight > 1000 {
			return fmt.Errorf("blockIO.weight: %d is not between 10 and 1000: %w", *b.Weight, errdefs.ErrInvalidArgument)
		}
		prefix := "default "
		if hasBFQ {
			prefix = ""
		}
		weight(prefix, *b.Weight)
	}
	for _, w := range b.WeightDevice {
		if w.LeafWeight != nil {
			return fmt.Errorf("blockIO.weightDevice.leafWeight: cgroup v2 has no such weight: %w", errdefs.ErrFailedPrecondition)
		}
		if w.Weight != nil && *w.Weight >= 10 {
			weight(devNumber(w.LinuxBlockIODevice)+" ", *w.Weight)
		}
	}
	for _, t := range []struct {
		key  string
		list []specs.LinuxThrottleDevice
	}{
		{"rbps", b.ThrottleReadBpsDevice}, {"wbps", b.ThrottleWriteBpsDevice},
		{"riops", b.ThrottleReadIOPSDevice}, {"wiops", b.ThrottleWriteIOPSDevice},
	} {
		for _, l := range t.list {
			rate := "max"
			if l.Rate > 0 {
				rate = strconv.FormatUint(l.Rate, 10)
			}
			s.set("io.max", fmt.Sprintf("%s %s=%s", devNumber(l.LinuxBlockIODevice), t.key, rate))
		}
	}
	return s.err
}
