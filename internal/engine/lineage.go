package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/image/lineage"
)

// kin is what is known of all images, for one question.
type kin struct {
	graph  *lineage.Graph
	images map[*lineage.Image]*image.Image
	defs   map[string]*imageapi.Definition
	ctrs   map[string][]imageapi.Container // by image ID
}

// kin reads what images say of themselves and what is remembered of them.
func (e *Engine) kin(ctx context.Context) (*kin, error) {
	all, err := e.cfg.Images.All(ctx)
	if err != nil {
		return nil, err
	}
	raw, err := e.cfg.Images.Definitions()
	if err != nil {
		return nil, err
	}
	k := &kin{images: map[*lineage.Image]*image.Image{}, defs: map[string]*imageapi.Definition{}, ctrs: map[string][]imageapi.Container{}}
	var list []*lineage.Image
	for _, img := range all {
		if b, ok := raw[img.ID]; ok {
			d := new(imageapi.Definition)
			if err := json.Unmarshal(b, d); err == nil {
				k.defs[img.ID] = d
			}
		}
		l := &lineage.Image{
			ID: img.ID, Manifest: img.Manifest.Digest.String(), Names: img.RepoTags, Former: e.cfg.Images.Former(img),
			Platform: img.Platform.OS + "/" + img.Platform.Architecture + "/" + img.Platform.Variant, Created: img.Created,
		}
		for _, d := range img.DiffIDs {
			l.Layers = append(l.Layers, d.String())
		}
		for _, h := range img.Config.History {
			at := ""
			if h.Created != nil {
				at = h.Created.UTC().Format(time.RFC3339Nano)
			}
			l.History = append(l.History, at+" "+h.CreatedBy+" "+h.Comment)
		}
		if l.Evidence, err = e.evidence(ctx, img, k.defs[img.ID]); err != nil {
			return nil, err
		}
		k.images[l] = img
		list = append(list, l)
	}
	k.graph = lineage.New(list)
	for _, c := range e.all() {
		r := c.record()
		k.ctrs[r.Image.ID] = append(k.ctrs[r.Image.ID], containerOf(r))
	}
	for _, l := range k.ctrs {
		slices.SortFunc(l, func(a, b imageapi.Container) int { return strings.Compare(a.Name, b.Name) })
	}
	return k, nil
}

func containerOf(r *container.Record) imageapi.Container {
	return imageapi.Container{ID: r.ID, Name: r.Name, State: string(r.State())}
}

// evidence is what is known of an image's base but for its layers, strongest first.
func (e *Engine) evidence(ctx context.Context, img *image.Image, def *imageapi.Definition) (out []lineage.Evidence, err error) {
	if def != nil && len(def.Bases) > 0 { // none in what the daemon has seen: the image says that itself
		ev := lineage.Evidence{By: imageapi.ByBuild, First: true}
		if def.Commit {
			ev.By = imageapi.ByCommit
		}
		for _, b := range def.Bases {
			ev.Bases = append(ev.Bases, lineage.Base(b))
		}
		out = append(out, ev)
	}
	out = append(out, annotated(e.cfg.Images.Annotations(img), false)...)
	st, err := e.cfg.Images.Statements(ctx, img, lineage.SLSA02, lineage.SLSA1)
	if err != nil && !errdefs.IsNotFound(err) { // the image may be removed meanwhile
		return nil, err
	}
	for _, s := range st {
		bases, err := lineage.Materials(s.PredicateType, s.Predicate)
		if err != nil || len(bases) == 0 {
			continue // what can't be read says nothing
		}
		for i := range bases {
			bases[i].Name = image.Familiar(bases[i].Name)
		}
		out = append(out, lineage.Evidence{By: imageapi.ByProvenance, Bases: bases})
	}
	out = append(out, annotated(img.Config.Config.Labels, true)...)
	if img.Parent != "" {
		b := lineage.Base{Digest: img.Parent}
		if p, err := e.cfg.Images.Resolve(ctx, img.Parent, nil); err == nil {
			if len(p.RepoTags) > 0 {
				b.Name = p.RepoTags[0]
			} else if former := e.cfg.Images.Former(p); len(former) > 0 {
				b.Name = former[0]
			}
		}
		out = append(out, lineage.Evidence{By: imageapi.ByCommit, First: true, Bases: []lineage.Base{b}})
	}
	return out, nil
}

// annotated is what annotations, or labels, say of a base.
func annotated(from map[string]string, labels bool) []lineage.Evidence {
	b := lineage.Base{Name: from[ocispec.AnnotationBaseImageName], Digest: from[ocispec.AnnotationBaseImageDigest]}
	if b == (lineage.Base{}) || len(b.Name) > 512 || len(b.Digest) > 256 {
		return nil
	}
	if b.Name != "" {
		b.Name = image.Familiar(b.Name)
	}
	return []lineage.Evidence{{By: imageapi.ByAnnotation, First: true, Inherited: labels, Bases: []lineage.Base{b}}}
}

// ownerLabels are the labels that say who is responsible for an image.
var ownerLabels = map[string]string{
	"dev.tenon.owner": "owner", "org.opencontainers.image.authors": "authors", "org.opencontainers.image.vendor": "vendor", "maintainer": "maintainer",
}

// owners are those whom the image's own labels name; if none does, those of its parent.
func (k *kin) owners(i *lineage.Image) map[string]string {
	labels, above := k.images[i].Config.Config.Labels, map[string]string(nil)
	p, _ := k.graph.Parent(i) // has no cycles
	if p.Image != nil {
		above = k.images[p.Image].Config.Config.Labels
	}
	own, all := map[string]string{}, map[string]string{}
	for label, as := range ownerLabels {
		if v := labels[label]; v != "" {
			all[as] = v[:min(len(v), 200)]
			if v != above[label] {
				own[as] = all[as]
			}
		}
	}
	switch {
	case len(own) > 0:
		return own
	case len(all) > 0 && p.Image != nil:
		return k.owners(p.Image)
	}
	return all
}

// ImageTree shows which images stand on which, with the containers on them: all, or
// the line of one, from its first parent to all that stands on it. Images without a
// name, a container or a child are left out unless all is true.
func (e *Engine) ImageTree(ctx context.Context, ref string, all bool) ([]imageapi.Node, error) {
	k, err := e.kin(ctx)
	if err != nil {
		return nil, err
	}
	outdated := map[*lineage.Image]bool{}
	for _, m := range k.graph.Outdated(k.graph.Local) {
		outdated[m.Image] = true
	}
	t := &treeMaker{kin: k, outdated: outdated, all: all}
	if ref == "" {
		return t.forest(), nil
	}
	img, err := e.cfg.Images.Resolve(ctx, ref, nil)
	if err != nil {
		return nil, err
	}
	at := k.graph.Lookup(img.ID)
	if at == nil {
		return nil, notFound("No such image: %s", ref)
	}
	t.all = true
	node, _ := t.node(at)
	for range len(k.graph.Images()) {
		p, ok := k.graph.Parent(at)
		if !ok {
			break
		}
		if p.Image == nil {
			return []imageapi.Node{{Names: some(p.Base.Name), Digest: p.Base.Digest, Children: []imageapi.Node{node}}}, nil
		}
		above := t.alone(p.Image)
		above.Children = []imageapi.Node{node}
		node, at = above, p.Image
	}
	return []imageapi.Node{node}, nil
}

func some(s string) []string {
	if s == "" {
		return nil
	}
	return []string{s}
}

type treeMaker struct {
	*kin
	outdated map[*lineage.Image]bool
	all      bool
}

func (t *treeMaker) forest() []imageapi.Node {
	out := []imageapi.Node{}
	absent := map[lineage.Base]int{} // where in out
	for _, r := range t.graph.Roots() {
		n, shown := t.node(r)
		if !shown {
			continue
		}
		p, ok := t.graph.Parent(r)
		if !ok {
			out = append(out, n)
			continue
		}
		at, known := absent[p.Base]
		if !known {
			at = len(out)
			absent[p.Base] = at
			out = append(out, imageapi.Node{Names: some(p.Base.Name), Digest: p.Base.Digest})
		}
		out[at].Children = append(out[at].Children, n)
	}
	return out
}

// alone is an image's node without its children.
func (t *treeMaker) alone(i *lineage.Image) imageapi.Node {
	img := t.images[i]
	n := imageapi.Node{
		ID: i.ID, Names: i.Names, Platform: strings.TrimSuffix(i.Platform, "/"), Created: img.Created, Outdated: t.outdated[i],
		Layers: len(i.Layers), OwnLayers: len(i.Layers), Owners: t.owners(i), Containers: t.ctrs[i.ID],
	}
	if p, ok := t.graph.Parent(i); ok {
		n.By, n.Base = p.By, p.Base.Name
		if p.Image != nil && lineage.Prefix(p.Image.Layers, i.Layers) {
			n.OwnLayers -= len(p.Image.Layers)
		}
		for _, b := range p.Also {
			n.Also = append(n.Also, imageapi.Base(b))
		}
	}
	return n
}

func (t *treeMaker) node(i *lineage.Image) (n imageapi.Node, shown bool) {
	n = t.alone(i)
	for _, c := range t.graph.Children(i) {
		if k, ok := t.node(c); ok {
			n.Children = append(n.Children, k)
		}
	}
	return n, t.all || len(n.Names)+len(n.Containers)+len(n.Children) > 0
}

// Credentials finds those of a registry; nil: none.
type Credentials func(ref string) *registry.AuthConfig

// ImageOutdated lists the images whose base has moved, or stands on one that has, and
// the containers that they hit. With remote, what bases mean is asked of their
// registries as well.
func (e *Engine) ImageOutdated(ctx context.Context, remote bool, auth Credentials) (*imageapi.OutdatedReport, error) {
	k, err := e.kin(ctx)
	if err != nil {
		return nil, err
	}
	out := &imageapi.OutdatedReport{Images: []imageapi.Outdated{}}
	now := lineage.Now(k.graph.Local)
	far := map[string]string{}
	if remote {
		if far, out.Unknown, err = e.askBases(ctx, k, auth); err != nil {
			return nil, err
		}
		now = func(name string) (string, string, bool) {
			if d := far[name]; d != "" {
				if i := k.graph.Lookup(d); i != nil {
					return i.ID, i.Manifest, true
				}
				return d, "", true
			}
			return k.graph.Local(name)
		}
	}
	for _, m := range k.graph.Outdated(now) {
		if len(m.Image.Names) == 0 {
			continue // a former image; containers on it are told of below
		}
		o := imageapi.Outdated{
			ID: m.Image.ID, Names: m.Image.Names, Base: m.Parent.Base.Name, Was: m.Was, Now: m.Now, By: m.Parent.By,
			Owners: k.owners(m.Image), Containers: k.ctrs[m.Image.ID],
		}
		if m.Through != nil {
			o.Through = nameOf(m.Through)
		}
		if id, manifest, _ := k.graph.Local(m.Parent.Base.Name); m.Now != "" {
			o.Remote = id != m.Now && manifest != m.Now
		}
		out.Images = append(out.Images, o)
	}
	out.Containers = e.stale(k.graph)
	return out, nil
}

func nameOf(i *lineage.Image) string {
	if len(i.Names) > 0 {
		return i.Names[0]
	}
	return i.ID
}

// stale are the containers whose image's name means another image now.
func (e *Engine) stale(g *lineage.Graph) (out []imageapi.Stale) {
	for _, c := range e.all() {
		r := c.record()
		if i := g.Named(image.Familiar(r.Image.Ref)); i != nil && i.ID != r.Image.ID {
			out = append(out, imageapi.Stale{Container: containerOf(r), Image: r.Image.Ref, Was: r.Image.ID, Now: i.ID})
		}
	}
	slices.SortFunc(out, func(a, b imageapi.Stale) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// onlyHere tells whether a name without a registry is that of an image that was made
// here: the default registry has no such image, or another one, and it is not its affair.
func (e *Engine) onlyHere(k *kin, name string) bool {
	i := k.graph.Named(name)
	return i != nil && !strings.Contains(name, "/") && e.cfg.Images.MadeHere(k.images[i])
}

// askBases asks registries what the names of bases mean there.
func (e *Engine) askBases(ctx context.Context, k *kin, auth Credentials) (now, unknown map[string]string, err error) {
	names := map[string]bool{}
	for _, i := range k.graph.Images() {
		p, ok := k.graph.Parent(i)
		if !ok || len(i.Names) == 0 && len(k.ctrs[i.ID]) == 0 {
			continue
		}
		if p.Base.Name != "" && !e.onlyHere(k, p.Base.Name) {
			names[p.Base.Name] = true
		}
	}
	const most = 200
	if len(names) > most {
		return nil, nil, fmt.Errorf("%d different bases: %d are the most that are asked for at once: %w", len(names), most, errdefs.ErrResourceExhausted)
	}
	type answer struct {
		name, digest string
		err          error
	}
	answers := make(chan answer, len(names))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for n := range names {
		g.Go(func() error {
			var a *registry.AuthConfig
			if auth != nil {
				a = auth(n)
			}
			d, err := e.cfg.Images.Remote(ctx, n, a)
			answers <- answer{n, d, err}
			return nil
		})
	}
	_ = g.Wait() // errors are answers
	close(answers)
	now, unknown = map[string]string{}, map[string]string{}
	for a := range answers {
		if errdefs.IsNotFound(a.err) {
			unknown[a.name] = "its registry has no image of that name, or has it no more"
		} else if a.err != nil {
			unknown[a.name] = a.err.Error()
		} else {
			now[a.name] = a.digest
		}
	}
	return now, unknown, nil
}

// ImagePlan says how to make anew, in order, what stands on a base (chain) and is
// outdated, or, with all, everything that stands on it; without chain it is about the
// image itself.
func (e *Engine) ImagePlan(ctx context.Context, ref string, chain, all bool) ([]imageapi.Step, error) {
	k, err := e.kin(ctx)
	if err != nil {
		return nil, err
	}
	g := k.graph
	img, err := e.cfg.Images.Resolve(ctx, ref, nil)
	if err != nil {
		return nil, err
	}
	top := g.Lookup(img.ID)
	if top == nil {
		return nil, notFound("No such image: %s", ref)
	}
	name := image.Familiar(ref)
	if g.Named(name) != top {
		name = ""
	}
	want := map[*lineage.Image]bool{}
	moved := map[*lineage.Image]lineage.Moved{}
	for _, m := range g.Outdated(g.Local) {
		moved[m.Image] = m
		if m.Through != nil && want[m.Through] || m.Now == top.ID || m.Now != "" && m.Parent.Base.Name == name {
			want[m.Image] = true
		}
	}
	if !chain {
		want = map[*lineage.Image]bool{top: true}
	} else if all {
		for _, i := range g.Below(top) {
			want[i] = true
		}
	}
	steps := []imageapi.Step{}
	made := map[*lineage.Image]bool{}
	for _, i := range g.Ordered(nil) {
		if !want[i] || len(i.Names) == 0 && chain {
			continue
		}
		steps = append(steps, k.step(i, moved, made))
		made[i] = steps[len(steps)-1].Do != imageapi.StepNone
	}
	return steps, nil
}

// step says how one image is made anew.
func (k *kin) step(i *lineage.Image, moved map[*lineage.Image]lineage.Moved, made map[*lineage.Image]bool) imageapi.Step {
	s := imageapi.Step{ID: i.ID, Names: i.Names, Owners: k.owners(i), Containers: k.ctrs[i.ID]}
	p, ok := k.graph.Parent(i)
	if ok {
		s.Base = p.Base.Name
		if p.Image != nil {
			s.From = p.Image.ID
		}
	}
	if m, ok := moved[i]; ok && m.Now != "" {
		s.Base, s.To = m.Parent.Base.Name, m.Now
	} else if p.Image != nil && !made[p.Image] {
		s.To = p.Image.ID
	}
	if p.Image != nil && made[p.Image] {
		s.To = "" // of the step before
		if len(p.Image.Names) > 0 && !slices.Contains(p.Image.Names, s.Base) {
			s.Base = p.Image.Names[0]
		}
	}
	d := k.defs[i.ID]
	swap := ok && p.Image != nil && lineage.Prefix(p.Image.Layers, i.Layers) && s.Base != ""
	switch {
	case d != nil && d.Context != "":
		s.Do, s.Definition, s.Why = imageapi.StepBuild, d, "built from "+d.Context
	case d != nil && d.Sent:
		s.Definition, s.Why = d, "it was built from a directory that its client did not name"
		if d.Source != "" {
			s.Why += " (of " + d.Source + ")"
		}
		if s.Do = imageapi.StepNone; swap {
			s.Do, s.Why = imageapi.StepRebase, s.Why+": its own layers are put on the new base"
		}
	case swap:
		s.Do, s.Why = imageapi.StepRebase, "no definition of a build is recorded: its own layers are put on the new base"
	case ok && p.Image == nil:
		s.Do, s.Why = imageapi.StepNone, "no definition of a build is recorded, and its former base is not here to be swapped"
	default:
		s.Do, s.Why = imageapi.StepNone, "no definition of a build is recorded, and its layers are not those of its base and more: build it with tenon build"
	}
	return s
}

// ImageRebase puts an image's own layers on another base.
func (e *Engine) ImageRebase(ctx context.Context, r imageapi.RebaseRequest) (*imageapi.RebaseReport, error) {
	var o image.RebaseOptions
	for _, x := range []struct {
		ref string
		at  **image.Image
	}{{r.Image, &o.Image}, {r.From, &o.From}, {r.To, &o.To}} {
		img, err := e.cfg.Images.Resolve(ctx, x.ref, nil)
		if err != nil {
			return nil, err
		}
		*x.at = img
	}
	if n := image.Familiar(r.To); slices.Contains(o.To.RepoTags, n) {
		o.BaseName = n
	} else if len(o.To.RepoTags) > 0 {
		o.BaseName = o.To.RepoTags[0]
	}
	o.Refs, o.DryRun = r.Names, r.DryRun
	made, err := e.cfg.Images.Rebase(ctx, o)
	if err != nil {
		return nil, err
	}
	out := &imageapi.RebaseReport{Kept: made.Kept, Swapped: made.Swapped, Added: made.Added, Notes: made.Notes}
	if made.Image != nil {
		out.ID = made.Image.ID
	}
	return out, nil
}
