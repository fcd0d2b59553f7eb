package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func load(t testing.TB, s *Store, b []byte) []Loaded {
	t.Helper()
	l, err := s.Load(context.Background(), bytes.NewReader(b), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func resolve(t testing.TB, s *Store, ref string) *Image {
	t.Helper()
	img, err := s.Resolve(context.Background(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// collect waits for what is being written and collects.
func (s *Store) collectNow(t *testing.T) {
	t.Helper()
	s.gate.Lock()
	defer s.gate.Unlock()
	if _, err := s.collect(); err != nil {
		t.Fatal(err)
	}
}

func TestSaveLoadRoundTrip(t *testing.T) {
	ctx := context.Background()
	a := open(t)
	load(t, a, dockerArchive(t, []string{"one:1", "one:2"}, mkTar(t, fileEntry("f", "1")), mkTar(t, fileEntry("g", "2"))))
	load(t, a, dockerArchive(t, []string{"two:1"}, mkTar(t, fileEntry("f", "1")), mkTar(t, fileEntry("h", "3"))))
	var ar bytes.Buffer
	if err := a.Save(ctx, &ar, []string{"one:1", "one:2", "two:1"}, nil); err != nil {
		t.Fatal(err)
	}
	zw, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"plain": ar.Bytes(), "gzip": gz(ar.Bytes()), "zstd": zw.EncodeAll(ar.Bytes(), nil)} {
		s := open(t)
		got := load(t, s, b)
		if len(got) != 3 {
			t.Errorf("%s: %v", name, got)
		}
		for _, ref := range []string{"one:1", "one:2", "two:1"} {
			if x, y := resolve(t, a, ref), resolve(t, s, ref); x.ID != y.ID || !reflect.DeepEqual(x.Config, y.Config) {
				t.Errorf("%s: %s is %s, was %s", name, ref, y.ID, x.ID)
			}
		}
		var again bytes.Buffer
		if err := s.Save(ctx, &again, []string{"one:1", "one:2", "two:1"}, nil); err != nil || !bytes.Equal(again.Bytes(), ar.Bytes()) {
			t.Errorf("%s: saved again it differs (%v)", name, err)
		}
	}
	// Read as a docker archive of old, without the OCI part.
	files := untar(t, ar.Bytes())
	var list []dockerManifest
	if err := json.Unmarshal(files["manifest.json"], &list); err != nil || len(list) != 2 || !slices.Equal(list[0].RepoTags, []string{"one:1", "one:2"}) {
		t.Fatalf("%+v %v", list, err)
	}
	var es []entry
	for n, b := range files {
		if n != "index.json" && n != "oci-layout" {
			es = append(es, fileEntry(n, string(b)))
		}
	}
	s := open(t)
	load(t, s, mkTar(t, es...))
	if x, y := resolve(t, a, "two:1"), resolve(t, s, "two:1"); x.ID != y.ID {
		t.Errorf("%s, was %s", y.ID, x.ID)
	}
}

func untar(t *testing.T, b []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if out[h.Name], err = io.ReadAll(r); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestLegacyArchive has what old docker save wrote: VERSION and json files, and
// a symlink in place of a layer that comes twice.
func TestLegacyArchive(t *testing.T) {
	l := mkTar(t, fileEntry("f", "x"))
	d := digest.FromBytes(l)
	conf, _ := json.Marshal(map[string]any{"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": []digest.Digest{d, d}}})
	man, _ := json.Marshal([]dockerManifest{{Config: "c.json", RepoTags: []string{"legacy:1"}, Layers: []string{"1/layer.tar", "2/layer.tar"}}})
	s := open(t)
	load(t, s, mkTar(t, dirEntry("1"), fileEntry("1/VERSION", "1.0"), fileEntry("1/json", "{}"), fileEntry("1/layer.tar", string(l)),
		dirEntry("2"), entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: "2/layer.tar", Linkname: "../1/layer.tar"}},
		fileEntry("c.json", string(conf)), fileEntry("manifest.json", string(man)), fileEntry("repositories", "{}")))
	if dirs, err := s.Layers(context.Background(), resolve(t, s, "legacy:1")); err != nil || len(dirs) != 2 {
		t.Errorf("%v %v", dirs, err)
	}
}

// TestNoPlatform: a config without os and architecture is an image all the same.
func TestNoPlatform(t *testing.T) {
	ctx := context.Background()
	l := mkTar(t, fileEntry("f", "x"))
	conf := fmt.Sprintf(`{"rootfs":{"type":"layers","diff_ids":[%q]}}`, digest.FromBytes(l))
	s := open(t)
	load(t, s, mkTar(t, fileEntry("l.tar", string(l)), fileEntry("c.json", conf), fileEntry("manifest.json", `[{"Config":"c.json","RepoTags":["np:1"],"Layers":["l.tar"]}]`)))
	img := resolve(t, s, "np:1")
	if _, err := s.Layers(ctx, img); err != nil {
		t.Error(err)
	}
	if _, err := s.Commit(ctx, CommitOptions{Parent: img, Ref: "np:2"}); err != nil {
		t.Error(err)
	}
	if _, err := s.Resolve(ctx, "np:2", &img.Platform); err != nil {
		t.Logf("by its own platform %+v: %v", img.Platform, err)
	}
}

func TestCommitImportHistory(t *testing.T) {
	ctx := context.Background()
	s := open(t)
	base, err := s.Import(ctx, bytes.NewReader(gz(mkTar(t, dirEntry("etc"), fileEntry("etc/a", "1"), fileEntry("etc/b", "1")))), ImportOptions{
		Ref: "base", Message: "from a test", Changes: []string{`CMD ["/bin/x", "y"]`, "ENV A=1 B=\"2 3\"", "EXPOSE 80 53/udp", "LABEL k=v"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if c := base.Config.Config; !slices.Equal(c.Cmd, []string{"/bin/x", "y"}) || !slices.Equal(c.Env, []string{"A=1", "B=2 3"}) || c.Labels["k"] != "v" || len(c.ExposedPorts) != 2 {
		t.Errorf("%+v", c)
	}
	child, err := s.Commit(ctx, CommitOptions{
		Parent: base, Diff: bytes.NewReader(mkTar(t, fileEntry("etc/.wh.b", ""), fileEntry("etc/c", "2"))),
		Changes: []string{"WORKDIR /w", "USER nobody", `HEALTHCHECK --interval=5s --retries=2 CMD true`, "ONBUILD RUN x", `SHELL ["/bin/ash","-c"]`, "ENTRYPOINT top", "STOPSIGNAL SIGINT", "VOLUME /data"},
		Author:  "me", Comment: "why", Ref: "child:1", ContainerCommand: "/bin/sh",
	})
	if err != nil {
		t.Fatal(err)
	}
	c := child.Config.Config
	if c.WorkingDir != "/w" || c.User != "nobody" || c.Healthcheck == nil || c.Healthcheck.Interval != 5*time.Second || c.Healthcheck.Retries != 2 ||
		!slices.Equal(c.Entrypoint, []string{"/bin/ash", "-c", "top"}) || c.StopSignal != "SIGINT" || len(c.Volumes) != 1 || !slices.Equal(c.Cmd, []string{"/bin/x", "y"}) {
		t.Errorf("%+v", c)
	}
	if child.Parent != base.ID || child.Comment != "why" || child.Config.Author != "me" || len(child.DiffIDs) != 2 {
		t.Errorf("%+v", child)
	}
	dirs, err := s.Layers(ctx, child)
	if err != nil {
		t.Fatal(err)
	}
	baseDirs, err := s.Layers(ctx, base)
	if err != nil {
		t.Fatal(err)
	}
	if dirs[1] != baseDirs[0] {
		t.Error("the parent's layer is not shared")
	}
	m := mountOverlay(t, dirs)
	if _, err := os.Lstat(m + "/etc/b"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("etc/b: %v", err)
	}
	if b, err := os.ReadFile(m + "/etc/c"); err != nil || string(b) != "2" {
		t.Errorf("etc/c: %q %v", b, err)
	}
	h, err := s.History(ctx, "child:1", nil)
	if err != nil || len(h) != 2 || h[0].ID != child.ID || h[0].Comment != "why" || h[0].CreatedBy != "/bin/sh" || h[1].Comment != "from a test" || h[0].Tags[0] != "child:1" {
		t.Errorf("%+v %v", h, err)
	}
	// Configuration only: no layer.
	same, err := s.Commit(ctx, CommitOptions{Parent: base, Config: &dockerspec.DockerOCIImageConfig{ImageConfig: ocispec.ImageConfig{Cmd: []string{"z"}}}})
	if err != nil || len(same.DiffIDs) != 1 || same.Config.Config.Cmd[0] != "z" || len(same.RepoTags) != 0 {
		t.Errorf("%+v %v", same, err)
	}
	for _, bad := range []string{"FROM x", "CMD", "EXPOSE x", "EXPOSE 1/x", "ENV A", "HEALTHCHECK --x=1 CMD y", "SHELL x", `LABEL "x`} {
		if _, err := s.Import(ctx, bytes.NewReader(nil), ImportOptions{Changes: []string{bad}}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if _, err := s.Import(ctx, strings.NewReader("not a tar at all"), ImportOptions{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
}

func TestTagRemovePrune(t *testing.T) {
	ctx := context.Background()
	var events []string
	s := open(t, func(c *Config) { c.OnEvent = func(e Event) { events = append(events, e.Action+" "+e.Ref) } })
	base := mkTar(t, fileEntry("base", "1"))
	load(t, s, dockerArchive(t, []string{"a:1"}, base, mkTar(t, fileEntry("a", "1"))))
	load(t, s, dockerArchive(t, []string{"b:1"}, base, mkTar(t, fileEntry("b", "1"))))
	a, b := resolve(t, s, "a:1"), resolve(t, s, "b:1")
	if a.ChainIDs[0] != b.ChainIDs[0] {
		t.Error("base not shared")
	}
	if err := s.Tag(ctx, "a:1", "example.com/x/y"); err != nil {
		t.Fatal(err)
	}
	if got := resolve(t, s, a.ID); !slices.Equal(got.RepoTags, []string{"a:1", "example.com/x/y:latest"}) || len(got.RepoDigests) != 2 {
		t.Errorf("%v %v", got.RepoTags, got.RepoDigests)
	}
	if err := s.Tag(ctx, "a:1", "x@"+a.ID); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	if _, err := s.Remove(ctx, a.ID, RemoveOptions{}, nil); !errdefs.IsConflict(err) {
		t.Errorf("in two repositories: %v", err)
	}
	out, err := s.Remove(ctx, "example.com/x/y", RemoveOptions{}, nil)
	if err != nil || len(out) != 1 || out[0].Untagged != "example.com/x/y:latest" {
		t.Errorf("%v %v", out, err)
	}
	used := func(id string) []string {
		if id == a.ID {
			return []string{"0123456789abcdef"}
		}
		return nil
	}
	if _, err := s.Remove(ctx, "a:1", RemoveOptions{}, used); !errdefs.IsConflict(err) || !strings.Contains(err.Error(), "0123456789ab") {
		t.Errorf("in use: %v", err)
	}
	release := s.Hold(b.ID)
	if _, err := s.Remove(ctx, "b:1", RemoveOptions{}, nil); !errdefs.IsConflict(err) {
		t.Errorf("held: %v", err)
	}
	release()
	out, err = s.Remove(ctx, "a:1", RemoveOptions{Force: true}, used)
	if err != nil || len(out) != 1 {
		t.Errorf("%v %v", out, err)
	}
	if l, err := s.List(ctx, ListOptions{Filters: Filters{"dangling": {"true"}}}); err != nil || len(l) != 1 || l[0].ID != a.ID {
		t.Errorf("%v %v", l, err)
	}
	s.collectNow(t)
	if _, err := s.Layers(ctx, a); err != nil || !s.hasLayer(a.ChainID) {
		t.Errorf("layers in use were collected: %v", err)
	}
	if out, _, err := s.Prune(ctx, nil, used); err != nil || len(out) != 0 {
		t.Errorf("%v %v", out, err)
	}
	out, freed, err := s.Prune(ctx, nil, nil)
	if err != nil || len(out) != 1 || out[0].Deleted != a.ID || freed == 0 {
		t.Errorf("%v %d %v", out, freed, err)
	}
	s.collectNow(t)
	if s.hasLayer(a.ChainID) || !s.hasLayer(b.ChainID) || !s.hasLayer(b.ChainIDs[0]) {
		t.Error("wrong layers collected")
	}
	if _, err := s.Layers(ctx, b); err != nil {
		t.Error(err)
	}
	du, err := s.DiskUsage(ctx, true)
	if err != nil || du.TotalCount != 1 || du.TotalSize == 0 || du.Reclaimable != du.TotalSize || len(du.Items) != 1 {
		t.Errorf("%+v %v", du, err)
	}
	out, err = s.Remove(ctx, b.ID[:15], RemoveOptions{}, nil)
	if err != nil || len(out) != 2 || out[1].Deleted != b.ID {
		t.Errorf("%v %v", out, err)
	}
	empty(t, s)
	want := []string{"load a:1", "load b:1", "tag example.com/x/y:latest", "untag example.com/x/y:latest", "untag a:1", "delete " + a.ID, "untag b:1", "delete " + b.ID}
	if !slices.Equal(events, want) {
		t.Errorf("events %q", events)
	}
	if _, err := s.Remove(ctx, "a:1", RemoveOptions{}, nil); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
}

func TestListFilters(t *testing.T) {
	ctx := context.Background()
	s := open(t)
	for i, n := range []string{"a/x:1", "a/y:1", "b:2"} {
		if _, err := s.Import(ctx, bytes.NewReader(mkTar(t, fileEntry("f", fmt.Sprint(i)))), ImportOptions{Ref: n, Changes: []string{fmt.Sprintf("LABEL n=%d all=1", i)}}); err != nil {
			t.Fatal(err)
		}
	}
	for f, want := range map[string]string{
		"label=all": "3", "label=n=1": "1", "reference=a/*": "2", "reference=b": "1", "reference=*:2": "1", "since=a/x:1": "2", "before=b:2": "2",
		"dangling=true": "0", "until=1h": "0", "until=-1h": "3", "label=none": "0",
	} {
		k, v, _ := strings.Cut(f, "=")
		l, err := s.List(ctx, ListOptions{Filters: Filters{k: {v}}})
		if err != nil || fmt.Sprint(len(l)) != want {
			t.Errorf("%s: %d images, want %s, %v", f, len(l), want, err)
		}
	}
	for f, is := range map[string]func(error) bool{"nonsense=1": errdefs.IsInvalidArgument, "dangling=x": errdefs.IsInvalidArgument, "since=none": errdefs.IsNotFound, "until=x": errdefs.IsInvalidArgument} {
		k, v, _ := strings.Cut(f, "=")
		if _, err := s.List(ctx, ListOptions{Filters: Filters{k: {v}}}); !is(err) {
			t.Errorf("%s: %v", f, err)
		}
	}
}

func TestResolveErrors(t *testing.T) {
	ctx := context.Background()
	s := open(t)
	for ref, is := range map[string]func(error) bool{
		"none": errdefs.IsNotFound, "": errdefs.IsInvalidArgument, "UPPER": errdefs.IsInvalidArgument, "a b": errdefs.IsInvalidArgument,
		"sha256:" + strings.Repeat("0", 64): errdefs.IsNotFound, "abcdef": errdefs.IsNotFound, "x@sha256:" + strings.Repeat("0", 64): errdefs.IsNotFound,
	} {
		if _, err := s.Resolve(ctx, ref, nil); !is(err) {
			t.Errorf("%q: %v", ref, err)
		}
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	root := t.TempDir()
	openAt(t, root)
	if _, err := Open(context.Background(), Config{Root: root}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v", err)
	}
}

// TestConcurrent pulls, loads, removes and collects at the same time.
func TestConcurrent(t *testing.T) {
	ctx := context.Background()
	f := newFakeRegistry(t)
	base := mkTar(t, fileEntry("base", strings.Repeat("b", 50_000)))
	for i := range 4 {
		f.tags[fmt.Sprint(i)] = f.image("amd64", base, mkTar(t, fileEntry("top", fmt.Sprint(i)))).Digest
	}
	s := open(t)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for range 5 {
				ref := fmt.Sprintf("%s/x:%d", f.addr, i%3) // two of them the same
				img, err := s.Pull(ctx, ref, PullOptions{})
				if err != nil {
					if !errdefs.IsNotFound(err) { // removed at once by the other
						t.Error(err)
					}
					continue
				}
				release := s.Hold(img.ID)
				if _, err := s.Layers(ctx, img); err != nil && !errdefs.IsNotFound(err) {
					t.Error(err)
				}
				release()
				if _, err := s.Remove(ctx, ref, RemoveOptions{}, nil); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsConflict(err) {
					t.Error(err)
				}
				load(t, s, dockerArchive(t, []string{"l:1"}, base))
			}
		})
	}
	wg.Wait()
	dirs, err := s.Layers(ctx, resolve(t, s, "l:1"))
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(dirs[0] + "/base"); err != nil || st.Size() != 50_000 {
		t.Errorf("%v", err)
	}
}

// TestBudget: images that nobody uses go when there are too many, oldest use
// first, and those in use never.
func TestBudget(t *testing.T) {
	ctx := context.Background()
	var mu sync.Mutex
	inUse := ""
	s := open(t, func(c *Config) {
		c.Budget = 1_130_000 // with the fourth it is more, without any of the first three less
		c.InUse = func(id string) []string {
			mu.Lock()
			defer mu.Unlock()
			if id == inUse {
				return []string{"c"}
			}
			return nil
		}
	})
	ids := map[string]string{}
	for i := range 3 {
		n := fmt.Sprintf("i%d:1", i)
		load(t, s, dockerArchive(t, []string{n}, mkTar(t, fileEntry("f", strings.Repeat(n, 20_000))))) // 80 kB, twice
		ids[n] = resolve(t, s, n).ID
	}
	mu.Lock()
	inUse = ids["i0:1"]
	mu.Unlock()
	if _, err := s.Layers(ctx, resolve(t, s, "i1:1")); err != nil { // used later than i2
		t.Fatal(err)
	}
	load(t, s, dockerArchive(t, []string{"big:1"}, mkTar(t, fileEntry("f", strings.Repeat("x", 350_000)))))
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		l, err := s.List(ctx, ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(l) == 3 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d images left", len(l))
		}
	}
	for n, there := range map[string]bool{"i0:1": true, "i1:1": true, "i2:1": false, "big:1": true} {
		if _, err := s.Resolve(ctx, n, nil); (err == nil) != there {
			t.Errorf("%s: %v", n, err)
		}
	}
}
