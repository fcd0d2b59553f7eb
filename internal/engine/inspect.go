package engine

import (
	"context"
	"maps"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/opencontainers/go-digest"

	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/storage"

	"tenon.dev/tenon/internal/container"
)

type chainID = digest.Digest

// Inspect describes a container as Docker's clients expect it. The annotations
// tenon.* in HostConfig prove the isolation: which kernel it runs on.
func (e *Engine) Inspect(ctx context.Context, ref string, size bool) (*mobycontainer.InspectResponse, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	if _, err := c.current(ctx); err != nil { // as Docker: a start under way is waited for
		return nil, err
	}
	r, ns := c.record(), c.namespace()
	path, args := r.PathArgs()
	runDir := e.runDir(r.ID)
	if r.HostConfig.NetworkMode.IsContainer() {
		runDir = e.runDir(r.HostConfig.NetworkMode.ConnectedContainer())
	}
	out := &mobycontainer.InspectResponse{
		ID: r.ID, Created: container.Time(r.Created), Path: path, Args: args, State: r.Inspect(),
		Image: r.Image.ID, Name: "/" + r.Name, RestartCount: r.Facts.RestartCount,
		ResolvConfPath: filepath.Join(runDir, "resolv.conf"), HostnamePath: filepath.Join(runDir, "hostname"), HostsPath: filepath.Join(runDir, "hosts"),
		Driver: "overlayfs", Platform: "linux", HostConfig: e.shownHostConfig(r), Mounts: mountPoints(r), Config: r.Config,
		ImageManifestDescriptor: r.Image.Manifest, ExecIDs: c.execIDs(),
		NetworkSettings: &mobycontainer.NetworkSettings{Ports: network.PortMap{}, Networks: e.endpoints(r, ns)},
	}
	if ns != nil && r.Running() {
		out.NetworkSettings.SandboxID, out.NetworkSettings.SandboxKey = r.ID, ns.Path
		out.NetworkSettings.Ports = portMap(r, ns)
	}
	if r.Running() {
		if u, ok := e.ownMachine(ctx, c); ok {
			out.HostConfig.Annotations["tenon.vm-cpu"], out.HostConfig.Annotations["tenon.vm-memory"] = u.CPU.String(), strconv.FormatInt(u.HostPrivate, 10)
		}
	}
	if r.HostConfig.LogConfig.Type != "none" {
		out.LogPath = e.logPath(r)
	}
	out.GraphDriver = e.graphDriver(ctx, r)
	out.Storage = &storage.Storage{RootFS: &storage.RootFSStorage{Snapshot: &storage.RootFSStorageSnapshot{Name: "overlayfs"}}}
	if size {
		rw, root := e.sizes(ctx, c)
		out.SizeRw, out.SizeRootFs = &rw, &root
	}
	return out, nil
}

func (c *ctr) execIDs() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var ids []string
	for id, x := range c.execs {
		x.mu.Lock()
		if x.exit == nil {
			ids = append(ids, id)
		}
		x.mu.Unlock()
	}
	slices.Sort(ids)
	return ids
}

// shownFacts are annotations that inspect alone writes; they are taken from
// nobody.
var shownFacts = []string{"tenon.isolation", "tenon.boot-id", "tenon.kernel", "tenon.machine", "tenon.vmm-pid", "tenon.accel", "tenon.kernel-log",
	"tenon.vm-cpu", "tenon.vm-memory"}

func (e *Engine) shownHostConfig(r *container.Record) *mobycontainer.HostConfig {
	h := *r.HostConfig
	h.Annotations = map[string]string{}
	maps.Copy(h.Annotations, r.HostConfig.Annotations)
	h.Annotations["tenon.isolation"] = r.Isolation
	if r.Facts.BootID != "" {
		h.Annotations["tenon.boot-id"] = r.Facts.BootID
	}
	if h.PidsLimit == nil && e.def.Pids > 0 { // in force, though nobody asked for it
		n := e.def.Pids
		h.PidsLimit = &n
	}
	m := r.Facts.Machine
	switch {
	case !r.Running():
	case m == nil:
		h.Annotations["tenon.kernel"] = e.cfg.Kernel.Facts().KernelRelease
	default:
		h.Annotations["tenon.kernel"], h.Annotations["tenon.machine"], h.Annotations["tenon.accel"] = m.Kernel, m.ID, m.Accel
		h.Annotations["tenon.vmm-pid"], h.Annotations["tenon.kernel-log"] = strconv.Itoa(m.Pid), m.KernelLog
	}
	return &h
}

func (e *Engine) graphDriver(ctx context.Context, r *container.Record) *storage.DriverData {
	d := &storage.DriverData{Name: "overlayfs", Data: map[string]string{}}
	img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
	if err != nil {
		return d
	}
	if st, ok := e.cfg.Images.Lazy(ctx, img); ok {
		d.Data["Lazy"] = st.String()
		return d
	}
	if layers, err := e.cfg.Images.Layers(ctx, img); err == nil && len(layers) > 0 {
		list := layers[0]
		for _, l := range layers[1:] {
			list += ":" + l
		}
		d.Data["LowerDir"] = list
	}
	return d
}
