package build

import (
	"bytes"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"tenon.dev/tenon/internal/build/api"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/registry"
)

// A base image comes from its registry, results and cache go there.
func TestRegistry(t *testing.T) {
	store, err := image.Open(testContext(t), image.Config{Root: filepath.Join(t.TempDir(), "registry")})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	var h http.Handler
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.ServeHTTP(w, r) }))
	defer srv.Close()
	addr := strings.TrimPrefix(srv.URL, "http://")
	reps, err := store.Repositories(addr)
	if err != nil {
		t.Fatal(err)
	}
	h = registry.New(registry.Config{Repositories: reps, Log: slog.New(slog.DiscardHandler)})
	if _, err := store.Import(testContext(t), bytes.NewReader(tarOf(t, map[string]string{"base": "b"})), image.ImportOptions{Ref: addr + "/base:1"}); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"Dockerfile": "FROM " + addr + "/base:1 AS x\nCOPY f /f\nFROM x\nCOPY --from=x /base /base2\n", "f": "one"}
	w := newWorld(t)
	on := "1"
	w.mustBuild(api.Request{Args: map[string]*string{"BUILDKIT_INLINE_CACHE": &on}, Tags: []string{addr + "/made:1"}, Outputs: []api.Output{{Type: "image", Attrs: map[string]string{"push": "true"}}}}, files)
	if got := w.layerFile(addr+"/made:1", "base2") + w.layerFile(addr+"/made:1", "base") + w.layerFile(addr+"/made:1", "f"); got != "bbone" {
		t.Fatalf("files are %q", got)
	}
	if _, err := store.Lookup(addr + "/made:1"); err != nil {
		t.Fatalf("the registry has no result: %v", err)
	}
	// Another engine takes the cached steps from there.
	other := newWorld(t)
	other.mustBuild(api.Request{CacheFrom: []string{addr + "/made:1"}, Tags: []string{"docker.io/library/again:1"}}, files)
	if a, b := w.top(addr+"/made:1"), other.top("again:1"); a != b {
		t.Errorf("the last layer is %s, was %s", b, a)
	}
}

// top is the diff ID of an image's last layer, which has the times of its files in it.
func (w *world) top(ref string) string {
	w.t.Helper()
	img, err := w.images.Resolve(testContext(w.t), ref, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return img.DiffIDs[len(img.DiffIDs)-1].String()
}
