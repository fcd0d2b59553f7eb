package image

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// registryProgram builds distribution's registry once for the machine.
var registryProgram = sync.OnceValues(func() (string, error) {
	dir := os.Getenv("TENON_CACHE")
	if dir == "" {
		dir = "/var/cache/tenon-test"
	}
	cmd := exec.Command("../../test/tools/registry.sh", dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
})

// startRegistry runs a real registry on loopback and returns its address.
// extra is more of its environment.
func startRegistry(t testing.TB, extra ...string) string {
	t.Helper()
	prog, err := registryProgram()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(conf, []byte("version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: "+dir+"/data\n  delete:\n    enabled: true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	cmd := exec.Command(prog, "serve", conf)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.Env = append(os.Environ(), append(extra, "REGISTRY_HTTP_ADDR="+addr, "OTEL_TRACES_EXPORTER=none")...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("registry: %s", log.String())
		}
	})
	for deadline := time.Now().Add(time.Minute); ; {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			return addr
		}
		if time.Now().After(deadline) {
			t.Fatalf("registry does not listen: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestPushPull(t *testing.T) {
	ctx := context.Background()
	addr := startRegistry(t)
	a := open(t)
	var layers [][]byte
	for i := range 6 {
		layers = append(layers, mkTar(t, dirEntry("d"), fileEntry(fmt.Sprintf("d/f%d", i), strings.Repeat(fmt.Sprint(i), 1000*(i+1)))))
	}
	if _, err := a.Load(ctx, bytes.NewReader(dockerArchive(t, []string{addr + "/team/app:v1"}, layers...)), LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	var result PushResult
	err := a.Push(ctx, addr+"/team/app:v1", PushOptions{Progress: func(p Progress) {
		if r, ok := p.Aux.(PushResult); ok {
			result = r
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	img, err := a.Resolve(ctx, addr+"/team/app:v1", nil)
	if err != nil {
		t.Fatal(err)
	}
	if result.Digest != img.ID || result.Tag != "v1" {
		t.Errorf("%+v", result)
	}
	b := open(t)
	status := map[string]int{}
	got, err := b.Pull(ctx, addr+"/team/app:v1", PullOptions{Progress: func(p Progress) { status[p.Status]++ }})
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != img.ID {
		t.Errorf("%s, pushed %s", got.ID, img.ID)
	}
	if status["Pull complete"] != 6 || status["Pulling fs layer"] != 6 {
		t.Errorf("%v", status)
	}
	dirs, err := b.Layers(ctx, got)
	if err != nil {
		t.Fatal(err)
	}
	m := mountOverlay(t, dirs)
	for i := range 6 {
		if st, err := os.Stat(fmt.Sprintf("%s/d/f%d", m, i)); err != nil || st.Size() != int64(1000*(i+1)) {
			t.Errorf("f%d: %v", i, err)
		}
	}
	status = map[string]int{}
	if _, err := b.Pull(ctx, addr+"/team/app@"+img.ID, PullOptions{Progress: func(p Progress) { status[p.Status]++ }}); err != nil {
		t.Fatal(err)
	}
	if status["Already exists"] != 6 {
		t.Errorf("%v", status)
	}
	if _, err := b.Pull(ctx, addr+"/team/app:nope", PullOptions{}); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	if err := a.Push(ctx, addr+"/team/app:v1", PushOptions{}); err != nil {
		t.Errorf("second push: %v", err)
	}
	if err := a.Tag(ctx, addr+"/team/app:v1", addr+"/team/app:v2"); err != nil {
		t.Fatal(err)
	}
	if err := a.Push(ctx, addr+"/team/app:v2", PushOptions{}); err != nil {
		t.Fatal(err)
	}
	if tags, err := b.Tags(ctx, addr+"/team/app", nil); err != nil || !slices.Equal(tags, []string{"v1", "v2"}) {
		t.Errorf("%v %v", tags, err)
	}
	if _, err := b.Tags(ctx, addr+"/none", nil); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	d, err := b.Distribution(ctx, addr+"/team/app:v1", nil)
	if err != nil || d.Descriptor.Digest.String() != img.ID || len(d.Platforms) != 1 || d.Platforms[0].Architecture != "amd64" {
		t.Errorf("%+v %v", d, err)
	}
}

func TestPullBasicAuth(t *testing.T) {
	ctx := context.Background()
	up := startRegistry(t)
	// The real registry behind a door that asks for a password.
	door := basicDoor(t, up, "u", "secret")
	a := open(t)
	if _, err := a.Load(ctx, bytes.NewReader(dockerArchive(t, []string{door + "/x:1"}, mkTar(t, fileEntry("f", "1")))), LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	good := &registry.AuthConfig{Username: "u", Password: "secret"}
	if err := a.Push(ctx, door+"/x:1", PushOptions{Auth: good}); err != nil {
		t.Fatal(err)
	}
	b := open(t)
	if _, err := b.Pull(ctx, door+"/x:1", PullOptions{}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("without credentials: %v", err)
	}
	if _, err := b.Pull(ctx, door+"/x:1", PullOptions{Auth: &registry.AuthConfig{Username: "u", Password: "no"}}); err == nil {
		t.Error("wrong password accepted")
	}
	if _, err := b.Pull(ctx, door+"/x:1", PullOptions{Auth: good}); err != nil {
		t.Error(err)
	}
	good.ServerAddress = door
	if st, err := b.CheckAuth(ctx, *good); err != nil || st != "Login Succeeded" {
		t.Errorf("%q %v", st, err)
	}
	if _, err := b.CheckAuth(ctx, registry.AuthConfig{ServerAddress: door, Username: "u", Password: "no"}); !errdefs.IsUnauthorized(err) {
		t.Errorf("%v", err)
	}
}

// basicDoor is a proxy that asks for basic authentication.
func basicDoor(t *testing.T, up, user, pass string) string {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, ok := r.BasicAuth(); !ok || u != user || p != pass {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		forward(w, r, up)
	}))
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String()
}

func forward(w http.ResponseWriter, r *http.Request, up string) {
	req := r.Clone(r.Context())
	req.URL.Scheme, req.URL.Host, req.RequestURI = "http", up, ""
	req.Header.Del("Authorization")
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	for k, v := range resp.Header {
		w.Header()[k] = v
	}
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, resp.Body)
}

func TestPullBearerToken(t *testing.T) {
	ctx := context.Background()
	up := startRegistry(t)
	var srv *httptest.Server
	var asked atomic.Int32
	srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			if u, p, _ := r.BasicAuth(); u != "u" || p != "secret" {
				_ = r.ParseForm()
				if r.Form.Get("username") != "u" || r.Form.Get("password") != "secret" {
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
			}
			asked.Add(1)
			_ = json.NewEncoder(w).Encode(map[string]any{"token": "tok", "access_token": "tok", "expires_in": 300})
			return
		}
		if r.Header.Get("Authorization") != "Bearer tok" {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="test",scope="repository:x:pull,push"`, r.Host))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		forward(w, r, up)
	}))
	t.Cleanup(srv.Close)
	addr := srv.Listener.Addr().String()
	a := open(t)
	if _, err := a.Load(ctx, bytes.NewReader(dockerArchive(t, []string{addr + "/x:1"}, mkTar(t, fileEntry("f", "1")))), LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	auth := &registry.AuthConfig{Username: "u", Password: "secret"}
	if err := a.Push(ctx, addr+"/x:1", PushOptions{Auth: auth}); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t).Pull(ctx, addr+"/x:1", PullOptions{Auth: auth}); err != nil {
		t.Error(err)
	}
	if tags, err := open(t).Tags(ctx, addr+"/x", auth); err != nil || len(tags) != 1 {
		t.Errorf("%v %v", tags, err)
	}
	if _, err := open(t).CheckAuth(ctx, registry.AuthConfig{Username: "u", Password: "no", ServerAddress: addr}); !errdefs.IsUnauthorized(err) {
		t.Errorf("%v", err)
	}
	if asked.Load() == 0 {
		t.Error("no token asked for")
	}
	if _, err := open(t).Pull(ctx, addr+"/x:1", PullOptions{}); err == nil {
		t.Error("pulled without credentials")
	}
}

func TestMirrors(t *testing.T) {
	ctx := context.Background()
	addr := startRegistry(t)
	a := open(t)
	if _, err := a.Load(ctx, bytes.NewReader(dockerArchive(t, []string{addr + "/library/m:1"}, mkTar(t, fileEntry("f", "1")))), LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := a.Push(ctx, addr+"/library/m:1", PushOptions{}); err != nil {
		t.Fatal(err)
	}
	var leaked atomic.Bool
	dead := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			leaked.Store(true)
		}
		w.WriteHeader(http.StatusInternalServerError)
	}))
	defer dead.Close()
	b := open(t, func(c *Config) {
		c.Registries.Mirrors = map[string][]string{
			"docker.io":        {dead.URL, "http://" + addr},
			"registry.invalid": {"http://127.0.0.1:1", addr},
		}
	})
	auth := &registry.AuthConfig{Username: "u", Password: "p"}
	if _, err := b.Pull(ctx, "m:1", PullOptions{Auth: auth}); err != nil {
		t.Errorf("docker.io from its second mirror: %v", err)
	}
	if _, err := b.Pull(ctx, "registry.invalid/library/m:1", PullOptions{}); err != nil {
		t.Errorf("any host's mirror: %v", err)
	}
	if leaked.Load() {
		t.Error("a mirror got the registry's credentials")
	}
	c := open(t, func(c *Config) {
		c.Registries.Mirrors = map[string][]string{"*": {dead.URL}}
	})
	if _, err := c.Pull(ctx, addr+"/library/m:1", PullOptions{}); err != nil {
		t.Errorf("fallback to the registry itself: %v", err)
	}
}

func TestTLSWithOwnCA(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	kb, _ := x509.MarshalECPrivateKey(key)
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	writeFile(t, dir+"/cert.pem", certPEM)
	writeFile(t, dir+"/key.pem", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: kb}))
	addr := startRegistry(t, "REGISTRY_HTTP_TLS_CERTIFICATE="+dir+"/cert.pem", "REGISTRY_HTTP_TLS_KEY="+dir+"/key.pem")
	certs := t.TempDir()
	if err := os.Mkdir(filepath.Join(certs, addr), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(certs, addr, "ca.crt"), certPEM)
	a := open(t, func(c *Config) { c.Registries.CertsDir = certs })
	if _, err := a.Load(ctx, bytes.NewReader(dockerArchive(t, []string{addr + "/x:1"}, mkTar(t, fileEntry("f", "1")))), LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := a.Push(ctx, addr+"/x:1", PushOptions{}); err != nil {
		t.Fatal(err)
	}
	other := t.TempDir()
	if err := os.Mkdir(filepath.Join(other, addr), 0o700); err != nil {
		t.Fatal(err)
	}
	k2, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	der2, _ := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &k2.PublicKey, k2)
	writeFile(t, filepath.Join(other, addr, "ca.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der2}))
	b := open(t, func(c *Config) { c.Registries.CertsDir = other })
	var ua x509.UnknownAuthorityError
	var cv *tls.CertificateVerificationError
	if _, err := b.Pull(ctx, addr+"/x:1", PullOptions{}); !errors.As(err, &ua) && !errors.As(err, &cv) {
		t.Errorf("wrong CA: %v", err)
	}
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// fakeRegistry serves documents and blobs from memory and lets a test bend them.
type fakeRegistry struct {
	addr  string
	blobs map[digest.Digest][]byte
	types map[digest.Digest]string
	tags  map[string]digest.Digest
	bend  func(w http.ResponseWriter, r *http.Request, d digest.Digest, b []byte) bool
}

func newFakeRegistry(t testing.TB) *fakeRegistry {
	f := &fakeRegistry{blobs: map[digest.Digest][]byte{}, types: map[digest.Digest]string{}, tags: map[string]digest.Digest{}}
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	f.addr = srv.Listener.Addr().String()
	return f
}

func (f *fakeRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p := strings.Split(r.URL.Path, "/")
	ref := p[len(p)-1]
	d := digest.Digest(ref)
	if t, ok := f.tags[ref]; ok {
		d = t
	}
	b, ok := f.blobs[d]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	if f.bend != nil && f.bend(w, r, d, b) {
		return
	}
	if mt := f.types[d]; mt != "" {
		w.Header().Set("Content-Type", mt)
		w.Header().Set("Docker-Content-Digest", d.String())
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
}

func (f *fakeRegistry) put(mt string, b []byte) ocispec.Descriptor {
	d := digest.FromBytes(b)
	f.blobs[d] = b
	if strings.Contains(mt, "manifest") || strings.Contains(mt, "index") {
		f.types[d] = mt
	}
	return ocispec.Descriptor{MediaType: mt, Digest: d, Size: int64(len(b))}
}

func (f *fakeRegistry) putJSON(mt string, v any) ocispec.Descriptor {
	b, _ := json.Marshal(v)
	return f.put(mt, b)
}

func gz(b []byte) []byte {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, _ = w.Write(b)
	_ = w.Close()
	return z.Bytes()
}

// image puts an image of gzipped layers for a platform and returns its manifest.
func (f *fakeRegistry) image(arch string, layers ...[]byte) ocispec.Descriptor {
	var diffs []digest.Digest
	descs := []ocispec.Descriptor{}
	for _, l := range layers {
		diffs = append(diffs, digest.FromBytes(l))
		descs = append(descs, f.put(ocispec.MediaTypeImageLayerGzip, gz(l)))
	}
	return f.manifest(arch, diffs, descs)
}

func (f *fakeRegistry) manifest(arch string, diffs []digest.Digest, layers []ocispec.Descriptor) ocispec.Descriptor {
	conf := f.putJSON(ocispec.MediaTypeImageConfig, ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: arch}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffs}})
	m := f.putJSON(ocispec.MediaTypeImageManifest, map[string]any{"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageManifest, "config": conf, "layers": layers})
	m.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
	return m
}

// TestPullDockerList pulls what Docker's registries of old hold: a manifest list
// of schema 2 manifests.
func TestPullDockerList(t *testing.T) {
	ctx := context.Background()
	f := newFakeRegistry(t)
	const list, man = "application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.docker.distribution.manifest.v2+json"
	var ms []ocispec.Descriptor
	for _, p := range []ocispec.Platform{{OS: "linux", Architecture: "arm", Variant: "v7"}, {OS: "linux", Architecture: "amd64"}, {OS: "windows", Architecture: "amd64"}} {
		l := mkTar(t, fileEntry("arch", p.Architecture))
		conf := f.putJSON("application/vnd.docker.container.image.v1+json", ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(l)}}})
		d := f.putJSON(man, map[string]any{"schemaVersion": 2, "mediaType": man, "config": conf, "layers": []ocispec.Descriptor{f.put("application/vnd.docker.image.rootfs.diff.tar.gzip", gz(l))}})
		d.Platform = &p
		ms = append(ms, d)
	}
	idx := f.putJSON(list, map[string]any{"schemaVersion": 2, "mediaType": list, "manifests": ms})
	f.tags["1"] = idx.Digest
	s := open(t)
	for plat, want := range map[string]int{"": 1, "linux/arm/v7": 0, "linux/arm": 0} {
		var p *ocispec.Platform
		if plat != "" {
			parsed, err := platforms.Parse(plat)
			if err != nil {
				t.Fatal(err)
			}
			p = &parsed
		}
		img, err := s.Pull(ctx, f.addr+"/m:1", PullOptions{Platform: p})
		if err != nil || img.ID != idx.Digest.String() || img.Manifest.Digest != ms[want].Digest {
			t.Errorf("%s: %+v %v", plat, img, err)
		}
	}
	// What is not a list has its one platform.
	f.tags["2"] = ms[1].Digest
	if _, err := s.Pull(ctx, f.addr+"/m:2", PullOptions{Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64"}}); !errors.Is(err, ErrPlatform) {
		t.Errorf("%v", err)
	}
	if img, err := s.Pull(ctx, f.addr+"/m:2", PullOptions{Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"}}); err != nil || img.ID != ms[1].Digest.String() {
		t.Errorf("%v", err)
	}
	// A part of the list can be pushed, as the image it is.
	real := startRegistry(t)
	if err := s.Tag(ctx, f.addr+"/m:1", real+"/m:1"); err != nil {
		t.Fatal(err)
	}
	var said []string
	if err := s.Push(ctx, real+"/m:1", PushOptions{Progress: func(p Progress) { said = append(said, p.Status) }}); err != nil {
		t.Fatal(err)
	}
	if img, err := open(t).Pull(ctx, real+"/m:1", PullOptions{}); err != nil || img.ID != ms[1].Digest.String() {
		t.Errorf("%+v %v", img, err)
	}
	if !strings.HasPrefix(said[len(said)-1], "Not all multiplatform-content") {
		t.Errorf("%q", said)
	}
	// All of it is pushed as the list.
	if _, err := s.Pull(ctx, f.addr+"/m:1", PullOptions{AllPlatforms: true}); err != nil {
		t.Fatal(err)
	}
	if err := s.Push(ctx, real+"/m:1", PushOptions{}); err != nil {
		t.Fatal(err)
	}
	if img, err := open(t).Pull(ctx, real+"/m:1", PullOptions{}); err != nil || img.ID != idx.Digest.String() {
		t.Errorf("%+v %v", img, err)
	}
}

func TestPullIndex(t *testing.T) {
	ctx := context.Background()
	f := newFakeRegistry(t)
	amd := f.image("amd64", mkTar(t, fileEntry("arch", "amd64")))
	arm := f.image("arm64", mkTar(t, fileEntry("arch", "arm64")))
	att := f.image("unknown", mkTar(t, fileEntry("sbom", "{}")))
	att.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	att.Annotations = map[string]string{annotationRefType: attestation, annotationRefDigest: amd.Digest.String()}
	idx := f.putJSON(ocispec.MediaTypeImageIndex, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{arm, amd, att}})
	f.tags["1"] = idx.Digest
	s := open(t, func(c *Config) { c.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"} })
	img, err := s.Pull(ctx, f.addr+"/m:1", PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if img.ID != idx.Digest.String() || img.Manifest.Digest != amd.Digest || img.Platform.Architecture != "amd64" {
		t.Errorf("%+v", img)
	}
	if !s.hasBlob(att.Digest, -1) {
		t.Error("attestation not kept")
	}
	if _, err := s.Resolve(ctx, f.addr+"/m:1", &ocispec.Platform{OS: "linux", Architecture: "arm64"}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "linux/amd64") {
		t.Errorf("%v", err)
	}
	arm64 := &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	if _, err := s.Pull(ctx, f.addr+"/m:1", PullOptions{Platform: &ocispec.Platform{OS: "linux", Architecture: "s390x"}}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "linux/arm64") {
		t.Errorf("%v", err)
	}
	img2, err := s.Pull(ctx, f.addr+"/m:1", PullOptions{Platform: arm64})
	if err != nil {
		t.Fatal(err)
	}
	if img2.Platform.Architecture != "arm64" || img2.ID != img.ID {
		t.Errorf("%+v", img2)
	}
	if got, err := s.Resolve(ctx, f.addr+"/m:1", nil); err != nil || got.Platform.Architecture != "amd64" {
		t.Errorf("%v %v", got, err)
	}
	ins, err := s.Inspect(ctx, f.addr+"/m:1", nil, true)
	if err != nil || len(ins.Manifests) != 3 || ins.Manifests[2].Kind != "attestation" || !ins.Manifests[0].Available {
		t.Errorf("%+v %v", ins, err)
	}
	// A round trip of the whole index keeps the ID.
	var ar bytes.Buffer
	if err := s.Save(ctx, &ar, []string{f.addr + "/m:1"}, nil); err != nil {
		t.Fatal(err)
	}
	o := open(t)
	l, err := o.Load(ctx, bytes.NewReader(ar.Bytes()), LoadOptions{})
	if err != nil || len(l) != 1 || l[0].ID != img.ID || l[0].Ref != f.addr+"/m:1" {
		t.Fatalf("%v %v", l, err)
	}
	var again bytes.Buffer
	if err := o.Save(ctx, &again, []string{f.addr + "/m:1"}, nil); err != nil || !bytes.Equal(ar.Bytes(), again.Bytes()) {
		t.Errorf("second save differs: %v", err)
	}
	var only bytes.Buffer
	if err := s.Save(ctx, &only, []string{img.ID}, arm64); err != nil {
		t.Fatal(err)
	}
	l, err = open(t).Load(ctx, &only, LoadOptions{Platform: arm64})
	if err != nil || l[0].ID != img.ID || l[0].Ref != "" {
		t.Errorf("%v %v", l, err)
	}
}
