package image

import (
	"net/url"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A registry need not be sent what another of its repositories has: it is asked to
// mount that. Which repository has a blob is known from where images were pulled from
// and pushed to (record.Remotes).

// maxRemotes bounds the repositories remembered for one image.
const maxRemotes = 16

// annotationSource, with a host, is how containerd's client is told of repositories.
const annotationSource = "containerd.io/distribution.source."

// sources are the repositories, of one registry, that are known to have a blob.
type sources struct {
	key   string // of the annotation
	repos map[digest.Digest][]string
}

// of is what to annotate a blob with for the client to have it mounted; nil if nobody
// is known to have it.
func (s sources) of(d ocispec.Descriptor) map[string]string {
	if r := s.repos[d.Digest]; len(r) > 0 {
		return map[string]string{s.key: strings.Join(r, ",")}
	}
	return nil
}

// mountSources lists what other repositories of the registry are known to have.
func (s *Store) mountSources(to reference.Named) sources {
	out := sources{repos: map[digest.Digest][]string{}}
	u, err := url.Parse("dummy://" + to.Name())
	if err != nil {
		return out
	}
	out.key = annotationSource + u.Hostname() // as the client reads it, without the port
	prefix := reference.Domain(to) + "/"
	type from struct {
		target ocispec.Descriptor
		repo   string
	}
	var all []from
	s.mu.RLock()
	for _, r := range s.recs {
		for _, name := range r.Remotes {
			if repo, ok := strings.CutPrefix(name, prefix); ok && repo != reference.Path(to) {
				all = append(all, from{r.Target, repo})
			}
		}
	}
	s.mu.RUnlock()
	for _, f := range all {
		blobs, _, err := s.reach(f.target)
		if err != nil {
			continue
		}
		for d := range blobs {
			if !slices.Contains(out.repos[d], f.repo) {
				out.repos[d] = append(out.repos[d], f.repo)
			}
		}
	}
	return out
}

// noteRemote remembers that a repository, by its canonical name, has an image.
func (s *Store) noteRemote(target digest.Digest, repo string) error {
	s.mu.RLock()
	r := s.recs[target]
	known := r == nil || slices.Contains(r.Remotes, repo)
	s.mu.RUnlock()
	if known {
		return nil
	}
	return s.update(func(b *batch) error {
		if r := b.record(target); r != nil {
			r.addRemote(repo)
		}
		return nil
	})
}

func (r *record) addRemote(repo string) {
	if slices.Contains(r.Remotes, repo) {
		return
	}
	all := append(slices.Clone(r.Remotes), repo)
	r.Remotes = all[max(0, len(all)-maxRemotes):]
}

// familiarPath shows a repository's canonical name as users write it, without the host.
func familiarPath(name string) string {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.Path(n)
}
