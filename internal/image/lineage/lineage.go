// Package lineage knows which image stands on which. It is pure: it is given what is
// known of each image and answers from that.
//
// # Parents
//
// An image's parent is found by the first of these that says one:
//
//  1. evidence, strongest first as the caller orders it: the definition of a build, the
//     annotations of the image, attested provenance, the container it was committed of.
//     Evidence names a digest, a name, or both;
//  2. layers: of the images whose layers are the image's lowest, the one with the most.
//     An image with the very same layers is a parent only if the image's history goes
//     on where its own ends.
//
// Evidence may name a parent that is not here; if layers know one then that is it, by
// the name that the evidence says. Of several materials of a build the base is the one
// whose layers the image has, or the only one; the others are "also" used. What images
// say of themselves may be a lie: a parent that would be its own descendant is none.
//
// # Outdated
//
// An image is outdated if the name that its parent was used by now means another image,
// or if its parent is outdated.
package lineage

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// Image is what is known of an image. Digests are "sha256:…".
type Image struct {
	// ID is the digest of what the name points at, Manifest that of the manifest for
	// the platform; the same unless ID is an index's.
	ID, Manifest string
	// Names are the familiar names, Former those it had that mean others now.
	Names, Former []string
	Platform      string
	Created       time.Time
	// Layers are diff IDs, lowest first. History has a text for each entry.
	Layers, History []string
	Evidence        []Evidence
}

// Evidence says what an image was made of.
type Evidence struct {
	By string // see client/imageapi
	// Bases are the images used. Unless First they are in no order, and the base is
	// found among them.
	Bases []Base
	First bool // the first of Bases is the one stood on
	// Inherited evidence is what children have from their parents unless they say
	// otherwise: labels. What the parent says as well is about the parent's parent.
	Inherited bool
}

// Base is an image by name (familiar), digest, or both.
type Base struct{ Name, Digest string }

// Parent is what an image stands on.
type Parent struct {
	// Image is nil if it is not here.
	Image *Image
	// Base is the name and digest it was used by, as far as known.
	Base Base
	By   string
	Also []Base
}

// ByLayers is the By of parents found by layers.
const ByLayers = "layers"

// Graph is all images. It does not change.
type Graph struct {
	images   []*Image // by ID
	byID     map[string]*Image
	byName   map[string]*Image
	parents  map[*Image]Parent
	children map[*Image][]*Image
}

// New makes a graph. It keeps the images, which must not change.
func New(images []*Image) *Graph {
	g := &Graph{
		images: slices.Clone(images), byID: map[string]*Image{}, byName: map[string]*Image{},
		parents: map[*Image]Parent{}, children: map[*Image][]*Image{},
	}
	slices.SortFunc(g.images, func(a, b *Image) int { return strings.Compare(a.ID, b.ID) })
	for _, i := range g.images {
		g.byID[i.Manifest] = i
	}
	for _, i := range g.images {
		g.byID[i.ID] = i
		for _, n := range i.Names {
			g.byName[n] = i
		}
	}
	stacks := g.stacks()
	for _, i := range g.images {
		if p, ok := g.find(i, stacks); ok {
			g.parents[i] = p
			if p.Image != nil {
				g.children[p.Image] = append(g.children[p.Image], i)
			}
		}
	}
	return g
}

// stacks indexes images by their layers.
func (g *Graph) stacks() map[string][]*Image {
	m := map[string][]*Image{}
	for _, i := range g.images {
		if len(i.Layers) > 0 {
			k := stackKey(i, len(i.Layers))
			m[k] = append(m[k], i)
		}
	}
	return m
}

func stackKey(i *Image, n int) string {
	return i.Platform + "\n" + strings.Join(i.Layers[:n], "\n")
}

func (g *Graph) find(i *Image, stacks map[string][]*Image) (Parent, bool) {
	below := g.byLayers(i, stacks)
	for _, e := range i.Evidence {
		if e.Inherited && below != nil && slices.ContainsFunc(below.Evidence, func(o Evidence) bool { return o.Inherited && slices.Equal(o.Bases, e.Bases) }) {
			continue
		}
		n := g.pick(i, e, below)
		if n < 0 {
			continue
		}
		b := e.Bases[n]
		p := Parent{Base: b, By: e.By}
		for k, other := range e.Bases {
			if k != n && other != b && !slices.Contains(p.Also, other) {
				p.Also = append(p.Also, other)
			}
		}
		switch at := g.byID[b.Digest]; {
		case b.Digest != "" && at != nil:
			p.Image = at
		case below != nil:
			p.Image = below // the same content under another digest
		case b.Digest == "" && g.byName[b.Name] != nil && Prefix(g.byName[b.Name].Layers, i.Layers):
			p.Image = g.byName[b.Name]
		}
		if p.Image == i || p.Image != nil && g.descends(p.Image, i) {
			continue
		}
		return p, true
	}
	if below == nil || g.descends(below, i) {
		return Parent{}, false
	}
	p := Parent{Image: below, By: ByLayers}
	switch {
	case len(below.Names) > 0:
		p.Base = Base{below.Names[0], below.ID}
	case len(below.Former) > 0:
		p.Base = Base{below.Former[0], below.ID}
	default:
		p.Base = Base{Digest: below.ID}
	}
	return p, true
}

// pick chooses the base among what evidence has; -1 is none.
func (g *Graph) pick(i *Image, e Evidence, below *Image) int {
	if len(e.Bases) == 0 {
		return -1
	}
	if e.First || len(e.Bases) == 1 {
		return 0
	}
	best, most := -1, 0
	for n, b := range e.Bases {
		at := g.byID[b.Digest]
		if at == nil && b.Digest == "" {
			at = g.byName[b.Name]
		}
		if at != nil && at != i && Prefix(at.Layers, i.Layers) && len(at.Layers) > most {
			best, most = n, len(at.Layers)
		}
	}
	if best < 0 && below != nil {
		for n, b := range e.Bases {
			if slices.Contains(below.Names, b.Name) || slices.Contains(below.Former, b.Name) {
				return n
			}
		}
	}
	return best
}

// byLayers is the image with the most of i's lowest layers.
func (g *Graph) byLayers(i *Image, stacks map[string][]*Image) *Image {
	for n := len(i.Layers); n > 0; n-- {
		var fit []*Image
		for _, c := range stacks[stackKey(i, n)] {
			if c == i || n == len(i.Layers) && !(len(c.History) < len(i.History) && Prefix(c.History, i.History)) {
				continue
			}
			fit = append(fit, c)
		}
		if len(fit) > 0 {
			// Of those with the same layers the one whose history is the longest part of
			// i's, then one with a name, then the newest.
			return slices.MaxFunc(fit, func(a, b *Image) int {
				return cmp.Or(cmp.Compare(told(a, i), told(b, i)), cmp.Compare(min(1, len(a.Names)), min(1, len(b.Names))), a.Created.Compare(b.Created), strings.Compare(b.ID, a.ID))
			})
		}
	}
	return nil
}

func told(a, i *Image) int {
	if Prefix(a.History, i.History) {
		return len(a.History)
	}
	return -1
}

// Prefix tells whether all of a is the beginning of b.
func Prefix(a, b []string) bool { return len(a) <= len(b) && slices.Equal(a, b[:len(a)]) }

// descends tells whether i is an ancestor of a among the parents found so far.
func (g *Graph) descends(a, i *Image) bool {
	for n := 0; a != nil && n <= len(g.images); n++ {
		if a == i {
			return true
		}
		a = g.parents[a].Image
	}
	return false
}

// Lookup finds an image by the digest of its index or manifest.
func (g *Graph) Lookup(digest string) *Image { return g.byID[digest] }

// Named finds what a familiar name means.
func (g *Graph) Named(name string) *Image { return g.byName[name] }

// Images are all, by ID.
func (g *Graph) Images() []*Image { return g.images }

// Parent is what an image stands on; false: on nothing that is known.
func (g *Graph) Parent(i *Image) (Parent, bool) {
	p, ok := g.parents[i]
	return p, ok
}

// Children are the images that stand on i, by name, those without at the end.
func (g *Graph) Children(i *Image) []*Image {
	list := slices.Clone(g.children[i])
	sortByName(list)
	return list
}

func sortByName(list []*Image) {
	slices.SortFunc(list, func(a, b *Image) int {
		return cmp.Or(cmp.Compare(min(1, len(b.Names)), min(1, len(a.Names))), strings.Compare(first(a.Names), first(b.Names)), a.Created.Compare(b.Created), strings.Compare(a.ID, b.ID))
	})
}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}

// Roots are the images that stand on none that is here.
func (g *Graph) Roots() []*Image {
	var out []*Image
	for _, i := range g.images {
		if g.parents[i].Image == nil {
			out = append(out, i)
		}
	}
	sortByName(out)
	return out
}

// Moved is an image that is outdated.
type Moved struct {
	Image  *Image
	Parent Parent
	// Was and Now are what the base's name meant and means; empty for an image that is
	// outdated Through its parent alone.
	Was, Now string
	Through  *Image
}

// Now tells what a name means: the digests of index and manifest. ok is false if that
// is not known.
type Now func(name string) (id, manifest string, ok bool)

// Local is what names mean here.
func (g *Graph) Local(name string) (id, manifest string, ok bool) {
	i := g.byName[name]
	if i == nil {
		return "", "", false
	}
	return i.ID, i.Manifest, true
}

// Outdated lists the images that are, parents before their children.
func (g *Graph) Outdated(now Now) []Moved {
	var out []Moved
	known := map[*Image]bool{}
	for _, i := range g.Ordered(nil) {
		p, ok := g.parents[i]
		if !ok {
			continue
		}
		m := Moved{Image: i, Parent: p}
		if p.Image != nil && known[p.Image] {
			m.Through = p.Image
		}
		for _, name := range g.bases(p) {
			id, manifest, ok := now(name)
			if ok && g.moved(i, p, id, manifest) {
				m.Parent.Base.Name, m.Was, m.Now = name, cmp.Or(p.Base.Digest, parentID(p)), id
				break
			}
		}
		if m.Now != "" || m.Through != nil {
			known[i] = true
			out = append(out, m)
		}
	}
	return out
}

// bases are the names whose meaning decides: that of the evidence, or, for a parent
// found by layers that has none now, those it had.
func (g *Graph) bases(p Parent) []string {
	if p.By != ByLayers && p.Base.Name != "" {
		return []string{p.Base.Name}
	}
	if p.Image == nil || len(p.Image.Names) > 0 && p.By != ByLayers {
		return nil
	}
	if len(p.Image.Names) > 0 {
		return p.Image.Names // in a registry they may mean another
	}
	return p.Image.Former
}

func parentID(p Parent) string {
	if p.Image == nil {
		return ""
	}
	return p.Image.ID
}

// moved tells whether a name that means id (an index or manifest) and manifest means
// another image than the parent.
func (g *Graph) moved(i *Image, p Parent, id, manifest string) bool {
	for _, d := range []string{id, manifest} {
		if d == "" {
			continue
		}
		if d == p.Base.Digest || p.Image != nil && (d == p.Image.ID || d == p.Image.Manifest) {
			return false
		}
		if at := g.byID[d]; at != nil && g.descends(at, i) {
			return false // the image, or one on it, took its base's name
		}
	}
	return p.Base.Digest != "" || p.Image != nil
}

// Below lists all images that stand on i, directly or not; parents first.
func (g *Graph) Below(i *Image) []*Image {
	var out []*Image
	var walk func(*Image)
	walk = func(at *Image) {
		for _, c := range g.Children(at) {
			out = append(out, c)
			walk(c)
		}
	}
	walk(i)
	return g.Ordered(out)
}

// Ordered sorts images so that parents come before their children, otherwise by name.
// nil is all.
func (g *Graph) Ordered(list []*Image) []*Image {
	if list == nil {
		list = g.images
	}
	list = slices.Clone(list)
	depth := func(i *Image) (n int) {
		for p := g.parents[i].Image; p != nil && n <= len(g.images); p = g.parents[p].Image {
			n++
		}
		return n
	}
	sortByName(list)
	slices.SortStableFunc(list, func(a, b *Image) int { return cmp.Compare(depth(a), depth(b)) })
	return list
}
