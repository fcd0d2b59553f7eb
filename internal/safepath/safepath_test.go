package safepath

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// hostile makes a root whose links lead out, and a directory outside.
func hostile(t *testing.T) (root *os.File, outside string) {
	t.Helper()
	base := t.TempDir()
	outside = filepath.Join(base, "outside")
	for _, d := range []string{"outside/d", "root/d", "root/real"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{
		"abs": outside, "up": "../../../../../../../../.." + outside, "magic": "/proc/self/root" + outside,
		"dot": "../outside", "loop": "loop", "in": "/real", "file": outside + "/secret",
	} {
		if err := os.Symlink(to, filepath.Join(base, "root", name)); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.Open(filepath.Join(base, "root"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root, outside
}

func TestStaysInside(t *testing.T) {
	root, outside := hostile(t)
	before, err := os.ReadDir(outside)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"abs", "up", "magic", "dot", "loop", "file", "../outside", "/../../outside", "d/../../outside"} {
		for op, f := range map[string]func() error{
			"open": func() error {
				f, err := Open(root, name+"/secret", os.O_RDONLY, 0)
				if err == nil {
					f.Close()
				}
				return err
			},
			"mkdirall": func() error {
				f, err := MkdirAll(root, name+"/made/deep", 0o755)
				if err == nil {
					f.Close()
				}
				return err
			},
			"mkdir": func() error { return Mkdir(root, name+"/made2", 0o755) },
			"mknod": func() error { return Mknod(root, name+"/made3", unix.S_IFREG|0o644, 0) },
			"link":  func() error { return Symlink(root, "x", name+"/made4") },
			"create": func() error {
				f, err := Create(root, name+"/made5", 0o644)
				if err == nil {
					f.Close()
				}
				return err
			},
			"remove": func() error { return Remove(root, name+"/secret") },
		} {
			// ".." made of plain names stays inside and may succeed there.
			if err := f(); err == nil && !strings.Contains(name, "outside") {
				t.Errorf("%s %s: no error", op, name)
			}
		}
	}
	after, err := os.ReadDir(outside)
	if err != nil || len(after) != len(before) {
		t.Errorf("outside: %v, %v", after, err)
	}
	if f, err := Open(root, "file", os.O_RDONLY, 0); err == nil {
		f.Close()
		t.Error("the link to a file outside was opened")
	}
}

func TestInside(t *testing.T) {
	root, _ := hostile(t)
	d, err := MkdirAll(root, "in/a/b", 0o750)
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	if st, err := os.Stat(filepath.Join(root.Name(), "real/a/b")); err != nil || !st.IsDir() {
		t.Errorf("%v %v", st, err)
	}
	f, err := Create(root, "in/a/f", 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := Create(root, "in/a/f", 0o600); !errors.Is(err, os.ErrExist) {
		t.Error(err)
	}
	p, err := Open(root, "/in/a/f", unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	r, err := Reopen(p, os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b := make([]byte, 4)
	if n, err := r.Read(b); err != nil || string(b[:n]) != "x" {
		t.Errorf("%q %v", b[:n], err)
	}
	for _, name := range []string{"in/a/f", "in/a/b", "in"} {
		if err := Remove(root, name); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(filepath.Join(root.Name(), "real/a")); err != nil {
		t.Errorf("the link's target was removed: %v", err)
	}
	if _, _, err := OpenParent(root, "/.."); err == nil {
		t.Error("the root has no parent")
	}
}

// TestRace: somebody turns a directory into a link and back all the time.
func TestRace(t *testing.T) {
	root, outside := hostile(t)
	a, b := filepath.Join(root.Name(), "swap"), filepath.Join(root.Name(), "swapped")
	if err := os.Mkdir(a, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, b); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		for !stop.Load() {
			_ = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE) // both are there
		}
	}()
	for range 2000 {
		if d, err := MkdirAll(root, "swap/x/y", 0o755); err == nil {
			d.Close()
		}
		if f, err := Open(root, "swap/secret", os.O_RDONLY, 0); err == nil {
			f.Close()
			t.Fatal("opened what is outside")
		}
	}
	stop.Store(true)
	<-done
	if _, err := os.Stat(filepath.Join(outside, "x")); err == nil {
		t.Error("made a directory outside")
	}
}

func TestCopyTree(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	w := func(name string, mode os.FileMode) {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(src, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(src, name), []byte(name), mode); err != nil {
			t.Fatal(err)
		}
	}
	w("a/b/f", 0o640)
	w("s", 0o4755)
	if err := os.Chmod(filepath.Join(src, "s"), 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(src, "a/b/f"), filepath.Join(src, "hard")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/shadow", filepath.Join(src, "l")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(filepath.Join(src, "n"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(src, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Lchown(filepath.Join(src, "a"), 12, 34); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(filepath.Join(src, "a"), "trusted.x", []byte("v"), 0); err != nil {
		t.Fatal(err)
	}
	from, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.Open(dst)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if err := CopyTree(from, to); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".", "a", "a/b", "a/b/f", "s", "hard", "l", "n", "fifo"} {
		var x, y unix.Stat_t
		if err := unix.Lstat(filepath.Join(src, name), &x); err != nil {
			t.Fatal(err)
		}
		if err := unix.Lstat(filepath.Join(dst, name), &y); err != nil {
			t.Error(err)
			continue
		}
		if x.Mode != y.Mode || x.Uid != y.Uid || x.Gid != y.Gid || x.Rdev != y.Rdev || x.Mtim != y.Mtim {
			t.Errorf("%s: %+v, want %+v", name, y, x)
		}
	}
	var x, y unix.Stat_t
	_ = unix.Stat(filepath.Join(dst, "hard"), &x)  // compared below
	_ = unix.Stat(filepath.Join(dst, "a/b/f"), &y) // compared below
	if x.Ino != y.Ino || x.Ino == 0 {
		t.Error("the hard link is a copy")
	}
	if l, err := os.Readlink(filepath.Join(dst, "l")); l != "/etc/shadow" || err != nil {
		t.Error(l, err)
	}
	buf := make([]byte, 8)
	if n, err := unix.Getxattr(filepath.Join(dst, "a"), "trusted.x", buf); err != nil || string(buf[:n]) != "v" {
		t.Errorf("xattr %q %v", buf, err)
	}
}

func FuzzOpen(f *testing.F) {
	f.Add("../x")
	f.Add("/")
	f.Add("a/../../b")
	dir := f.TempDir()
	root, err := os.Open(dir)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, name string) {
		h, err := Open(root, name, unix.O_PATH, 0)
		if err != nil {
			return
		}
		defer h.Close()
		var a, b unix.Stat_t
		if unix.Fstat(int(h.Fd()), &a) != nil || unix.Fstat(int(root.Fd()), &b) != nil || a.Ino != b.Ino {
			t.Errorf("%q is not inside", name) // the root is empty
		}
	})
}

func TestMakeTarget(t *testing.T) {
	root, outside := hostile(t)
	for name, to := range map[string]string{"d/resolv.conf": "../run/systemd/resolve/stub", "to-abs": "/var/new/dir", "up2": "../../../../x/y", "d/mid": "/nowhere"} {
		if err := os.Symlink(to, filepath.Join(root.Name(), name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name  string
		dir   bool
		there string
	}{
		{"/d/resolv.conf", false, "run/systemd/resolve/stub"},
		{"to-abs", true, "var/new/dir"},
		{"up2/z", false, "x/y/z"},
		{"d/mid/a/b", true, "nowhere/a/b"},
		{"in/plain", false, "real/plain"},
		{"abs/inside", true, strings.TrimPrefix(outside, "/") + "/inside"},
		{"../../e", true, "e"},
	} {
		if err := MakeTarget(root, c.name, c.dir, 12, 34); err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root.Name(), c.there), &st); err != nil || st.Uid != 12 || (st.Mode&unix.S_IFMT == unix.S_IFDIR) != c.dir {
			t.Errorf("%s: %v %+v", c.there, err, st)
		}
		if err := MakeTarget(root, c.name, c.dir, 0, 0); err != nil {
			t.Errorf("%s again: %v", c.name, err)
		}
	}
	if err := MakeTarget(root, "loop/x", true, 0, 0); !errors.Is(err, unix.ELOOP) {
		t.Error(err)
	}
	if names, err := os.ReadDir(outside); err != nil || len(names) != 2 {
		t.Errorf("outside: %v %v", names, err)
	}
}

// TestOpenBeneath: links below the root are followed, and what leads out of it is an error.
func TestOpenBeneath(t *testing.T) {
	dir := t.TempDir()
	for _, err := range []error{
		os.MkdirAll(filepath.Join(dir, "a/b"), 0o755), os.Symlink("a/b", filepath.Join(dir, "in")), os.Symlink("../../in", filepath.Join(dir, "a/b/up")),
		os.Symlink("/a", filepath.Join(dir, "absolute")), os.Symlink("../x", filepath.Join(dir, "out")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for name, want := range map[string]error{"a/b": nil, "in": nil, "a/b/up": nil, "absolute": unix.EXDEV, "out": unix.EXDEV, "../x": unix.EXDEV, "none": unix.ENOENT} {
		f, err := OpenBeneath(root, name, unix.O_PATH, 0)
		if err == nil {
			f.Close()
		}
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
}
