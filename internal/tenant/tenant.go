// Package tenant is what a client of a machine's own socket can do: the whole
// Docker API, scoped to that machine. It wraps the engine and the networks; every
// method is written out, so that one that is added to them is refused here until
// somebody has thought about it.
//
// A tenant sees, and acts on, the containers of its machine alone: others are not
// found. What a container may be made of the engine checks, on its resolved record
// (engine.CreateOptions.Tenant). Networks and volumes are its own by a label; the
// default bridge it sees without what others have there. Images are shared: it may
// use, pull and push all, but names that it gives or takes away begin with the
// machine's own (in any registry), so that it can't put something under a name that
// others run.
package tenant

import (
	"context"
	"io"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"

	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/machine"
	tnet "tenon.dev/tenon/internal/network"
)

// Scope is engine.API for the tenants of one machine. Make it with New.
type Scope struct {
	eng  engine.API
	nets *Networks
	name string // of the machine

	making sync.Mutex // held while a volume or network is made
}

var _ engine.API = (*Scope)(nil)

// New makes a Scope for the machine of a name.
func New(e engine.API, nets *tnet.Controller, name string) *Scope {
	s := &Scope{eng: e, name: name}
	s.nets = &Networks{c: nets, s: s}
	return s
}

// Networks are those that the tenants see.
func (s *Scope) Networks() *Networks { return s.nets }

func (s *Scope) denied(format string, args ...any) error {
	return engine.Denied(s.name, format, args...)
}

// ImageName refuses a name that the tenants may not give to an image, or take away.
func (s *Scope) ImageName(ref string) error {
	if ref == "" {
		return nil
	}
	n, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return errdefs.ErrInvalidArgument.WithMessage("invalid reference format: " + err.Error())
	}
	if strings.HasPrefix(reference.Path(n), s.name+"/") {
		return nil
	}
	return s.denied("images are shared: names that are given or removed here begin with %s/, in any registry, not %s", s.name, reference.FamiliarString(n))
}

// Kernel is the release of the machine's kernel; empty if it never ran.
func (s *Scope) Kernel(ctx context.Context) string {
	m, err := s.eng.MachineInspect(ctx, s.name, false)
	if err != nil {
		return ""
	}
	return m.Record.Facts.Kernel
}

// own is the ID of one of the machine's containers.
func (s *Scope) own(ref string) (string, error) { return s.eng.TenantContainer(s.name, ref) }

// Create makes a container on the machine.
func (s *Scope) Create(ctx context.Context, o engine.CreateOptions) (engine.CreateResult, error) {
	o.Tenant = s.name
	return s.eng.Create(ctx, o)
}

// Run creates and starts one.
func (s *Scope) Run(ctx context.Context, o engine.RunOptions) (engine.CreateResult, engine.WaitResult, error) {
	o.Tenant = s.name
	return s.eng.Run(ctx, o)
}

// on calls f with the ID of one of the machine's containers.
func (s *Scope) on(ref string, f func(id string) error) error {
	id, err := s.own(ref)
	if err != nil {
		return err
	}
	return f(id)
}

// with is on for what answers with something.
func with[T any](s *Scope, ref string, f func(id string) (T, error)) (T, error) {
	id, err := s.own(ref)
	if err != nil {
		var none T
		return none, err
	}
	return f(id)
}

// Start starts a container.
func (s *Scope) Start(ctx context.Context, ref string) error {
	return s.on(ref, func(id string) error { return s.eng.Start(ctx, id) })
}

// Stop stops one.
func (s *Scope) Stop(ctx context.Context, ref string, o engine.StopOptions) error {
	return s.on(ref, func(id string) error { return s.eng.Stop(ctx, id, o) })
}

// Restart restarts one.
func (s *Scope) Restart(ctx context.Context, ref string, o engine.StopOptions) error {
	return s.on(ref, func(id string) error { return s.eng.Restart(ctx, id, o) })
}

// Kill signals one.
func (s *Scope) Kill(ctx context.Context, ref, signal string) error {
	return s.on(ref, func(id string) error { return s.eng.Kill(ctx, id, signal) })
}

// Pause freezes one.
func (s *Scope) Pause(ctx context.Context, ref string) error {
	return s.on(ref, func(id string) error { return s.eng.Pause(ctx, id) })
}

// Unpause thaws one.
func (s *Scope) Unpause(ctx context.Context, ref string) error {
	return s.on(ref, func(id string) error { return s.eng.Unpause(ctx, id) })
}

// Rename renames one.
func (s *Scope) Rename(ctx context.Context, ref, name string) error {
	return s.on(ref, func(id string) error { return s.eng.Rename(ctx, id, name) })
}

// Remove removes one.
func (s *Scope) Remove(ctx context.Context, ref string, o engine.RemoveOptions) error {
	return s.on(ref, func(id string) error { return s.eng.Remove(ctx, id, o) })
}

// Update changes one's limits.
func (s *Scope) Update(ctx context.Context, ref string, u container.UpdateConfig) ([]string, error) {
	return with(s, ref, func(id string) ([]string, error) { return s.eng.Update(ctx, id, u) })
}

// Wait waits for one.
func (s *Scope) Wait(ctx context.Context, ref string, c container.WaitCondition) (<-chan engine.WaitResult, error) {
	return with(s, ref, func(id string) (<-chan engine.WaitResult, error) { return s.eng.Wait(ctx, id, c) })
}

// Inspect describes one.
func (s *Scope) Inspect(ctx context.Context, ref string, size bool) (*container.InspectResponse, error) {
	return with(s, ref, func(id string) (*container.InspectResponse, error) { return s.eng.Inspect(ctx, id, size) })
}

// List lists the machine's containers.
func (s *Scope) List(ctx context.Context, o engine.ListOptions) ([]container.Summary, error) {
	o.Tenant = s.name
	return s.eng.List(ctx, o)
}

// PruneContainers removes those of the machine that have ended.
func (s *Scope) PruneContainers(ctx context.Context, f engine.Filters) (container.PruneReport, error) {
	return s.eng.TenantPrune(ctx, s.name, f)
}

// TenantLimits are the machine's.
func (s *Scope) TenantLimits() engine.TenantLimits { return s.eng.TenantLimits() }

// TenantContainer finds only the machine's own.
func (s *Scope) TenantContainer(_, ref string) (string, error) { return s.own(ref) }

// TenantPrune prunes only the machine's own.
func (s *Scope) TenantPrune(ctx context.Context, _ string, f engine.Filters) (container.PruneReport, error) {
	return s.PruneContainers(ctx, f)
}

// Top lists one's processes.
func (s *Scope) Top(ctx context.Context, ref string, psArgs []string) (container.TopResponse, error) {
	return with(s, ref, func(id string) (container.TopResponse, error) { return s.eng.Top(ctx, id, psArgs) })
}

// Stats measures one.
func (s *Scope) Stats(ctx context.Context, ref string, stream, oneShot bool, send func(*container.StatsResponse) error) error {
	return s.on(ref, func(id string) error { return s.eng.Stats(ctx, id, stream, oneShot, send) })
}

// Logs reads one's output.
func (s *Scope) Logs(ctx context.Context, ref string, o engine.LogsOptions, stdout, stderr io.Writer) (bool, error) {
	return with(s, ref, func(id string) (bool, error) { return s.eng.Logs(ctx, id, o, stdout, stderr) })
}

// IsTTY says whether one has a terminal.
func (s *Scope) IsTTY(ctx context.Context, ref string) (bool, error) {
	return with(s, ref, func(id string) (bool, error) { return s.eng.IsTTY(ctx, id) })
}

// Attach connects to one.
func (s *Scope) Attach(ctx context.Context, ref string, o engine.AttachOptions) error {
	return s.on(ref, func(id string) error { return s.eng.Attach(ctx, id, o) })
}

// Resize sets the size of one's terminal.
func (s *Scope) Resize(ctx context.Context, ref string, height, width uint) error {
	return s.on(ref, func(id string) error { return s.eng.Resize(ctx, id, height, width) })
}

// ExecCreate prepares a process in one.
func (s *Scope) ExecCreate(ctx context.Context, ref string, o engine.ExecOptions) (string, error) {
	return with(s, ref, func(id string) (string, error) { return s.eng.ExecCreate(ctx, id, o) })
}

// ownExec finds an exec of one of the machine's containers.
func (s *Scope) ownExec(ctx context.Context, id string) (*container.ExecInspectResponse, error) {
	x, err := s.eng.ExecInspect(ctx, id)
	if err != nil {
		return nil, err
	}
	if _, err := s.own(x.ContainerID); err != nil {
		return nil, errdefs.ErrNotFound.WithMessage("No such exec instance: " + id)
	}
	return x, nil
}

// ExecStart runs it.
func (s *Scope) ExecStart(ctx context.Context, id string, detach bool, o engine.AttachOptions) error {
	if _, err := s.ownExec(ctx, id); err != nil {
		return err
	}
	return s.eng.ExecStart(ctx, id, detach, o)
}

// ExecInspect describes it.
func (s *Scope) ExecInspect(ctx context.Context, id string) (*container.ExecInspectResponse, error) {
	return s.ownExec(ctx, id)
}

// ExecResize sets the size of its terminal.
func (s *Scope) ExecResize(ctx context.Context, id string, height, width uint) error {
	if _, err := s.ownExec(ctx, id); err != nil {
		return err
	}
	return s.eng.ExecResize(ctx, id, height, width)
}

// StatPath looks at a file of one.
func (s *Scope) StatPath(ctx context.Context, ref, path string) (*container.PathStat, error) {
	return with(s, ref, func(id string) (*container.PathStat, error) { return s.eng.StatPath(ctx, id, path) })
}

// ReadArchive reads files of one.
func (s *Scope) ReadArchive(ctx context.Context, ref, path string) (io.ReadCloser, *container.PathStat, error) {
	id, err := s.own(ref)
	if err != nil {
		return nil, nil, err
	}
	return s.eng.ReadArchive(ctx, id, path)
}

// WriteArchive writes files of one.
func (s *Scope) WriteArchive(ctx context.Context, ref, path string, tar io.Reader, noOverwriteDirNonDir, copyUIDGID bool) error {
	return s.on(ref, func(id string) error {
		return s.eng.WriteArchive(ctx, id, path, tar, noOverwriteDirNonDir, copyUIDGID)
	})
}

// Changes lists what one has changed.
func (s *Scope) Changes(ctx context.Context, ref string) ([]container.FilesystemChange, error) {
	return with(s, ref, func(id string) ([]container.FilesystemChange, error) { return s.eng.Changes(ctx, id) })
}

// Export reads one's root.
func (s *Scope) Export(ctx context.Context, ref string) (io.ReadCloser, error) {
	return with(s, ref, func(id string) (io.ReadCloser, error) { return s.eng.Export(ctx, id) })
}

// Commit makes an image of one, under a name of the machine's.
func (s *Scope) Commit(ctx context.Context, ref string, o engine.CommitOptions) (string, error) {
	if err := s.ImageName(o.Ref); err != nil {
		return "", err
	}
	return with(s, ref, func(id string) (string, error) { return s.eng.Commit(ctx, id, o) })
}

// ConnectNetwork attaches one to a network that the tenants see.
func (s *Scope) ConnectNetwork(ctx context.Context, net, ref string, cfg *network.EndpointSettings) error {
	n, err := s.nets.find(ctx, net)
	if err != nil {
		return err
	}
	if n.Labels[engine.MachineLabel] != s.name && cfg != nil && len(cfg.MacAddress) > 0 {
		return s.denied("a hardware address on the network %s can't be chosen: others are on it", n.Name)
	}
	return s.on(ref, func(id string) error { return s.eng.ConnectNetwork(ctx, n.ID, id, cfg) })
}

// DisconnectNetwork detaches one.
func (s *Scope) DisconnectNetwork(ctx context.Context, net, ref string, force bool) error {
	n, err := s.nets.find(ctx, net)
	if err != nil {
		return err
	}
	return s.on(ref, func(id string) error { return s.eng.DisconnectNetwork(ctx, n.ID, id, force) })
}

// VolumeCreate makes a directory volume of the machine's.
func (s *Scope) VolumeCreate(ctx context.Context, r volume.CreateRequest) (*volume.Volume, error) {
	if len(r.DriverOpts) > 0 || r.ClusterVolumeSpec != nil {
		return nil, s.denied("a volume with driver options can't be had")
	}
	r.Labels = maps.Clone(r.Labels)
	if r.Labels == nil {
		r.Labels = map[string]string{}
	}
	r.Labels[engine.MachineLabel] = s.name
	old, err := s.eng.VolumeInspect(ctx, r.Name)
	existed := r.Name != "" && err == nil && old.Labels[engine.MachineLabel] == s.name
	if !existed {
		s.making.Lock() // the last that may be made is made once
		defer s.making.Unlock()
		if err := s.volumesLeft(ctx); err != nil {
			return nil, err
		}
	}
	v, err := s.eng.VolumeCreate(ctx, r)
	if err == nil && v.Labels[engine.MachineLabel] != s.name {
		return nil, s.denied("the volume %s belongs to others", r.Name)
	}
	return hidden(v), err
}

// volumesLeft refuses one more volume than there may be.
func (s *Scope) volumesLeft(ctx context.Context) error {
	most := s.eng.TenantLimits().Volumes
	if most == 0 {
		return nil
	}
	list, _, err := s.eng.VolumeList(ctx, s.labelled(nil))
	if err == nil && len(list) >= most {
		err = engine.TooMany(s.name, "volumes", most)
	}
	return err
}

// hidden is a volume without where it lies on the host.
func hidden(v *volume.Volume) *volume.Volume {
	if v == nil {
		return nil
	}
	c := *v
	c.Mountpoint = ""
	return &c
}

// VolumeInspect describes a volume of the machine's.
func (s *Scope) VolumeInspect(ctx context.Context, name string) (*volume.Volume, error) {
	v, err := s.eng.VolumeInspect(ctx, name)
	if err != nil {
		return nil, err
	}
	if v.Labels[engine.MachineLabel] != s.name {
		return nil, errdefs.ErrNotFound.WithMessage("get " + name + ": no such volume")
	}
	return hidden(v), nil
}

// labelled is a filter for what has the machine's label.
func (s *Scope) labelled(f engine.Filters) engine.Filters {
	f = maps.Clone(f)
	if f == nil {
		f = engine.Filters{}
	}
	f["label"] = append(f["label"][:len(f["label"]):len(f["label"])], engine.MachineLabel+"="+s.name)
	return f
}

// VolumeList lists them.
func (s *Scope) VolumeList(ctx context.Context, f engine.Filters) ([]volume.Volume, []string, error) {
	list, warnings, err := s.eng.VolumeList(ctx, s.labelled(f))
	for i := range list {
		list[i] = *hidden(&list[i])
	}
	return list, warnings, err
}

// VolumeRemove removes one.
func (s *Scope) VolumeRemove(ctx context.Context, name string, force bool) error {
	if _, err := s.VolumeInspect(ctx, name); err != nil {
		if force && errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	return s.eng.VolumeRemove(ctx, name, force)
}

// VolumeUsage measures one.
func (s *Scope) VolumeUsage(ctx context.Context, name string) (*volume.UsageData, error) {
	if _, err := s.VolumeInspect(ctx, name); err != nil {
		return nil, err
	}
	return s.eng.VolumeUsage(ctx, name)
}

// VolumePrune removes those that nobody uses.
func (s *Scope) VolumePrune(ctx context.Context, f engine.Filters) (volume.PruneReport, error) {
	return s.eng.VolumePrune(ctx, s.labelled(f))
}

// Events subscribes to what happens to the machine, its containers, networks and
// volumes, and to images.
func (s *Scope) Events(ctx context.Context, since, until time.Time, f engine.Filters) (<-chan engine.EventMessage, error) {
	in, err := s.eng.Events(ctx, since, until, f)
	if err != nil {
		return nil, err
	}
	out := make(chan engine.EventMessage)
	go func() {
		defer close(out)
		known := s.known(ctx)
		for m := range in {
			if !s.sees(ctx, m, known) {
				continue
			}
			select {
			case out <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}

// known are the networks and volumes of the machine's as they are now: what is
// removed can't be looked up any more.
func (s *Scope) known(ctx context.Context) map[string]bool {
	out := map[string]bool{}
	if list, _, err := s.VolumeList(ctx, nil); err == nil {
		for _, v := range list {
			out[v.Name] = true
		}
	}
	if list, err := s.nets.List(ctx, nil); err == nil {
		for i := range list {
			if list[i].Labels[engine.MachineLabel] == s.name {
				out[list[i].ID] = true
			}
		}
	}
	return out
}

// sees says whether an event is one of the tenants'.
func (s *Scope) sees(ctx context.Context, m engine.EventMessage, known map[string]bool) bool {
	switch m.Type {
	case events.ContainerEventType:
		return m.Actor.Attributes[engine.IsolationAttribute] == machine.Prefix+s.name
	case engine.MachineEventType:
		return m.Actor.Attributes["name"] == s.name
	case events.ImageEventType:
		return true
	case events.VolumeEventType:
		if _, err := s.VolumeInspect(ctx, m.Actor.ID); err == nil {
			known[m.Actor.ID] = true
		}
	case events.NetworkEventType:
		if id := m.Actor.Attributes["container"]; id != "" { // on a network that others are on, too
			_, err := s.own(id)
			return err == nil
		}
		if n, err := s.nets.find(ctx, m.Actor.ID); err == nil && n.Labels[engine.MachineLabel] == s.name {
			known[m.Actor.ID] = true
		}
	default:
		return false
	}
	return known[m.Actor.ID]
}

// Emit publishes an event of an image.
func (s *Scope) Emit(m engine.EventMessage) { s.eng.Emit(m) }

// Info describes the machine as if it were a host.
func (s *Scope) Info(ctx context.Context) (*system.Info, error) {
	m, err := s.eng.MachineInspect(ctx, s.name, false)
	if err != nil {
		return nil, err
	}
	in, err := s.eng.Info(ctx)
	if err != nil {
		return nil, err
	}
	r := m.Record
	out := &system.Info{
		ID: r.ID, Name: r.Name, Containers: len(m.Containers), ContainersRunning: m.Running, Images: in.Images,
		Driver: in.Driver, DriverStatus: [][2]string{{"machine", r.Name}, {"state", string(m.State)}, {"accelerator", r.Facts.Accel}},
		MemoryLimit: true, SwapLimit: true, CPUCfsPeriod: true, CPUCfsQuota: true, CPUShares: true, CPUSet: true, PidsLimit: true,
		IPv4Forwarding: in.IPv4Forwarding, SystemTime: in.SystemTime, LoggingDriver: in.LoggingDriver, CgroupDriver: in.CgroupDriver, CgroupVersion: "2",
		KernelVersion: r.Facts.Kernel, OperatingSystem: "Tenon machine", OSType: in.OSType, Architecture: in.Architecture,
		NCPU: r.CPUs, MemTotal: r.Memory, IndexServerAddress: in.IndexServerAddress, RegistryConfig: in.RegistryConfig, Labels: []string{},
		ServerVersion: in.ServerVersion, Runtimes: map[string]system.RuntimeWithStatus{"tenon": in.Runtimes["tenon"]}, DefaultRuntime: "tenon",
		LiveRestoreEnabled: true, Isolation: container.Isolation(r.Isolation()), InitBinary: in.InitBinary, Plugins: in.Plugins,
		SecurityOptions: in.SecurityOptions, Warnings: []string{},
	}
	list, err := s.List(ctx, engine.ListOptions{All: true})
	if err != nil {
		return nil, err
	}
	out.ContainersRunning = 0
	for i := range list {
		switch list[i].State {
		case container.StatePaused:
			out.ContainersPaused++
		case container.StateRunning, container.StateRestarting:
			out.ContainersRunning++
		default:
			out.ContainersStopped++
		}
	}
	return out, nil
}

// ImageUsers are all users, of others too: they keep an image.
func (s *Scope) ImageUsers(imageID string) []string { return s.eng.ImageUsers(imageID) }

// ImageRunning are those that run.
func (s *Scope) ImageRunning(imageID string) []string { return s.eng.ImageRunning(imageID) }

// Shutdown is refused.
func (s *Scope) Shutdown(context.Context) error { return s.denied("the daemon can't be shut down") }
