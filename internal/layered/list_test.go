package layered

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMerged(t *testing.T) {
	low, high := t.TempDir(), t.TempDir()
	put := func(dir, name, data string) {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []string{"a/one", "a/two", "b/x/deep", "c/old", "f"} {
		put(low, n, "low")
	}
	put(high, "a/one", "high")
	put(high, "c/new", "high")
	for _, n := range []string{"b", "a/two"} {
		if err := unix.Mknod(filepath.Join(high, n), unix.S_IFCHR, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Setxattr(filepath.Join(high, "c"), "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("f", filepath.Join(high, "l")); err != nil {
		t.Fatal(err)
	}
	s := Stack{high, low}
	all, err := s.Merged(100, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for p, e := range all {
		got = append(got, p)
		l, err := s.Lookup(p)
		if err != nil || l.Stat.Ino != e.Stat.Ino || l.layer != e.layer {
			t.Errorf("%s: lookup %v %v", p, l, err)
		}
	}
	slices.Sort(got)
	if want := []string{"/a", "/a/one", "/c", "/c/new", "/f", "/l"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if to, err := all["/l"].Link(); err != nil || to != "f" {
		t.Errorf("link: %q %v", to, err)
	}
	if list, err := s.List("/a", 10); err != nil || !slices.Equal(list, []string{"one"}) {
		t.Errorf("list: %v %v", list, err)
	}
	for _, gone := range []string{"/a/two", "/b/x", "/c/old", "/f/x", "/none"} {
		if _, err := s.Lookup(gone); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", gone, err)
		}
	}
	if _, err := s.Merged(3, func() error { return nil }); !errors.Is(err, ErrTooMany) {
		t.Errorf("too many: %v", err)
	}
}
