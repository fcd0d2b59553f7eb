package image

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/erofs"
	"tenon.dev/tenon/internal/image/layer"
)

// The build cache shares the store's layers and blobs. A layer's directory that the
// cache needs has an empty file of its name in held/: such a directory is not
// collected, whether an image has it or not. A build's own snapshots lie beside the
// layers from the beginning, so that one becomes a layer of an image by a record.
// Blobs are shared as hard links: each side removes its own name.

func (s *Store) heldDir() string { return filepath.Join(s.cfg.Root, "held") }

// NewLayerDir makes an empty directory beside the layers, held, and returns its
// name. ReleaseLayerDir lets it go.
func (s *Store) NewLayerDir() (name string, err error) {
	end, err := s.begin()
	if err != nil {
		return "", err
	}
	defer end()
	name = strings.ToLower(rand.Text()[:layerNameLen])
	if err := s.hold(name); err != nil {
		return "", err
	}
	if err := os.Mkdir(s.LayerPath(name), 0o755); err != nil {
		_ = os.Remove(filepath.Join(s.heldDir(), name))
		return "", fmt.Errorf("layer: %w", err)
	}
	return name, nil
}

func (s *Store) hold(name string) error {
	f, err := os.OpenFile(filepath.Join(s.heldDir(), name), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("layer %s: hold: %w", name, err)
	}
	return f.Close()
}

// HoldLayer holds the directory of an unpacked layer and returns its name and the
// layer's diff ID. NotFound if there is none.
func (s *Store) HoldLayer(chain digest.Digest) (name string, diffID digest.Digest, err error) {
	end, err := s.begin()
	if err != nil {
		return "", "", err
	}
	defer end()
	s.mu.RLock()
	l := s.layers[chain]
	s.mu.RUnlock()
	if l == nil {
		return "", "", fmt.Errorf("layer %s is not unpacked here: %w", chain, errdefs.ErrNotFound)
	}
	return l.Dir, l.DiffID, s.hold(l.Dir)
}

// LayerPath is where a directory of NewLayerDir or HoldLayer lies.
func (s *Store) LayerPath(name string) string { return filepath.Join(s.layersDir(), name) }

// ReleaseLayerDir lets a held directory go: it is removed unless an image has it.
// None of that name is no error.
func (s *Store) ReleaseLayerDir(name string) error {
	err := os.Remove(filepath.Join(s.heldDir(), name))
	if err != nil && !isNotExist(err) {
		return fmt.Errorf("layer %s: release: %w", name, err)
	}
	s.gcSoon()
	return nil
}

// LayerDiffID is the diff ID of the layer that lies in a directory. NotFound.
func (s *Store) LayerDiffID(name string) (digest.Digest, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, l := range s.layers {
		if l.Dir == name {
			return l.DiffID, nil
		}
	}
	return "", fmt.Errorf("layer %s: %w", name, errdefs.ErrNotFound)
}

// HeldLayerDirs lists what is held.
func (s *Store) HeldLayerDirs() ([]string, error) {
	ents, err := os.ReadDir(s.heldDir())
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range ents {
		out = append(out, e.Name())
	}
	return out, nil
}

// LayerDirs tells which directories beside the layers are layers of images.
func (s *Store) LayerDirs() map[string]bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make(map[string]bool, len(s.layers))
	for _, l := range s.layers {
		out[l.Dir] = true
	}
	return out
}

// LinkBlob gives a blob a second name on the same file system. NotFound if it is not
// here. Blobs are never written to.
func (s *Store) LinkBlob(d digest.Digest, path string) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("blob %.100q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	err := os.Link(s.blobPath(d), path)
	switch {
	case errors.Is(err, fs.ErrExist):
		return nil
	case isNotExist(err):
		return fmt.Errorf("blob %s is not here: %w", d, errdefs.ErrNotFound)
	}
	return err
}

// HasBlob tells whether a blob is here.
func (s *Store) HasBlob(d digest.Digest) bool { return s.hasBlob(d, -1) }

// Lookup finds what a name stands for. NotFound.
func (s *Store) Lookup(ref string) (ocispec.Descriptor, error) {
	d, _, err := s.lookup(ref)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := s.recs[d]
	if r == nil {
		return ocispec.Descriptor{}, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
	}
	return r.Target, nil
}

// AllTargets lists what all images are, with and without a name.
func (s *Store) AllTargets() []ocispec.Descriptor {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]ocispec.Descriptor, 0, len(s.recs))
	for _, r := range s.recs {
		out = append(out, r.Target)
	}
	return out
}

// OpenBlob opens a blob for reading. NotFound if it is not here.
func (s *Store) OpenBlob(d digest.Digest) (*os.File, error) { return s.openBlob(d) }

// RegistryHosts tells how a registry is reached, by the store's settings and without
// credentials.
func (s *Store) RegistryHosts(host string) ([]docker.RegistryHost, error) {
	return s.hosts(host, nil, nil)
}

// StackEROFS writes the files of a stack of layers (topmost first) as a read-only file
// system for virtual machines, in a new file. ENOSPC if the disk is too small for it.
func (s *Store) StackEROFS(ctx context.Context, stack []string, path string) (err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Root, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: s.cfg.Root, Err: err}
	}
	room := int64(st.Bavail)*st.Bsize - s.cfg.Limits.FreeBytes
	if room <= 0 {
		return fmt.Errorf("%d bytes of the disk must stay free: %w", s.cfg.Limits.FreeBytes, unix.ENOSPC)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			_ = os.Remove(path)
		}
	}()
	return erofs.Write(ctx, f, stack, erofs.Options{MaxSize: room})
}

// UnpackOnto unpacks a layer, compressed or not, into an empty directory that lies on
// others (topmost first), by the limits of all layers. It returns the digest and the
// size of the plain tar.
func (s *Store) UnpackOnto(ctx context.Context, r io.Reader, dir string, below []string) (digest.Digest, int64, error) {
	zr, format, err := decompress(r)
	if err != nil {
		return "", 0, err
	}
	defer zr.Close()
	if format == unknownFormat {
		return "", 0, fmt.Errorf("not a layer: %w", errdefs.ErrInvalidArgument)
	}
	lim := s.cfg.Limits
	most := lim.LayerBytes + lim.LayerEntries*1024 // with headers and padding
	bound := &boundReader{r: zr, left: most, what: lim.LayerBytes}
	h := sha256.New()
	plain := io.TeeReader(bound, h)
	res, err := layer.Unpack(ctx, plain, dir, layer.Limits{Bytes: lim.LayerBytes, Entries: lim.LayerEntries, FreeBytes: lim.FreeBytes})
	if err == nil {
		_, err = io.Copy(io.Discard, plain)
	}
	if err == nil {
		err = layer.Settle(dir, res, below)
	}
	return digest.NewDigest(digest.SHA256, h), most - bound.left, err
}

// BuiltImage is the result of a build.
type BuiltImage struct {
	Target ocispec.Descriptor
	// Names are what it is to be called; none: it is dangling.
	Names []string
	// BlobPath is where a blob of the build's lies, on the same file system. A blob
	// that the store has is not asked for.
	BlobPath func(digest.Digest) string
	// Layers are held directories with the files of the layers, by chain ID. What is
	// missing is unpacked when it is needed.
	Layers map[digest.Digest]string
}

// AddBuilt makes a build's result an image, without copying anything.
func (s *Store) AddBuilt(_ context.Context, b BuiltImage) (*Image, error) {
	var names []string
	for _, ref := range b.Names {
		n, err := newNames(ref)
		if err != nil {
			return nil, err
		}
		names = append(names, n...)
	}
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	img, err := s.addBuilt(b, names)
	if err != nil {
		s.gcSoon()
		return nil, fmt.Errorf("built image %s: %w", b.Target.Digest, err)
	}
	for _, n := range names {
		s.event("tag", img.ID, familiar(n), nil)
	}
	return img, nil
}

func (s *Store) addBuilt(b BuiltImage, names []string) (*Image, error) {
	target := b.Target
	target.Annotations = nil
	if err := s.linkTree(target, b.BlobPath, 0); err != nil {
		return nil, err
	}
	desc, err := s.choose(target, nil)
	if errdefs.IsNotFound(err) { // for other platforms only
		var all []candidate
		if all, err = s.candidates(target, 0); err == nil && len(all) > 0 {
			desc = all[0].desc
		}
	}
	if err != nil {
		return nil, err
	}
	img, err := s.readImage(target, desc)
	if err != nil {
		return nil, err
	}
	if err := s.adoptLayers(img, b.Layers); err != nil {
		return nil, err
	}
	return s.finish(img, names, "build", "")
}

// linkTree brings in a document and what it names, as far as it is there.
func (s *Store) linkTree(d ocispec.Descriptor, path func(digest.Digest) string, depth int) error {
	if depth > maxIndexDepth+1 {
		return fmt.Errorf("indexes nested too deeply: %w", errdefs.ErrInvalidArgument)
	}
	if err := checkDescriptor(d); err != nil {
		return err
	}
	if !s.hasBlob(d.Digest, d.Size) {
		if d.Digest.Algorithm() != digest.SHA256 {
			return fmt.Errorf("blob %s: only sha256: %w", d.Digest, errdefs.ErrNotImplemented)
		}
		if err := os.Link(path(d.Digest), s.blobPath(d.Digest)); err != nil && !errors.Is(err, fs.ErrExist) {
			if isNotExist(err) {
				return fmt.Errorf("blob %s is not here: %w", d.Digest, errdefs.ErrNotFound)
			}
			return err
		}
	}
	if !images.IsIndexType(d.MediaType) && !images.IsManifestType(d.MediaType) {
		return nil
	}
	doc, err := s.readDocument(d)
	if err != nil {
		return err
	}
	if doc.Config != nil {
		if err := s.linkTree(*doc.Config, path, depth+1); err != nil {
			return err
		}
	}
	for _, c := range doc.Layers {
		if err := s.linkTree(c, path, depth+1); err != nil {
			return err
		}
	}
	for _, c := range doc.Manifests {
		if err := s.linkTree(c, path, depth+1); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// adoptLayers makes held directories the image's layers.
func (s *Store) adoptLayers(img *Image, dirs map[digest.Digest]string) error {
	for i, c := range img.ChainIDs {
		dir := dirs[c]
		if dir == "" || s.hasLayer(c) {
			continue
		}
		if _, err := os.Lstat(filepath.Join(s.heldDir(), dir)); err != nil || filepath.Base(dir) != dir {
			continue // it is unpacked when it is needed
		}
		rec := &layerRecord{DiffID: img.DiffIDs[i], Dir: dir, Boot: s.boot}
		if i > 0 {
			rec.Parent = img.ChainIDs[i-1]
		}
		var err error
		if rec.Size, rec.Entries, err = treeSize(s.LayerPath(dir)); err != nil {
			return err
		}
		s.mu.Lock()
		if s.layers[c] == nil {
			s.layers[c] = rec
		}
		s.mu.Unlock()
	}
	return nil
}

// treeSize sums up a layer's files.
func treeSize(dir string) (size, entries int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		entries++
		if d.Type().IsRegular() {
			st, err := d.Info()
			if err != nil {
				return err
			}
			size += st.Size()
		}
		return nil
	})
	return size, max(0, entries-1), err
}
