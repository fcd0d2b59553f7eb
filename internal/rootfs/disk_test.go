package rootfs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image"
)

// prepareLimited makes a container's limited layer, unmounted when the test ends.
func prepareLimited(t *testing.T, s *Store, img *image.Image, id string) *Root {
	t.Helper()
	t.Cleanup(func() {
		if err := s.Unmount(); err != nil {
			t.Error(err)
		}
	})
	r, err := s.Prepare(t.Context(), id, img, Options{SizeLimit: MinLimit})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// backed lists the loop devices of files below dir. The kernel may free one a
// little after its last mount has gone.
func backed(t *testing.T, dir string) (list []string) {
	t.Helper()
	for range 200 {
		if list = backedNow(t, dir); len(list) == 0 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	return list
}

func backedNow(t *testing.T, dir string) (list []string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && strings.HasPrefix(string(b), dir) { // gone meanwhile: another's
			list = append(list, strings.TrimSpace(string(b)))
		}
	}
	return list
}

func TestLimitedLayer(t *testing.T) {
	s, images := open(t)
	img := testImage(t, images)
	r := prepareLimited(t, s, img, "c1")
	st, err := os.Stat(r.Upper)
	if err != nil || st.Mode().Perm() != 0o711 {
		t.Fatalf("upper: %v %v", st, err)
	}
	at := t.TempDir()
	mount(t, r.Mounts[0], at)
	unmount := func() {
		t.Helper()
		if err := unix.Unmount(at, 0); err != nil {
			t.Fatal(err)
		}
	}
	block := make([]byte, 1<<20)
	var full error
	f, err := os.Create(at + "/big")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 * MinLimit / len(block) {
		if _, full = f.Write(block); full != nil {
			break
		}
	}
	f.Close()
	if !errors.Is(full, unix.ENOSPC) {
		t.Errorf("writing twice its size: %v", full)
	}
	if n, _, err := s.Usage(t.Context(), "c1"); err != nil || n < MinLimit/2 || n > MinLimit {
		t.Errorf("usage %d, %v", n, err)
	}
	if err := os.Truncate(at+"/big", 10); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(at, 0o700); err != nil {
		t.Fatal(err)
	}
	unmount()

	// After a reboot nothing is mounted; what was written is there all the same.
	if err := s.Unmount(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(r.Upper); err == nil {
		t.Error("the file system is still mounted")
	}
	if n, _, err := s.Usage(t.Context(), "c1"); err != nil || n < 4096 || n > 64<<10 {
		t.Errorf("usage after a reboot: %d, %v", n, err)
	}
	if err := s.Unmount(); err != nil {
		t.Fatal(err)
	}
	again, err := s.Prepare(t.Context(), "c1", img, Options{SizeLimit: MinLimit})
	if err != nil || again.Upper != r.Upper {
		t.Fatalf("again: %+v %v", again, err)
	}
	if st, err := os.Stat(again.Upper); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the root's mode was not kept: %v %v", st, err)
	}
	if st, err := os.Stat(filepath.Join(again.Upper, "big")); err != nil || st.Size() != 10 {
		t.Errorf("its file: %v %v", st, err)
	}
	if err := s.Remove("c1"); err != nil {
		t.Fatal(err)
	}
	if l := backed(t, s.cfg.Root); len(l) > 0 {
		t.Errorf("loop devices are left: %v", l)
	}
	if err := s.Remove("c1"); err != nil {
		t.Errorf("second removal: %v", err)
	}
}

// TestLimitedLayerCutOff: a process may be killed between any two steps.
func TestLimitedLayerCutOff(t *testing.T) {
	s, images := open(t)
	img := testImage(t, images)
	dir := filepath.Join(s.containers(), "c1", "rootfs")
	steps := map[string]func() error{
		"nothing made": func() error { return os.MkdirAll(dir, 0o755) },
		"half a file": func() error {
			if err := os.MkdirAll(dir+"/merged", 0o700); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, diskFile+".tmp"), []byte("half"), 0o600)
		},
		"no upper directory": func() error {
			r, err := s.Prepare(t.Context(), "c1", img, Options{SizeLimit: MinLimit})
			if err != nil {
				return err
			}
			if err := os.Remove(r.Work); err != nil {
				return err
			}
			return os.Rename(r.Upper, r.Upper+".part")
		},
		"not mounted": func() error {
			if _, err := s.Prepare(t.Context(), "c1", img, Options{SizeLimit: MinLimit}); err != nil {
				return err
			}
			return s.Unmount()
		},
	}
	for name, cut := range steps {
		if err := cut(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		r := prepareLimited(t, s, img, "c1")
		st, err := os.Stat(r.Upper)
		if err != nil || st.Mode().Perm() != 0o711 {
			t.Errorf("%s: upper: %v %v", name, st, err)
		}
		at := t.TempDir()
		mount(t, r.Mounts[0], at)
		if err := unix.Unmount(at, 0); err != nil {
			t.Fatal(err)
		}
		if err := s.Remove("c1"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if l := backed(t, s.cfg.Root); len(l) > 0 {
			t.Errorf("%s: loop devices are left: %v", name, l)
		}
	}
}

func TestLimitsRefused(t *testing.T) {
	s, _ := open(t)
	for _, n := range []int64{-1, 1, MinLimit - 1, MaxLimit + 1} {
		if err := s.CheckLimit(n); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%d: %v", n, err)
		}
	}
	if err := s.CheckLimit(1 << 30); err != nil {
		t.Error(err)
	}
}
