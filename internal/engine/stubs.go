package engine

import (
	"context"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
)

// not built yet
func (e *Engine) Create(ctx context.Context, o CreateOptions) (r0 CreateResult, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Run(ctx context.Context, o RunOptions) (r0 CreateResult, r1 WaitResult, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Start(ctx context.Context, ref string) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Stop(ctx context.Context, ref string, o StopOptions) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Restart(ctx context.Context, ref string, o StopOptions) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Kill(ctx context.Context, ref, signal string) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Pause(ctx context.Context, ref string) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Unpause(ctx context.Context, ref string) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Rename(ctx context.Context, ref, name string) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Remove(ctx context.Context, ref string, o RemoveOptions) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Update(ctx context.Context, ref string, u container.UpdateConfig) (r0 []string, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Wait(ctx context.Context, ref string, c container.WaitCondition) (r0 <-chan WaitResult, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Inspect(ctx context.Context, ref string, size bool) (r0 *container.InspectResponse, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) List(ctx context.Context, o ListOptions) (r0 []container.Summary, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) PruneContainers(ctx context.Context, f Filters) (r0 container.PruneReport, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Top(ctx context.Context, ref string, psArgs []string) (r0 container.TopResponse, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Stats(ctx context.Context, ref string, stream, oneShot bool, send func(*container.StatsResponse) error) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Logs(ctx context.Context, ref string, o LogsOptions, stdout, stderr io.Writer) (r0 bool, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) IsTTY(ctx context.Context, ref string) (r0 bool, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Attach(ctx context.Context, ref string, o AttachOptions) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Resize(ctx context.Context, ref string, height, width uint) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) ExecCreate(ctx context.Context, ref string, o ExecOptions) (r0 string, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) ExecStart(ctx context.Context, id string, detach bool, o AttachOptions) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) ExecInspect(ctx context.Context, id string) (r0 *container.ExecInspectResponse, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) ExecResize(ctx context.Context, id string, height, width uint) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) StatPath(ctx context.Context, ref, path string) (r0 *container.PathStat, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) ReadArchive(ctx context.Context, ref, path string) (r0 io.ReadCloser, r1 *container.PathStat, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) WriteArchive(ctx context.Context, ref, path string, tar io.Reader, noOverwriteDirNonDir, copyUIDGID bool) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Changes(ctx context.Context, ref string) (r0 []container.FilesystemChange, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Export(ctx context.Context, ref string) (r0 io.ReadCloser, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Commit(ctx context.Context, ref string, o CommitOptions) (r0 string, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) ConnectNetwork(ctx context.Context, net, ref string, cfg *network.EndpointSettings) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) DisconnectNetwork(ctx context.Context, net, ref string, force bool) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) VolumeCreate(ctx context.Context, r volume.CreateRequest) (r0 *volume.Volume, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) VolumeInspect(ctx context.Context, name string) (r0 *volume.Volume, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) VolumeList(ctx context.Context, f Filters) (r0 []volume.Volume, r1 []string, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) VolumeRemove(ctx context.Context, name string, force bool) (err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) VolumePrune(ctx context.Context, f Filters) (r0 volume.PruneReport, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Events(ctx context.Context, since, until time.Time, f Filters) (r0 <-chan EventMessage, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) Emit(m EventMessage) {}

// not built yet
func (e *Engine) Info(ctx context.Context) (r0 *system.Info, err error) {
	err = errdefs.ErrNotImplemented
	return
}

// not built yet
func (e *Engine) ImageUsers(imageID string) []string { return nil }

// not built yet
func (e *Engine) Shutdown(ctx context.Context) (err error) { err = errdefs.ErrNotImplemented; return }
