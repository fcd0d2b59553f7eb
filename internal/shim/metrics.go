package shim

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// userHZ is the unit of /proc/stat, on every Linux that Go runs on.
const userHZ = 100

// metrics samples the container.
func (c *container) metrics() (*taskv1.Metrics, error) {
	st, err := c.group.Stats()
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", c.id, err)
	}
	m := &taskv1.Metrics{
		Id: c.id, Time: st.Read.UnixNano(),
		CpuTotalNs: st.CPU.Usage, CpuUserNs: st.CPU.User, CpuSystemNs: st.CPU.System,
		CpuPeriods: st.CPU.Periods, CpuThrottledPeriods: st.CPU.Throttled, CpuThrottledNs: st.CPU.ThrottledTime,
		CpuPerCpuNs: st.CPU.PerCPU,
		MemoryUsage: st.Memory.Usage, MemoryMaxUsage: st.Memory.MaxUsage, MemoryStat: st.Memory.Detail,
		PidsCurrent: st.Pids.Current, OomKills: st.Memory.OOMKills,
	}
	m.SystemCpuNs, m.OnlineCpus = systemCPU()
	total := totalMemory()
	m.MemoryLimit = st.Memory.Limit
	if m.MemoryLimit == 0 || m.MemoryLimit > total {
		m.MemoryLimit = total
	}
	if v, ok := st.Memory.Detail["total_inactive_file"]; ok {
		m.MemoryInactiveFile = v
	} else {
		m.MemoryInactiveFile = st.Memory.Detail["inactive_file"]
	}
	if st.Pids.Limit != math.MaxUint64 {
		m.PidsLimit = st.Pids.Limit
	}
	for _, io := range st.IO {
		for _, e := range []struct {
			op         string
			bytes, ops uint64
		}{{"Read", io.ReadBytes, io.ReadIOs}, {"Write", io.WriteBytes, io.WriteIOs}, {"Discard", io.DiscardBytes, io.DiscardIOs}} {
			m.BlockIo = append(m.BlockIo, &taskv1.Metrics_BlockIO{Major: io.Major, Minor: io.Minor, Op: e.op, Bytes: e.bytes, Operations: e.ops})
		}
	}
	c.init.mu.Lock()
	running := c.init.status == taskv1.Status_STATUS_RUNNING
	pid := c.init.child.pid()
	c.init.mu.Unlock()
	if running {
		// The file lists the interfaces of the process's network namespace.
		if f, err := os.Open(fmt.Sprintf("/proc/%d/net/dev", pid)); err == nil {
			m.Networks = parseNetDev(f)
			f.Close()
		}
	}
	return m, nil
}

// parseNetDev reads /proc/PID/net/dev; loopback is left out, as Docker does.
func parseNetDev(r io.Reader) (list []*taskv1.Metrics_NetworkIO) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		name, rest, ok := strings.Cut(sc.Text(), ":")
		name = strings.TrimSpace(name)
		v := strings.Fields(rest)
		if !ok || len(v) < 12 || name == "lo" {
			continue
		}
		n := make([]uint64, 12)
		for i := range n {
			n[i], _ = strconv.ParseUint(v[i], 10, 64) // the kernel's own numbers
		}
		list = append(list, &taskv1.Metrics_NetworkIO{
			Name: name, RxBytes: n[0], RxPackets: n[1], RxErrors: n[2], RxDropped: n[3],
			TxBytes: n[8], TxPackets: n[9], TxErrors: n[10], TxDropped: n[11],
		})
	}
	return list
}

// systemCPU is the time that all CPUs have spent, idle included, and their number.
func systemCPU() (ns uint64, cpus uint32) {
	f, err := os.Open("/proc/stat")
	if err != nil {
		return 0, uint32(runtime.NumCPU())
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		v := strings.Fields(sc.Text())
		if len(v) < 8 || !strings.HasPrefix(v[0], "cpu") {
			break
		}
		if v[0] != "cpu" {
			cpus++
			continue
		}
		for _, s := range v[1:8] { // guest times are part of user's
			n, _ := strconv.ParseUint(s, 10, 64) // the kernel's own numbers
			ns += n * (1e9 / userHZ)
		}
	}
	return ns, cpus
}

// totalMemory is the kernel's, in bytes; 0 if unknown.
var totalMemory = sync.OnceValue(func() uint64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "MemTotal:"); ok {
			kb, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64) // the kernel's own number
			return kb << 10
		}
	}
	return 0
})
