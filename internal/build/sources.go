package build

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/source"
	"github.com/moby/buildkit/source/git"
	srctypes "github.com/moby/buildkit/source/types"

	"tenon.dev/tenon/internal/image"
)

// blobSource is BuildKit's source of single blobs of registries, held to the policy: a
// blob has no signature of its own.
type blobSource struct {
	source.Source
	images *image.Store
}

// Identifier reads a reference.
func (s blobSource) Identifier(scheme, ref string, attrs map[string]string, platform *pb.Platform) (source.Identifier, error) {
	if err := unjudged(s.images, scheme+"://"+ref); err != nil {
		return nil, err
	}
	return s.Source.Identifier(scheme, ref, attrs, platform)
}

// unjudged refuses a blob whose registry has a policy other than to accept.
func unjudged(images *image.Store, locator string) error {
	ref, ok := strings.CutPrefix(locator, srctypes.DockerImageBlobScheme+"://")
	if !ok {
		return nil
	}
	if _, err := reference.ParseNormalizedNamed(ref); err != nil {
		return invalid("blob %q: %v", ref, err)
	}
	if images.Judged(ref) {
		return fmt.Errorf("blob %s: the policy of images does not accept what comes from there unseen, and a blob has no signature: %w", ref, errdefs.ErrPermissionDenied)
	}
	return nil
}

// gitSource is BuildKit's source of Git repositories. It remembers which commits the
// names of repositories have led to.
type gitSource struct {
	source.Source
	images  *image.Store
	commits *commits
}

// Identifier reads a URL.
func (s gitSource) Identifier(scheme, ref string, attrs map[string]string, platform *pb.Platform) (source.Identifier, error) {
	if err := unjudged(s.images, attrs[pb.AttrGitBundle]); err != nil {
		return nil, err
	}
	// BuildKit makes one beside a repository, from another that git does not see here.
	if v := attrs[pb.AttrGitCheckoutBundle]; v == "true" {
		return nil, fmt.Errorf("git %s: builds don't make bundles of repositories (%s): take its files, or make the bundle in a RUN step: %w", ref, pb.AttrGitCheckoutBundle, errdefs.ErrNotImplemented)
	}
	return s.Source.Identifier(scheme, ref, attrs, platform)
}

// Resolve makes what fetches a repository.
func (s gitSource) Resolve(ctx context.Context, id source.Identifier, sm *session.Manager, vtx solver.Vertex) (source.SourceInstance, error) {
	inst, err := s.Source.Resolve(ctx, id, sm, vtx)
	g, ok := id.(*git.GitIdentifier)
	if err != nil || !ok {
		return inst, err
	}
	return &gitInstance{inst, commitKey(g.Remote, g.Ref), s.commits}, nil
}

type gitInstance struct {
	source.SourceInstance
	key     string
	commits *commits
}

// CacheKey finds out the commit.
func (i *gitInstance) CacheKey(ctx context.Context, job solver.JobContext, index int) (string, string, solver.CacheOpts, bool, error) {
	key, pin, opts, done, err := i.SourceInstance.CacheKey(ctx, job, index)
	if err == nil {
		i.commits.note(i.key, pin, sessionsOf(job))
	}
	return key, pin, opts, done, err
}

// sessionsOf are the sessions of the builds that a step is of.
func sessionsOf(job solver.JobContext) (out []string) {
	if job == nil || job.Session() == nil {
		return nil
	}
	for it := job.Session().SessionIterator(); ; {
		id := it.NextSession()
		if id == "" {
			return out
		}
		out = append(out, id)
	}
}

// commits are the last ones that names have led to.
type commits struct {
	mu   sync.Mutex
	last []noted // newest last
}

type noted struct {
	key, commit string
	sessions    []string // of the builds that fetched it
}

// maxCommits bounds what is remembered: more than builds at one time.
const maxCommits = 256

func commitKey(remote, ref string) string { return remote + "\n" + ref }

func (c *commits) note(key, commit string, sessions []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = append(c.last, noted{key, commit, sessions})
	if len(c.last) > maxCommits {
		c.last = append([]noted(nil), c.last[maxCommits/2:]...)
	}
}

// of is the commit of a repository's name for the build of a session, "" if it is not
// known. A build that shares another's step is not among those that fetched it: for that
// one it is the last.
func (c *commits) of(remote, ref, session string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	last := ""
	for _, n := range slices.Backward(c.last) {
		if n.key != commitKey(remote, ref) {
			continue
		}
		if slices.Contains(n.sessions, session) {
			return n.commit
		}
		if last == "" {
			last = n.commit
		}
	}
	return last
}
