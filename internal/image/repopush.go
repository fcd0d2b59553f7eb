package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/diskimage"
	"tenon.dev/tenon/internal/image/signature"
)

// PutManifest takes a manifest or index under a tag, or under its digest. What it
// needs must be in the repository (MissingError). An image with a tag is an image of
// the engine at once, and unpacked when it is first used. It returns the digest and
// that of the manifest's subject, if it has one.
func (r *Repositories) PutManifest(ctx context.Context, repo, ref, mediaType string, data []byte) (d, subject digest.Digest, err error) {
	name, err := r.own(repo)
	if err != nil {
		return "", "", err
	}
	if len(data) > maxPushedManifest {
		return "", "", fmt.Errorf("larger than %d bytes: %w", maxPushedManifest, ErrManifest)
	}
	d, tag := digest.FromBytes(data), ref
	if strings.Contains(ref, ":") {
		want := digest.Digest(ref)
		if !storable(want) {
			return "", "", fmt.Errorf("%.100q: %w", ref, ErrDigest)
		}
		if d = want.Algorithm().FromBytes(data); d != want {
			return "", "", fmt.Errorf("the manifest has the digest %s: %w", d, ErrDigest)
		}
		tag = ""
	} else if !tagName.MatchString(ref) {
		return "", "", fmt.Errorf("%.200q: %w", ref, ErrTag)
	}
	if mediaType == "" {
		var doc struct {
			MediaType string `json:"mediaType"`
		}
		_ = json.Unmarshal(data, &doc) // parseDocument says what is wrong
		mediaType = doc.MediaType
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
	doc, err := parseDocument(desc, data)
	if err != nil {
		return "", "", fmt.Errorf("%w: %w", ErrManifest, err)
	}
	if len(doc.Manifests) > maxIndexEntries {
		return "", "", fmt.Errorf("%d entries, %d are the most: %w", len(doc.Manifests), maxIndexEntries, ErrManifest)
	}
	if doc.Subject != nil {
		if err := checkDescriptor(*doc.Subject); err != nil {
			return "", "", fmt.Errorf("subject: %w: %w", err, ErrManifest)
		}
		subject = doc.Subject.Digest
	}
	end, err := r.s.begin()
	if err != nil {
		return "", "", err
	}
	defer end()
	if err := r.needs(name, repo, doc); err != nil {
		return "", "", err
	}
	if err := r.roomFor(name, tag, d); err != nil {
		return "", "", err
	}
	if _, err := r.free(); err != nil {
		return "", "", err
	}
	if err := r.s.putDocument(desc, data); err != nil {
		return "", "", err
	}
	isImage := tag != "" && d.Algorithm() == digest.SHA256 && r.s.isImage(desc)
	p := &pushed{Desc: desc, Subject: subject, Boot: r.s.boot}
	if err := r.s.shelve(name, tag, p, isImage); err != nil {
		return "", "", err
	}
	for _, l := range doc.Layers {
		r.s.pushes.settle(l.Digest)
	}
	if doc.Config != nil {
		r.s.pushes.settle(doc.Config.Digest)
	}
	r.s.flushSoon()
	if isImage {
		r.s.event("load", d.String(), familiar(name+":"+tag), nil)
	}
	return d, subject, nil
}

// needs checks that the repository has what a document names.
func (r *Repositories) needs(name, repo string, doc *document) error {
	names, err := r.candidates(repo, "")
	if err != nil {
		return err
	}
	// Blobs that were pushed just now, and manifests under their own digests, are known
	// at once; only for others all that the repository has is listed, once.
	docs, stored, listed := map[digest.Digest]ocispec.Descriptor{}, map[digest.Digest]bool{}, false
	list := func() {
		if !listed {
			for _, n := range names {
				r.contents(n, docs, stored)
			}
			listed = true
		}
	}
	has := func(d digest.Digest) bool {
		if slices.ContainsFunc(names, func(n string) bool { return r.s.isExpected(n, d) }) {
			return true
		}
		list()
		_, is := docs[d]
		return is || stored[d]
	}
	blobs := slices.Clone(doc.Layers)
	if doc.Config != nil {
		blobs = append(blobs, *doc.Config)
	}
	for _, b := range blobs {
		if len(b.URLs) > 0 && !r.s.hasBlob(b.Digest, -1) {
			continue // foreign layers stay where they are
		}
		if !r.s.hasBlob(b.Digest, b.Size) || !has(b.Digest) {
			return &MissingError{Digest: b.Digest}
		}
	}
	for _, m := range doc.Manifests {
		if !images.IsIndexType(m.MediaType) && !images.IsManifestType(m.MediaType) {
			if !r.s.hasBlob(m.Digest, -1) || !has(m.Digest) {
				return &MissingError{Digest: m.Digest, Manifest: true}
			}
			continue
		}
		f, found := r.s.onShelf(name, m.Digest)
		if !found {
			list()
			f, found = docs[m.Digest]
		}
		if !found || f.MediaType != m.MediaType || f.Size != m.Size {
			return &MissingError{Digest: m.Digest, Manifest: true}
		}
	}
	return nil
}

// contents adds what a repository, by its canonical name, has: documents, and blobs
// that they name.
func (r *Repositories) contents(name string, docs map[digest.Digest]ocispec.Descriptor, blobs map[digest.Digest]bool) {
	seen := map[digest.Digest]bool{}
	add := func(t ocispec.Descriptor) {
		if _, known := docs[t.Digest]; !known {
			docs[t.Digest] = t
		}
	}
	var walk func(t ocispec.Descriptor, depth int)
	walk = func(t ocispec.Descriptor, depth int) {
		if seen[t.Digest] || depth > maxIndexDepth+1 {
			return
		}
		seen[t.Digest] = true
		add(t)
		n := r.node(t)
		if n == nil {
			return
		}
		for _, m := range n.manifests {
			walk(m, depth+1)
		}
		for _, b := range n.blobs {
			blobs[b.Digest] = true
		}
	}
	roots, _ := r.roots(name, "")
	for _, t := range roots { // first as they were pushed, then as others name them
		add(t)
	}
	for _, t := range roots {
		walk(t, 0)
	}
}

// isImage tells whether a manifest, or one below an index, can be run.
func (s *Store) isImage(d ocispec.Descriptor) bool {
	all, err := s.candidates(d, 0)
	if err != nil {
		return false
	}
	for _, c := range all {
		if !c.available {
			continue
		}
		doc, err := s.readDocument(c.desc)
		if err != nil || doc.Config == nil {
			continue
		}
		if slices.ContainsFunc(doc.Layers, func(l ocispec.Descriptor) bool { return l.MediaType == signature.MediaType }) {
			continue // cosign's signatures have an image's config
		}
		switch doc.Config.MediaType {
		case ocispec.MediaTypeImageConfig, images.MediaTypeDockerSchema2Config, diskimage.ConfigMediaType:
			if _, err := s.readImage(d, c.desc); err == nil {
				return true
			}
		}
	}
	return false
}

// putDocument stores a manifest under the digest it has, whichever algorithm that is of.
func (s *Store) putDocument(d ocispec.Descriptor, data []byte) error {
	if s.hasBlob(d.Digest, d.Size) {
		return nil
	}
	w, err := s.newIngest(d.Digest.Algorithm())
	if err != nil {
		return err
	}
	defer w.close()
	if err := s.checkFree(); err != nil {
		w.abort(err)
		return err
	}
	if _, err := w.Write(data); err != nil {
		w.abort(err)
		return fmt.Errorf("write manifest: %w", err)
	}
	_, err = w.commit(d.Digest, d.Size)
	return err
}

// Mount gives the repository a blob that another one has; false if that has not. by is
// the client, as for NewUpload.
func (r *Repositories) Mount(repo, from string, d digest.Digest, by string) (bool, error) {
	name, err := r.own(repo)
	if err != nil {
		return false, err
	}
	if d.Validate() != nil {
		return false, fmt.Errorf("%.100q: %w", d, ErrDigest)
	}
	if from == "" {
		return false, nil
	}
	names, err := r.candidates(from, "")
	if err != nil {
		return false, nil // there is no such repository
	}
	end, err := r.s.begin()
	if err != nil {
		return false, err
	}
	defer end()
	if !slices.ContainsFunc(names, func(n string) bool { return r.has(n, d) }) {
		return false, nil
	}
	if err := r.s.expect(name, d, by); err != nil {
		return false, err
	}
	return true, nil
}

// DeleteManifest takes a tag, or a manifest by its digest with all tags of the
// repository, away. An image without a name left is removed, unless a container
// uses it, it is pinned, or another repository has it by its digest. errdefs.ErrConflict for a manifest that an index of the repository needs.
func (r *Repositories) DeleteManifest(repo, ref string) error {
	name, err := r.own(repo)
	if err != nil {
		return err
	}
	if !strings.Contains(ref, ":") {
		if !tagName.MatchString(ref) {
			return fmt.Errorf("%.200q: %w", ref, ErrTag)
		}
		return r.s.unshelve(name, ref, "")
	}
	d := digest.Digest(ref)
	if d.Validate() != nil {
		return fmt.Errorf("%.100q: %w", ref, ErrDigest)
	}
	err = r.s.unshelve(name, "", d)
	if errdefs.IsNotFound(err) {
		if roots, _ := r.roots(name, ""); r.find(roots, d, true) != nil {
			return fmt.Errorf("manifest %s is part of an index: %w", d, errdefs.ErrConflict)
		}
	}
	return err
}

// DeleteBlob takes a blob away from the repository. errdefs.ErrConflict if a
// manifest needs it.
func (r *Repositories) DeleteBlob(repo string, d digest.Digest) error {
	name, err := r.own(repo)
	if err != nil {
		return err
	}
	if d.Validate() != nil {
		return fmt.Errorf("%.100q: %w", d, ErrDigest)
	}
	if roots, _ := r.roots(name, ""); r.find(roots, d, false) != nil {
		return fmt.Errorf("a manifest needs blob %s: remove that first: %w", d, errdefs.ErrConflict)
	}
	if !r.s.unexpect(name, d) {
		return fmt.Errorf("blob %s: %w", d, errdefs.ErrNotFound)
	}
	r.s.pushes.settle(d)
	r.s.gcSoon()
	return nil
}

// Upload is a blob that is being pushed. One goroutine at a time may use it. It is
// to be ended by Commit or Abort; a daemon that dies leaves nothing of it.
type Upload struct {
	r       *Repositories
	name    string
	by      string
	w       *ingest
	granted int64 // bytes of the limits
}

// NewUpload begins an upload to the repository. by tells clients apart, of which each has
// half of the room for uploads at most; for "" there is no such bound.
func (r *Repositories) NewUpload(repo, by string) (*Upload, error) {
	name, err := r.own(repo)
	if err != nil {
		return nil, err
	}
	if err := r.s.ctx.Err(); err != nil {
		return nil, fmt.Errorf("image store is closed: %w", errdefs.ErrUnavailable)
	}
	if err := r.grant(by, 0); err != nil {
		return nil, err
	}
	w, err := r.s.newIngest(digest.SHA256)
	if err != nil {
		return nil, err
	}
	return &Upload{r: r, name: name, by: by, w: w}, nil
}

// Write appends. errdefs.ErrResourceExhausted beyond Limits.BlobBytes; ErrNoRoom and
// ENOSPC beyond RepositoryLimits: then it may be tried again.
func (u *Upload) Write(p []byte) (int, error) {
	for u.w.n+int64(len(p)) > u.granted {
		step := min(uploadStep, u.w.max-u.granted)
		if step <= 0 {
			break // the blob is too large: its Write says so
		}
		if err := u.r.grant(u.by, step); err != nil {
			return 0, err
		}
		u.granted += step
	}
	return u.w.Write(p)
}

// release gives back what the upload has of the limits.
func (u *Upload) release() {
	u.r.ungrant(u.by, u.granted)
	u.granted = 0
	u.w.close()
}

// Size is how much has been written, in bytes.
func (u *Upload) Size() int64 { return u.w.n }

// storable tells whether blobs of such a digest are kept, and collected.
func storable(d digest.Digest) bool {
	return d.Validate() == nil && (d.Algorithm() == digest.SHA256 || d.Algorithm() == digest.SHA512)
}

// Abort gives the upload up.
func (u *Upload) Abort() {
	u.w.abort(nil)
	u.release()
}

// Commit makes what was written a blob of the repository, if its digest is d
// (ErrDigest). The upload is over either way.
func (u *Upload) Commit(d digest.Digest) error {
	defer u.release()
	if !storable(d) {
		err := fmt.Errorf("%.100q: %w", d, ErrDigest)
		u.w.abort(err)
		return err
	}
	if d.Algorithm() != u.w.alg { // not known when the upload began
		v := d.Verifier()
		if _, err := io.Copy(v, io.NewSectionReader(u.w.f, 0, u.w.n)); err != nil {
			u.w.abort(err)
			return err
		}
		if !v.Verified() {
			err := fmt.Errorf("blob %s: %w", d, ErrDigest)
			u.w.abort(err)
			return err
		}
		return u.place(d)
	}
	if got := u.w.digest(); got != d {
		err := fmt.Errorf("blob %s: the bytes have the digest %s: %w", d, got, ErrDigest)
		u.w.abort(err)
		return err
	}
	return u.place(d)
}

func (u *Upload) place(d digest.Digest) error {
	s := u.r.s
	end, err := s.begin()
	if err != nil {
		u.w.abort(err)
		return err
	}
	defer end()
	if err := s.expect(u.name, d, u.by); err != nil {
		u.w.abort(err)
		return err
	}
	known := s.hasBlob(d, u.w.n)
	if err := errors.Join(os.MkdirAll(s.blobDir(d.Algorithm()), 0o700), os.Rename(u.w.f.Name(), s.blobPath(d))); err != nil {
		u.w.abort(err)
		return fmt.Errorf("commit blob: %w", err)
	}
	u.w.finish(nil)
	if !known {
		s.pushes.add(d, u.w.n, u.by)
	}
	return nil
}

// expectFor is how long a blob that no manifest needs yet is kept.
const expectFor = time.Hour
