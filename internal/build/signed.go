package build

import (
	"context"
	"errors"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	distreference "github.com/distribution/reference"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/cache/remotecache"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/source"
	"github.com/moby/buildkit/source/containerimage"
	srctypes "github.com/moby/buildkit/source/types"
	"github.com/moby/buildkit/util/resolver"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image"
)

// gate holds builds to the policy of images: what it takes from a registry is fetched
// by the digest that was let pass.
type gate struct {
	images *image.Store
	at     func(*session.Manager, session.Group, string) *resolver.Resolver
}

func newGate(images *image.Store) *gate {
	return &gate{images: images, at: func(sm *session.Manager, g session.Group, ref string) *resolver.Resolver {
		return resolver.DefaultPool.GetResolver(images.RegistryHosts, ref, resolver.ScopeType{}, sm, g)
	}}
}

// pin returns ref with the digest that may be used. An image that is here is used as it
// is, where mode asks for that.
func (g *gate) pin(ctx context.Context, ref string, mode resolver.ResolveMode, platform *ocispec.Platform, sm *session.Manager, s session.Group) (string, error) {
	if !g.images.Judged(ref) {
		return ref, nil
	}
	named, err := distreference.ParseNormalizedNamed(ref)
	if err != nil {
		return "", err
	}
	named = distreference.TagNameOnly(named)
	here := g.here(named)
	if here != "" && mode == resolver.ResolveModePreferLocal {
		return pinned(named, here)
	}
	d, err := g.images.Admit(ctx, g.at(sm, s, ref), ref, platform)
	if err != nil {
		if here != "" && mode == resolver.ResolveModeDefault && !errdefs.IsPermissionDenied(err) {
			return pinned(named, here) // the registry does not know it, or does not answer
		}
		return "", err
	}
	return pinned(named, d)
}

// here is the digest of the image here by that name, "" if there is none.
func (g *gate) here(named distreference.Named) digest.Digest {
	target, err := g.images.Lookup(named.String())
	if err != nil {
		return ""
	}
	if d, ok := named.(distreference.Digested); ok && d.Digest() != target.Digest {
		return ""
	}
	return target.Digest
}

func pinned(named distreference.Named, d digest.Digest) (string, error) {
	out := distreference.TrimNamed(named)
	if t, ok := named.(distreference.Tagged); ok {
		tagged, err := distreference.WithTag(out, t.Tag())
		if err != nil {
			return "", err
		}
		out = tagged
	}
	c, err := distreference.WithDigest(out, d)
	if err != nil {
		return "", err
	}
	return c.String(), nil
}

// ResolveSourceMetadata answers what FROM and "# syntax=" ask.
func (w *tenonWorker) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt, sm *session.Manager, job solver.JobContext) (*sourceresolver.MetaResponse, error) {
	ref, ok := strings.CutPrefix(op.GetIdentifier(), srctypes.DockerImageScheme+"://")
	if ok {
		if err := w.r.images.Buildable(ctx, ref); err != nil {
			return nil, err
		}
	}
	if !ok || !w.r.images.Judged(ref) {
		return w.Worker.ResolveSourceMetadata(ctx, op, opt, sm, job)
	}
	var platform *ocispec.Platform
	mode := ""
	if opt.ImageOpt != nil {
		platform, mode = opt.ImageOpt.Platform, opt.ImageOpt.ResolveMode
	}
	m, err := resolver.ParseImageResolveMode(mode)
	if err != nil {
		return nil, err
	}
	var s session.Group
	if job != nil {
		s = job.Session()
	}
	pin, err := newGate(w.r.images).pin(ctx, ref, m, platform, sm, s)
	if err != nil {
		return nil, err
	}
	asked := op.CloneVT()
	asked.Identifier = srctypes.DockerImageScheme + "://" + pin
	out, err := w.Worker.ResolveSourceMetadata(ctx, asked, opt, sm, job)
	if out != nil {
		out.Op = op
	}
	return out, err
}

// Resolve makes what fetches an image.
func (s localFirst) Resolve(ctx context.Context, id source.Identifier, sm *session.Manager, vtx solver.Vertex) (source.SourceInstance, error) {
	i, ok := id.(*containerimage.ImageIdentifier)
	if !ok || !s.images.Judged(i.Reference.String()) {
		return s.Source.Resolve(ctx, id, sm, vtx)
	}
	return &judged{s: s, id: *i, sm: sm, vtx: vtx}, nil
}

// judged is an image that is fetched once the policy lets it pass.
type judged struct {
	s   localFirst
	id  containerimage.ImageIdentifier
	sm  *session.Manager
	vtx solver.Vertex

	mu    sync.Mutex
	inner source.SourceInstance
}

func (j *judged) pass(ctx context.Context, job solver.JobContext) (source.SourceInstance, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.inner != nil {
		return j.inner, nil
	}
	var g session.Group
	if job != nil {
		g = job.Session()
	}
	pin, err := newGate(j.s.images).pin(ctx, j.id.Reference.String(), j.id.ResolveMode, j.id.Platform, j.sm, g)
	if err != nil {
		return nil, err
	}
	id := j.id
	if id.Reference, err = reference.Parse(pin); err != nil {
		return nil, err
	}
	inner, err := j.s.Source.Resolve(ctx, &id, j.sm, j.vtx)
	if err == nil {
		j.inner = inner
	}
	return inner, err
}

// CacheKey lets the image pass first.
func (j *judged) CacheKey(ctx context.Context, job solver.JobContext, index int) (string, string, solver.CacheOpts, bool, error) {
	inner, err := j.pass(ctx, job)
	if err != nil {
		return "", "", nil, false, err
	}
	return inner.CacheKey(ctx, job, index)
}

// Snapshot lets the image pass first.
func (j *judged) Snapshot(ctx context.Context, job solver.JobContext) (cache.ImmutableRef, error) {
	inner, err := j.pass(ctx, job)
	if err != nil {
		return nil, err
	}
	return inner.Snapshot(ctx, job)
}

// judgedCache imports a registry's build cache if the policy lets it pass: as an image,
// since it becomes part of one.
func (r *running) judgedCache(next remotecache.ResolveCacheImporterFunc) remotecache.ResolveCacheImporterFunc {
	return func(ctx context.Context, g session.Group, attrs map[string]string) (remotecache.Importer, ocispec.Descriptor, error) {
		if ref := attrs["ref"]; r.images.Judged(ref) {
			if r.sessions == nil {
				return nil, ocispec.Descriptor{}, errors.New("build: not open")
			}
			pin, err := newGate(r.images).pin(ctx, ref, resolver.ResolveModeForcePull, nil, r.sessions, g)
			if err != nil {
				return nil, ocispec.Descriptor{}, err
			}
			own := map[string]string{}
			for k, v := range attrs {
				own[k] = v
			}
			own["ref"] = pin
			attrs = own
		}
		return next(ctx, g, attrs)
	}
}
