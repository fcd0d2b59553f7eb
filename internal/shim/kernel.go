package shim

import (
	"context"
	"fmt"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	"tenon.dev/tenon/internal/version"
)

// Version is the version of the protocol between daemon and shim.
const Version = "0.1.0"

// kernelService is what containerd's Task API has no words for.
type kernelService struct{ s *Shim }

var _ taskv1.KernelService = (*kernelService)(nil)

func (k *kernelService) Info(context.Context, *taskv1.InfoRequest) (*taskv1.InfoResponse, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, os.NewSyscallError("uname", err)
	}
	r := &taskv1.InfoResponse{
		ShimVersion: version.Version, ShimPid: int64(os.Getpid()),
		KernelRelease: unix.ByteSliceToString(u.Release[:]), Machine: unix.ByteSliceToString(u.Machine[:]),
		CgroupVersion: cgroupVersion(),
	}
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		r.Warnings = append(r.Warnings, "boot ID: "+err.Error())
	}
	r.BootId = strings.TrimSpace(string(b))
	return r, nil
}

func cgroupVersion() string {
	var st unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		return "2"
	}
	if unix.Statfs("/sys/fs/cgroup/unified", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		return "hybrid"
	}
	return "1"
}

func (k *kernelService) List(_ context.Context, r *taskv1.ListRequest) (*taskv1.ListResponse, error) {
	// What happens while the list is made is then both in it and among the
	// events that follow: better than in neither.
	resp := &taskv1.ListResponse{Sequence: k.s.events.Sequence()}
	var list []*container
	if r.Id != "" {
		c, err := k.s.task(r.Id)
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	} else {
		list = k.s.list()
		sort.Slice(list, func(i, j int) bool { return list[i].id < list[j].id })
	}
	for _, c := range list {
		resp.Processes = append(resp.Processes, c.init.snapshot())
		c.mu.Lock()
		execs := make([]*process, 0, len(c.execs))
		for _, p := range c.execs {
			execs = append(execs, p)
		}
		c.mu.Unlock()
		for _, p := range execs {
			resp.Processes = append(resp.Processes, p.snapshot())
		}
	}
	return resp, nil
}

func (k *kernelService) Events(ctx context.Context, r *taskv1.EventsRequest, srv taskv1.Kernel_EventsServer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(k.s.ctx, cancel)
	defer stop()
	return k.s.events.Stream(ctx, r.After, srv.Send)
}

func (k *kernelService) Await(ctx context.Context, r *taskv1.AwaitRequest) (*taskv1.Process, error) {
	return k.s.await(ctx, r.Id, r.ExecId)
}

// flushPatience bounds how long FlushLog waits for output to be moved.
const flushPatience = 2 * time.Second

func (k *kernelService) FlushLog(ctx context.Context, r *taskv1.FlushLogRequest) (*taskv1.FlushLogResponse, error) {
	p, err := k.s.process(r.Id, "")
	if err != nil {
		return nil, err
	}
	if !p.c.logged {
		return nil, fmt.Errorf("task %s: has no log: %w", r.Id, errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeout(ctx, flushPatience)
	defer cancel()
	p.io.settle(ctx)
	p.c.log.Sync()
	return &taskv1.FlushLogResponse{}, nil
}

func (k *kernelService) Metrics(_ context.Context, r *taskv1.MetricsRequest) (*taskv1.MetricsResponse, error) {
	resp := &taskv1.MetricsResponse{}
	var list []*container
	if len(r.Ids) == 0 {
		list = k.s.list()
	}
	for _, id := range r.Ids {
		if c, err := k.s.task(id); err == nil {
			list = append(list, c)
		}
	}
	for _, c := range list {
		m, err := c.metrics()
		if err != nil {
			k.s.log.Debug("no metrics", "container", c.id, "err", err)
			continue // it has just gone
		}
		resp.Metrics = append(resp.Metrics, m)
	}
	return resp, nil
}
