package image

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/diskimage"
)

const (
	annotationRefType   = "vnd.docker.reference.type"
	annotationRefDigest = "vnd.docker.reference.digest"
	attestation         = "attestation-manifest"

	// maxIndexDepth bounds indexes inside indexes.
	maxIndexDepth = 3
	// maxLayers is more than overlay can stack (500) has use for.
	maxLayers = 500
)

// parseRef reads a name as Docker does: "busybox" is docker.io/library/busybox:latest.
func parseRef(ref string) (reference.Named, error) {
	n, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, fmt.Errorf("invalid reference format: %.200q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return reference.TagNameOnly(n), nil
}

// canonical drops the tag of a name that has a digest as well.
func canonical(n reference.Named) string {
	if d, ok := n.(reference.Digested); ok {
		return n.Name() + "@" + d.Digest().String()
	}
	return n.String()
}

// familiar shows a canonical name as users write it.
func familiar(name string) string {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.FamiliarString(n)
}

// lookup finds the target that ref names: a name, an ID, the digest of one of
// its manifests or configs, or a unique prefix of an ID. name is the canonical
// name if ref is one.
func (s *Store) lookup(ref string) (target digest.Digest, name string, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.lookupLocked(ref)
}

// missing is the error of an image that is not here, named as Docker does it.
func missing(ref string) error {
	name := ref
	if n, err := reference.ParseNormalizedNamed(ref); err == nil {
		name = reference.FamiliarString(reference.TagNameOnly(n))
	}
	return fmt.Errorf("No such image: %.200s: %w", name, errdefs.ErrNotFound)
}

func (s *Store) lookupLocked(ref string) (target digest.Digest, name string, err error) {
	notFound := missing(ref)
	if ref == "" {
		return "", "", fmt.Errorf("invalid reference format: empty image name: %w", errdefs.ErrInvalidArgument)
	}
	if d := digest.Digest(ref); strings.HasPrefix(ref, "sha256:") && d.Validate() == nil {
		if s.recs[d] != nil {
			return d, "", nil
		}
		for k, i := range s.images { // a manifest inside an index, or a config
			if i.Manifest.Digest == d || i.ConfigDigest == d {
				return k.target, "", nil
			}
		}
		return "", "", notFound
	}
	n, err := reference.ParseNormalizedNamed(ref)
	if err == nil {
		full := canonical(reference.TagNameOnly(n))
		if d := s.names[full]; d != "" {
			return d, full, nil
		}
		if dg, ok := n.(reference.Digested); ok {
			if s.recs[dg.Digest()] != nil && s.hasRepoLocked(dg.Digest(), n.Name()) {
				return dg.Digest(), "", nil
			}
			return "", "", notFound
		}
	}
	hex := strings.TrimPrefix(ref, "sha256:")
	if !isHex(hex) || len(hex) > 64 {
		if err != nil {
			return "", "", fmt.Errorf("invalid reference format: %.200q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
		}
		return "", "", notFound
	}
	for d, r := range s.recs {
		if strings.HasPrefix(d.Encoded(), hex) && !r.Forgotten {
			if target != "" {
				return "", "", fmt.Errorf("ambiguous image ID prefix %q: %w", ref, errdefs.ErrInvalidArgument)
			}
			target = d
		}
	}
	if target != "" {
		return target, "", nil
	}
	for k, i := range s.images {
		if r := s.recs[k.target]; r == nil || r.Forgotten {
			continue
		}
		if strings.HasPrefix(i.ConfigDigest.Encoded(), hex) || strings.HasPrefix(i.Manifest.Digest.Encoded(), hex) {
			if target != "" && target != k.target {
				return "", "", fmt.Errorf("ambiguous image ID prefix %q: %w", ref, errdefs.ErrInvalidArgument)
			}
			target = k.target
		}
	}
	if target == "" {
		return "", "", notFound
	}
	return target, "", nil
}

func (s *Store) hasRepoLocked(d digest.Digest, repo string) bool {
	for _, n := range s.recs[d].Names {
		if p, err := reference.ParseNormalizedNamed(n); err == nil && p.Name() == repo {
			return true
		}
	}
	return false
}

func isHex(s string) bool {
	for _, c := range s {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f') {
			return false
		}
	}
	return s != ""
}

// Resolve finds an image by name, ID or unique prefix of an ID, for the given
// platform (nil: the default one, or what there is of it). It is answered from
// memory but for an image's first time. errdefs.ErrNotFound when there is none,
// or none for the platform (the message names those there are);
// errdefs.ErrInvalidArgument for an ambiguous prefix or a malformed name.
func (s *Store) Resolve(ctx context.Context, ref string, platform *ocispec.Platform) (*Image, error) {
	hot := hotKey{ref: ref}
	if platform != nil {
		hot.platform = platformKey(*platform)
	}
	s.mu.RLock()
	if img := s.hot[hot]; img != nil {
		s.mu.RUnlock()
		return img, nil
	}
	target, _, err := s.lookupLocked(ref)
	if err != nil {
		s.mu.RUnlock()
		return nil, err
	}
	img, rec := s.images[imageKey{target, hot.platform}], s.recs[target]
	s.mu.RUnlock()
	if img == nil {
		if img, err = s.build(rec, platform); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.recs[target] == rec { // not changed meanwhile
		if len(s.hot) >= maxHot {
			clear(s.hot)
		}
		s.hot[hot] = img
	}
	return img, nil
}

// ErrPlatform is an errdefs.ErrNotFound: the image is known, but not for the
// platform that was asked for. The error's text names those there are.
var ErrPlatform = fmt.Errorf("no such platform: %w", errdefs.ErrNotFound)

func platformKey(p ocispec.Platform) string {
	if p.OSVersion == "" && len(p.OSFeatures) == 0 {
		return p.OS + "/" + p.Architecture + "/" + p.Variant
	}
	return fmt.Sprintf("%s/%s/%s/%s/%v", p.OS, p.Architecture, p.Variant, p.OSVersion, p.OSFeatures)
}

// build makes the Image of a record and remembers it.
func (s *Store) build(rec *record, platform *ocispec.Platform) (*Image, error) {
	desc, err := s.choose(rec.Target, platform)
	if err != nil {
		if len(rec.Names) > 0 {
			err = fmt.Errorf("image %s: %w", familiar(rec.Names[0]), err)
		}
		return nil, err
	}
	img, err := s.readImage(rec.Target, desc)
	if err != nil {
		return nil, err
	}
	img.Parent = rec.Parent
	for _, n := range rec.Names {
		named, err := reference.ParseNormalizedNamed(n)
		if err != nil {
			continue
		}
		if _, ok := named.(reference.Digested); !ok {
			img.RepoTags = append(img.RepoTags, reference.FamiliarString(named))
		}
		dg := reference.FamiliarName(named) + "@" + rec.Target.Digest.String()
		if !slices.Contains(img.RepoDigests, dg) {
			img.RepoDigests = append(img.RepoDigests, dg)
		}
	}
	img.Size = s.layersSize(img) + s.diskSize(img)
	key := imageKey{target: rec.Target.Digest}
	if platform != nil {
		key.platform = platformKey(*platform)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.recs[rec.Target.Digest] == rec { // not changed meanwhile
		s.images[key] = img
		s.noteSealed(img)
	}
	return img, nil
}

func (s *Store) layersSize(img *Image) (n int64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for i, c := range img.ChainIDs {
		if l := s.layers[c]; l != nil {
			n += l.Size
		} else {
			n += img.LayerDescs[i].Size
		}
	}
	return n
}

// document is an index or a manifest; which, its media type decides.
type document struct {
	MediaType     string               `json:"mediaType"`
	SchemaVersion int                  `json:"schemaVersion"`
	Config        *ocispec.Descriptor  `json:"config,omitempty"`
	Layers        []ocispec.Descriptor `json:"layers,omitempty"`
	Manifests     []ocispec.Descriptor `json:"manifests,omitempty"`
	FSLayers      json.RawMessage      `json:"fsLayers,omitempty"`
	Subject       *ocispec.Descriptor  `json:"subject,omitempty"`
	ArtifactType  string               `json:"artifactType,omitempty"`
}

// parseDocument reads an index or manifest strictly: the same bytes must not be
// readable as both, and must be what the descriptor says (GHSA-5j5w-g665-5m35).
func parseDocument(desc ocispec.Descriptor, b []byte) (*document, error) {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%s %s: %s: %w", desc.MediaType, desc.Digest, fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	d := new(document)
	if err := json.Unmarshal(b, d); err != nil {
		return nil, bad("%v", err)
	}
	if len(d.FSLayers) > 0 {
		return nil, bad("schema 1 manifests are not supported")
	}
	if d.MediaType != "" && desc.MediaType != "" && d.MediaType != desc.MediaType {
		return nil, bad("the document says it is a %q", d.MediaType)
	}
	mt := cmp.Or(desc.MediaType, d.MediaType)
	switch {
	case images.IsIndexType(mt):
		if d.Config != nil || len(d.Layers) > 0 {
			return nil, bad("an index with the parts of a manifest")
		}
	case images.IsManifestType(mt):
		if len(d.Manifests) > 0 {
			return nil, bad("a manifest with the parts of an index")
		}
		if d.Config == nil {
			return nil, bad("a manifest without a config")
		}
		if len(d.Layers) > maxLayers {
			return nil, bad("%d layers, %d are the most", len(d.Layers), maxLayers)
		}
	default:
		return nil, bad("not an image")
	}
	for _, c := range append(slices.Clone(d.Manifests), d.Layers...) {
		if err := checkDescriptor(c); err != nil {
			return nil, bad("%v", err)
		}
	}
	if d.Config != nil {
		if err := checkDescriptor(*d.Config); err != nil {
			return nil, bad("config: %v", err)
		}
	}
	return d, nil
}

func checkDescriptor(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %.100q: %w", d.Digest, err)
	}
	if d.Size < 0 {
		return fmt.Errorf("%s: size %d", d.Digest, d.Size)
	}
	return nil
}

func (s *Store) readDocument(desc ocispec.Descriptor) (*document, error) {
	b, err := s.readBlob(desc)
	if err != nil {
		return nil, err
	}
	return parseDocument(desc, b)
}

func isAttestation(d ocispec.Descriptor) bool {
	return d.Annotations[annotationRefType] == attestation
}

// candidate is one image manifest under a target.
type candidate struct {
	desc      ocispec.Descriptor
	platform  ocispec.Platform
	available bool // manifest and config are here
}

// candidates lists the image manifests under a target, in order.
func (s *Store) candidates(target ocispec.Descriptor, depth int) ([]candidate, error) {
	if depth > maxIndexDepth {
		return nil, fmt.Errorf("index %s: nested too deeply: %w", target.Digest, errdefs.ErrInvalidArgument)
	}
	if !images.IsIndexType(target.MediaType) {
		c := candidate{desc: target}
		if target.Platform != nil {
			c.platform = platforms.Normalize(*target.Platform)
		}
		doc, err := s.readDocument(target)
		if errdefs.IsNotFound(err) {
			return []candidate{c}, nil
		}
		if err != nil {
			return nil, err
		}
		if !s.hasBlob(doc.Config.Digest, -1) {
			return []candidate{c}, nil
		}
		c.available = true
		if target.Platform == nil {
			var p ocispec.Image
			if b, err := s.readBlob(*doc.Config); err == nil && json.Unmarshal(b, &p) == nil {
				c.platform = platforms.Normalize(p.Platform)
			}
		}
		return []candidate{c}, nil
	}
	doc, err := s.readDocument(target)
	if err != nil {
		return nil, err
	}
	var out []candidate
	for _, m := range doc.Manifests {
		if isAttestation(m) || !images.IsIndexType(m.MediaType) && !images.IsManifestType(m.MediaType) {
			continue
		}
		c, err := s.candidates(m, depth+1)
		if errdefs.IsNotFound(err) {
			continue // an index inside that is not here
		}
		if err != nil {
			return nil, err
		}
		out = append(out, c...)
	}
	return out, nil
}

// choose picks the manifest for a platform among those that are here.
func (s *Store) choose(target ocispec.Descriptor, platform *ocispec.Platform) (ocispec.Descriptor, error) {
	all, err := s.candidates(target, 0)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return s.chooseAmong(all, platform)
}

func (s *Store) chooseAmong(all []candidate, platform *ocispec.Platform) (ocispec.Descriptor, error) {
	var here []candidate
	var names []string
	for _, c := range all {
		if c.available {
			here = append(here, c)
			names = append(names, platforms.Format(c.platform))
		}
	}
	want := cmp.Or(platform, s.cfg.Platform)
	match := platforms.Only(*want)
	best := -1
	for i, c := range here {
		if match.Match(c.platform) && (best < 0 || match.Less(c.platform, here[best].platform)) {
			best = i
		}
	}
	if best < 0 && platform == nil && len(here) > 0 {
		best = 0 // whoever runs it meets the kernel's exec format error
	}
	if best < 0 {
		if len(names) == 0 {
			names = []string{"no platform"}
		}
		return ocispec.Descriptor{}, fmt.Errorf("it is not here for platform %s, only for %s: %w",
			platforms.Format(*want), strings.Join(names, ", "), ErrPlatform)
	}
	return here[best].desc, nil
}

// readImage reads manifest and config into an Image without names.
func (s *Store) readImage(target, desc ocispec.Descriptor) (*Image, error) {
	doc, err := s.readDocument(desc)
	if err != nil {
		return nil, err
	}
	img := &Image{
		ID: target.Digest.String(), Target: target, Manifest: desc,
		LayerDescs: doc.Layers, ConfigDigest: doc.Config.Digest,
	}
	b, err := s.readBlob(*doc.Config)
	if err != nil {
		return nil, err
	}
	if doc.Config.MediaType == diskimage.ConfigMediaType {
		err = s.parseDisk(img, b)
	} else {
		err = parseConfig(img, b)
	}
	if err != nil {
		return nil, err
	}
	img.ContentSize = desc.Size + doc.Config.Size
	for _, l := range doc.Layers {
		img.ContentSize += l.Size
	}
	return img, nil
}

// parseConfig fills in what the config says.
func parseConfig(img *Image, b []byte) error {
	c := &img.Config
	if err := json.Unmarshal(b, c); err != nil {
		return fmt.Errorf("image config %s: %w: %w", img.ConfigDigest, err, errdefs.ErrInvalidArgument)
	}
	if len(c.RootFS.DiffIDs) != len(img.LayerDescs) {
		return fmt.Errorf("image config %s names %d layers, the manifest %d: %w",
			img.ConfigDigest, len(c.RootFS.DiffIDs), len(img.LayerDescs), errdefs.ErrInvalidArgument)
	}
	for _, d := range c.RootFS.DiffIDs {
		if err := d.Validate(); err != nil || d.Algorithm() != digest.SHA256 {
			return fmt.Errorf("image config %s: diff ID %.100q is not a SHA-256 digest: %w", img.ConfigDigest, d, errdefs.ErrInvalidArgument)
		}
	}
	if c.OS == "" {
		c.OS = "linux"
	}
	img.Platform = c.Platform
	if c.Created != nil {
		img.Created = *c.Created
	}
	if n := len(c.History); n > 0 {
		img.Comment = c.History[n-1].Comment
	}
	img.DiffIDs = c.RootFS.DiffIDs
	img.ChainIDs = stackIDs(img.DiffIDs, img.LayerDescs)
	if n := len(img.ChainIDs); n > 0 {
		img.ChainID = img.ChainIDs[n-1]
	}
	return nil
}

// Layers returns the image's overlay lower directories, topmost first. Layers
// that are not unpacked yet are; otherwise it is answered from memory.
func (s *Store) Layers(ctx context.Context, img *Image) ([]string, error) {
	if img.Disk != nil {
		return nil, errDiskImage(img)
	}
	if img.ChainID == "" {
		return nil, nil
	}
	s.mu.RLock()
	dirs := s.lowers[img.ChainID]
	s.mu.RUnlock()
	s.touch(img.ID)
	if dirs != nil {
		return dirs, nil
	}
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	if err := s.unpackImage(ctx, img); err != nil {
		return nil, fmt.Errorf("image %s: %w", img.Ref(), err)
	}
	err = s.update(func(b *batch) error { b.saveLayers(img.ChainIDs); return nil })
	if err != nil {
		return nil, err
	}
	s.flushSoon()
	for i := len(img.ChainIDs) - 1; i >= 0; i-- {
		dirs = append(dirs, s.layerDir(img.ChainIDs[i]))
	}
	s.mu.Lock()
	s.lowers[img.ChainID] = dirs
	s.mu.Unlock()
	return dirs, nil
}

// reach lists what a target needs: blobs that are here with their sizes, and
// the chain IDs of its layers, together with the IDs of lazy images' files.
func (s *Store) reach(target ocispec.Descriptor) (blobs map[digest.Digest]int64, chains []digest.Digest, err error) {
	blobs = map[digest.Digest]int64{}
	var walk func(d ocispec.Descriptor, depth int) error
	walk = func(d ocispec.Descriptor, depth int) error {
		if depth > maxIndexDepth+1 || !s.hasBlob(d.Digest, -1) {
			return nil
		}
		blobs[d.Digest] = d.Size
		if !images.IsIndexType(d.MediaType) && !images.IsManifestType(d.MediaType) {
			return nil
		}
		doc, err := s.readDocument(d)
		if depth > 0 && errdefs.IsInvalidArgument(err) {
			return nil // it will never be one: a blob that somebody calls a manifest
		}
		if err != nil {
			return err
		}
		for _, c := range append(slices.Clone(doc.Manifests), doc.Layers...) {
			if err := walk(c, depth+1); err != nil {
				return err
			}
		}
		if doc.Config != nil && s.hasBlob(doc.Config.Digest, -1) {
			blobs[doc.Config.Digest] = doc.Config.Size
			var c dockerspec.DockerOCIImage
			if b, err := s.readBlob(*doc.Config); err == nil && json.Unmarshal(b, &c) == nil {
				ids := stackIDs(c.RootFS.DiffIDs, doc.Layers)
				chains = append(chains, ids...)
				if n := len(ids); n > 0 {
					if l := s.lazyFor(ids[n-1], doc.Layers); l != nil {
						chains = append(chains, l.id)
					}
				}
			}
		}
		return nil
	}
	if !s.hasBlob(target.Digest, -1) {
		return nil, nil, fmt.Errorf("blob %s is not here: %w", target.Digest, errdefs.ErrNotFound)
	}
	if err := walk(target, 0); err != nil {
		return nil, nil, err
	}
	return blobs, chains, nil
}
