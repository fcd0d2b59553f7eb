package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

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
