package docker

import (
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// mayName says whether an image may get, or lose, a name on this socket.
func (a *API) mayName(ref string) error {
	if a.cfg.Tenant == nil {
		return nil
	}
	return a.cfg.Tenant.ImageName(ref)
}

// mayRemove says whether an image may be removed on this socket: by a name, or all
// of its names may go and nobody uses it.
func (a *API) mayRemove(c *call) error {
	if a.cfg.Tenant == nil {
		return nil
	}
	in, err := a.images.Inspect(c.ctx, c.name(), nil, false)
	if err != nil {
		return err
	}
	named, err := reference.ParseNormalizedNamed(c.name())
	byName := err == nil && !reference.IsNameOnly(named)
	if err == nil && !byName {
		for _, t := range in.RepoTags { // "app" and "app:latest" are one name
			byName = byName || t == reference.FamiliarString(reference.TagNameOnly(named))
		}
	}
	if byName {
		return a.mayName(c.name())
	}
	for _, t := range in.RepoTags {
		if err := a.mayName(t); err != nil {
			return err
		}
	}
	if len(in.RepoTags) == 0 && len(in.RepoDigests) > 0 {
		return errdefs.ErrPermissionDenied.WithMessage("an image that was pulled by its digest is not removed here: images are shared")
	}
	return nil
}
