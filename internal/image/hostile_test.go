package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// empty checks that nothing has been left in the store.
func empty(t *testing.T, s *Store) {
	t.Helper()
	if l, err := s.List(context.Background(), ListOptions{}); err != nil || len(l) != 0 {
		t.Errorf("images left: %v %v", l, err)
	}
	s.gate.Lock()
	if _, err := s.collect(); err != nil {
		t.Error(err)
	}
	s.gate.Unlock()
	for _, d := range []string{s.blobDir(digest.SHA256), s.ingestDir(), s.layerTmp()} {
		ents, err := os.ReadDir(d)
		if err != nil || len(ents) != 0 {
			t.Errorf("left in %s: %v %v", filepath.Base(d), ents, err)
		}
	}
	ents, err := os.ReadDir(s.layersDir())
	if err != nil || len(ents) != 1 {
		t.Errorf("layers left: %v %v", ents, err)
	}
}

func TestPullRefusesWhatIsNotAsAnnounced(t *testing.T) {
	l := mkTar(t, fileEntry("f", strings.Repeat("content ", 10_000)))
	layerDigest := digest.FromBytes(gz(l))
	write := func(mutate func([]byte) []byte) func(http.ResponseWriter, *http.Request, digest.Digest, []byte) bool {
		return func(w http.ResponseWriter, r *http.Request, d digest.Digest, b []byte) bool {
			if d != layerDigest {
				return false
			}
			_, _ = w.Write(mutate(bytes.Clone(b)))
			return true
		}
	}
	for name, tc := range map[string]struct {
		bend func(http.ResponseWriter, *http.Request, digest.Digest, []byte) bool
		make func(f *fakeRegistry) ocispec.Descriptor
	}{
		"flipped byte":                    {bend: write(func(b []byte) []byte { b[len(b)/2] ^= 1; return b })},
		"flipped last byte of the header": {bend: write(func(b []byte) []byte { b[9] ^= 1; return b })},
		"truncated":                       {bend: write(func(b []byte) []byte { return b[:len(b)-10] })},
		"more":                            {bend: write(func(b []byte) []byte { return append(b, b...) })},
		"endless": {bend: func(w http.ResponseWriter, r *http.Request, d digest.Digest, b []byte) bool {
			if d != layerDigest {
				return false
			}
			for r.Context().Err() == nil {
				if _, err := w.Write(b); err != nil {
					break
				}
			}
			return true
		}},
		"wrong diff ID": {make: func(f *fakeRegistry) ocispec.Descriptor {
			return f.manifest("amd64", []digest.Digest{digest.FromString("other")}, []ocispec.Descriptor{f.put(ocispec.MediaTypeImageLayerGzip, gz(l))})
		}},
		"more layers than diff IDs": {make: func(f *fakeRegistry) ocispec.Descriptor {
			d := f.put(ocispec.MediaTypeImageLayerGzip, gz(l))
			return f.manifest("amd64", []digest.Digest{digest.FromBytes(l)}, []ocispec.Descriptor{d, d})
		}},
		"wrong size": {make: func(f *fakeRegistry) ocispec.Descriptor {
			d := f.put(ocispec.MediaTypeImageLayerGzip, gz(l))
			d.Size -= 5
			return f.manifest("amd64", []digest.Digest{digest.FromBytes(l)}, []ocispec.Descriptor{d})
		}},
		"negative size": {make: func(f *fakeRegistry) ocispec.Descriptor {
			d := f.put(ocispec.MediaTypeImageLayerGzip, gz(l))
			d.Size = -1
			return f.manifest("amd64", []digest.Digest{digest.FromBytes(l)}, []ocispec.Descriptor{d})
		}},
		"digest that is a path": {make: func(f *fakeRegistry) ocispec.Descriptor {
			return f.manifest("amd64", []digest.Digest{digest.FromBytes(l)}, []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: "sha256:../../../../etc/passwd", Size: 10}})
		}},
		"manifest and index at once": {make: func(f *fakeRegistry) ocispec.Descriptor {
			m := f.image("amd64", l)
			var v map[string]any
			_ = json.Unmarshal(f.blobs[m.Digest], &v)
			v["manifests"] = []ocispec.Descriptor{m}
			return f.putJSON(ocispec.MediaTypeImageManifest, v)
		}},
		"manifest called an index": {make: func(f *fakeRegistry) ocispec.Descriptor {
			m := f.image("amd64", l)
			f.types[m.Digest] = ocispec.MediaTypeImageIndex
			return m
		}},
		"traversal": {make: func(f *fakeRegistry) ocispec.Descriptor {
			return f.image("amd64", mkTar(t, fileEntry("../../../../../../tmp/evil", "x")))
		}},
		"not a tar": {make: func(f *fakeRegistry) ocispec.Descriptor {
			return f.image("amd64", []byte(strings.Repeat("nonsense", 1000)))
		}},
		"schema 1": {make: func(f *fakeRegistry) ocispec.Descriptor {
			return f.putJSON("application/vnd.docker.distribution.manifest.v1+json", map[string]any{"schemaVersion": 1, "fsLayers": []any{}})
		}},
		"huge manifest": {make: func(f *fakeRegistry) ocispec.Descriptor {
			return f.put(ocispec.MediaTypeImageManifest, bytes.Repeat([]byte(" "), 9<<20))
		}},
		"index in itself": {make: func(f *fakeRegistry) ocispec.Descriptor {
			d := f.image("arm64", l)
			for range 10 {
				d = f.putJSON(ocispec.MediaTypeImageIndex, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d}})
			}
			return d
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFakeRegistry(t)
			f.bend = tc.bend
			if tc.make == nil {
				tc.make = func(f *fakeRegistry) ocispec.Descriptor { return f.image("amd64", l) }
			}
			d := tc.make(f)
			f.tags["1"] = d.Digest
			s := open(t)
			if img, err := s.Pull(context.Background(), f.addr+"/x:1", PullOptions{}); err == nil {
				t.Errorf("pulled %s", img.ID)
			} else {
				t.Log(err)
			}
			empty(t, s)
		})
	}
}

// TestPullResumes breaks the connection in the middle of a blob several times.
func TestPullResumes(t *testing.T) {
	f := newFakeRegistry(t)
	noise := make([]byte, 300_000)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(noise)
	d := f.image("amd64", mkTar(t, fileEntry("f", string(noise))))
	f.tags["1"] = d.Digest
	var breaks atomic.Int32
	f.bend = func(w http.ResponseWriter, r *http.Request, d digest.Digest, b []byte) bool {
		if len(b) < 100_000 || breaks.Add(1) > 3 {
			return false
		}
		from := 0
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(b)-1, len(b)))
			w.Header().Set("Content-Length", fmt.Sprint(len(b)-from))
			w.WriteHeader(http.StatusPartialContent)
		} else {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		}
		_, _ = w.Write(b[from : from+50_000])
		panic(http.ErrAbortHandler)
	}
	s := open(t)
	if _, err := s.Pull(context.Background(), f.addr+"/x:1", PullOptions{}); err != nil {
		t.Fatal(err)
	}
	if breaks.Load() < 4 {
		t.Errorf("%d requests for the blob", breaks.Load())
	}
}

// TestForeignURLs: a manifest must not send us to other servers.
func TestForeignURLs(t *testing.T) {
	var asked atomic.Bool
	other := newFakeRegistry(t)
	other.bend = func(w http.ResponseWriter, r *http.Request, d digest.Digest, b []byte) bool {
		asked.Store(true)
		return false
	}
	f := newFakeRegistry(t)
	l := mkTar(t, fileEntry("f", "x"))
	d := other.put(ocispec.MediaTypeImageLayerGzip, gz(l))
	d.URLs = []string{"http://" + other.addr + "/v2/x/blobs/" + d.Digest.String()}
	f.tags["1"] = f.manifest("amd64", []digest.Digest{digest.FromBytes(l)}, []ocispec.Descriptor{d}).Digest
	if _, err := open(t).Pull(context.Background(), f.addr+"/x:1", PullOptions{}); err == nil || asked.Load() {
		t.Errorf("asked another server: %v, %v", asked.Load(), err)
	}
}

// TestSlowLoris: a registry that sends nothing more is given up.
func TestSlowLoris(t *testing.T) {
	f := newFakeRegistry(t)
	f.tags["1"] = f.image("amd64", mkTar(t, fileEntry("f", "x"))).Digest
	f.bend = func(w http.ResponseWriter, r *http.Request, d digest.Digest, b []byte) bool {
		if !bytes.HasPrefix(b, []byte{0x1f, 0x8b}) {
			return false
		}
		_, _ = w.Write(b[:5])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	}
	s := open(t)
	s.stall = 20 * time.Millisecond
	if _, err := s.Pull(context.Background(), f.addr+"/x:1", PullOptions{}); !errors.Is(err, errStalled) {
		t.Errorf("%v", err)
	}
	empty(t, s)
}

// TestRedirectKeepsCredentials: who is redirected to does not get them, and a
// verified registry does not get us to speak plain HTTP.
func TestRedirectKeepsCredentials(t *testing.T) {
	var leaked atomic.Value
	other := newFakeRegistry(t)
	l := mkTar(t, fileEntry("f", "x"))
	other.put(ocispec.MediaTypeImageLayerGzip, gz(l))
	other.bend = func(w http.ResponseWriter, r *http.Request, d digest.Digest, b []byte) bool {
		if a := r.Header.Get("Authorization"); a != "" {
			leaked.Store(a)
		}
		return false
	}
	f := newFakeRegistry(t)
	f.tags["1"] = f.image("amd64", l).Digest
	f.bend = func(w http.ResponseWriter, r *http.Request, d digest.Digest, b []byte) bool {
		if _, _, ok := r.BasicAuth(); !ok {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if bytes.HasPrefix(b, []byte{0x1f, 0x8b}) {
			_, port, _ := strings.Cut(other.addr, ":")
			http.Redirect(w, r, "http://localhost:"+port+r.URL.Path, http.StatusTemporaryRedirect)
			return true
		}
		return false
	}
	s := open(t)
	if _, err := s.Pull(context.Background(), f.addr+"/x:1", PullOptions{Auth: &registry.AuthConfig{Username: "u", Password: "p"}}); err != nil {
		t.Error(err)
	}
	if a := leaked.Load(); a != nil {
		t.Errorf("credentials sent elsewhere: %v", a)
	}
	c, err := s.client("registry.invalid", "")
	if err != nil {
		t.Fatal(err)
	}
	from, _ := http.NewRequest(http.MethodGet, "https://registry.invalid/", nil)
	to, _ := http.NewRequest(http.MethodGet, "http://registry.invalid/", nil)
	if c.CheckRedirect(to, []*http.Request{from}) == nil {
		t.Error("redirected from https to http")
	}
}

func TestPullCancelled(t *testing.T) {
	f := newFakeRegistry(t)
	f.tags["1"] = f.image("amd64", mkTar(t, fileEntry("f", strings.Repeat("x", 1<<20))), mkTar(t, fileEntry("g", "y"))).Digest
	ctx, cancel := context.WithCancel(context.Background())
	f.bend = func(w http.ResponseWriter, r *http.Request, d digest.Digest, b []byte) bool {
		if f.types[d] == "" && bytes.HasPrefix(b, []byte{0x1f, 0x8b}) {
			_, _ = w.Write(b[:10])
			w.(http.Flusher).Flush()
			cancel()
			<-r.Context().Done()
			return true
		}
		return false
	}
	s := open(t)
	if _, err := s.Pull(ctx, f.addr+"/x:1", PullOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	empty(t, s)
}

func TestLoadRefuses(t *testing.T) {
	l := mkTar(t, fileEntry("f", "x"))
	good := dockerArchive(t, []string{"a:1"}, l)
	oci := func() *ociArchive {
		o := &ociArchive{}
		o.image(t, "amd64", "a:1", l)
		return o
	}
	for name, b := range map[string][]byte{
		"empty":          {},
		"text":           []byte("hello"),
		"zeros":          make([]byte, 10240),
		"truncated":      good[:len(good)/2],
		"traversal":      dockerArchive(t, []string{"a:1"}, mkTar(t, fileEntry("../x", "y"))),
		"no config":      mkTar(t, fileEntry("manifest.json", `[{"Config":"c.json","Layers":[]}]`)),
		"config outside": mkTar(t, fileEntry("manifest.json", `[{"Config":"../../../../etc/passwd","Layers":[]}]`)),
		"link as config": mkTar(t, entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: "c.json", Linkname: "/etc/passwd"}},
			fileEntry("manifest.json", `[{"Config":"c.json","Layers":[]}]`)),
		"link loop": mkTar(t, entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: "c.json", Linkname: "c.json"}},
			fileEntry("manifest.json", `[{"Config":"c.json","Layers":[]}]`)),
		"bad tag":  dockerArchive(t, []string{"A B:1"}, l),
		"no image": mkTar(t, fileEntry("manifest.json", `[]`)),
		"no layer": mkTar(t, fileEntry("c.json", `{"rootfs":{"diff_ids":["`+digest.FromBytes(l).String()+`"]}}`), fileEntry("manifest.json", `[{"Config":"c.json","Layers":["x"]}]`)),
		"wrong blob": oci().bend(func(m map[string][]byte) {
			m["blobs/sha256/"+digest.FromBytes(l).Encoded()] = mkTar(t, fileEntry("f", "y"))
		}).bytes(t),
		"wrong document": oci().bend(func(m map[string][]byte) { m["blobs/sha256/"+strings.Repeat("0", 64)] = []byte("{}") }).bytes(t),
		"missing blob":   oci().bend(func(m map[string][]byte) { delete(m, "blobs/sha256/"+digest.FromBytes(l).Encoded()) }).bytes(t),
		"not a digest":   oci().bend(func(m map[string][]byte) { m["blobs/sha256/zz"] = []byte("{}") }).bytes(t),
		"layout version": oci().bend(func(m map[string][]byte) { m["oci-layout"] = []byte(`{"imageLayoutVersion":"9.0.0"}`) }).bytes(t),
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			if got, err := s.Load(context.Background(), bytes.NewReader(b), LoadOptions{}); err == nil {
				t.Errorf("loaded %v", got)
			} else {
				t.Log(err)
			}
			empty(t, s)
		})
	}
}

// TestBombsAreBounded loads and pulls what decompresses to far more than allowed.
func TestBombsAreBounded(t *testing.T) {
	small := func(c *Config) { c.Limits.LayerBytes, c.Limits.LayerEntries = 1<<20, 100 }
	bomb := mkTar(t, fileEntry("zeros", string(make([]byte, 20<<20))))
	zw, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, z := range map[string][]byte{"gzip": gz(bomb), "zstd": zw.EncodeAll(bomb, nil), "no tar": gz(make([]byte, 100<<20))} {
		f := newFakeRegistry(t)
		f.tags["1"] = f.manifest("amd64", []digest.Digest{digest.FromBytes(bomb)}, []ocispec.Descriptor{f.put(ocispec.MediaTypeImageLayerGzip, z)}).Digest
		s := open(t, small)
		if _, err := s.Pull(context.Background(), f.addr+"/x:1", PullOptions{}); !errdefs.IsResourceExhausted(err) {
			t.Errorf("%s: %v", name, err)
		}
		empty(t, s)
	}
}

// ociArchive builds an OCI layout.
type ociArchive struct {
	files map[string][]byte
	idx   ocispec.Index
}

func (o *ociArchive) put(mt string, b []byte) ocispec.Descriptor {
	if o.files == nil {
		o.files = map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	}
	d := digest.FromBytes(b)
	o.files["blobs/sha256/"+d.Encoded()] = b
	return ocispec.Descriptor{MediaType: mt, Digest: d, Size: int64(len(b))}
}

func (o *ociArchive) json(mt string, v any) ocispec.Descriptor {
	b, _ := json.Marshal(v)
	return o.put(mt, b)
}

func (o *ociArchive) image(t testing.TB, arch, name string, layers ...[]byte) ocispec.Descriptor {
	var diffs []digest.Digest
	var descs []ocispec.Descriptor
	for _, l := range layers {
		diffs = append(diffs, digest.FromBytes(l))
		descs = append(descs, o.put(ocispec.MediaTypeImageLayer, l))
	}
	conf := o.json(ocispec.MediaTypeImageConfig, ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: arch}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffs}})
	m := o.json(ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: conf, Layers: descs})
	if name != "" {
		m.Annotations = map[string]string{annotationName: name}
		o.idx.Manifests = append(o.idx.Manifests, m)
	}
	m.Annotations = nil
	m.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
	return m
}

func (o *ociArchive) bend(f func(map[string][]byte)) *ociArchive {
	f(o.files)
	return o
}

func (o *ociArchive) bytes(t testing.TB) []byte {
	b, _ := json.Marshal(o.idx)
	es := []entry{fileEntry("index.json", string(b))}
	for n, b := range o.files {
		es = append(es, fileEntry(n, string(b)))
	}
	return mkTar(t, es...)
}

func FuzzLoad(f *testing.F) {
	l := mkTar(f, fileEntry("f", "x"))
	f.Add(dockerArchive(f, []string{"a:1"}, l))
	o := &ociArchive{}
	o.image(f, "amd64", "a:1", l)
	f.Add(o.bytes(f))
	f.Add(gz(dockerArchive(f, []string{"a:1"}, gz(l))))
	s := open(f, func(c *Config) { c.Limits = Limits{LayerBytes: 1 << 20, LayerEntries: 100, BlobBytes: 1 << 20} })
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := s.Load(context.Background(), bytes.NewReader(b), LoadOptions{})
		if err != nil {
			return
		}
		for _, l := range got {
			img, err := s.Resolve(context.Background(), l.ID, nil)
			if err != nil {
				t.Fatalf("loaded but not there: %v", err)
			}
			if _, err := s.Layers(context.Background(), img); err != nil {
				t.Fatalf("loaded but not unpacked: %v", err)
			}
			if err := s.Save(context.Background(), io.Discard, []string{l.ID}, nil); err != nil {
				t.Fatalf("loaded but not saved: %v", err)
			}
		}
	})
}
