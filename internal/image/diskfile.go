package image

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/diskimage"
	"tenon.dev/tenon/internal/image/qcow2"
)

// A disk image's qcow2 file is its layer's blob. A raw disk is compressed in its blob,
// and lies as a sparse file at
//
//	<root>/disks/<layer's digest>
//
// It is made when the image is pulled or loaded, or first asked for, under another name,
// brought to the disk and renamed; it goes with the last image that has the layer.

// DiskFile is the disk of a disk image. Nobody may write to the file.
type DiskFile struct {
	// Path is the file, of the store's owner. Format is "qcow2" (without backing file,
	// external data or encryption) or "raw".
	Path, Format string
	VirtualSize  int64 // bytes that a machine sees
	// Config is the image's configuration; it must not be changed.
	Config *diskimage.Config
}

// DiskFile returns the disk of a disk image, made first where it isn't there yet. The
// image is held until release is called. InvalidArgument for other images, and for a
// disk that must not be used.
func (s *Store) DiskFile(ctx context.Context, img *Image) (_ DiskFile, release func(), err error) {
	if img.Disk == nil {
		return DiskFile{}, nil, fmt.Errorf("image %s is not a disk image: it has a file system for containers, no disk with an operating system: %w", img.Ref(), errdefs.ErrInvalidArgument)
	}
	if release, err = s.holdFor(ctx, img.ID); err != nil {
		return DiskFile{}, nil, err
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	end, err := s.begin()
	if err != nil {
		return DiskFile{}, nil, err
	}
	defer end()
	if err := s.placeDisk(ctx, img); err != nil {
		return DiskFile{}, nil, fmt.Errorf("image %s: %w", img.Ref(), err)
	}
	return DiskFile{Path: s.diskPath(img), Format: img.Disk.Disk.Format, VirtualSize: img.Disk.Disk.VirtualSize, Config: img.Disk}, release, nil
}

// errDiskImage is the answer to who wants a disk image's files.
func errDiskImage(img *Image) error {
	return fmt.Errorf("image %s is a disk with an operating system of its own, which runs as a machine only (--isolation machine): %w", img.Ref(), errdefs.ErrInvalidArgument)
}

// Buildable refuses names of disk images, which have no files that a build could use.
// What is not here is not known to be one.
func (s *Store) Buildable(ctx context.Context, ref string) error {
	if img, err := s.Resolve(ctx, ref, nil); err == nil && img.Disk != nil {
		return errDiskImage(img)
	}
	return nil
}

func (s *Store) disksDir() string { return filepath.Join(s.cfg.Root, "disks") }

func (s *Store) diskPath(img *Image) string {
	layer := img.LayerDescs[0].Digest
	if img.Disk.Disk.Format == diskimage.QCOW2 {
		return s.blobPath(layer)
	}
	return filepath.Join(s.disksDir(), layer.Encoded())
}

// parseDisk fills in what a disk image's config says.
func (s *Store) parseDisk(img *Image, b []byte) error {
	c, err := diskimage.Parse(b)
	if err != nil {
		return err
	}
	if _, err := c.Layer(img.LayerDescs); err != nil {
		return err
	}
	if c.Disk.VirtualSize > s.cfg.Limits.DiskBytes {
		return fmt.Errorf("a disk of %d bytes, %d are the most (limits.max-disk-size): %w", c.Disk.VirtualSize, s.cfg.Limits.DiskBytes, errdefs.ErrResourceExhausted)
	}
	img.Disk = c
	if img.Target.Digest == img.Manifest.Digest {
		img.Target.ArtifactType = diskimage.ArtifactType
	}
	img.Manifest.ArtifactType = diskimage.ArtifactType
	img.Platform = c.Platform
	img.Config.Platform, img.Config.Created, img.Config.Author, img.Config.History = c.Platform, c.Created, c.Author, c.History
	img.Config.Config.Labels = c.Labels()
	if c.Created != nil {
		img.Created = *c.Created
	}
	if n := len(c.History); n > 0 {
		img.Comment = c.History[n-1].Comment
	}
	return nil
}

// diskSize is what a disk image's disk takes; 0 for other images.
func (s *Store) diskSize(img *Image) int64 {
	if img.Disk == nil {
		return 0
	}
	if n := s.diskFileSize(img.LayerDescs[0].Digest); n > 0 {
		return n
	}
	return img.LayerDescs[0].Size
}

// diskFileSize is what the decompressed disk of a layer takes on the disk; 0 if there is none.
func (s *Store) diskFileSize(layer digest.Digest) int64 {
	var st unix.Stat_t
	if layer.Validate() != nil || unix.Lstat(filepath.Join(s.disksDir(), layer.Encoded()), &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// collectDisks calls trash for each disk whose layer is not needed.
func (s *Store) collectDisks(blobs map[digest.Digest]bool, trash func(path string)) error {
	ents, err := os.ReadDir(s.disksDir())
	if err != nil {
		return err
	}
	for _, e := range ents {
		if !blobs[digest.NewDigestFromEncoded(digest.SHA256, e.Name())] {
			trash(filepath.Join(s.disksDir(), e.Name()))
		}
	}
	return nil
}

// placeDisk makes sure that the disk of a disk image is there, and what the config says
// of it; other images have none. The layer's blob is here, and the store's gate is held.
func (s *Store) placeDisk(ctx context.Context, img *Image) error {
	if img.Disk == nil {
		return nil
	}
	if img.Disk.Disk.Format == diskimage.QCOW2 {
		return s.checkQCOW2(img)
	}
	path := s.diskPath(img)
	there := func() bool {
		st, err := os.Lstat(path)
		return err == nil && st.Size() == img.Disk.Disk.VirtualSize
	}
	if there() {
		return nil
	}
	unlock, err := s.locks.lock(ctx, "disk "+img.LayerDescs[0].Digest.String())
	if err != nil {
		return err
	}
	defer unlock()
	if there() {
		return nil // another has made it meanwhile
	}
	return s.makeRaw(ctx, path, img.LayerDescs[0], img.Disk.Disk)
}

func (s *Store) checkQCOW2(img *Image) error {
	f, err := s.openBlob(img.LayerDescs[0].Digest)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	h, err := qcow2.Read(f, st.Size())
	if err != nil {
		return err
	}
	if h.VirtualSize != img.Disk.Disk.VirtualSize {
		return fmt.Errorf("the disk has %d bytes, its config says %d: %w", h.VirtualSize, img.Disk.Disk.VirtualSize, errdefs.ErrDataLoss)
	}
	return nil
}

// makeRaw decompresses a raw disk and checks that it is the one which is described.
func (s *Store) makeRaw(ctx context.Context, path string, layer ocispec.Descriptor, d diskimage.Disk) error {
	blob, err := s.openBlob(layer.Digest)
	if err != nil {
		return err
	}
	defer blob.Close()
	z, err := zstd.NewReader(blob, zstd.WithDecoderMaxWindow(zstdMemory), zstd.WithDecoderMaxMemory(1<<62), zstd.WithDecoderConcurrency(2))
	if err != nil {
		return err
	}
	defer z.Close()
	w, err := s.newSparse()
	if err != nil {
		return err
	}
	defer w.discard()
	sum := sha256.New()
	n, err := io.CopyBuffer(together{w, sum}, fullReader{&contextReader{ctx, io.LimitReader(z, d.VirtualSize+1)}}, make([]byte, sparseChunk))
	if err != nil {
		return fmt.Errorf("decompress disk: %w", err)
	}
	if got := digest.NewDigest(digest.SHA256, sum); n != d.VirtualSize || got != d.Digest {
		return fmt.Errorf("layer %s: it is not the disk of %d bytes with the digest %s: %w", layer.Digest, d.VirtualSize, d.Digest, errdefs.ErrDataLoss)
	}
	return w.commit(path)
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

const (
	sparseChunk = 1 << 20
	sparseBlock = 64 << 10 // zeros of this size and alignment are holes
)

var zeros [sparseBlock]byte

// together writes to all at the same time.
type together []io.Writer

func (t together) Write(p []byte) (int, error) {
	var g errgroup.Group
	for _, w := range t {
		g.Go(func() error { _, err := w.Write(p); return err })
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	return len(p), nil
}

// sparseFile is a file being written that has holes where zeros are.
type sparseFile struct {
	s *Store
	f *os.File
	n int64
}

// newSparse begins a file in a directory that is emptied when the store is opened.
func (s *Store) newSparse() (*sparseFile, error) {
	f, err := os.OpenFile(filepath.Join(s.layerTmp(), rand.Text()), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o444)
	if err != nil {
		return nil, fmt.Errorf("write disk: %w", err)
	}
	return &sparseFile{s: s, f: f}, nil
}

func (w *sparseFile) Write(p []byte) (int, error) {
	if w.n>>26 != (w.n+int64(len(p)))>>26 {
		if err := w.s.checkFree(); err != nil {
			return 0, err
		}
	}
	done := 0
	for done < len(p) {
		m := min(len(p)-done, sparseBlock-int(w.n%sparseBlock))
		if b := p[done : done+m]; !bytes.Equal(b, zeros[:m]) {
			if _, err := w.f.WriteAt(b, w.n); err != nil {
				return done, err
			}
		}
		w.n += int64(m)
		done += m
	}
	return done, nil
}

// commit gives the file its place once it is on the disk.
func (w *sparseFile) commit(path string) error {
	if err := w.f.Truncate(w.n); err != nil {
		return err
	}
	if err := w.f.Sync(); err != nil {
		return err
	}
	return os.Rename(w.f.Name(), path)
}

// discard closes the file, and removes it unless it has its place.
func (w *sparseFile) discard() {
	_ = os.Remove(w.f.Name()) // a rename has taken the name away
	w.f.Close()
}

// content fetches what an image consists of, and brings it to its places. It tells
// whether anything was fetched.
func (p *puller) content(ctx context.Context, img *Image) (fetched bool, err error) {
	if img.Disk == nil {
		return p.layers(ctx, img)
	}
	d := img.LayerDescs[0]
	id := shortDigest(d.Digest)
	if p.s.hasBlob(d.Digest, d.Size) {
		p.progress.say(Progress{ID: id, Status: "Already exists"})
	} else {
		fetched = true
		p.progress.say(Progress{ID: id, Status: "Pulling disk"})
		err := p.blob(ctx, d, nil, func(cur int64) {
			p.progress.say(Progress{ID: id, Status: "Downloading", Current: cur, Total: d.Size})
		})
		if err != nil {
			return fetched, err
		}
	}
	if img.Disk.Disk.Format == diskimage.Raw {
		p.progress.say(Progress{ID: id, Status: "Extracting", Total: d.Size})
	}
	if err := p.s.placeDisk(ctx, img); err != nil {
		return fetched, err
	}
	p.progress.say(Progress{ID: id, Status: "Pull complete"})
	return fetched, nil
}
