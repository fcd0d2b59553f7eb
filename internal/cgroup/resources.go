package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// check refuses limits that the machine cannot set, before anything is made.
func (g *Group) check(res *specs.LinuxResources) error {
	if res == nil {
		return nil
	}
	v2 := g.V2()
	var avail string
	if v2 != "" {
		for _, d := range g.list() {
			if d.v2 {
				b, _ := os.ReadFile(filepath.Join(d.mount, "cgroup.controllers"))
				avail = string(b)
			}
		}
	}
	for _, c := range needed(res) {
		if g.v1(c) != "" {
			continue
		}
		name := c
		if c == "blkio" {
			name = "io"
		}
		if v2 != "" && contains(strings.Fields(avail), name) {
			continue
		}
		return fmt.Errorf("cgroup: the machine has no %s controller: %w", c, errdefs.ErrFailedPrecondition)
	}
	if len(res.Unified) > 0 && v2 == "" {
		return fmt.Errorf("cgroup: unified limits need cgroup v2: %w", errdefs.ErrFailedPrecondition)
	}
	for k := range res.Unified {
		if strings.Contains(k, "/") || !strings.Contains(k, ".") {
			return fmt.Errorf("cgroup: unified: %q is no file of a cgroup: %w", k, errdefs.ErrInvalidArgument)
		}
	}
	return checkDevices(res.Devices)
}

// Update changes limits; fields that are nil stay as they are. Processes are
// moved into hierarchies that a new limit needs.
func (g *Group) Update(res *specs.LinuxResources) error {
	if res == nil {
		return nil
	}
	if err := g.extend(res); err != nil {
		return err
	}
	if err := g.check(res); err != nil {
		return err
	}
	if m := res.Memory; m != nil && m.CheckBeforeUpdate != nil && *m.CheckBeforeUpdate && m.Limit != nil && *m.Limit > 0 {
		st, err := g.Stats()
		if err != nil {
			return err
		}
		if st.Memory.Usage > uint64(*m.Limit) {
			return fmt.Errorf("cgroup %s: memory limit %d is below the usage of %d: %w", g.path, *m.Limit, st.Memory.Usage, errdefs.ErrFailedPrecondition)
		}
	}
	return g.apply(res)
}

// extend makes the group in v1 hierarchies that it was not in so far.
func (g *Group) extend(res *specs.LinuxResources) error {
	for _, c := range needed(res) {
		if g.v1(c) != "" {
			continue
		}
		for _, h := range Hierarchies() {
			if h.V2 || !h.Has(c) {
				continue
			}
			dirs, err := resolve(g.path, []Hierarchy{h})
			if err != nil {
				return err
			}
			if _, err := dirs[0].make(); err != nil {
				return fmt.Errorf("cgroup %s: %w", g.path, err)
			}
			if err := g.moveInto(dirs[0]); err != nil {
				return err
			}
			g.mu.Lock()
			g.dirs = append(slices.Clone(g.dirs), dirs[0])
			g.mu.Unlock()
		}
	}
	return nil
}

// moveInto moves all processes; those that are forked meanwhile by the next turn.
func (g *Group) moveInto(d dir) error {
	for range 100 {
		pids, err := g.Pids()
		if err != nil {
			return err
		}
		in, err := readPids(filepath.Join(d.path, "cgroup.procs"))
		if err != nil {
			return err
		}
		moved := false
		for _, pid := range pids {
			if slices.Contains(in, pid) {
				continue
			}
			moved = true
			if err := writeFile(filepath.Join(d.path, "cgroup.procs"), strconv.Itoa(pid)); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
		if !moved {
			return nil
		}
	}
	return fmt.Errorf("cgroup %s: processes are forked faster than they can be moved", g.path)
}

// setter writes files of one directory and keeps the first error.
type setter struct {
	dir string
	err error
}

func (s *setter) set(file, value string) {
	if s.err == nil {
		s.err = writeFile(filepath.Join(s.dir, file), value)
	}
}

func setNumber[T int64 | uint64 | uint16 | uint32](s *setter, file string, v *T) {
	if v != nil {
		s.set(file, fmt.Sprint(*v))
	}
}

func (g *Group) apply(res *specs.LinuxResources) error {
	if res == nil {
		return nil
	}
	var err error
	if g.unified() {
		err = g.applyV2(g.V2(), res)
	} else {
		err = g.applyV1(res)
	}
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", g.path, err)
	}
	return nil
}

// unified tells whether limits are v2's: there is no v1 directory.
func (g *Group) unified() bool { return len(g.JoinV1()) == 0 }

func (g *Group) applyV1(res *specs.LinuxResources) error {
	if d := g.v1("cpuset"); d != "" && res.CPU != nil {
		s := setter{dir: d}
		if res.CPU.Cpus != "" {
			s.set("cpuset.cpus", res.CPU.Cpus)
		}
		if res.CPU.Mems != "" {
			s.set("cpuset.mems", res.CPU.Mems)
		}
		if s.err != nil {
			return s.err
		}
	}
	if d := g.v1("memory"); d != "" && res.Memory != nil {
		if err := memoryV1(d, res.Memory); err != nil {
			return err
		}
	}
	if d := g.v1("cpu"); d != "" && res.CPU != nil {
		if err := cpuV1(d, res.CPU); err != nil {
			return err
		}
	}
	if d := g.v1("pids"); d != "" && res.Pids != nil && res.Pids.Limit != nil {
		if err := writeFile(filepath.Join(d, "pids.max"), pidsMax(*res.Pids.Limit)); err != nil {
			return err
		}
	}
	if d := g.v1("blkio"); d != "" && res.BlockIO != nil {
		if err := blkioV1(d, res.BlockIO); err != nil {
			return err
		}
	}
	for _, h := range res.HugepageLimits {
		d := g.v1("hugetlb")
		if d == "" {
			d = g.V2() // hybrid
			if err := hugetlbV2(d, h); err != nil {
				return err
			}
			continue
		}
		s := setter{dir: d}
		s.set("hugetlb."+h.Pagesize+".limit_in_bytes", strconv.FormatUint(h.Limit, 10))
		if s.err == nil {
			rsvd := "hugetlb." + h.Pagesize + ".rsvd.limit_in_bytes"
			if _, err := os.Stat(filepath.Join(d, rsvd)); err == nil {
				s.set(rsvd, strconv.FormatUint(h.Limit, 10))
			}
		}
		if s.err != nil {
			return s.err
		}
	}
	if n := res.Network; n != nil {
		s := setter{dir: g.v1("net_cls")}
		setNumber(&s, "net_cls.classid", n.ClassID)
		s.dir = g.v1("net_prio")
		for _, p := range n.Priorities {
			s.set("net_prio.ifpriomap", fmt.Sprintf("%s %d", p.Name, p.Priority))
		}
		if s.err != nil {
			return s.err
		}
	}
	if len(res.Rdma) > 0 {
		if err := rdma(g.v1("rdma"), res.Rdma); err != nil {
			return err
		}
	}
	if len(res.Unified) > 0 {
		if err := unifiedV2(g.V2(), res.Unified); err != nil {
			return err
		}
	}
	if len(res.Devices) > 0 {
		if d := g.v1("devices"); d != "" {
			return devicesV1(d, res.Devices)
		}
		return g.devicesV2(res.Devices)
	}
	return nil
}

func pidsMax(limit int64) string {
	if limit <= 0 {
		return "max"
	}
	return strconv.FormatInt(limit, 10)
}

// memoryV1 sets limit and swap in the order that the kernel takes: the limit is
// never above memory and swap together.
func memoryV1(d string, m *specs.LinuxMemory) error {
	s := setter{dir: d}
	limit := func() { setNumber(&s, "memory.limit_in_bytes", m.Limit) }
	swap := func() { setNumber(&s, "memory.memsw.limit_in_bytes", m.Swap) }
	if m.Limit != nil && *m.Limit == 0 {
		limit = func() {}
	}
	if m.Swap != nil && *m.Swap == 0 {
		swap = func() {}
	}
	if m.Limit != nil && m.Swap == nil && *m.Limit > 0 {
		// A limit above the present memory and swap takes that along.
		cur, err := readUint(filepath.Join(d, "memory.memsw.limit_in_bytes"))
		if err == nil && uint64(*m.Limit) > cur {
			s.set("memory.memsw.limit_in_bytes", fmt.Sprint(*m.Limit))
		}
	}
	up := false
	if m.Swap != nil {
		cur, err := readUint(filepath.Join(d, "memory.limit_in_bytes"))
		if errors.Is(err, fs.ErrNotExist) {
			return err
		}
		up = *m.Swap < 0 || uint64(*m.Swap) > cur
		if m.Limit != nil && *m.Limit < 0 {
			up = true
		}
	}
	if up {
		swap()
		limit()
	} else {
		limit()
		swap()
	}
	setNumber(&s, "memory.soft_limit_in_bytes", m.Reservation)
	setNumber(&s, "memory.kmem.tcp.limit_in_bytes", m.KernelTCP)
	if m.Kernel != nil && *m.Kernel > 0 {
		// The kernel took this limit away in 5.16: the file stays and refuses.
		s.set("memory.kmem.limit_in_bytes", fmt.Sprint(*m.Kernel))
		if errors.Is(s.err, unix.EOPNOTSUPP) || errors.Is(s.err, unix.ENOTSUP) {
			return fmt.Errorf("memory.kernel: the kernel has no such limit: %w", errdefs.ErrFailedPrecondition)
		}
	}
	setNumber(&s, "memory.swappiness", m.Swappiness)
	if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
		s.set("memory.oom_control", "1")
	}
	if m.UseHierarchy != nil && *m.UseHierarchy {
		if n, err := readUint(filepath.Join(d, "memory.use_hierarchy")); err != nil || n != 1 {
			s.set("memory.use_hierarchy", "1")
		}
	}
	if errors.Is(s.err, unix.EBUSY) {
		if n, err := readUint(filepath.Join(d, "memory.usage_in_bytes")); err == nil {
			return fmt.Errorf("%w (the usage is %d)", s.err, n)
		}
	}
	return s.err
}

func cpuV1(d string, c *specs.LinuxCPU) error {
	s := setter{dir: d}
	if c.Shares != nil && *c.Shares > 0 {
		setNumber(&s, "cpu.shares", c.Shares)
		if s.err == nil {
			if n, err := readUint(filepath.Join(d, "cpu.shares")); err == nil && n != *c.Shares {
				// The kernel clamps silently.
				lo, hi := uint64(2), uint64(262144)
				if *c.Shares > hi || *c.Shares < lo {
					return fmt.Errorf("cpu shares %d: not between %d and %d: %w", *c.Shares, lo, hi, errdefs.ErrInvalidArgument)
				}
			}
		}
	}
	quota := c.Quota
	if quota != nil && *quota == 0 {
		quota = nil
	}
	if c.Burst != nil {
		// A burst above the old quota, or an old burst above the new quota, is
		// refused: the burst goes first if it sinks.
		if n, err := readUint(filepath.Join(d, "cpu.cfs_burst_us")); err == nil && *c.Burst < n {
			setNumber(&s, "cpu.cfs_burst_us", c.Burst)
		}
	}
	if c.Period != nil && *c.Period > 0 {
		setNumber(&s, "cpu.cfs_period_us", c.Period)
		if errors.Is(s.err, unix.EINVAL) && quota != nil {
			// The old quota may be too high for the new period.
			s.err = nil
			setNumber(&s, "cpu.cfs_quota_us", quota)
			setNumber(&s, "cpu.cfs_period_us", c.Period)
		}
	}
	setNumber(&s, "cpu.cfs_quota_us", quota)
	setNumber(&s, "cpu.cfs_burst_us", c.Burst)
	if c.RealtimePeriod != nil && *c.RealtimePeriod > 0 {
		setNumber(&s, "cpu.rt_period_us", c.RealtimePeriod)
	}
	if c.RealtimeRuntime != nil && *c.RealtimeRuntime != 0 {
		setNumber(&s, "cpu.rt_runtime_us", c.RealtimeRuntime)
	}
	setNumber(&s, "cpu.idle", c.Idle)
	return s.err
}

func devNumber(d specs.LinuxBlockIODevice) string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

func blkioV1(d string, b *specs.LinuxBlockIO) error {
	s := setter{dir: d}
	weight := "blkio.weight"
	if _, err := os.Stat(filepath.Join(d, weight)); err != nil {
		weight = "blkio.bfq.weight"
	}
	if b.Weight != nil && *b.Weight > 0 {
		setNumber(&s, weight, b.Weight)
		if errors.Is(s.err, fs.ErrNotExist) {
			return fmt.Errorf("blockIO.weight: no I/O scheduler of the machine has weights: %w", errdefs.ErrFailedPrecondition)
		}
	}
	if b.LeafWeight != nil && *b.LeafWeight > 0 {
		setNumber(&s, "blkio.leaf_weight", b.LeafWeight)
	}
	for _, w := range b.WeightDevice {
		if w.Weight != nil {
			s.set(weight+"_device", fmt.Sprintf("%s %d", devNumber(w.LinuxBlockIODevice), *w.Weight))
		}
		if w.LeafWeight != nil {
			s.set("blkio.leaf_weight_device", fmt.Sprintf("%s %d", devNumber(w.LinuxBlockIODevice), *w.LeafWeight))
		}
	}
	for file, list := range map[string][]specs.LinuxThrottleDevice{
		"blkio.throttle.read_bps_device":   b.ThrottleReadBpsDevice,
		"blkio.throttle.write_bps_device":  b.ThrottleWriteBpsDevice,
		"blkio.throttle.read_iops_device":  b.ThrottleReadIOPSDevice,
		"blkio.throttle.write_iops_device": b.ThrottleWriteIOPSDevice,
	} {
		for _, t := range list {
			s.set(file, fmt.Sprintf("%s %d", devNumber(t.LinuxBlockIODevice), t.Rate))
		}
	}
	return s.err
}

func rdma(d string, m map[string]specs.LinuxRdma) error {
	s := setter{dir: d}
	for _, dev := range slices.Sorted(maps.Keys(m)) {
		line := dev
		if h := m[dev].HcaHandles; h != nil {
			line += fmt.Sprintf(" hca_handle=%d", *h)
		}
		if o := m[dev].HcaObjects; o != nil {
			line += fmt.Sprintf(" hca_object=%d", *o)
		}
		s.set("rdma.max", line)
	}
	return s.err
}

func unifiedV2(d string, m map[string]string) error {
	s := setter{dir: d}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		for line := range strings.SplitSeq(m[k], "\n") {
			s.set(k, line)
		}
		if errors.Is(s.err, fs.ErrNotExist) {
			return fmt.Errorf("unified: the group has no %s: %w", k, errdefs.ErrInvalidArgument)
		}
	}
	return s.err
}

func hugetlbV2(d string, h specs.LinuxHugepageLimit) error {
	s := setter{dir: d}
	v := strconv.FormatUint(h.Limit, 10)
	s.set("hugetlb."+h.Pagesize+".max", v)
	if _, err := os.Stat(filepath.Join(d, "hugetlb."+h.Pagesize+".rsvd.max")); err == nil {
		s.set("hugetlb."+h.Pagesize+".rsvd.max", v)
	}
	return s.err
}

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
			old, _ := os.ReadFile(filepath.Join(d, "cpu.max")) // as it is, unless it is set
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
