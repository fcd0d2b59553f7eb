package spec

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

// resources fills limits into r, which holds the device rules already.
func resources(r *specs.LinuxResources, in Input) {
	limits := Resources(&in.HostConfig.Resources, in.Defaults)
	r.CPU, r.Memory, r.Pids, r.BlockIO = limits.CPU, limits.Memory, limits.Pids, limits.BlockIO
}

// Resources translates limits. With zero Defaults it is what `update` sends:
// only what is set.
func Resources(h *container.Resources, d Defaults) *specs.LinuxResources {
	r := &specs.LinuxResources{CPU: cpu(h), Memory: memory(h, d), BlockIO: blockIO(h)}
	switch {
	case h.PidsLimit != nil && *h.PidsLimit > 0:
		r.Pids = &specs.LinuxPids{Limit: ptr(*h.PidsLimit)}
	case h.PidsLimit != nil && *h.PidsLimit < 0:
		r.Pids = &specs.LinuxPids{Limit: ptr(int64(-1))}
	case d.Pids > 0:
		r.Pids = &specs.LinuxPids{Limit: ptr(d.Pids)}
	}
	return r
}

func cpu(h *container.Resources) *specs.LinuxCPU {
	c := specs.LinuxCPU{Cpus: h.CpusetCpus, Mems: h.CpusetMems}
	if h.CPUShares > 0 {
		c.Shares = ptr(uint64(min(max(h.CPUShares, 2), 262144))) // what kernels know; clients may say more
	}
	if h.NanoCPUs > 0 {
		const period = 100_000 // microseconds
		c.Period = ptr(uint64(period))
		c.Quota = ptr(h.NanoCPUs / 1000 * period / 1_000_000)
	}
	if h.CPUPeriod != 0 {
		c.Period = ptr(uint64(h.CPUPeriod))
	}
	if h.CPUQuota != 0 {
		c.Quota = ptr(h.CPUQuota)
	}
	if h.CPURealtimePeriod != 0 {
		c.RealtimePeriod = ptr(uint64(h.CPURealtimePeriod))
	}
	if h.CPURealtimeRuntime != 0 {
		c.RealtimeRuntime = ptr(h.CPURealtimeRuntime)
	}
	if c == (specs.LinuxCPU{}) {
		return nil
	}
	return &c
}

func memory(h *container.Resources, d Defaults) *specs.LinuxMemory {
	var m specs.LinuxMemory
	switch {
	case h.Memory > 0:
		m.Limit = ptr(h.Memory)
	case h.Memory == 0 && d.Memory > 0:
		m.Limit = ptr(d.Memory)
	}
	if h.MemoryReservation > 0 {
		m.Reservation = ptr(h.MemoryReservation)
	}
	if h.MemorySwap != 0 && m.Limit != nil && h.Memory > 0 {
		m.Swap = ptr(h.MemorySwap)
	}
	if h.MemorySwappiness != nil && *h.MemorySwappiness >= 0 {
		m.Swappiness = ptr(uint64(*h.MemorySwappiness))
	}
	if h.OomKillDisable != nil && *h.OomKillDisable {
		m.DisableOOMKiller = ptr(true)
	}
	if m == (specs.LinuxMemory{}) {
		return nil
	}
	return &m
}

func blockIO(h *container.Resources) *specs.LinuxBlockIO {
	b := &specs.LinuxBlockIO{}
	used := false
	if h.BlkioWeight > 0 {
		b.Weight, used = ptr(h.BlkioWeight), true
	}
	for _, w := range h.BlkioWeightDevice {
		if maj, min, ok := devNumbers(w.Path); ok {
			d := specs.LinuxWeightDevice{Weight: ptr(w.Weight)}
			d.Major, d.Minor = maj, min
			b.WeightDevice, used = append(b.WeightDevice, d), true
		}
	}
	for _, t := range []struct {
		from []*blkiodev.ThrottleDevice
		to   *[]specs.LinuxThrottleDevice
	}{
		{h.BlkioDeviceReadBps, &b.ThrottleReadBpsDevice},
		{h.BlkioDeviceWriteBps, &b.ThrottleWriteBpsDevice},
		{h.BlkioDeviceReadIOps, &b.ThrottleReadIOPSDevice},
		{h.BlkioDeviceWriteIOps, &b.ThrottleWriteIOPSDevice},
	} {
		for _, x := range t.from {
			if maj, min, ok := devNumbers(x.Path); ok {
				d := specs.LinuxThrottleDevice{Rate: x.Rate}
				d.Major, d.Minor = maj, min
				*t.to, used = append(*t.to, d), true
			}
		}
	}
	if !used {
		return nil
	}
	return b
}

// DevPath writes device numbers where a path stands: the caller resolves the
// paths of block devices on the container's kernel before Build.
func DevPath(major, minor uint32) string { return fmt.Sprintf("dev:%d:%d", major, minor) }

func devNumbers(path string) (major, minor int64, ok bool) {
	rest, ok := strings.CutPrefix(path, "dev:")
	if !ok {
		return 0, 0, false
	}
	a, b, ok := strings.Cut(rest, ":")
	major, err1 := strconv.ParseInt(a, 10, 64)
	minor, err2 := strconv.ParseInt(b, 10, 64)
	return major, minor, ok && err1 == nil && err2 == nil && major <= math.MaxUint32 && minor <= math.MaxUint32
}
