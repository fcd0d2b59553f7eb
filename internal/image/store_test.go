package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func open(t testing.TB, change ...func(*Config)) *Store {
	t.Helper()
	return openAt(t, t.TempDir(), change...)
}

func openAt(t testing.TB, root string, change ...func(*Config)) *Store {
	t.Helper()
	cfg := Config{Root: root}
	for _, c := range change {
		c(&cfg)
	}
	s, err := Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// entry is a tar entry in short.
type entry struct {
	tar.Header
	data string
}

func dirEntry(name string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}}
}

func fileEntry(name, data string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data: data}
}

func mkTar(t testing.TB, es ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range es {
		e.Size = int64(len(e.data))
		if e.ModTime.IsZero() {
			e.ModTime = time.Unix(1e9, 0)
		}
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// dockerArchive makes an archive as `docker save` before 25 made it.
func dockerArchive(t testing.TB, tags []string, layers ...[]byte) []byte {
	t.Helper()
	var diffs []digest.Digest
	var es []entry
	var names []string
	for i, l := range layers {
		diffs = append(diffs, digest.FromBytes(l))
		names = append(names, string(rune('a'+i))+"/layer.tar")
		es = append(es, fileEntry(names[i], string(l)))
	}
	conf, _ := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Env": []string{"A=b"}, "Cmd": []string{"/x"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffs},
	})
	es = append(es, fileEntry("config.json", string(conf)))
	man, _ := json.Marshal([]dockerManifest{{Config: "config.json", RepoTags: tags, Layers: names}})
	es = append(es, fileEntry("manifest.json", string(man)))
	return mkTar(t, es...)
}

func TestBootstrapResolveLayers(t *testing.T) {
	ctx := context.Background()
	s := open(t)
	img, err := s.BootstrapBusybox(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(img.RepoTags) != 1 || img.RepoTags[0] != "busybox:latest" {
		t.Errorf("tags %v", img.RepoTags)
	}
	again, err := s.BootstrapBusybox(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if again.ID != img.ID {
		t.Errorf("not reproducible: %s and %s", img.ID, again.ID)
	}
	for _, ref := range []string{"busybox", "busybox:latest", "docker.io/library/busybox", img.ID, img.ID[:19], img.ID[7:14], img.ConfigDigest.String()} {
		got, err := s.Resolve(ctx, ref, nil)
		if err != nil {
			t.Fatalf("%s: %v", ref, err)
		}
		if got.ID != img.ID {
			t.Errorf("%s: %s", ref, got.ID)
		}
	}
	dirs, err := s.Layers(ctx, img)
	if err != nil {
		t.Fatal(err)
	}
	if len(dirs) != 1 {
		t.Fatalf("%v", dirs)
	}
	if l, err := os.Readlink(filepath.Join(dirs[0], "bin/sh")); err != nil || l != "busybox" {
		t.Errorf("bin/sh: %q %v", l, err)
	}
	if n := testing.AllocsPerRun(10, func() {
		_, _ = s.Resolve(ctx, "busybox", nil)
		_, _ = s.Layers(ctx, img)
	}); n > 30 {
		t.Errorf("%v allocations for a lookup", n)
	}
}

func TestLoadDockerArchive(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	s := openAt(t, root)
	base := mkTar(t, dirEntry("etc"), fileEntry("etc/a", "1"), fileEntry("etc/gone", "x"), dirEntry("opt"), fileEntry("opt/old", "x"))
	top := mkTar(t, fileEntry("etc/.wh.gone", ""), fileEntry("opt/.wh..wh..opq", ""), fileEntry("etc/b", "2"))
	a := dockerArchive(t, []string{"x:1", "example.com/y/z:2"}, base, top)
	got, err := s.Load(ctx, bytes.NewReader(a), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0].Ref != "x:1" || got[1].Ref != "example.com/y/z:2" {
		t.Fatalf("%v", got)
	}
	img, err := s.Resolve(ctx, "x:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	check := func(s *Store) {
		t.Helper()
		dirs, err := s.Layers(ctx, img)
		if err != nil {
			t.Fatal(err)
		}
		m := mountOverlay(t, dirs)
		if b, err := os.ReadFile(m + "/etc/b"); err != nil || string(b) != "2" {
			t.Errorf("etc/b: %q %v", b, err)
		}
		for _, gone := range []string{"/etc/gone", "/opt/old"} {
			if _, err := os.Lstat(m + gone); !os.IsNotExist(err) {
				t.Errorf("%s: %v", gone, err)
			}
		}
	}
	check(s)
	s.Close()
	s = openAt(t, root)
	again, err := s.Resolve(ctx, "x:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	if again.ID != img.ID || again.Config.Config.Cmd[0] != "/x" {
		t.Errorf("%+v", again)
	}
	check(s)
}

// mountOverlay mounts lower directories for the test's time.
func mountOverlay(t testing.TB, dirs []string) string {
	t.Helper()
	m := t.TempDir()
	lower := ""
	for _, d := range dirs {
		lower += ":" + d
	}
	if len(dirs) == 1 {
		lower += ":" + t.TempDir() // overlay wants two, or an upper one
	}
	if err := unix.Mount("overlay", m, "overlay", unix.MS_RDONLY, "lowerdir="+lower[1:]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return m
}
