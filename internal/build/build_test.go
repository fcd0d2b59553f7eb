package build

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"tenon.dev/tenon/internal/build/api"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/task"
)

// The tests build without real steps: those need a shim, and are end-to-end tests.

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

type world struct {
	t      *testing.T
	dir    string
	images *image.Store
	b      *Builder
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, dir: t.TempDir()}
	w.open()
	t.Cleanup(w.close)
	return w
}

func (w *world) open() {
	var err error
	w.images, err = image.Open(testContext(w.t), image.Config{Root: filepath.Join(w.dir, "images")})
	if err != nil {
		w.t.Fatal(err)
	}
	w.b = New(Options{Dir: filepath.Join(w.dir, "build"), RunDir: filepath.Join(w.dir, "run"), Images: w.images, Log: slog.New(slog.DiscardHandler)})
}

func (w *world) close() {
	if w.b == nil {
		return
	}
	if err := w.b.Close(); err != nil {
		w.t.Errorf("close builder: %v", err)
	}
	if err := w.images.Close(); err != nil {
		w.t.Errorf("close images: %v", err)
	}
	w.b = nil
}

func tarOf(t *testing.T, files map[string]string) []byte {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for name, text := range files {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text)), ModTime: time.Unix(1, 0)}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type printed struct {
	mu   sync.Mutex
	text strings.Builder
}

func (p *printed) Text(s string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.text.WriteString(s)
}

func (p *printed) Aux(string, any) {}

func (w *world) build(req api.Request, files map[string]string) (string, error) {
	req.Version, req.Context = api.BuildKit, bytes.NewReader(tarOf(w.t, files))
	res, err := w.b.Build(testContext(w.t), req, new(printed))
	return res.ImageID, err
}

func (w *world) mustBuild(req api.Request, files map[string]string) string {
	w.t.Helper()
	id, err := w.build(req, files)
	if err != nil {
		w.t.Fatal(err)
	}
	return id
}

// layerFile reads a file of an image's layers.
func (w *world) layerFile(ref, name string) string {
	w.t.Helper()
	img, err := w.images.Resolve(testContext(w.t), ref, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	dirs, err := w.images.Layers(testContext(w.t), img)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, d := range dirs {
		if b, err := os.ReadFile(filepath.Join(d, name)); err == nil {
			return string(b)
		}
	}
	w.t.Fatalf("%s has no %s", ref, name)
	return ""
}

func (w *world) held() map[string]bool {
	w.t.Helper()
	list, err := w.images.HeldLayerDirs()
	if err != nil {
		w.t.Fatal(err)
	}
	out := map[string]bool{}
	for _, n := range list {
		out[n] = true
	}
	return out
}

// A result is an image at once, and its layers are the build's own snapshots.
func TestResultIsAnImageWithoutACopy(t *testing.T) {
	w := newWorld(t)
	id := w.mustBuild(api.Request{Tags: []string{"docker.io/library/a:1"}}, map[string]string{"Dockerfile": "FROM scratch\nCOPY f /f\nCOPY g /g\n", "f": "one", "g": "two"})
	if got := w.layerFile("a:1", "f") + w.layerFile("a:1", "g"); got != "onetwo" {
		t.Fatalf("files are %q", got)
	}
	img, err := w.images.Resolve(testContext(t), "a:1", nil)
	if err != nil || img.ID != id {
		t.Fatalf("a:1 is %v, %v; built was %s", img, err, id)
	}
	dirs, err := w.images.Layers(testContext(t), img)
	if err != nil {
		t.Fatal(err)
	}
	held := w.held()
	for _, d := range dirs {
		if !held[filepath.Base(d)] {
			t.Errorf("layer %s is not the build's", d)
		}
	}
	// An image that is here is found without a registry, and its layers are not unpacked again.
	before := len(w.images.LayerDirs())
	w.mustBuild(api.Request{Tags: []string{"docker.io/library/b:1"}}, map[string]string{"Dockerfile": "FROM a:1\nCOPY f /h\n", "f": "three"})
	if got := w.layerFile("b:1", "g") + w.layerFile("b:1", "h"); got != "twothree" {
		t.Fatalf("files are %q", got)
	}
	if after := len(w.images.LayerDirs()); after != before+1 {
		t.Errorf("%d layers, were %d", after, before)
	}
}

// An image that was not built here gives its unpacked layers to builds.
func TestFromALoadedImage(t *testing.T) {
	w := newWorld(t)
	img, err := w.images.Import(testContext(t), bytes.NewReader(tarOf(t, map[string]string{"base": "b"})), image.ImportOptions{Ref: "base:1"})
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := w.images.Layers(testContext(t), img)
	if err != nil {
		t.Fatal(err)
	}
	w.mustBuild(api.Request{Tags: []string{"docker.io/library/c:1"}}, map[string]string{"Dockerfile": "FROM base:1\nCOPY f /f\nFROM base:1\nCOPY --from=0 /f /f2\nCOPY --from=0 /base /base2\n", "f": "x"})
	if got := w.layerFile("c:1", "f2") + w.layerFile("c:1", "base2"); got != "xb" {
		t.Fatalf("files are %q", got)
	}
	if !w.held()[filepath.Base(dirs[0])] {
		t.Error("the base's layer is not held")
	}
	// The image goes, the cache goes on with its layer.
	if _, err := w.images.Remove(testContext(t), "base:1", image.RemoveOptions{Force: true}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(dirs[0], "base")); err != nil {
		t.Errorf("the layer went with the image: %v", err)
	}
}

// Pruning the cache leaves images whole and takes the rest.
func TestPruneLeavesImages(t *testing.T) {
	w := newWorld(t)
	files := map[string]string{"Dockerfile": "FROM scratch AS x\nCOPY g /g\nFROM scratch\nCOPY --from=x /g /g\nCOPY f /f\n", "f": "one", "g": "two"}
	w.mustBuild(api.Request{Tags: []string{"docker.io/library/a:1"}}, files)
	if _, err := w.b.Prune(testContext(t), api.PruneRequest{All: true}); err != nil {
		t.Fatal(err)
	}
	if got := w.layerFile("a:1", "f") + w.layerFile("a:1", "g"); got != "onetwo" {
		t.Fatalf("files are %q", got)
	}
	if held := w.held(); len(held) != 0 {
		t.Errorf("%d directories are held by an empty cache", len(held))
	}
	var buf bytes.Buffer
	if err := w.images.Save(testContext(t), &buf, []string{"a:1"}, nil); err != nil {
		t.Errorf("save: %v", err)
	}
}

// Another daemon goes on with the cache; one that follows a power cut does not.
func TestCacheOutlivesTheDaemon(t *testing.T) {
	w := newWorld(t)
	files := map[string]string{"Dockerfile": "FROM scratch\nCOPY f /f\n", "f": strings.Repeat("x", 1000)}
	w.mustBuild(api.Request{}, files)
	held := len(w.held())
	w.close()
	if _, err := os.Lstat(filepath.Join(w.dir, "build", "boot")); err == nil {
		t.Error("closed databases are marked as open")
	}
	w.open()
	records, err := w.b.DiskUsage(testContext(t))
	if err != nil || len(records) == 0 {
		t.Fatalf("cache has %d records, %v", len(records), err)
	}
	if n := len(w.held()); n != held {
		t.Errorf("%d directories are held, were %d", n, held)
	}
	w.close()
	if err := os.WriteFile(filepath.Join(w.dir, "build", "boot"), []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.open()
	if records, err = w.b.DiskUsage(testContext(t)); err != nil || len(records) != 0 {
		t.Fatalf("cache has %d records after a power cut, %v", len(records), err)
	}
	if n := len(w.held()); n != 0 {
		t.Errorf("%d directories are held by an empty cache", n)
	}
	w.mustBuild(api.Request{}, files)
}

// A build that has failed holds nothing of the cache.
func TestFailedBuildHoldsNothing(t *testing.T) {
	w := newWorld(t)
	for range 3 {
		if _, err := w.build(api.Request{}, map[string]string{"Dockerfile": "FROM scratch\nCOPY missing /f\n", "f": "x"}); err == nil || !strings.Contains(err.Error(), "missing") {
			t.Fatalf("error is %v", err)
		}
	}
	w.nothingInUse()
}

// nothingInUse waits until no build holds anything of the cache.
func (w *world) nothingInUse() {
	w.t.Helper()
	ctx := testContext(w.t)
	for {
		records, err := w.b.DiskUsage(ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		used := 0
		for _, r := range records {
			if r.InUse {
				used++
			}
		}
		if used == 0 {
			break
		}
		select {
		case <-time.After(20 * time.Millisecond): // it is released in the background
		case <-ctx.Done():
			w.t.Fatalf("%d records are in use still", used)
		}
	}
}

// cutOff are steps that run until their build ends.
type cutOff struct{ up chan struct{} }

func (c cutOff) RunStep(ctx context.Context, st *engine.Step) (task.Exit, error) {
	st.Started()
	close(c.up)
	<-ctx.Done()
	return task.Exit{}, context.Cause(ctx)
}

func (cutOff) ExecStep(context.Context, string, string, *engine.Step) (task.Exit, error) {
	return task.Exit{}, errdefs.ErrNotFound
}

func (cutOff) StepIsolation(context.Context, string) (string, error) { return sandbox.Process, nil }

// A build that is cancelled in a step holds nothing of the cache, and what the step
// has written is not in it.
func TestCancelledBuildHoldsNothing(t *testing.T) {
	w := newWorld(t)
	steps := cutOff{make(chan struct{})}
	w.b.opt.Steps = steps // before it is started
	cancelled := make(chan error, 1)
	go func() {
		select {
		case <-steps.up:
			cancelled <- w.b.Cancel("one")
		case <-t.Context().Done():
			cancelled <- t.Context().Err()
		}
	}()
	files := map[string]string{"Dockerfile": "FROM scratch\nCOPY f /f\nRUN [\"wait\"]\n", "f": "x"}
	if _, err := w.build(api.Request{ID: "one"}, files); !errors.Is(err, errCancelled) {
		t.Fatalf("error is %v", err)
	}
	if err := <-cancelled; err != nil {
		t.Fatal(err)
	}
	w.nothingInUse()
	records, err := w.b.DiskUsage(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if strings.Contains(r.Description, "wait") {
			t.Errorf("the step's record is left: %+v", r)
		}
	}
}

// The same build gives the same digest, twice.
func TestReproducible(t *testing.T) {
	w := newWorld(t)
	epoch := "1700000000"
	req := api.Request{NoCache: true, Args: map[string]*string{"SOURCE_DATE_EPOCH": &epoch}, Outputs: []api.Output{{Type: "image", Attrs: map[string]string{"rewrite-timestamp": "true"}}}}
	files := map[string]string{"Dockerfile": "FROM scratch\nCOPY f /d/f\n", "f": "one"}
	first := w.mustBuild(req, files)
	req.Context = nil
	if second := w.mustBuild(req, files); first != second {
		t.Errorf("%s, then %s", first, second)
	}
	if got := w.layerFile(first, "d/f"); got != "one" {
		t.Errorf("file is %q", got)
	}
}

// A builder that nobody has used has opened nothing.
func TestNothingBeforeTheFirstUse(t *testing.T) {
	w := newWorld(t)
	if w.b.used() {
		t.Error("used")
	}
	for _, d := range []string{"build", "run"} {
		if ents, err := os.ReadDir(filepath.Join(w.dir, d)); err == nil && len(ents) > 0 {
			t.Errorf("%s has %v", d, ents)
		}
	}
}

func TestIsolationTravelsWithTheStep(t *testing.T) {
	for _, c := range []struct{ want, arg, cgroup, isolation, parent string }{
		{"", "", "", "", ""},
		{"", "", "x.slice", "", "x.slice"},
		{"vm", "", "", "vm", ""},
		{"", "vm", "a/b", "vm", "a/b"},
		{"process", "vm", "", "process", ""},
		{"default", "", "", "", ""},
	} {
		opt := map[string]string{}
		for k, v := range map[string]string{isolationAttr: c.want, isolationArg: c.arg, cgroupAttr: c.cgroup} {
			if v != "" {
				opt[k] = v
			}
		}
		out, err := withIsolation(opt)
		if err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		if i, p := cutIsolation(out[cgroupAttr]); i != c.isolation || p != c.parent {
			t.Errorf("%+v: isolation %q, parent %q", c, i, p)
		}
	}
	for _, bad := range []map[string]string{{isolationAttr: "moon"}, {cgroupAttr: isolationPrefix + "process/"}, {isolationAttr: "vm/../x"}, {isolationArg: strings.Repeat("v", 1000)}} {
		if out, err := withIsolation(bad); err == nil {
			t.Errorf("%v became %v", bad, out)
		}
	}
}

func TestUsualSyntax(t *testing.T) {
	for source, want := range map[string]bool{
		"docker/dockerfile": true, "docker/dockerfile:1": true, "docker.io/docker/dockerfile:1.7": true, "docker/dockerfile:latest": true,
		"docker/dockerfile:1-labs": false, "docker/dockerfile@sha256:00": false, "evil/dockerfile:1": false, "docker/dockerfile-upstream:1": false, "": false,
	} {
		if usual(source) != want {
			t.Errorf("%q: %v", source, !want)
		}
	}
}

// A layer's directory is shared by all snapshots of it and goes with the last.
func TestSnapshotsOfALayer(t *testing.T) {
	w := newWorld(t)
	ctx := testContext(t)
	img, err := w.images.Import(ctx, bytes.NewReader(tarOf(t, map[string]string{"base": "b"})), image.ImportOptions{Ref: "base:1"})
	if err != nil {
		t.Fatal(err)
	}
	s, err := openSnapshotter(ctx, w.images, filepath.Join(w.dir, "snaps"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	layer := context.WithValue(ctx, layerKey{}, img.ChainID)
	for i := range 2 {
		key := fmt.Sprint("active", i)
		m, err := s.Prepare(layer, key, "")
		if err != nil || len(m) != 1 || m[0].Type != layerType {
			t.Fatalf("prepare: %v, %v", m, err)
		}
		if err := s.Commit(ctx, fmt.Sprint("layer", i), key); err != nil {
			t.Fatal(err)
		}
	}
	if u, err := s.Usage(ctx, "layer0"); err != nil || u.Size != 0 {
		t.Errorf("usage %+v, %v", u, err)
	}
	m, err := s.Prepare(ctx, "child", "layer0")
	if err != nil || m[0].Type != "overlay" {
		t.Fatalf("child: %v, %v", m, err)
	}
	lower, upper, work := overlayDirs(m[0])
	if len(lower) != 1 || upper == "" || work == "" {
		t.Errorf("child's overlay: %v", m)
	}
	if err := s.Remove(ctx, "layer0"); err == nil {
		t.Error("a parent was removed")
	}
	for _, step := range []struct {
		key  string
		held bool
	}{{"child", true}, {"layer0", true}, {"layer1", false}} {
		if err := s.Remove(ctx, step.key); err != nil {
			t.Fatal(err)
		}
		if held := w.held()[filepath.Base(lower[0])]; held != step.held {
			t.Errorf("after %s: held %v", step.key, held)
		}
	}
	if _, err := s.Prepare(context.WithValue(ctx, layerKey{}, digest.FromString("none")), "x", ""); err == nil {
		t.Error("a layer that is not here was prepared")
	}
}
