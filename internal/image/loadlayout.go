package image

import (
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// layout loads an OCI layout: index.json's manifests, each an image or an index.
func (l *loader) layout(platform *ocispec.Platform) ([]Loaded, error) {
	var idx ocispec.Index
	f, err := l.find("index.json")
	if err != nil {
		return nil, err
	}
	var ver ocispec.ImageLayout
	if lf, err := l.find("oci-layout"); err != nil {
		return nil, err
	} else if err := json.Unmarshal(lf.small, &ver); err != nil || ver.Version != ocispec.ImageLayoutVersion {
		return nil, fmt.Errorf("oci-layout: version %.20q is not known: %w", ver.Version, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(f.small, &idx); err != nil {
		return nil, fmt.Errorf("index.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(idx.Manifests) > maxLoadedImages {
		return nil, fmt.Errorf("index.json: %d images, %d are the most: %w", len(idx.Manifests), maxLoadedImages, errdefs.ErrResourceExhausted)
	}
	// The documents were kept in memory until it was known that they matter.
	for name, f := range l.files {
		if f.small != nil && strings.HasPrefix(name, "blobs/") {
			if err := l.keep(name, f); err != nil {
				return nil, err
			}
		}
	}
	var all []loadedImage
	byTarget := map[digest.Digest]int{}
	for _, d := range idx.Manifests {
		if err := checkDescriptor(d); err != nil {
			return nil, fmt.Errorf("index.json: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if isAttestation(d) {
			continue
		}
		var names []string
		if n := refOf(d, l.dockerTags(d)); n != "" {
			names = append(names, n)
		}
		if i, ok := byTarget[d.Digest]; ok {
			all[i].names = append(all[i].names, names...)
			continue
		}
		d.Annotations = nil
		if d.Platform != nil && !images.IsManifestType(d.MediaType) {
			d.Platform = nil
		}
		desc, err := l.s.choose(d, platform)
		if err != nil {
			return nil, err
		}
		img, err := l.s.readImage(d, desc)
		if err != nil {
			return nil, err
		}
		files := make([]*archiveFile, len(img.LayerDescs))
		for i, ld := range img.LayerDescs {
			files[i] = l.files["blobs/"+ld.Digest.Algorithm().String()+"/"+ld.Digest.Encoded()]
			if !l.s.hasBlob(ld.Digest, ld.Size) {
				return nil, fmt.Errorf("archive lacks the layer %s with %d bytes: %w", ld.Digest, ld.Size, errdefs.ErrInvalidArgument)
			}
		}
		if err := l.place(img, files); err != nil {
			return nil, err
		}
		if err := l.s.placeDisk(l.ctx, img); err != nil {
			return nil, err
		}
		byTarget[d.Digest] = len(all)
		all = append(all, loadedImage{img: img, names: names})
	}
	return l.record(all)
}

// keep stores a document that was held in memory under its own digest.
func (l *loader) keep(name string, f *archiveFile) error {
	p := strings.Split(name, "/")
	alg := digest.Algorithm(p[1])
	if alg == digest.SHA256 {
		_, err := l.s.putBlob("", f.small)
		return err
	}
	w, err := l.s.newIngest(alg)
	if err != nil {
		return err
	}
	defer w.close()
	if _, err := w.Write(f.small); err != nil {
		w.abort(err)
		return err
	}
	_, err = w.commit("", -1)
	return err
}

// dockerTags finds in manifest.json, if the layout has one too, the name that
// goes with a bare tag in the OCI annotation.
func (l *loader) dockerTags(d ocispec.Descriptor) []string {
	f := l.files["manifest.json"]
	if f == nil || f.small == nil || d.Annotations[annotationName] != "" {
		return nil
	}
	var list []dockerManifest
	if json.Unmarshal(f.small, &list) != nil {
		return nil
	}
	desc, err := l.s.choose(d, nil)
	if err != nil {
		return nil
	}
	doc, err := l.s.readDocument(desc)
	if err != nil {
		return nil
	}
	var tags []string
	for _, m := range list {
		if path.Base(m.Config) == doc.Config.Digest.Encoded() {
			tags = append(tags, m.RepoTags...)
		}
	}
	return tags
}

// refOf reads the name of an index.json entry from its annotations, "" if it has none.
func refOf(d ocispec.Descriptor, tags []string) string {
	for _, v := range []string{d.Annotations[annotationName], d.Annotations[ocispec.AnnotationRefName]} {
		if v == "" {
			continue
		}
		// A bare tag ("latest") is not a name; a name has a domain, a path or a tag.
		if !strings.ContainsAny(v, "/:@") {
			if i := slices.IndexFunc(tags, func(t string) bool { return strings.HasSuffix(t, ":"+v) }); i >= 0 {
				v = tags[i]
			} else {
				continue
			}
		}
		n, err := reference.ParseNormalizedNamed(v)
		if err != nil {
			continue
		}
		return canonical(reference.TagNameOnly(n))
	}
	for _, t := range tags {
		if n, err := parseRef(t); err == nil {
			return canonical(n)
		}
	}
	return ""
}
