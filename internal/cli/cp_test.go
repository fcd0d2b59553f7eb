package cli

import (
	"archive/tar"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSplitCopyArg(t *testing.T) {
	for _, x := range []struct{ in, name, path string }{
		{"web:/etc", "web", "/etc"},
		{"web:etc:x", "web", "etc:x"},
		{"/a:b", "", "/a:b"},
		{"./a:b", "", "./a:b"},
		{"../a:b", "", "../a:b"},
		{"file", "", "file"},
		{"-", "", "-"},
	} {
		if name, p := splitCopyArg(x.in); name != x.name || p != x.path {
			t.Errorf("%s: got %q %q", x.in, name, p)
		}
	}
}

func TestPlanCopy(t *testing.T) {
	file := func(p string) place { return place{path: p, exists: true} }
	dir := func(p string) place { return place{path: p, exists: true, dir: true} }
	missing := func(p string) place { return place{path: p} }
	for _, x := range []struct {
		name     string
		src, dst place
		dir, as  string
		err      bool
	}{
		{"file to directory", file("/s/f"), dir("/d"), "/d", "f", false},
		{"file to directory with slash", file("/s/f"), dir("/d/"), "/d", "f", false},
		{"file over file", file("/s/f"), file("/d/g"), "/d", "g", false},
		{"file to new name", file("/s/f"), missing("/d/g"), "/d", "g", false},
		{"file to new directory", file("/s/f"), missing("/d/g/"), "", "", true},
		{"file over file with slash", file("/s/f"), file("/d/g/"), "", "", true},
		{"directory to directory", dir("/s/x"), dir("/d"), "/d", "x", false},
		{"directory with slash to directory", dir("/s/x/"), dir("/d"), "/d", "x", false},
		{"contents to directory", dir("/s/x/."), dir("/d"), "/d", ".", false},
		{"root to directory", dir("/"), dir("/d"), "/d", ".", false},
		{"directory over file", dir("/s/x"), file("/d/g"), "", "", true},
		{"directory to new name", dir("/s/x"), missing("/d/y"), "/d", "y", false},
		{"directory to new name with slash", dir("/s/x"), missing("/d/y/"), "/d", "y", false},
		{"contents to new name", dir("/s/x/."), missing("/d/y"), "/d", "y", false},
		{"file to root", file("/s/f"), dir("/"), "/", "f", false},
	} {
		d, as, err := planCopy(x.src, x.dst)
		if d != x.dir || as != x.as || (err != nil) != x.err {
			t.Errorf("%s: got %q %q %v, want %q %q", x.name, d, as, err, x.dir, x.as)
		}
	}
}

func TestPackExtract(t *testing.T) {
	src, dst := filepath.Join(t.TempDir(), "src"), t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(src, "sub"), 0o755))
	must(os.WriteFile(filepath.Join(src, "a"), []byte("hello"), 0o640))
	must(os.Link(filepath.Join(src, "a"), filepath.Join(src, "sub", "hard")))
	must(os.Symlink("/etc/passwd", filepath.Join(src, "link")))
	must(os.Chmod(filepath.Join(src, "sub"), 0o500))
	when := time.Unix(1_000_000_000, 0)
	must(os.Chtimes(filepath.Join(src, "sub"), when, when))
	var buf bytes.Buffer
	p := &packer{tw: tar.NewWriter(&buf)}
	must(p.pack(src, "new"))
	must(p.tw.Close())
	root, err := os.OpenRoot(dst)
	must(err)
	defer root.Close()
	x := &extractor{root: root, name: "new"}
	must(x.extract(&buf))
	fi, err := os.Stat(filepath.Join(dst, "new", "sub"))
	must(err)
	if fi.Mode().Perm() != 0o500 || !fi.ModTime().Equal(when) {
		t.Errorf("directory: %v %v", fi.Mode(), fi.ModTime())
	}
	fa, err := os.Stat(filepath.Join(dst, "new", "a"))
	must(err)
	fh, err := os.Stat(filepath.Join(dst, "new", "sub", "hard"))
	must(err)
	if !os.SameFile(fa, fh) || fa.Mode().Perm() != 0o640 || x.bytes != 5 {
		t.Errorf("hard link: %v %v, %d bytes", fa, fh, x.bytes)
	}
	if l, _ := os.Readlink(filepath.Join(dst, "new", "link")); l != "/etc/passwd" {
		t.Errorf("link leads to %q", l)
	}
}

// entry is one entry of a test archive.
type entry struct {
	name string
	typ  byte
	text string // content, or where a link leads
}

func archive(entries ...entry) *bytes.Buffer {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.typ, Mode: 0o755}
		switch e.typ {
		case tar.TypeReg:
			h.Size = int64(len(e.text))
		case tar.TypeSymlink, tar.TypeLink:
			h.Linkname = e.text
		}
		if err := tw.WriteHeader(h); err != nil {
			panic(err)
		}
		if e.typ == tar.TypeReg {
			tw.Write([]byte(e.text))
		}
	}
	tw.Close()
	return &b
}

func TestExtractStaysInside(t *testing.T) {
	for _, x := range []struct {
		name string
		in   []entry
		ok   bool
	}{
		{"plain", []entry{{"top", tar.TypeDir, ""}, {"top/f", tar.TypeReg, "x"}}, true},
		{"leading slash", []entry{{"/top/", tar.TypeDir, ""}, {"/top/f", tar.TypeReg, "x"}}, true},
		{"dot dot", []entry{{"top", tar.TypeDir, ""}, {"top/../../victim/f", tar.TypeReg, "x"}}, false},
		{"dot dot as top", []entry{{"..", tar.TypeDir, ""}, {"../f", tar.TypeReg, "x"}}, true}, // the top is renamed, whatever it is
		{"other top", []entry{{"top", tar.TypeDir, ""}, {"victim/f", tar.TypeReg, "x"}}, false},
		{"through a link", []entry{{"top", tar.TypeDir, ""}, {"top/l", tar.TypeSymlink, "../../victim"}, {"top/l/f", tar.TypeReg, "x"}}, false},
		{"through an absolute link", []entry{{"top", tar.TypeDir, ""}, {"top/l", tar.TypeSymlink, "VICTIM"}, {"top/l/f", tar.TypeReg, "x"}}, false},
		{"top is a link", []entry{{"top", tar.TypeSymlink, "VICTIM"}, {"top/f", tar.TypeReg, "x"}}, false},
		{"hard link out", []entry{{"top", tar.TypeDir, ""}, {"top/h", tar.TypeLink, "../victim/secret"}}, false},
		{"hard link through a link", []entry{{"top", tar.TypeDir, ""}, {"top/l", tar.TypeSymlink, "VICTIM"}, {"top/h", tar.TypeLink, "top/l/secret"}}, false},
		{"file then directory", []entry{{"top", tar.TypeDir, ""}, {"top/f", tar.TypeReg, ""}, {"top/f", tar.TypeDir, ""}}, false},
		{"link replaced by file", []entry{{"top", tar.TypeDir, ""}, {"top/l", tar.TypeSymlink, "VICTIM/secret"}, {"top/l", tar.TypeReg, "x"}}, true},
		{"chmod through a link", []entry{{"top", tar.TypeDir, ""}, {"top/l", tar.TypeSymlink, "VICTIM"}, {"top/l", tar.TypeDir, ""}}, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			base := t.TempDir()
			victim, dst := filepath.Join(base, "victim"), filepath.Join(base, "dst")
			for _, d := range []string{victim, dst} {
				if err := os.Mkdir(d, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(filepath.Join(victim, "secret"), []byte("s"), 0o600); err != nil {
				t.Fatal(err)
			}
			for i := range x.in {
				x.in[i].text = strings.ReplaceAll(x.in[i].text, "VICTIM", victim)
			}
			root, err := os.OpenRoot(dst)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			err = (&extractor{root: root, name: "new"}).extract(archive(x.in...))
			if (err == nil) != x.ok {
				t.Errorf("got error %v", err)
			}
			list, _ := os.ReadDir(victim)
			b, _ := os.ReadFile(filepath.Join(victim, "secret"))
			fi, _ := os.Stat(filepath.Join(victim, "secret"))
			if len(list) != 1 || string(b) != "s" || fi.Mode().Perm() != 0o600 {
				t.Errorf("the archive reached the victim: %v %q %v", list, b, fi.Mode())
			}
			if fi, _ := os.Stat(victim); fi.Mode().Perm() != 0o700 {
				t.Errorf("the victim's mode became %v", fi.Mode())
			}
		})
	}
}

func FuzzExtract(f *testing.F) {
	f.Add(archive(entry{"top", tar.TypeDir, ""}, entry{"top/f", tar.TypeReg, "x"}).Bytes())
	f.Add(archive(entry{"a", tar.TypeSymlink, ".."}, entry{"a/f", tar.TypeReg, "x"}).Bytes())
	f.Add([]byte("not an archive"))
	f.Fuzz(func(t *testing.T, in []byte) {
		base := t.TempDir()
		dst := filepath.Join(base, "dst")
		if err := os.Mkdir(dst, 0o755); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(dst)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		_ = (&extractor{root: root, name: "new"}).extract(bytes.NewReader(in)) // any error will do
		list, err := os.ReadDir(base)
		if err != nil || len(list) != 1 {
			t.Fatalf("outside of the destination: %v, %v", list, err)
		}
		list, _ = os.ReadDir(dst)
		if len(list) > 1 || len(list) == 1 && list[0].Name() != "new" {
			t.Fatalf("beside the new name: %v", list)
		}
	})
}

func TestExtractContents(t *testing.T) {
	dst := t.TempDir()
	root, err := os.OpenRoot(dst)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	in := archive(entry{"./", tar.TypeDir, ""}, entry{"./a", tar.TypeReg, "1"}, entry{"./d/", tar.TypeDir, ""}, entry{"./d/b", tar.TypeReg, "2"})
	if err := (&extractor{root: root, name: "."}).extract(in); err != nil {
		t.Fatal(err)
	}
	var got []string
	err = filepath.WalkDir(dst, func(p string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(dst, p)
		got = append(got, rel)
		return err
	})
	slices.Sort(got)
	if diff := cmp.Diff([]string{".", "a", "d", "d/b"}, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

func TestLocalDestination(t *testing.T) {
	dir := t.TempDir()
	for name, target := range map[string]string{"toDir": "d", "toNothing": "x", "loop": "loop"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		in   string
		want place
		err  bool
	}{
		{"d", place{dir + "/d", true, true}, false},
		{"d/", place{dir + "/d/", true, true}, false},
		{"toDir", place{dir + "/d", true, true}, false},
		{"toNothing", place{dir + "/x", false, false}, false},
		{"new/", place{dir + "/new/", false, false}, false},
		{"no/such", place{}, true},
		{"loop", place{}, true},
	} {
		got, err := localDestination(dir + "/" + x.in)
		if got != x.want || (err != nil) != x.err {
			t.Errorf("%s: got %+v, %v", x.in, got, err)
		}
	}
	if _, err := localDestination("/dev/null"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a device: %v", err)
	}
}
