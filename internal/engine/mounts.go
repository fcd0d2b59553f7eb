package engine

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/safepath"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/volume"
)

// planMounts resolves everything that asks for a mount: --volumes-from, -v,
// --mount, --tmpfs and the image's volumes, in the order of increasing right.
// It has no side effects.
func (e *Engine) planMounts(r *container.Record, tenant bool) ([]container.Mount, error) {
	at := map[string]container.Mount{}
	for _, from := range r.HostConfig.VolumesFrom {
		ms, err := e.volumesFrom(from)
		if err != nil {
			return nil, err
		}
		for _, m := range ms {
			at[m.Destination] = m
		}
	}
	own := map[string]bool{}
	add := func(m container.Mount) error {
		if own[m.Destination] {
			return invalid("Duplicate mount point: %s", m.Destination)
		}
		own[m.Destination] = true
		at[m.Destination] = m
		return nil
	}
	for _, b := range r.HostConfig.Binds {
		m, err := parseBind(b, r.HostConfig.VolumeDriver)
		if err == nil {
			err = add(m)
		}
		if err != nil {
			return nil, err
		}
	}
	for i := range r.HostConfig.Mounts {
		m, err := e.parseMount(r.HostConfig.Mounts[i])
		if err == nil {
			err = add(m)
		}
		if err != nil {
			return nil, err
		}
	}
	tmpfs := map[string]bool{}
	for dest, opts := range r.HostConfig.Tmpfs {
		dest, err := destination(dest)
		if err != nil {
			return nil, err
		}
		if own[dest] {
			return nil, invalid("Duplicate mount point: %s", dest)
		}
		tmpfs[dest] = true
		delete(at, dest)
		if _, err := spec.CheckTmpfs(opts); err != nil {
			return nil, err
		}
	}
	for dest := range r.Config.Volumes {
		dest, err := destination(dest)
		if err != nil {
			return nil, err
		}
		if _, ok := at[dest]; ok || tmpfs[dest] {
			continue
		}
		at[dest] = container.Mount{Type: mount.TypeVolume, Destination: dest, RW: true, Driver: "local", Anonymous: true}
	}
	out := make([]container.Mount, 0, len(at))
	for _, m := range at {
		if err := e.checkSource(&m, tenant); err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Destination < out[j].Destination })
	return out, nil
}

// checkSource refuses a --mount whose source is not there; -v makes it later. A
// tenant is not told what is there: its mounts are looked at when they are allowed.
func (e *Engine) checkSource(m *container.Mount, tenant bool) error {
	if m.Type == mount.TypeBind && !m.Create && !tenant {
		if err := e.cfg.Kernel.BindSource(m.Source, false); err != nil {
			return invalid("invalid mount config for type \"bind\": %v", err)
		}
	}
	return nil
}

func destination(d string) (string, error) {
	if !path.IsAbs(d) {
		return "", invalid("invalid mount path: '%s' mount path must be absolute", d)
	}
	if d = path.Clean(d); d == "/" {
		return "", invalid("invalid mount path: destination can't be '/'")
	}
	return d, nil
}

// parseBind reads -v's SOURCE:DESTINATION[:MODE] or DESTINATION.
func parseBind(text, driver string) (container.Mount, error) {
	m := container.Mount{RW: true}
	parts := strings.Split(text, ":")
	if len(parts) > 3 || slices.Contains(parts, "") {
		return m, invalid("invalid volume specification: '%s'", text)
	}
	dest := parts[0]
	if len(parts) > 1 {
		m.Source, dest = parts[0], parts[1]
	}
	var err error
	if m.Destination, err = destination(dest); err != nil {
		return m, invalid("invalid volume specification: '%s': %v", text, err)
	}
	if len(parts) == 3 {
		m.Mode = parts[2]
		if err := bindMode(&m, text); err != nil {
			return m, err
		}
	}
	switch {
	case m.Source == "":
		m.Type, m.Driver, m.Anonymous = mount.TypeVolume, "local", true
	case filepath.IsAbs(m.Source):
		m.Type, m.Source, m.Create = mount.TypeBind, filepath.Clean(m.Source), true
		if m.NoCopy {
			return m, invalid("invalid mode: %s", m.Mode)
		}
		if m.Propagation == "" {
			m.Propagation = mount.PropagationRPrivate
		}
	default:
		m.Type, m.Name, m.Source = mount.TypeVolume, m.Source, ""
		if m.Driver = driver; m.Driver == "" {
			m.Driver = "local"
		}
		if m.Propagation != "" {
			return m, invalid("invalid volume specification: '%s': propagation is for host directories", text)
		}
		if strings.HasPrefix(m.Name, ".") || strings.Contains(m.Name, "/") {
			return m, invalid("invalid volume specification: '%s': %q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path", text, m.Name)
		}
	}
	return m, nil
}

func bindMode(m *container.Mount, text string) error {
	seen := map[string]bool{}
	once := func(kind string) error {
		if seen[kind] {
			return invalid("invalid mode: %s", m.Mode)
		}
		seen[kind] = true
		return nil
	}
	for _, o := range strings.Split(m.Mode, ",") {
		var err error
		switch o {
		case "ro", "rw":
			err = once("rw")
			m.RW = o == "rw"
		case "z", "Z": // relabels where SELinux is; here it is not
			err = once("label")
		case "nocopy":
			err = once("copy")
			m.NoCopy = true
		case "idmap", "noidmap": // in a user namespace; idmapped is the default
			err = once("idmap")
		case "consistent", "cached", "delegated":
			err = once("consistency")
		case "private", "rprivate", "shared", "rshared", "slave", "rslave":
			err = once("propagation")
			m.Propagation = mount.Propagation(o)
		default:
			err = invalid("invalid mode: %s", m.Mode)
		}
		if err != nil {
			return fmt.Errorf("invalid volume specification: '%s': %w", text, err)
		}
	}
	return nil
}

// parseMount reads one --mount.
func (e *Engine) parseMount(s mount.Mount) (container.Mount, error) {
	m := container.Mount{Type: s.Type, RW: !s.ReadOnly, Spec: &s}
	bad := func(format string, args ...any) error {
		return invalid("invalid mount config for type %q: "+format, append([]any{s.Type}, args...)...)
	}
	var err error
	if s.Target == "" {
		return m, bad("field Target must not be empty")
	}
	if m.Destination, err = destination(s.Target); err != nil {
		return m, bad("%v", err)
	}
	switch s.Type {
	case mount.TypeBind:
		if s.Source == "" {
			return m, bad("field Source must not be empty")
		}
		if !filepath.IsAbs(s.Source) {
			return m, bad("invalid mount path: '%s' mount path must be absolute", s.Source)
		}
		if s.VolumeOptions != nil || s.TmpfsOptions != nil || s.ImageOptions != nil {
			return m, bad("options of another type must not be specified")
		}
		m.Source, m.Bind, m.Propagation = filepath.Clean(s.Source), s.BindOptions, mount.PropagationRPrivate
		if b := s.BindOptions; b != nil {
			m.Create = b.CreateMountpoint
			if b.Propagation != "" {
				m.Propagation = b.Propagation
			}
			if !slices.Contains(mount.Propagations, m.Propagation) {
				return m, bad("invalid propagation mode %q", b.Propagation)
			}
			if b.ReadOnlyNonRecursive && !s.ReadOnly || b.ReadOnlyForceRecursive && !s.ReadOnly {
				return m, bad("mount must be read-only for recursive read-only options")
			}
		}
	case mount.TypeVolume:
		if s.BindOptions != nil || s.TmpfsOptions != nil || s.ImageOptions != nil {
			return m, bad("options of another type must not be specified")
		}
		m.Name, m.Driver, m.Anonymous = s.Source, "local", s.Source == ""
		if v := s.VolumeOptions; v != nil {
			m.NoCopy, m.SubPath = v.NoCopy, v.Subpath
			if v.DriverConfig != nil && v.DriverConfig.Name != "" {
				m.Driver = v.DriverConfig.Name
			}
			if v.Subpath != "" && (!filepath.IsLocal(v.Subpath)) {
				return m, bad("subpath must be a relative path within the volume")
			}
			if v.Subpath != "" && s.Source == "" {
				return m, bad("must not set Subpath when using anonymous volumes")
			}
		}
	case mount.TypeTmpfs:
		if s.Source != "" {
			return m, bad("field Source must not be specified")
		}
		if s.BindOptions != nil || s.VolumeOptions != nil || s.ImageOptions != nil {
			return m, bad("options of another type must not be specified")
		}
		m.TmpfsOpts = s.TmpfsOptions
		if _, err := spec.CheckTmpfs(strings.Join(spec.TmpfsOptions(s.TmpfsOptions), ",")); err != nil {
			return m, err
		}
	case mount.TypeImage:
		if err := e.parseImageMount(&m, bad); err != nil {
			return m, err
		}
	default:
		return m, invalid("mount type unknown: %q", s.Type)
	}
	return m, nil
}

// volumesFrom returns another container's mounts.
func (e *Engine) volumesFrom(text string) ([]container.Mount, error) {
	ref, mode, _ := strings.Cut(text, ":")
	if mode != "" && mode != "ro" && mode != "rw" && mode != "z" && mode != "Z" {
		return nil, invalid("invalid mode %s: invalid volumes-from specification: '%s'", mode, text)
	}
	c, err := e.find(ref)
	if err != nil {
		return nil, invalid("No such container: %s", ref)
	}
	var out []container.Mount
	for _, m := range c.record().Mounts {
		if m.Type == mount.TypeTmpfs {
			continue
		}
		m.Anonymous = false // it belongs to the other container
		m.RW = m.RW && mode != "ro"
		m.NoCopy = true
		out = append(out, m)
	}
	return out, nil
}

// resolveVolumes makes the volumes that a new container's mounts name.
// Those that a tenant's container makes, and anonymous ones of any on a machine,
// are the machine's.
func (e *Engine) resolveVolumes(ctx context.Context, r *container.Record, tenant string, u *undo) error {
	for i := range r.Mounts {
		m := &r.Mounts[i]
		if m.Type != mount.TypeVolume || m.Source != "" {
			continue
		}
		o := volume.CreateOptions{Name: m.Name, Driver: m.Driver, Owner: r.ID}
		if m.Spec != nil && m.Spec.VolumeOptions != nil {
			o.Labels = m.Spec.VolumeOptions.Labels
			if d := m.Spec.VolumeOptions.DriverConfig; d != nil {
				o.Options = d.Options
			}
		}
		if name := machine.Named(r.Isolation); tenant != "" || name != "" && m.Name == "" {
			o.Labels = maps.Clone(o.Labels)
			if o.Labels == nil {
				o.Labels = map[string]string{}
			}
			o.Labels[MachineLabel] = name
		}
		_, err := e.cfg.Volumes.Get(m.Name)
		existed := m.Name != "" && err == nil
		v, err := e.cfg.Volumes.Create(ctx, o)
		if err != nil {
			return err
		}
		if tenant != "" && v.Labels[MachineLabel] != tenant { // made by others since it was looked at
			return Denied(tenant, "the volume %s belongs to others", v.Name)
		}
		if !existed {
			name := v.Name
			u.add("volume "+name, func(ctx context.Context) error { return e.cfg.Volumes.Remove(ctx, name) })
			if err := e.tenantVolumes(tenant); err != nil {
				return err
			}
			e.emitVolume(v.Name, events.ActionCreate, map[string]string{"driver": "local"})
		}
		m.Name, m.Driver, m.Source = v.Name, "local", e.cfg.Volumes.Path(v.Name)
	}
	return nil
}

// specMounts turns a record's mounts into the specification's, making missing
// source directories of -v.
func (e *Engine) specMounts(r *container.Record) ([]spec.Mount, error) {
	var out []spec.Mount
	for i := range r.Mounts {
		m := &r.Mounts[i]
		s, err := e.specMount(m, onHost(r))
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	for dest, opts := range r.HostConfig.Tmpfs {
		o, err := spec.CheckTmpfs(opts)
		if err != nil {
			return nil, err
		}
		out = append(out, spec.Mount{Type: "tmpfs", Source: "tmpfs", Destination: path.Clean(dest), Options: o})
	}
	return out, nil
}

func (e *Engine) specMount(m *container.Mount, host bool) (spec.Mount, error) {
	s := spec.Mount{Destination: m.Destination, ReadOnly: !m.RW, Propagation: m.Propagation}
	switch m.Type {
	case mount.TypeBind:
		if m.Within == "" {
			if err := e.cfg.Kernel.BindSource(m.Source, m.Create); err != nil {
				return s, err
			}
		} else if f, err := openWithin(m.Within, m.Source); err != nil { // holdMounts keeps it open for a guest
			return s, err
		} else {
			f.Close()
		}
		s.Type, s.Source, s.Recursive, s.Options = "bind", m.Source, true, []string{"rbind"}
		if b := m.Bind; b != nil {
			if b.NonRecursive {
				s.Options, s.Recursive = []string{"bind"}, false
			}
			if b.ReadOnlyNonRecursive {
				s.Recursive = false
			}
		}
	case mount.TypeImage:
		if !host {
			return e.guestImageMount(m)
		}
		return e.imageMount(m)
	case mount.TypeTmpfs:
		s.Type, s.Source, s.Options, s.Propagation = "tmpfs", "tmpfs", spec.TmpfsOptions(m.TmpfsOpts), ""
	case mount.TypeVolume:
		v, err := e.cfg.Volumes.Mount(m.Name)
		if err != nil {
			return s, err
		}
		s.Type, s.Source, s.Options = v.Type, v.Source, v.Options
		if m.SubPath != "" {
			if s.Type != "bind" {
				return s, invalid("volume %s: subpaths work for directories only", m.Name)
			}
			// Whoever mounts looks it up again: this is for the error's sake.
			f, err := openSubPath(m, s.Source)
			if err != nil {
				return s, err
			}
			f.Close()
			s.Beneath = m.SubPath
		}
	}
	return s, nil
}

// openSubPath opens (O_PATH) what a mount names in its volume, whose files are at
// source; links lead nowhere out of it.
func openSubPath(m *container.Mount, source string) (*os.File, error) {
	root, err := os.OpenFile(source, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", m.Name, err)
	}
	defer root.Close()
	f, err := safepath.OpenBeneath(root, m.SubPath, unix.O_PATH, 0)
	if err != nil {
		return nil, invalid("cannot access path %s in volume %s: %v", m.SubPath, m.Name, err)
	}
	return f, nil
}
