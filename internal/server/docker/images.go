package docker

import (
	"encoding/json"
	"maps"
	"net/http"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/container"
	imagetypes "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/storage"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/server/wire"
)

// platformJSON is a query parameter that holds a platform as JSON; nil if it is
// missing or older than since.
func (c *call) platformJSON(key string, since Version) (*ocispec.Platform, error) {
	list, err := c.platformsJSON(key, since)
	if err != nil || len(list) == 0 {
		return nil, err
	}
	if len(list) > 1 {
		return nil, wire.Invalid("only one platform can be given here")
	}
	return &list[0], nil
}

func (c *call) platformsJSON(key string, since Version) ([]ocispec.Platform, error) {
	if c.v.before(since) {
		return nil, nil
	}
	var out []ocispec.Platform
	for _, s := range c.q[key] {
		if s == "" {
			continue
		}
		var p ocispec.Platform
		if err := json.Unmarshal([]byte(s), &p); err != nil {
			return nil, wire.Invalid("failed to parse platform: %v", err)
		}
		if p.OS == "" || p.Architecture == "" {
			return nil, wire.Invalid("both OS and Architecture must be provided")
		}
		out = append(out, p)
	}
	return out, nil
}

func (a *API) imageList(c *call) error {
	f, err := c.filters("before", "dangling", "label", "reference", "since", "until")
	if err != nil {
		return err
	}
	if ref := c.str("filter"); ref != "" && c.v.before(28) {
		f = maps.Clone(f)
		if f == nil {
			f = map[string][]string{}
		}
		f["reference"] = append(f["reference"], ref)
	}
	o := image.ListOptions{All: c.flag("all"), Filters: image.Filters(f), SharedSize: c.flag("shared-size")}
	if !c.v.before(47) {
		o.Manifests = c.flag("manifests")
	}
	list, err := a.images.List(c.ctx, o)
	if err != nil {
		return err
	}
	out, err := imageShapes(c.v, list, false)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, out)
}

// imageShapes are images in a list as version v shows them: []any before 1.44,
// which had one field more. The number of containers was not counted in lists
// before 1.51, but was in /system/df.
func imageShapes(v Version, list []imagetypes.Summary, counted bool) (any, error) {
	old := []any{}
	for i := range list {
		s := &list[i]
		s.RepoTags, s.RepoDigests = nonNil(s.RepoTags), nonNil(s.RepoDigests)
		if v.before(43) && len(s.RepoTags) == 0 && len(s.RepoDigests) == 0 {
			s.RepoTags, s.RepoDigests = []string{"<none>:<none>"}, []string{"<none>@<none>"}
		}
		if v.before(48) {
			s.Descriptor = nil
		}
		if v.before(51) && !counted {
			s.Containers = -1
		}
		if v.before(44) {
			m, err := merged(s, map[string]any{"VirtualSize": s.Size})
			if err != nil {
				return nil, err
			}
			old = append(old, m)
		}
	}
	if v.before(44) {
		return old, nil
	}
	return nonNil(list), nil
}

func (a *API) imageInspect(c *call) error {
	p, err := c.platformJSON("platform", 49)
	if err != nil {
		return err
	}
	manifests := !c.v.before(48) && c.flag("manifests")
	if manifests && p != nil {
		return wire.Invalid("conflicting options: manifests and platform options cannot both be set")
	}
	in, err := a.images.Inspect(c.ctx, c.name(), p, manifests)
	if err != nil {
		return err
	}
	v, err := imageShape(c.v, *in)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, v)
}

// imageShape is an image as version v shows it.
func imageShape(v Version, in imagetypes.InspectResponse) (any, error) {
	in.RepoTags, in.RepoDigests = nonNil(in.RepoTags), nonNil(in.RepoDigests)
	extra := map[string]any{}
	if v.before(44) {
		extra["VirtualSize"] = in.Size
		if in.Created == "" {
			in.Created = time.Time{}.Format(time.RFC3339Nano)
		}
	}
	if v.before(45) {
		extra["Container"] = ""
		extra["ContainerConfig"] = container.Config{}
	}
	if v.before(48) {
		in.Descriptor = nil
	}
	if v.before(53) {
		in.Identity = nil
	}
	if v.before(52) {
		for _, k := range []string{"Parent", "Comment", "DockerVersion", "Author"} {
			extra[k] = ""
		}
		cfg := map[string]any{
			"Cmd": nil, "Entrypoint": nil, "Env": nil, "Labels": nil, "OnBuild": nil,
			"User": "", "Volumes": nil, "WorkingDir": "",
		}
		if v.before(50) {
			for _, k := range []string{"AttachStderr", "AttachStdin", "AttachStdout", "OpenStdin", "StdinOnce", "Tty"} {
				cfg[k] = false
			}
			for _, k := range []string{"Domainname", "Hostname", "Image"} {
				cfg[k] = ""
			}
		}
		extra["Config"] = cfg
		if in.GraphDriver == nil {
			in.GraphDriver = &storage.DriverData{Name: "overlayfs"}
		}
	}
	return merged(in, extra)
}

func (a *API) imageHistory(c *call) error {
	p, err := c.platformJSON("platform", 48)
	if err != nil {
		return err
	}
	h, err := a.images.History(c.ctx, c.name(), p)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, nonNil(h))
}

// target joins the repo and tag parameters to a name with a tag; "" without repo.
func (c *call) target() (string, error) {
	repo, tag := c.str("repo"), c.str("tag")
	if repo == "" {
		return "", nil
	}
	ref, err := reference.ParseNormalizedNamed(repo)
	if err != nil {
		return "", wire.Invalid("%q is no name of an image: %v", repo, err)
	}
	if _, ok := ref.(reference.Digested); ok {
		return "", wire.Invalid("an image is named by a tag here, not by a digest")
	}
	if tag != "" {
		if ref, err = reference.WithTag(reference.TrimNamed(ref), tag); err != nil {
			return "", wire.Invalid("%q is no tag: %v", tag, err)
		}
	}
	ref = reference.TagNameOnly(ref)
	if reference.FamiliarName(ref) == string(digest.Canonical) {
		return "", wire.Invalid("refusing to create an ambiguous tag using digest algorithm as name")
	}
	return ref.String(), nil
}

func (a *API) imageTag(c *call) error {
	to, err := c.target()
	if err != nil {
		return err
	}
	if to == "" {
		return wire.Invalid("repo is missing: say which name the image gets")
	}
	if err := a.mayName(to); err != nil {
		return err
	}
	return a.then(c, http.StatusCreated, a.images.Tag(c.ctx, c.name(), to))
}

func (a *API) imageRemove(c *call) error {
	if strings.TrimSpace(c.name()) == "" {
		return wire.Invalid("image name cannot be blank")
	}
	ps, err := c.platformsJSON("platforms", 50)
	if err != nil {
		return err
	}
	if err := a.mayRemove(c); err != nil {
		return err
	}
	list, err := a.images.Remove(c.ctx, c.name(),
		image.RemoveOptions{Force: c.flag("force"), NoPrune: c.flag("noprune"), Platforms: ps, Running: a.eng.ImageRunning}, a.eng.ImageUsers)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, nonNil(list))
}

func (a *API) imagePrune(c *call) error {
	f, err := c.filters("dangling", "label", "label!", "until")
	if err != nil {
		return err
	}
	if a.cfg.Tenant != nil { // images are shared: what others want is not known here
		return c.json(http.StatusOK, imagetypes.PruneReport{})
	}
	list, freed, err := a.images.Prune(c.ctx, image.Filters(f), a.eng.ImageUsers)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, imagetypes.PruneReport{ImagesDeleted: list, SpaceReclaimed: freed})
}

// Auth decodes X-Registry-Auth. Like Docker, what can't be read counts as
// nothing, for the many clients that send "null" or "{}".
func Auth(r *http.Request) *registry.AuthConfig {
	h := r.Header.Get(registry.AuthHeader)
	if h == "" {
		return nil
	}
	cfg, err := authconfig.Decode(h)
	if err != nil || *cfg == (registry.AuthConfig{}) {
		return nil
	}
	return cfg
}

func (a *API) distribution(c *call) error {
	d, err := a.images.Distribution(c.ctx, c.name(), Auth(c.r))
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, d)
}

func (a *API) commit(c *call) error {
	body := struct{ *container.Config }{}
	if err := c.read(&body); err != nil {
		return err
	}
	ref, err := c.target()
	if err != nil {
		return err
	}
	if c.str("container") == "" {
		return wire.Invalid("container is missing: say which container an image is made of")
	}
	id, err := a.eng.Commit(c.ctx, c.str("container"), engine.CommitOptions{
		Ref: ref, Author: c.str("author"), Comment: c.str("comment"), Changes: c.q["changes"],
		Config: body.Config, NoPause: !c.flagOr("pause", true),
	})
	if err != nil {
		return err
	}
	return c.json(http.StatusCreated, container.CommitResponse{ID: id})
}
