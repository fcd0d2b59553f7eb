// Package footprint measures what an engine's state takes on the disk, part by part. The
// parts' sum is what du(1) says of the state root: blocks, directories too, each file
// once. Nothing here changes anything.
package footprint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image"
)

// Report is what the parts take, in bytes.
type Report struct {
	Images     int64 `json:"images"`     // blobs, unpacked layers, file systems for virtual machines
	Blobs      int64 `json:"blobs"`      // of Images
	Layers     int64 `json:"layers"`     // of Images
	EROFS      int64 `json:"erofs"`      // of Images
	Containers int64 `json:"containers"` // writable layers
	Logs       int64 `json:"logs"`       // of containers, with their other small files
	Volumes    int64 `json:"volumes"`
	BuildCache int64 `json:"buildCache"` // without what images have too
	Machines   int64 `json:"machines"`   // disks of virtual machines that last
	VM         int64 `json:"vm"`         // saved machines and kernels
	Other      int64 `json:"other"`      // databases, what is under way
	Total      int64 `json:"total"`
}

// Measure measures the state root of an engine with that image store.
func Measure(ctx context.Context, root string, images *image.Store) (Report, error) {
	var r Report
	sp, err := images.Space(ctx)
	if err != nil {
		return r, err
	}
	r.Images, r.Blobs, r.Layers, r.EROFS = sp.Images(), sp.Blobs, sp.Layers, sp.EROFS
	r.BuildCache, r.Other = sp.Cache, sp.Other
	m, err := newMeter(ctx, root)
	if err != nil {
		return r, err
	}
	ents, err := os.ReadDir(root)
	if err != nil {
		return r, err
	}
	m.one(root, &r.Other)
	for _, e := range ents {
		path := filepath.Join(root, e.Name())
		switch e.Name() {
		case "images":
		case "containers":
			m.containers(path, &r)
		case "volumes":
			m.tree(path, &r.Volumes)
		case "build":
			r.BuildCache += m.buildState(path, filepath.Join(root, "images", "content", "blobs"))
		case "machines":
			m.tree(path, &r.Machines)
		case "vm":
			m.tree(path, &r.VM)
		default:
			m.tree(path, &r.Other)
		}
	}
	r.Total = r.Images + r.Containers + r.Logs + r.Volumes + r.BuildCache + r.Machines + r.VM + r.Other
	return r, m.err
}

// BuildCache measures the build cache alone.
func BuildCache(ctx context.Context, root string, images *image.Store) (int64, error) {
	path := filepath.Join(root, "build")
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	sp, err := images.Space(ctx)
	if err != nil {
		return 0, err
	}
	m, err := newMeter(ctx, root)
	if err != nil {
		return 0, err
	}
	n := sp.Cache + m.buildState(path, filepath.Join(root, "images", "content", "blobs"))
	return n, m.err
}

type inode struct{ dev, ino uint64 }

// meter adds up blocks; it stays on one file system, and counts each file once.
type meter struct {
	ctx  context.Context
	dev  uint64
	seen map[inode]bool
	err  error
}

func newMeter(ctx context.Context, root string) (*meter, error) {
	var st unix.Stat_t
	if err := unix.Lstat(root, &st); err != nil {
		return nil, &os.PathError{Op: "lstat", Path: root, Err: err}
	}
	return &meter{ctx: ctx, dev: st.Dev, seen: map[inode]bool{}}, nil
}

// add counts a file; false if it is not to be entered.
func (m *meter) add(path string, into *int64) bool {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil || st.Dev != m.dev {
		return false // gone, or mounted there
	}
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		k := inode{st.Dev, st.Ino}
		if m.seen[k] {
			return true
		}
		m.seen[k] = true
	}
	*into += st.Blocks * 512
	return true
}

func (m *meter) one(path string, into *int64) { m.add(path, into) }

func (m *meter) tree(path string, into *int64) {
	if m.err != nil {
		return
	}
	m.err = filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
		switch {
		case m.ctx.Err() != nil:
			return context.Cause(m.ctx)
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return fmt.Errorf("disk usage: %w", err)
		case !m.add(p, into) && e.IsDir():
			return fs.SkipDir
		}
		return nil
	})
}

// containers tells writable layers and logs apart.
func (m *meter) containers(path string, r *Report) {
	m.one(path, &r.Other)
	ents, err := os.ReadDir(path)
	if err != nil {
		m.err = errors.Join(m.err, err)
		return
	}
	for _, e := range ents {
		one := filepath.Join(path, e.Name())
		m.one(one, &r.Logs)
		parts, err := os.ReadDir(one)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil { // a file
			continue
		}
		for _, p := range parts {
			into := &r.Logs
			if p.Name() == "rootfs" {
				into = &r.Containers
			}
			m.tree(filepath.Join(one, p.Name()), into)
		}
	}
}

// buildState measures the builder's directory, without the blobs that images have too.
func (m *meter) buildState(path, blobs string) (n int64) {
	_ = filepath.WalkDir(blobs, func(p string, e fs.DirEntry, err error) error { // what can't be read counts
		var st unix.Stat_t
		if err == nil && !e.IsDir() && unix.Lstat(p, &st) == nil && st.Nlink > 1 {
			m.seen[inode{st.Dev, st.Ino}] = true
		}
		return nil
	})
	m.tree(path, &n)
	return n
}
