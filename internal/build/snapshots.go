package build

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	continuity "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/snapshot"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image"
)

// snapshotterName is also part of the leases' resource types.
const snapshotterName = "overlayfs"

// labelDir is the label of a snapshot that names its directory.
const labelDir = "tenon.dev/dir"

// layerType is the type of the one mount of a snapshot that is an unpacked layer of
// an image already: nothing is to be done to it.
const layerType = "tenon-layer"

// snapshotter keeps the snapshots of builds as directories beside the layers of
// images (image.Store.NewLayerDir): a committed one can become an image's layer, and
// a layer can be served as a snapshot, without a copy. It is the back end of
// containerd's metadata store, which knows leases and collects garbage.
type snapshotter struct {
	images *image.Store
	work   string // overlay's own directories, by the name of the snapshot's
	ms     *storage.MetaStore

	mu   sync.Mutex
	dirs map[string]string // the directory's name by snapshot ID
}

func openSnapshotter(ctx context.Context, images *image.Store, dir string) (*snapshotter, error) {
	s := &snapshotter{images: images, work: filepath.Join(dir, "work"), dirs: map[string]string{}}
	if err := os.MkdirAll(s.work, 0o700); err != nil {
		return nil, err
	}
	var err error
	s.ms, err = storage.NewMetaStore(filepath.Join(dir, "snapshots.db"), func(o *bolt.Options) error {
		o.NoSync, o.FreelistType = true, bolt.FreelistMapType
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := s.load(ctx); err != nil {
		return nil, errors.Join(err, s.ms.Close())
	}
	return s, nil
}

// load finds the snapshots' directories, and lets go those that no snapshot has:
// a killed daemon had just made them, or was removing them.
func (s *snapshotter) load(ctx context.Context) error {
	known := map[string]bool{}
	err := s.ms.WithTransaction(ctx, true, func(ctx context.Context) error { // writable: it makes the buckets
		ids, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		byKey := map[string]string{}
		for id, key := range ids {
			byKey[key] = id
		}
		return storage.WalkInfo(ctx, func(_ context.Context, i snapshots.Info) error {
			if dir := i.Labels[labelDir]; dir != "" {
				known[dir] = true
				s.dirs[byKey[i.Name]] = dir
			}
			return nil
		})
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("build snapshots: %w", err)
	}
	held, err := s.images.HeldLayerDirs()
	if err != nil {
		return err
	}
	for _, name := range held {
		if !known[name] {
			if err := s.images.ReleaseLayerDir(name); err != nil {
				return err
			}
		}
	}
	ents, err := os.ReadDir(s.work)
	if err != nil {
		return err
	}
	for _, e := range ents {
		if !known[e.Name()] {
			if err := os.RemoveAll(filepath.Join(s.work, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *snapshotter) dir(id string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dirs[id]
}

func (s *snapshotter) path(id string) string { return s.images.LayerPath(s.dir(id)) }

// Stat tells about a snapshot.
func (s *snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update changes a snapshot's labels.
func (s *snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (out snapshots.Info, err error) {
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, old, _, err := storage.GetInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		if len(fieldpaths) == 0 || slices.Contains(fieldpaths, "labels") { // all labels are replaced but ours
			l := maps.Clone(info.Labels)
			if l == nil {
				l = map[string]string{}
			}
			for _, k := range []string{labelDir, labelLayer} {
				if v := old.Labels[k]; v != "" {
					l[k] = v
				}
			}
			info.Labels = l
		}
		out, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return out, err
}

// Usage is what a snapshot takes on the disk; nothing, if it is an image's layer too.
func (s *snapshotter) Usage(ctx context.Context, key string) (u snapshots.Usage, err error) {
	var id string
	var info snapshots.Info
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, u, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil || info.Kind != snapshots.KindActive {
		return u, err
	}
	du, err := continuity.DiskUsage(ctx, s.path(id))
	return snapshots.Usage(du), err
}

// Mounts are a snapshot's mounts.
func (s *snapshotter) Mounts(ctx context.Context, key string) (out []mount.Mount, err error) {
	var snap storage.Snapshot
	var info snapshots.Info
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		if snap, err = storage.GetSnapshot(ctx, key); err != nil {
			return err
		}
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return nil, err
	}
	return s.mounts(snap, info), nil
}

func (s *snapshotter) mounts(snap storage.Snapshot, info snapshots.Info) []mount.Mount {
	if info.Labels[labelLayer] != "" {
		return []mount.Mount{{Type: layerType, Source: s.path(snap.ID)}}
	}
	var lower []string
	for _, id := range snap.ParentIDs {
		lower = append(lower, s.path(id))
	}
	if snap.Kind == snapshots.KindActive {
		if len(lower) == 0 {
			return []mount.Mount{{Type: "bind", Source: s.path(snap.ID), Options: []string{"rw", "rbind"}}}
		}
		return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{
			"index=off",
			"workdir=" + filepath.Join(s.work, s.dir(snap.ID)),
			"upperdir=" + s.path(snap.ID),
			"lowerdir=" + strings.Join(lower, ":"),
		}}}
	}
	switch len(lower) {
	case 0: // a view of nothing
		return []mount.Mount{{Type: "bind", Source: s.path(snap.ID), Options: []string{"ro", "rbind"}}}
	case 1:
		return []mount.Mount{{Type: "bind", Source: lower[0], Options: []string{"ro", "rbind"}}}
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"index=off", "lowerdir=" + strings.Join(lower, ":")}}}
}

// Prepare makes a snapshot that can be written to.
func (s *snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View makes one that can be read only.
func (s *snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

type layerKey struct{}

// labelLayer is the label of a snapshot that is a layer of an image: its chain ID.
const labelLayer = "tenon.dev/layer"

func (s *snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (out []mount.Mount, err error) {
	labels := map[string]string{}
	dir := ""
	if chain, ok := ctx.Value(layerKey{}).(digest.Digest); ok {
		s.mu.Lock() // nobody lets it go in between
		if dir, _, err = s.images.HoldLayer(chain); err == nil {
			s.dirs["prepare "+key] = dir
		}
		s.mu.Unlock()
		if err != nil {
			return nil, err
		}
		defer func() {
			s.mu.Lock()
			delete(s.dirs, "prepare "+key)
			s.mu.Unlock()
		}()
		labels[labelLayer] = chain.String()
	} else if kind == snapshots.KindActive || parent == "" {
		if dir, err = s.images.NewLayerDir(); err != nil {
			return nil, err
		}
	}
	if dir != "" {
		labels[labelDir] = dir
	}
	defer func() {
		s.mu.Lock()
		delete(s.dirs, "prepare "+key)
		s.mu.Unlock()
		if err != nil && dir != "" {
			err = errors.Join(err, s.release(dir))
		}
	}()
	var snap storage.Snapshot
	var info snapshots.Info
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		if snap, err = storage.CreateSnapshot(ctx, kind, key, parent, append(opts[:len(opts):len(opts)], snapshots.WithLabels(labels))...); err != nil {
			return err
		}
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return nil, err
	}
	if dir != "" {
		s.mu.Lock()
		s.dirs[snap.ID] = dir
		s.mu.Unlock()
	}
	if kind == snapshots.KindActive && len(snap.ParentIDs) > 0 && labels[labelLayer] == "" {
		if err = os.Mkdir(filepath.Join(s.work, dir), 0o700); err == nil {
			err = sameRoot(s.images.LayerPath(dir), s.path(snap.ParentIDs[0]))
		}
		if err != nil {
			err = errors.Join(err, s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
				_, _, err := storage.Remove(ctx, key)
				return err
			}))
			s.mu.Lock()
			delete(s.dirs, snap.ID)
			s.mu.Unlock()
			return nil, err
		}
	}
	return s.mounts(snap, info), nil
}

// sameRoot gives the directory of an upper layer, whose attributes the merged root
// has, those of the one below.
func sameRoot(dir, below string) error {
	var st unix.Stat_t
	if err := unix.Stat(below, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: below, Err: err}
	}
	if err := os.Chown(dir, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Chmod(dir, st.Mode&0o7777); err != nil {
		return &fs.PathError{Op: "chmod", Path: dir, Err: err}
	}
	return nil
}

// Commit makes an active snapshot a parent for others.
func (s *snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return err
	}
	dir := info.Labels[labelDir]
	var du continuity.Usage
	if info.Labels[labelLayer] == "" { // else it is the image store's
		if du, err = continuity.DiskUsage(ctx, s.images.LayerPath(dir)); err != nil {
			return err
		}
	}
	labels := map[string]string{labelDir: dir}
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, err := storage.CommitActive(ctx, key, name, snapshots.Usage(du), append(opts[:len(opts):len(opts)], snapshots.WithLabels(labels))...)
		return err
	})
	if err != nil {
		return fmt.Errorf("commit snapshot: %w", err)
	}
	return os.RemoveAll(filepath.Join(s.work, dir))
}

// Remove forgets a snapshot. Its directory goes unless an image has it.
func (s *snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.ms.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	dir := s.dirs[id]
	delete(s.dirs, id)
	s.mu.Unlock()
	if dir == "" {
		return nil
	}
	return s.release(dir)
}

// release lets a directory go, unless another snapshot is the same layer.
func (s *snapshotter) release(dir string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.dirs {
		if d == dir {
			return nil
		}
	}
	return errors.Join(os.RemoveAll(filepath.Join(s.work, dir)), s.images.ReleaseLayerDir(dir))
}

// Walk calls f for each snapshot that passes the filters.
func (s *snapshotter) Walk(ctx context.Context, f snapshots.WalkFunc, filters ...string) error {
	return s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, f, filters...)
	})
}

// Close closes the database.
func (s *snapshotter) Close() error { return s.ms.Close() }

// layerSnapshots is what BuildKit sees of the snapshots: it finds the layers of
// images, too. BuildKit extracts a layer in a snapshot of a key that names its chain
// ID; if the image store has it unpacked, that snapshot is the layer (and apply
// leaves it alone).
type layerSnapshots struct {
	snapshot.Snapshotter
	images *image.Store
}

// Prepare makes a snapshot that can be written to.
func (s *layerSnapshots) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) error {
	if _, chain, ok := strings.Cut(key, " "); ok && strings.HasPrefix(key, "extract-") {
		if d := digest.Digest(chain); d.Validate() == nil {
			err := s.Snapshotter.Prepare(context.WithValue(ctx, layerKey{}, d), key, parent, opts...)
			if !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	return s.Snapshotter.Prepare(ctx, key, parent, opts...)
}
