package engine

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/internal/sandbox"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// statsPeriod is the time between two samples.
const statsPeriod = time.Second

// Stats sends samples of a container's use of resources. A container that does
// not run gives empty ones.
func (e *Engine) Stats(ctx context.Context, ref string, stream, oneShot bool, send func(*mobycontainer.StatsResponse) error) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	var prev *mobycontainer.StatsResponse
	sample := func() (*mobycontainer.StatsResponse, error) {
		s, err := e.sample(ctx, c)
		if err != nil {
			return nil, err
		}
		if prev != nil {
			s.PreRead, s.PreCPUStats = prev.Read, prev.CPUStats
		}
		prev = s
		return s, nil
	}
	if !stream {
		s, err := sample()
		if err != nil {
			return err
		}
		if !oneShot { // a second one, so that there is a difference
			if err := pauseFor(ctx, statsPeriod); err != nil {
				return err
			}
			if s, err = sample(); err != nil {
				return err
			}
		}
		return send(s)
	}
	for {
		s, err := sample()
		if errdefs.IsUnavailable(err) && ctx.Err() == nil {
			s, err = e.emptyStats(c), nil // the shim is being reconnected
		}
		if err != nil {
			return err
		}
		if err := send(s); err != nil {
			return err
		}
		if err := pauseFor(ctx, statsPeriod); err != nil {
			return nil
		}
		if c.isGone() {
			return nil
		}
	}
}

func pauseFor(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (e *Engine) emptyStats(c *ctr) *mobycontainer.StatsResponse {
	return &mobycontainer.StatsResponse{ID: c.id, Name: "/" + c.record().Name, OSType: "linux"}
}

func (e *Engine) sample(ctx context.Context, c *ctr) (*mobycontainer.StatsResponse, error) {
	s := e.emptyStats(c)
	if !c.record().Running() {
		return s, nil
	}
	client, err := e.client(ctx, c)
	if err != nil {
		return nil, err
	}
	ms, err := client.Metrics(ctx, c.id)
	if err != nil {
		return nil, err
	}
	if len(ms) > 0 {
		fillStats(s, ms[0])
		if u, ok := e.ownMachine(ctx, c); ok {
			m := &s.MemoryStats
			m.Stats["tenon_vm_cpu"], m.Stats["tenon_vm_memory"] = uint64(u.CPU), uint64(u.HostPrivate)
			m.Stats["tenon_vm_overhead"] = uint64(max(0, u.HostPrivate-int64(m.Usage)))
		}
	}
	return s, nil
}

// usageTime bounds the question what a machine takes of its host.
const usageTime = 2 * time.Second

// ownMachine is what the machine takes of the host that a container alone runs
// on: its processor time and memory, of which the container's own are a part. A
// machine that lasts says it itself.
func (e *Engine) ownMachine(ctx context.Context, c *ctr) (sandbox.MachineUsage, bool) {
	g := c.onMachine()
	if g == nil || g.machine.Lasting() {
		return sandbox.MachineUsage{}, false
	}
	ctx, cancel := context.WithTimeout(ctx, usageTime)
	defer cancel()
	u, err := g.machine.Usage(ctx)
	return u, err == nil
}

func fillStats(s *mobycontainer.StatsResponse, m *taskv1.Metrics) {
	s.Read = time.Unix(0, m.Time).UTC()
	if m.Time == 0 {
		s.Read = time.Now().UTC()
	}
	s.CPUStats = mobycontainer.CPUStats{
		CPUUsage:    mobycontainer.CPUUsage{TotalUsage: m.CpuTotalNs, UsageInUsermode: m.CpuUserNs, UsageInKernelmode: m.CpuSystemNs, PercpuUsage: m.CpuPerCpuNs},
		SystemUsage: m.SystemCpuNs, OnlineCPUs: m.OnlineCpus,
		ThrottlingData: mobycontainer.ThrottlingData{Periods: m.CpuPeriods, ThrottledPeriods: m.CpuThrottledPeriods, ThrottledTime: m.CpuThrottledNs},
	}
	s.MemoryStats = mobycontainer.MemoryStats{Usage: m.MemoryUsage, MaxUsage: m.MemoryMaxUsage, Limit: m.MemoryLimit, Stats: m.MemoryStat}
	if s.MemoryStats.Stats == nil {
		s.MemoryStats.Stats = map[string]uint64{}
	}
	// What clients subtract from the usage: v1's name and v2's.
	for _, k := range []string{"total_inactive_file", "inactive_file"} {
		if _, ok := s.MemoryStats.Stats[k]; !ok && m.MemoryInactiveFile > 0 {
			s.MemoryStats.Stats[k] = m.MemoryInactiveFile
		}
	}
	s.PidsStats = mobycontainer.PidsStats{Current: m.PidsCurrent, Limit: m.PidsLimit}
	for _, b := range m.BlockIo {
		s.BlkioStats.IoServiceBytesRecursive = append(s.BlkioStats.IoServiceBytesRecursive, mobycontainer.BlkioStatEntry{Major: b.Major, Minor: b.Minor, Op: b.Op, Value: b.Bytes})
		s.BlkioStats.IoServicedRecursive = append(s.BlkioStats.IoServicedRecursive, mobycontainer.BlkioStatEntry{Major: b.Major, Minor: b.Minor, Op: b.Op, Value: b.Operations})
	}
	for _, n := range m.Networks {
		if s.Networks == nil {
			s.Networks = map[string]mobycontainer.NetworkStats{}
		}
		s.Networks[n.Name] = mobycontainer.NetworkStats{
			RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors, RxDropped: n.RxDropped,
			TxBytes: n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors, TxDropped: n.TxDropped,
		}
	}
}
