package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	fetchAttempts = 5
	fetchBackoff  = 200 * time.Millisecond
	// stallTimeout ends a transfer that brings nothing; slowAfter and slowRate
	// one that brings next to nothing (bytes a second).
	stallTimeout = 60 * time.Second
	slowAfter    = 5 * time.Minute
	slowRate     = 1 << 10

	resolveTimeout = 5 * time.Minute

	progressEvery = 100 * time.Millisecond
)

type puller struct {
	s        *Store
	fetcher  remotes.Fetcher
	progress ProgressFunc
	// Slots of this pull alone, so that a slow registry holds up no one else.
	fetches, unpacks chan struct{}
	admitted         *admission // by the policy
}

func (s *Store) newPuller(f remotes.Fetcher, progress ProgressFunc) *puller {
	return &puller{s: s, fetcher: f, progress: progress, fetches: make(chan struct{}, s.cfg.Downloads), unpacks: make(chan struct{}, s.cfg.Unpacks)}
}

// Pull fetches ref from its registry or a mirror of it, verifying all that
// comes while it is read, and unpacks it. What is here already is not fetched
// again.
func (s *Store) Pull(ctx context.Context, ref string, opts PullOptions) (*Image, error) {
	named, err := parseRef(ref)
	if err != nil {
		return nil, err
	}
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	ctx, cancel := context.WithCancel(log.WithLogger(ctx, quiet))
	defer cancel()
	stop := context.AfterFunc(s.ctx, cancel)
	defer stop()
	img, err := s.pull(ctx, named, opts)
	if err != nil {
		s.gcSoon()
		return nil, err
	}
	return img, nil
}

func (s *Store) pull(ctx context.Context, named reference.Named, opts PullOptions) (*Image, error) {
	name := canonical(named)
	show := reference.FamiliarString(named)
	progress := serial(opts.Progress)
	rule, err := s.rule("pull", named)
	if err != nil {
		return nil, err
	}
	res := s.resolver(opts.Auth, nil)
	tag := "latest"
	if t, ok := named.(reference.Tagged); ok {
		tag = t.Tag()
	} else if _, ok := named.(reference.Digested); ok {
		tag = show
	}
	resolved, target, err := resolveRef(ctx, res, name)
	if err != nil {
		return nil, registryError("pull", show, err)
	}
	if d, ok := named.(reference.Digested); ok && target.Digest != d.Digest() {
		return nil, fmt.Errorf("pull %s: the registry answers with %s: %w", show, target.Digest, errdefs.ErrDataLoss)
	}
	progress.say(Progress{ID: tag, Status: "Pulling from " + reference.Path(named)})
	fetcher, err := res.Fetcher(ctx, resolved)
	if err != nil {
		return nil, registryError("pull", show, err)
	}
	p := s.newPuller(fetcher, progress)
	s.mu.RLock()
	had := s.names[name] == target.Digest
	s.mu.RUnlock()

	target = ocispec.Descriptor{MediaType: target.MediaType, Digest: target.Digest, Size: target.Size}
	if err := p.document(ctx, target); err != nil {
		return nil, registryError("pull", show, err)
	}
	q := &inquiry{s: s, named: named, rule: rule, res: res, read: func(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
		if err := p.document(ctx, d); err != nil {
			return nil, err
		}
		return s.readBlob(d)
	}}
	if p.admitted, err = q.admit(ctx, "pull", target, opts.Platform); err != nil {
		return nil, err
	}
	desc, err := p.manifest(ctx, target, opts)
	if errors.Is(err, ErrPlatform) || errors.Is(err, errRefused) {
		return nil, fmt.Errorf("pull %s: %w", show, err)
	}
	if err != nil {
		return nil, registryError("pull", show, err)
	}
	img, err := s.readImage(target, desc)
	if err != nil {
		return nil, fmt.Errorf("pull %s: %w", show, err)
	}
	if opts.Platform != nil && !platforms.Only(*opts.Platform).Match(platforms.Normalize(img.Platform)) {
		return nil, fmt.Errorf("image with reference %s was found but does not match the specified platform: wanted %s, actual: %s: %w",
			show, platforms.Format(*opts.Platform), platforms.Format(img.Platform), ErrPlatform)
	}
	if err := s.Authorize(ctx, img); err != nil { // before anything large comes
		return nil, fmt.Errorf("pull %s: %w", show, err)
	}
	fetched, err := p.contents(ctx, named, img, opts)
	if err != nil {
		return nil, registryError("pull", show, err)
	}
	img, err = s.finish(img, []string{name}, "pull", "")
	if err != nil {
		return nil, fmt.Errorf("pull %s: %w", show, err)
	}
	progress.say(Progress{Status: "Digest: " + target.Digest.String()})
	if p.admitted.source != "" {
		progress.say(Progress{Status: "Signed by " + p.admitted.key.String()})
	}
	if had && !fetched {
		progress.say(Progress{Status: "Status: Image is up to date for " + show})
	} else {
		progress.say(Progress{Status: "Status: Downloaded newer image for " + show})
	}
	s.event("pull", img.ID, show, nil)
	return img, nil
}

// resolveRef asks for a name's digest, within a time that leaves room for
// several mirrors.
func resolveRef(ctx context.Context, r remotes.Resolver, name string) (string, ocispec.Descriptor, error) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	return r.Resolve(ctx, name)
}

// document fetches an index, manifest or config.
func (p *puller) document(ctx context.Context, d ocispec.Descriptor) error {
	if err := checkDescriptor(d); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if d.Size > p.s.cfg.Limits.ManifestBytes {
		return fmt.Errorf("%s: %d bytes, %d are the most for a document: %w", d.Digest, d.Size, p.s.cfg.Limits.ManifestBytes, errdefs.ErrResourceExhausted)
	}
	return p.blob(ctx, d, nil, nil)
}

// manifest fetches what leads to the manifest of the platform, with its config
// and attestations.
func (p *puller) manifest(ctx context.Context, target ocispec.Descriptor, opts PullOptions) (ocispec.Descriptor, error) {
	doc, err := p.s.readDocument(target)
	if err != nil {
		return target, err
	}
	if doc.Config != nil {
		return target, p.document(ctx, *doc.Config)
	}
	var flat []ocispec.Descriptor
	if err := p.flatten(ctx, doc, &flat, 0); err != nil {
		return target, err
	}
	chosen, err := p.s.chooseOffered(flat, opts.Platform)
	if err != nil {
		return target, err
	}
	if !p.admitted.whole && chosen.Digest != p.admitted.manifest {
		return target, fmt.Errorf("manifest %s is not the one that is signed: %w", chosen.Digest, errRefused)
	}
	for _, m := range flat {
		main := m.Digest == chosen.Digest
		kept := isAttestation(m) && m.Annotations[annotationRefDigest] == chosen.Digest.String()
		if !main && !kept && !opts.AllPlatforms {
			continue
		}
		if !p.admitted.whole && isAttestation(m) {
			continue // the index names it, and that nobody has signed
		}
		if err := p.admitted.one(ctx, m.Digest); err != nil {
			return target, err
		}
		err := p.whole(ctx, m, !main)
		if err != nil && kept {
			p.s.log.Warn("attestation not fetched", "image", target.Digest.String(), "attestation", m.Digest.String(), "err", err)
			continue
		}
		if err != nil {
			return target, err
		}
	}
	return chosen, nil
}

// chooseOffered picks the manifest for a platform (nil: the default one) among those
// that a registry offers.
func (s *Store) chooseOffered(flat []ocispec.Descriptor, platform *ocispec.Platform) (ocispec.Descriptor, error) {
	var all []candidate
	for _, m := range flat {
		if isAttestation(m) || m.Platform == nil && len(flat) > 1 {
			continue
		}
		c := candidate{desc: m, available: true, platform: *s.cfg.Platform}
		if m.Platform != nil {
			c.platform = platforms.Normalize(*m.Platform)
		}
		all = append(all, c)
	}
	want := platform
	if want == nil {
		want = s.cfg.Platform
	}
	chosen, err := s.chooseAmong(all, want)
	if err != nil {
		var names []string
		for _, c := range all {
			names = append(names, platforms.Format(c.platform))
		}
		return chosen, fmt.Errorf("no matching manifest for %s in the manifest list entries: there is %s: %w",
			platforms.Format(*want), strings.Join(names, ", "), ErrPlatform)
	}
	return chosen, nil
}

// flatten fetches indexes inside an index.
func (p *puller) flatten(ctx context.Context, doc *document, out *[]ocispec.Descriptor, depth int) error {
	if depth > maxIndexDepth {
		return fmt.Errorf("index nested too deeply: %w", errdefs.ErrInvalidArgument)
	}
	for _, m := range doc.Manifests {
		if !images.IsIndexType(m.MediaType) {
			if images.IsManifestType(m.MediaType) {
				*out = append(*out, m)
			}
			continue
		}
		if err := p.document(ctx, m); err != nil {
			return err
		}
		in, err := p.s.readDocument(m)
		if err != nil {
			return err
		}
		if err := p.flatten(ctx, in, out, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// whole fetches a manifest and its config, and the layers' blobs as well if asked to.
func (p *puller) whole(ctx context.Context, m ocispec.Descriptor, layers bool) error {
	if err := p.document(ctx, m); err != nil {
		return err
	}
	doc, err := p.s.readDocument(m)
	if err != nil {
		return err
	}
	if doc.Config == nil {
		return fmt.Errorf("manifest %s has no config: %w", m.Digest, errdefs.ErrInvalidArgument)
	}
	if err := p.document(ctx, *doc.Config); err != nil || !layers {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range doc.Layers {
		g.Go(func() error {
			release, err := slot(ctx, p.fetches)
			if err != nil {
				return err
			}
			defer release()
			return p.blob(ctx, l, nil, nil)
		})
	}
	return g.Wait()
}

// layers fetches and unpacks all layers at the same time, and puts them in
// their places from the lowest up. It tells whether any was fetched.
func (p *puller) layers(ctx context.Context, img *Image) (fetched bool, err error) {
	type result struct {
		u   *unpacked
		err error
	}
	ctx, cancel := context.WithCancelCause(ctx)
	n := len(img.ChainIDs)
	results := make([]chan result, n)
	var any atomic.Bool
	var g errgroup.Group
	defer func() {
		cancel(err)
		_ = g.Wait() // its errors have been in the results
		for _, c := range results {
			select {
			case r := <-c:
				if r.u != nil {
					p.s.discard(r.u.dir)
				}
			default:
			}
		}
	}()
	todo := make([]bool, n)
	for i, d := range img.LayerDescs {
		results[i] = make(chan result, 1)
		if p.s.hasLayer(img.ChainIDs[i]) && p.s.hasBlob(d.Digest, d.Size) {
			p.progress.say(Progress{ID: shortDigest(d.Digest), Status: "Already exists"})
			continue
		}
		todo[i] = true
		p.progress.say(Progress{ID: shortDigest(d.Digest), Status: "Pulling fs layer"})
	}
	failed := make(chan error, n)
	for i, d := range img.LayerDescs {
		if !todo[i] {
			continue
		}
		g.Go(func() error {
			u, got, err := p.layer(ctx, d, img.DiffIDs[i], !p.s.hasLayer(img.ChainIDs[i]))
			if got {
				any.Store(true)
			}
			results[i] <- result{u, err}
			if err != nil {
				failed <- err
			}
			return nil
		})
	}
	for i, d := range img.LayerDescs {
		if !todo[i] {
			continue
		}
		select {
		case err := <-failed:
			return false, err
		case r := <-results[i]:
			if r.err != nil {
				return false, r.err
			}
			if r.u != nil {
				if err := p.s.publish(ctx, r.u, img.DiffIDs, img.ChainIDs, i); err != nil {
					p.s.discard(r.u.dir)
					return false, err
				}
			}
			p.progress.say(Progress{ID: shortDigest(d.Digest), Status: "Pull complete"})
		}
	}
	return any.Load(), nil
}

// layer brings one layer's blob here and, if asked to, unpacks it meanwhile.
func (p *puller) layer(ctx context.Context, d ocispec.Descriptor, diffID digest.Digest, unpack bool) (u *unpacked, fetched bool, err error) {
	release, err := slot(ctx, p.fetches)
	if err != nil {
		return nil, false, err
	}
	release = sync.OnceFunc(release)
	defer release()
	type result struct {
		u   *unpacked
		err error
	}
	var done chan result
	id := shortDigest(d.Digest)
	extracting := func(cur int64) {
		p.progress.say(Progress{ID: id, Status: "Extracting", Current: cur, Total: d.Size})
	}
	var here atomic.Bool // all of the blob
	fetched = !p.s.hasBlob(d.Digest, d.Size)
	err = p.blob(ctx, d, func(w *ingest) {
		if !unpack {
			return
		}
		done = make(chan result, 1)
		rd := w.reader(ctx)
		go func() {
			defer rd.Close()
			u, err := p.s.unpackLayer(ctx, p.unpacks, d, &reportReader{r: rd, report: func(cur int64) {
				if here.Load() {
					extracting(cur)
				}
			}})
			done <- result{u, err}
		}()
	}, func(cur int64) {
		p.progress.say(Progress{ID: id, Status: "Downloading", Current: cur, Total: d.Size})
	})
	release() // the next one may be fetched while this one is unpacked
	if done != nil {
		here.Store(err == nil)
		r := <-done
		if err != nil {
			if r.u != nil {
				p.s.discard(r.u.dir)
			}
			return nil, fetched, err
		}
		if r.err != nil {
			return nil, fetched, fmt.Errorf("unpack layer %s: %w", d.Digest, r.err)
		}
		extracting(d.Size)
		return r.u, fetched, p.s.checkDiffID(r.u, d.Digest, diffID)
	}
	if err != nil || !unpack {
		return nil, fetched, err
	}
	// The blob has been here.
	extracting(0)
	u, err = p.s.unpackBlob(ctx, p.unpacks, d, diffID)
	return u, fetched, err
}

// reportReader tells now and then how much has been read.
type reportReader struct {
	r      io.Reader
	n      int64
	last   time.Time
	report func(int64)
}

func (r *reportReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.n += int64(n)
	if now := time.Now(); now.Sub(r.last) >= progressEvery {
		r.last = now
		r.report(r.n)
	}
	return n, err
}

// blob fetches a blob unless it is here. started, if not nil, is given the
// ingest before the first byte and may read from it.
func (p *puller) blob(ctx context.Context, d ocispec.Descriptor, started func(*ingest), report func(int64)) error {
	if err := checkDescriptor(d); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if d.Size > p.s.cfg.Limits.BlobBytes {
		return fmt.Errorf("blob %s has %d bytes, %d are the most: %w", d.Digest, d.Size, p.s.cfg.Limits.BlobBytes, errdefs.ErrResourceExhausted)
	}
	unlock, err := p.s.locks.lock(ctx, "blob "+d.Digest.String())
	if err != nil {
		return err
	}
	defer unlock()
	if p.s.hasBlob(d.Digest, d.Size) {
		return nil
	}
	w, err := p.s.newIngest(d.Digest.Algorithm())
	if err != nil {
		return err
	}
	defer w.close()
	if started != nil {
		started(w)
	}
	if err := p.transfer(ctx, d, w, report); err != nil {
		w.abort(err)
		return err
	}
	if report != nil {
		p.progress.say(Progress{ID: shortDigest(d.Digest), Status: "Verifying Checksum"})
	}
	if _, err := w.commit(d.Digest, d.Size); err != nil {
		return err
	}
	if report != nil {
		p.progress.say(Progress{ID: shortDigest(d.Digest), Status: "Download complete"})
	}
	return nil
}

// transfer reads the blob into w, going on where it was when the connection breaks.
func (p *puller) transfer(ctx context.Context, d ocispec.Descriptor, w *ingest, report func(int64)) error {
	d.URLs = nil // a manifest does not send us to other servers
	var err error
	for attempt := range fetchAttempts {
		if attempt > 0 {
			select {
			case <-time.After(fetchBackoff << attempt):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		before := w.n
		err = p.attempt(ctx, d, w, report)
		if err == nil || ctx.Err() != nil || !retriable(err) {
			return err
		}
		if w.n == before && attempt > 1 {
			return err
		}
		p.s.log.Debug("blob transfer broken, trying again", "blob", d.Digest.String(), "at", w.n, "err", err)
	}
	return err
}

func retriable(err error) bool {
	if st := httpStatus(err); st != 0 && st < 500 && st != http.StatusTooManyRequests && st != http.StatusRequestTimeout {
		return false
	}
	return !errdefs.IsNotFound(err) && !errdefs.IsUnauthorized(err) && !errdefs.IsPermissionDenied(err) &&
		!errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) && !errdefs.IsResourceExhausted(err) && !isNoSpace(err)
}

var errStalled = errors.New("the registry has stopped sending")

func (p *puller) attempt(ctx context.Context, d ocispec.Descriptor, w *ingest, report func(int64)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(p.s.stall, func() { cancel(errStalled) })
	defer watch.Stop()
	fail := func(err error) error {
		if context.Cause(ctx) == errStalled {
			return errStalled
		}
		return err
	}
	rc, err := p.fetcher.Fetch(ctx, d)
	if err != nil {
		return fail(err)
	}
	defer rc.Close()
	if w.n > 0 {
		sk, ok := rc.(io.Seeker)
		if !ok {
			return errors.New("the registry's answer cannot be resumed")
		}
		if _, err := sk.Seek(w.n, io.SeekStart); err != nil {
			return err
		}
	}
	start, first, last := time.Now(), w.n, time.Time{}
	buf := make([]byte, 256<<10)
	for {
		n, err := rc.Read(buf)
		if int64(n) > d.Size-w.n {
			return fmt.Errorf("blob %s: more than the %d bytes announced: %w", d.Digest, d.Size, errdefs.ErrInvalidArgument)
		}
		if n > 0 {
			watch.Reset(p.s.stall)
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
			if now := time.Now(); now.Sub(last) >= progressEvery {
				last = now
				if report != nil {
					report(w.n)
				}
				if t := now.Sub(start); t > slowAfter && (w.n-first)/int64(t/time.Second) < slowRate {
					return errStalled
				}
			}
		}
		if err == io.EOF {
			if w.n < d.Size {
				return io.ErrUnexpectedEOF
			}
			return nil
		}
		if err != nil {
			return fail(err)
		}
	}
}
