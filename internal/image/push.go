package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	pushesAtOnce = 4
	pushAttempts = 6 // the registry may be starting anew
)

// PushResult is the aux object of a finished push, as in Docker's API.
type PushResult struct {
	Tag    string
	Digest string
	Size   int
}

// Push sends ref, which must be a name, to its registry. Of an index of which
// not all is here, only the image for the platform is pushed.
func (s *Store) Push(ctx context.Context, ref string, opts PushOptions) error {
	named, err := parseRef(ref)
	if err != nil {
		return err
	}
	if _, ok := named.(reference.Digested); ok {
		return fmt.Errorf("cannot push a digest reference: %w", errdefs.ErrInvalidArgument)
	}
	end, err := s.begin()
	if err != nil {
		return err
	}
	defer end()
	show := reference.FamiliarString(named)
	s.mu.RLock()
	rec := s.recs[s.names[canonical(named)]]
	s.mu.RUnlock()
	if rec == nil {
		return fmt.Errorf("An image does not exist locally with the tag: %s: %w", reference.FamiliarName(named), errdefs.ErrNotFound)
	}
	progress := serial(opts.Progress)
	progress.say(Progress{Status: "The push refers to repository [" + named.Name() + "]"})
	if img, err := s.Resolve(ctx, rec.Target.Digest.String(), opts.Platform); err == nil {
		if err := s.complete1(ctx, img); err != nil {
			return fmt.Errorf("push %s: %w", show, err)
		}
	}
	target, note, err := s.pushTarget(rec.Target, opts.Platform)
	if err != nil {
		return fmt.Errorf("push %s: %w", show, err)
	}
	ctx, cancel := context.WithCancel(log.WithLogger(ctx, quiet))
	defer cancel()
	stop := context.AfterFunc(s.ctx, cancel)
	defer stop()
	if opts.Encrypt != nil {
		if target, err = s.encryptTarget(ctx, target, opts.Encrypt, progress); err != nil {
			return fmt.Errorf("push %s: %w", show, err)
		}
		defer s.gcSoon() // the encrypted blobs are the registry's
	}
	tracker := docker.NewInMemoryTracker()
	res := s.resolver(opts.Auth, tracker)
	pusher, err := res.Pusher(ctx, canonical(named)+"@"+target.Digest.String())
	if err != nil {
		return registryError("push", show, err)
	}
	p := &pushing{s: s, pusher: pusher, tracker: tracker, progress: progress, done: map[digest.Digest]bool{}, sources: s.mountSources(named)}
	if err := p.tree(ctx, target, 0); err != nil {
		return registryError("push", show, err)
	}
	tag := named.(reference.Tagged).Tag()
	progress.say(Progress{Status: fmt.Sprintf("%s: digest: %s size: %d", tag, target.Digest, target.Size)})
	progress.say(Progress{Aux: PushResult{Tag: tag, Digest: target.Digest.String(), Size: int(target.Size)}})
	if note != "" {
		progress.say(Progress{Status: note})
	}
	if opts.Encrypt != nil {
		note = "" // it is the encrypted image that the registry has
	} else if err := s.noteRemote(rec.Target.Digest, named.Name()); err != nil {
		s.log.Warn("where an image was pushed not recorded", "image", show, "err", err)
	}
	s.event("push", target.Digest.String(), show, nil)
	return nil
}

// pushTarget decides what of a target is pushed.
func (s *Store) pushTarget(target ocispec.Descriptor, platform *ocispec.Platform) (ocispec.Descriptor, string, error) {
	if platform != nil {
		d, err := s.choose(target, platform)
		return d, "", err
	}
	if !images.IsIndexType(target.MediaType) || s.complete(target, 0) {
		return target, "", nil
	}
	d, err := s.choose(target, nil)
	return d, "Not all multiplatform-content is present and only the available single-platform image was pushed", err
}

// complete tells whether all that an index needs is here.
func (s *Store) complete(d ocispec.Descriptor, depth int) bool {
	if depth > maxIndexDepth+1 || !s.hasBlob(d.Digest, -1) {
		return false
	}
	if !images.IsIndexType(d.MediaType) && !images.IsManifestType(d.MediaType) {
		return true
	}
	doc, err := s.readDocument(d)
	if err != nil {
		return false
	}
	for _, m := range append(doc.Manifests, doc.Layers...) {
		if !s.complete(m, depth+1) {
			return false
		}
	}
	return doc.Config == nil || s.hasBlob(doc.Config.Digest, -1)
}

type pushing struct {
	s        *Store
	pusher   remotes.Pusher
	tracker  docker.StatusTracker
	progress ProgressFunc
	done     map[digest.Digest]bool
	sources  sources
}

// tree pushes what a document needs, then the document.
func (p *pushing) tree(ctx context.Context, d ocispec.Descriptor, depth int) error {
	if p.done[d.Digest] {
		return nil
	}
	p.done[d.Digest] = true
	if depth > maxIndexDepth+1 {
		return fmt.Errorf("index nested too deeply: %w", errdefs.ErrInvalidArgument)
	}
	doc, err := p.s.readDocument(d)
	if err != nil {
		return err
	}
	for _, m := range doc.Manifests {
		if !images.IsIndexType(m.MediaType) && !images.IsManifestType(m.MediaType) {
			if err := p.blob(ctx, m, false); err != nil {
				return err
			}
			continue
		}
		if err := p.tree(ctx, m, depth+1); err != nil {
			return err
		}
	}
	if doc.Config != nil {
		g, ctx := errgroup.WithContext(ctx)
		g.SetLimit(pushesAtOnce)
		for _, l := range doc.Layers {
			if p.done[l.Digest] || len(l.URLs) > 0 && !p.s.hasBlob(l.Digest, -1) {
				continue // foreign layers stay where they are
			}
			p.done[l.Digest] = true
			p.progress.say(Progress{ID: shortDigest(l.Digest), Status: "Preparing"})
			g.Go(func() error { return p.blob(ctx, l, true) })
		}
		if !p.done[doc.Config.Digest] {
			p.done[doc.Config.Digest] = true
			g.Go(func() error { return p.blob(ctx, *doc.Config, false) })
		}
		if err := g.Wait(); err != nil {
			return err
		}
	}
	return p.blob(ctx, d, false)
}

// blob pushes one blob or document, several times if the connection breaks.
func (p *pushing) blob(ctx context.Context, d ocispec.Descriptor, show bool) error {
	var err error
	for attempt := range pushAttempts {
		if attempt > 0 {
			select {
			case <-time.After(fetchBackoff << attempt):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		err = p.once(ctx, d, show, attempt == 0)
		if st := httpStatus(err); attempt == 0 && st >= 400 && st < 500 && p.sources.of(d) != nil {
			err = p.once(ctx, d, show, false) // perhaps it was the mount that was refused
		}
		if err == nil || ctx.Err() != nil || !retriable(err) || errors.Is(err, docker.ErrInvalidAuthorization) {
			return err
		}
		switch st := httpStatus(err); {
		case st == http.StatusTooManyRequests:
		case st != 0 && st < 500, st == http.StatusInsufficientStorage:
			return err
		}
	}
	return err
}

func (p *pushing) once(ctx context.Context, d ocispec.Descriptor, show, mount bool) error {
	id := shortDigest(d.Digest)
	say := func(status string, cur int64) {
		if show {
			p.progress.say(Progress{ID: id, Status: status, Current: cur, Total: d.Size})
		}
	}
	d.URLs, d.Annotations = nil, nil
	if mount {
		d.Annotations = p.sources.of(d)
	}
	w, err := p.pusher.Push(ctx, d)
	if errdefs.IsAlreadyExists(err) {
		status := "Layer already exists"
		if st, err := p.tracker.GetStatus(remotes.MakeRefKey(ctx, d)); err == nil && st.MountedFrom != "" {
			status = "Mounted from " + familiarPath(st.MountedFrom)
		}
		if show {
			p.progress.say(Progress{ID: id, Status: status})
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	f, err := p.s.openBlob(d.Digest)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 256<<10)
	var n int64
	last := time.Now()
	for {
		m, err := f.Read(buf)
		if m > 0 {
			if _, err := w.Write(buf[:m]); err != nil {
				return err
			}
			n += int64(m)
			if time.Since(last) >= progressEvery {
				last = time.Now()
				say("Pushing", n)
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	say("Pushing", n)
	if err := w.Commit(ctx, d.Size, d.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	if show {
		p.progress.say(Progress{ID: id, Status: "Pushed"})
	}
	return nil
}

// Distribution asks the registry what ref is, without pulling it.
func (s *Store) Distribution(ctx context.Context, ref string, auth *registry.AuthConfig) (*registry.DistributionInspect, error) {
	named, err := parseRef(ref)
	if err != nil {
		return nil, err
	}
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer func() { end(); s.gcSoon() }() // the documents fetched are kept by nothing
	ctx = log.WithLogger(ctx, quiet)
	show := reference.FamiliarString(named)
	res := s.resolver(auth, nil)
	name, target, err := resolveRef(ctx, res, canonical(named))
	if err != nil {
		return nil, registryError("pull", show, err)
	}
	fetcher, err := res.Fetcher(ctx, name)
	if err != nil {
		return nil, registryError("pull", show, err)
	}
	p := s.newPuller(fetcher, nil)
	out := &registry.DistributionInspect{Descriptor: ocispec.Descriptor{MediaType: target.MediaType, Digest: target.Digest, Size: target.Size}}
	if err := p.document(ctx, target); err != nil {
		return nil, registryError("pull", show, err)
	}
	doc, err := s.readDocument(target)
	if err != nil {
		return nil, err
	}
	if doc.Config != nil {
		if err := p.document(ctx, *doc.Config); err != nil {
			return nil, registryError("pull", show, err)
		}
		c, err := s.candidates(target, 0)
		if err != nil {
			return nil, err
		}
		out.Platforms = []ocispec.Platform{c[0].platform}
		return out, nil
	}
	for _, m := range doc.Manifests {
		if m.Platform != nil && !isAttestation(m) {
			out.Platforms = append(out.Platforms, platforms.Normalize(*m.Platform))
		}
	}
	return out, nil
}

// Search is answered with errdefs.ErrNotImplemented: registries have no search
// of their own, Docker's goes to Docker Hub's web service.
func (s *Store) Search(ctx context.Context, term string) error {
	return fmt.Errorf("searching for images is not supported: ask the registry's own web page: %w", errdefs.ErrNotImplemented)
}

// CheckAuth tries credentials at their server and returns Docker's words for
// success. errdefs.ErrUnauthenticated if they are refused.
func (s *Store) CheckAuth(ctx context.Context, auth registry.AuthConfig) (string, error) {
	ctx = log.WithLogger(ctx, quiet)
	host := auth.ServerAddress
	if i := strings.Index(host, "://"); i >= 0 {
		host = host[i+3:]
	}
	host, _, _ = strings.Cut(host, "/")
	if host == "" || host == "index.docker.io" || host == "registry-1.docker.io" {
		host = "docker.io"
	}
	api, err := docker.DefaultHost(host)
	if err != nil {
		return "", err
	}
	rh, err := s.host(api, "", &auth, nil)
	if err != nil {
		return "", err
	}
	resp, err := s.get(ctx, rh, "/v2/")
	if err != nil {
		if st := httpStatus(err); st == http.StatusUnauthorized || st == http.StatusForbidden || st == 0 && refused(err) {
			return "", fmt.Errorf("login to %s: unauthorized: incorrect username or password: %w: %w", host, err, errdefs.ErrUnauthenticated)
		}
		return "", registryError("login", host, err)
	}
	resp.Body.Close()
	return "Login Succeeded", nil
}

// refused tells whether it was the credentials that were not accepted, here or
// at the token server.
func refused(err error) bool {
	return errdefs.IsUnauthorized(err) || errors.Is(err, docker.ErrInvalidAuthorization) || strings.Contains(err.Error(), "401 Unauthorized")
}
