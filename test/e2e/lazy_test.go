package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// lazyRegistry serves an image that can be read in pieces, team/app:1, and counts what
// is read of its layers.
type lazyRegistry struct {
	addr string
	all  int64        // bytes of the layers
	read atomic.Int64 // of them

	mu       sync.Mutex
	blobs    map[digest.Digest][]byte
	manifest digest.Digest
	down     bool
	hangs    chan struct{} // closed when a layer is asked for, of which nothing comes
	spoilt   bool          // every layer's bytes in the middle are others
}

// chunkBytes is how much of a file comes at once.
const chunkBytes = 1 << 20

// newLazyRegistry makes the image: busybox, a program that says hello, and filler that
// does not compress.
func newLazyRegistry(t *testing.T, filler int) *lazyRegistry {
	t.Helper()
	reg := &lazyRegistry{blobs: map[digest.Digest][]byte{}}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	random := make([]byte, 2<<20)
	_, _ = rand.Read(random) // never fails
	base := []tarFile{{"bin/", 0o755, nil}, {"etc/", 0o755, nil}, {"tmp/", 0o1777, nil}, {"data/", 0o755, nil}, {"bin/busybox", 0o755, busybox}, {"etc/passwd", 0o644, []byte("root:x:0:0::/:/bin/sh\napp:x:7:7::/:/bin/sh\n")}, {"etc/gone", 0o644, []byte("below")}}
	for _, l := range []string{"sh", "cat", "echo", "ls", "sleep", "id", "md5sum", "wc", "test", "stat", "tail"} {
		base = append(base, tarFile{"bin/" + l + " -> busybox", 0o777, nil})
	}
	for i := range filler / len(random) {
		random[0] = byte(i)
		base = append(base, tarFile{fmt.Sprintf("data/%03d", i), 0o644, bytes.Clone(random)})
	}
	config := ocispec.Image{Platform: ocispec.Platform{Architecture: goarch(), OS: "linux"}, Config: ocispec.ImageConfig{Cmd: []string{"/bin/hello"}, Env: []string{"PATH=/bin"}}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, files := range [][]tarFile{base, {{"bin/hello", 0o755, []byte("#!/bin/sh\necho hello\n")}, {"etc/.wh.gone", 0o644, nil}, {"own", 0o640, []byte("of app")}}} {
		d, diff := reg.layer(t, files)
		reg.all += d.Size
		m.Layers, config.RootFS.DiffIDs = append(m.Layers, d), append(config.RootFS.DiffIDs, diff)
	}
	config.RootFS.Type = "layers"
	m.Config = reg.document(t, ocispec.MediaTypeImageConfig, config)
	reg.manifest = reg.document(t, ocispec.MediaTypeImageManifest, m).Digest
	srv := httptest.NewServer(reg)
	t.Cleanup(srv.Close)
	reg.addr = strings.TrimPrefix(srv.URL, "http://")
	return reg
}

func goarch() string {
	var u syscall.Utsname
	if syscall.Uname(&u) == nil && u.Machine[0] == 'a' {
		return "arm64"
	}
	return "amd64"
}

type tarFile struct {
	name string // "a -> b": a link
	mode int64
	data []byte
}

func (reg *lazyRegistry) layer(t *testing.T, files []tarFile) (ocispec.Descriptor, digest.Digest) {
	t.Helper()
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.data)), Typeflag: tar.TypeReg, ModTime: time.Unix(1e9, 0)}
		if from, to, ok := strings.Cut(f.name, " -> "); ok {
			h.Name, h.Linkname, h.Typeflag = from, to, tar.TypeSymlink
		} else if strings.HasSuffix(f.name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if f.name == "own" {
			h.Uid, h.Gid = 7, 7
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(plain.Bytes()), 0, int64(plain.Len())), estargz.WithChunkSize(chunkBytes), estargz.WithCompressionLevel(0))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	blob, err := io.ReadAll(b)
	if err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(blob), Size: int64(len(blob)),
		Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: b.TOCDigest().String()}}
	reg.blobs[d.Digest] = blob
	return d, b.DiffID()
}

func (reg *lazyRegistry) document(t *testing.T, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	reg.blobs[d.Digest] = b
	return d
}

// is says how the registry is from now on.
func (reg *lazyRegistry) is(down, spoilt bool) {
	reg.mu.Lock()
	defer reg.mu.Unlock()
	reg.down, reg.spoilt, reg.hangs = down, spoilt, nil
}

// hang lets nothing of layers come, and tells when one is asked for.
func (reg *lazyRegistry) hang() (reached chan struct{}) {
	reg.mu.Lock()
	defer reg.mu.Unlock()
	reg.hangs = make(chan struct{})
	return reg.hangs
}

func (reg *lazyRegistry) ref() string { return reg.addr + "/team/app:1" }

func (reg *lazyRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	reg.mu.Lock()
	down, spoilt, manifest := reg.down, reg.spoilt, reg.manifest
	reg.mu.Unlock()
	if down {
		http.Error(w, "the registry is down", http.StatusServiceUnavailable)
		return
	}
	kind, name, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/team/app/"), "/")
	d := digest.Digest(name)
	if kind == "manifests" && name == "1" {
		d = manifest
	}
	b := reg.blobs[d]
	switch {
	case r.URL.Path == "/v2/":
		return
	case b == nil:
		http.Error(w, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`, http.StatusNotFound)
		return
	case kind == "manifests":
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
	default:
		w.Header().Set("Content-Type", "application/octet-stream")
	}
	w.Header().Set("Docker-Content-Digest", d.String())
	if len(b) > 16<<10 && kind == "blobs" { // a layer
		reg.mu.Lock()
		hangs := reg.hangs
		if hangs != nil {
			select {
			case <-hangs:
			default:
				close(hangs)
			}
		}
		reg.mu.Unlock()
		if hangs != nil {
			<-r.Context().Done() // who asks is about to die
			return
		}
		w = &countingWriter{w, &reg.read}
		if spoilt {
			b = bytes.Clone(b)
			for i := len(b) / 4; i < len(b)*3/4; i += 512 {
				b[i] ^= 1
			}
		}
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
}

type countingWriter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *countingWriter) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b)
	c.n.Add(int64(n))
	return n, err
}

// startLazy is a daemon whose lazy images stay so.
func startLazy(t *testing.T, settings string) *Daemon {
	t.Helper()
	config := filepath.Join(t.TempDir(), "tenond.toml")
	if err := os.WriteFile(config, []byte("[images]\nlazy-complete = '0'\n"+settings), 0o600); err != nil {
		t.Fatal(err)
	}
	return NewDaemon(t, "--config", config)
}

// isLazy tells what lists say.
func (d *Daemon) isLazy(t *testing.T, ref string) bool {
	t.Helper()
	return strings.Contains(d.Must(t, "image", "inspect", "-f", "{{json .GraphDriver}}", ref), "bytes of files are here")
}

func (d *Daemon) says(t *testing.T, want, command string) {
	t.Helper()
	if r := d.Sh(t, command); r.Code != 0 || strings.TrimSpace(r.Out) != want {
		t.Fatalf("%s: exit %d, %q, want %q\n%s\n%s", command, r.Code, r.Out, want, r.Err, d.Tail())
	}
}

// lazyProgram is the process that serves lazy images; 0: there is none.
func (d *Daemon) lazyProgram(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(d.RunRoot, "lazy", "pid"))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b)) // and when it began
	if len(f) == 0 {
		return 0
	}
	pid, err := strconv.Atoi(f[0])
	if err != nil {
		t.Fatalf("pid %q", b)
	}
	return pid
}

// TestLazyImages: what is not read does not come; what needs all has it fetched.
func TestLazyImages(t *testing.T) {
	t.Parallel()
	reg := newLazyRegistry(t, 48<<20)
	d := startLazy(t, "")
	ref := reg.ref()
	if r := d.Sh(t, "tenon pull --lazy "+ref); r.Code != 0 {
		t.Fatalf("pull --lazy: %s%s\n%s", r.Out, r.Err, d.Tail())
	}
	d.says(t, "hello", "tenon run --rm "+ref)
	if n := reg.read.Load(); n*5 > reg.all {
		t.Errorf("%d of %d bytes came for the first line", n, reg.all)
	}
	if !d.isLazy(t, ref) {
		t.Error("inspect does not say that it is lazy")
	}
	if out := d.Must(t, "images"); !strings.Contains(out, "app") {
		t.Errorf("images: %s", out)
	}
	if r := d.Sh(t, "tenon images"); !strings.Contains(r.Out, "lazy, ") {
		t.Errorf("images: %s", r.Out)
	}
	// Owners, whiteouts, links, what a container writes, its own ids.
	d.says(t, "7 640 /bin/busybox ok", "tenon run --rm "+ref+" sh -c 'echo $(stat -c \"%u %a\" /own) /bin/$(busybox readlink /bin/sh) $(test -e /etc/gone || echo ok)'")
	d.says(t, "written 7", "tenon run --rm --userns auto "+ref+" sh -c 'echo written >/data/000; echo $(cat /data/000) $(stat -c %u /own)'")
	d.says(t, "7", "docker run --rm -u app "+ref+" id -u")
	d.Must(t, "run", "-d", "--name", "stays", ref, "sleep", "600")
	d.says(t, "of app", "docker cp stays:/own - | tar xO")

	// A daemon that dies: what runs reads on, and what is new finds it again.
	before := d.lazyProgram(t)
	d.Kill(t)
	d.Start(t)
	if got := d.Must(t, "exec", "stays", "wc", "-c", "/data/001"); !strings.HasPrefix(got, strconv.Itoa(2<<20)) {
		t.Errorf("after the daemon's death: %s", got)
	}
	d.says(t, "hello", "tenon run --rm "+ref)
	if after := d.lazyProgram(t); before == 0 || before != after {
		t.Errorf("program %d, after the daemon's death %d", before, after)
	}

	// A registry that is down, or lies: what is not here can't be had. (How long a read
	// waits is a matter of package lazy's tests.)
	reg.is(true, false)
	if r := d.Docker(t, "save", "-o", filepath.Join(t.TempDir(), "saved"), ref); r.Code == 0 || !strings.Contains(r.Err, "lazy") {
		t.Errorf("save without the registry: exit %d %s%s", r.Code, r.Out, r.Err)
	}
	reg.is(false, true)
	if r := d.Docker(t, "exec", "stays", "md5sum", "/data/011"); r.Code == 0 || !strings.Contains(r.Err, "Input/output error") {
		t.Errorf("another's bytes were taken: exit %d %s%s", r.Code, r.Out, r.Err)
	}
	reg.is(false, false)
	if r := d.Docker(t, "exec", "stays", "md5sum", "/data/010"); r.Code != 0 {
		t.Errorf("registry honest again: exit %d %s%s", r.Code, r.Out, r.Err)
	}

	// The program dies: what runs reads no more, what is new does.
	if err := syscall.Kill(d.lazyProgram(t), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	d.says(t, "hello", "tenon run --rm "+ref)
	d.Must(t, "rm", "-f", "stays")

	// What needs the layers has them fetched.
	d.Must(t, "run", "-d", "--name", "later", ref, "sleep", "600")
	d.Must(t, "exec", "later", "sh", "-c", "echo more >/more")
	d.Must(t, "commit", "later", "made:1")
	if d.isLazy(t, ref) {
		t.Error("it is lazy after a commit")
	}
	d.says(t, "more", "tenon run --rm made:1 cat /more")
	d.Must(t, "exec", "later", "md5sum", "/data/012")
	d.Must(t, "restart", "-t", "0", "later")
	d.says(t, "more", "docker exec later cat /more")
	d.Must(t, "rm", "-f", "later")
	d.Must(t, "rmi", "made:1", ref)
	eventually(t, "what lazy images leave", func() string {
		ents, err := os.ReadDir(filepath.Join(d.Root, "images", "lazy"))
		if err != nil || len(ents) > 0 {
			return fmt.Sprint(ents, err)
		}
		b, _ := os.ReadFile("/proc/self/mounts") // all mounts
		if strings.Contains(string(b), d.RunRoot+"/lazy-roots") {
			return "a mount"
		}
		if pid := d.lazyProgram(t); pid != 0 {
			return fmt.Sprintf("tenon-lazy, process %d", pid)
		}
		return ""
	})
}

// TestLazyRefusals: an image that is not made for it is refused, or pulled whole.
func TestLazyRefusals(t *testing.T) {
	t.Parallel()
	reg := newLazyRegistry(t, 4<<20)
	d := startLazy(t, "lazy = 'auto'\n")
	plain := maps.Clone(reg.blobs)
	var m ocispec.Manifest
	if err := json.Unmarshal(plain[reg.manifest], &m); err != nil {
		t.Fatal(err)
	}
	eager := reg.manifest
	m.Layers[1].Annotations = nil
	reg.manifest = reg.document(t, ocispec.MediaTypeImageManifest, m).Digest
	if r := d.Sh(t, "tenon pull --lazy "+reg.ref()); r.Code == 0 || !strings.Contains(r.Err, "compression=estargz") {
		t.Errorf("no eStargz: exit %d %s%s", r.Code, r.Out, r.Err)
	}
	d.Must(t, "pull", reg.ref())
	if d.isLazy(t, reg.ref()) {
		t.Error("lazy without tables of contents")
	}
	d.Must(t, "rmi", reg.ref())
	reg.mu.Lock()
	reg.manifest = eager
	reg.mu.Unlock()
	d.says(t, "hello", "docker run --rm -q "+reg.ref()) // a stock client, by the setting
	if !d.isLazy(t, reg.ref()) {
		t.Error("not lazy by the setting")
	}
	if r := d.Sh(t, "tenon pull -q --lazy=never "+reg.ref()); r.Code != 0 {
		t.Errorf("pull --lazy=never: %s%s", r.Out, r.Err)
	}
	if d.isLazy(t, reg.ref()) {
		t.Error("lazy after a whole pull")
	}
	d.says(t, "hello", "docker run --rm "+reg.ref())

	// A build on one.
	d.Must(t, "rmi", reg.ref())
	d.Must(t, "pull", "-q", reg.ref())
	if !d.isLazy(t, reg.ref()) {
		t.Error("not lazy by the setting, the second time")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM "+reg.ref()+"\nRUN echo built >/built\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := d.Sh(t, "tenon build -q -t built:1 "+dir); r.Code != 0 {
		t.Fatalf("build on a lazy image: %s%s\n%s", r.Out, r.Err, d.Tail())
	}
	d.says(t, "built", "tenon run --rm built:1 cat /built")
	d.says(t, "of app", "tenon run --rm built:1 cat /own")
	d.Must(t, "rmi", "built:1")

	// A daemon that dies while the tables of contents come leaves nothing.
	d.Must(t, "rmi", reg.ref())
	reached := reg.hang()
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.Sh(t, "tenon pull --lazy "+reg.ref())
	}()
	select {
	case <-reached:
	case <-time.After(patience(30 * time.Second)):
		t.Fatal("the registry is not asked for a layer")
	}
	d.Kill(t)
	<-done // a daemon that is gone answers nobody
	reg.is(false, false)
	d.Start(t)
	if out := d.Must(t, "images", "-q"); out != "" {
		t.Errorf("images are here: %s", out)
	}
	eventually(t, "what a lazy pull leaves", func() string {
		for _, dir := range []string{"lazy", "layers/tmp", "trash"} {
			if ents, err := os.ReadDir(filepath.Join(d.Root, "images", dir)); err != nil || len(ents) > 0 {
				return fmt.Sprint(dir, ents, err)
			}
		}
		return ""
	})
}

// TestLazyCompletes: in the background, and then the registry is not needed any more.
func TestLazyCompletes(t *testing.T) {
	t.Parallel()
	reg := newLazyRegistry(t, 4<<20)
	config := filepath.Join(t.TempDir(), "tenond.toml")
	if err := os.WriteFile(config, []byte("[images]\nlazy-complete = '100ms'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := NewDaemon(t, "--config", config)
	d.says(t, "hello", "tenon run --rm -q --pull lazy --name first "+reg.ref())
	eventually(t, "completing", func() string {
		if d.isLazy(t, reg.ref()) {
			return "it is lazy still"
		}
		return ""
	})
	reg.is(true, false)
	d.says(t, strconv.Itoa(2<<20), "tenon run --rm "+reg.ref()+" sh -c 'cat /data/001 | wc -c'")
	file := filepath.Join(t.TempDir(), "saved")
	d.Must(t, "save", "-o", file, reg.ref())
}

// TestLazyOnMachines: the file is a machine's disk, and one that lasts.
func TestLazyOnMachines(t *testing.T) {
	t.Parallel()
	reg := newLazyRegistry(t, 48<<20)
	d := newVMDaemonAt(t, "", "[images]\nlazy-complete = '0'\n") // emulated machines take their time
	ref := reg.ref()
	d.says(t, "hello", "tenon run --rm -q --pull lazy --isolation vm "+ref)
	if n := reg.read.Load(); n*5 > reg.all {
		t.Errorf("%d of %d bytes came for the first line", n, reg.all)
	}
	d.tenon(t, "machine create box")
	d.says(t, "7 640", "tenon run --rm --userns host --isolation machine=box "+ref+" stat -c '%u %a' /own")
	d.Must(t, "run", "-d", "--isolation", "machine=box", "--name", "stays", ref, "sleep", "600")
	d.Kill(t)
	d.Start(t)
	if got := d.Must(t, "exec", "stays", "wc", "-c", "/data/001"); !strings.HasPrefix(got, strconv.Itoa(2<<20)) {
		t.Errorf("after the daemon's death: %s", got)
	}
	if n := reg.read.Load(); n*5 > reg.all {
		t.Errorf("%d of %d bytes came at last", n, reg.all)
	}
	if !d.isLazy(t, ref) {
		t.Error("it is not lazy any more")
	}
}
