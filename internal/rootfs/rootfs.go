// Package rootfs makes a container's root file system from an image's layers
// and a writable pair of directories that is named by the container.
//
//	<root>/containers/<id>/rootfs/upper   what the container has changed
//	<root>/containers/<id>/rootfs/work    overlay's own
//	<root>/containers/<id>/rootfs/disk…   a file system with the pair in it, if
//	                                      its size is limited
//	<root>/containers/<id>/rootfs/vm.img  the writable disk, on a virtual machine
//	<root>/containers/<id>/log            empty, for the caller
//	<root>/pool/…                         such directories made ahead
//	<root>/disks/…                        empty disks of each size
//	<root>/trash/…                        removed ones until they are deleted or made new
//	<root>/base/lower                     the lowest layer of all roots: mount points
//	<root>/empty                          an empty directory, below views of single layers
//
// The pair is not a snapshot: there is no database and no transaction, it is
// found again by listing. Nothing here waits for the disk, and a container
// usually gets its directory by one rename from the pool and loses it by another
// to the trash.
package rootfs

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/image/layer"
)

// poolSize is how many pairs lie ready at most: more than are in use at once by
// short containers, whose directories come back.
const poolSize = 32

// poolLow is how many are made ahead: more than start while the next ones are
// being made.
const poolLow = 8

// Config configures a Store.
type Config struct {
	// Root is the state directory; see the package comment for what is in it.
	Root   string
	Images *image.Store
	Log    *slog.Logger
}

// Store makes and removes containers' writable layers. Safe for concurrent use;
// calls for the same container must not overlap.
type Store struct {
	cfg   Config
	gone  chan string   // what has come into the trash
	kick  chan struct{} // there is more in the trash than gone tells
	pool  chan string   // directories as a container's, with a pair in them
	low   chan struct{} // the pool may be
	stop  chan struct{}
	wg    sync.WaitGroup
	close sync.Once
	disks sync.Mutex // one at a time makes or mounts a disk
	tmpfs bool       // Root is on one
}

// Mount is one mount(8) to make, as in an OCI bundle or a Task API request.
type Mount struct {
	Type, Source string
	Options      []string
}

// Options are the options of Prepare.
type Options struct {
	// ReadOnly mounts the root read-only. A writable pair is made all the same,
	// since mount points may have to be made in it.
	ReadOnly bool
	// Volatile leaves out every sync of the writable layer: for containers that
	// do not outlive the machine's crash (--rm).
	Volatile bool
	// SizeLimit, in bytes, is what a new pair may hold; 0: no limit. See
	// CheckLimit.
	SizeLimit int64
}

// Root is what Prepare made.
type Root struct {
	Mounts []Mount
	// Upper and Work are the overlay's directories, Lower its lower ones,
	// topmost first.
	Upper, Work string
	Lower       []string
	// Lazy says that the layers are one, a file system of its own, of which some has
	// not come yet.
	Lazy bool
}

// MappedAt is the option that has the layers' owners mapped by a container's user
// namespace where option "idmap" alone, which maps the directories that they lie in,
// would not find them; "" if it would.
func (r *Root) MappedAt() string {
	if !r.Lazy {
		return ""
	}
	dirs := []string{r.Lower[0], filepath.Dir(r.Upper)}
	for _, d := range r.Lower[1:] {
		dirs = append(dirs, filepath.Dir(d))
	}
	return "idmap-at=" + strings.Join(dirs, ":")
}

// Open opens the store and starts deleting what lies in the trash.
func Open(cfg Config) (*Store, error) {
	if cfg.Root == "" {
		return nil, fmt.Errorf("rootfs store: no root directory: %w", errdefs.ErrInvalidArgument)
	}
	if strings.ContainsAny(cfg.Root, ":,\\\"") {
		return nil, fmt.Errorf("rootfs store %s: overlay cannot have a directory with one of : , \\ \" in its name: %w", cfg.Root, errdefs.ErrInvalidArgument)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{cfg: cfg, gone: make(chan string, 64), kick: make(chan struct{}, 1), pool: make(chan string, poolSize), low: make(chan struct{}, 1), stop: make(chan struct{})}
	for _, d := range []string{s.containers(), s.trash(), s.ahead(), s.empty(), s.templates()} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return nil, fmt.Errorf("rootfs store: %w", err)
		}
	}
	layer.SpreadChildren(s.containers())
	layer.SpreadChildren(s.ahead())
	if err := s.cleanTemplates(); err != nil {
		return nil, fmt.Errorf("rootfs store: %w", err)
	}
	var fs unix.Statfs_t
	s.tmpfs = unix.Statfs(cfg.Root, &fs) == nil && fs.Type == unix.TMPFS_MAGIC
	if err := makeBase(s.base()); err != nil {
		return nil, fmt.Errorf("rootfs store: %w", err)
	}
	if err := s.reuse(); err != nil {
		return nil, fmt.Errorf("rootfs store: %w", err)
	}
	s.wg.Add(2)
	go s.sweep()
	go s.fill()
	s.kick <- struct{}{}
	return s, nil
}

// Close stops deleting; the next Open goes on with it.
func (s *Store) Close() error {
	s.close.Do(func() { close(s.stop) })
	s.wg.Wait()
	return nil
}

func (s *Store) containers() string { return filepath.Join(s.cfg.Root, "containers") }
func (s *Store) trash() string      { return filepath.Join(s.cfg.Root, "trash") }
func (s *Store) base() string       { return filepath.Join(s.cfg.Root, "base", "lower") }
func (s *Store) ahead() string      { return filepath.Join(s.cfg.Root, "pool") }
func (s *Store) templates() string  { return filepath.Join(s.cfg.Root, "disks") }
func (s *Store) empty() string      { return filepath.Join(s.cfg.Root, "empty") }

// reuse takes over the pairs that an earlier process made ahead.
func (s *Store) reuse() error {
	ents, err := os.ReadDir(s.ahead())
	if err != nil {
		return err
	}
	for _, e := range ents {
		path := filepath.Join(s.ahead(), e.Name())
		if _, err := os.Lstat(path + "/rootfs/work"); err == nil && len(s.pool) < poolSize {
			s.pool <- path
		} else if err := os.Rename(path, filepath.Join(s.trash(), rand.Text())); err != nil {
			return err
		}
	}
	return nil
}

// fill keeps the pool from getting empty.
func (s *Store) fill() {
	defer s.wg.Done()
	for {
		for len(s.pool) >= poolLow {
			select {
			case <-s.low:
			case <-s.stop:
				return
			}
		}
		path := filepath.Join(s.ahead(), rand.Text())
		err := os.Mkdir(path, 0o710)
		if err == nil {
			err = os.Mkdir(path+"/log", 0o700)
		}
		if err == nil {
			err = makePair(path + "/rootfs")
		}
		if err != nil {
			// Prepare makes its own then, and reports what is wrong.
			s.cfg.Log.Warn("writable layer not made ahead", "err", err)
			_ = os.RemoveAll(path)
			select {
			case <-s.stop:
				return
			case <-time.After(time.Second):
			}
			continue
		}
		select {
		case s.pool <- path:
		case <-s.stop:
			return
		}
	}
}

// makePair makes the directories; work comes last and says that all are there.
func makePair(dir string) error {
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{dir, 0o700}, {dir + "/upper", 0o755}, {dir + "/work", 0o700}} {
		if err := os.Mkdir(d.path, d.mode); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// dir is the container's directory; id must be a single component.
func (s *Store) dir(id string) (string, error) {
	if id == "" || id == "." || id == ".." || strings.ContainsAny(id, "/\x00") {
		return "", fmt.Errorf("container ID %q: %w", id, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(s.containers(), id, "rootfs"), nil
}

// Prepare makes (or finds again) the writable pair of a container and returns
// the mounts of its root. The same arguments give the same mounts.
func (s *Store) Prepare(ctx context.Context, id string, img *image.Image, opts Options) (_ *Root, err error) {
	dir, err := s.dir(id)
	if err != nil {
		return nil, err
	}
	lower, lazy, err := s.cfg.Images.Root(ctx, img)
	if err != nil {
		return nil, err
	}
	if len(lower) > 0 {
		lower = append(slices.Clone(lower), s.base())
	}
	r := &Root{Upper: dir + "/upper", Work: dir + "/work", Lower: lower, Lazy: lazy}
	if opts.SizeLimit != 0 {
		r.Upper, r.Work = filepath.Join(dir, diskDir, "upper"), filepath.Join(dir, diskDir, "work")
	}
	if err := s.pair(ctx, r, dir, opts); err != nil {
		return nil, fmt.Errorf("container %s: writable layer: %w", id, err)
	}
	if s.tmpfs {
		opts.Volatile = false // a sync costs less there than the mark of a volatile layer
	}
	r.Mounts = []Mount{overlay(r, opts)}
	return r, nil
}

// pair puts a pair of directories in its place, unless it is there.
func (s *Store) pair(ctx context.Context, r *Root, dir string, opts Options) error {
	if opts.SizeLimit != 0 {
		return s.limitedPair(ctx, r, dir, opts)
	}
	if _, err := os.Lstat(r.Work); err == nil {
		return nil
	}
	if err := s.take(dir); err != nil {
		return err
	}
	return likeImage(r.Upper, r.Lower)
}

// likeImage gives an upper directory, whose attributes the merged root has, those
// of the image's root.
func likeImage(upper string, lower []string) error {
	if len(lower) == 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(lower[0], &st); err != nil {
		return &os.PathError{Op: "stat", Path: lower[0], Err: err}
	}
	if st.Uid != 0 || st.Gid != 0 {
		if err := os.Chown(upper, int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	if st.Mode&0o7777 != 0o755 {
		if err := unix.Chmod(upper, st.Mode&0o7777); err != nil {
			return &os.PathError{Op: "chmod", Path: upper, Err: err}
		}
	}
	return nil
}

// take moves a pair from the pool to dir, or makes one there. A half-made one
// (of a process that was killed) is completed: nothing has been mounted on it.
func (s *Store) take(dir string) error {
	select {
	case path := <-s.pool:
		if len(s.pool) < poolLow {
			wake(s.low)
		}
		// One rename, if the container's directory is not there or empty.
		if err := os.Rename(path, filepath.Dir(dir)); err == nil {
			return nil
		}
		err := os.Rename(path+"/rootfs", dir)
		_ = os.RemoveAll(path)
		if err == nil {
			return nil
		}
	default:
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o710); err != nil {
		return err
	}
	return makePair(dir)
}

// overlay describes the root's mount. Its options may be longer than the page
// that mount(2) takes: then the mounter has to shorten the paths by a working
// directory, or hand the layers over one by one (fsconfig, lowerdir+).
func overlay(r *Root, opts Options) Mount {
	if len(r.Lower) == 0 { // an image without layers
		o := []string{"bind", "rw"}
		if opts.ReadOnly {
			o[1] = "ro"
		}
		return Mount{Type: "bind", Source: r.Upper, Options: o}
	}
	o := []string{
		"lowerdir=" + strings.Join(r.Lower, ":"),
		"upperdir=" + r.Upper,
		"workdir=" + r.Work,
		"index=off",
	}
	if opts.Volatile {
		o = append(o, "volatile")
	}
	if opts.ReadOnly {
		o = append(o, "ro")
	}
	return Mount{Type: "overlay", Source: "overlay", Options: o}
}

// View is the mount that shows directories merged, topmost first, read-only.
func (s *Store) View(lower []string) Mount {
	switch len(lower) {
	case 0:
		return Mount{Type: "bind", Source: s.empty(), Options: []string{"rbind", "ro"}}
	case 1: // overlay has at least two where it has no upper one
		lower = []string{lower[0], s.empty()}
	}
	return Mount{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + strings.Join(lower, ":"), "ro"}}
}

// Remove takes the container's directory away at once, with its writable layer
// and log, and deletes it in the background. It is not an error if there is none.
// Nothing may be mounted on it any more.
func (s *Store) Remove(id string) error {
	dir, err := s.dir(id)
	if err != nil {
		return err
	}
	if err := unmountDisk(dir); err != nil {
		return fmt.Errorf("container %s: remove writable layer: %w", id, err)
	}
	to := filepath.Join(s.trash(), rand.Text())
	if err := os.Rename(filepath.Dir(dir), to); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("container %s: remove writable layer: %w", id, err)
	}
	select {
	case s.gone <- to:
	default:
		wake(s.kick)
	}
	return nil
}

// wake tells the receiver of c that there is something to do.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// List returns the containers that have a writable layer.
func (s *Store) List() ([]string, error) {
	ents, err := os.ReadDir(s.containers())
	if err != nil {
		return nil, fmt.Errorf("list writable layers: %w", err)
	}
	var ids []string
	for _, e := range ents {
		if st, err := os.Lstat(filepath.Join(s.containers(), e.Name(), "rootfs")); err == nil && st.IsDir() {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// Usage returns the bytes and inodes that the writable layer takes on the disk;
// of a virtual machine's the bytes only.
// errdefs.ErrNotFound if there is none.
func (s *Store) Usage(ctx context.Context, id string) (bytes, inodes int64, err error) {
	dir, err := s.dir(id)
	if err != nil {
		return 0, 0, err
	}
	if n, err := vmUsage(dir); !errors.Is(err, fs.ErrNotExist) {
		return n, 0, err
	}
	upper, err := s.upper(dir)
	if err != nil {
		return 0, 0, fmt.Errorf("container %s: writable layer: %w", id, err)
	}
	type inode struct{ dev, ino uint64 }
	seen := map[inode]bool{}
	err = filepath.WalkDir(upper, func(path string, d fs.DirEntry, err error) error {
		if cerr := ctx.Err(); cerr != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) && path != upper {
				return nil // the container goes on meanwhile
			}
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return nil
		}
		if st.Nlink > 1 && !d.IsDir() {
			k := inode{st.Dev, st.Ino}
			if seen[k] {
				return nil
			}
			seen[k] = true
		}
		bytes += st.Blocks * 512
		inodes++
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, fmt.Errorf("container %s has no writable layer: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("container %s: writable layer: %w", id, err)
	}
	return bytes, inodes, nil
}
