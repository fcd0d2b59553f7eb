package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	taskv3 "tenon.dev/tenon/internal/task/api/v3"

	"tenon.dev/tenon/internal/launch"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// taskService is containerd's Task API.
type taskService struct{ s *Shim }

var _ taskv3.TaskService = (*taskService)(nil)

var empty = &emptypb.Empty{}

// maxID bounds an ID: it becomes a file and cgroup name.
const maxID = 128

func checkID(id string) error {
	if id == "" || len(id) > maxID || id == "." || id == ".." {
		return fmt.Errorf("ID %.32q: %w", id, errdefs.ErrInvalidArgument)
	}
	for _, r := range []byte(id) {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_', r == '.':
		default:
			return fmt.Errorf("ID %.32q: %w", id, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func (t *taskService) Create(ctx context.Context, r *taskv3.CreateTaskRequest) (*taskv3.CreateTaskResponse, error) {
	s := t.s
	req, err := parseCreate(r)
	if err != nil {
		return nil, err
	}
	if err := s.reserve(ctx, r.Id); err != nil {
		return nil, err
	}
	c, err := s.newContainer(req)
	s.free(r.Id, c)
	s.touch()
	if err != nil {
		return nil, err
	}
	return &taskv3.CreateTaskResponse{Pid: uint32(c.init.child.pid())}, nil
}

// parseCreate judges a request before anything is done.
func parseCreate(r *taskv3.CreateTaskRequest) (req createRequest, err error) {
	if err := checkID(r.Id); err != nil {
		return req, err
	}
	if r.Checkpoint != "" || r.ParentCheckpoint != "" {
		return req, fmt.Errorf("task %s: start from a checkpoint: %w", r.Id, errdefs.ErrNotImplemented)
	}
	req = createRequest{
		id: r.Id, bundle: r.Bundle, terminal: r.Terminal,
		stdin: r.Stdin, out: r.Stdout, errs: r.Stderr, opts: new(taskv1.CreateOptions),
	}
	// Options of another type (containerd's for runc) say nothing to us.
	if o := r.Options; o != nil && o.TypeUrl == task.CreateOptionsURL {
		if err := proto.Unmarshal(o.Value, req.opts); err != nil {
			return req, fmt.Errorf("task %s: options: %w: %w", r.Id, err, errdefs.ErrInvalidArgument)
		}
	}
	raw := req.opts.Spec
	if len(raw) == 0 {
		if raw, err = os.ReadFile(filepath.Join(r.Bundle, "config.json")); err != nil {
			return req, fmt.Errorf("task %s: spec: %w: %w", r.Id, err, errdefs.ErrInvalidArgument)
		}
	}
	if req.spec, err = parseSpec(raw); err != nil {
		return req, fmt.Errorf("task %s: spec: %w: %w", r.Id, err, errdefs.ErrInvalidArgument)
	}
	req.opts.Spec = nil
	if req.spec.Process == nil {
		return req, fmt.Errorf("task %s: spec has no process: %w", r.Id, errdefs.ErrInvalidArgument)
	}
	req.terminal = req.terminal || req.spec.Process.Terminal
	req.spec.Process.Terminal = req.terminal
	for _, m := range r.Rootfs {
		req.rootfs = append(req.rootfs, launch.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	return req, nil
}

func (t *taskService) Start(_ context.Context, r *taskv3.StartRequest) (*taskv3.StartResponse, error) {
	c, err := t.s.task(r.Id)
	if err != nil {
		return nil, err
	}
	p, err := c.process(r.ExecId)
	if err != nil {
		return nil, err
	}
	pid, err := p.start()
	if err != nil {
		return nil, err
	}
	if r.ExecId == "" {
		c.settle()
		c.poststart()
	}
	return &taskv3.StartResponse{Pid: uint32(pid)}, nil
}

func (t *taskService) Delete(ctx context.Context, r *taskv3.DeleteRequest) (*taskv3.DeleteResponse, error) {
	c, err := t.s.task(r.Id)
	if err != nil {
		return nil, err
	}
	p, err := c.process(r.ExecId)
	if err != nil {
		return nil, err
	}
	if err := p.end(ctx); err != nil {
		return nil, err
	}
	if r.ExecId != "" {
		c.forget(r.ExecId)
	} else {
		if !t.s.take(c) {
			return nil, fmt.Errorf("task %s: %w", r.Id, errdefs.ErrNotFound)
		}
		t.s.remove(c)
	}
	q := p.snapshot()
	return &taskv3.DeleteResponse{Pid: q.Pid, ExitStatus: q.ExitStatus, ExitedAt: timestamp(p.exitedAt)}, nil
}

func (t *taskService) Exec(_ context.Context, r *taskv3.ExecProcessRequest) (*emptypb.Empty, error) {
	o := new(taskv1.ExecOptions)
	switch {
	case r.Spec == nil:
		return nil, fmt.Errorf("exec %s: no process: %w", r.ExecId, errdefs.ErrInvalidArgument)
	case r.Spec.TypeUrl == task.ExecOptionsURL:
		if err := proto.Unmarshal(r.Spec.Value, o); err != nil {
			return nil, fmt.Errorf("exec %s: %w: %w", r.ExecId, err, errdefs.ErrInvalidArgument)
		}
	default: // containerd's: the OCI process itself
		o.Process, o.Stdin = r.Spec.Value, r.Stdin != ""
	}
	_, err := t.s.makeExec(r, o)
	return empty, err
}

// makeExec prepares a further process.
func (s *Shim) makeExec(r *taskv3.ExecProcessRequest, o *taskv1.ExecOptions) (*process, error) {
	if err := checkID(r.ExecId); err != nil {
		return nil, err
	}
	c, err := s.task(r.Id)
	if err != nil {
		return nil, err
	}
	process := new(specs.Process)
	if err := json.Unmarshal(o.Process, process); err != nil {
		return nil, fmt.Errorf("exec %s: process: %w: %w", r.ExecId, err, errdefs.ErrInvalidArgument)
	}
	process.Terminal = r.Terminal || process.Terminal
	return c.exec(r, o, process)
}

func (t *taskService) State(_ context.Context, r *taskv3.StateRequest) (*taskv3.StateResponse, error) {
	p, err := t.s.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	q := p.snapshot()
	return &taskv3.StateResponse{
		Id: r.Id, ExecId: r.ExecId, Bundle: p.c.bundle, Pid: q.Pid, Status: v3Status(q.Status),
		Terminal: q.Terminal, ExitStatus: q.ExitStatus, ExitedAt: timestamp(p.exitTime()),
	}, nil
}

func v3Status(s taskv1.Status) taskv3.Status {
	switch s {
	case taskv1.Status_STATUS_CREATED:
		return taskv3.Status_CREATED
	case taskv1.Status_STATUS_RUNNING:
		return taskv3.Status_RUNNING
	case taskv1.Status_STATUS_PAUSED:
		return taskv3.Status_PAUSED
	case taskv1.Status_STATUS_STOPPED:
		return taskv3.Status_STOPPED
	}
	return taskv3.Status_UNKNOWN
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func (t *taskService) Pids(_ context.Context, r *taskv3.PidsRequest) (*taskv3.PidsResponse, error) {
	c, err := t.s.task(r.Id)
	if err != nil {
		return nil, err
	}
	pids, err := c.group.Pids()
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", r.Id, err)
	}
	resp := &taskv3.PidsResponse{}
	for _, pid := range pids {
		resp.Processes = append(resp.Processes, &taskv3.ProcessInfo{Pid: uint32(pid)})
	}
	return resp, nil
}

func (t *taskService) Pause(ctx context.Context, r *taskv3.PauseRequest) (*emptypb.Empty, error) {
	c, err := t.s.task(r.Id)
	if err != nil {
		return nil, err
	}
	return empty, c.pause(ctx)
}

func (t *taskService) Resume(ctx context.Context, r *taskv3.ResumeRequest) (*emptypb.Empty, error) {
	c, err := t.s.task(r.Id)
	if err != nil {
		return nil, err
	}
	return empty, c.resume(ctx)
}

func (t *taskService) Kill(ctx context.Context, r *taskv3.KillRequest) (*emptypb.Empty, error) {
	c, err := t.s.task(r.Id)
	if err != nil {
		return nil, err
	}
	p, err := c.process(r.ExecId)
	if err != nil {
		return nil, err
	}
	if r.Signal > 64 {
		return nil, fmt.Errorf("signal %d: %w", r.Signal, errdefs.ErrInvalidArgument)
	}
	sig := syscall.Signal(r.Signal)
	if r.All && r.ExecId == "" {
		err = c.killAll(sig)
	} else {
		err = p.kill(sig)
	}
	if err == nil && sig == syscall.SIGKILL && c.isPaused() {
		err = c.resume(ctx) // a frozen process cannot die
		if errdefs.IsFailedPrecondition(err) {
			err = nil
		}
	}
	return empty, err
}

func (t *taskService) ResizePty(_ context.Context, r *taskv3.ResizePtyRequest) (*emptypb.Empty, error) {
	p, err := t.s.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	return empty, p.resize(r.Width, r.Height)
}

func (t *taskService) CloseIO(_ context.Context, r *taskv3.CloseIORequest) (*emptypb.Empty, error) {
	p, err := t.s.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	if r.Stdin && p.io != nil {
		p.io.closeStdin()
	}
	return empty, nil
}

func (t *taskService) Update(_ context.Context, r *taskv3.UpdateTaskRequest) (*emptypb.Empty, error) {
	c, err := t.s.task(r.Id)
	if err != nil {
		return nil, err
	}
	if r.Resources == nil {
		return empty, nil
	}
	var res specs.LinuxResources
	if err := json.Unmarshal(r.Resources.Value, &res); err != nil {
		return nil, fmt.Errorf("task %s: resources: %w: %w", r.Id, err, errdefs.ErrInvalidArgument)
	}
	if err := c.update(&res); err != nil {
		return nil, fmt.Errorf("task %s: update: %w", r.Id, err)
	}
	return empty, nil
}

func (t *taskService) Wait(ctx context.Context, r *taskv3.WaitRequest) (*taskv3.WaitResponse, error) {
	q, err := t.s.await(ctx, r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	return &taskv3.WaitResponse{ExitStatus: q.ExitStatus, ExitedAt: timestamppb.New(time.Unix(0, q.ExitedAt))}, nil
}

// await waits for a process's exit, and forgets an auto_delete task after it.
func (s *Shim) await(ctx context.Context, id, execID string) (*taskv1.Process, error) {
	p, err := s.process(id, execID)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	q := p.snapshot()
	if execID == "" && p.c.autoDelete && s.take(p.c) {
		s.work.Add(1)
		go func() {
			defer s.work.Done()
			s.remove(p.c)
		}()
	}
	return q, nil
}

func (t *taskService) Stats(_ context.Context, r *taskv3.StatsRequest) (*taskv3.StatsResponse, error) {
	c, err := t.s.task(r.Id)
	if err != nil {
		return nil, err
	}
	m, err := c.metrics()
	if err != nil {
		return nil, err
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	return &taskv3.StatsResponse{Stats: &anypb.Any{TypeUrl: "tenon.dev/tenon.task.v1.Metrics", Value: b}}, nil
}

func (t *taskService) Checkpoint(_ context.Context, r *taskv3.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, fmt.Errorf("task %s: checkpoint: %w", r.Id, errdefs.ErrNotImplemented)
}

func (t *taskService) Connect(_ context.Context, r *taskv3.ConnectRequest) (*taskv3.ConnectResponse, error) {
	resp := &taskv3.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: Version}
	if r.Id != "" {
		p, err := t.s.process(r.Id, "")
		if err != nil {
			return nil, err
		}
		resp.TaskPid = uint32(p.child.pid())
	}
	return resp, nil
}

func (t *taskService) Shutdown(ctx context.Context, r *taskv3.ShutdownRequest) (*emptypb.Empty, error) {
	s := t.s
	ctx, cancel := context.WithTimeout(ctx, shutdownTime)
	defer cancel()
	if n := len(s.list()); n > 0 && !r.Now {
		return nil, fmt.Errorf("shim has %d tasks: %w", n, errdefs.ErrFailedPrecondition)
	}
	s.close(true)
	if err := s.destroyAll(ctx); err != nil {
		s.close(false)
		return nil, err
	}
	s.downOne.Do(func() { time.AfterFunc(answerTime, func() { close(s.down) }) })
	return empty, nil
}

// destroyAll ends and removes everything, also what is being made or removed.
func (s *Shim) destroyAll(ctx context.Context) error {
	if err := s.idle(ctx); err != nil {
		return fmt.Errorf("tasks are still being made or removed: %w", err)
	}
	list := s.list()
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for i, c := range list {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs[i] = s.destroy(ctx, c)
		}()
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return s.idle(ctx)
}

func (s *Shim) close(closing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = closing
}

// shutdownTime bounds the end of all tasks.
const shutdownTime = 30 * time.Second

// answerTime is what the answer to Shutdown gets to go out; ttrpc does not say
// when it has.
const answerTime = 50 * time.Millisecond
