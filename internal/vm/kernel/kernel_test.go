package kernel

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// cacheDir is shared by the tests of all packages, so that the package is
// fetched once a machine.
func cacheDir() string {
	base := os.Getenv("TENON_CACHE")
	if base == "" {
		base = "/var/cache/tenon-test"
	}
	return filepath.Join(base, "kernel")
}

func limited(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func debianKernel(t *testing.T) *Kernel {
	t.Helper()
	k, err := Find(limited(t), Config{Kernel: Debian, Dir: cacheDir()})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestDebiansKernel(t *testing.T) {
	k := debianKernel(t)
	if !strings.Contains(k.Release, "cloud-amd64") || !strings.HasPrefix(k.Origin, "linux-image-"+k.Release+"_") {
		t.Errorf("found %+v", k)
	}
	list, err := k.Needed(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range list {
		names = append(names, m.Name)
		deps, err := dependencies(m.Data)
		if err != nil {
			t.Errorf("%s: %v", m.Name, err)
		}
		for _, d := range deps {
			if !slices.Contains(names, strings.ReplaceAll(d, "-", "_")) {
				t.Errorf("%s stands before %s, which it depends on", m.Name, d)
			}
		}
	}
	for _, want := range []string{"virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "erofs", "overlay", "fuse", "virtio_rng", "virtio_balloon"} {
		if !slices.Contains(names, want) {
			t.Errorf("%s is missing in %v", want, names)
		}
	}
}

func TestInitramfs(t *testing.T) {
	k := debianKernel(t)
	dir := t.TempDir()
	initFile, extra := filepath.Join(dir, "init"), filepath.Join(dir, "extra")
	for name, text := range map[string]string{initFile: "the init\n", extra: "more"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	files := Files{Init: initFile, Extra: map[string]string{"/usr/bin/more": extra}}
	a, err := k.Initramfs(limited(t), dir, files)
	if err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(a.Path)
	if err != nil {
		t.Fatal(err)
	}
	again, err := k.Initramfs(limited(t), filepath.Join(dir, "other"), files)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := os.ReadFile(again.Path); err != nil || !bytes.Equal(first, second) || a.Hash != again.Hash {
		t.Errorf("not reproducible: %v, %s, %s", err, a.Hash, again.Hash)
	}
	// busybox's cpio reads what ours writes.
	cmd := exec.Command("busybox", "cpio", "-idm", "--quiet")
	cmd.Dir, cmd.Stdin = t.TempDir(), bytes.NewReader(first)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	for name, want := range map[string]string{"init": "the init\n", "usr/bin/more": "more"} {
		b, err := os.ReadFile(filepath.Join(cmd.Dir, name))
		if err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	list, err := os.ReadFile(filepath.Join(cmd.Dir, ModuleList))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(string(list)) {
		if st, err := os.Stat(filepath.Join(cmd.Dir, name)); err != nil || st.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if st, err := os.Lstat(filepath.Join(cmd.Dir, "dev/console")); err != nil || st.Mode()&os.ModeCharDevice == 0 {
		t.Errorf("dev/console: %v, %v", st, err)
	}
	if err := os.WriteFile(initFile, []byte("another init\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := k.Initramfs(limited(t), dir, files); err != nil || b.Hash == a.Hash {
		t.Errorf("another init, the same hash: %v, %v", b, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".initramfs-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestMissing(t *testing.T) {
	ctx := limited(t)
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, bytes.Repeat([]byte("no kernel "), 100), 0o600); err != nil {
		t.Fatal(err)
	}
	image := func(release string) string { // a kernel's header and its version
		b := make([]byte, 0x400)
		copy(b[0x202:], "HdrS")
		b[0x20e] = 0x10
		copy(b[0x210:], release+" (builder@host) #1")
		file := filepath.Join(dir, release)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	for _, release := range []string{"5.14.0-el9", "6.1.0-1-cloud-amd64", "10.0.1"} {
		if k, err := Find(ctx, Config{Kernel: image(release)}); err != nil || k.Release != release {
			t.Errorf("%s: %+v, %v", release, k, err)
		}
	}
	for _, c := range []struct {
		name string
		c    Config
		is   error
		says string
	}{
		{"too old a kernel", Config{Kernel: image("5.10.0-39-amd64")}, errdefs.ErrFailedPrecondition, "5.14 or newer"},
		{"one much older", Config{Kernel: image("4.18.0-553.el8")}, errdefs.ErrFailedPrecondition, "is Linux 4.18.0-553.el8"},
		{"a relative path", Config{Kernel: "vmlinuz"}, errdefs.ErrInvalidArgument, "absolute path"},
		{"another file", Config{Kernel: text}, errdefs.ErrInvalidArgument, "not a bzImage"},
		{"no file", Config{Kernel: filepath.Join(dir, "none")}, os.ErrNotExist, "none"},
	} {
		if _, err := Find(ctx, c.c); !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	k := debianKernel(t)
	bare := filepath.Join(dir, "modules")
	if err := os.MkdirAll(filepath.Join(bare, "kernel"), 0o755); err != nil {
		t.Fatal(err)
	}
	mine, err := Find(ctx, Config{Kernel: k.Image, Modules: bare})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := mine.Needed(ctx); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "vm.kernel-modules") {
		t.Errorf("no modules.builtin: %v", err)
	}
	if err := os.WriteFile(filepath.Join(bare, "modules.builtin"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := mine.Needed(ctx); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), metapackage) {
		t.Errorf("no modules: %v", err)
	}
}

func TestCompressedModules(t *testing.T) {
	k := debianKernel(t)
	files, _, err := k.index()
	if err != nil {
		t.Fatal(err)
	}
	plain, err := readModule(t.Context(), files["virtio_rng"])
	if err != nil {
		t.Fatal(err)
	}
	for ext, tool := range map[string]string{".gz": "gzip", ".xz": "xz"} {
		p := filepath.Join(t.TempDir(), "virtio-rng.ko"+ext)
		cmd := exec.Command(tool, "-c")
		cmd.Stdin = bytes.NewReader(plain)
		packed, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, packed, 0o600); err != nil {
			t.Fatal(err)
		}
		if b, err := readModule(t.Context(), p); err != nil || !bytes.Equal(b, plain) {
			t.Errorf("%s: %d bytes, %v", ext, len(b), err)
		}
	}
}

func TestNatural(t *testing.T) {
	list := []string{"a-6.1.0-9_6.1.10-1", "a-6.1.0-10_6.1.12-1", "a-6.1.0-56_6.1.176-1", "a-6.1.0-56_6.1.192-2", "a-6.12.1"}
	got := slices.Clone(list)
	slices.Reverse(got)
	slices.SortFunc(got, func(a, b string) int {
		if natural(a, b) {
			return -1
		}
		return 1
	})
	if !slices.Equal(got, list) {
		t.Errorf("sorted %v", got)
	}
}

func FuzzRelease(f *testing.F) {
	h := make([]byte, 0x400)
	copy(h[0x202:], "HdrS")
	h[0x20e] = 0x80
	copy(h[0x280:], "6.1.0-1-cloud-amd64 (debian) #1")
	f.Add(h)
	f.Add(h[:0x210])
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := release(bytes.NewReader(b), "image"); err == nil && (r == "" || strings.ContainsAny(r, "/ \n")) {
			t.Errorf("release %q", r)
		}
	})
}

func FuzzDependencies(f *testing.F) {
	f.Add([]byte("\x7fELF\x02\x01\x01"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = dependencies(b) })
}
