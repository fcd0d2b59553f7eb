package registry

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/crypto/bcrypt"

	"tenon.dev/tenon/internal/image"
)

// served is a registry on loopback.
type served struct {
	t     *testing.T
	url   string
	addr  string
	root  string
	store *image.Store
	reg   *Registry
	stop  func()
}

func openStore(t *testing.T, root string) *image.Store {
	t.Helper()
	s, err := image.Open(context.Background(), image.Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func serve(t *testing.T, change ...func(*Config)) *served {
	t.Helper()
	root := t.TempDir()
	s := openStore(t, root)
	v := &served{t: t, root: root, store: s}
	v.listen(change...)
	t.Cleanup(func() {
		v.stop()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return v
}

func (v *served) listen(change ...func(*Config)) {
	v.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		v.t.Fatal(err)
	}
	v.addr = l.Addr().String()
	reps, err := v.store.Repositories(v.addr)
	if err != nil {
		v.t.Fatal(err)
	}
	cfg := Config{Repositories: reps}
	for _, c := range change {
		c(&cfg)
	}
	v.reg = New(cfg)
	v.url = "http://" + v.addr
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- v.reg.Serve(ctx, l, nil) }()
	v.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				v.t.Error(err)
			}
		case <-time.After(30 * time.Second):
			v.t.Error("the registry does not end")
		}
	})
}

var client = &http.Client{Timeout: 30 * time.Second}

// do sends a request; header are pairs.
func (v *served) do(method, path string, body io.Reader, header ...string) (*http.Response, string) {
	v.t.Helper()
	if !strings.HasPrefix(path, "http") {
		path = v.url + path
	}
	req, err := http.NewRequest(method, path, body)
	if err != nil {
		v.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		v.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	return resp, string(b)
}

// want sends a request and checks the status, and the error's code if it is not "".
func (v *served) want(status int, code, method, path string, body io.Reader, header ...string) (*http.Response, string) {
	v.t.Helper()
	resp, b := v.do(method, path, body, header...)
	if resp.StatusCode != status || code != "" && !strings.Contains(b, `"code":"`+code+`"`) {
		v.t.Errorf("%s %.200s: %d %.300s, want %d %s", method, path, resp.StatusCode, b, status, code)
	}
	return resp, b
}

func (v *served) push(repo string, data []byte) digest.Digest {
	v.t.Helper()
	d := digest.FromBytes(data)
	v.want(201, "", "POST", "/v2/"+repo+"/blobs/uploads/?digest="+d.String(), bytes.NewReader(data))
	return d
}

// pushImage pushes an image of one layer and returns its manifest's digest.
func (v *served) pushImage(repo, tag string, layer []byte) digest.Digest {
	v.t.Helper()
	v.push(repo, layer)
	conf, err := json.Marshal(map[string]any{
		"os": "linux", "architecture": "amd64",
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{digest.FromBytes(layer).String()}},
	})
	if err != nil {
		v.t.Fatal(err)
	}
	v.push(repo, conf)
	m := ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(conf), Size: int64(len(conf))},
		Layers:    []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(layer), Size: int64(len(layer))}},
	}
	m.SchemaVersion = 2
	b, err := json.Marshal(m)
	if err != nil {
		v.t.Fatal(err)
	}
	v.want(201, "", "PUT", "/v2/"+repo+"/manifests/"+tag, bytes.NewReader(b), "Content-Type", m.MediaType)
	return digest.FromBytes(b)
}

// files lists the files in the store's content directory.
func (v *served) files(part string) (out []string) {
	v.t.Helper()
	err := filepath.WalkDir(filepath.Join(v.root, "content", part), func(path string, d os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err == nil && !d.IsDir() {
			out = append(out, path)
		}
		return err
	})
	if err != nil {
		v.t.Fatal(err)
	}
	return out
}

// eventually waits for f to have nothing to complain about.
func eventually(t *testing.T, what string, f func() string) {
	t.Helper()
	var last string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if last = f(); last == "" {
			return
		}
	}
	t.Fatalf("%s: %s", what, last)
}

func TestConformance(t *testing.T) {
	dir := cmp.Or(os.Getenv("TENON_TEST_TOOLS"), os.Getenv("TENON_CACHE"), "/var/cache/tenon-test")
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // the first time it is compiled
	defer cancel()
	build := exec.CommandContext(ctx, "../../test/tools/conformance.sh", dir)
	build.Stderr = os.Stderr
	prog, err := build.Output()
	if err != nil {
		t.Fatalf("building the conformance tests: %v", err)
	}
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), 4)
	if err != nil {
		t.Fatal(err)
	}
	users, err := ParseUsers([]byte("me:" + string(hash) + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	v := serve(t, func(c *Config) { c.Users = users })
	run, cancel2 := context.WithTimeout(context.Background(), time.Minute)
	defer cancel2()
	cmd := exec.CommandContext(run, strings.TrimSpace(string(prog)), "-ginkgo.no-color")
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "OCI_ROOT_URL="+v.url, "OCI_NAMESPACE=team/app", "OCI_CROSSMOUNT_NAMESPACE=team/other",
		"OCI_USERNAME=me", "OCI_PASSWORD=secret", "OCI_TEST_PULL=1", "OCI_TEST_PUSH=1", "OCI_TEST_CONTENT_DISCOVERY=1",
		"OCI_TEST_CONTENT_MANAGEMENT=1", "OCI_HIDE_SKIPPED_WORKFLOWS=0", "OCI_AUTOMATIC_CROSSMOUNT=0", "OCI_REPORT_DIR="+cmd.Dir)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "| 0 Failed |") {
		t.Fatalf("%v\n%s", err, tail(string(out), 12000))
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "Passed") || strings.Contains(line, "WARNING") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if left := v.reg.uploadsUnderWay(); left > 8 {
		t.Errorf("%d uploads are under way still", left)
	}
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

func (g *Registry) uploadsUnderWay() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.uploads)
}

func TestPushedIsAnImage(t *testing.T) {
	v := serve(t)
	d := v.pushImage("team/app", "1", make([]byte, 1024))
	img, err := v.store.Resolve(t.Context(), v.addr+"/team/app:1", nil)
	if err != nil || img.ID != d.String() {
		t.Fatalf("%v, %v; want %s", img, err, d)
	}
	// What it has can be pulled, by whatever the engine calls it.
	if err := v.store.Tag(t.Context(), img.ID, "busybox:x"); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"busybox/manifests/x", "library/busybox/manifests/x", "team/app/manifests/" + d.String(), "library/busybox/manifests/x?ns=docker.io"} {
		resp, _ := v.want(200, "", "GET", "/v2/"+path, nil)
		if got := resp.Header.Get("Docker-Content-Digest"); got != d.String() {
			t.Errorf("%s: %s", path, got)
		}
	}
	v.want(404, "NAME_UNKNOWN", "GET", "/v2/team/app/manifests/1?ns=quay.io", nil)
	// But what is pushed never takes the engine's names.
	other := v.pushImage("busybox", "x", make([]byte, 2048))
	if img, err := v.store.Resolve(t.Context(), "busybox:x", nil); err != nil || img.ID != d.String() {
		t.Errorf("busybox:x: %v, %v; want %s", img, err, d)
	}
	if resp, _ := v.want(200, "", "HEAD", "/v2/busybox/manifests/x", nil); resp.Header.Get("Docker-Content-Digest") != other.String() {
		t.Error("a pull gets another than was pushed")
	}
	v.want(202, "", "DELETE", "/v2/busybox/manifests/"+other.String(), nil)
	v.want(404, "", "DELETE", "/v2/busybox/manifests/"+d.String(), nil)
	if _, err := v.store.Resolve(t.Context(), other.String(), nil); err == nil {
		t.Error("a removed image is there still")
	}
	// The engine's removal is the registry's.
	if _, err := v.store.Remove(t.Context(), v.addr+"/team/app:1", image.RemoveOptions{}, nil); err != nil {
		t.Fatal(err)
	}
	v.want(404, "", "GET", "/v2/team/app/manifests/1", nil)
	if _, err := v.store.Remove(t.Context(), "busybox:x", image.RemoveOptions{}, nil); err != nil {
		t.Fatal(err)
	}
	v.want(404, "", "GET", "/v2/team/app/manifests/"+d.String(), nil)
}

// Artifacts are the registry's alone, and outlive a restart.
func TestArtifacts(t *testing.T) {
	v := serve(t)
	subject := v.pushImage("app", "1", make([]byte, 512))
	empty := v.push("app", []byte("{}"))
	m := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"test/sig","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},"layers":[],"subject":{"mediaType":%q,"digest":%q,"size":1},"annotations":{"a":"b"}}`,
		ocispec.MediaTypeImageManifest, empty, ocispec.MediaTypeImageManifest, subject)
	resp, _ := v.want(201, "", "PUT", "/v2/app/manifests/sig", strings.NewReader(m), "Content-Type", ocispec.MediaTypeImageManifest)
	if resp.Header.Get("OCI-Subject") != subject.String() {
		t.Error("no OCI-Subject")
	}
	list, err := v.store.List(t.Context(), image.ListOptions{})
	if err != nil || len(list) != 1 {
		t.Fatalf("%d images, %v", len(list), err)
	}
	v.stop()
	if err := v.store.Close(); err != nil {
		t.Fatal(err)
	}
	v.store = openStore(t, v.root)
	// Another address, the same namespace.
	addr := v.addr
	v.listen(func(c *Config) {
		if c.Repositories, err = v.store.Repositories(addr); err != nil {
			t.Fatal(err)
		}
	})
	defer func() {
		v.stop()
		if err := v.store.Close(); err != nil {
			t.Error(err)
		}
	}()
	if _, b := v.want(200, "", "GET", "/v2/app/manifests/sig", nil); b != m {
		t.Errorf("%s", b)
	}
	v.want(200, "", "GET", "/v2/app/blobs/"+empty.String(), nil)
	resp, b := v.want(200, "", "GET", "/v2/app/referrers/"+subject.String()+"?artifactType=test/sig", nil)
	if resp.Header.Get("OCI-Filters-Applied") != "artifactType" || !strings.Contains(b, `"artifactType":"test/sig"`) || !strings.Contains(b, `{"a":"b"}`) {
		t.Errorf("referrers: %s", b)
	}
	if _, b := v.want(200, "", "GET", "/v2/app/referrers/"+subject.String()+"?artifactType=other", nil); strings.Contains(b, "test/sig") {
		t.Errorf("filtered: %s", b)
	}
	if _, b := v.want(200, "", "GET", "/v2/app/tags/list?n=1", nil); !strings.Contains(b, `["1"]`) {
		t.Errorf("tags: %s", b)
	}
	// With the artifact go its blobs.
	v.want(202, "", "DELETE", "/v2/app/manifests/sig", nil)
	v.want(202, "", "DELETE", "/v2/app/manifests/"+digest.FromString(m).String(), nil)
	eventually(t, "the artifact's blob", func() string {
		for _, f := range v.files("blobs") {
			if filepath.Base(f) == empty.Encoded() {
				return "it is there still"
			}
		}
		return ""
	})
}

func TestUploads(t *testing.T) {
	v := serve(t)
	data := bytes.Repeat([]byte("0123456789"), 100)
	d := digest.FromBytes(data)
	start := func() string {
		t.Helper()
		resp, _ := v.want(202, "", "POST", "/v2/app/blobs/uploads/", nil)
		return resp.Header.Get("Location")
	}
	loc := start()
	v.want(202, "", "PATCH", loc, bytes.NewReader(data[:300]), "Content-Range", "0-299")
	// A client that is cut off goes on where it was.
	c, err := net.Dial("tcp", v.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "PATCH %s HTTP/1.1\r\nHost: %s\r\nContent-Length: 700\r\n\r\n%s", loc, v.addr, data[300:500]); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what was sent is written", func() string {
		for _, f := range v.files("ingest-t") {
			if st, err := os.Stat(f); err == nil && st.Size() == 500 {
				return ""
			}
		}
		return "no"
	})
	v.want(416, "BLOB_UPLOAD_INVALID", "PATCH", loc, bytes.NewReader(data)) // one at a time
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the upload is free", func() string {
		resp, b := v.do("GET", loc, nil)
		if resp.StatusCode != 204 || resp.Header.Get("Range") != "0-499" {
			return fmt.Sprint(resp.StatusCode, resp.Header.Get("Range"), b)
		}
		return ""
	})
	resp, _ := v.want(416, "BLOB_UPLOAD_INVALID", "PATCH", loc, bytes.NewReader(data[600:]), "Content-Range", "600-999")
	if resp.Header.Get("Range") != "0-499" {
		t.Errorf("Range: %q", resp.Header.Get("Range"))
	}
	v.want(404, "BLOB_UPLOAD_UNKNOWN", "PATCH", strings.Replace(loc, "/app/", "/other/", 1), bytes.NewReader(data))
	v.want(201, "", "PUT", loc+"?digest="+d.String(), bytes.NewReader(data[500:]))
	if _, b := v.want(200, "", "GET", "/v2/app/blobs/"+d.String(), nil); b != string(data) {
		t.Errorf("%d bytes came back", len(b))
	}
	v.want(404, "BLOB_UPLOAD_UNKNOWN", "PUT", loc+"?digest="+d.String(), nil)

	// Another algorithm than the one it began with.
	long := digest.SHA512.FromBytes(data)
	v.want(201, "", "POST", "/v2/app/blobs/uploads/?digest="+long.String(), bytes.NewReader(data))
	v.want(200, "", "GET", "/v2/app/blobs/"+long.String(), nil)

	// What does not match is not taken, and leaves nothing.
	wrong := digest.FromString("other")
	v.want(400, "DIGEST_INVALID", "POST", "/v2/app/blobs/uploads/?digest="+wrong.String(), bytes.NewReader(data))
	v.want(400, "DIGEST_INVALID", "PUT", start()+"?digest="+wrong.String(), bytes.NewReader(data))
	v.want(400, "DIGEST_INVALID", "POST", "/v2/app/blobs/uploads/?digest=sha256:../../x", bytes.NewReader(data))
	v.want(400, "DIGEST_INVALID", "POST", "/v2/app/blobs/uploads/?digest="+digest.SHA384.FromBytes(data).String(), bytes.NewReader(data)) // would not be collected
	v.want(400, "SIZE_INVALID", "PATCH", start(), bytes.NewReader(data), "Content-Range", "0-10")
	v.want(400, "BLOB_UPLOAD_INVALID", "PATCH", start(), bytes.NewReader(data), "Content-Range", "9-3")
	v.want(204, "", "DELETE", start(), nil)

	// Ranges of a blob.
	blob := "/v2/app/blobs/" + d.String()
	for _, r := range []struct {
		ask    string
		status int
		want   string
	}{
		{"bytes=0-4", 206, "01234"}, {"bytes=995-", 206, "56789"}, {"bytes=-3", 206, "789"}, {"bytes=0-99999999999", 206, string(data)},
		{"bytes=1000-", 416, ""}, {"bytes=5-2", 416, ""}, {"bytes=-0", 416, ""}, {"bytes=a-b", 416, ""}, {"bytes=--5", 416, ""},
		{"bytes=" + strings.Repeat("0-,", 500) + "0-", 200, string(data)}, {"lines=1-2", 200, string(data)},
	} {
		if _, b := v.want(r.status, "", "GET", blob, nil, "Range", r.ask); r.want != "" && b != r.want {
			t.Errorf("%.30s: %.40q", r.ask, b)
		}
	}

	// There is an end to uploads at once, and to their time.
	v.want(429, "TOOMANYREQUESTS", "POST", fill(v), nil)
	v.stop()
	if left := v.files("ingest-t"); len(left) > 0 {
		t.Errorf("uploads left %d files", len(left))
	}
}

// fill begins uploads until there may be no more, and returns where to begin one.
func fill(v *served) string {
	for v.reg.uploadsUnderWay() < maxEach {
		v.want(202, "", "POST", "/v2/app/blobs/uploads/", nil)
	}
	return "/v2/app/blobs/uploads/"
}

func TestIdleUploadsEnd(t *testing.T) {
	old := uploadIdle
	uploadIdle = 50 * time.Millisecond
	defer func() { uploadIdle = old }()
	v := serve(t)
	resp, _ := v.want(202, "", "POST", "/v2/app/blobs/uploads/", nil)
	eventually(t, "the upload's end", func() string {
		if n := len(v.files("ingest-t")); n > 0 {
			return fmt.Sprint(n, " files are there")
		}
		return ""
	})
	v.want(404, "BLOB_UPLOAD_UNKNOWN", "PATCH", resp.Header.Get("Location"), strings.NewReader("x"))
}

func TestHostileRequests(t *testing.T) {
	v := serve(t)
	v.pushImage("app", "1", make([]byte, 512))
	for _, path := range []string{
		"/v2/../../etc/passwd", "/v2/%2e%2e/%2e%2e/manifests/x", "/v2/a/../b/manifests/1", "/v2/App/manifests/1", "/v2//manifests/1",
		"/v2/a%00b/manifests/1", "/v2/" + strings.Repeat("a", 300) + "/manifests/1", "/v2/a b/tags/list", "/v2/app:1/manifests/1",
	} {
		if resp, b := v.do("GET", v.url+path, nil); resp.StatusCode != 400 && resp.StatusCode != 404 {
			t.Errorf("%s: %d %.100s", path, resp.StatusCode, b)
		}
	}
	for _, d := range []string{"sha256:..", "sha256:" + strings.Repeat("0", 63), "md5:" + strings.Repeat("0", 32), "sha256:" + strings.Repeat("Z", 64), "sha256:..%2f..%2f..%2fimages.db"} {
		if resp, b := v.do("GET", "/v2/app/blobs/"+d, nil); resp.StatusCode != 400 && resp.StatusCode != 404 {
			t.Errorf("%s: %d %.100s", d, resp.StatusCode, b)
		}
	}
	v.want(400, "TAG_INVALID", "PUT", "/v2/app/manifests/-x", strings.NewReader("{}"), "Content-Type", ocispec.MediaTypeImageManifest)
	v.want(400, "MANIFEST_INVALID", "PUT", "/v2/app/manifests/x", strings.NewReader("{}"), "Content-Type", ocispec.MediaTypeImageManifest)
	v.want(400, "MANIFEST_INVALID", "PUT", "/v2/app/manifests/x", strings.NewReader("{}"), "Content-Type", "text/html")
	v.want(413, "MANIFEST_INVALID", "PUT", "/v2/app/manifests/x", strings.NewReader(strings.Repeat(" ", maxManifest+1)), "Content-Type", ocispec.MediaTypeImageManifest)
	conf := v.push("app", []byte("{}"))
	missing := digest.FromString("missing")
	m := `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":%q,"size":7}]}`
	v.want(404, "MANIFEST_BLOB_UNKNOWN", "PUT", "/v2/app/manifests/x", strings.NewReader(fmt.Sprintf(m, conf, 2, missing)), "Content-Type", ocispec.MediaTypeImageManifest)
	v.want(404, "MANIFEST_BLOB_UNKNOWN", "PUT", "/v2/app/manifests/x", strings.NewReader(fmt.Sprintf(m, conf, 3, conf)), "Content-Type", ocispec.MediaTypeImageManifest)
	// Another repository's blobs are not this one's.
	v.want(404, "BLOB_UNKNOWN", "GET", "/v2/other/blobs/"+conf.String(), nil)
	v.want(404, "MANIFEST_UNKNOWN", "PUT", "/v2/app/manifests/x", strings.NewReader(fmt.Sprintf(
		`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":2}]}`, ocispec.MediaTypeImageManifest, conf)), "Content-Type", ocispec.MediaTypeImageIndex)
	// A blob that a manifest needs is not removed.
	v.want(405, "UNSUPPORTED", "DELETE", "/v2/app/blobs/"+digest.FromBytes(make([]byte, 512)).String(), nil)
	// Web pages.
	v.want(403, "DENIED", "POST", "/v2/app/blobs/uploads/", nil, "Origin", "http://evil.example")
	v.want(403, "DENIED", "GET", "/v2/", nil, "Sec-Fetch-Site", "cross-site")
	// Headers without an end.
	c, err := net.Dial("tcp", v.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	_, _ = fmt.Fprintf(c, "GET /v2/ HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n", strings.Repeat("a", 1<<20)) // it is cut off in the middle
	if b, _ := io.ReadAll(c); !bytes.Contains(b, []byte("431")) && len(b) > 0 {
		t.Errorf("a megabyte of header: %.100q", b)
	}
}

func TestReadOnlyAndUsers(t *testing.T) {
	v := serve(t, func(c *Config) { c.ReadOnly = true })
	v.want(405, "UNSUPPORTED", "POST", "/v2/app/blobs/uploads/", nil)
	v.want(200, "", "GET", "/v2/", nil)
	v.want(200, "", "GET", "/v2/_catalog", nil)

	file := filepath.Join(t.TempDir(), "htpasswd")
	write := func(password string, at time.Time) {
		t.Helper()
		h, err := bcrypt.GenerateFromPassword([]byte(password), 4)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.WriteFile(file, []byte("# users\nme:"+string(h)+"\n"), 0o600), os.Chtimes(file, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	write("one", time.Now())
	users, err := OpenUsers(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		user, password string
		want           bool
	}{{"me", "one", true}, {"me", "one", true}, {"me", "two", false}, {"you", "one", false}, {"", "", false}} {
		if got := users.Check(t.Context(), c.user, c.password); got != c.want {
			t.Errorf("%s:%s: %v", c.user, c.password, got)
		}
	}
	write("two", time.Now().Add(time.Hour))
	users.mu.Lock()
	users.look = time.Time{}
	users.mu.Unlock()
	if users.Check(t.Context(), "me", "one") || !users.Check(t.Context(), "me", "two") {
		t.Error("the file has changed, the passwords have not")
	}
	for _, bad := range []string{"", "me", "me:{SHA}xyz", "me:$apr1$x$y", "me:$2y$31$" + strings.Repeat("a", 53)} {
		if _, err := ParseUsers([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	for _, c := range []struct {
		addr                 string
		users, tls, readOnly bool
		ok                   bool
	}{
		{"127.0.0.1:5000", false, false, false, true}, {"localhost:5000", true, false, false, true}, {"[::1]:5000", false, false, false, true},
		{"0.0.0.0:5000", false, false, false, false}, {":5000", false, false, true, true}, {"10.0.0.1:5000", true, false, false, false},
		{"10.0.0.1:5000", true, true, false, true}, {"10.0.0.1:5000", false, true, false, false}, {"5000", false, false, false, false},
	} {
		if err := CheckExposure(c.addr, c.users, c.tls, c.readOnly); (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func FuzzRanges(f *testing.F) {
	for _, s := range []string{"bytes=0-1", "bytes=-5", "bytes=5-", "bytes 3-4/9", "0-0", "bytes=9223372036854775807-", "bytes=-9223372036854775808"} {
		f.Add(s, int64(10))
	}
	f.Fuzz(func(t *testing.T, s string, size int64) {
		size = max(size, 0)
		if first, n, ok, err := parseRange(s, size); err == nil && ok && (first < 0 || n < 1 || first > size-n) {
			t.Errorf("%q of %d: %d+%d", s, size, first, n)
		}
		if first, last, err := parseContentRange(s); err == nil && (first < 0 || last < first) {
			t.Errorf("%q: %d-%d", s, first, last)
		}
	})
}
