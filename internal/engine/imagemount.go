package engine

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/layered"
	"tenon.dev/tenon/internal/spec"
)

// parseImageMount reads --mount type=image: the files of another image,
// read-only. The image must be here; the mount stays with what the name means
// now.
func (e *Engine) parseImageMount(m *container.Mount, bad func(string, ...any) error) error {
	s := m.Spec
	if s.BindOptions != nil || s.TmpfsOptions != nil || s.VolumeOptions != nil {
		return bad("options of another type must not be specified")
	}
	if s.Source == "" {
		return bad("field Source must not be empty")
	}
	if o := s.ImageOptions; o != nil && o.Subpath != "" {
		if !filepath.IsLocal(o.Subpath) {
			return bad("subpath must be a relative path within the image")
		}
		m.SubPath = filepath.Clean(o.Subpath)
	}
	img, err := e.cfg.Images.Resolve(e.ctx, s.Source, nil)
	if errdefs.IsNotFound(err) {
		// Not a 404: clients would take it for the container's own image.
		return bad("No such image: %s: pull or load it first", withTag(s.Source))
	}
	if err != nil {
		return err
	}
	m.RW, m.Name, m.Source = false, s.Source, img.ID
	m.Image = &container.Image{ID: img.ID, Ref: s.Source, Manifest: &img.Manifest, Platform: img.Platform}
	return nil
}

// checkImageMounts finds the images again once the container that uses them is
// registered, and what is mounted of them.
func (e *Engine) checkImageMounts(ctx context.Context, r *container.Record) error {
	for i := range r.Mounts {
		m := &r.Mounts[i]
		if m.Image == nil {
			continue
		}
		e.cfg.Images.Hold(m.Image.ID)()                                                                          // a removal that did not know the container has ended then
		if img, err := e.cfg.Images.Resolve(ctx, m.Image.ID, &m.Image.Platform); err == nil && img.Encrypted() { // or the next says what is wrong
			if _, err := e.cfg.Images.LayersFor(ctx, img); err != nil {
				return fmt.Errorf("mount of image %s on %s: %w", m.Name, m.Destination, err)
			}
		}
		if _, _, err := e.imageMountPaths(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) imageMountPaths(ctx context.Context, m *container.Mount) (paths []string, dir bool, err error) {
	img, err := e.cfg.Images.Resolve(ctx, m.Image.ID, &m.Image.Platform)
	var layers []string
	if err == nil {
		layers, err = e.cfg.Images.Layers(ctx, img)
	}
	if errdefs.IsNotFound(err) && !isPlatform(err) {
		return nil, false, invalid("mount of image %s on %s: the image is gone", m.Name, m.Destination)
	}
	if err != nil {
		return nil, false, fmt.Errorf("mount of image %s on %s: %w", m.Name, m.Destination, err)
	}
	if len(layers) == 0 {
		return nil, true, nil
	}
	paths, dir, err = layered.Stack(layers).Sub(m.SubPath)
	if err != nil {
		return nil, false, invalid("cannot access path %s in image %s: %v", m.SubPath, m.Name, err)
	}
	return paths, dir, nil
}

// imageMount is the merged view of the image's layers. Nothing is mounted on
// the host for it.
func (e *Engine) imageMount(m *container.Mount) (spec.Mount, error) {
	s := spec.Mount{Destination: m.Destination, ReadOnly: true}
	paths, dir, err := e.imageMountPaths(e.ctx, m)
	if err != nil {
		return s, err
	}
	if !dir {
		s.Type, s.Source, s.Recursive, s.Options = "bind", paths[0], true, []string{"rbind"}
		return s, nil
	}
	v := e.cfg.Roots.View(paths)
	s.Type, s.Source = v.Type, v.Source
	for _, o := range v.Options {
		if o != "ro" { // written by ReadOnly
			s.Options = append(s.Options, o)
		}
	}
	return s, nil
}

// guestImage is the type of a mount that a machine gets a disk for.
const guestImage = "image"

// guestImageMount is imageMount for a container on a machine: Source is the file of
// its disk.
func (e *Engine) guestImageMount(m *container.Mount) (spec.Mount, error) {
	s := spec.Mount{Destination: m.Destination, ReadOnly: true}
	paths, _, err := e.imageMountPaths(e.ctx, m)
	if err != nil {
		return s, err
	}
	if len(paths) == 0 { // no layers: nothing in it
		s.Type, s.Source = "tmpfs", "tmpfs"
		return s, nil
	}
	img, err := e.cfg.Images.Resolve(e.ctx, m.Image.ID, &m.Image.Platform)
	var layers []string
	if err == nil {
		layers, err = e.cfg.Images.Layers(e.ctx, img)
	}
	if err == nil {
		s.Source, err = e.cfg.Images.EROFS(e.ctx, img)
	}
	if err != nil {
		return s, fmt.Errorf("mount of image %s on %s: %w", m.Name, m.Destination, err)
	}
	s.Type = guestImage
	for _, l := range layers { // no link is on the way any more
		if sub, ok := strings.CutPrefix(paths[0], l+"/"); ok {
			s.Beneath = sub
		}
	}
	return s, nil
}

// machineImages are the files of the images among the mounts, in their order.
func machineImages(mounts []spec.Mount) (files []string) {
	for _, m := range mounts {
		if m.Type == guestImage {
			files = append(files, m.Source)
		}
	}
	return files
}

// mountGuestImages makes binds of them, of where the machine has them; with mapped
// they have the owners of the container's user namespace.
func mountGuestImages(mounts []spec.Mount, at []string, mapped bool) {
	for i := range mounts {
		if m := &mounts[i]; m.Type == guestImage {
			m.Type, m.Source, m.Recursive, m.Options = "bind", at[0], true, []string{"rbind"}
			if mapped {
				m.Options = append(m.Options, "idmap")
			}
			at = at[1:]
		}
	}
}

func isPlatform(err error) bool { return errors.Is(err, image.ErrPlatform) }
