package image

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/erofs"
)

// Both ways to mount a file show the same, and unmounting leaves nothing.
func TestMountEROFS(t *testing.T) {
	dir := t.TempDir()
	layer, file := filepath.Join(dir, "layer"), filepath.Join(dir, "erofs")
	if err := os.MkdirAll(filepath.Join(layer, "a"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(layer, "a", "b"), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := erofs.Write(t.Context(), f, []string{layer}, erofs.Options{}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for name, mount := range map[string]func(at string) error{
		"file": func(at string) error { return mountEROFS(file, at) },
		"loop": func(at string) error { return mountByLoop(file, at, unix.MS_RDONLY) },
	} {
		at := filepath.Join(dir, name)
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := mount(at); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		b, err := os.ReadFile(filepath.Join(at, "a", "b"))
		if err != nil || string(b) != "text" {
			t.Errorf("%s: %q %v", name, b, err)
		}
		if err := unmountLazy(at); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if mounts, _ := os.ReadFile("/proc/self/mounts"); strings.Contains(string(mounts), at) {
			t.Errorf("%s: still mounted", name)
		}
		if _, err := os.Lstat(at); err == nil {
			t.Errorf("%s: the directory stays", name)
		}
	}
}

// An image that names the chain of another one, but other blobs or tables of contents,
// does not get its files, nor gives it its own.
func TestLazyOfAnother(t *testing.T) {
	s := openAt(t, t.TempDir())
	chain := digest.FromString("diff")
	of := func(blob, table string) []ocispec.Descriptor {
		return []ocispec.Descriptor{{Digest: digest.FromString(blob), Size: 1,
			Annotations: map[string]string{"containerd.io/snapshot/stargz/toc.digest": digest.FromString(table).String()}}}
	}
	id := lazyID(chain, of("blob", "table"))
	s.lazy.mu.Lock()
	s.lazy.chains[id] = &lazyChain{id: id}
	s.lazy.mu.Unlock()
	if c := s.lazyFor(chain, of("blob", "table")); c == nil || c.id != id {
		t.Errorf("its own: %v", c)
	}
	if s.lazyFor(chain, of("other", "table")) != nil || s.lazyFor(chain, of("blob", "other")) != nil ||
		s.lazyFor(digest.FromString("other"), of("blob", "table")) != nil {
		t.Error("another image gets its files")
	}
}

// Who pulls the same layers from another repository does not become the first one's
// source, nor take its credentials away.
func TestLazySources(t *testing.T) {
	one, two := &registry.AuthConfig{Username: "one"}, &registry.AuthConfig{Username: "two"}
	c := &lazyChain{source: lazySource{Repository: "one.test/a"}}
	c.setAuthLocked("one.test/a", one)
	src := c.pulled("two.test/b", two)
	if got := src.repositories(); !slices.Equal(got, []string{"one.test/a", "two.test/b"}) {
		t.Errorf("%q", got)
	}
	if c.auths["one.test/a"] != one || c.auths["two.test/b"] != two || c.pid != renew {
		t.Errorf("%v", c.auths)
	}
	for _, name := range []string{"c", "d", "e", "e"} {
		src = c.pulled(name, nil)
	}
	if got := src.repositories(); !slices.Equal(got, []string{"one.test/a", "c", "d", "e"}) {
		t.Errorf("%q", got)
	}
	if len(c.auths) != 1 || c.auths["one.test/a"] != one {
		t.Errorf("%v", c.auths)
	}
	c.pulled("one.test/a", two)
	if c.auths["one.test/a"] != two {
		t.Error("a new pull from the same repository does not renew its credentials")
	}
}
