package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Save writes images as one archive that is an OCI layout and a docker archive
// at once. Refs may be names or IDs; an image saved by its ID comes without a
// name. With a platform, other platforms' parts of an index are left out; the
// index, and so the ID, stays. The same images give the same bytes.
func (s *Store) Save(ctx context.Context, w io.Writer, refs []string, platform *ocispec.Platform) error {
	end, err := s.begin() // nothing is collected while it is read
	if err != nil {
		return err
	}
	defer end()
	type saved struct {
		img   *Image
		names []string
	}
	var all []*saved
	by := map[digest.Digest]*saved{}
	for _, ref := range refs {
		target, name, err := s.lookup(ref)
		if err != nil {
			return err
		}
		sv := by[target]
		if sv == nil {
			img, err := s.Resolve(ctx, target.String(), platform)
			if err != nil {
				return err
			}
			if err := s.complete1(ctx, img); err != nil {
				return err
			}
			sv = &saved{img: img}
			by[target] = sv
			all = append(all, sv)
		}
		if name != "" && !slices.Contains(sv.names, name) {
			sv.names = append(sv.names, name)
		}
	}
	a := &archiver{s: s, ctx: ctx, w: tar.NewWriter(w), done: map[digest.Digest]bool{}, buf: make([]byte, 1<<20)}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	docker := []dockerManifest{}
	if err := a.dir("blobs/"); err != nil {
		return err
	}
	for _, sv := range all {
		if err := a.image(sv.img, platform); err != nil {
			return fmt.Errorf("save %s: %w", sv.img.Ref(), err)
		}
		m := dockerManifest{Config: blobName(sv.img.ConfigDigest), RepoTags: []string{}, Layers: []string{}}
		for _, l := range sv.img.LayerDescs {
			m.Layers = append(m.Layers, blobName(l.Digest))
		}
		d := sv.img.Target
		d.Annotations = nil
		if len(sv.names) == 0 {
			idx.Manifests = append(idx.Manifests, d)
		}
		for _, n := range sv.names {
			d.Annotations = map[string]string{annotationName: n}
			named, err := reference.ParseNormalizedNamed(n)
			if err != nil {
				return err
			}
			if t, ok := named.(reference.Tagged); ok {
				d.Annotations[ocispec.AnnotationRefName] = t.Tag()
				m.RepoTags = append(m.RepoTags, reference.FamiliarString(named))
			}
			idx.Manifests = append(idx.Manifests, d)
		}
		if sv.img.Disk == nil { // Docker's own format has layers only
			docker = append(docker, m)
		}
	}
	for _, f := range []struct {
		name string
		v    any
	}{
		{ocispec.ImageIndexFile, idx},
		{"manifest.json", docker},
		{ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}},
	} {
		b, err := json.Marshal(f.v)
		if err != nil {
			return err
		}
		if err := a.file(f.name, int64(len(b)), strings.NewReader(string(b))); err != nil {
			return err
		}
	}
	if err := a.w.Close(); err != nil {
		return fmt.Errorf("save: %w", err)
	}
	for _, sv := range all {
		for _, n := range sv.names {
			s.event("save", sv.img.ID, familiar(n), nil)
		}
		if len(sv.names) == 0 {
			s.event("save", sv.img.ID, sv.img.ID, nil)
		}
	}
	return nil
}

func blobName(d digest.Digest) string {
	return "blobs/" + d.Algorithm().String() + "/" + d.Encoded()
}

type archiver struct {
	s    *Store
	ctx  context.Context
	w    *tar.Writer
	done map[digest.Digest]bool
	dirs []string
	buf  []byte
}

func (a *archiver) dir(name string) error {
	return a.w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR})
}

func (a *archiver) file(name string, size int64, r io.Reader) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0)}
	if err := a.w.WriteHeader(h); err != nil {
		return fmt.Errorf("save: %w", err)
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{a.w}, struct{ io.Reader }{r}, a.buf); err != nil {
		return fmt.Errorf("save: %w", err)
	}
	return nil
}

// image writes what the image consists of, each blob once for the archive.
func (a *archiver) image(img *Image, platform *ocispec.Platform) error {
	if platform == nil || !images.IsIndexType(img.Target.MediaType) {
		return a.tree(img.Target, nil, 0)
	}
	keep := func(d ocispec.Descriptor) bool {
		return d.Digest == img.Manifest.Digest || images.IsIndexType(d.MediaType) ||
			isAttestation(d) && d.Annotations[annotationRefDigest] == img.Manifest.Digest.String()
	}
	return a.tree(img.Target, keep, 0)
}

func (a *archiver) tree(d ocispec.Descriptor, keep func(ocispec.Descriptor) bool, depth int) error {
	if depth > maxIndexDepth+1 || !a.s.hasBlob(d.Digest, -1) {
		if depth == 0 {
			return fmt.Errorf("blob %s is not here: %w", d.Digest, errdefs.ErrNotFound)
		}
		return nil // of another platform, never fetched
	}
	if err := a.blob(d); err != nil {
		return err
	}
	if !images.IsIndexType(d.MediaType) && !images.IsManifestType(d.MediaType) {
		return nil
	}
	doc, err := a.s.readDocument(d)
	if err != nil {
		return err
	}
	for _, m := range doc.Manifests {
		if keep == nil || keep(m) {
			if err := a.tree(m, keep, depth+1); err != nil {
				return err
			}
		}
	}
	if doc.Config == nil {
		return nil
	}
	for _, b := range append([]ocispec.Descriptor{*doc.Config}, doc.Layers...) {
		if !a.s.hasBlob(b.Digest, -1) {
			return fmt.Errorf("blob %s is not here: %w", b.Digest, errdefs.ErrNotFound)
		}
		if err := a.blob(b); err != nil {
			return err
		}
	}
	return nil
}

func (a *archiver) blob(d ocispec.Descriptor) error {
	if a.done[d.Digest] {
		return nil
	}
	if err := a.ctx.Err(); err != nil {
		return context.Cause(a.ctx)
	}
	a.done[d.Digest] = true
	if dir := "blobs/" + d.Digest.Algorithm().String() + "/"; !slices.Contains(a.dirs, dir) {
		a.dirs = append(a.dirs, dir)
		if err := a.dir(dir); err != nil {
			return err
		}
	}
	f, err := os.Open(a.s.blobPath(d.Digest))
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return a.file(blobName(d.Digest), st.Size(), f)
}
