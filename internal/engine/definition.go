package engine

import (
	"context"
	"encoding/json"
	"strings"
	"time"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/audit"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/image/lineage"
)

// ImageDefine remembers how an image was built. Values that look like secrets are
// dropped, and its base is filled in.
func (e *Engine) ImageDefine(ctx context.Context, ref string, d imageapi.Definition) error {
	img, err := e.cfg.Images.Resolve(ctx, ref, nil)
	if err != nil {
		return err
	}
	withoutSecrets(&d)
	d.Sent, d.ByDaemon, d.Revision = false, false, ""
	if old, err := e.definition(img); err != nil {
		return err
	} else if old != nil && old.ByDaemon && old.Context == d.Context {
		d.Revision = old.Revision // seen while it was built
	}
	d.Created = time.Now().UTC()
	if len(d.Bases) == 0 || d.Bases[0].Digest == "" {
		k, err := e.kin(ctx)
		if err != nil {
			return err
		}
		if i := k.graph.Lookup(img.ID); i != nil {
			d.Bases = basesOf(k.graph, i, d.Bases)
		}
	}
	for i := range d.Bases {
		if d.Bases[i].Name != "" {
			d.Bases[i].Name = image.Familiar(d.Bases[i].Name)
		}
	}
	b, err := json.Marshal(d)
	if err != nil {
		return err
	}
	return e.cfg.Images.SetDefinition(ctx, img, b)
}

func withoutSecrets(d *imageapi.Definition) {
	for i, a := range d.Args {
		if name, value, ok := strings.Cut(a, "="); ok && audit.SecretVariable(name, value) {
			d.Args[i] = name
		}
	}
}

// definition is what is remembered of an image's build; nil: nothing.
func (e *Engine) definition(img *image.Image) (*imageapi.Definition, error) {
	raw, err := e.cfg.Images.Definitions()
	if err != nil {
		return nil, err
	}
	d := new(imageapi.Definition)
	if b, ok := raw[img.ID]; !ok || json.Unmarshal(b, d) != nil {
		return nil, nil
	}
	return d, nil
}

// BuildSeen remembers what the daemon has seen of a build. What a client has recorded of
// the same image stays.
func (e *Engine) BuildSeen(ctx context.Context, ref string, d imageapi.Definition) error {
	img, err := e.cfg.Images.Resolve(ctx, ref, nil)
	if err != nil {
		return err
	}
	old, err := e.definition(img)
	if err != nil || old != nil && !old.ByDaemon {
		return err
	}
	withoutSecrets(&d)
	d.ByDaemon, d.Bases, d.Created = true, nil, time.Now().UTC()
	b, err := json.Marshal(d)
	if err != nil {
		return err
	}
	return e.cfg.Images.SetDefinition(ctx, img, b)
}

// basesOf completes what a build says of its base by what is here.
func basesOf(g *lineage.Graph, i *lineage.Image, said []imageapi.Base) []imageapi.Base {
	if len(said) > 0 {
		if at := g.Named(image.Familiar(said[0].Name)); at != nil && at != i && lineage.Prefix(at.Layers, i.Layers) {
			said[0].Digest = at.ID
			return said
		}
	}
	p, ok := g.Parent(i)
	if !ok {
		return said
	}
	if len(said) == 0 {
		said = []imageapi.Base{imageapi.Base(p.Base)}
	} else if said[0].Digest == "" {
		said[0].Digest = p.Base.Digest
	}
	for _, b := range p.Also {
		said = append(said, imageapi.Base(b))
	}
	return said
}

// rememberBase keeps by which name an image's parent was used.
func (e *Engine) rememberBase(ctx context.Context, img *image.Image, ref, parent string) {
	name := image.Familiar(ref)
	if strings.Contains(name, "@") || strings.HasPrefix(parent, "sha256:"+ref) || ref == parent {
		return // a digest does not move
	}
	b, err := json.Marshal(imageapi.Definition{Commit: true, Bases: []imageapi.Base{{Name: name, Digest: parent}}, Created: time.Now().UTC()})
	if err == nil {
		err = e.cfg.Images.SetDefinition(ctx, img, b)
	}
	if err != nil {
		e.log.Warn("the name of an image's parent is not recorded", "image", img.ID, "parent", name, "err", err)
	}
}
