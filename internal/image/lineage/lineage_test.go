package lineage

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func img(id, names, layers string, e ...Evidence) *Image {
	return &Image{ID: id, Manifest: id, Names: strings.Fields(names), Layers: strings.Fields(layers), History: strings.Fields(layers), Platform: "linux/amd64", Evidence: e}
}

func base(by, name, digest string) Evidence {
	return Evidence{By: by, First: true, Bases: []Base{{name, digest}}}
}

// show writes a graph as child<parent by.
func show(g *Graph) string {
	var out []string
	for _, i := range g.Images() {
		if p, ok := g.Parent(i); ok {
			at := p.Base.Name
			if p.Image != nil {
				at = p.Image.ID
			}
			out = append(out, fmt.Sprintf("%s<%s(%s)", i.ID, at, p.By))
		}
	}
	return strings.Join(out, " ")
}

func TestParents(t *testing.T) {
	same := img("same", "", "1 2")
	same.History = []string{"1", "2", "env"}
	label := base("annotation", "z:1", "z")
	label.Inherited = true
	arm := img("arm", "", "1 9")
	arm.Platform = "linux/arm64"
	for _, c := range []struct {
		name string
		in   []*Image
		want string
	}{
		{"layers", []*Image{img("a", "a", "1"), img("b", "b", "1 2"), img("c", "c", "1 2 3"), img("x", "x", "9")}, "b<a(layers) c<b(layers)"},
		{"no layer of its own", []*Image{img("b", "b", "1 2"), same}, "same<b(layers)"},
		{"same layers and history", []*Image{img("a", "a", "1"), img("b", "", "1")}, ""},
		{"another platform", []*Image{img("a", "a", "1"), arm}, ""},
		{"annotation of one that is not here", []*Image{img("b", "b", "1 2", base("annotation", "a:1", "sha256:a"))}, "b<a:1(annotation)"},
		{"evidence over layers", []*Image{img("a", "a", "1"), img("z", "z", "7"), img("b", "b", "1 2", base("build", "z", "z"))}, "b<z(build)"},
		{"under another digest", []*Image{img("a", "a", "1"), img("b", "b", "1 2", base("annotation", "a", "sha256:other"))}, "b<a(annotation)"},
		{"of materials the base", []*Image{img("a", "a", "1"), img("go", "go", "7"), img("b", "b", "1 2", Evidence{By: "provenance", Bases: []Base{{"go", "go"}, {"a", "a"}}})}, "b<a(provenance)"},
		{"a lie", []*Image{img("a", "a", "1", base("annotation", "b", "b")), img("b", "b", "1 2", base("annotation", "a", "a"))}, "a<b(annotation)"},
		{"labels", []*Image{img("a", "a", "1", label)}, "a<z:1(annotation)"},
		{"labels of the parent's", []*Image{img("a", "a", "1", label), img("b", "b", "1 2", label), img("z", "z", "0")}, "a<z(annotation) b<a(layers)"},
		{"annotation over layers", []*Image{img("a", "a", "1"), img("b", "b", "1 2"), img("c", "c", "1 2 3", base("annotation", "a", "a"))}, "b<a(layers) c<a(annotation)"},
		{"itself", []*Image{img("a", "a", "1", base("annotation", "a", "a"))}, ""},
	} {
		if got := show(New(c.in)); got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}

func moved(list []Moved) string {
	var out []string
	for _, m := range list {
		s := m.Image.ID
		if m.Now != "" {
			s += ":" + m.Parent.Base.Name + "=" + m.Now
		}
		if m.Through != nil {
			s += "<" + m.Through.ID
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

func TestOutdated(t *testing.T) {
	old := img("old", "", "1")
	old.Former = []string{"a"}
	in := []*Image{old, img("new", "a", "5"), img("b", "b", "1 2"), img("c", "c", "1 2 3"), img("d", "d", "5 6")}
	g := New(in)
	if got := moved(g.Outdated(g.Local)); got != "b:a=new c<b" {
		t.Errorf("by layers: %q", got)
	}
	// b was built again: c still stands on the former one.
	bold := img("bold", "", "1 2", base("build", "a", "old"))
	g = New([]*Image{old, in[1], bold, img("bnew", "b", "5 2", base("build", "a", "new")), img("c", "c", "1 2 3", base("build", "b", "bold"))})
	if got := moved(g.Outdated(g.Local)); got != "bold:a=new c:b=bnew<bold" {
		t.Errorf("half rebuilt: %q", got)
	}
	// The base is gone; its digest is known.
	g = New([]*Image{in[1], img("b", "b", "1 2", base("annotation", "a", "sha256:old"))})
	if got := moved(g.Outdated(g.Local)); got != "b:a=new" {
		t.Errorf("base gone: %q", got)
	}
	// An image that took its base's name.
	g = New([]*Image{old, img("b", "a", "1 2")})
	if got := moved(g.Outdated(g.Local)); got != "" {
		t.Errorf("took the name: %q", got)
	}
	// An index's platform is no other image.
	idx := img("index", "a", "1")
	idx.Manifest = "man"
	g = New([]*Image{idx, img("b", "b", "1 2", base("annotation", "a", "man"))})
	if got := moved(g.Outdated(g.Local)); got != "" {
		t.Errorf("manifest: %q", got)
	}
	// In a registry.
	g = New([]*Image{img("a", "a", "1"), img("b", "b", "1 2")})
	if got := moved(g.Outdated(func(string) (string, string, bool) { return "far", "", true })); got != "b:a=far" {
		t.Errorf("remote: %q", got)
	}
}

func TestOrder(t *testing.T) {
	a := img("a", "a", "1")
	g := New([]*Image{img("z", "z", "1 2"), img("b", "b", "1 2 3"), a, img("c", "c", "1 4")})
	var got []string
	for _, i := range g.Below(a) {
		got = append(got, i.ID)
	}
	if !slices.Equal(got, []string{"c", "z", "b"}) {
		t.Errorf("got %v", got)
	}
	if r := g.Roots(); len(r) != 1 || r[0] != a {
		t.Errorf("roots %v", r)
	}
}

// TestMany: a thousand images, and a chain of five hundred.
func TestMany(t *testing.T) {
	var in []*Image
	var layers []string
	for n := range 500 {
		layers = append(layers, fmt.Sprint("l", n))
		in = append(in, img(fmt.Sprint("c", n), "", strings.Join(layers, " ")), img(fmt.Sprint("s", n), "", fmt.Sprint("l0 x", n)))
	}
	begin := time.Now()
	g := New(in)
	g.Outdated(g.Local)
	if d := time.Since(begin); d > 20*time.Second {
		t.Errorf("%v", d)
	}
}

func TestMaterials(t *testing.T) {
	d := strings.Repeat("a", 64)
	got, err := Materials(SLSA02, []byte(`{"materials":[{"uri":"pkg:docker/debian@bookworm?platform=linux%2Famd64","digest":{"sha256":"`+d+`"}},{"uri":"https://x.test/y","digest":{}},{"uri":"pkg:docker/r.test:5000%2Fx"}]}`))
	if err != nil || !slices.Equal(got, []Base{{"debian:bookworm", "sha256:" + d}, {"r.test:5000/x:latest", ""}}) {
		t.Errorf("%v %v", got, err)
	}
	got, err = Materials(SLSA1, []byte(`{"buildDefinition":{"resolvedDependencies":[{"uri":"pkg:docker/a@1?digest=sha256:`+d+`"}]}}`))
	if err != nil || !slices.Equal(got, []Base{{"a:1", "sha256:" + d}}) {
		t.Errorf("%v %v", got, err)
	}
}

func FuzzMaterials(f *testing.F) {
	f.Add([]byte(`{"materials":[{"uri":"pkg:docker/a@1","digest":{"sha256":"x"}}]}`))
	f.Add([]byte(`{"buildDefinition":{"resolvedDependencies":[{"uri":"pkg:docker/%zz@"}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, kind := range []string{SLSA02, SLSA1} {
			list, _ := Materials(kind, b)
			for _, x := range list {
				if x.Name == "" {
					t.Error("a base without a name")
				}
			}
		}
	})
}

func TestFrom(t *testing.T) {
	for _, c := range []struct{ text, target, args, want string }{
		{"FROM debian:12\nRUN x", "", "", "debian:12"},
		{"# syntax=x\n\nARG V=12\nFROM --platform=linux/amd64 debian:${V} AS a\nFROM a\nCOPY --from=x / /", "", "", "debian:12"},
		{"ARG V=12\nFROM debian:$V\n", "", "V=13", "debian:13"},
		{"FROM a as One\nFROM b AS two\n", "one", "", "a"},
		{"FROM a as one\nFROM \\\n b\n", "", "", "b"},
		{"FROM scratch", "", "", ""},
		{"FROM ${X:-c:1}", "", "", "c:1"},
		{"FROM $X", "", "", ""},
		{"FROM a", "none", "", ""},
		{"", "", "", ""},
	} {
		if got := From(c.text, c.target, strings.Fields(c.args)); got != c.want {
			t.Errorf("%q: got %q, want %q", c.text, got, c.want)
		}
	}
}

func FuzzFrom(f *testing.F) {
	f.Add("ARG A=${B\nFROM $A AS b\nFROM b")
	f.Add("FROM\nARG\n\\\n")
	f.Fuzz(func(t *testing.T, text string) { From(text, "b", []string{"A=$A"}) })
}
