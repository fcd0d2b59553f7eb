package engine

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	mobyvolume "github.com/moby/moby/api/types/volume"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/layered"
	"tenon.dev/tenon/internal/safepath"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	"tenon.dev/tenon/internal/volume"
)

func (e *Engine) emitVolume(name string, action events.Action, attrs map[string]string) {
	if attrs == nil {
		attrs = map[string]string{"driver": "local"}
	}
	e.cfg.Events.Publish(events.Message{Type: events.VolumeEventType, Action: action, Actor: events.Actor{ID: name, Attributes: attrs}})
}

// volumesUsed sends the events of a container's volumes at its start and end.
func (e *Engine) volumesUsed(r *container.Record, start bool) {
	for _, m := range r.Mounts {
		switch {
		case m.Type != mount.TypeVolume:
		case start:
			e.emitVolume(m.Name, events.ActionMount, map[string]string{"driver": m.Driver, "container": r.ID, "destination": m.Destination,
				"read/write": strconv.FormatBool(m.RW), "propagation": string(m.Propagation)})
		default:
			e.emitVolume(m.Name, events.ActionUnmount, map[string]string{"driver": m.Driver, "container": r.ID})
		}
	}
}

// volumeUsers names the containers that use a volume, but for one.
func (e *Engine) volumeUsers(name, except string) []string {
	var out []string
	for _, c := range e.all() {
		if c.id == except {
			continue
		}
		for _, m := range c.record().Mounts {
			if m.Type == mount.TypeVolume && m.Name == name {
				out = append(out, c.id)
				break
			}
		}
	}
	return out
}

// populateVolumes gives volumes that are empty what the image has at their places.
func (e *Engine) populateVolumes(ctx context.Context, c *ctr, img *image.Image, u *undo) error {
	r := c.record()
	var layers []string
	for _, m := range r.Mounts {
		if m.Type != mount.TypeVolume || m.NoCopy || m.SubPath != "" {
			continue
		}
		v, err := e.cfg.Volumes.Get(m.Name)
		if err != nil {
			return err
		}
		vm, err := e.cfg.Volumes.Mount(m.Name)
		if err != nil {
			return err
		}
		if vm.Type != "bind" { // the container's kernel mounts it
			continue
		}
		if empty, err := emptyDir(vm.Source); err != nil || !empty {
			if errors.Is(err, fs.ErrNotExist) && len(v.Options) > 0 {
				continue // the start says so
			}
			if err != nil {
				return fmt.Errorf("volume %s: %w", v.Name, err)
			}
			continue
		}
		if layers == nil {
			if layers, _, err = e.cfg.Images.Root(ctx, img); err != nil {
				return err
			}
		}
		if err := e.populate(ctx, c, layers, m.Destination, v, vm.Source, u); err != nil {
			return fmt.Errorf("volume %s: copy the image's %s: %w", v.Name, m.Destination, err)
		}
	}
	return nil
}

// emptyDir tells whether a directory has no entries.
func emptyDir(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}

// populate copies an image's directory into an empty volume, and its owner, mode
// and attributes onto the volume's; those of an empty directory only once.
func (e *Engine) populate(ctx context.Context, c *ctr, layers []string, dest string, v *volume.Volume, dir string, u *undo) error {
	top, err := layered.Stack(layers).OpenDir(dest)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer top.Close()
	_, empty, err := layered.Stack(layers).IsDir(dest)
	if err != nil || empty && v.Populated {
		return err
	}
	if !empty {
		if err := e.copyUp(ctx, c, layers, dest, v.Name, dir, u); err != nil {
			return err
		}
	}
	to, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer to.Close()
	if err := safepath.CopyAttributes(to, top); err != nil {
		return err
	}
	if v.Populated {
		return nil
	}
	return e.cfg.Volumes.MarkPopulated(v.Name)
}

// copyUp copies the files.
func (e *Engine) copyUp(ctx context.Context, c *ctr, layers []string, dest, name, dir string, u *undo) error {
	client, err := e.shim.get(ctx)
	if err != nil {
		return err
	}
	from := task.Files{ID: c.id}
	if onHost(c.record()) {
		u.add("root file system", func(context.Context) error { return e.cfg.Roots.Remove(c.id) })
		root, err := e.rootOf(ctx, c.record())
		if err != nil {
			return err
		}
		from.Root = e.rootMessage(c.record(), root, nil)
	} else {
		v := e.cfg.Roots.View(layers)
		from.Root = &taskv1.Root{Mounts: []*taskv1.Mount{{Type: v.Type, Source: v.Source, Options: v.Options}}}
	}
	src, _, err := client.ReadFiles(ctx, from, dest)
	if err != nil {
		return err
	}
	defer src.Close()
	to := task.Files{ID: "volume " + name, Root: &taskv1.Root{Mounts: []*taskv1.Mount{{Type: "bind", Source: dir, Options: []string{"rbind", "rw"}}}}}
	pr, pw := io.Pipe()
	go func() { pw.CloseWithError(stripTop(pw, src, path.Base(dest))) }()
	err = client.WriteFiles(ctx, to, "/", pr, false, false)
	pr.CloseWithError(err)
	return err
}

// stripTop copies a tar of one directory as the content of the root.
func stripTop(w io.Writer, r io.Reader, top string) error {
	in, out := tar.NewReader(r), tar.NewWriter(w)
	strip := func(name string) string {
		name = strings.TrimPrefix(path.Clean(name), "/")
		if name == top {
			return "./"
		}
		return strings.TrimPrefix(name, top+"/")
	}
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return out.Close()
		}
		if err != nil {
			return err
		}
		dir := strings.HasSuffix(h.Name, "/")
		h.Name = strip(h.Name)
		if dir && !strings.HasSuffix(h.Name, "/") {
			h.Name += "/"
		}
		if h.Typeflag == tar.TypeLink {
			h.Linkname = strip(h.Linkname)
		}
		h.Format = tar.FormatPAX
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
	}
}

func (e *Engine) showVolume(v *volume.Volume) mobyvolume.Volume {
	s := mobyvolume.Volume{
		Name: v.Name, Driver: "local", Scope: "local", Mountpoint: e.cfg.Volumes.Path(v.Name),
		CreatedAt: v.Created.UTC().Format(time.RFC3339), Labels: v.Labels, Options: v.Options,
	}
	return s
}

// VolumeCreate makes a volume, or returns the one of that name.
func (e *Engine) VolumeCreate(ctx context.Context, r mobyvolume.CreateRequest) (*mobyvolume.Volume, error) {
	if r.ClusterVolumeSpec != nil {
		return nil, errdefs.ErrNotImplemented.WithMessage("cluster volumes are not available: Tenon has no swarm")
	}
	_, err := e.cfg.Volumes.Get(r.Name)
	existed := r.Name != "" && err == nil
	v, err := e.cfg.Volumes.Create(ctx, volume.CreateOptions{Name: r.Name, Driver: r.Driver, Labels: r.Labels, Options: r.DriverOpts})
	if err != nil {
		return nil, err
	}
	if !existed {
		e.emitVolume(v.Name, events.ActionCreate, nil)
	}
	s := e.showVolume(v)
	return &s, nil
}

// VolumeInspect describes a volume.
func (e *Engine) VolumeInspect(_ context.Context, name string) (*mobyvolume.Volume, error) {
	v, err := e.cfg.Volumes.Get(name)
	if err != nil {
		return nil, notFound("get %s: no such volume", name)
	}
	s := e.showVolume(v)
	return &s, nil
}

// VolumeList returns the volumes that pass the filters: name, driver, label,
// dangling.
func (e *Engine) VolumeList(_ context.Context, f Filters) ([]mobyvolume.Volume, []string, error) {
	if err := checkFilters(f, "name", "driver", "label", "dangling"); err != nil {
		return nil, nil, err
	}
	dangling, hasDangling, err := boolFilter(f, "dangling")
	if err != nil {
		return nil, nil, err
	}
	out := []mobyvolume.Volume{}
	for _, v := range e.cfg.Volumes.List() {
		if !matchSubstring(f["name"], v.Name) || len(f["driver"]) > 0 && !slices.Contains(f["driver"], "local") || !matchLabels(f["label"], v.Labels) {
			continue
		}
		if hasDangling && dangling != (len(e.volumeUsers(v.Name, "")) == 0) {
			continue
		}
		out = append(out, e.showVolume(v))
	}
	return out, nil, nil
}

// VolumeRemove removes a volume that nobody uses. With force one that is not
// there is no error.
func (e *Engine) VolumeRemove(ctx context.Context, name string, force bool) error {
	if _, err := e.cfg.Volumes.Get(name); err != nil {
		if force {
			return nil
		}
		return notFound("get %s: no such volume", name)
	}
	if users := e.volumeUsers(name, ""); len(users) > 0 {
		return conflict("remove %s: volume is in use - [%s]", name, strings.Join(users, ", "))
	}
	if err := e.cfg.Volumes.Remove(ctx, name); err != nil {
		return err
	}
	e.emitVolume(name, events.ActionDestroy, nil)
	return nil
}

// VolumeUsage counts a volume's blocks and users.
func (e *Engine) VolumeUsage(ctx context.Context, name string) (*mobyvolume.UsageData, error) {
	size, err := e.cfg.Volumes.Size(ctx, name)
	if err != nil {
		return nil, err
	}
	return &mobyvolume.UsageData{Size: size, RefCount: int64(len(e.volumeUsers(name, "")))}, nil
}

// VolumePrune removes unused anonymous volumes, with the filter all=true also
// named ones.
func (e *Engine) VolumePrune(ctx context.Context, f Filters) (mobyvolume.PruneReport, error) {
	var rep mobyvolume.PruneReport
	if err := checkFilters(f, "label", "label!", "all"); err != nil {
		return rep, err
	}
	all, _, err := boolFilter(f, "all")
	if err != nil {
		return rep, err
	}
	for _, v := range e.cfg.Volumes.List() {
		if !all && !v.Anonymous || !matchLabels(f["label"], v.Labels) || !unmatchLabels(f["label!"], v.Labels) || len(e.volumeUsers(v.Name, "")) > 0 {
			continue
		}
		size, err := e.cfg.Volumes.Size(ctx, v.Name)
		if err != nil {
			size = 0
		}
		if err := e.cfg.Volumes.Remove(ctx, v.Name); err != nil {
			e.log.Warn("volume is not pruned", "volume", v.Name, "err", err)
			continue
		}
		e.emitVolume(v.Name, events.ActionDestroy, nil)
		rep.VolumesDeleted = append(rep.VolumesDeleted, v.Name)
		rep.SpaceReclaimed += uint64(max(size, 0))
	}
	e.cfg.Events.Publish(events.Message{Type: events.VolumeEventType, Action: events.ActionPrune, Actor: events.Actor{Attributes: map[string]string{"reclaimed": utoa(uint(rep.SpaceReclaimed))}}})
	return rep, nil
}
