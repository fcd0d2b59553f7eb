package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
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
	for _, c := range needed(res) {
		if g.v1(c) != "" {
			continue
		}
		name := c
		if c == "blkio" {
			name = "io"
		}
		if v2 != "" && contains(g.controllersV2(), name) {
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

// controllersV2 are those of the v2 hierarchy.
func (g *Group) controllersV2() []string {
	for _, d := range g.list() {
		if d.v2 {
			b, _ := readFile(filepath.Join(d.mount, "cgroup.controllers")) // none, then
			return strings.Fields(string(b))
		}
	}
	return nil
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
		if errors.Is(s.err, unix.EINVAL) {
			parent := filepath.Join(filepath.Dir(d), "cpu.rt_runtime_us")
			return fmt.Errorf("real-time budget of %d µs: the group above has less left to give away (see %s): %w", *c.RealtimeRuntime, parent, errdefs.ErrInvalidArgument)
		}
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
