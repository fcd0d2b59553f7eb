package image

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/storage"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// selector is a set of filters made ready.
type selector struct {
	dangling      *bool
	labels, nots  []string
	refs          []string
	ids           []string
	before, since time.Time
	until         time.Time
}

// selector reads filters, refusing keys that are not allowed.
func (s *Store) selector(f Filters, allowed ...string) (*selector, error) {
	sel := &selector{}
	for k, vs := range f {
		if !slices.Contains(allowed, k) {
			return nil, fmt.Errorf("invalid filter %q: %w", k, errdefs.ErrInvalidArgument)
		}
		for _, v := range vs {
			switch k {
			case "dangling":
				b, err := strconv.ParseBool(v)
				if err != nil {
					return nil, fmt.Errorf("invalid filter dangling=%q: %w", v, errdefs.ErrInvalidArgument)
				}
				sel.dangling = &b
			case "label":
				sel.labels = append(sel.labels, v)
			case "label!":
				sel.nots = append(sel.nots, v)
			case "reference":
				if _, err := reference.FamiliarMatch(v, exampleRef); err != nil {
					return nil, fmt.Errorf("invalid filter reference=%q: %w: %w", v, err, errdefs.ErrInvalidArgument)
				}
				sel.refs = append(sel.refs, v)
			case "id":
				sel.ids = append(sel.ids, strings.TrimPrefix(v, "sha256:"))
			case "before", "since":
				img, err := s.Resolve(context.Background(), v, nil)
				if err != nil {
					return nil, err
				}
				if k == "before" {
					sel.before = img.Created
				} else {
					sel.since = img.Created
				}
			case "until":
				t, err := parseTime(v)
				if err != nil {
					return nil, err
				}
				sel.until = t
			}
		}
	}
	return sel, nil
}

var exampleRef = func() reference.Named {
	n, err := reference.ParseNormalizedNamed("a:b")
	if err != nil {
		panic(err) // a constant
	}
	return n
}()

func hasLabel(labels map[string]string, want string) bool {
	k, v, valued := strings.Cut(want, "=")
	got, ok := labels[k]
	return ok && (!valued || got == v)
}

// match applies everything but references.
func (sel *selector) match(r *record, img *Image) bool {
	if sel.dangling != nil && *sel.dangling != (len(r.Names) == 0) {
		return false
	}
	labels := img.Config.Config.Labels
	for _, l := range sel.labels {
		if !hasLabel(labels, l) {
			return false
		}
	}
	for _, l := range sel.nots {
		if hasLabel(labels, l) {
			return false
		}
	}
	if len(sel.ids) > 0 && !slices.ContainsFunc(sel.ids, func(p string) bool { return strings.HasPrefix(r.Target.Digest.Encoded(), p) }) {
		return false
	}
	if !sel.before.IsZero() && !img.Created.Before(sel.before) {
		return false
	}
	if !sel.since.IsZero() && !img.Created.After(sel.since) {
		return false
	}
	return sel.until.IsZero() || img.Created.Before(sel.until)
}

// matchRef tells whether a familiar name passes the reference filters.
func (sel *selector) matchRef(name string) bool {
	if len(sel.refs) == 0 {
		return true
	}
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return false
	}
	for _, p := range sel.refs {
		if ok, err := reference.FamiliarMatch(p, n); err == nil && ok {
			return true
		}
	}
	return false
}

// List returns the images that pass the filters (dangling, label, label!,
// before, since, reference, until, id), newest first.
func (s *Store) List(ctx context.Context, opts ListOptions) ([]image.Summary, error) {
	sel, err := s.selector(opts.Filters, "dangling", "label", "label!", "before", "since", "reference", "until", "id")
	if err != nil {
		return nil, err
	}
	shared := map[digest.Digest]int{}
	type item struct {
		rec *record
		img *Image
	}
	var items []item
	s.mu.RLock()
	recs := make([]*record, 0, len(s.recs))
	for _, r := range s.recs {
		if !r.Forgotten {
			recs = append(recs, r)
		}
	}
	s.mu.RUnlock()
	for _, r := range recs {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		img, err := s.Resolve(ctx, r.Target.Digest.String(), nil)
		if errdefs.IsNotFound(err) {
			s.mu.RLock()
			still := s.recs[r.Target.Digest] != nil
			s.mu.RUnlock()
			if !still {
				continue
			}
		}
		if err != nil {
			s.log.Warn("image not readable", "image", r.Target.Digest.String(), "err", err)
			img = &Image{ID: r.Target.Digest.String(), Target: r.Target}
		}
		for _, c := range img.ChainIDs {
			shared[c]++
		}
		if sel.match(r, img) {
			items = append(items, item{r, img})
		}
	}
	out := []image.Summary{}
	for _, it := range items {
		sum := s.summary(it.img, opts.SharedSize, shared)
		sum.Labels = s.shownLabels(ctx, it.img)
		if len(sel.refs) > 0 {
			sum.RepoTags = slices.DeleteFunc(slices.Clone(sum.RepoTags), func(n string) bool { return !sel.matchRef(n) })
			sum.RepoDigests = slices.DeleteFunc(slices.Clone(sum.RepoDigests), func(n string) bool { return !sel.matchRef(n) })
			if len(sum.RepoTags) == 0 && len(sum.RepoDigests) == 0 {
				continue
			}
		}
		if opts.Manifests {
			sum.Manifests = s.manifests(it.rec.Target)
		}
		out = append(out, sum)
	}
	slices.SortFunc(out, func(a, b image.Summary) int {
		return cmp.Or(cmp.Compare(b.Created, a.Created), strings.Compare(a.ID, b.ID))
	})
	return out, nil
}

func (s *Store) summary(img *Image, sharedSize bool, shared map[digest.Digest]int) image.Summary {
	target := img.Target
	sum := image.Summary{
		ID: img.ID, ParentID: img.Parent, Labels: img.Config.Config.Labels,
		RepoTags: orEmpty(img.RepoTags), RepoDigests: orEmpty(img.RepoDigests),
		Size: img.Size, SharedSize: -1, Containers: -1, Descriptor: &target,
	}
	if !img.Created.IsZero() {
		sum.Created = img.Created.Unix()
	}
	if s.cfg.InUse != nil {
		sum.Containers = int64(len(s.cfg.InUse(img.ID)))
	}
	if sharedSize {
		sum.SharedSize = 0
		s.mu.RLock()
		for _, c := range img.ChainIDs {
			if l := s.layers[c]; l != nil && shared[c] > 1 {
				sum.SharedSize += l.Size
			}
		}
		s.mu.RUnlock()
	}
	return sum
}

func orEmpty(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

// manifests describes what is under a target.
func (s *Store) manifests(target ocispec.Descriptor) []image.ManifestSummary {
	list := []ocispec.Descriptor{target}
	if images.IsIndexType(target.MediaType) {
		doc, err := s.readDocument(target)
		if err != nil {
			return nil
		}
		list = doc.Manifests
	}
	out := []image.ManifestSummary{}
	for _, d := range list {
		m := image.ManifestSummary{ID: d.Digest.String(), Descriptor: d, Kind: image.ManifestKindUnknown, Available: s.complete(d, 0)}
		if blobs, chains, err := s.reach(d); err == nil {
			for _, n := range blobs {
				m.Size.Content += n
			}
			m.Size.Total = m.Size.Content
			if !isAttestation(d) {
				p := &image.ImageProperties{Containers: []string{}}
				s.mu.RLock()
				for _, c := range chains {
					if l := s.layers[c]; l != nil {
						p.Size.Unpacked += l.Size
					}
				}
				s.mu.RUnlock()
				m.Size.Total += p.Size.Unpacked
				if c, err := s.candidates(d, 0); err == nil && len(c) == 1 {
					p.Platform = c[0].platform
				}
				m.Kind, m.ImageData = image.ManifestKindImage, p
			}
		} else if d.Platform != nil && !isAttestation(d) {
			m.Kind = image.ManifestKindImage
			m.ImageData = &image.ImageProperties{Platform: platforms.Normalize(*d.Platform), Containers: []string{}}
		}
		if isAttestation(d) {
			m.Kind = image.ManifestKindAttestation
			m.AttestationData = &image.AttestationProperties{For: digest.Digest(d.Annotations[annotationRefDigest])}
		}
		out = append(out, m)
	}
	return out
}

// History returns an image's history, newest first.
func (s *Store) History(ctx context.Context, ref string, platform *ocispec.Platform) ([]image.HistoryResponseItem, error) {
	img, err := s.Resolve(ctx, ref, platform)
	if err != nil {
		return nil, err
	}
	size := func(i int) int64 {
		s.mu.RLock()
		defer s.mu.RUnlock()
		if l := s.layers[img.ChainIDs[i]]; l != nil {
			return l.Size
		}
		return img.LayerDescs[i].Size
	}
	out := []image.HistoryResponseItem{}
	layer := 0
	disk := img.Size // of a disk image, shown with its first entry
	for _, h := range img.Config.History {
		it := image.HistoryResponseItem{ID: "<missing>", Comment: h.Comment, CreatedBy: h.CreatedBy}
		if h.Created != nil {
			it.Created = h.Created.Unix()
		}
		if !h.EmptyLayer && layer < len(img.ChainIDs) {
			it.Size = size(layer)
			layer++
		} else if !h.EmptyLayer && img.Disk != nil {
			it.Size, disk = disk, 0
		}
		out = append(out, it)
	}
	for ; layer < len(img.ChainIDs); layer++ { // layers that the history does not tell of
		it := image.HistoryResponseItem{ID: "<missing>", Size: size(layer)}
		if !img.Created.IsZero() {
			it.Created = img.Created.Unix()
		}
		out = append(out, it)
	}
	slices.Reverse(out)
	if len(out) > 0 {
		out[0].ID, out[0].Tags = img.ID, img.RepoTags
	}
	return out, nil
}

// Inspect returns an image as the Docker API's inspect shows it.
func (s *Store) Inspect(ctx context.Context, ref string, platform *ocispec.Platform, manifests bool) (*image.InspectResponse, error) {
	img, err := s.Resolve(ctx, ref, platform)
	if err != nil {
		return nil, err
	}
	c, target := img.Config, img.Target
	r := &image.InspectResponse{
		ID: img.ID, RepoTags: orEmpty(img.RepoTags), RepoDigests: orEmpty(img.RepoDigests),
		Comment: img.Comment, Author: c.Author, Config: &c.Config,
		Architecture: c.Architecture, Variant: c.Variant, Os: c.OS, OsVersion: c.OSVersion,
		Size: img.Size, GraphDriver: &storage.DriverData{Name: "overlayfs"},
		RootFS: image.RootFS{Type: "layers"}, Descriptor: &target,
	}
	if !img.Created.IsZero() {
		r.Created = img.Created.UTC().Format(time.RFC3339Nano)
	}
	if st, ok := s.Lazy(ctx, img); ok {
		r.GraphDriver.Data = map[string]string{"Lazy": st.String()}
	}
	for _, d := range img.DiffIDs {
		r.RootFS.Layers = append(r.RootFS.Layers, d.String())
	}
	s.mu.RLock()
	if rec := s.recs[img.Target.Digest]; rec != nil {
		r.Metadata.LastTagTime = rec.Tagged
	}
	s.mu.RUnlock()
	if manifests {
		r.Manifests = s.manifests(target)
	}
	return r, nil
}

// DiskUsage tells what images take on the disk, as du(1) counts: blobs, unpacked
// layers and file systems for virtual machines, each once. Reclaimable is what pruning all unused images would free.
func (s *Store) DiskUsage(ctx context.Context, verbose bool) (*image.DiskUsage, error) {
	items, err := s.List(ctx, ListOptions{SharedSize: true})
	if err != nil {
		return nil, err
	}
	u := &image.DiskUsage{TotalCount: int64(len(items))}
	var unused []*record
	total := map[digest.Digest]int64{}
	for i := range items {
		d := digest.Digest(items[i].ID)
		s.mu.RLock()
		rec := s.recs[d]
		s.mu.RUnlock()
		if rec == nil {
			continue
		}
		if items[i].Containers > 0 {
			u.ActiveCount++
		} else {
			unused = append(unused, rec)
		}
		blobs, chains, err := s.reach(rec.Target)
		if err != nil {
			continue
		}
		maps.Copy(total, s.diskOf(ctx, blobs, chains))
	}
	space, err := s.Space(ctx)
	if err != nil {
		return nil, err
	}
	u.TotalSize = space.Images()
	u.Reclaimable = s.reclaimable(unused, total)
	if verbose {
		u.Items = items
	}
	return u, nil
}

// reclaimable is the total less what the images in use need.
func (s *Store) reclaimable(unused []*record, total map[digest.Digest]int64) (n int64) {
	gone := map[digest.Digest]bool{}
	for _, r := range unused {
		gone[r.Target.Digest] = true
	}
	need := map[digest.Digest]bool{}
	s.mu.RLock()
	var used []*record
	for d, r := range s.recs {
		if !gone[d] {
			used = append(used, r)
		}
	}
	s.mu.RUnlock()
	pushed, _ := s.shelved()
	keep := slices.DeleteFunc(pushed, func(t ocispec.Descriptor) bool { return gone[t.Digest] })
	for _, r := range used {
		keep = append(keep, r.Target)
	}
	for _, t := range keep {
		blobs, chains, err := s.reach(t)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return 0
		}
		for d := range blobs {
			need[d], need["disk "+d] = true, true
		}
		for _, c := range chains {
			need["chain "+c], need["erofs "+c], need["lazy "+c] = true, true, true
		}
	}
	for d, size := range total {
		if !need[d] {
			n += size
		}
	}
	return n
}
