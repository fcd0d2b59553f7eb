package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A removal asks who uses the image; who wants to hold it from then on waits, and finds
// it gone. Held before, it is not removed.
func TestHoldAgainstRemoval(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var mu sync.Mutex
	asked := func() {}
	s := open(t, func(c *Config) {
		c.InUse = func(string) []string {
			mu.Lock()
			f := asked
			mu.Unlock()
			f()
			return nil
		}
	})
	archive := dockerArchive(t, []string{"a:1"}, mkTar(t, fileEntry("f", "x")))
	for name, remove := range map[string]func(id string) error{
		"rmi": func(string) error { _, err := s.Remove(ctx, "a:1", RemoveOptions{}, nil); return err },
		"prune": func(string) error {
			f := Filters{"dangling": {"false"}}
			_, _, err := s.Prune(ctx, f, nil)
			return err
		},
		"budget": func(id string) error {
			s.mu.RLock()
			r := s.recs[digest.Digest(id)]
			s.mu.RUnlock()
			if !s.collectImage(budgetItem{rec: r}) {
				return errors.New("not removed")
			}
			return nil
		},
	} {
		load(t, s, archive)
		id := resolve(t, s, "a:1").ID
		_, release, err := s.Acquire(ctx, "a:1", nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = remove(id) // prune passes over it, the others say so
		if _, err := s.Resolve(ctx, "a:1", nil); err != nil {
			t.Errorf("%s: removed though held: %v", name, err)
		}
		release()
		got := make(chan error, 1)
		once := sync.OnceFunc(func() {
			go func() {
				_, release, err := s.Acquire(ctx, "a:1", nil)
				if err == nil {
					release()
				}
				got <- err
			}()
			// It either waits for the end of the removal, or comes after it.
			for end := time.Now().Add(20 * time.Millisecond); time.Now().Before(end) && len(got) == 0; {
				time.Sleep(time.Millisecond)
			}
			if len(got) > 0 {
				t.Errorf("%s: held while it is being removed", name)
			}
		})
		mu.Lock()
		asked = once
		mu.Unlock()
		if err := remove(id); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		select {
		case err := <-got:
			if !errdefs.IsNotFound(err) {
				t.Errorf("%s: acquired meanwhile: %v", name, err)
			}
		case <-ctx.Done():
			t.Fatalf("%s: who wants it waits for ever", name)
		}
		mu.Lock()
		asked = func() {}
		mu.Unlock()
	}
}

// What has been acquired has its files, whoever removes and collects meanwhile.
func TestAcquireUnderRemovals(t *testing.T) {
	ctx := context.Background()
	s := open(t, func(c *Config) { c.Budget = 1 })
	archive := dockerArchive(t, []string{"a:1"}, mkTar(t, fileEntry("f", strings.Repeat("x", 10_000))))
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 60 {
			load(t, s, archive)
			if _, err := s.Remove(ctx, "a:1", RemoveOptions{}, nil); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsConflict(err) {
				t.Error(err)
			}
			s.gcSoon()
		}
	})
	for range 2 {
		wg.Go(func() {
			for range 300 {
				img, release, err := s.Acquire(ctx, "a:1", nil)
				if errdefs.IsNotFound(err) {
					continue
				}
				if err != nil {
					t.Error(err)
					continue
				}
				dirs, err := s.Layers(ctx, img)
				if err == nil {
					_, err = os.Stat(dirs[0] + "/f")
				}
				if err != nil {
					t.Errorf("acquired, but: %v", err)
				}
				release()
			}
		})
	}
	wg.Wait()
}

// An image from elsewhere does not pin itself; one that was made here does.
func TestKeepLabel(t *testing.T) {
	ctx := context.Background()
	s := open(t)
	foreign := &ociArchive{}
	layer := mkTar(t, fileEntry("f", "x"))
	conf := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}}}
	conf.Config.Labels = map[string]string{KeepLabel: "1"}
	m := foreign.json(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest, Config: foreign.json(ocispec.MediaTypeImageConfig, conf),
		Layers: []ocispec.Descriptor{foreign.put(ocispec.MediaTypeImageLayer, layer)},
	})
	m.Annotations = map[string]string{annotationName: "stranger:1"}
	foreign.idx.Manifests = append(foreign.idx.Manifests, m)
	load(t, s, foreign.bytes(t))
	if got := resolve(t, s, "stranger:1").Config.Config.Labels[KeepLabel]; got != "1" {
		t.Fatalf("label %q", got)
	}
	if got := s.Pinned(ctx); len(got) > 0 {
		t.Errorf("it pins itself: %v", got)
	}
	if _, err := s.Import(ctx, bytes.NewReader(layer), ImportOptions{Ref: "mine:1", Changes: []string{"LABEL " + KeepLabel + "=1"}}); err != nil {
		t.Fatal(err)
	}
	if got := s.Pinned(ctx); !slices.Equal(got, []string{"mine:1"}) {
		t.Errorf("pinned: %v", got)
	}
	if err := s.Pin(ctx, "stranger:1", true); err != nil {
		t.Fatal(err)
	}
	if got := s.Pinned(ctx); !slices.Equal(got, []string{"mine:1", "stranger:1"}) {
		t.Errorf("pinned: %v", got)
	}
}

// What a pull has fetched already stays while the rest is on its way, however small the
// budget; and what has come can be used.
func TestPullUnderBudget(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	f := newFakeRegistry(t)
	first, second := mkTar(t, fileEntry("first", strings.Repeat("1", 10_000))), mkTar(t, fileEntry("second", strings.Repeat("2", 10_000)))
	target := f.image("amd64", first, second)
	f.tags["1"] = target.Digest
	var last digest.Digest // of the second layer's blob
	var m ocispec.Manifest
	if err := json.Unmarshal(f.blobs[target.Digest], &m); err != nil {
		t.Fatal(err)
	}
	last = m.Layers[1].Digest
	released, asked := make(chan struct{}), make(chan struct{})
	ask := sync.OnceFunc(func() { close(asked) })
	f.bend = func(_ http.ResponseWriter, r *http.Request, d digest.Digest, _ []byte) bool {
		if d == last && r.Method == http.MethodGet {
			ask()
			select {
			case <-released:
			case <-ctx.Done():
			}
		}
		return false
	}
	s := open(t, func(c *Config) { c.Budget = 1 })
	load(t, s, dockerArchive(t, []string{"old:1"}, mkTar(t, fileEntry("f", "x"))))
	done := make(chan error, 1)
	go func() {
		_, err := s.Pull(ctx, f.addr+"/x:1", PullOptions{})
		done <- err
	}()
	select {
	case <-asked:
	case <-ctx.Done():
		t.Fatal("the second layer is not asked for")
	}
	for !s.hasBlob(m.Layers[0].Digest, -1) {
		if ctx.Err() != nil {
			t.Fatal("the first layer does not come")
		}
		time.Sleep(time.Millisecond)
	}
	for range 20 {
		s.gcSoon()
		time.Sleep(time.Millisecond) // it is the collector's turn
	}
	if !s.hasBlob(m.Layers[0].Digest, -1) {
		t.Error("what has come is gone before the rest is there")
	}
	close(released)
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-ctx.Done():
		t.Fatal("the pull does not end")
	}
	for { // the other goes
		if _, err := s.Resolve(ctx, "old:1", nil); err != nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("the budget is not kept")
		}
		time.Sleep(time.Millisecond)
	}
	img, release, err := s.Acquire(ctx, f.addr+"/x:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if dirs, err := s.Layers(ctx, img); err != nil || len(dirs) != 2 {
		t.Errorf("%v, %v", dirs, err)
	}
}

// Who wants an image that is being removed does not wait for that beyond his context.
func TestAcquireEnds(t *testing.T) {
	s := open(t)
	load(t, s, dockerArchive(t, []string{"a:1"}, mkTar(t, fileEntry("f", "x"))))
	_, done := s.leave(digest.Digest(resolve(t, s, "a:1").ID), nil)
	defer done()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	got := make(chan error, 1)
	go func() {
		_, _, err := s.Acquire(ctx, "a:1", nil)
		got <- err
	}()
	select {
	case err := <-got:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("it waits on")
	}
}
