package rootfs

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inode of a file, which must be there.
func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return st.Ino
}

// removed waits until the trash is empty.
func removed(t *testing.T, s *Store) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		ents, err := os.ReadDir(s.trash())
		if err == nil && len(ents) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("trash not emptied: %v %v", ents, err)
		}
	}
}

// pooled are the directories that lie ready, by inode.
func pooled(t *testing.T, s *Store) (list []uint64) {
	t.Helper()
	ents, err := os.ReadDir(s.ahead())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range ents {
		list = append(list, inode(t, filepath.Join(s.ahead(), e.Name())))
	}
	return list
}

// TestRenew: a removed container's directory serves the next one, with nothing
// in it of what the container had in its hands.
func TestRenew(t *testing.T) {
	s, images := open(t)
	img := testImage(t, images)
	r, err := s.Prepare(t.Context(), "c1", img, Options{Volatile: true})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(s.containers(), "c1")
	at := t.TempDir()
	mount(t, r.Mounts[0], at)
	if err := os.MkdirAll(at+"/a/b", 0o700); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(at+"/a/b/secret", []byte("x"), 0o600); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(at, 0o777); err != nil {
		t.Error(err)
	}
	if err := unix.Unmount(at, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/log/container.log", []byte("x"), 0o600); err != nil {
		t.Error(err)
	}
	held, err := os.Open(r.Upper) // as something may that is in its root still
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	mine, upper := inode(t, dir), inode(t, r.Upper)
	if err := s.Remove("c1"); err != nil {
		t.Fatal(err)
	}
	removed(t, s)
	if !slices.Contains(pooled(t, s), mine) {
		t.Error("the directory is not in the pool")
	}
	ents, err := os.ReadDir(s.ahead())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range ents {
		path := filepath.Join(s.ahead(), e.Name())
		if inode(t, path) != mine {
			continue // another, which is being made perhaps
		}
		if inode(t, path+"/rootfs/upper") == upper {
			t.Error("the upper directory is the old one")
		}
		var st unix.Stat_t
		if err := unix.Lstat(path+"/rootfs/upper", &st); err != nil || st.Mode&0o7777 != 0o755 {
			t.Errorf("upper directory has mode %o: %v", st.Mode&0o7777, err)
		}
		for _, sub := range []string{"rootfs/upper", "rootfs/work", "log"} {
			if in, err := os.ReadDir(filepath.Join(path, sub)); err != nil || len(in) != 0 {
				t.Errorf("%s of a new container has %v: %v", sub, in, err)
			}
		}
	}
}

// TestNotRenewed: what is not as it was made is deleted.
func TestNotRenewed(t *testing.T) {
	s, images := open(t)
	img := testImage(t, images)
	for name, change := range map[string]func(dir string) error{
		"more":  func(dir string) error { return os.WriteFile(dir+"/rootfs/disk.img", nil, 0o600) },
		"less":  func(dir string) error { return os.Remove(dir + "/log") },
		"other": func(dir string) error { return os.Chmod(dir, 0o755) },
		"link": func(dir string) error {
			if err := os.Remove(dir + "/log"); err != nil {
				return err
			}
			return os.Symlink(t.TempDir(), dir+"/log")
		},
		"deep": func(dir string) error { return os.MkdirAll(dir+"/rootfs/upper"+strings.Repeat("/d", 40), 0o700) },
	} {
		if _, err := s.Prepare(t.Context(), name, img, Options{}); err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(s.containers(), name)
		if err := change(dir); err != nil {
			t.Fatal(err)
		}
		mine := inode(t, dir)
		held, err := os.Open(dir) // its inode is nobody else's meanwhile
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Remove(name); err != nil {
			t.Fatal(err)
		}
		removed(t, s)
		if slices.Contains(pooled(t, s), mine) {
			t.Errorf("%s: in the pool", name)
		}
		held.Close()
	}
}

// TestBase: the mount points that an image lacks are in its root, and those that
// it has are its own.
func TestBase(t *testing.T) {
	s, images := open(t)
	r, err := s.Prepare(t.Context(), "c", testImage(t, images), Options{})
	if err != nil {
		t.Fatal(err)
	}
	at := t.TempDir()
	mount(t, r.Mounts[0], at)
	defer unix.Unmount(at, 0)
	for _, f := range baseFiles {
		if b, err := os.ReadFile(filepath.Join(at, f)); err != nil || len(b) != 0 {
			t.Errorf("%s: %q, %v", f, b, err)
		}
	}
	if _, err := os.Stat(at + "/d/f"); err != nil {
		t.Error(err)
	}
	if in, err := os.ReadDir(r.Upper); err != nil || len(in) != 0 {
		t.Errorf("the writable layer has %v: %v", in, err)
	}
}
