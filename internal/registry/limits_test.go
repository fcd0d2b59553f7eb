package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image"
)

const mib = 1 << 20

// What clients can make the registry keep is bounded, and given back when they are done.
func TestLimits(t *testing.T) {
	v := serve(t, func(c *Config) {
		c.Repositories.Limit(image.RepositoryLimits{Uploads: 14 * mib, Free: 1, Manifests: 3})
	})
	start := func() string {
		t.Helper()
		resp, _ := v.want(202, "", "POST", "/v2/app/blobs/uploads/", nil)
		return resp.Header.Get("Location")
	}
	a, b := start(), start()
	v.want(202, "", "PATCH", a, bytes.NewReader(make([]byte, 5*mib)))
	resp, _ := v.want(507, "DENIED", "PATCH", b, bytes.NewReader(make([]byte, 5*mib)))
	if resp.Header.Get("Retry-After") == "" {
		t.Error("it does not say when to try again")
	}
	// What another gives up is there again, and the upload goes on from where it was.
	v.want(204, "", "DELETE", a, nil)
	resp, _ = v.want(204, "", "GET", b, nil)
	var got int
	if _, err := fmt.Sscanf(resp.Header.Get("Range"), "0-%d", &got); err != nil {
		t.Fatalf("%q: %v", resp.Header.Get("Range"), err)
	}
	if got > 0 {
		got++
	}
	v.want(202, "", "PATCH", b, bytes.NewReader(make([]byte, 5*mib-got)))
	layer := make([]byte, 5*mib)
	v.want(201, "", "PUT", b+"?digest="+digest.FromBytes(layer).String(), nil)
	// Blobs that nothing needs count on.
	big := bytes.Repeat([]byte("x"), 9*mib)
	v.want(507, "DENIED", "POST", "/v2/app/blobs/uploads/?digest="+digest.FromBytes(big).String(), bytes.NewReader(big))
	v.pushImage("app", "1", layer)
	v.push("app", big) // the layer is an image's now

	// Manifests and tags.
	put := func(status int, repo, ref, note string) {
		t.Helper()
		conf := v.push(repo, []byte("{}"))
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/x", Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeEmptyJSON, Digest: conf, Size: 2}, Layers: []ocispec.Descriptor{}, Annotations: map[string]string{"note": note}}
		m.SchemaVersion = 2
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		code := ""
		if status == 403 {
			code = "DENIED"
		}
		if ref == "" {
			ref = digest.FromBytes(b).String()
		}
		v.want(status, code, "PUT", "/v2/"+repo+"/manifests/"+ref, bytes.NewReader(b), "Content-Type", ocispec.MediaTypeImageManifest)
	}
	put(201, "other", "", "one") // app:1, its manifest, and this
	put(403, "other", "", "two")
	put(201, "other", "", "one") // it is there
	put(403, "other", "tag", "one")
	v.want(202, "", "DELETE", "/v2/app/manifests/1", nil)
	put(201, "other", "tag", "one")
}

// The disk keeps its reserve.
func TestReserve(t *testing.T) {
	v := serve(t, func(c *Config) { c.Repositories.Limit(image.RepositoryLimits{Free: 1 << 60}) })
	_, b := v.want(507, "DENIED", "POST", "/v2/app/blobs/uploads/", nil)
	if !strings.Contains(b, "must stay free") {
		t.Errorf("%s", b)
	}
	if left := v.files("ingest-t"); len(left) > 0 {
		t.Errorf("%d files", len(left))
	}
}

// An upload ends, however little by little it comes.
func TestOldUploadsEnd(t *testing.T) {
	old := uploadAge
	uploadAge = 30 * time.Millisecond
	defer func() { uploadAge = old }()
	v := serve(t)
	resp, _ := v.want(202, "", "POST", "/v2/app/blobs/uploads/", nil)
	loc := resp.Header.Get("Location")
	eventually(t, "the upload's end", func() string {
		if resp, b := v.do("PATCH", loc, strings.NewReader("x")); resp.StatusCode != 404 && resp.StatusCode != 408 {
			return fmt.Sprint(resp.StatusCode, b)
		}
		return ""
	})
	v.want(404, "BLOB_UPLOAD_UNKNOWN", "GET", loc, nil)
	eventually(t, "its file's end", func() string { return strings.Join(v.files("ingest-t"), " ") })
}

// Manifests that come slowly don't keep others out for more than their memory.
func TestManifestMemory(t *testing.T) {
	v := serve(t)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	for range maxMemory / maxManifest {
		c, err := net.Dial("tcp", v.addr)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		if _, err := fmt.Fprintf(c, "PUT /v2/app/manifests/x HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n{", v.addr, maxManifest); err != nil {
			t.Fatal(err)
		}
	}
	memory := func() int64 {
		v.reg.mu.Lock()
		defer v.reg.mu.Unlock()
		return v.reg.memory
	}
	eventually(t, "all are being read", func() string {
		if m := memory(); m != maxMemory {
			return fmt.Sprint(m)
		}
		return ""
	})
	v.want(429, "TOOMANYREQUESTS", "PUT", "/v2/app/manifests/y", strings.NewReader("{}"))
	for _, c := range conns {
		_ = c.Close()
	}
	eventually(t, "the memory is given back", func() string {
		if m := memory(); m != 0 {
			return fmt.Sprint(m)
		}
		return ""
	})
	v.want(400, "MANIFEST_INVALID", "PUT", "/v2/app/manifests/y", strings.NewReader("{}"), "Content-Type", ocispec.MediaTypeImageManifest)
}

// One user can't have all of that memory.
func TestMemoryOfOne(t *testing.T) {
	g := New(Config{})
	if !g.takeMemory("a", maxMemory/2) || g.takeMemory("a", 1) || !g.takeMemory("b", maxMemory/2) || g.takeMemory("c", 1) {
		t.Error("not half for each of two")
	}
	g.takeMemory("a", -maxMemory/2)
	g.takeMemory("b", -maxMemory/2)
	if g.memory != 0 || len(g.own) != 0 {
		t.Errorf("%d bytes, of %v, are not given back", g.memory, g.own)
	}
}

// One machine can't have all connections.
func TestConnectionsOfOne(t *testing.T) {
	l := &limited{from: map[netip.Addr]int{}}
	one, two := address("192.0.2.1:5"), address("[2001:db8::1]:5")
	if two != address("[2001:db8::2]:6") || one == address("192.0.2.2:5") || address("[::ffff:192.0.2.1]:5") != one {
		t.Error("addresses are not told apart")
	}
	for range maxEach {
		if !l.enter(one) {
			t.Fatal("refused")
		}
	}
	if l.enter(one) || !l.enter(two) {
		t.Error("the bound is not each one's own")
	}
	l.leave(one)
	if !l.enter(one) {
		t.Error("a connection that has ended counts")
	}
	for l.enter(address("127.0.0.1:1")) {
	}
	if l.all != maxConns {
		t.Errorf("%d connections", l.all)
	}
}

// A list of referrers is read piece by piece.
func TestReferrersAreBounded(t *testing.T) {
	v := serve(t)
	subject := v.pushImage("app", "1", []byte("layer"))
	conf := v.push("app", []byte("{}"))
	var want []string
	for i := range 5 {
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/x", Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeEmptyJSON, Digest: conf, Size: 2}, Layers: []ocispec.Descriptor{},
			Subject: &ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: subject, Size: 1}, Annotations: map[string]string{"note": strings.Repeat("x", mib), "n": fmt.Sprint(i)}}
		m.SchemaVersion = 2
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		d := digest.FromBytes(b)
		want = append(want, d.String())
		v.want(201, "", "PUT", "/v2/app/manifests/"+d.String(), bytes.NewReader(b), "Content-Type", ocispec.MediaTypeImageManifest)
	}
	got := map[string]bool{}
	pages := 0
	for next := "/v2/app/referrers/" + subject.String(); next != ""; pages++ {
		resp, b := v.want(http.StatusOK, "", "GET", next, nil)
		var idx ocispec.Index
		if err := json.Unmarshal([]byte(b), &idx); err != nil || len(b) > maxReferrers+mib {
			t.Fatalf("%d bytes: %v", len(b), err)
		}
		for _, m := range idx.Manifests {
			got[m.Digest.String()] = true
		}
		next, _, _ = strings.Cut(strings.TrimPrefix(resp.Header.Get("Link"), "<"), ">")
	}
	if pages < 2 || len(got) != len(want) {
		t.Errorf("%d pages with %d of %d", pages, len(got), len(want))
	}
}

// Who sends next to nothing is cut off, however long it goes on.
func TestDribble(t *testing.T) {
	rc := http.NewResponseController(httptest.NewRecorder()) // without deadlines
	drops := func() io.Reader { return iotest.OneByteReader(strings.NewReader("abc")) }
	for name, c := range map[string]struct {
		p    paced
		want error
	}{
		"begun":    {paced{start: time.Now()}, nil},
		"slow":     {paced{start: time.Now().Add(-slowAfter - time.Second)}, errSlow},
		"fast":     {paced{start: time.Now().Add(-slowAfter - time.Second), n: 1 << 30}, nil},
		"too long": {paced{start: time.Now(), until: time.Now().Add(-time.Second)}, errSlow},
	} {
		c.p.r, c.p.rc = drops(), rc
		if _, err := c.p.Read(make([]byte, 10)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if e := classify(fmt.Errorf("body: %w", errSlow)); e.status != http.StatusRequestTimeout {
		t.Errorf("%d", e.status)
	}
}

// What clients bring about is none of the log's warnings, or only now and then.
func TestClientsDontFillTheLog(t *testing.T) {
	var mu sync.Mutex
	var log bytes.Buffer
	v := serve(t, func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(lockedWriter{&mu, &log}, nil))
		c.Repositories.Limit(image.RepositoryLimits{Free: 1 << 60})
	})
	for range 20 {
		v.want(507, "DENIED", "POST", "/v2/app/blobs/uploads/", nil)
		c, err := net.Dial("tcp", v.addr)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = fmt.Fprintf(c, "PUT /v2/app/manifests/x HTTP/1.1\r\nHost: %s\r\nContent-Length: 100\r\n\r\n{", v.addr) // and is gone
		_ = c.Close()
	}
	v.stop()
	mu.Lock()
	defer mu.Unlock()
	if n := strings.Count(log.String(), "level=WARN"); n < 1 || n > 2 {
		t.Errorf("%d warnings:\n%.2000s", n, log.String())
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}
