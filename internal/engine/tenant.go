package engine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/spec"
)

// A tenant is a client of a machine's own socket. It may do what it likes on its
// machine, and nothing else: package tenant scopes what it names, and here is what
// its containers may be made of. It is checked on the record, where everything is
// resolved.

// Denied is an error for what a tenant may not have.
func Denied(name, format string, args ...any) error {
	return errdefs.ErrPermissionDenied.WithMessage(fmt.Sprintf(format, args...) + fmt.Sprintf(" (this is the socket of machine %s; nothing was done)", name))
}

// TenantLimits are how many a machine's tenants may have. 0: any number.
type TenantLimits struct{ Containers, Networks, Volumes int }

// TenantLimits are those that hold here.
func (e *Engine) TenantLimits() TenantLimits { return e.cfg.Tenants }

// TooMany is an error for one more of what a tenant has too many of.
func TooMany(name, what string, most int) error {
	return Denied(name, "there are %d %s, and may be no more: tenants.%s in the daemon's settings", most, what, what)
}

// tenantContainers refuses a registered container of a tenant that is one too many.
func (e *Engine) tenantContainers(name string) error {
	most := e.cfg.Tenants.Containers
	if name == "" || most == 0 {
		return nil
	}
	n := 0
	for _, c := range e.all() {
		n += boolInt(c.record().Isolation == machine.Prefix+name)
	}
	if n > most {
		return TooMany(name, "containers", most)
	}
	return nil
}

// tenantVolumes is tenantContainers for a volume that was made.
func (e *Engine) tenantVolumes(name string) error {
	most := e.cfg.Tenants.Volumes
	if name == "" || most == 0 {
		return nil
	}
	n := 0
	for _, v := range e.cfg.Volumes.List() {
		n += boolInt(v.Labels[MachineLabel] == name)
	}
	if n > most {
		return TooMany(name, "volumes", most)
	}
	return nil
}

// TenantContainer is the ID of a container of a machine, by name, ID or unique ID
// prefix among those of that machine alone. NotFound.
func (e *Engine) TenantContainer(name, ref string) (string, error) {
	ref = strings.TrimPrefix(ref, "/")
	iso, found := machine.Prefix+name, ""
	for _, c := range e.all() {
		r := c.record()
		if r.Isolation != iso || ref == "" {
			continue
		}
		if r.Name == ref || r.ID == ref {
			return r.ID, nil
		}
		if strings.HasPrefix(r.ID, ref) {
			if found != "" {
				return "", invalid("Multiple IDs found with provided prefix: %s", ref)
			}
			found = r.ID
		}
	}
	if found == "" {
		return "", notFound("No such container: %s", ref)
	}
	return found, nil
}

// tenantIsolation is the kernel of a tenant's containers: its machine's.
func tenantIsolation(name string, asked mobycontainer.Isolation) (mobycontainer.Isolation, error) {
	own := mobycontainer.Isolation(machine.Prefix + name)
	iso, err := spec.Isolation(asked)
	if err != nil {
		return "", err
	}
	if iso != "" && iso != string(own) {
		return "", Denied(name, "isolation %s can't be had here: containers run on this machine", iso)
	}
	return own, nil
}

// checkTenant refuses what would give a tenant more than its machine, and ties
// what it mounts to where it may.
func (e *Engine) checkTenant(ctx context.Context, name string, r *container.Record) error {
	if name == "" {
		return nil
	}
	m := e.machOf(r)
	if m == nil || m.record().Name != name {
		return Denied(name, "isolation %s can't be had here", r.Isolation)
	}
	if u, err := spec.ParseUserNS(string(r.HostConfig.UsernsMode)); err == nil && u.Size > spec.UserNSSize {
		return Denied(name, "a user namespace of more than %d ids can't be had here", spec.UserNSSize)
	}
	for i := range r.Mounts {
		if err := e.checkTenantMount(m.record(), &r.Mounts[i]); err != nil {
			return err
		}
	}
	for net, ep := range r.Networks {
		own, err := e.tenantNetwork(ctx, name, net)
		if err != nil {
			return err
		}
		if !own && ep != nil && len(ep.MacAddress) > 0 {
			return Denied(name, "a hardware address on the network %s can't be chosen: others are on it", net)
		}
	}
	for _, l := range r.HostConfig.Links {
		target, _ := splitLink(l)
		if _, err := e.TenantContainer(name, target); err != nil {
			return invalid("could not get container for %s: No such container: %s", target, target)
		}
	}
	for _, v := range r.HostConfig.VolumesFrom {
		ref, _, _ := strings.Cut(v, ":")
		if _, err := e.TenantContainer(name, ref); err != nil {
			return invalid("No such container: %s", ref)
		}
	}
	return nil
}

// tenantPeers resolves the container: modes of a request among the tenant's own
// containers.
func (e *Engine) tenantPeers(name string, h *mobycontainer.HostConfig) error {
	if h == nil {
		return nil
	}
	for _, m := range []*string{(*string)(&h.NetworkMode), (*string)(&h.PidMode), (*string)(&h.IpcMode), (*string)(&h.UsernsMode)} {
		kind, ref, ok := strings.Cut(*m, ":")
		if !ok || kind != "container" {
			continue
		}
		id, err := e.TenantContainer(name, ref)
		if err != nil {
			return invalid("No such container: %s", ref)
		}
		*m = "container:" + id
	}
	return nil
}

// tenantNetwork says whether a network is a tenant's own. InvalidArgument if the
// tenant can't see it: clients take NotFound for a missing image.
func (e *Engine) tenantNetwork(ctx context.Context, name, ref string) (own bool, err error) {
	switch ref {
	case "none", "host": // of the machine's kernel
		return true, nil
	}
	n, err := e.cfg.Networks.Inspect(ctx, ref)
	switch {
	case err == nil && n.Labels[MachineLabel] == name:
		return true, nil
	case err == nil && n.Name == "bridge":
		return false, nil
	}
	return false, invalid("network %s not found", ref)
}

func (e *Engine) checkTenantMount(m *machine.Record, x *container.Mount) error {
	switch x.Type {
	case mount.TypeTmpfs:
		return nil
	case mount.TypeVolume:
		if s := x.Spec; s != nil && s.VolumeOptions != nil && s.VolumeOptions.DriverConfig != nil && len(s.VolumeOptions.DriverConfig.Options) > 0 {
			return Denied(m.Name, "a volume with driver options can't be had")
		}
		if x.Name == "" {
			return nil
		}
		if v, err := e.cfg.Volumes.Get(x.Name); err == nil && v.Labels[MachineLabel] != m.Name {
			return Denied(m.Name, "the volume %s belongs to others", x.Name)
		}
		return nil
	case mount.TypeBind:
		s, ok := m.Beneath(x.Source)
		switch {
		case !ok && len(m.Shares) == 0:
			return Denied(m.Name, "the host's %s can't be mounted: the machine has no shares", x.Source)
		case !ok:
			return Denied(m.Name, "the host's %s can't be mounted: it is not below a share of the machine", x.Source)
		case s.ReadOnly && x.RW:
			return Denied(m.Name, "the share %s is read-only: mount %s read-only", s.Path, x.Source)
		}
		x.Within, x.Create = s.Path, false
		f, err := openWithin(x.Within, x.Source)
		if err != nil {
			return invalid("invalid mount config for type \"bind\": %v", err)
		}
		f.Close()
		return nil
	}
	return Denied(m.Name, "a mount of type %s can't be had", x.Type)
}

// openWithin opens what a tenant mounts of a share: no link is followed on the way,
// since tenants can make some there.
func openWithin(share, source string) (*os.File, error) {
	// The share may lie in one of another machine.
	top, err := unix.Openat2(unix.AT_FDCWD, share, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open the share, without links,", Path: share, Err: err}
	}
	defer unix.Close(top)
	rel, err := filepath.Rel(share, source)
	if err != nil || !filepath.IsLocal(rel) {
		return nil, invalid("%s is not below the share %s", source, share)
	}
	fd, err := unix.Openat2(top, rel, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, fmt.Errorf("%s, below the share %s and without links: %w", source, share, err)
	}
	return os.NewFile(uintptr(fd), source), nil
}

// holdMounts opens what tenants mount of the host, and directories in volumes, so
// that what was looked at is what is mounted, whatever a guest does there meanwhile;
// it changes the sources of the mounts, which are the record's first. release is to
// be called once they are handed over.
func (e *Engine) holdMounts(r *container.Record, mounts []spec.Mount) (release func(), err error) {
	var held []*os.File
	release = func() {
		for _, f := range held {
			f.Close()
		}
	}
	for i := range r.Mounts {
		m := &r.Mounts[i]
		var f *os.File
		var err error
		switch {
		case m.Within != "":
			f, err = openWithin(m.Within, m.Source)
		case m.Type == mount.TypeVolume && m.SubPath != "":
			f, err = openSubPath(m, mounts[i].Source)
		default:
			continue
		}
		if err != nil {
			release()
			return nil, fmt.Errorf("mount at %s: %w", m.Destination, err)
		}
		held = append(held, f)
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Mode&unix.S_IFMT != unix.S_IFREG {
			release()
			return nil, invalid("mount at %s: its source is neither a directory nor a file", m.Destination)
		}
		mounts[i].Source, mounts[i].Beneath = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()), ""
	}
	return release, nil
}
