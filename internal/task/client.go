package task

import (
	"context"
	"encoding/json"
	"fmt"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	taskv3 "tenon.dev/tenon/internal/task/api/v3"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// Type URLs of what travels in Any fields.
const (
	CreateOptionsURL  = "tenon.dev/tenon.task.v1.CreateOptions"
	ExecOptionsURL    = "tenon.dev/tenon.task.v1.ExecOptions"
	LinuxResourcesURL = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources" // JSON
)

// Mount is a mount of a root file system, in containerd's words.
type Mount struct {
	Type    string // "overlay", "bind", …
	Source  string
	Target  string // in the root; empty: the root itself
	Options []string
}

// CreateRequest describes a task. ID and Spec (or Bundle) are required.
type CreateRequest struct {
	ID     string
	Spec   []byte  // OCI runtime spec, JSON
	Bundle string  // directory with config.json, if there is no Spec
	Rootfs []Mount // what the root is made of; empty: the spec's root.path

	Terminal                    bool
	Stdin                       bool // the process may read from attached streams
	StdinOnce                   bool // its stdin ends with the first attached stream that has it
	ConsoleWidth, ConsoleHeight uint32

	Log         *taskv1.Log // nil: output goes to attached streams only
	Runtime     string      // path of an OCI runtime command; empty: Tenon's own
	RuntimeArgs []string    // its global options
	AutoDelete  bool        // forget the task once its exit has been told to an Await or Wait
	Owner       string      // given back by List

	// Paths of FIFOs, containerd's way of stdio; beside attached streams.
	StdinPath, StdoutPath, StderrPath string
}

// Create makes a task ready to start and returns its init's pid (0 on another
// kernel). Streams attached before Start miss nothing.
func (c *Client) Create(ctx context.Context, r CreateRequest) (pid int, err error) {
	o, err := pack(CreateOptionsURL, &taskv1.CreateOptions{
		Spec: r.Spec, Log: r.Log, Stdin: r.Stdin, StdinOnce: r.StdinOnce,
		Runtime: r.Runtime, RuntimeArgs: r.RuntimeArgs,
		ConsoleWidth: r.ConsoleWidth, ConsoleHeight: r.ConsoleHeight,
		AutoDelete: r.AutoDelete, Owner: r.Owner,
	})
	if err != nil {
		return 0, err
	}
	req := &taskv3.CreateTaskRequest{
		Id: r.ID, Bundle: r.Bundle, Terminal: r.Terminal, Options: o,
		Stdin: r.StdinPath, Stdout: r.StdoutPath, Stderr: r.StderrPath,
	}
	for _, m := range r.Rootfs {
		req.Rootfs = append(req.Rootfs, &taskv3.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	resp, err := c.Task.Create(ctx, req)
	if err != nil {
		return 0, err
	}
	return int(resp.Pid), nil
}

// Start lets a created init, or a prepared exec, run its program and returns
// its pid. If the program cannot be executed, the error says why (class
// NotFound: no such file; PermissionDenied: not executable).
func (c *Client) Start(ctx context.Context, id, execID string) (pid int, err error) {
	resp, err := c.Task.Start(ctx, &taskv3.StartRequest{Id: id, ExecId: execID})
	if err != nil {
		return 0, err
	}
	return int(resp.Pid), nil
}

// Kill sends a signal to a process, or with all to every process of the
// container.
func (c *Client) Kill(ctx context.Context, id, execID string, sig syscall.Signal, all bool) error {
	_, err := c.Task.Kill(ctx, &taskv3.KillRequest{Id: id, ExecId: execID, Signal: uint32(sig), All: all})
	return err
}

// Wait returns when the process has exited and all its output is in the log
// and with the attached streams. An ended ctx ends only the waiting.
func (c *Client) Wait(ctx context.Context, id, execID string) (Exit, error) {
	p, err := c.Kernel.Await(ctx, &taskv1.AwaitRequest{Id: id, ExecId: execID})
	if err != nil {
		return Exit{}, err
	}
	return ExitOf(p), nil
}

// ExitOf takes the exit out of a stopped process.
func ExitOf(p *taskv1.Process) Exit {
	return Exit{
		Status: p.ExitStatus, OOMKilled: p.OomKilled,
		StartedAt: nanoTime(p.StartedAt), ExitedAt: nanoTime(p.ExitedAt),
	}
}

// Delete forgets a stopped process; the init's takes mounts, cgroups and
// leftover processes with it.
func (c *Client) Delete(ctx context.Context, id, execID string) (Exit, error) {
	r, err := c.Task.Delete(ctx, &taskv3.DeleteRequest{Id: id, ExecId: execID})
	if err != nil {
		return Exit{}, err
	}
	e := Exit{Status: r.ExitStatus}
	if r.ExitedAt != nil {
		e.ExitedAt = r.ExitedAt.AsTime()
	}
	return e, nil
}

// ExecRequest describes a further process in a running container.
type ExecRequest struct {
	ID, ExecID                  string
	Process                     []byte // OCI process, JSON
	Terminal, Stdin, Privileged bool
	ConsoleWidth, ConsoleHeight uint32
}

// Exec prepares a process; Start with its ExecID runs it.
func (c *Client) Exec(ctx context.Context, r ExecRequest) error {
	o, err := pack(ExecOptionsURL, r.options())
	if err != nil {
		return err
	}
	_, err = c.Task.Exec(ctx, &taskv3.ExecProcessRequest{Id: r.ID, ExecId: r.ExecID, Terminal: r.Terminal, Spec: o})
	return err
}

func (r ExecRequest) options() *taskv1.ExecOptions {
	return &taskv1.ExecOptions{
		Process: r.Process, Stdin: r.Stdin, Privileged: r.Privileged,
		ConsoleWidth: r.ConsoleWidth, ConsoleHeight: r.ConsoleHeight,
	}
}

// Resize sets the size of a process's terminal.
func (c *Client) Resize(ctx context.Context, id, execID string, width, height uint32) error {
	_, err := c.Task.ResizePty(ctx, &taskv3.ResizePtyRequest{Id: id, ExecId: execID, Width: width, Height: height})
	return err
}

// CloseIO ends a process's stdin.
func (c *Client) CloseIO(ctx context.Context, id, execID string) error {
	_, err := c.Task.CloseIO(ctx, &taskv3.CloseIORequest{Id: id, ExecId: execID, Stdin: true})
	return err
}

// Pause freezes all processes of a container.
func (c *Client) Pause(ctx context.Context, id string) error {
	_, err := c.Task.Pause(ctx, &taskv3.PauseRequest{Id: id})
	return err
}

// Resume thaws them.
func (c *Client) Resume(ctx context.Context, id string) error {
	_, err := c.Task.Resume(ctx, &taskv3.ResumeRequest{Id: id})
	return err
}

// Update changes a running container's limits; what r leaves nil stays.
func (c *Client) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = c.Task.Update(ctx, &taskv3.UpdateTaskRequest{Id: id, Resources: &anypb.Any{TypeUrl: LinuxResourcesURL, Value: b}})
	return err
}

// List returns the processes that the shim knows (of one container, or with an
// empty ID of all) and the sequence number of the last event they include.
func (c *Client) List(ctx context.Context, id string) ([]*taskv1.Process, uint64, error) {
	r, err := c.Kernel.List(ctx, &taskv1.ListRequest{Id: id})
	if err != nil {
		return nil, 0, err
	}
	return r.Processes, r.Sequence, nil
}

// Events calls f for each event after a sequence number (0: from the oldest
// that is kept), in order, until ctx ends, f fails or the connection ends. A
// GAP event says that some were lost: List again.
func (c *Client) Events(ctx context.Context, after uint64, f func(*taskv1.Event) error) error {
	s, err := c.Kernel.Events(ctx, &taskv1.EventsRequest{After: after})
	if err != nil {
		return err
	}
	for {
		e, err := s.Recv()
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
		if err := f(e); err != nil {
			return err
		}
	}
}

// Processes is `ps` in a container: titles and rows, in Docker's form. No args
// mean -ef.
func (c *Client) Processes(ctx context.Context, id string, args []string) (titles []string, rows [][]string, err error) {
	r, err := c.Kernel.Processes(ctx, &taskv1.ProcessesRequest{Id: id, Args: args})
	if err != nil {
		return nil, nil, err
	}
	for _, row := range r.Rows {
		rows = append(rows, row.Fields)
	}
	return r.Titles, rows, nil
}

// Metrics samples containers; those that do not exist are left out. No ids
// mean all.
func (c *Client) Metrics(ctx context.Context, ids ...string) ([]*taskv1.Metrics, error) {
	r, err := c.Kernel.Metrics(ctx, &taskv1.MetricsRequest{Ids: ids})
	if err != nil {
		return nil, err
	}
	return r.Metrics, nil
}

// FlushLog returns when all output read so far is in the log file.
func (c *Client) FlushLog(ctx context.Context, id string) error {
	_, err := c.Kernel.FlushLog(ctx, &taskv1.FlushLogRequest{Id: id})
	return err
}

// Info says which kernel and which shim answer.
func (c *Client) Info(ctx context.Context) (*taskv1.InfoResponse, error) {
	return c.Kernel.Info(ctx, &taskv1.InfoRequest{})
}

// Shutdown ends the shim. With now false it refuses (FailedPrecondition) while
// it has tasks; with now true it kills and deletes them first.
func (c *Client) Shutdown(ctx context.Context, now bool) error {
	_, err := c.Task.Shutdown(ctx, &taskv3.ShutdownRequest{Now: now})
	return err
}

func pack(url string, m proto.Message) (*anypb.Any, error) {
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	return &anypb.Any{TypeUrl: url, Value: b}, nil
}
