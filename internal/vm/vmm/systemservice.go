package vmm

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	taskv3 "tenon.dev/tenon/internal/task/api/v3"
	"tenon.dev/tenon/internal/version"
)

// systemService is containerd's Task API.
type systemService struct{ t *systemTask }

var _ taskv3.TaskService = systemService{}

var empty = &emptypb.Empty{}

// Create makes the task that the machine is.
func (s systemService) Create(_ context.Context, r *taskv3.CreateTaskRequest) (*taskv3.CreateTaskResponse, error) {
	t := s.t
	o := new(taskv1.CreateOptions)
	if r.Options != nil && r.Options.TypeUrl == task.CreateOptionsURL {
		if err := proto.Unmarshal(r.Options.Value, o); err != nil {
			return nil, fmt.Errorf("task %s: options: %w: %w", r.Id, err, errdefs.ErrInvalidArgument)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case r.Id == "":
		return nil, fmt.Errorf("task: no id: %w", errdefs.ErrInvalidArgument)
	case t.id != "":
		return nil, fmt.Errorf("task %s: %w", t.id, errdefs.ErrAlreadyExists)
	case t.status == taskv1.Status_STATUS_STOPPED:
		return nil, fmt.Errorf("task %s: its machine has ended (%s): %w", r.Id, t.v.systemReason(), errdefs.ErrUnavailable)
	}
	var sink logs.Sink
	if l := o.Log; l != nil && l.Driver != logs.None {
		if l.Driver != logs.Local && l.Driver != logs.JSONFile || !filepath.IsAbs(l.Path) {
			return nil, fmt.Errorf("log of %s: driver %q, path %q: %w", r.Id, l.Driver, l.Path, errdefs.ErrInvalidArgument)
		}
		var err error
		sink, err = logs.Open(logs.Config{
			Driver: l.Driver, Path: l.Path, MaxSize: int64(min(l.MaxSize, math.MaxInt64)), MaxFiles: int(min(l.MaxFiles, 1<<20)), Compress: l.Compress, Attrs: l.Attrs,
		}, func(err error) { t.v.m.log.Warn("output was lost", "sandbox", t.v.id, "err", err) })
		if err != nil {
			return nil, err
		}
	}
	t.screen.setLog(sink, r.Terminal)
	t.id, t.owner, t.terminal, t.status = r.Id, o.Owner, r.Terminal, taskv1.Status_STATUS_CREATED
	return &taskv3.CreateTaskResponse{Pid: uint32(t.v.proc.PID())}, nil
}

// Start turns the machine on.
func (s systemService) Start(ctx context.Context, r *taskv3.StartRequest) (*taskv3.StartResponse, error) {
	t := s.t
	if err := t.task(r.Id, r.ExecId); err != nil {
		return nil, err
	}
	t.mu.Lock()
	if t.status != taskv1.Status_STATUS_CREATED {
		t.mu.Unlock()
		return nil, fmt.Errorf("task %s: is not ready to start: %w", r.Id, errdefs.ErrFailedPrecondition)
	}
	t.started, t.status = time.Now(), taskv1.Status_STATUS_RUNNING
	t.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	if err := t.v.proc.Cont(ctx); err != nil {
		return nil, fmt.Errorf("task %s: %w", r.Id, err)
	}
	pid := uint32(t.v.proc.PID())
	t.events.Publish(&taskv1.Event{Type: taskv1.Event_START, Id: r.Id, Pid: pid})
	return &taskv3.StartResponse{Pid: pid}, nil
}

// Delete forgets the task of a machine that has ended, or was not turned on.
func (s systemService) Delete(_ context.Context, r *taskv3.DeleteRequest) (*taskv3.DeleteResponse, error) {
	t := s.t
	if err := t.task(r.Id, r.ExecId); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.status == taskv1.Status_STATUS_RUNNING || t.status == taskv1.Status_STATUS_PAUSED {
		return nil, fmt.Errorf("task %s: is running: %w", r.Id, errdefs.ErrFailedPrecondition)
	}
	t.id = ""
	a := &taskv3.DeleteResponse{Pid: uint32(t.v.proc.PID()), ExitStatus: t.code}
	if !t.exited.IsZero() {
		a.ExitedAt = timestamppb.New(t.exited)
	}
	return a, nil
}

// Kill presses the power button, or ends the machine.
func (s systemService) Kill(ctx context.Context, r *taskv3.KillRequest) (*emptypb.Empty, error) {
	if err := s.t.task(r.Id, r.ExecId); err != nil {
		return nil, err
	}
	return empty, s.t.kill(ctx, syscall.Signal(r.Signal))
}

// Pause has the machine stand still.
func (s systemService) Pause(ctx context.Context, r *taskv3.PauseRequest) (*emptypb.Empty, error) {
	return empty, s.t.pause(ctx, r.Id, true)
}

// Resume has it go on.
func (s systemService) Resume(ctx context.Context, r *taskv3.ResumeRequest) (*emptypb.Empty, error) {
	return empty, s.t.pause(ctx, r.Id, false)
}

func (t *systemTask) pause(ctx context.Context, id string, on bool) error {
	if err := t.task(id, ""); err != nil {
		return err
	}
	from, to, kind, do, limit := taskv1.Status_STATUS_PAUSED, taskv1.Status_STATUS_RUNNING, taskv1.Event_RESUMED, t.v.proc.Cont, commandTime
	if on {
		from, to, kind, do, limit = to, from, taskv1.Event_PAUSED, t.v.proc.Stop, flushTime
	}
	t.mu.Lock()
	is := t.status
	t.mu.Unlock()
	if is != from {
		return fmt.Errorf("task %s: is not %s: %w", id, strings.ToLower(strings.TrimPrefix(from.String(), "STATUS_")), errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := do(ctx); err != nil {
		return err
	}
	t.mu.Lock()
	if t.status == from {
		t.status = to
	}
	t.mu.Unlock()
	t.events.Publish(&taskv1.Event{Type: kind, Id: id})
	return nil
}

// Update changes the limits of memory and processor time.
func (s systemService) Update(ctx context.Context, r *taskv3.UpdateTaskRequest) (*emptypb.Empty, error) {
	t := s.t
	if err := t.task(r.Id, ""); err != nil {
		return nil, err
	}
	var res specs.LinuxResources
	if r.Resources == nil {
		return empty, nil
	}
	if err := json.Unmarshal(r.Resources.Value, &res); err != nil {
		return nil, fmt.Errorf("task %s: resources: %w: %w", r.Id, err, errdefs.ErrInvalidArgument)
	}
	v := t.v
	v.change.Lock()
	defer v.change.Unlock()
	if m := res.Memory; m != nil && m.Limit != nil && *m.Limit > 0 {
		switch {
		case *m.Limit > v.hardware.Memory:
			return nil, fmt.Errorf("the machine was turned on with %d bytes of memory, and can get no more while it runs: stop it first: %w", v.hardware.Memory, errdefs.ErrFailedPrecondition)
		case *m.Limit < minMemory:
			return nil, fmt.Errorf("%d bytes of memory: at least %d: %w", *m.Limit, minMemory, errdefs.ErrInvalidArgument)
		}
		ctx, cancel := context.WithTimeout(ctx, commandTime)
		defer cancel()
		if err := v.proc.Balloon(ctx, *m.Limit); err != nil {
			return nil, err
		}
		v.mu.Lock()
		v.memory = *m.Limit
		v.mu.Unlock()
	}
	if c := res.CPU; c != nil && (c.Quota != nil || c.Period != nil || c.Shares != nil) {
		if err := v.group.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: c.Quota, Period: c.Period, Shares: c.Shares}}); err != nil {
			return nil, err
		}
	}
	return empty, nil
}

// Wait waits for the end.
func (s systemService) Wait(ctx context.Context, r *taskv3.WaitRequest) (*taskv3.WaitResponse, error) {
	p, err := s.t.await(ctx, r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	return &taskv3.WaitResponse{ExitStatus: p.ExitStatus, ExitedAt: timestamppb.New(time.Unix(0, p.ExitedAt))}, nil
}

// ResizePty does nothing: a serial line has no size.
func (s systemService) ResizePty(_ context.Context, r *taskv3.ResizePtyRequest) (*emptypb.Empty, error) {
	return empty, s.t.task(r.Id, r.ExecId)
}

// CloseIO does nothing: a serial line has no end.
func (s systemService) CloseIO(_ context.Context, r *taskv3.CloseIORequest) (*emptypb.Empty, error) {
	return empty, s.t.task(r.Id, r.ExecId)
}

// Stats samples the machine.
func (s systemService) Stats(ctx context.Context, r *taskv3.StatsRequest) (*taskv3.StatsResponse, error) {
	if err := s.t.task(r.Id, ""); err != nil {
		return nil, err
	}
	m, err := s.t.metrics(ctx)
	if err != nil {
		return nil, err
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	return &taskv3.StatsResponse{Stats: &anypb.Any{TypeUrl: "tenon.dev/tenon.task.v1.Metrics", Value: b}}, nil
}

// Connect tells pids.
func (s systemService) Connect(_ context.Context, _ *taskv3.ConnectRequest) (*taskv3.ConnectResponse, error) {
	return &taskv3.ConnectResponse{ShimPid: uint32(os.Getpid()), TaskPid: uint32(s.t.v.proc.PID()), Version: version.Version}, nil
}

// Exec, State, Pids, Checkpoint and Shutdown are refused: nothing runs in the machine
// that could answer, and its end is Remove.
func (s systemService) Exec(context.Context, *taskv3.ExecProcessRequest) (*emptypb.Empty, error) {
	return nil, noProcesses("exec")
}

// State is refused: List says it.
func (s systemService) State(context.Context, *taskv3.StateRequest) (*taskv3.StateResponse, error) {
	return nil, noProcesses("its state")
}

// Pids is refused.
func (s systemService) Pids(context.Context, *taskv3.PidsRequest) (*taskv3.PidsResponse, error) {
	return nil, noProcesses("a list of its processes")
}

// Checkpoint is refused.
func (s systemService) Checkpoint(context.Context, *taskv3.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, noProcesses("a checkpoint")
}

// Shutdown is refused.
func (s systemService) Shutdown(context.Context, *taskv3.ShutdownRequest) (*emptypb.Empty, error) {
	return nil, noProcesses("a shutdown by this way")
}

// systemKernel is the rest of the Task API.
type systemKernel struct{ t *systemTask }

var _ taskv1.KernelService = systemKernel{}

// Info says who answers.
func (s systemKernel) Info(context.Context, *taskv1.InfoRequest) (*taskv1.InfoResponse, error) {
	return &taskv1.InfoResponse{ShimVersion: version.Version, ShimPid: int64(os.Getpid())}, nil
}

// List shows the task.
func (s systemKernel) List(_ context.Context, r *taskv1.ListRequest) (*taskv1.ListResponse, error) {
	a := &taskv1.ListResponse{Sequence: s.t.events.Sequence()}
	p := s.t.snapshot()
	switch {
	case p != nil && (r.Id == "" || r.Id == p.Id):
		a.Processes = append(a.Processes, p)
	case r.Id != "":
		return nil, fmt.Errorf("task %s: %w", r.Id, errdefs.ErrNotFound)
	}
	return a, nil
}

// Events streams what happens.
func (s systemKernel) Events(ctx context.Context, r *taskv1.EventsRequest, srv taskv1.Kernel_EventsServer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(s.t.ctx, cancel)
	defer stop()
	return s.t.events.Stream(ctx, r.After, srv.Send)
}

// Processes is refused.
func (s systemKernel) Processes(context.Context, *taskv1.ProcessesRequest) (*taskv1.ProcessesResponse, error) {
	return nil, noProcesses("a list of its processes (top)")
}

// Metrics samples the machine.
func (s systemKernel) Metrics(ctx context.Context, r *taskv1.MetricsRequest) (*taskv1.MetricsResponse, error) {
	a := new(taskv1.MetricsResponse)
	p := s.t.snapshot()
	if p == nil || p.Status == taskv1.Status_STATUS_STOPPED {
		return a, nil
	}
	for _, id := range append(r.Ids, map[bool][]string{true: {p.Id}}[len(r.Ids) == 0]...) {
		if id != p.Id {
			continue
		}
		if m, err := s.t.metrics(ctx); err == nil {
			a.Metrics = append(a.Metrics, m)
		}
	}
	return a, nil
}

// FlushLog returns when the console's output so far is in the log.
func (s systemKernel) FlushLog(_ context.Context, r *taskv1.FlushLogRequest) (*taskv1.FlushLogResponse, error) {
	if err := s.t.task(r.Id, ""); err != nil {
		return nil, err
	}
	s.t.screen.sync()
	return new(taskv1.FlushLogResponse), nil
}

// Await waits for the end.
func (s systemKernel) Await(ctx context.Context, r *taskv1.AwaitRequest) (*taskv1.Process, error) {
	return s.t.await(ctx, r.Id, r.ExecId)
}

// metrics are what the machine takes of its host.
func (t *systemTask) metrics(ctx context.Context) (*taskv1.Metrics, error) {
	v := t.v
	st, err := v.group.Stats()
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	memory, nics := v.memory, v.nics
	v.mu.Unlock()
	t.mu.Lock()
	id := t.id
	t.mu.Unlock()
	m := &taskv1.Metrics{
		Id: id, Time: st.Read.UnixNano(), CpuTotalNs: st.CPU.Usage, CpuUserNs: st.CPU.User, CpuSystemNs: st.CPU.System,
		CpuPeriods: st.CPU.Periods, CpuThrottledPeriods: st.CPU.Throttled, CpuThrottledNs: st.CPU.ThrottledTime, CpuPerCpuNs: st.CPU.PerCPU,
		MemoryUsage: st.Memory.Usage, MemoryMaxUsage: st.Memory.MaxUsage, MemoryStat: st.Memory.Detail, MemoryLimit: uint64(memory),
	}
	m.SystemCpuNs, m.OnlineCpus = systemCPU()
	ctx, cancel := context.WithTimeout(ctx, powerTime)
	defer cancel()
	if u, err := v.proc.DiskUse(ctx); err == nil {
		m.BlockIo = []*taskv1.Metrics_BlockIO{{Op: "Read", Bytes: u.ReadBytes, Operations: u.Reads}, {Op: "Write", Bytes: u.WriteBytes, Operations: u.Writes}}
	}
	for i, n := range nics { // what the host's end sends, the machine receives
		count := func(name string) uint64 {
			b, _ := os.ReadFile(filepath.Join("/sys/class/net", n.Tap, "statistics", name)) // 0 if it is gone
			x, _ := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
			return x
		}
		m.Networks = append(m.Networks, &taskv1.Metrics_NetworkIO{
			Name: fmt.Sprintf("eth%d", i), RxBytes: count("tx_bytes"), RxPackets: count("tx_packets"), RxErrors: count("tx_errors"), RxDropped: count("tx_dropped"),
			TxBytes: count("rx_bytes"), TxPackets: count("rx_packets"), TxErrors: count("rx_errors"), TxDropped: count("rx_dropped"),
		})
	}
	return m, nil
}

// userHZ is the unit of /proc/stat, on every Linux that Go runs on.
const userHZ = 100

// systemCPU is the time that all processors have spent, idle included, and their
// number, as clients of stats want it.
func systemCPU() (ns uint64, cpus uint32) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 1
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case len(f) < 8 || !strings.HasPrefix(f[0], "cpu"):
			return ns, cpus
		case f[0] != "cpu":
			cpus++
		default:
			for _, s := range f[1:8] {
				n, _ := strconv.ParseUint(s, 10, 64) // the kernel's own numbers
				ns += n * (1e9 / userHZ)
			}
		}
	}
	return ns, cpus
}
