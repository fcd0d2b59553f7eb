package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/diskimage"
	"tenon.dev/tenon/internal/image/qcow2"
)

// DiskOptions say what becomes of a file that is a disk, not an archive.
type DiskOptions struct {
	// Format, if not "", says that the file is a disk, and which: "qcow2" or "raw".
	// Otherwise its first bytes tell.
	Format string
	// Names are given to the image. Suggested is given if there are none, unless an
	// image that is no disk has it.
	Names     []string
	Suggested string
	// Firmware is "bios" or "uefi"; by default what the architecture's machines have.
	Firmware string
	// User is the account that the system makes by itself, for show.
	User    string
	Labels  map[string]string
	Comment string
}

// diskFormat tells whether what comes is a disk. r's bytes stay to be read.
func (o *DiskOptions) diskFormat(r *bufio.Reader) (string, error) {
	switch o.Format {
	case diskimage.QCOW2, diskimage.Raw:
		return o.Format, nil
	case "":
	default:
		return "", fmt.Errorf("disk format %.40q is neither qcow2 nor raw: %w", o.Format, errdefs.ErrInvalidArgument)
	}
	head, err := r.Peek(diskimage.HeadBytes)
	if err != nil && err != io.EOF {
		return "", err
	}
	return diskimage.Sniff(head)
}

// loadDisk makes an image of a disk, which is r's plain bytes.
func (s *Store) loadDisk(ctx context.Context, r io.Reader, format, source string, platform *ocispec.Platform, o DiskOptions, allow func(string) error, progress ProgressFunc) (Loaded, error) {
	fail := func(err error) (Loaded, error) { return Loaded{}, fmt.Errorf("%s disk: %w", format, err) }
	names, err := s.diskNames(o, allow)
	if err != nil {
		return Loaded{}, err
	}
	now := time.Now().UTC()
	c := &diskimage.Config{Created: &now, Platform: *s.cfg.Platform, Disk: diskimage.Disk{Format: format, Firmware: o.Firmware, User: o.User}}
	c.Platform.OSVersion, c.Platform.OSFeatures = "", nil
	if platform != nil {
		c.Platform = *platform
	}
	c.Config.Labels = o.Labels
	if err := c.ValidateSaid(); err != nil {
		return fail(err)
	}
	c.History = []ocispec.History{{Created: &now, CreatedBy: source + " " + format + " disk", Comment: o.Comment}}
	var layer ocispec.Descriptor
	in := &reportReader{r: &contextReader{ctx, r}, report: func(n int64) {
		progress.say(Progress{Status: "Loading disk", Current: n})
	}}
	if format == diskimage.QCOW2 {
		layer, err = s.takeQCOW2(in, c)
	} else {
		layer, err = s.takeRaw(in, c)
	}
	if err != nil {
		return fail(err)
	}
	target, err := s.diskManifest(ctx, c, layer)
	if err != nil {
		return fail(err)
	}
	img, err := s.readImage(target, target)
	if err != nil {
		return fail(err)
	}
	if err := s.placeDisk(ctx, img); err != nil {
		return fail(err)
	}
	if err := s.recordLoaded([]loadedImage{{img, names}}, source); err != nil {
		return fail(err)
	}
	out := Loaded{ID: img.ID}
	if len(names) > 0 {
		out.Ref = familiar(names[0])
	}
	s.event(source, img.ID, out.Ref, nil)
	return out, nil
}

// diskNames are the canonical names of a disk image that is to be made.
func (s *Store) diskNames(o DiskOptions, allow func(string) error) (names []string, err error) {
	list := o.Names
	if len(list) == 0 && o.Suggested != "" {
		list = []string{o.Suggested}
	}
	for _, ref := range list {
		n, err := newNames(ref)
		if err != nil {
			return nil, err
		}
		names = append(names, n...)
	}
	for _, n := range names {
		if allow != nil {
			if err := allow(n); err != nil {
				return nil, err
			}
		}
		if len(o.Names) > 0 {
			continue
		}
		if img, err := s.Resolve(context.Background(), n, nil); err == nil && img.Disk == nil {
			return nil, fmt.Errorf("%s is the name of an image that is no disk: say another with --tag: %w", familiar(n), errdefs.ErrConflict)
		}
	}
	return names, nil
}

// takeQCOW2 stores a qcow2 file as it is.
func (s *Store) takeQCOW2(r io.Reader, c *diskimage.Config) (layer ocispec.Descriptor, err error) {
	w, err := s.newIngest(digest.SHA256)
	if err != nil {
		return layer, err
	}
	defer w.close()
	if _, err = io.CopyBuffer(struct{ io.Writer }{w}, r, make([]byte, sparseChunk)); err != nil {
		w.abort(err)
		return layer, err
	}
	h, err := qcow2.Read(w.f, w.n)
	if err == nil {
		err = s.checkVirtual(h.VirtualSize)
	}
	if err != nil {
		w.abort(err)
		return layer, err
	}
	size := w.n
	if c.Disk.Digest, err = w.commit("", -1); err != nil {
		return layer, err
	}
	c.Disk.VirtualSize = h.VirtualSize
	return ocispec.Descriptor{MediaType: diskimage.LayerQCOW2, Digest: c.Disk.Digest, Size: size}, nil
}

func (s *Store) checkVirtual(n int64) error {
	if n > s.cfg.Limits.DiskBytes {
		return fmt.Errorf("it has %d bytes, %d are the most (limits.max-disk-size): %w", n, s.cfg.Limits.DiskBytes, errdefs.ErrResourceExhausted)
	}
	return nil
}

// takeRaw stores a raw disk twice: compressed, as it is sent to others, and as a file
// with holes, which machines use.
func (s *Store) takeRaw(r io.Reader, c *diskimage.Config) (layer ocispec.Descriptor, err error) {
	w, err := s.newIngest(digest.SHA256)
	if err != nil {
		return layer, err
	}
	defer w.close()
	defer func() {
		if err != nil {
			w.abort(err)
		}
	}()
	file, err := s.newSparse()
	if err != nil {
		return layer, err
	}
	defer file.discard()
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(2))
	if err != nil {
		return layer, err
	}
	sum := sha256.New()
	max := s.cfg.Limits.DiskBytes
	n, err := io.CopyBuffer(together{file, sum, z}, struct{ io.Reader }{fullReader{io.LimitReader(r, max+1)}}, make([]byte, sparseChunk))
	if cerr := z.Close(); err == nil {
		err = cerr
	}
	switch {
	case err != nil:
		return layer, err
	case n > max:
		return layer, s.checkVirtual(n)
	case n == 0 || n%512 != 0:
		return layer, fmt.Errorf("%d bytes are not whole sectors of 512 bytes: %w", n, errdefs.ErrInvalidArgument)
	}
	c.Disk.VirtualSize, c.Disk.Digest = n, digest.NewDigest(digest.SHA256, sum)
	size := w.n
	d, err := w.commit("", -1)
	if err != nil {
		return layer, err
	}
	path := filepath.Join(s.disksDir(), d.Encoded())
	if _, serr := os.Lstat(path); errors.Is(serr, os.ErrNotExist) {
		if err := file.commit(path); err != nil {
			return layer, err
		}
	}
	return ocispec.Descriptor{MediaType: diskimage.LayerRaw, Digest: d, Size: size}, nil
}

// fullReader fills what it is given, but for the end.
type fullReader struct{ r io.Reader }

func (f fullReader) Read(p []byte) (n int, err error) {
	for n < len(p) && err == nil { // not io.ReadFull: a source that breaks off says so itself
		var m int
		m, err = f.r.Read(p[n:])
		n += m
	}
	return n, err
}

// diskManifest stores a disk image's config and manifest. The same disk with the same
// settings is the same image, whenever it is loaded.
func (s *Store) diskManifest(ctx context.Context, c *diskimage.Config, layer ocispec.Descriptor) (target ocispec.Descriptor, err error) {
	if err := c.Validate(); err != nil {
		return target, err
	}
	all, err := s.All(ctx)
	if err != nil {
		return target, err
	}
	for _, img := range all {
		if img.Disk == nil || img.Target.Digest != img.Manifest.Digest {
			continue
		}
		a, b := *c, *img.Disk
		a.Created, a.History, b.Created, b.History = nil, nil, nil, nil
		if a.Disk.Firmware == "" {
			a.Disk.Firmware = diskimage.DefaultFirmware(a.Architecture)
		}
		if len(a.Config.Labels) == 0 {
			a.Config.Labels = b.Config.Labels
			if len(b.Config.Labels) > 0 {
				continue
			}
		}
		if reflect.DeepEqual(a, b) && img.LayerDescs[0].Digest == layer.Digest {
			return img.Target, nil
		}
	}
	conf, err := s.putJSON(diskimage.ConfigMediaType, c)
	if err != nil {
		return target, err
	}
	layer.Annotations = map[string]string{ocispec.AnnotationTitle: "disk." + c.Disk.Format}
	if c.Disk.Format == diskimage.Raw {
		layer.Annotations[ocispec.AnnotationTitle] += ".zst"
	}
	target, err = s.putJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: diskimage.ArtifactType, Config: conf, Layers: []ocispec.Descriptor{layer},
		Annotations: map[string]string{ocispec.AnnotationCreated: c.Created.Format(time.RFC3339)},
	})
	return target, err
}

// importDisk makes a disk image of what is to be imported, if it is a disk. Otherwise it
// returns neither an image nor an error, and what is to be read then.
func (s *Store) importDisk(ctx context.Context, r io.Reader, names []string, opts ImportOptions) (*Image, io.Reader, error) {
	br := bufio.NewReaderSize(r, chunkBytes)
	head, err := br.Peek(chunkBytes)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	zr, _, err := decompress(bytes.NewReader(head)) // only to look at the beginning
	if err != nil {
		return nil, br, nil // it is said when all of it is read
	}
	format, err := opts.Disk.diskFormat(bufio.NewReaderSize(upToError{zr}, diskimage.HeadBytes))
	zr.Close()
	if err != nil || format == "" {
		return nil, br, err
	}
	if len(opts.Changes) > 0 {
		return nil, nil, fmt.Errorf("import: a disk image has no Dockerfile instructions: %w", errdefs.ErrInvalidArgument)
	}
	end, err := s.begin()
	if err != nil {
		return nil, nil, err
	}
	defer end()
	if zr, _, err = decompress(br); err != nil {
		return nil, nil, err
	}
	defer zr.Close()
	o := opts.Disk
	o.Names, o.Suggested, o.Comment = nil, "", opts.Message
	for _, n := range names {
		o.Names = append(o.Names, familiar(n))
	}
	l, err := s.loadDisk(ctx, zr, format, "import", opts.Platform, o, nil, nil)
	if err != nil {
		s.gcSoon()
		return nil, nil, fmt.Errorf("import: %w", err)
	}
	img, err := s.Resolve(ctx, l.ID, nil)
	return img, nil, err
}

// upToError ends where its reader fails.
type upToError struct{ r io.Reader }

func (u upToError) Read(p []byte) (int, error) {
	n, err := u.r.Read(p)
	if err != nil {
		err = io.EOF
	}
	return n, err
}
