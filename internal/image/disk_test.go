package image

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/moby/moby/api/types/image"
)

// TestEROFS: an image's file system is made once, counted, and goes with it.
func TestEROFS(t *testing.T) {
	root := t.TempDir()
	s := openAt(t, root)
	load(t, s, dockerArchive(t, []string{"a:1"}, mkTar(t, fileEntry("f", "one")), mkTar(t, fileEntry("g", "two"))))
	load(t, s, dockerArchive(t, []string{"b:1"}, mkTar(t, fileEntry("f", "one"))))
	a, b := resolve(t, s, "a:1"), resolve(t, s, "b:1")
	before := usage(t, s)
	paths := make([]string, 8)
	var wg sync.WaitGroup
	for i := range paths {
		wg.Go(func() {
			var err error
			if paths[i], err = s.EROFS(t.Context(), a); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	st, err := os.Stat(paths[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		if p != paths[0] {
			t.Errorf("%s and %s", p, paths[0])
		}
	}
	other, err := s.EROFS(t.Context(), b)
	if err != nil || other == paths[0] {
		t.Fatalf("%s: %v", other, err)
	}
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	after := usage(t, s)
	if grown := after.TotalSize - before.TotalSize; grown <= 0 || after.Reclaimable-before.Reclaimable != grown {
		t.Errorf("disk usage: %+v, before %+v", after, before)
	}
	if _, err := s.EROFS(t.Context(), b); err != nil { // again after a loss
		t.Fatal(err)
	}
	s.collectNow(t)
	if again, err := os.Stat(paths[0]); err != nil || !os.SameFile(st, again) {
		t.Errorf("it was made again, or is gone: %v", err)
	}
	if _, err := s.Remove(t.Context(), "a:1", RemoveOptions{}, nil); err != nil {
		t.Fatal(err)
	}
	s.collectNow(t)
	ents, err := os.ReadDir(s.erofsDir())
	if err != nil || len(ents) != 1 || filepath.Join(s.erofsDir(), ents[0].Name()) != other {
		t.Errorf("left: %v %v, want %s", ents, err, other)
	}
	if ents, err := os.ReadDir(s.layerTmp()); err != nil || len(ents) != 0 {
		t.Errorf("unfinished: %v %v", ents, err)
	}
}

func usage(t *testing.T, s *Store) *image.DiskUsage {
	t.Helper()
	u, err := s.DiskUsage(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// TestEROFSCutOff: what a killed process was writing is gone at the next start.
func TestEROFSCutOff(t *testing.T) {
	root := t.TempDir()
	s := openAt(t, root)
	load(t, s, dockerArchive(t, []string{"a:1"}, mkTar(t, fileEntry("f", "one"))))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.layerTmp(), "half"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = openAt(t, root)
	if ents, err := os.ReadDir(s.layerTmp()); err != nil || len(ents) != 0 {
		t.Errorf("unfinished: %v %v", ents, err)
	}
	if _, err := s.EROFS(t.Context(), resolve(t, s, "a:1")); err != nil {
		t.Fatal(err)
	}
}

// TestEROFSFull: a disk that has to stay free is not filled.
func TestEROFSFull(t *testing.T) {
	root := t.TempDir()
	s := openAt(t, root)
	load(t, s, dockerArchive(t, []string{"a:1"}, mkTar(t, fileEntry("f", "one"))))
	img := resolve(t, s, "a:1")
	s.cfg.Limits.FreeBytes = 1 << 60
	if _, err := s.EROFS(t.Context(), img); !isNoSpace(err) {
		t.Error(err)
	}
}
