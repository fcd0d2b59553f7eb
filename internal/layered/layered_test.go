package layered

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLookupFollowsOverlayRules(t *testing.T) {
	top, mid, low := t.TempDir(), t.TempDir(), t.TempDir()
	put := func(root, name, text string) {
		t.Helper()
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	put(low, "etc/passwd", "low")
	put(mid, "etc/passwd", "mid")
	put(low, "etc/gone", "low")
	put(low, "opaque/below", "low")
	put(low, "was-dir/below", "low")
	put(low, "outside", "low")
	put(mid, "real/file", "mid")
	do(os.MkdirAll(filepath.Join(top, "etc"), 0o755))
	do(unix.Mknod(filepath.Join(top, "etc/gone"), unix.S_IFCHR, 0))
	do(os.MkdirAll(filepath.Join(top, "opaque"), 0o755))
	do(unix.Setxattr(filepath.Join(top, "opaque"), "trusted.overlay.opaque", []byte("y"), 0))
	put(top, "was-dir", "file")
	do(os.Symlink("/real/../real/file", filepath.Join(top, "link")))
	do(os.Symlink("../../../../../../etc/passwd", filepath.Join(top, "up")))
	do(os.Symlink("loop", filepath.Join(top, "loop")))
	do(os.Symlink("real", filepath.Join(low, "dirlink")))
	s := Stack{top, mid, low}
	for _, c := range []struct{ name, want string }{
		{"/etc/passwd", "mid"}, {"etc/passwd", "mid"}, {"/link", "mid"}, {"/up", "mid"}, {"/dirlink/file", "mid"},
		{"/outside", "low"}, {"/was-dir", "file"}, {"/../../etc/passwd", "mid"},
	} {
		f, err := s.Open(c.name)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		b, _ := io.ReadAll(f)
		f.Close()
		if string(b) != c.want {
			t.Errorf("%s: got %q, want %q", c.name, b, c.want)
		}
	}
	for _, name := range []string{"/etc/gone", "/opaque/below", "/nothing"} {
		if _, err := s.Open(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: got %v, want not exist", name, err)
		}
	}
	for _, name := range []string{"/loop", "/was-dir/below", "/etc"} {
		if f, err := s.Open(name); err == nil {
			f.Close()
			t.Errorf("%s: opened", name)
		}
	}
	if dir, empty, err := s.IsDir("/opaque"); !dir || !empty || err != nil {
		t.Errorf("/opaque: %v %v %v", dir, empty, err)
	}
	if dir, empty, err := s.IsDir("/etc"); !dir || empty || err != nil {
		t.Errorf("/etc: %v %v %v", dir, empty, err)
	}
}

func TestSubFindsWhatAMergedDirectoryIsMadeOf(t *testing.T) {
	top, mid, low := t.TempDir(), t.TempDir(), t.TempDir()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, root := range []string{top, mid, low} {
		do(os.MkdirAll(filepath.Join(root, "d/e"), 0o755))
	}
	do(os.WriteFile(filepath.Join(low, "d/f"), nil, 0o600))
	do(os.Symlink("../../d", filepath.Join(low, "link")))
	do(unix.Setxattr(filepath.Join(mid, "d/e"), "trusted.overlay.opaque", []byte("y"), 0))
	s := Stack{top, mid, low}
	for _, c := range []struct {
		name string
		want []string
		dir  bool
	}{
		{"", []string{top, mid, low}, true},
		{"d", []string{top + "/d", mid + "/d", low + "/d"}, true},
		{"d/e", []string{top + "/d/e", mid + "/d/e"}, true},
		{"link/e", []string{top + "/d/e", mid + "/d/e"}, true},
		{"d/f", []string{low + "/d/f"}, false},
	} {
		got, dir, err := s.Sub(c.name)
		if err != nil || dir != c.dir || !slices.Equal(got, c.want) {
			t.Errorf("%q: %v %v %v, want %v %v", c.name, got, dir, err, c.want, c.dir)
		}
	}
	if _, _, err := s.Sub("none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
}
