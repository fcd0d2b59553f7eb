package shim_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// overlayRoot is a root of two layers and a writable one, as the engine gives it.
type overlayRoot struct {
	dir   string
	mount task.Mount
	root  *taskv1.Root
}

func newOverlay(t testing.TB) *overlayRoot {
	base := rootfs(t)
	// The layers live on a tmpfs: overlays on overlays are not possible.
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	for _, d := range []string{"lower2", "upper", "work", "vol"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("cp", "-a", base, filepath.Join(dir, "lower1")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	o := &overlayRoot{dir: dir}
	o.write(t, "lower1/etc/keep", "keep")
	o.write(t, "lower1/etc/edit", "old")
	o.write(t, "lower1/etc/gone", "gone")
	o.write(t, "lower1/opt/sub/a", "a")
	o.write(t, "lower2/opt/sub/b", "b")
	opts := []string{"lowerdir=" + dir + "/lower2:" + dir + "/lower1", "upperdir=" + dir + "/upper", "workdir=" + dir + "/work"}
	o.mount = task.Mount{Type: "overlay", Source: "overlay", Options: opts}
	o.root = &taskv1.Root{
		Mounts: []*taskv1.Mount{{Type: "overlay", Source: "overlay", Options: opts}},
		Upper:  dir + "/upper",
	}
	return o
}

func (o *overlayRoot) write(t testing.TB, name, text string) {
	t.Helper()
	p := filepath.Join(o.dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func names(t *testing.T, r io.Reader) map[string]string {
	t.Helper()
	tr := tar.NewReader(r)
	m := map[string]string{}
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return m
		}
		if err != nil {
			t.Fatalf("tar: %v", err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		m[h.Name] = fmt.Sprintf("%c%s%s", h.Typeflag, h.Linkname, b)
	}
}

func tarOf(entries ...*tar.Header) *bytes.Buffer {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := new(tar.Header)
		*h = *e // the caller's may be used again
		text := h.PAXRecords["text"]
		h.PAXRecords = nil
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		h.Size = int64(len(text))
		if err := w.WriteHeader(h); err != nil {
			panic(err)
		}
		io.WriteString(w, text)
	}
	w.Close()
	return &b
}

var hello = &tar.Header{Name: "hello", PAXRecords: text("hello")}

func text(s string) map[string]string { return map[string]string{"text": s} }

func TestFiles(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	o := newOverlay(t)
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Rootfs: []task.Mount{o.mount}, Stdin: true, StdinOnce: true, Spec: spec("", func(s *specs.Spec) {
		s.Root = &specs.Root{Path: "rootfs"}
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/vol", Type: "bind", Source: o.dir + "/vol", Options: []string{"rbind"}})
	}, "sh", "-c", "echo new > /etc/edit; rm /etc/gone; mkdir /new; echo x > /new/x; ln -s /etc/keep /link; ln -s /etc /dirlink; ln -s ../../../../../etc/up /up; rm -r /opt/sub; mkdir /opt/sub; echo c > /opt/sub/c; echo v > /vol/v; mkfifo /fifo; ln /new/x /new/y; ln -s /proc/1/root/etc /magic; echo ready; cat")}); err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{})
	a, err := s.Attach(ctx, "a", "", task.Stdio{Stdout: onLine(ready)})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := s.Start(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ready:
	case <-ctx.Done():
		t.Fatal("container is not ready")
	}
	check := func(f task.Files) {
		t.Helper()
		st, err := s.StatFile(ctx, f, "/link")
		if err != nil || st.Name != "link" || st.LinkTarget != "/etc/keep" || st.Mode&os.ModeSymlink == 0 {
			t.Errorf("stat of link: %+v, %v", st, err)
		}
		if st, err := s.StatFile(ctx, f, "up"); err != nil || st.LinkTarget != "/etc/up" {
			t.Errorf("stat of up: %+v, %v", st, err)
		}
		if _, err := s.StatFile(ctx, f, "/none"); !errdefs.IsNotFound(err) {
			t.Errorf("stat of nothing: %v", err)
		}
		if _, err := s.StatFile(ctx, f, "/dirlink/keep"); err != nil {
			t.Errorf("stat through a link: %v", err)
		}
		for p, want := range map[string]map[string]string{
			"/etc/edit":     {"edit": "0new\n"},
			"/new":          {"new/": "5", "new/x": "0x\n", "new/y": "1new/x"},
			"/new/":         {"new/": "5", "new/x": "0x\n", "new/y": "1new/x"},
			"/new/.":        {"./": "5", "./x": "0x\n", "./y": "1./x"},
			"/link":         {"link": "2/etc/keep"},
			"/dirlink/keep": {"keep": "0keep"},
			"/vol":          {"vol/": "5", "vol/v": "0v\n"},
			"/fifo":         {"fifo": "6"},
		} {
			r, _, err := s.ReadFiles(ctx, f, p)
			if err != nil {
				t.Errorf("read %s: %v", p, err)
				continue
			}
			if got := names(t, r); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("read %s: %v, want %v", p, got, want)
			}
			r.Close()
		}
	}
	running := task.Files{ID: "a", Root: o.root, Skip: []string{"/dev", "/proc", "/sys", "/vol"}}
	check(running)
	if _, _, err := s.ReadFiles(ctx, running, "/magic/"); err == nil {
		t.Error("followed a magic link")
	}
	changes := func(f task.Files) string {
		var list []string
		if err := s.Changes(ctx, f, func(c *taskv1.Change) error {
			list = append(list, "CAD"[c.Kind:c.Kind+1]+" "+c.Path)
			return nil
		}); err != nil {
			t.Error(err)
		}
		return strings.Join(list, "\n")
	}
	want := `A /dirlink
C /etc
C /etc/edit
D /etc/gone
A /fifo
A /link
A /magic
A /new
A /new/x
A /new/y
C /opt
C /opt/sub
D /opt/sub/a
D /opt/sub/b
A /opt/sub/c
A /up`
	sorted := func(s string) string {
		l := strings.Split(s, "\n")
		sort.Strings(l)
		return strings.Join(l, "\n")
	}
	if got := changes(running); sorted(got) != sorted(want) {
		t.Errorf("changes:\n%s\nwant:\n%s", got, want)
	}
	r, err := s.Diff(ctx, running)
	if err != nil {
		t.Fatal(err)
	}
	layer := names(t, r)
	r.Close()
	for name, want := range map[string]string{
		"etc/": "5", "etc/.wh.gone": "0", "etc/edit": "0new\n", "new/x": "0x\n", "new/y": "1new/x",
		"opt/sub/": "5", "opt/sub/.wh..wh..opq": "0", "opt/sub/c": "0c\n", "fifo": "6", "link": "2/etc/keep",
	} {
		if layer[name] != want {
			t.Errorf("layer: %s is %q, want %q", name, layer[name], want)
		}
	}
	r, err = s.Export(ctx, running)
	if err != nil {
		t.Fatal(err)
	}
	all := names(t, r)
	r.Close()
	if all["etc/keep"] != "0keep" || all["bin/busybox"] == "" || all["vol/v"] != "" || all["new/y"] != "1new/x" {
		t.Errorf("export: %d entries", len(all))
	}

	// Writing, with every trap that an archive can hold.
	if err := s.WriteFiles(ctx, running, "/dirlink", tarOf(
		&tar.Header{Name: "w", PAXRecords: text("written"), Uid: 5, Gid: 6},
		&tar.Header{Name: "../../esc", PAXRecords: text("esc")},
		&tar.Header{Name: "d/e/f", PAXRecords: text("deep")},
		&tar.Header{Name: "trap", Typeflag: tar.TypeSymlink, Linkname: "/../../../../../../tmp"},
		&tar.Header{Name: "trap/in", PAXRecords: text("in")},
		&tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "w"},
		&tar.Header{Name: "dev", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3},
	), false, false); err != nil {
		t.Fatal(err)
	}
	for p, want := range map[string]string{"etc/w": "written", "etc/esc": "esc", "etc/d/e/f": "deep", "tmp/in": "in", "etc/hard": "written"} {
		b, err := os.ReadFile(filepath.Join(o.dir, "upper", p))
		if err != nil || string(b) != want {
			t.Errorf("written %s: %q, %v", p, b, err)
		}
	}
	if st, err := os.Stat(filepath.Join(o.dir, "upper/etc/w")); err != nil || st.Sys().(*syscall.Stat_t).Uid != 5 {
		t.Errorf("owner: %v, %v", st, err)
	}
	if err := s.WriteFiles(ctx, running, "/", tarOf(&tar.Header{Name: "etc", PAXRecords: text("x")}), true, false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("directory overwritten with a file: %v", err)
	}
	if err := s.WriteFiles(ctx, running, "/none", tarOf(), false, false); !errdefs.IsNotFound(err) {
		t.Errorf("write to nowhere: %v", err)
	}
	if err := s.WriteFiles(ctx, running, "/etc/keep", tarOf(), false, false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("write to a file: %v", err)
	}
	if err := s.WriteFiles(ctx, running, "/vol", tarOf(&tar.Header{Name: "w", PAXRecords: text("to the volume")}), false, false); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(filepath.Join(o.dir, "vol/w")); err != nil || string(b) != "to the volume" {
		t.Errorf("volume: %q, %v", b, err)
	}
	if err := os.Remove(filepath.Join(o.dir, "vol/w")); err != nil {
		t.Error(err)
	}
	torn := tarOf(&tar.Header{Name: "torn", PAXRecords: text(strings.Repeat("x", 100000))})
	torn.Truncate(50000)
	if err := s.WriteFiles(ctx, running, "/tmp", torn, false, false); err == nil {
		t.Error("a torn archive was taken")
	}

	// The same without the container.
	if err := s.Kill(ctx, "a", "", syscall.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if e, err := s.Wait(ctx, "a", ""); err != nil || e.Status != 137 {
		t.Fatalf("exit %+v, %v", e, err)
	}
	if _, err := s.Delete(ctx, "a", ""); err != nil {
		t.Fatal(err)
	}
	stopped := running
	stopped.Root.Volumes = []*taskv1.Mount{{Type: "bind", Source: o.dir + "/vol", Target: "/vol", Options: []string{"rbind"}}}
	check(stopped)
	if err := s.WriteFiles(ctx, stopped, "/vol", tarOf(&tar.Header{Name: "again", PAXRecords: text("again")}), false, false); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(filepath.Join(o.dir, "vol/again")); err != nil || string(b) != "again" {
		t.Errorf("volume: %q, %v", b, err)
	}
	if err := s.WriteFiles(ctx, stopped, "/", tarOf(&tar.Header{Name: "stopped", PAXRecords: text("y")}), false, false); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(filepath.Join(o.dir, "upper/stopped")); err != nil || string(b) != "y" {
		t.Errorf("written while stopped: %q, %v", b, err)
	}
	if _, err := os.Stat("/etc/esc"); !errors.Is(err, os.ErrNotExist) {
		t.Error("escaped")
	}
}

// onLine closes ready at the first line written.
func onLine(ready chan struct{}) io.Writer { return &lineWatcher{ready: ready} }

type lineWatcher struct {
	ready chan struct{}
	done  bool
}

func (l *lineWatcher) Write(p []byte) (int, error) {
	if !l.done && bytes.IndexByte(p, '\n') >= 0 {
		l.done = true
		close(l.ready)
	}
	return len(p), nil
}

// TestAccounts: what a running container has as its accounts is read without
// entering it, and nothing else is, whatever it has put there.
func TestAccounts(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	o := newOverlay(t)
	root := o.dir + "/lower1"
	for _, name := range []string{"passwd", "group"} {
		if err := os.RemoveAll(filepath.Join(root, "etc", name)); err != nil {
			t.Fatal(err)
		}
	}
	o.write(t, "lower1/etc/group", "root:x:0:\n")
	o.write(t, "lower1/data/passwd", "me:x:7:7::/:/bin/sh\n")
	if err := os.Symlink("/../../../../data/passwd", root+"/etc/passwd"); err != nil {
		t.Fatal(err)
	}
	const id = "accounts"
	if _, err := s.Create(ctx, task.CreateRequest{ID: id, Rootfs: []task.Mount{{Type: "bind", Source: root, Options: []string{"bind", "rw"}}},
		Spec: spec("", func(s *specs.Spec) { s.Root = &specs.Root{Path: "rootfs"} }, "sleep", "1000")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, id, ""); err != nil {
		t.Fatal(err)
	}
	passwd, group, err := s.Accounts(ctx, id)
	if err != nil || string(passwd) != "me:x:7:7::/:/bin/sh\n" || string(group) != "root:x:0:\n" {
		t.Errorf("%q %q %v", passwd, group, err)
	}
	for what, change := range map[string]func(string) error{
		"a large file":           func(p string) error { return os.WriteFile(p, make([]byte, 1<<20), 0o644) },
		"a directory":            func(p string) error { return os.Mkdir(p, 0o755) },
		"a pipe":                 func(p string) error { return syscall.Mkfifo(p, 0o644) },
		"a link to itself":       func(p string) error { return os.Symlink("group", p) },
		"a link to a device":     func(p string) error { return os.Symlink("/dev/zero", p) },
		"a link to the kernel's": func(p string) error { return os.Symlink("/proc/1/root/etc/passwd", p) },
	} {
		p := root + "/etc/group"
		if err := os.RemoveAll(p); err != nil {
			t.Fatal(err)
		}
		if err := change(p); err != nil {
			t.Fatal(err)
		}
		if _, group, err := s.Accounts(ctx, id); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %q %v", what, group, err)
		}
	}
	if _, _, err := s.Accounts(ctx, "nobody"); !errdefs.IsNotFound(err) {
		t.Errorf("no container: %v", err)
	}
	if err := os.RemoveAll(root + "/etc/group"); err != nil {
		t.Fatal(err)
	}
	if _, group, err := s.Accounts(ctx, id); err != nil || len(group) > 0 {
		t.Errorf("no file: %q %v", group, err)
	}
	if err := s.Kill(ctx, id, "", syscall.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Wait(ctx, id, ""); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Accounts(ctx, id); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("of one that has ended: %v", err)
	}
	if _, err := s.Delete(ctx, id, ""); err != nil {
		t.Fatal(err)
	}
}
