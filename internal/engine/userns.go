package engine

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/moby/api/types/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/userns"
)

// UserNS are the settings of containers' user namespaces.
type UserNS struct {
	// Auto gives one to every container that asks for nothing.
	Auto bool
	// Pool are the host ids that ranges are taken from.
	Pool []userns.Range
}

// usernsProbe is a user namespace by which the engine asks the kernel what can
// be mapped.
type usernsProbe struct {
	mu    sync.Mutex
	ns    *userns.Namespace
	roots bool // they can be made with it
}

// get makes the probe once.
func (p *usernsProbe) get(e *Engine) (*userns.Namespace, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ns != nil {
		return p.ns, nil
	}
	if err := e.haveIDs(); err != nil {
		return nil, err
	}
	ns, err := userns.New(userns.Range{Start: e.cfg.UserNS.Pool[0].Start, Size: userns.MinSize}, false)
	if err != nil {
		return nil, err
	}
	p.ns = ns
	return ns, nil
}

// checkRoots makes sure that roots can be made with the probe.
func (p *usernsProbe) checkRoots(e *Engine) error {
	ns, err := p.get(e)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.roots {
		return nil
	}
	for _, dir := range []string{"images", "containers"} {
		if err := ns.OverlayMappable(filepath.Join(e.cfg.Root, dir)); err != nil {
			return fmt.Errorf("user namespaces: %w; use --userns host, or put --root on ext4, xfs, btrfs or tmpfs", err)
		}
	}
	p.roots = true
	return nil
}

func (p *usernsProbe) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ns.Close()
	p.ns = nil
}

// planUserNS decides about a new container's user namespace, and refuses what
// cannot work with it. The ids themselves are taken by takeIDs.
func (e *Engine) planUserNS(r *container.Record) error {
	h := r.HostConfig
	m, err := spec.ParseUserNS(string(h.UsernsMode))
	if err != nil {
		return err
	}
	peers := map[string]string{}
	for what, mode := range map[string]string{"network": string(h.NetworkMode), "PID": string(h.PidMode), "IPC": string(h.IpcMode)} {
		if id, ok := strings.CutPrefix(mode, "container:"); ok {
			peers[what] = id
		}
	}
	whats := slices.Sorted(maps.Keys(peers))
	size, of := m.Size, ""
	switch m.Kind {
	case spec.UserNSHost:
		return nil
	case spec.UserNSDefault:
		switch {
		case len(whats) > 0: // who shares other namespaces shares this one
			of = peers[whats[0]]
		case e.cfg.UserNS.Auto:
			size = spec.UserNSSize
		default:
			return nil
		}
	case spec.UserNSShared:
		of = m.Container
	}
	if of != "" {
		c, err := e.find(of)
		if err != nil {
			return invalid("No such container: %s", of)
		}
		if r.UserNS = c.record().UserNS; r.UserNS == nil { // the host's, like that container
			return nil
		}
		r.UserNSOf = c.id
	} else {
		r.UserNS = &userns.Range{Size: size} // Start by takeIDs
	}
	if err := e.checkUserNS(r); err != nil {
		return err
	}
	for id := range strings.SplitSeq(r.Config.User, ":") { // of names the start speaks
		if n, err := strconv.ParseUint(id, 10, 32); err == nil {
			if err := inUserNS(r, uint32(n)); err != nil {
				return err
			}
		}
	}
	for _, what := range whats {
		c, err := e.find(peers[what])
		if err != nil {
			return invalid("No such container: %s", peers[what])
		}
		if p := c.record().UserNS; p == nil || *p != *r.UserNS {
			return invalid("cannot share the %s namespace of container %s, which has another user namespace: use --userns container:%s or --userns host", what, c.record().Name, c.record().Name)
		}
	}
	return nil
}

// checkUserNS refuses what no container in a user namespace can have.
func (e *Engine) checkUserNS(r *container.Record) error {
	h := r.HostConfig
	switch {
	case h.Privileged:
		return invalid("privileged mode is incompatible with user namespaces.  You must run the container in the host namespace when running privileged mode (--userns host)")
	case h.NetworkMode.IsHost():
		return invalid("cannot share the host's network namespace when user namespaces are enabled (use --userns host)")
	case h.PidMode.IsHost():
		return invalid("cannot share the host PID namespace when user namespaces are enabled (use --userns host)")
	case h.IpcMode.IsHost():
		return invalid("cannot share the host IPC namespace when user namespaces are enabled (use --userns host)")
	case h.Runtime != "" && h.Runtime != "tenon":
		return invalid("runtime %s gets no user namespace: use --userns host, or Tenon's own runtime", h.Runtime)
	}
	if onHost(r) {
		return e.idmaps.checkRoots(e)
	}
	if err := userns.OverlayRelease(e.factsOf(r.Isolation).KernelRelease); err != nil {
		return fmt.Errorf("user namespaces: %w; use --userns host, or another vm.kernel", err)
	}
	return e.haveIDs()
}

// haveIDs refuses user namespaces where the settings name no ids.
func (e *Engine) haveIDs() error {
	if len(e.cfg.UserNS.Pool) == 0 {
		return invalid("user namespaces: the settings name no host ids (userns.pool)")
	}
	return nil
}

// checkUserNSMounts refuses a new container's mounts that cannot have its ids.
func (e *Engine) checkUserNSMounts(r *container.Record) error {
	if r.UserNS == nil {
		return nil
	}
	for i := range r.Mounts {
		m := &r.Mounts[i]
		switch m.Propagation {
		case mount.PropagationShared, mount.PropagationRShared:
			return invalid("%s: mounts of a container in a user namespace cannot propagate to the host: use --userns host", m.Destination)
		}
		if m.Type != mount.TypeBind {
			continue
		}
		if _, err := os.Lstat(m.Source); err != nil {
			continue // made or refused later
		}
		if _, err := e.mapBind(r, m, m.Source, true); err != nil {
			return err
		}
	}
	return nil
}

// mapBind says by which option the ids of a bind are mapped, "" for none. On a machine
// whoever serves it maps them, but what the host's kernel can't map is refused there, too.
func (e *Engine) mapBind(r *container.Record, m *container.Mount, source string, recursive bool) (string, error) {
	if slices.Contains(strings.Split(m.Mode, ","), "noidmap") {
		return "", nil
	}
	ns, err := e.idmaps.get(e)
	if err != nil && !onHost(r) { // a host without user namespaces: nobody can ask it
		return "idmap", nil
	}
	if err != nil {
		return "", err
	}
	if recursive && ns.Mappable(source, true) == nil {
		return "ridmap", nil
	}
	if err := ns.Mappable(source, false); err != nil {
		return "", invalid("cannot mount %s in a user namespace: %v; use --userns host, or -v %s:%s:noidmap, where its files belong to nobody", source, err, m.Source, m.Destination)
	}
	return "idmap", nil
}

// takeIDsLocked gives a new container its host ids; e.mu is held, and r is not
// published yet.
func (e *Engine) takeIDsLocked(r *container.Record) error {
	if r.UserNS == nil || r.UserNSOf != "" {
		return nil
	}
	var used []userns.Range
	for _, c := range e.ctrs {
		if u := c.record().UserNS; u != nil {
			used = append(used, *u)
		}
	}
	got, err := userns.Allocate(e.cfg.UserNS.Pool, used, r.UserNS.Size)
	if err != nil {
		return err
	}
	r.UserNS = &got
	return nil
}

// prepareUserNS makes the user namespace of a start and the network namespace
// that belongs to it, or finds the shared one. Nothing for a container of the host's.
func (e *Engine) prepareUserNS(ctx context.Context, r *container.Record, p *prepared, q *network.Request) (err error) {
	if r.UserNS == nil {
		return nil
	}
	if err := e.haveIDs(); err != nil {
		return err
	}
	net := q.Mode == network.ModeBridge || q.Mode == network.ModeNone
	if r.UserNSOf == "" {
		if p.userns, err = userns.New(*r.UserNS, net); err != nil {
			return err
		}
		p.usernsPath = p.userns.Path()
	} else {
		peer, err := e.peer(r, r.UserNSOf, "user namespace")
		if err != nil {
			return err
		}
		p.usernsPath = e.cfg.Kernel.NamespacePath(peer.Facts.Pid, specs.UserNamespace)
		if net {
			if p.userns, err = userns.NewNet(ctx, p.usernsPath); err != nil {
				return err
			}
		}
	}
	if net {
		q.Namespace = p.userns.Net
	}
	return nil
}

// mapMounts gives the container's ids to what is mounted in it.
func (e *Engine) mapMounts(r *container.Record, p *prepared) error {
	if r.UserNS == nil {
		return nil
	}
	for i := range p.root.Mounts {
		m := &p.root.Mounts[i]
		m.Options = append(slices.Clone(m.Options), "idmap")
		if at := p.root.MappedAt(); at != "" {
			m.Options = append(m.Options, at)
		}
	}
	for i := range p.mounts {
		s := &p.mounts[i]
		switch s.Type {
		case "bind":
			o, err := e.mapBind(r, mountOf(r, s), s.Source, slices.Contains(s.Options, "rbind"))
			if err != nil {
				return err
			}
			if o != "" {
				s.Options = append(slices.Clone(s.Options), o)
			}
		case "overlay":
			s.Options = append(slices.Clone(s.Options), "idmap")
		case "tmpfs":
		default:
			return invalid("volume on %s: a file system of type %s cannot be mounted in a user namespace: use --userns host", s.Destination, s.Type)
		}
	}
	root := int(r.UserNS.Start)
	for _, f := range p.files {
		if r.HostConfig.NetworkMode.IsContainer() {
			break // its own
		}
		if err := os.Chown(f.Source, root, root); err != nil {
			return fmt.Errorf("container's files: %w", err)
		}
	}
	if p.shm != "" && !r.HostConfig.IpcMode.IsContainer() {
		if err := os.Chown(p.shm, root, root); err != nil {
			return fmt.Errorf("shared memory: %w", err)
		}
	}
	return nil
}

// mountOf is what a record says of a mount.
func mountOf(r *container.Record, s *spec.Mount) *container.Mount {
	for i := range r.Mounts {
		if path.Clean(r.Mounts[i].Destination) == path.Clean(s.Destination) {
			return &r.Mounts[i]
		}
	}
	return &container.Mount{Source: s.Source, Destination: s.Destination}
}

// mapMachine gives the ids of a container on a machine to what it gets there.
func (e *Engine) mapMachine(r *container.Record, p *prepared, h *sandbox.MachineHandover) error {
	if r.UserNS == nil {
		return nil
	}
	if err := e.haveIDs(); err != nil {
		return err
	}
	h.UserNS = &sandbox.UserNS{Range: *r.UserNS, Path: p.userPeer}
	for i := range p.files {
		h.Files[i].Owner = r.UserNS.Start
	}
	shares := h.Shares
	for i := range p.mounts {
		s := &p.mounts[i]
		if s.Type != "bind" {
			continue
		}
		o, err := e.mapBind(r, mountOf(r, s), s.Source, slices.Contains(s.Options, "rbind"))
		if err != nil {
			return err
		}
		if o != "" {
			shares[0].IDs = r.UserNS
		}
		shares = shares[1:]
	}
	return nil
}

// usernsInput adds the user namespace to what the specification is made of.
func usernsInput(in *spec.Input, r *container.Record, p *prepared) error {
	if r.UserNS == nil {
		return nil
	}
	in.UIDMap = []specs.LinuxIDMapping{{ContainerID: 0, HostID: r.UserNS.Start, Size: r.UserNS.Size}}
	in.GIDMap, in.UserNS = in.UIDMap, p.usernsPath
	return inUserNS(r, append([]uint32{in.User.UID, in.User.GID}, in.User.Additional...)...)
}

// inUserNS refuses ids that have no place in the container's user namespace.
func inUserNS(r *container.Record, ids ...uint32) error {
	if r.UserNS == nil {
		return nil
	}
	if id := slices.Max(ids); id >= r.UserNS.Size {
		return invalid("id %d has no place in the container's user namespace, which has %d ids: use --userns auto:size=N", id, r.UserNS.Size)
	}
	return nil
}
