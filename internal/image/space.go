package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Space is what the store takes on the disk: bytes of whole blocks, directories too,
// each file once, as du(1) counts.
type Space struct {
	Blobs  int64 // as they came from registries and archives
	Layers int64 // unpacked, those of images
	Lazy   int64 // what is here of lazy images
	EROFS  int64 // file systems for virtual machines
	Disks  int64 // decompressed disks of disk images
	Cache  int64 // layers that the build cache alone holds
	Other  int64 // the database, what is under way, what is being deleted
}

// Images is what images take, Sum what the store takes.
func (s Space) Images() int64 { return s.Blobs + s.Layers + s.EROFS + s.Lazy + s.Disks }
func (s Space) Sum() int64    { return s.Images() + s.Cache + s.Other }

// Space measures the store. The first time after the daemon's start each layer is
// walked; they never change, so that later it is fast.
func (s *Store) Space(ctx context.Context) (out Space, err error) {
	count := func(into *int64, path string, below bool) {
		if err != nil {
			return
		}
		var n int64
		if below {
			n, err = diskUse(ctx, path)
		} else {
			n, err = ownBlocks(path)
		}
		*into += n
	}
	// The directories that are there without any image are not the images'.
	frame := []string{filepath.Join(s.cfg.Root, "content", "blobs"), s.blobDir(digest.SHA256), s.blobDir(digest.SHA512), s.erofsDir()}
	count(&out.Blobs, frame[0], true)
	count(&out.EROFS, s.erofsDir(), true)
	for i, dir := range frame {
		var n int64
		count(&n, dir, false)
		if out.Other += n; i < len(frame)-1 {
			out.Blobs -= n
		} else {
			out.EROFS -= n
		}
	}
	var own int64
	count(&own, s.disksDir(), false)
	count(&out.Disks, s.disksDir(), true)
	out.Other, out.Disks = out.Other+own, out.Disks-own
	own = 0
	count(&own, s.lazyDir(), false)
	count(&out.Lazy, s.lazyDir(), true)
	out.Other, out.Lazy = out.Other+own, out.Lazy-own
	ofImages := s.LayerDirs()
	ents, rerr := os.ReadDir(s.layersDir())
	if rerr != nil {
		return out, rerr
	}
	count(&out.Other, s.layersDir(), false)
	for _, e := range ents {
		switch {
		case ofImages[e.Name()]:
			var n int64
			if err == nil {
				n, err = s.layerDisk(ctx, e.Name())
			}
			out.Layers += n
		case e.Name() == "tmp":
			count(&out.Other, filepath.Join(s.layersDir(), e.Name()), true)
		default:
			count(&out.Cache, filepath.Join(s.layersDir(), e.Name()), true)
		}
	}
	count(&out.Other, s.cfg.Root, false)
	count(&out.Other, filepath.Join(s.cfg.Root, "content"), false)
	count(&out.Other, s.ingestDir(), true)
	if ents, rerr = os.ReadDir(s.cfg.Root); rerr != nil {
		return out, rerr
	}
	for _, e := range ents {
		if n := e.Name(); n != "content" && n != "layers" && n != filepath.Base(s.erofsDir()) && n != filepath.Base(s.lazyDir()) && n != filepath.Base(s.disksDir()) {
			count(&out.Other, filepath.Join(s.cfg.Root, n), true)
		}
	}
	if err != nil {
		return out, fmt.Errorf("image store: disk usage: %w", err)
	}
	return out, nil
}

// layerDisk is what an unpacked layer of an image takes on the disk.
func (s *Store) layerDisk(ctx context.Context, dir string) (int64, error) {
	if n, ok := s.sizes.Load(dir); ok {
		return n.(int64), nil
	}
	s.mu.RLock()
	flushed := false // before, it may not have all its blocks
	for _, l := range s.layers {
		flushed = flushed || l.Dir == dir && l.Boot == ""
	}
	s.mu.RUnlock()
	n, err := diskUse(ctx, filepath.Join(s.layersDir(), dir))
	if err == nil && flushed {
		s.sizes.Store(dir, n)
	}
	return n, err
}

// blobDisk is what a blob takes on the disk; 0 if it is not here.
func (s *Store) blobDisk(d digest.Digest) int64 {
	if d.Validate() != nil {
		return 0
	}
	n, _ := ownBlocks(s.blobPath(d)) // it may have gone
	return n
}

// ownBlocks is what a file, or a directory without what is in it, takes; nothing if
// it is not there.
func ownBlocks(path string) (int64, error) {
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil {
		return 0, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return st.Blocks * 512, nil
}

// diskUse counts each inode's blocks below path once; what goes meanwhile does not count.
func diskUse(ctx context.Context, path string) (total int64, err error) {
	type inode struct{ dev, ino uint64 }
	seen := map[inode]bool{}
	err = filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if unix.Lstat(p, &st) != nil {
			return nil
		}
		if st.Nlink > 1 && !e.IsDir() {
			k := inode{st.Dev, st.Ino}
			if seen[k] {
				return nil
			}
			seen[k] = true
		}
		total += st.Blocks * 512
		return nil
	})
	return total, err
}

// diskOf is what an image takes on the disk, by what it is: blobs by digest, layers as
// "chain "+ID, file systems as "erofs "+ID and "lazy "+ID, disks by their layer as "disk "+digest.
func (s *Store) diskOf(ctx context.Context, blobs map[digest.Digest]int64, chains []digest.Digest) map[digest.Digest]int64 {
	out := make(map[digest.Digest]int64, len(blobs)+len(chains))
	for d := range blobs {
		out[d] = s.blobDisk(d)
		if n := s.diskFileSize(d); n > 0 {
			out["disk "+d] = n
		}
	}
	for _, c := range chains {
		if n := s.lazySize(c); n > 0 {
			out["lazy "+c] = n
		}
	}
	dirs := make(map[digest.Digest]string, len(chains))
	s.mu.RLock()
	for _, c := range chains {
		if l := s.layers[c]; l != nil {
			dirs[c] = l.Dir
		}
	}
	s.mu.RUnlock()
	for c, dir := range dirs {
		if n, err := s.layerDisk(ctx, dir); err == nil {
			out["chain "+c] = n
		}
		if n := s.erofsSize(c); n > 0 {
			out["erofs "+c] = n
		}
	}
	return out
}
