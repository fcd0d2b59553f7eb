// Package engine holds Tenon's use cases: create, start, stop, remove, commit,
// recover and the rest of a container's life. It joins the nouns below it
// (image, rootfs, network, volume, sandbox, logs) and is called by the server
// alone. It never touches a kernel interface itself and never assumes that a
// container runs on the host's kernel: everything that concerns a running
// container goes through its sandbox's task client.
//
// Errors carry the classes of containerd/errdefs (NotFound, AlreadyExists,
// InvalidArgument, FailedPrecondition for a conflict, Unavailable, …); the
// server maps them to HTTP once. All methods are safe for concurrent use.
package engine

import (
	"context"
	"io"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/machine"
)

// Filters are Docker's: field -> set of values, any of which must match.
type Filters map[string][]string

// CreateOptions asks for a container.
type CreateOptions struct {
	Name     string // without the slash; empty: generated
	Platform *ocispec.Platform
	Request  container.CreateRequest // owned by the engine after the call
	// Tenant is the machine whose own socket asks: the container may have nothing
	// that is not of this machine. Empty: the daemon's socket asks.
	Tenant string
}

// CreateResult tells what was made.
type CreateResult struct {
	ID       string
	Warnings []string
}

// RunOptions asks for a container to be created, attached to and started by
// one call.
type RunOptions struct {
	CreateOptions
	Attach *AttachOptions // nil: detached
	// Created is called once the container has its ID, before it starts.
	Created func(CreateResult)
}

// AttachOptions connects streams to a container. The caller owns the streams.
type AttachOptions struct {
	Stdin          io.Reader // nil: none. EOF closes the container's stdin if it was opened with StdinOnce
	Stdout, Stderr io.Writer // with a tty everything arrives on Stdout
	Logs           bool      // replay the log first
	Stream         bool      // go on with live output
	Width, Height  uint      // initial console size; 0: unknown
	// Ready is called once the streams are connected: nothing that the
	// container writes after it can be missed. It may be nil.
	Ready func()
}

// ListOptions selects containers.
type ListOptions struct {
	All, Size bool
	Limit     int
	Filters   Filters
	Tenant    string // only containers of this machine; empty: all
}

// LogsOptions selects log lines.
type LogsOptions struct {
	Stdout, Stderr, Follow, Timestamps, Details bool
	Since, Until                                time.Time // zero: unbounded
	Tail                                        int       // negative: all
}

// StopOptions says how a container is stopped.
type StopOptions struct {
	Signal  string // empty: the container's own stop signal
	Timeout *int   // seconds; nil: the container's own; negative: wait for ever
}

// RemoveOptions says how a container is removed.
type RemoveOptions struct {
	Force, Volumes, Link bool
}

// CommitOptions makes an image of a container.
type CommitOptions struct {
	Ref, Author, Comment string
	Changes              []string // Dockerfile instructions
	Config               *container.Config
	NoPause              bool
}

// ExecOptions asks for a process in a running container.
type ExecOptions struct {
	User, WorkingDir                                         string
	Cmd, Env                                                 []string
	Privileged, Tty, AttachStdin, AttachStdout, AttachStderr bool
	DetachKeys                                               string
	Width, Height                                            uint
}

// CopyStat and archive streams use container.PathStat.

// WaitResult is how a container ended.
type WaitResult struct {
	ExitCode int
	Error    string
}

// EventMessage is Docker's event.
type EventMessage = events.Message

// API lists what the server asks of the engine, in Docker's words; *Engine
// implements it. ref is a container's name, ID or unique ID prefix.
type API interface {
	Create(ctx context.Context, o CreateOptions) (CreateResult, error)
	// Run returns when the container has started (detached) or, attached, when
	// it has ended and all its output has been written to the streams.
	Run(ctx context.Context, o RunOptions) (CreateResult, WaitResult, error)
	Start(ctx context.Context, ref string) error // AlreadyStarted: errdefs.ErrAlreadyExists is not used; see ErrNotModified
	Stop(ctx context.Context, ref string, o StopOptions) error
	Restart(ctx context.Context, ref string, o StopOptions) error
	Kill(ctx context.Context, ref, signal string) error
	Pause(ctx context.Context, ref string) error
	Unpause(ctx context.Context, ref string) error
	Rename(ctx context.Context, ref, name string) error
	Remove(ctx context.Context, ref string, o RemoveOptions) error
	Update(ctx context.Context, ref string, u container.UpdateConfig) ([]string, error)
	// Wait sends one result when the condition holds. The channel is buffered.
	// An error is returned at once if ref is unknown.
	Wait(ctx context.Context, ref string, c container.WaitCondition) (<-chan WaitResult, error)
	Inspect(ctx context.Context, ref string, size bool) (*container.InspectResponse, error)
	List(ctx context.Context, o ListOptions) ([]container.Summary, error)
	PruneContainers(ctx context.Context, f Filters) (container.PruneReport, error)
	Top(ctx context.Context, ref string, psArgs []string) (container.TopResponse, error)
	// Stats calls send about once a second until ctx ends; once if !stream.
	Stats(ctx context.Context, ref string, stream, oneShot bool, send func(*container.StatsResponse) error) error
	Logs(ctx context.Context, ref string, o LogsOptions, stdout, stderr io.Writer) (tty bool, err error)
	IsTTY(ctx context.Context, ref string) (bool, error)
	Attach(ctx context.Context, ref string, o AttachOptions) error
	Resize(ctx context.Context, ref string, height, width uint) error

	ExecCreate(ctx context.Context, ref string, o ExecOptions) (id string, err error)
	// ExecStart runs it attached (returns at its end) or detached.
	ExecStart(ctx context.Context, id string, detach bool, o AttachOptions) error
	ExecInspect(ctx context.Context, id string) (*container.ExecInspectResponse, error)
	ExecResize(ctx context.Context, id string, height, width uint) error

	StatPath(ctx context.Context, ref, path string) (*container.PathStat, error)
	ReadArchive(ctx context.Context, ref, path string) (io.ReadCloser, *container.PathStat, error)
	WriteArchive(ctx context.Context, ref, path string, tar io.Reader, noOverwriteDirNonDir, copyUIDGID bool) error
	Changes(ctx context.Context, ref string) ([]container.FilesystemChange, error)
	Export(ctx context.Context, ref string) (io.ReadCloser, error)
	Commit(ctx context.Context, ref string, o CommitOptions) (imageID string, err error)

	// Networks: what needs containers as well; the rest the server asks of
	// package network by Networks().
	ConnectNetwork(ctx context.Context, net, ref string, cfg *network.EndpointSettings) error
	DisconnectNetwork(ctx context.Context, net, ref string, force bool) error

	// Volumes that know their users.
	VolumeCreate(ctx context.Context, r volume.CreateRequest) (*volume.Volume, error)
	VolumeInspect(ctx context.Context, name string) (*volume.Volume, error)
	VolumeList(ctx context.Context, f Filters) ([]volume.Volume, []string, error)
	VolumeRemove(ctx context.Context, name string, force bool) error
	// VolumeUsage is what one takes on the disk and how many containers use it.
	VolumeUsage(ctx context.Context, name string) (*volume.UsageData, error)
	VolumePrune(ctx context.Context, f Filters) (volume.PruneReport, error)

	// Machines: virtual machines that last and hold containers of isolation
	// "machine=NAME". ref is a machine's name, ID or unique ID prefix.
	MachineCreate(ctx context.Context, r *machine.Record, start bool) (Machine, error)
	MachineInspect(ctx context.Context, ref string, usage bool) (Machine, error)
	MachineList(ctx context.Context, f Filters) ([]Machine, error)
	MachineStart(ctx context.Context, ref string) error
	MachineStop(ctx context.Context, ref string, o StopOptions) error
	MachineRestart(ctx context.Context, ref string, o StopOptions) error
	MachineRemove(ctx context.Context, ref string, o MachineRemoveOptions) error
	MachineUpdate(ctx context.Context, ref string, o MachineUpdateOptions) error
	MachineLogs(ctx context.Context, ref string, tail int, follow bool, w io.Writer) error
	MachinePrune(ctx context.Context, f Filters, removing func(name string)) ([]string, error)
	// TenantLimits, TenantContainer and TenantPrune are for a machine's own socket.
	TenantLimits() TenantLimits
	TenantContainer(name, ref string) (id string, err error)
	TenantPrune(ctx context.Context, name string, f Filters) (container.PruneReport, error)

	// Events subscribes: past ones since (zero: none), then live until until
	// (zero: ctx's end). The channel is closed at the end.
	Events(ctx context.Context, since, until time.Time, f Filters) (<-chan EventMessage, error)
	// Emit publishes an event that another part observed (image, network).
	Emit(m EventMessage)

	Info(ctx context.Context) (*system.Info, error)
	// ImageUsers names the containers that use an image ID.
	ImageUsers(imageID string) []string
	// ImageRunning names those of them that run.
	ImageRunning(imageID string) []string
	// Shutdown stops all containers and takes down everything the engine made;
	// the caller ends the daemon afterwards.
	Shutdown(ctx context.Context) error
}
