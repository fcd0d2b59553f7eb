package rootfs

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/loop"
)

// readSuper reads a disk's super block.
func readSuper(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, superLen)
	if _, err := f.ReadAt(b, superAt); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDisks(t *testing.T) {
	s, images := open(t)
	img := testImage(t, images)
	d, err := s.PrepareDisks(t.Context(), "c1", img, Options{})
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.PrepareDisks(t.Context(), "c1", img, Options{})
	if err != nil || again.Image != d.Image || again.Upper != d.Upper || len(again.Lower) != 1 {
		t.Fatalf("again: %+v %v", again, err)
	}
	other, err := s.PrepareDisks(t.Context(), "c2", img, Options{Volatile: true, SizeLimit: MinLimit})
	if err != nil || other.Image != d.Image || !other.Volatile {
		t.Fatalf("other: %+v %v", other, err)
	}
	third, err := s.PrepareDisks(t.Context(), "c3", img, Options{})
	if err != nil {
		t.Fatal(err)
	}
	a, b := readSuper(t, d.Upper), readSuper(t, third.Upper)
	if bytes.Equal(a[superUUID:superUUID+16], b[superUUID:superUUID+16]) {
		t.Error("two disks have one UUID")
	}
	for path, size := range map[string]int64{d.Upper: DefaultDisk, other.Upper: MinLimit} {
		st, err := os.Stat(path)
		if err != nil || st.Size() != size || st.Mode() != 0o600 {
			t.Fatalf("%s: %v %v", path, st, err)
		}
		// No guest has written to it, so it may be looked at here.
		if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", path, err, out)
		}
		at := t.TempDir()
		dev, err := loop.Attach(path, false)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.Mount(dev.Name(), at, "ext4", unix.MS_NOATIME, "noinit_itable,discard,errors=remount-ro")
		dev.Close()
		if err != nil {
			t.Fatal(err)
		}
		var up, work unix.Stat_t
		if err := unix.Stat(at+"/upper", &up); err != nil || up.Mode&0o7777 != 0o711 || up.Uid != 12 {
			t.Errorf("upper: %o %d %v", up.Mode, up.Uid, err)
		}
		if err := unix.Stat(at+"/work", &work); err != nil || work.Mode&0o7777 != 0o700 || work.Uid != 0 {
			t.Errorf("work: %o %d %v", work.Mode, work.Uid, err)
		}
		if err := os.WriteFile(at+"/upper/f", make([]byte, 1<<20), 0o644); err != nil {
			t.Error(err)
		}
		if err := unix.Unmount(at, 0); err != nil {
			t.Fatal(err)
		}
	}
	if l := backed(t, s.cfg.Root); len(l) > 0 {
		t.Errorf("loop devices are left: %v", l)
	}
	if n, _, err := s.Usage(t.Context(), "c1"); err != nil || n < 1<<20 || n > 24<<20 {
		t.Errorf("usage %d, %v", n, err)
	}
	if n, _, err := s.Usage(t.Context(), "c3"); err != nil || n > 64<<10 {
		t.Errorf("usage of a new one %d, %v", n, err)
	}
	for _, id := range []string{"c1", "c2", "c3", "c3"} {
		if err := s.Remove(id); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
	if list, err := s.List(); err != nil || len(list) != 0 {
		t.Errorf("left: %v %v", list, err)
	}
}

// TestDisksAtOnce: one image, one template, whoever asks.
func TestDisksAtOnce(t *testing.T) {
	s, images := open(t)
	img := testImage(t, images)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if _, err := s.PrepareDisks(t.Context(), "c"+strconv.Itoa(i), img, Options{SizeLimit: 1 << 30}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if ents, err := os.ReadDir(s.templates()); err != nil || len(ents) != 1 {
		t.Errorf("templates: %v %v", ents, err)
	}
}

// TestDisksCutOff: a process may be killed between any two steps.
func TestDisksCutOff(t *testing.T) {
	s, images := open(t)
	img := testImage(t, images)
	dir := filepath.Join(s.containers(), "c1", "rootfs")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, vmDiskFile+".tmp"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.templates(), "tmp-1", "content"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.cleanTemplates(); err != nil {
		t.Fatal(err)
	}
	d, err := s.PrepareDisks(t.Context(), "c1", img, Options{SizeLimit: MinLimit})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("e2fsck", "-fn", d.Upper).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if ents, err := os.ReadDir(dir); err != nil || len(ents) != 1 {
		t.Errorf("files: %v %v", ents, err)
	}
}

func TestDiskLimitsRefused(t *testing.T) {
	s, _ := open(t)
	for _, n := range []int64{-1, 1, MinLimit - 1, MaxDisk + 1} {
		if err := s.CheckDisk(n); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%d: %v", n, err)
		}
	}
	for _, n := range []int64{0, MinLimit, MaxDisk} {
		if err := s.CheckDisk(n); err != nil {
			t.Errorf("%d: %v", n, err)
		}
	}
}

func BenchmarkDisks(b *testing.B) {
	s, images := open(b)
	img := testImage(b, images)
	for i := 0; b.Loop(); i++ {
		if _, err := s.PrepareDisks(b.Context(), "c"+strconv.Itoa(i), img, Options{}); err != nil {
			b.Fatal(err)
		}
	}
}
