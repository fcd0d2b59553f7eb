package engine

import (
	"context"
	"maps"
	"slices"
	"strings"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/image"
)

// Commit makes an image of a container's changes. A running container is
// paused meanwhile, unless asked not to.
func (e *Engine) Commit(ctx context.Context, ref string, o CommitOptions) (string, error) {
	c, err := e.lockOp(ctx, ref)
	if err != nil {
		return "", err
	}
	defer c.op.unlock()
	r := c.record()
	client, f, release, err := e.files(ctx, c)
	if err != nil {
		return "", err
	}
	defer release()
	if !o.NoPause && r.Running() && !r.Facts.Paused {
		if err := client.Pause(ctx, c.id); err != nil {
			return "", err
		}
		defer func() {
			if err := client.Resume(context.WithoutCancel(ctx), c.id); err != nil && c.record().Running() {
				e.log.Error("container is still paused after commit", "container", c.id, "err", err)
			}
		}()
	}
	parent, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
	if err != nil {
		return "", err
	}
	f.Skip = append(f.Skip, engineFiles...)
	diff, err := client.Diff(ctx, f)
	if err != nil {
		return "", err
	}
	defer diff.Close()
	cfg := r.Config
	if o.Config != nil {
		cfg = mergeCommit(o.Config, r.Config)
	}
	img, err := e.cfg.Images.Commit(ctx, image.CommitOptions{
		Parent: parent, Diff: diff, Config: imageConfig(cfg), Changes: o.Changes, Author: o.Author, Comment: o.Comment, Ref: o.Ref,
		ContainerCommand: strings.Join(append(append([]string(nil), r.Config.Entrypoint...), r.Config.Cmd...), " "),
	})
	if err != nil {
		return "", err
	}
	e.rememberBase(ctx, img, r.Image.Ref, parent.ID)
	e.emit(c, events.ActionCommit, map[string]string{"comment": o.Comment, "imageID": img.ID, "imageRef": o.Ref})
	return img.ID, nil
}

// mergeCommit lays a commit's own configuration over the container's.
func mergeCommit(over, base *mobycontainer.Config) *mobycontainer.Config {
	img := imageConfig(base)
	return mergeImage(over, img)
}

// imageConfig is the part of a container's configuration that an image has.
func imageConfig(c *mobycontainer.Config) *dockerspec.DockerOCIImageConfig {
	out := &dockerspec.DockerOCIImageConfig{
		ImageConfig: ocispec.ImageConfig{
			User: c.User, Env: c.Env, Entrypoint: c.Entrypoint, Cmd: c.Cmd, Volumes: maps.Clone(c.Volumes), WorkingDir: c.WorkingDir,
			Labels: maps.Clone(c.Labels), StopSignal: c.StopSignal, ArgsEscaped: c.ArgsEscaped,
		},
		DockerOCIImageConfigExt: dockerspec.DockerOCIImageConfigExt{Healthcheck: c.Healthcheck, OnBuild: c.OnBuild, Shell: c.Shell},
	}
	if len(c.ExposedPorts) > 0 {
		out.ExposedPorts = map[string]struct{}{}
		for p := range c.ExposedPorts {
			out.ExposedPorts[p.String()] = struct{}{}
		}
	}
	return out
}

// ImageUsers names the containers that use an image ID. Before Recover has read
// the records every image is in use.
func (e *Engine) ImageUsers(imageID string) []string {
	if !e.loaded.Load() {
		return []string{"a container that is not known yet"}
	}
	return e.imageUsers(imageID, func(*container.Record) bool { return true })
}

// ImageRunning names the running containers that use an image ID.
func (e *Engine) ImageRunning(imageID string) []string {
	return e.imageUsers(imageID, (*container.Record).Running)
}

func (e *Engine) imageUsers(imageID string, which func(*container.Record) bool) (out []string) {
	for _, c := range e.all() {
		r := c.record()
		uses := r.Image.ID == imageID || slices.ContainsFunc(r.Mounts, func(m container.Mount) bool { return m.Image != nil && m.Image.ID == imageID })
		if uses && which(r) {
			out = append(out, c.id)
		}
	}
	return out
}
