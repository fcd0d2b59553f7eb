package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	crashRoot = "TENON_TEST_CRASH_ROOT"
	crashRef  = "TENON_TEST_CRASH_REF"
)

// TestCrashChild is not a test but the process that TestKilled kills: it
// changes a store as fast as it can until then.
func TestCrashChild(t *testing.T) {
	root := os.Getenv(crashRoot)
	if root == "" {
		return
	}
	ctx := context.Background()
	s, err := Open(ctx, Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("open")
	base := mkTar(t, dirEntry("d"), fileEntry("d/base", strings.Repeat("b", 200_000)))
	for i := 0; ; i++ {
		top := mkTar(t, fileEntry(fmt.Sprintf("d/%d", i), strings.Repeat("t", 50_000)))
		if _, err := s.Load(ctx, bytes.NewReader(dockerArchive(t, []string{fmt.Sprintf("img%d:1", i%3)}, base, top)), LoadOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Pull(ctx, os.Getenv(crashRef), PullOptions{}); err != nil {
			t.Fatal(err)
		}
		img, err := s.Import(ctx, bytes.NewReader(top), ImportOptions{Ref: "imported:1"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Commit(ctx, CommitOptions{Parent: img, Diff: bytes.NewReader(base), Ref: "committed:1"}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Remove(ctx, os.Getenv(crashRef), RemoveOptions{}, nil); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Prune(ctx, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
}

// TestKilled kills a process with an open store at random moments and checks
// that what the store then says it has is whole.
func TestKilled(t *testing.T) {
	ctx := context.Background()
	f := newFakeRegistry(t)
	f.tags["1"] = f.image("amd64", mkTar(t, dirEntry("p"), fileEntry("p/a", strings.Repeat("a", 300_000))), mkTar(t, fileEntry("p/b", "b"))).Digest
	root := t.TempDir()
	for range 15 {
		limited, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		cmd := exec.CommandContext(limited, os.Args[0], "-test.run=^TestCrashChild$")
		cmd.Env = append(os.Environ(), crashRoot+"="+root, crashRef+"="+f.addr+"/c:1")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 5)
		if _, err := out.Read(line); err != nil || string(line) != "open\n" {
			t.Fatalf("%q %v %s", line, err, stderr.String())
		}
		time.Sleep(rand.N(60 * time.Millisecond)) // the moment is meant to be any
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // killed
		checkWhole(t, ctx, root)
	}
}

// checkWhole opens a store and checks every image and that nothing else is there.
func checkWhole(t *testing.T, ctx context.Context, root string) {
	t.Helper()
	s, err := Open(ctx, Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	s.gate.Lock()
	_, err = s.collect()
	s.gate.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	l, err := s.List(ctx, ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, sum := range l {
		img, err := s.Resolve(ctx, sum.ID, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.verifyImage(img.Target); err != nil {
			t.Errorf("%s %v: %v", sum.ID, sum.RepoTags, err)
		}
		if !s.complete(img.Target, 0) {
			t.Errorf("%s %v lacks blobs", sum.ID, sum.RepoTags)
		}
		dirs, err := s.Layers(ctx, img)
		if err != nil {
			t.Fatal(err)
		}
		for i, d := range dirs {
			n := 0
			_ = filepath.WalkDir(d, func(p string, _ os.DirEntry, err error) error { n++; return err })
			if n < 2 {
				t.Errorf("%s: layer %d is empty", sum.ID, i)
			}
		}
	}
	blobs, chains, err := s.marked()
	if err != nil {
		t.Fatal(err)
	}
	ents, err := os.ReadDir(s.blobDir(digest.SHA256))
	if err != nil || len(ents) != len(blobs) {
		t.Errorf("%d blobs on the disk, %d needed: %v", len(ents), len(blobs), err)
	}
	ents, err = os.ReadDir(s.layersDir())
	if err != nil || len(ents) != len(chains)+1 {
		t.Errorf("%d layers on the disk, %d needed: %v", len(ents)-1, len(chains), err)
	}
}

// TestPowerCut: images whose files may not have reached the disk are verified
// when the machine is up again.
func TestPowerCut(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	s := openAt(t, root)
	for _, n := range []string{"good:1", "bad:1"} {
		if _, err := s.Load(ctx, bytes.NewReader(dockerArchive(t, []string{n}, mkTar(t, fileEntry("f", n)))), LoadOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	bad, err := s.Resolve(ctx, "bad:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	good, err := s.Resolve(ctx, "good:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	goodDirs, err := s.Layers(ctx, good)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = openAt(t, root)
	err = s.update(func(b *batch) error { // as if written before the last boot, and not flushed
		for d := range s.recs {
			b.record(d).Boot = "another boot"
		}
		for d := range s.layers {
			l := b.layer(d)
			l.Boot = "another boot"
			b.layers[d] = l
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := os.Truncate(s.blobPath(bad.LayerDescs[0].Digest), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(goodDirs[0], "f"), 0); err != nil {
		t.Fatal(err)
	}
	s = openAt(t, root)
	if _, err := s.Resolve(ctx, "bad:1", nil); err == nil {
		t.Error("a damaged image is still there")
	}
	good, err = s.Resolve(ctx, "good:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := s.Layers(ctx, good)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dirs[0], "f")); err != nil || string(b) != "good:1" {
		t.Errorf("layer not unpacked anew: %q %v", b, err)
	}
}

// TestFullDisk: what does not fit is refused and leaves nothing, and what fits
// still works.
func TestFullDisk(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	noise := make([]byte, 14<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise) // does not fail
	big := dockerArchive(t, []string{"big:1"}, mkTar(t, fileEntry("f", string(noise))))
	f := newFakeRegistry(t)
	f.tags["1"] = f.image("amd64", mkTar(t, fileEntry("f", string(noise)))).Digest
	for _, free := range []int64{1, 4 << 20} { // the kernel's limit, and ours before it
		s := openAt(t, root, func(c *Config) { c.Limits.FreeBytes = free })
		for range 2 {
			if _, err := s.Load(ctx, bytes.NewReader(big), LoadOptions{}); !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("load: %v", err)
			}
			if _, err := s.Pull(ctx, f.addr+"/x:1", PullOptions{}); !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("pull: %v", err)
			}
			if _, err := s.Import(ctx, bytes.NewReader(mkTar(t, fileEntry("f", string(noise)))), ImportOptions{}); !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("import: %v", err)
			}
			empty(t, s)
		}
		// The space comes back in the background.
		small := dockerArchive(t, []string{"small:1"}, mkTar(t, fileEntry("f", "x")))
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			_, err := s.Load(ctx, bytes.NewReader(small), LoadOptions{})
			if err == nil {
				break
			}
			if !errors.Is(err, unix.ENOSPC) || time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
		if _, err := s.Remove(ctx, "small:1", RemoveOptions{}, nil); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
