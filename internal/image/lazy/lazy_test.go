package lazy_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
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
	"syscall"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/erofs"
	"tenon.dev/tenon/internal/image/layer"
	"tenon.dev/tenon/internal/image/lazy"
	"tenon.dev/tenon/internal/image/lazy/remote"
	"tenon.dev/tenon/internal/image/lazy/serve"
)

const asProgram = "TENON_TEST_LAZY"

// testRead is how long reads take at most in these tests.
const testRead = 6 * time.Second

// TestMain runs the tests in a mount namespace of their own; and, if told, it is the
// program itself.
func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		program()
	}
	fuzzing := slices.ContainsFunc(os.Args, func(a string) bool { return strings.HasPrefix(a, "-test.fuzz=") || a == "-test.fuzzworker" })
	if fuzzing { // which mounts nothing, and has workers of its own
		os.Exit(m.Run())
	}
	if os.Getenv("TENON_TEST_MOUNTS") == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), "TENON_TEST_MOUNTS=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		err := cmd.Run()
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			os.Exit(max(1, ee.ExitCode()))
		} else if err != nil {
			panic(err)
		}
		os.Exit(0)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// program is what cmd/tenon-lazy does, but that it ends with the tests.
func program() {
	_ = unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0, 0, 0)
	l, err := net.FileListener(os.NewFile(3, "control"))
	if err != nil {
		panic(err)
	}
	if err := serve.DropPrivileges(); err != nil && !errors.Is(err, errors.ErrUnsupported) { // with the race detector
		panic(err)
	}
	s := serve.New(slog.New(slog.NewTextHandler(os.Stderr, nil)), serve.Options{ReadTime: testRead, StallTime: testRead / 3})
	ended := make(chan error, 2)
	go func() { ended <- s.ServeFUSE(4) }()
	go func() { ended <- s.ServeControl(l.(*net.UnixListener)) }()
	fmt.Fprintln(os.Stderr, "ends:", <-ended)
	s.Close()
	os.Exit(0)
}

type entry struct {
	tar.Header
	data []byte
}

func dir(name string, mode int64) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}}
}
func reg(name string, data []byte) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data: data}
}
func link(name, to string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}}
}
func hard(name, to string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}}
}

func pack(t testing.TB, es ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, e := range es {
		e.Size = int64(len(e.data))
		if e.ModTime.IsZero() {
			e.ModTime = time.Unix(1e9+int64(i), 0)
		}
		must(t, w.WriteHeader(&e.Header))
		_, err := w.Write(e.data)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// random is data that does not get smaller.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = r.Read(b)
	return b
}

// blob is a layer as a registry has it.
type blob struct {
	desc ocispec.Descriptor
	data []byte
}

// star makes an eStargz layer of a tar.
func star(t testing.TB, plain []byte, opts ...estargz.Option) blob {
	t.Helper()
	out, err := estargz.Build(io.NewSectionReader(bytes.NewReader(plain), 0, int64(len(plain))), opts...)
	must(t, err)
	defer out.Close()
	data, err := io.ReadAll(out)
	must(t, err)
	return blob{ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(data), Size: int64(len(data)),
		Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: out.TOCDigest().String()},
	}, data}
}

// hub is a registry of blobs, which can be told to misbehave.
type hub struct {
	*httptest.Server
	bytes    atomic.Int64 // sent of blobs
	requests atomic.Int64
	conns    atomic.Int64

	mu     sync.Mutex
	blobs  map[digest.Digest][]byte
	before func(w http.ResponseWriter, r *http.Request) bool // true: it has answered
}

func newHub(t testing.TB, blobs ...blob) *hub {
	h := &hub{blobs: map[digest.Digest][]byte{}}
	for _, b := range blobs {
		h.blobs[b.desc.Digest] = b.data
	}
	h.Server = httptest.NewUnstartedServer(http.HandlerFunc(h.serve))
	h.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			h.conns.Add(1)
		}
	}
	h.Start()
	t.Cleanup(func() {
		h.CloseClientConnections()
		h.Close()
	})
	return h
}

func (h *hub) serve(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	before := h.before
	h.mu.Unlock()
	if before != nil && before(w, r) {
		return
	}
	name, ok := strings.CutPrefix(r.URL.Path, "/v2/some/repo/blobs/")
	h.mu.Lock()
	b := h.blobs[digest.Digest(name)]
	h.mu.Unlock()
	if !ok || b == nil {
		http.NotFound(w, r)
		return
	}
	h.requests.Add(1)
	http.ServeContent(&counting{w, &h.bytes}, r, "", time.Time{}, bytes.NewReader(b))
}

type counting struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *counting) Write(b []byte) (int, error) {
	c.n.Add(int64(len(b)))
	return c.ResponseWriter.Write(b)
}

func (h *hub) access() remote.Access {
	return remote.Access{Repository: "some/repo", Hosts: []remote.Host{{Scheme: "http", Host: strings.TrimPrefix(h.URL, "http://"), Path: "/v2"}}}
}

func (h *hub) misbehave(f func(w http.ResponseWriter, r *http.Request) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.before = f
}

// set is a program with its directory.
type set struct {
	t   testing.TB
	dir string
	cfg lazy.Config
	c   *lazy.Client
	ctx context.Context
}

func newSet(t testing.TB) *set {
	t.Helper()
	d := t.TempDir()
	exe, err := os.Executable()
	must(t, err)
	script := filepath.Join(d, "tenon-lazy")
	must(t, os.WriteFile(script, []byte("#!/bin/sh\n"+asProgram+"=1 exec "+exe+"\n"), 0o755))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	s := &set{t: t, dir: d, ctx: ctx, cfg: lazy.Config{RunDir: filepath.Join(d, "run"), Name: "lazytest", Binary: script, Log: slog.New(slog.DiscardHandler)}}
	t.Cleanup(func() {
		cancel()
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := lazy.Clear(ctx, s.cfg); err != nil {
			t.Error(err)
		}
		b, _ := os.ReadFile(filepath.Join(s.cfg.RunDir, "log"))
		if bytes.Contains(b, []byte("DATA RACE")) || bytes.Contains(b, []byte("panic")) {
			t.Error("the program is not well")
		}
		if t.Failed() {
			t.Logf("program's log:\n%s", b)
		}
	})
	s.start(true)
	return s
}

func (s *set) start(wantNew bool) {
	s.t.Helper()
	c, started, err := lazy.Start(s.ctx, s.cfg)
	must(s.t, err)
	if started != wantNew {
		s.t.Fatalf("started: %v", started)
	}
	s.c = c
}

// index makes a chain's files.
func (s *set) index(h *hub, blobs ...blob) (lazy.Chain, lazy.Info) {
	s.t.Helper()
	chain := lazy.Chain{ID: digest.FromString(fmt.Sprint(s.dir, rand.Uint64()))}
	var layers []lazy.Layer
	for _, b := range blobs {
		lb := lazy.Blob{Digest: b.desc.Digest, Size: b.desc.Size}
		r, err := lazy.OpenBlob(s.ctx, h.access(), lb)
		must(s.t, err)
		layers = append(layers, lazy.Layer{Desc: b.desc, Blob: r})
		chain.Blobs = append(chain.Blobs, lb)
	}
	chain.File, chain.Map = filepath.Join(s.dir, chain.ID.Encoded()), filepath.Join(s.dir, chain.ID.Encoded()+".map")
	f, err := os.Create(chain.File)
	must(s.t, err)
	defer f.Close()
	m, err := os.Create(chain.Map)
	must(s.t, err)
	defer m.Close()
	info, err := lazy.Index(s.ctx, layers, f, m, lazy.Options{})
	must(s.t, err)
	return chain, info
}

func (s *set) add(h *hub, chain lazy.Chain) string {
	s.t.Helper()
	p, err := s.c.Add(s.ctx, chain, h.access())
	must(s.t, err)
	return p
}

func (s *set) state(chain lazy.Chain) lazy.State {
	s.t.Helper()
	all, err := s.c.State(s.ctx, chain.ID)
	must(s.t, err)
	return all[0]
}

// mount mounts a file as EROFS.
func (s *set) mount(path string) string {
	s.t.Helper()
	at, err := os.MkdirTemp(s.dir, "mnt")
	must(s.t, err)
	must(s.t, unix.Mount(path, at, "erofs", unix.MS_RDONLY, ""))
	s.t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	return at
}

// dump tells all of a tree.
func dump(t testing.TB, root string) string {
	t.Helper()
	var out strings.Builder
	inodes := map[uint64]string{}
	must(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		if st.Mtim.Sec > 1.5e9 { // of a directory that no layer tells of: when it was unpacked
			st.Mtim.Sec = 0
		}
		name := "/" + strings.TrimPrefix(strings.TrimPrefix(p, root), "/")
		fmt.Fprintf(&out, "%s %o %d:%d links %d size %d rdev %d mtime %d", name, st.Mode, st.Uid, st.Gid, st.Nlink, st.Size, st.Rdev, st.Mtim.Sec)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			if first := inodes[st.Ino]; first != "" {
				fmt.Fprintf(&out, " as %s", first)
			} else {
				inodes[st.Ino] = name
			}
		}
		buf := make([]byte, 4096)
		if n, err := unix.Llistxattr(p, buf); err == nil && n > 0 {
			names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
			slices.Sort(names)
			for _, a := range names {
				v := make([]byte, 4096)
				n, err := unix.Lgetxattr(p, a, v)
				if err != nil {
					return err
				}
				fmt.Fprintf(&out, " %s=%q", a, v[:n])
			}
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			to, err := os.Readlink(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&out, " -> %s", to)
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&out, " %x", sha256.Sum256(b))
		}
		out.WriteByte('\n')
		return nil
	}))
	return out.String()
}

// ordinary makes the same image's EROFS file of unpacked layers, as pull does.
func (s *set) ordinary(plain ...[]byte) string {
	s.t.Helper()
	var stack []string // topmost first
	for _, p := range plain {
		d, err := os.MkdirTemp(s.dir, "layer")
		must(s.t, err)
		must(s.t, os.Chmod(d, 0o755))
		must(s.t, os.Chtimes(d, time.Unix(0, 0), time.Unix(0, 0)))
		res, err := layer.Unpack(s.ctx, bytes.NewReader(p), d, layer.Limits{Bytes: 1 << 30, Entries: 1 << 20, FreeBytes: 1})
		must(s.t, err)
		must(s.t, layer.Settle(d, res, stack))
		stack = append([]string{d}, stack...)
	}
	f, err := os.CreateTemp(s.dir, "erofs")
	must(s.t, err)
	defer f.Close()
	must(s.t, erofs.Write(s.ctx, f, stack, erofs.Options{}))
	return f.Name()
}

// TestSameAsOrdinary makes one image twice: of unpacked layers, and lazily.
func TestSameAsOrdinary(t *testing.T) {
	s := newSet(t)
	big := random(1, 9<<20+123)
	caps := entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "bin/ping", Mode: 0o4755, Uid: 3, Gid: 70000, Format: tar.FormatPAX,
		PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "SCHILY.xattr.user.mine": "v",
			"SCHILY.xattr.trusted.overlay.opaque": "y"}}, data: []byte("ping")}
	one := []entry{
		dir("./", 0o755), dir("bin", 0o755), caps, dir("etc", 0o750), reg("etc/passwd", []byte("root\n")), reg("etc/gone", []byte("x")),
		reg("big", big), hard("big2", "big"), link("sh", "bin/sh"), dir("opaque", 0o755), reg("opaque/low", []byte("low")),
		dir("dir", 0o700), reg("dir/below", random(2, 5000)), reg("empty", nil), dir("replaced", 0o755), reg("replaced/x", []byte("x")),
		{Header: tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Mode: 0o666, Devmajor: 1, Devminor: 3}},
		{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "dev/sda", Mode: 0o660, Devmajor: 8, Devminor: 300}},
		{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o600}},
		reg("implied/deep/er", []byte("i")), reg("file", []byte("first")), reg("file", []byte("second")), dir("was-dir", 0o755), reg("was-dir/f", []byte("1")),
	}
	for i := range 300 {
		one = append(one, reg(fmt.Sprintf("many/%03d", i), random(uint64(i), 200+i)))
	}
	two := []entry{
		reg("etc/.wh.gone", nil), reg("opaque/.wh..wh..opq", nil), reg("opaque/high", []byte("high")), reg("dir/above", random(3, 4096)),
		reg("replaced", []byte("now a file")), hard("low-link", "file"), hard("low-link2", "low-link"), reg(".wh.sh", nil), dir("was-dir", 0o711),
		reg(".wh.was-dir", nil), reg("was-dir/g", []byte("2")), reg("etc/shadow", []byte("s")), link("l", strings.Repeat("a/", 500)), reg("small", random(4, 2049)),
	}
	plain := [][]byte{pack(t, one...), pack(t, two...)}
	a := star(t, plain[0], estargz.WithChunkSize(1<<20))
	b := star(t, plain[1], estargz.WithMinChunkSize(64<<10))
	// The same bytes as the layers have, landmarks of the writer among them.
	for i, x := range []blob{a, b} {
		z, err := estargz.Unpack(io.NewSectionReader(bytes.NewReader(x.data), 0, int64(len(x.data))), new(estargz.GzipDecompressor))
		must(t, err)
		all, err := io.ReadAll(z)
		must(t, err)
		plain[i] = without(t, all, estargz.TOCTarName)
	}
	h := newHub(t, a, b)
	chain, info := s.index(h, a, b)
	if info.Total < int64(len(big)) || info.Chunks < 300 || info.Blobs != a.desc.Size+b.desc.Size {
		t.Errorf("%+v", info)
	}
	table := h.bytes.Load()
	if table > info.Blobs/4 {
		t.Errorf("the tables took %d of %d bytes", table, info.Blobs)
	}
	got := s.mount(s.add(h, chain))
	data, err := os.ReadFile(got + "/etc/passwd")
	must(t, err)
	if string(data) != "root\n" {
		t.Errorf("%q", data)
	}
	if st := s.state(chain); st.Complete || st.Opens != 1 || st.Here == 0 || st.Here > info.Total/4 || st.Fetched == 0 || st.Total != info.Total {
		t.Errorf("%+v", st)
	}
	want := dump(t, s.mount(s.ordinary(plain...)))
	same(t, dump(t, got), want)
	if st := s.state(chain); !st.Complete || st.Failed != 0 {
		t.Errorf("%+v", st)
	}
}

// same compares two dumps by lines.
func same(t testing.TB, have, want string) {
	t.Helper()
	a, b := strings.Split(have, "\n"), strings.Split(want, "\n")
	for _, l := range a {
		if !slices.Contains(b, l) {
			t.Errorf("only here: %.300s", l)
		}
	}
	for _, l := range b {
		if !slices.Contains(a, l) {
			t.Errorf("missing:   %.300s", l)
		}
	}
}

// without copies a tar but for a file.
func without(t testing.TB, plain []byte, name string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for r := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		if h.Name == name {
			continue
		}
		must(t, w.WriteHeader(h))
		_, err = io.Copy(w, r)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}
