package image

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Repositories is the store as a registry shows it: what is pushed is an image at
// once, what the store has can be pulled, and no blob is there twice.
//
// A repository NAME is the images whose names begin with NAMESPACE/NAME. Pulls find
// the engine's other images as well: "busybox" is docker.io/library/busybox if
// nothing has been pushed by that name, and "ghcr.io/a/b" is itself. Pushes and
// removals never reach those.
//
// What is not an image (a signature, a chart), and manifests without a tag (the
// parts of an index, referrers) are known to the registry alone: see shelf.
// It is safe for concurrent use.
type Repositories struct {
	s  *Store
	ns string

	limits RepositoryLimits

	mu     sync.Mutex
	nodes  map[digest.Digest]*node // documents read lately
	weight int                     // what nodes name
}

// node is what a document names.
type node struct {
	manifests []ocispec.Descriptor
	blobs     []ocispec.Descriptor
}

// maxNodes bounds Repositories.weight: some 200 bytes each.
const maxNodes = 1 << 18

// maxPushedManifest bounds a manifest that is pushed, as most registries do.
const maxPushedManifest = 4 << 20

var (
	repositoryName = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagName        = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
)

// maxRepositoryName bounds a repository's name, with the namespace, as clients do.
const maxRepositoryName = 255

// ErrRepositoryName, ErrTag: names that there cannot be.
var (
	ErrRepositoryName = fmt.Errorf("not a repository's name: %w", errdefs.ErrInvalidArgument)
	ErrTag            = fmt.Errorf("not a tag: %w", errdefs.ErrInvalidArgument)
	// ErrManifest: the document is not a manifest that is taken.
	ErrManifest = fmt.Errorf("not a valid manifest: %w", errdefs.ErrInvalidArgument)
	// ErrDigest: the bytes have another digest, or it is not a digest.
	ErrDigest = fmt.Errorf("digest does not match: %w", errdefs.ErrInvalidArgument)
	// ErrRepository is an errdefs.ErrNotFound: of the repository, rather than of
	// something in it.
	ErrRepository = fmt.Errorf("repository is not known: %w", errdefs.ErrNotFound)
)

// MissingError says what a manifest that is pushed names but the repository lacks.
type MissingError struct {
	Digest   digest.Digest
	Manifest bool // it is a manifest
}

func (e *MissingError) Error() string { return "unknown to the repository: " + e.Digest.String() }

// Repositories returns the registry's view; what is pushed gets names below
// namespace ("registry.lan", "127.0.0.1:5000/team"). Its limits are the defaults.
func (s *Store) Repositories(namespace string) (*Repositories, error) {
	n, err := reference.ParseNormalizedNamed(namespace + "/x")
	if err != nil || !strings.HasPrefix(n.Name(), namespace+"/") {
		return nil, fmt.Errorf("namespace %.200q: give a host, with a path if you like, as image names begin with: %w", namespace, errdefs.ErrInvalidArgument)
	}
	r := &Repositories{s: s, ns: namespace, nodes: map[digest.Digest]*node{}}
	r.Limit(RepositoryLimits{})
	return r, nil
}

// Namespace is what names of pushed images begin with.
func (r *Repositories) Namespace() string { return r.ns }

// own is the canonical name of a repository that can be pushed to.
func (r *Repositories) own(repo string) (string, error) {
	full := r.ns + "/" + repo
	if !repositoryName.MatchString(repo) || len(full) > maxRepositoryName {
		return "", fmt.Errorf("%.100q: %w", repo, ErrRepositoryName)
	}
	n, err := reference.ParseNormalizedNamed(full)
	if err != nil || !reference.IsNameOnly(n) {
		return "", fmt.Errorf("%.100q: %w", repo, ErrRepositoryName)
	}
	return n.Name(), nil
}

// candidates are the canonical names that a pull from repo may mean, in order. host,
// if not empty, is the registry that this one is a mirror of.
func (r *Repositories) candidates(repo, host string) ([]string, error) {
	own, err := r.own(repo)
	if err != nil {
		return nil, err
	}
	if host != "" {
		n, err := reference.ParseNormalizedNamed(host + "/" + repo)
		if err != nil || reference.Domain(n) != host {
			return nil, fmt.Errorf("%.100q: %w", host+"/"+repo, ErrRepositoryName)
		}
		return []string{n.Name()}, nil
	}
	out := []string{own}
	if n, err := reference.ParseNormalizedNamed(repo); err == nil && n.Name() != own {
		out = append(out, n.Name())
	}
	return out, nil
}

// Manifest returns the manifest or index that ref (a tag or a digest) names. The
// caller closes the file.
func (r *Repositories) Manifest(repo, host, ref string) (ocispec.Descriptor, *os.File, error) {
	names, err := r.candidates(repo, host)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	d, isDigest := digest.Digest(ref), strings.Contains(ref, ":")
	if isDigest && d.Validate() != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("%.100q: %w", ref, ErrDigest)
	}
	known := false
	for _, name := range names {
		roots, tagged := r.roots(name, ref)
		known = known || len(roots) > 0
		if isDigest {
			tagged = r.find(roots, d, true)
		}
		if tagged == nil {
			continue
		}
		f, err := r.s.openBlob(tagged.Digest)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err == nil {
			r.s.touchName(name, tagged.Digest)
		}
		return *tagged, f, err
	}
	if !known {
		return ocispec.Descriptor{}, nil, fmt.Errorf("%s: %w", repo, ErrRepository)
	}
	return ocispec.Descriptor{}, nil, fmt.Errorf("manifest %.200s: %w", ref, errdefs.ErrNotFound)
}

// Blob opens a blob of the repository; the caller closes it.
func (r *Repositories) Blob(repo, host string, d digest.Digest) (*os.File, error) {
	names, err := r.candidates(repo, host)
	if err != nil {
		return nil, err
	}
	if d.Validate() != nil {
		return nil, fmt.Errorf("%.100q: %w", d, ErrDigest)
	}
	for _, name := range names {
		if err := r.s.completeBlob(r, name, d); err != nil {
			return nil, err
		}
		if r.has(name, d) {
			return r.s.openBlob(d)
		}
	}
	return nil, fmt.Errorf("blob %s: %w", d, errdefs.ErrNotFound)
}

// Expect keeps a blob of the repository from being collected for some time: a
// client that has asked for it may be about to push a manifest that needs it. by is the client, as for NewUpload.
func (r *Repositories) Expect(repo string, d digest.Digest, by string) {
	if name, err := r.own(repo); err == nil {
		_ = r.s.expect(name, d, by) // then it is not
	}
}

// roots lists the manifests and indexes of a repository by its canonical name, and
// the one with the tag.
func (r *Repositories) roots(name, tag string) (all []ocispec.Descriptor, tagged *ocispec.Descriptor) {
	s := r.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	for n, d := range s.names {
		rest, ok := strings.CutPrefix(n, name)
		if !ok || rest == "" || rest[0] != ':' && rest[0] != '@' {
			continue
		}
		if rec := s.recs[d]; rec != nil {
			t := rec.Target
			all = append(all, t)
			if rest[0] == ':' && rest[1:] == tag {
				tagged = &t
			}
		}
	}
	sh := s.shelves[name]
	if sh == nil {
		return all, tagged
	}
	for _, p := range sh.manifests {
		all = append(all, p.Desc)
	}
	if p := sh.manifests[sh.tags[tag]]; p != nil && tagged == nil {
		t := p.Desc
		tagged = &t
	}
	return all, tagged
}

// find looks for a digest among the roots and what they need; among documents
// only, if manifests is set.
func (r *Repositories) find(roots []ocispec.Descriptor, d digest.Digest, manifests bool) *ocispec.Descriptor {
	for i := range roots {
		if roots[i].Digest == d {
			return &roots[i]
		}
	}
	seen := map[digest.Digest]bool{}
	var walk func(t ocispec.Descriptor, depth int) *ocispec.Descriptor
	walk = func(t ocispec.Descriptor, depth int) *ocispec.Descriptor {
		if seen[t.Digest] || depth > maxIndexDepth+1 {
			return nil
		}
		seen[t.Digest] = true
		n := r.node(t)
		if n == nil {
			return nil
		}
		for i := range n.manifests {
			if n.manifests[i].Digest == d {
				return &n.manifests[i]
			}
			if f := walk(n.manifests[i], depth+1); f != nil {
				return f
			}
		}
		if manifests {
			return nil
		}
		for i := range n.blobs {
			if n.blobs[i].Digest == d {
				return &n.blobs[i]
			}
		}
		return nil
	}
	for _, t := range roots {
		if f := walk(t, 0); f != nil {
			return f
		}
	}
	return nil
}

// node reads a document; nil if it is not here or none.
func (r *Repositories) node(d ocispec.Descriptor) *node {
	if !images.IsIndexType(d.MediaType) && !images.IsManifestType(d.MediaType) {
		return nil
	}
	r.mu.Lock()
	n := r.nodes[d.Digest]
	r.mu.Unlock()
	if n != nil {
		return n
	}
	doc, err := r.s.readDocument(d)
	if err != nil {
		return nil
	}
	n = &node{blobs: doc.Layers}
	if doc.Config != nil {
		n.blobs = append(slices.Clip(n.blobs), *doc.Config)
	}
	for _, m := range doc.Manifests {
		if images.IsIndexType(m.MediaType) || images.IsManifestType(m.MediaType) {
			n.manifests = append(n.manifests, m)
		} else {
			n.blobs = append(n.blobs, m)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	w := 1 + len(n.manifests) + len(n.blobs)
	if r.weight += w; r.weight > maxNodes {
		clear(r.nodes)
		r.weight = w
	}
	r.nodes[d.Digest] = n
	return n
}

// has tells whether a repository, by its canonical name, has the blob.
func (r *Repositories) has(name string, d digest.Digest) bool {
	if !r.s.hasBlob(d, -1) {
		return false
	}
	if r.s.isExpected(name, d) {
		return true
	}
	roots, _ := r.roots(name, "")
	return r.find(roots, d, false) != nil
}

// Tags lists a repository's tags, sorted.
func (r *Repositories) Tags(repo, host string) ([]string, error) {
	names, err := r.candidates(repo, host)
	if err != nil {
		return nil, err
	}
	known := false
	out := []string{}
	s := r.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, name := range names {
		for n := range s.names {
			if tag, ok := strings.CutPrefix(n, name+":"); ok {
				out = append(out, tag)
			} else if strings.HasPrefix(n, name+"@") {
				known = true
			}
		}
		if sh := s.shelves[name]; sh != nil {
			known = true
			for tag := range sh.tags {
				out = append(out, tag)
			}
		}
	}
	if len(out) == 0 && !known {
		return nil, fmt.Errorf("%s: %w", repo, ErrRepository)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// List lists the repositories, sorted, as they are to be asked for.
func (r *Repositories) List() []string {
	seen := map[string]bool{}
	add := func(name string) {
		if rest, ok := strings.CutPrefix(name, r.ns+"/"); ok {
			name = rest
		} else if rest, ok := strings.CutPrefix(name, "docker.io/"); ok {
			name = rest
		}
		if repositoryName.MatchString(name) {
			seen[name] = true
		}
	}
	s := r.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	for n := range s.names {
		if p, err := reference.ParseNormalizedNamed(n); err == nil {
			add(p.Name())
		}
	}
	for n, sh := range s.shelves {
		if len(sh.manifests) > 0 {
			add(n)
		}
	}
	out := make([]string, 0, len(seen))
	for n := range seen {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// Referrers lists the manifests of the repository whose subject is d, sorted by
// digest, with their artifact types and annotations: those after the digest last, of
// the artifact type that is asked for, if one is. It ends, with more set, once they take
// size bytes as JSON, with one at least.
func (r *Repositories) Referrers(repo string, d digest.Digest, artifactType, last string, size int) (out []ocispec.Descriptor, more bool, err error) {
	name, err := r.own(repo)
	if err != nil {
		return nil, false, err
	}
	if d.Validate() != nil {
		return nil, false, fmt.Errorf("%.100q: %w", d, ErrDigest)
	}
	var found []ocispec.Descriptor
	r.s.mu.RLock()
	if sh := r.s.shelves[name]; sh != nil {
		for _, p := range sh.manifests {
			if p.Subject == d && p.Desc.Digest.String() > last {
				found = append(found, p.Desc)
			}
		}
	}
	r.s.mu.RUnlock()
	slices.SortFunc(found, func(a, b ocispec.Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
	out = []ocispec.Descriptor{}
	for _, f := range found {
		b, err := r.s.readBlob(f)
		if err != nil {
			continue
		}
		var doc struct {
			ArtifactType string              `json:"artifactType"`
			Config       *ocispec.Descriptor `json:"config"`
			Annotations  map[string]string   `json:"annotations"`
		}
		if json.Unmarshal(b, &doc) != nil {
			continue
		}
		f.ArtifactType, f.Annotations = doc.ArtifactType, doc.Annotations
		if f.ArtifactType == "" && doc.Config != nil {
			f.ArtifactType = doc.Config.MediaType
		}
		if artifactType != "" && f.ArtifactType != artifactType {
			continue
		}
		if b, err = json.Marshal(f); err != nil {
			return nil, false, err
		}
		if size -= len(b); size < 0 && len(out) > 0 {
			return out, true, nil
		}
		out = append(out, f)
	}
	return out, false, nil
}
