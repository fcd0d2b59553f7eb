// Package volume keeps named volumes: directories that outlive containers, and
// local volumes that are mounts of something else (tmpfs, bind, nfs, a device)
// by Docker's driver options type=, o= and device=.
//
// A volume is a record in the durable store (bucket "volumes") and a directory
// `<dir>/<name>/_data`. The directory is made before the record and removed
// after it, so that a killed daemon leaves at most a directory without a
// record, which Open sweeps into the trash. The package does not know who uses
// a volume: the engine does, and refuses removals on its own.
//
// The store is safe for concurrent use. Volumes returned are copies.
package volume

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/store"
)

const (
	bucket    = "volumes"
	dataDir   = "_data"
	trashDir  = ".trash"
	anonymous = "com.docker.volume.anonymous" // the label Docker's clients look for
)

// validName is what Docker accepts, and nothing that could leave the directory.
var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{1,254}$`)

// Volume is one volume's record.
type Volume struct {
	Name      string            `json:"name"`
	Created   time.Time         `json:"created"`
	Labels    map[string]string `json:"labels,omitempty"`
	Options   map[string]string `json:"options,omitempty"` // type, o, device
	Anonymous bool              `json:"anonymous,omitempty"`

	// Owner is the container that an anonymous volume was made for and still
	// belongs to. It is removed when nobody knows that container; one that is to
	// outlive it is given up by Disown.
	Owner string `json:"owner,omitempty"`
	// Populated says that the directory has taken its owner and mode from an image's,
	// or is not to, so that what a user changes stays.
	Populated bool `json:"populated,omitempty"`
}

// Mount says what a container gets: a bind of a host directory, or a mount of
// another type that is made for each container's kernel.
type Mount struct {
	Type, Source string
	Options      []string
}

// Store holds the volumes of one daemon.
type Store struct {
	dir string
	db  *store.DB
	log *slog.Logger

	mu      sync.Mutex
	volumes map[string]*Volume
	trash   sync.WaitGroup
}

// Open reads the records and sweeps what a killed daemon left half-made.
func Open(dir string, db *store.DB, log *slog.Logger) (*Store, error) {
	s := &Store{dir: dir, db: db, log: log, volumes: map[string]*Volume{}}
	if err := os.MkdirAll(filepath.Join(dir, trashDir), 0o711); err != nil {
		return nil, fmt.Errorf("volumes: %w", err)
	}
	err := db.Each(bucket, func(name string, value []byte) error {
		v := new(Volume)
		if err := json.Unmarshal(value, v); err != nil {
			return err
		}
		s.volumes[name] = v
		return nil
	})
	if err != nil {
		log.Warn("volume records that can't be read are left alone", "err", err)
	}
	return s, s.sweep(err != nil)
}

// sweep moves directories without a record away. With unreadable records it
// touches nothing: their data may be what the user wants back.
func (s *Store) sweep(unreadable bool) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("volumes: %w", err)
	}
	for _, e := range entries {
		if _, ok := s.volumes[e.Name()]; ok || e.Name() == trashDir || unreadable {
			continue
		}
		// Only an empty one is surely half-made; anything else is kept and told.
		if err := removeEmpty(filepath.Join(s.dir, e.Name())); err != nil {
			s.log.Warn("directory without a volume record is kept", "path", filepath.Join(s.dir, e.Name()))
		}
	}
	s.emptyTrash()
	return nil
}

func removeEmpty(dir string) error {
	if err := os.Remove(filepath.Join(dir, dataDir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Remove(dir)
}

// Close waits for deletions in the background.
func (s *Store) Close() error { s.trash.Wait(); return nil }

// CreateOptions describe a new volume. An empty name makes an anonymous one.
type CreateOptions struct {
	Name            string
	Driver          string
	Labels, Options map[string]string
	Owner           string // of an anonymous volume; see Volume
}

// Create makes a volume, or returns the existing one of that name if its
// options agree (as Docker does); errdefs.ErrAlreadyExists if they don't.
func (s *Store) Create(_ context.Context, o CreateOptions) (*Volume, error) {
	if o.Driver != "" && o.Driver != "local" {
		return nil, fmt.Errorf("volume driver %q is not known; only \"local\" is built in: %w", o.Driver, errdefs.ErrInvalidArgument)
	}
	v := &Volume{Name: o.Name, Created: time.Now().UTC(), Labels: maps.Clone(o.Labels), Options: maps.Clone(o.Options)}
	if v.Name == "" {
		id := make([]byte, 32)
		_, _ = rand.Read(id) // never fails: crypto/rand documents it
		v.Name, v.Anonymous, v.Owner = hex.EncodeToString(id), true, o.Owner
		if v.Labels == nil {
			v.Labels = map[string]string{}
		}
		v.Labels[anonymous] = ""
	}
	if !validName.MatchString(v.Name) {
		return nil, fmt.Errorf("volume name %q: use letters, digits, '_', '.' and '-', beginning with a letter or digit, 2 to 255 of them; for a host directory give an absolute path: %w", v.Name, errdefs.ErrInvalidArgument)
	}
	if _, err := mountOf(v, ""); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.volumes[v.Name]; ok {
		if len(o.Options) > 0 && !maps.Equal(old.Options, o.Options) {
			return nil, fmt.Errorf("volume %s exists with other options (%v): remove it first or choose another name: %w", v.Name, old.Options, errdefs.ErrAlreadyExists)
		}
		return clone(old), nil
	}
	if err := os.MkdirAll(s.dataPath(v.Name), 0o755); err != nil {
		return nil, fmt.Errorf("volume %s: %w", v.Name, err)
	}
	if err := s.db.Put(bucket, v.Name, v); err != nil {
		return nil, errors.Join(fmt.Errorf("volume %s: %w", v.Name, err), removeEmpty(filepath.Join(s.dir, v.Name)))
	}
	s.volumes[v.Name] = v
	return clone(v), nil
}

func clone(v *Volume) *Volume {
	c := *v
	c.Labels, c.Options = maps.Clone(v.Labels), maps.Clone(v.Options)
	return &c
}

// Get returns a volume; errdefs.ErrNotFound if there is none of that name.
func (s *Store) Get(name string) (*Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.volumes[name]
	if !ok {
		return nil, fmt.Errorf("no such volume: %s: %w", name, errdefs.ErrNotFound)
	}
	return clone(v), nil
}

// List returns all volumes, sorted by name.
func (s *Store) List() []*Volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*Volume, 0, len(s.volumes))
	for _, v := range s.volumes {
		out = append(out, clone(v))
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

// Path is the volume's directory, which inspect shows as its mountpoint.
func (s *Store) Path(name string) string { return s.dataPath(name) }

func (s *Store) dataPath(name string) string { return filepath.Join(s.dir, name, dataDir) }

// Mount tells how the volume reaches a container.
func (s *Store) Mount(name string) (Mount, error) {
	v, err := s.Get(name)
	if err != nil {
		return Mount{}, err
	}
	return mountOf(v, s.dataPath(name))
}

// MarkPopulated records that copy-up is done.
func (s *Store) MarkPopulated(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.volumes[name]
	if !ok || v.Populated {
		return nil
	}
	c := *v
	c.Populated = true
	if err := s.db.Put(bucket, name, &c); err != nil {
		return err
	}
	s.volumes[name] = &c
	return nil
}

// Disown keeps an anonymous volume beyond its container. One without an owner,
// or that is not there, is left as it is.
func (s *Store) Disown(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.volumes[name]
	if !ok || v.Owner == "" {
		return nil
	}
	c := *v
	c.Owner = ""
	if err := s.db.Put(bucket, name, &c); err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	s.volumes[name] = &c
	return nil
}

// Remove deletes the record, then the data in the background. A volume that is
// not there is errdefs.ErrNotFound. The caller has checked that nobody uses it.
func (s *Store) Remove(_ context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.volumes[name]; !ok {
		return fmt.Errorf("no such volume: %s: %w", name, errdefs.ErrNotFound)
	}
	if err := s.db.Delete(bucket, name); err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	delete(s.volumes, name)
	to, err := os.MkdirTemp(filepath.Join(s.dir, trashDir), "v-")
	if err == nil {
		err = os.Rename(filepath.Join(s.dir, name), filepath.Join(to, "v"))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	s.emptyTrash()
	return nil
}

// emptyTrash deletes in the background; what can't be deleted now is tried
// again at the next removal and at the next start.
func (s *Store) emptyTrash() {
	s.trash.Add(1)
	go func() {
		defer s.trash.Done()
		dir := filepath.Join(s.dir, trashDir)
		entries, _ := os.ReadDir(dir) // nothing to do if unreadable
		for _, e := range entries {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				s.log.Warn("removed volume's files are still there", "path", filepath.Join(dir, e.Name()), "err", err)
			}
		}
	}()
}

// Size is the volume's disk usage in bytes (blocks, not apparent size).
func (s *Store) Size(ctx context.Context, name string) (int64, error) {
	return diskUsage(ctx, s.dataPath(name))
}

// Names returns the names for which keep is true.
func (s *Store) Names(keep func(*Volume) bool) []string {
	var out []string
	for _, v := range s.List() {
		if keep(v) {
			out = append(out, v.Name)
		}
	}
	return slices.Clip(out)
}
