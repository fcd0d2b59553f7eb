package rootfs

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"archive/tar"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image"
)

func open(t testing.TB) (*Store, *image.Store) {
	t.Helper()
	images, err := image.Open(context.Background(), image.Config{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(Config{Root: t.TempDir(), Images: images})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), images.Close()); err != nil {
			t.Error(err)
		}
	})
	return s, images
}

// testImage has a root directory with attributes of its own.
func testImage(t testing.TB, images *image.Store) *image.Image {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{{Typeflag: tar.TypeDir, Name: "./", Mode: 0o711, Uid: 12}, {Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755}, {Typeflag: tar.TypeReg, Name: "d/f", Mode: 0o644}} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	img, err := images.Import(context.Background(), &b, image.ImportOptions{Ref: "t:1"})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func mount(t testing.TB, m Mount, at string) {
	t.Helper()
	var flags uintptr
	var data []string
	for _, o := range m.Options {
		switch o {
		case "ro":
			flags |= unix.MS_RDONLY
		case "rw":
		case "bind":
			flags |= unix.MS_BIND
		default:
			data = append(data, o)
		}
	}
	if err := unix.Mount(m.Source, at, m.Type, flags, strings.Join(data, ",")); err != nil {
		t.Fatalf("%+v: %v", m, err)
	}
}

func TestPrepareMountRemove(t *testing.T) {
	ctx := context.Background()
	s, images := open(t)
	img := testImage(t, images)
	at := t.TempDir()
	for _, volatile := range []bool{false, true} {
		r, err := s.Prepare(ctx, "c1", img, Options{Volatile: volatile})
		if err != nil {
			t.Fatal(err)
		}
		mount(t, r.Mounts[0], at)
		var st unix.Stat_t
		if err := unix.Stat(at, &st); err != nil || st.Mode&0o7777 != 0o711 || st.Uid != 12 {
			t.Errorf("root is %o of %d: %v", st.Mode, st.Uid, err)
		}
		if err := os.WriteFile(at+"/d/new", make([]byte, 100_000), 0o644); err != nil {
			t.Error(err)
		}
		if err := os.Remove(at + "/d/f"); err != nil {
			t.Error(err)
		}
		if err := unix.Unmount(at, 0); err != nil {
			t.Fatal(err)
		}
		if n, inodes, err := s.Usage(ctx, "c1"); err != nil || n < 100_000 || inodes < 3 {
			t.Errorf("usage %d %d %v", n, inodes, err)
		}
		if ids, err := s.List(); err != nil || !slices.Equal(ids, []string{"c1"}) {
			t.Errorf("%v %v", ids, err)
		}
		if !volatile { // again: the same, with what was written
			again, err := s.Prepare(ctx, "c1", img, Options{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			mount(t, again.Mounts[0], at)
			if _, err := os.Stat(at + "/d/new"); err != nil {
				t.Error(err)
			}
			if err := os.WriteFile(at+"/x", nil, 0o644); !errors.Is(err, unix.EROFS) {
				t.Errorf("read-only root: %v", err)
			}
			if err := unix.Unmount(at, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Remove("c1"); err != nil {
			t.Fatal(err)
		}
		if err := s.Remove("c1"); err != nil {
			t.Errorf("second removal: %v", err)
		}
		if ids, err := s.List(); err != nil || len(ids) != 0 {
			t.Errorf("%v %v", ids, err)
		}
		if _, _, err := s.Usage(ctx, "c1"); !errdefs.IsNotFound(err) {
			t.Errorf("%v", err)
		}
	}
	for deadline := time.Now().Add(time.Minute); ; {
		ents, err := os.ReadDir(s.trash())
		if err == nil && len(ents) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("trash not emptied: %v %v", ents, err)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestPrepareRefuses(t *testing.T) {
	s, images := open(t)
	img := testImage(t, images)
	for _, id := range []string{"", ".", "..", "a/b", "../x", "a\x00"} {
		if _, err := s.Prepare(context.Background(), id, img, Options{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", id, err)
		}
		if err := s.Remove(id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("remove %q: %v", id, err)
		}
	}
	if _, err := s.Prepare(context.Background(), "a", img, Options{SizeLimit: 1}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
}

// TestHalfMade: a process was killed while making a pair, here and in the pool.
func TestHalfMade(t *testing.T) {
	_, images := open(t)
	img := testImage(t, images)
	root := t.TempDir()
	for _, d := range []string{"containers/c/rootfs/upper", "pool/x/rootfs/upper", "trash/y/z"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Open(Config{Root: root, Images: images})
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Prepare(context.Background(), "c", img, Options{})
	if err != nil {
		t.Fatal(err)
	}
	at := t.TempDir()
	mount(t, r.Mounts[0], at)
	if err := unix.Unmount(at, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(root, "pool/x")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half-made pair in the pool: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestScratch is an image without layers.
func TestScratch(t *testing.T) {
	ctx := context.Background()
	s, images := open(t)
	img, err := images.Commit(ctx, image.CommitOptions{Ref: "scratch:1"})
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Prepare(ctx, "c", img, Options{})
	if err != nil {
		t.Fatal(err)
	}
	at := t.TempDir()
	mount(t, r.Mounts[0], at)
	if err := os.WriteFile(at+"/x", nil, 0o644); err != nil {
		t.Error(err)
	}
	if err := unix.Unmount(at, 0); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkPrepareRemove(b *testing.B) {
	s, images := open(b)
	img := testImage(b, images)
	ctx := context.Background()
	for b.Loop() {
		if _, err := s.Prepare(ctx, "c", img, Options{Volatile: true}); err != nil {
			b.Fatal(err)
		}
		if err := s.Remove("c"); err != nil {
			b.Fatal(err)
		}
	}
}
