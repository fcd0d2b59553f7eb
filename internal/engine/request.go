package engine

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/layered"
	"tenon.dev/tenon/internal/rootfs"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
)

// taskRequest turns everything into what the shim is asked for.
func (e *Engine) taskRequest(c *ctr, rn *run, p *prepared) (task.CreateRequest, error) {
	r := c.record()
	if isSystem(r) {
		return e.systemTask(c, rn)
	}
	req := task.CreateRequest{
		ID: c.id, Rootfs: p.kernel.Rootfs, Terminal: r.Config.Tty, Stdin: r.Config.OpenStdin, StdinOnce: r.Config.StdinOnce,
		ConsoleHeight: uint32(r.HostConfig.ConsoleSize[0]), ConsoleWidth: uint32(r.HostConfig.ConsoleSize[1]),
		Owner: ownerOf(r.ID, rn.n),
	}
	var err error
	if req.Log, err = e.logSettings(r); err != nil {
		return req, err
	}
	if req.Log != nil {
		if err := os.MkdirAll(filepath.Dir(req.Log.Path), 0o700); err != nil {
			return req, fmt.Errorf("container log: %w", err)
		}
	}
	rt, err := e.runtimeOf(r.HostConfig)
	if err != nil {
		return req, err
	}
	req.Runtime, req.RuntimeArgs = rt.Path, rt.Args
	in, err := e.specInput(r, p)
	if err != nil {
		return req, err
	}
	s, err := spec.Build(in)
	if err != nil {
		return req, err
	}
	if err := e.injectDevices(s, r.HostConfig.DeviceRequests); err != nil {
		return req, err
	}
	req.Spec, err = spec.Encode(s)
	return req, err
}

func ownerOf(_ string, n uint64) string { return fmt.Sprintf("run %d", n) }

func (e *Engine) specInput(r *container.Record, p *prepared) (spec.Input, error) {
	h := *r.HostConfig
	if ownHost(r) {
		h.NetworkMode = "bridge"
	}
	if !onHost(r) && h.IpcMode.IsHost() {
		p.shm = "/dev/shm"
	}
	res, err := e.numberDevices(&h.Resources, p.disks)
	if err != nil {
		return spec.Input{}, err
	}
	h.Resources = *res
	facts, kernel := e.factsOf(r.Isolation), p.on
	in := spec.Input{
		ID: r.ID, Config: r.Config, HostConfig: &h, Defaults: e.defaultsOf(r.Isolation), LinkEnv: e.linkEnv(r),
		NetReady: p.ns.Path != "" || !onHost(r) && p.kernel.NetNS != "",
		Mounts:   append(p.files, p.mounts...), NetNS: p.kernel.NetNS, ShmSource: p.shm,
		CgroupPath: e.cgroupPath(r), CgroupV2: facts.CgroupV2, Capabilities: facts.Capabilities,
	}
	if !h.UTSMode.IsHost() {
		in.Hostname = r.Config.Hostname
	}
	in.Mounts = withoutShadowed(in.Mounts, p.mounts)
	if h.NetworkMode.IsContainer() {
		if peer, err := e.peer(r, h.NetworkMode.ConnectedContainer(), "network"); err == nil {
			in.Hostname = peer.Config.Hostname
		}
	}
	if in.User, err = e.resolveUser(p.root, p.accounts, r.Config.User, h.GroupAdd); err != nil {
		return in, err
	}
	if err := usernsInput(&in, r, p); err != nil {
		return in, err
	}
	if !onHost(r) {
		in.Devices, in.AllDevices = p.devices, p.allDevices
	} else if in.Devices, err = e.planDevices(r.HostConfig); err != nil {
		return in, err
	}
	if h.Privileged && onHost(r) {
		if in.AllDevices, err = kernel.AllDevices(); err != nil {
			return in, err
		}
	}
	// Only the first process of a pid namespace is left the orphans.
	if in.Init = p.init; h.Init != nil && *h.Init && p.init == "" && !h.PidMode.IsHost() && !h.PidMode.IsContainer() {
		if in.Init, err = kernel.Init(); err != nil {
			return in, err
		}
	}
	if h.PidMode.IsContainer() {
		peer, err := e.peer(r, h.PidMode.Container(), "PID namespace")
		if err != nil {
			return in, err
		}
		in.PidNS = kernel.NamespacePath(p.pidOf(peer), specs.PIDNamespace)
	}
	if h.IpcMode.IsContainer() {
		peer, err := e.peer(r, h.IpcMode.Container(), "IPC")
		if err != nil {
			return in, err
		}
		in.IpcNS = kernel.NamespacePath(p.pidOf(peer), specs.IPCNamespace)
	}
	return in, nil
}

// withoutShadowed drops the engine's own files where the user mounts there.
func withoutShadowed(all, user []spec.Mount) []spec.Mount {
	taken := map[string]bool{}
	for _, m := range user {
		taken[m.Destination] = true
	}
	var out []spec.Mount
	for _, m := range all {
		if !m.Engine || !taken[m.Destination] {
			out = append(out, m)
		}
	}
	return out
}

func (e *Engine) cgroupPath(r *container.Record) string {
	parent := r.HostConfig.CgroupParent
	if parent == "" {
		parent = e.cfg.Name
	}
	return "/" + strings.Trim(parent, "/") + "/" + r.ID
}

// resolveUser looks in the container's own /etc/passwd and /etc/group, without
// its being mounted, unless they have been read.
func (e *Engine) resolveUser(root *rootfs.Root, a *accounts, text string, groupAdd []string) (spec.User, error) {
	if a != nil {
		return spec.ResolveUser(text, groupAdd, a.passwd, a.group)
	}
	a, err := e.known.of(root)
	if err != nil {
		return spec.User{}, err
	}
	return spec.ResolveUser(text, groupAdd, a.passwd, a.group)
}

func readAccounts(s layered.Stack, name string) ([]byte, error) {
	f, err := s.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, nil // a directory, or links without end: an image without accounts
	}
	defer f.Close()
	b, err := spec.ReadAccounts(io.Reader(f))
	if err != nil {
		return nil, invalid("the image's %s: %v", name, err)
	}
	return b, nil
}
