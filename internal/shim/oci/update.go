package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/cgroup"
)

var updating struct {
	resources                                          string
	cpuPeriod, cpuQuota, cpuBurst, cpuShare            *int64
	cpuRTPeriod, cpuRTRuntime, cpuIdle                 *int64
	memory, reservation, swap, kernel, kernelTCP, pids *int64
	blkioWeight                                        *int64
	cpus, mems                                         string
	cache, bandwidth                                   string
	ignored                                            bool
}

func updateFlags(f *flagSet) {
	u := &updating
	f.str(&u.resources, "resources", "", "file with linux.resources as JSON, - for standard input")
	f.short("r")
	f.number(&u.cpuPeriod, "cpu-period", "microseconds")
	f.number(&u.cpuQuota, "cpu-quota", "microseconds per period")
	f.number(&u.cpuBurst, "cpu-burst", "microseconds")
	f.number(&u.cpuShare, "cpu-share", "relative weight")
	f.number(&u.cpuRTPeriod, "cpu-rt-period", "microseconds")
	f.number(&u.cpuRTRuntime, "cpu-rt-runtime", "microseconds")
	f.number(&u.cpuIdle, "cpu-idle", "1: SCHED_IDLE")
	f.str(&u.cpus, "cpuset-cpus", "", "CPUs")
	f.str(&u.mems, "cpuset-mems", "", "memory nodes")
	f.number(&u.memory, "memory", "bytes")
	f.number(&u.reservation, "memory-reservation", "bytes")
	f.number(&u.swap, "memory-swap", "bytes, memory and swap together; -1 is no limit")
	f.number(&u.kernel, "kernel-memory", "bytes")
	f.number(&u.kernelTCP, "kernel-memory-tcp", "bytes")
	f.number(&u.pids, "pids-limit", "processes")
	f.number(&u.blkioWeight, "blkio-weight", "10 to 1000")
	f.str(&u.cache, "l3-cache-schema", "", "not supported")
	f.str(&u.bandwidth, "mem-bw-schema", "", "not supported")
}

func runUpdate(a *app, f *flagSet) (int, error) {
	id, err := f.id()
	if err != nil {
		return 1, err
	}
	if updating.cache != "" || updating.bandwidth != "" {
		return 1, errors.New("update: Intel RDT is not supported")
	}
	c, err := a.openLocked(id)
	if err != nil {
		return 1, err
	}
	defer c.close()
	if c.status() == statusStopped {
		return 1, errNotRunning
	}
	res, err := updateResources(a.stdin)
	if err != nil {
		return 1, err
	}
	g, err := c.group()
	if err != nil {
		return 1, err
	}
	return 0, g.Update(withDefaultDevices(res))
}

func updateResources(stdin io.Reader) (*specs.LinuxResources, error) {
	u := &updating
	res := &specs.LinuxResources{}
	if u.resources != "" {
		in := stdin
		if u.resources != "-" {
			f, err := os.Open(u.resources)
			if err != nil {
				return nil, err
			}
			defer f.Close()
			in = f
		}
		if err := json.NewDecoder(in).Decode(res); err != nil {
			return nil, fmt.Errorf("--resources: %w", err)
		}
		return res, nil
	}
	cpu := &specs.LinuxCPU{
		Shares: unsigned(u.cpuShare), Quota: u.cpuQuota, Period: unsigned(u.cpuPeriod), Burst: unsigned(u.cpuBurst),
		RealtimeRuntime: u.cpuRTRuntime, RealtimePeriod: unsigned(u.cpuRTPeriod), Idle: u.cpuIdle,
		Cpus: u.cpus, Mems: u.mems,
	}
	if *cpu != (specs.LinuxCPU{}) {
		res.CPU = cpu
	}
	mem := &specs.LinuxMemory{
		Limit: u.memory, Reservation: u.reservation, Swap: u.swap,
		Kernel: u.kernel, KernelTCP: u.kernelTCP, //nolint:staticcheck // still specified
	}
	if *mem != (specs.LinuxMemory{}) {
		res.Memory = mem
	}
	if u.pids != nil {
		res.Pids = &specs.LinuxPids{Limit: u.pids}
	}
	if u.blkioWeight != nil {
		weight := uint16(*u.blkioWeight)
		res.BlockIO = &specs.LinuxBlockIO{Weight: &weight}
	}
	return res, nil
}

func unsigned(n *int64) *uint64 {
	if n == nil {
		return nil
	}
	v := uint64(*n)
	return &v
}

var eventing struct {
	stats    bool
	interval string
}

func eventsFlags(f *flagSet) {
	f.boolean(&eventing.stats, "stats", "", "statistics once, then end")
	f.str(&eventing.interval, "interval", "5s", "time between statistics")
}

// event is a line of events, as runc prints them.
type event struct {
	Type string `json:"type"`
	ID   string `json:"id"`
	Data any    `json:"data,omitempty"`
}

func runEvents(a *app, f *flagSet) (int, error) {
	id, err := f.id()
	if err != nil {
		return 1, err
	}
	c, err := a.open(id)
	if err != nil {
		return 1, err
	}
	if c.status() == statusStopped {
		return 1, fmt.Errorf("container with id %s is not running", c.ID)
	}
	g, err := c.group()
	if err != nil {
		return 1, err
	}
	out := json.NewEncoder(a.stdout)
	if eventing.stats {
		stats, err := readStats(g)
		if err != nil {
			return 1, err
		}
		return 0, out.Encode(event{"stats", c.ID, stats})
	}
	interval, err := time.ParseDuration(eventing.interval)
	if err != nil || interval <= 0 {
		return 1, fmt.Errorf("events: interval %q", eventing.interval)
	}
	return 0, c.watch(g, interval, out)
}

// watch prints until the container ends.
func (c *container) watch(g *cgroup.Group, interval time.Duration, out *json.Encoder) error {
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer cancel()
	fd, err := c.pidfd()
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer unix.Close(fd)
		for {
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); err != unix.EINTR {
				return
			}
		}
	}()
	kills, err := g.OOM(ctx)
	if err != nil {
		return err
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var told uint64
	for {
		select {
		case n, ok := <-kills:
			if !ok {
				kills = nil
				continue
			}
			for ; told < n; told++ {
				if err := out.Encode(event{Type: "oom", ID: c.ID}); err != nil {
					return err
				}
			}
		case <-tick.C:
			stats, err := readStats(g)
			if err != nil {
				return err
			}
			if err := out.Encode(event{"stats", c.ID, stats}); err != nil {
				return err
			}
		case <-ended:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

// The parts of runc's statistics, under the names that its users parse.
type (
	statsJSON struct {
		CPU    cpuJSON    `json:"cpu"`
		Memory memoryJSON `json:"memory"`
		Pids   pidsJSON   `json:"pids"`
		Blkio  blkioJSON  `json:"blkio"`
	}
	cpuJSON struct {
		Usage struct {
			Total  uint64   `json:"total"`
			Percpu []uint64 `json:"percpu,omitempty"`
			Kernel uint64   `json:"kernel"`
			User   uint64   `json:"user"`
		} `json:"usage"`
		Throttling struct {
			Periods          uint64 `json:"periods,omitempty"`
			ThrottledPeriods uint64 `json:"throttledPeriods,omitempty"`
			ThrottledTime    uint64 `json:"throttledTime,omitempty"`
		} `json:"throttling"`
	}
	memoryEntry struct {
		Limit   uint64 `json:"limit"`
		Usage   uint64 `json:"usage,omitempty"`
		Max     uint64 `json:"max,omitempty"`
		Failcnt uint64 `json:"failcnt"`
	}
	memoryJSON struct {
		Cache  uint64            `json:"cache,omitempty"`
		Usage  memoryEntry       `json:"usage"`
		Swap   memoryEntry       `json:"swap"`
		Kernel memoryEntry       `json:"kernel"`
		Raw    map[string]uint64 `json:"raw,omitempty"`
	}
	pidsJSON struct {
		Current uint64 `json:"current,omitempty"`
		Limit   uint64 `json:"limit,omitempty"`
	}
	blkioEntry struct {
		Major uint64 `json:"major"`
		Minor uint64 `json:"minor"`
		Op    string `json:"op"`
		Value uint64 `json:"value"`
	}
	blkioJSON struct {
		Bytes []blkioEntry `json:"ioServiceBytesRecursive,omitempty"`
		IOs   []blkioEntry `json:"ioServicedRecursive,omitempty"`
	}
)

func readStats(g *cgroup.Group) (*statsJSON, error) {
	st, err := g.Stats()
	if err != nil {
		return nil, err
	}
	out := &statsJSON{}
	out.CPU.Usage.Total, out.CPU.Usage.Kernel, out.CPU.Usage.User = st.CPU.Usage, st.CPU.System, st.CPU.User
	out.CPU.Usage.Percpu = st.CPU.PerCPU
	out.CPU.Throttling.Periods, out.CPU.Throttling.ThrottledPeriods = st.CPU.Periods, st.CPU.Throttled
	out.CPU.Throttling.ThrottledTime = st.CPU.ThrottledTime
	m := st.Memory
	out.Memory.Cache = m.Detail["cache"]
	out.Memory.Usage = memoryEntry{Limit: m.Limit, Usage: m.Usage, Max: m.MaxUsage, Failcnt: m.Failcnt}
	out.Memory.Swap = memoryEntry{Limit: m.SwapLimit, Usage: m.Swap}
	out.Memory.Kernel = memoryEntry{Usage: m.Kernel}
	out.Memory.Raw = m.Detail
	out.Pids = pidsJSON{Current: st.Pids.Current, Limit: st.Pids.Limit}
	for _, io := range st.IO {
		for op, n := range map[string][2]uint64{
			"Read": {io.ReadBytes, io.ReadIOs}, "Write": {io.WriteBytes, io.WriteIOs}, "Discard": {io.DiscardBytes, io.DiscardIOs},
		} {
			out.Blkio.Bytes = append(out.Blkio.Bytes, blkioEntry{io.Major, io.Minor, op, n[0]})
			out.Blkio.IOs = append(out.Blkio.IOs, blkioEntry{io.Major, io.Minor, op, n[1]})
		}
	}
	return out, nil
}
