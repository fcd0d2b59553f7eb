package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/pgzip"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/layered"
)

// makeOptions describe a new image made here, of a parent's layers and one more.
type makeOptions struct {
	parent  *Image    // may be nil
	layer   io.Reader // tar, compressed or not; nil for none
	names   []string  // canonical
	source  string
	config  dockerspec.DockerOCIImage // without RootFS and History
	history ocispec.History
	// attest, if not nil, says what is attested of the image; its target is an index
	// then. It is given the new layer.
	attest     func(img *Image, top layered.Stack) ([]Statement, error)
	attestName string // what the attestation calls it
}

// make stores the layer (compressed), unpacks it in the same pass, and records
// the image.
func (s *Store) make(ctx context.Context, o makeOptions) (*Image, error) {
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	img, err := s.makeImage(ctx, o)
	if err != nil {
		s.gcSoon()
	}
	return img, err
}

func (s *Store) makeImage(ctx context.Context, o makeOptions) (*Image, error) {
	c := o.config
	c.RootFS = ocispec.RootFS{Type: "layers"}
	c.History = nil
	var descs []ocispec.Descriptor
	if o.parent != nil {
		if o.parent.Disk != nil {
			return nil, errDiskImage(o.parent)
		}
		if err := s.unpackImage(ctx, o.parent); err != nil {
			return nil, err
		}
		c.RootFS.DiffIDs = slices.Clone(o.parent.DiffIDs)
		c.History = slices.Clone(o.parent.Config.History)
		for _, d := range o.parent.LayerDescs {
			descs = append(descs, keptLayer(d))
		}
	}
	var u *unpacked
	if o.layer != nil {
		var desc ocispec.Descriptor
		var err error
		if u, desc, err = s.newLayer(ctx, o.layer); err != nil {
			return nil, err
		}
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, u.diffID)
		descs = append(descs, desc)
	} else {
		o.history.EmptyLayer = true
	}
	c.History = append(c.History, o.history)
	img, err := s.assemble(c, descs)
	if err == nil && u != nil {
		last := len(img.ChainIDs) - 1
		if err = s.publish(ctx, u, img.DiffIDs, img.ChainIDs, last); err == nil {
			u = nil
		}
	}
	if err != nil {
		if u != nil {
			s.discard(u.dir)
		}
		return nil, err
	}
	if o.attest != nil {
		st, err := o.attest(img, layered.Stack{s.layerDir(img.ChainID)})
		if err != nil {
			return nil, err
		}
		if img, err = s.attested(img, o.attestName, st); err != nil {
			return nil, err
		}
	}
	parent := ""
	if o.parent != nil {
		parent = o.parent.ID
	}
	return s.finish(img, o.names, o.source, parent)
}

// assemble writes config and manifest.
func (s *Store) assemble(c dockerspec.DockerOCIImage, descs []ocispec.Descriptor) (*Image, error) {
	if c.RootFS.DiffIDs == nil {
		c.RootFS.DiffIDs = []digest.Digest{}
	}
	if descs == nil {
		descs = []ocispec.Descriptor{}
	}
	conf, err := s.putJSON(ocispec.MediaTypeImageConfig, c)
	if err != nil {
		return nil, err
	}
	man, err := s.putJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: conf, Layers: descs,
	})
	if err != nil {
		return nil, err
	}
	return s.readImage(man, man)
}

func ociLayerType(mt string) string {
	switch mt {
	case images.MediaTypeDockerSchema2Layer:
		return ocispec.MediaTypeImageLayer
	case images.MediaTypeDockerSchema2LayerGzip:
		return ocispec.MediaTypeImageLayerGzip
	case images.MediaTypeDockerSchema2LayerZstd:
		return ocispec.MediaTypeImageLayerZstd
	}
	return mt
}

// newLayer unpacks a tar and stores it with gzip, reading it once.
func (s *Store) newLayer(ctx context.Context, r io.Reader) (_ *unpacked, _ ocispec.Descriptor, err error) {
	var desc ocispec.Descriptor
	plain, format, err := decompress(r)
	if err != nil {
		return nil, desc, err
	}
	defer plain.Close()
	if format == unknownFormat {
		if _, err := io.ReadFull(plain, make([]byte, 1)); err == io.EOF { // nothing at all is an empty archive, as for Docker
			return s.newLayer(ctx, bytes.NewReader(make([]byte, 1024)))
		}
		return nil, desc, fmt.Errorf("not a tar archive: %w", errdefs.ErrInvalidArgument)
	}
	w, err := s.newIngest(digest.SHA256)
	if err != nil {
		return nil, desc, err
	}
	defer w.close()
	defer func() {
		if err != nil {
			w.abort(err)
		}
	}()
	zw, err := pgzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return nil, desc, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	pr, pw := io.Pipe()
	type result struct {
		u   *unpacked
		err error
	}
	done := make(chan result, 1)
	go func() {
		u, err := s.unpackStream(ctx, nil, pr)
		pr.CloseWithError(errors.Join(err, io.ErrClosedPipe)) // the writer stops at once
		done <- result{u, err}
	}()
	h := sha256.New()
	_, err = io.CopyBuffer(io.MultiWriter(h, zw, pw), struct{ io.Reader }{plain}, make([]byte, 1<<20))
	if cerr := zw.Close(); err == nil {
		err = cerr
	}
	pw.CloseWithError(err) // nil is io.EOF
	res := <-done
	if res.err != nil {
		err = res.err
	}
	if err != nil {
		if res.u != nil {
			s.discard(res.u.dir)
		}
		return nil, desc, err
	}
	res.u.diffID = digest.NewDigest(digest.SHA256, h)
	d, err := w.commit("", -1)
	if err != nil {
		s.discard(res.u.dir)
		return nil, desc, err
	}
	return res.u, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: d, Size: w.n}, nil
}

// Import makes an image of one layer from a root file system's tar, compressed
// or not.
func (s *Store) Import(ctx context.Context, r io.Reader, opts ImportOptions) (*Image, error) {
	names, err := newNames(opts.Ref)
	if err != nil {
		return nil, err
	}
	p := s.cfg.Platform
	if opts.Platform != nil {
		p = opts.Platform
	}
	if img, rest, err := s.importDisk(ctx, r, names, opts); img != nil || err != nil {
		return img, err
	} else {
		r = rest
	}
	now := time.Now().UTC()
	c := dockerspec.DockerOCIImage{Image: ocispec.Image{Created: &now, Platform: *p}}
	if err := applyChanges(&c.Config, opts.Changes); err != nil {
		return nil, err
	}
	comment := opts.Message
	if comment == "" {
		comment = "Imported from -"
	}
	img, err := s.make(ctx, makeOptions{layer: r, names: names, source: "import", config: c, history: ocispec.History{Created: &now, Comment: comment}})
	if err != nil {
		return nil, fmt.Errorf("import: %w", err)
	}
	ref := img.ID
	if len(names) > 0 {
		ref = familiar(names[0])
	}
	if len(names) > 0 {
		s.event("tag", img.ID, ref, nil)
	}
	s.event("import", img.ID, ref, nil)
	return img, nil
}

// Commit makes an image from a parent and a layer of changes.
func (s *Store) Commit(ctx context.Context, opts CommitOptions) (*Image, error) {
	names, err := newNames(opts.Ref)
	if err != nil {
		return nil, err
	}
	now := time.Now().UTC()
	c := dockerspec.DockerOCIImage{Image: ocispec.Image{Platform: *s.cfg.Platform}}
	if opts.Parent != nil {
		c = opts.Parent.Config
		c.Config = cloneConfig(c.Config)
	}
	c.Created, c.Author = &now, opts.Author
	if opts.Config != nil {
		c.Config = cloneConfig(*opts.Config)
	}
	if err := applyChanges(&c.Config, opts.Changes); err != nil {
		return nil, err
	}
	img, err := s.make(ctx, makeOptions{
		parent: opts.Parent, layer: opts.Diff, names: names, source: "commit", config: c,
		history: ocispec.History{Created: &now, CreatedBy: opts.ContainerCommand, Author: opts.Author, Comment: opts.Comment},
	})
	if err != nil {
		return nil, fmt.Errorf("commit: %w", err)
	}
	ref := img.ID
	if len(names) > 0 {
		ref = familiar(names[0])
	}
	s.event("create", img.ID, ref, map[string]string{"comment": opts.Comment})
	if len(names) > 0 {
		s.event("tag", img.ID, ref, nil)
	}
	return img, nil
}

// newNames reads the name for a new image; "" is none.
func newNames(ref string) ([]string, error) {
	if ref == "" {
		return nil, nil
	}
	n, err := parseRef(ref)
	if err != nil {
		return nil, err
	}
	if err := taggable(n); err != nil {
		return nil, err
	}
	return []string{canonical(n)}, nil
}
