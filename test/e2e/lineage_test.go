package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tenon.dev/tenon/client/imageapi"
)

// alien is an image as others build it: annotations of its manifest and its index, labels,
// and a statement of provenance. It is named by its index, and the digest is that.
type alien struct {
	name            string
	layers          []string // texts of a file in each
	labels          map[string]string
	manifest, index map[string]string
	predicateType   string
	predicate       any
}

func (f *alien) load(t *testing.T, d *Daemon) (digest string) {
	t.Helper()
	type desc map[string]any
	const oci = "application/vnd.oci.image."
	all := tarFiles{}
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	blob := func(mt string, b []byte) desc {
		all["blobs/sha256/"+hexSum(b)] = b
		return desc{"mediaType": mt, "digest": "sha256:" + hexSum(b), "size": len(b)}
	}
	var layers []desc
	var ids []string
	for _, l := range f.layers {
		b := tarOf(t, file(l, l))
		layers, ids = append(layers, blob(oci+"layer.v1.tar", b)), append(ids, "sha256:"+hexSum(b))
	}
	conf := blob(oci+"config.v1+json", encode(map[string]any{"os": "linux", "architecture": "amd64", "config": map[string]any{"Labels": f.labels, "Cmd": []string{f.name}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": ids}}))
	man := blob(oci+"manifest.v1+json", encode(map[string]any{"schemaVersion": 2, "mediaType": oci + "manifest.v1+json", "config": conf, "layers": layers, "annotations": f.manifest}))
	man["platform"] = map[string]string{"os": "linux", "architecture": "amd64"}
	list := []desc{man}
	if f.predicateType != "" {
		st := blob("application/vnd.in-toto+json", encode(map[string]any{"_type": "https://in-toto.io/Statement/v0.1", "predicateType": f.predicateType, "predicate": f.predicate}))
		st["annotations"] = map[string]string{"in-toto.io/predicate-type": f.predicateType}
		empty := blob(oci+"config.v1+json", encode(map[string]any{"os": "unknown", "architecture": "unknown", "rootfs": map[string]any{"type": "layers", "diff_ids": []any{st["digest"]}}}))
		att := blob(oci+"manifest.v1+json", encode(map[string]any{"schemaVersion": 2, "mediaType": oci + "manifest.v1+json", "config": empty, "layers": []desc{st}}))
		att["platform"] = map[string]string{"os": "unknown", "architecture": "unknown"}
		att["annotations"] = map[string]any{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": man["digest"]}
		list = append(list, att)
	}
	idx := blob(oci+"index.v1+json", encode(map[string]any{"schemaVersion": 2, "mediaType": oci + "index.v1+json", "manifests": list, "annotations": f.index}))
	idx["annotations"] = map[string]string{"io.containerd.image.name": "docker.io/library/" + f.name}
	all["index.json"] = encode(map[string]any{"schemaVersion": 2, "manifests": []desc{idx}})
	all["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	path := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(path, all.tar(t), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Must(t, "load", "-qi", path)
	return idx["digest"].(string)
}

type tarFiles map[string][]byte

func (f tarFiles) tar(t *testing.T) []byte {
	var names []string
	for n := range f {
		names = append(names, n)
	}
	slices.Sort(names)
	var out []byte
	for _, n := range names {
		b := tarOf(t, file(n, string(f[n])))
		out = append(out, b[:len(b)-1024]...) // without the end
	}
	return append(out, make([]byte, 1024)...)
}

// TestForeignLineage: what others' builders say of an image's base is found in images
// that came from elsewhere, whichever way they say it.
func TestForeignLineage(t *testing.T) {
	d := NewDaemon(t)
	base := &alien{name: "base:1", layers: []string{"base"}, labels: map[string]string{"org.opencontainers.image.base.name": "docker.io/library/root:9", "dev.tenon.owner": "team-base"}}
	id := base.load(t, d)
	said := func(name, digest string) map[string]string {
		return map[string]string{"org.opencontainers.image.base.name": name, "org.opencontainers.image.base.digest": digest}
	}
	material := func(name, digest string) any {
		return map[string]any{"uri": "pkg:docker/" + name + "?platform=linux%2Famd64", "digest": map[string]string{"sha256": strings.TrimPrefix(digest, "sha256:")}}
	}
	other := "sha256:" + strings.Repeat("a", 64)
	used := []any{material("golang@1", other), material("base@1", id)}
	with := func(name string) []string { return []string{"base", name} }
	for _, f := range []*alien{
		{name: "manifest:1", layers: with("m"), manifest: said("docker.io/library/base:1", id)},
		{name: "index:1", layers: with("i"), index: said("docker.io/library/base:1", id)},
		{name: "label:1", layers: with("l"), labels: said("base:1", "")},
		{name: "inherited:1", layers: with("h"), labels: base.labels},
		{name: "slsa02:1", layers: with("s"), predicateType: "https://slsa.dev/provenance/v0.2", predicate: map[string]any{"materials": used}},
		{name: "slsa1:1", layers: with("t"), predicateType: "https://slsa.dev/provenance/v1", predicate: map[string]any{"buildDefinition": map[string]any{"resolvedDependencies": used}}},
		{name: "layers:1", layers: with("p")},
		{name: "absent:1", layers: []string{"elsewhere"}, manifest: said("r.test:5000/far:2", other)},
		{name: "liar:1", layers: []string{"lie"}, manifest: said("base:1", id), predicateType: "https://slsa.dev/provenance/v1", predicate: []string{"no", "object"}},
	} {
		f.load(t, d)
	}
	r := d.Sh(t, filepath.Join(d.Bin, "tenon")+" image tree --format json")
	var tree []imageapi.Node
	if err := json.Unmarshal([]byte(r.Out), &tree); err != nil || r.Code != 0 {
		t.Fatalf("%d: %s%s", r.Code, r.Out, r.Err)
	}
	var got []string
	var walk func(n imageapi.Node, above string)
	walk = func(n imageapi.Node, above string) {
		s := strings.Join(n.Names, ",")
		got = append(got, above+"/"+s+" "+n.By)
		if strings.HasPrefix(s, "slsa") && (len(n.Also) != 1 || n.Also[0].Name != "golang:1") {
			t.Errorf("%s: also %v", s, n.Also)
		}
		for _, c := range n.Children {
			walk(c, above+"/"+s)
		}
	}
	for _, n := range tree {
		walk(n, "")
	}
	for _, want := range []string{
		"/root:9/base:1 annotation",
		"/root:9/base:1/manifest:1 annotation", "/root:9/base:1/index:1 annotation", "/root:9/base:1/label:1 annotation", "/root:9/base:1/inherited:1 layers",
		"/root:9/base:1/slsa02:1 provenance", "/root:9/base:1/slsa1:1 provenance", "/root:9/base:1/layers:1 layers",
		"/r.test:5000/far:2/absent:1 annotation",
		"/root:9/base:1/liar:1 annotation", // it is said, and stays so; it is not re-based
	} {
		if !slices.Contains(got, want) {
			t.Errorf("the tree has no %s: %q", want, got)
		}
	}

	// The base moves: all that stand on it follow, whichever way that is known; no more
	// than swapping layers is possible, and the liar has none to swap.
	(&alien{name: "base:1", layers: []string{"base", "newer"}}).load(t, d)
	r = d.Sh(t, filepath.Join(d.Bin, "tenon")+" image rebuild --chain base:1; echo $?; tenon image outdated")
	if !strings.Contains(r.Out, "\n1\nIMAGE") || strings.Count(r.Out, " own layers on ") != 7 || !strings.Contains(r.Out, "liar:1: can't be rebuilt") {
		t.Errorf("rebuild: %s%s", r.Out, r.Err)
	}
	if _, after, _ := strings.Cut(r.Out, "\n1\nIMAGE"); strings.Count(after, ":1   base:1") != 1 || !strings.Contains(after, "liar:1") {
		t.Errorf("after the rebuild: %s", after)
	}
}
