package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A blob that was pushed and that no manifest needs goes by itself after a time, and
// what it took of the limits is free again.
func TestLooseBlobsGo(t *testing.T) {
	s := open(t)
	s.mu.Lock()
	s.expectFor = 100 * time.Millisecond
	s.mu.Unlock()
	r, err := s.Repositories("reg.test")
	if err != nil {
		t.Fatal(err)
	}
	r.Limit(RepositoryLimits{Uploads: uploadStep})
	data := make([]byte, uploadStep)
	u, err := r.NewUpload("app", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(data); err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(data)
	if err := u.Commit(d); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for last := "never looked"; ; time.Sleep(5 * time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatal(last)
		}
		if _, err := os.Lstat(s.blobPath(d)); !os.IsNotExist(err) {
			last = fmt.Sprint("the blob is there: ", err)
			continue
		}
		if err := r.grant("", uploadStep); err != nil {
			last = err.Error()
			continue
		}
		break
	}
	r.ungrant("", uploadStep)
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.expected != 0 {
		t.Errorf("%d blobs are expected", s.expected)
	}
}

// A blob that a client keeps by asking for it again counts for as long as it is kept.
func TestKeptBlobsCount(t *testing.T) {
	s := open(t)
	r, err := s.Repositories("reg.test")
	if err != nil {
		t.Fatal(err)
	}
	r.Limit(RepositoryLimits{Uploads: uploadStep})
	d := digest.FromString("x")
	s.pushes.add(d, 1, "")
	s.pushes.mu.Lock()
	s.pushes.loose[d] = looseBlob{1, wait{at: time.Now().Add(-2 * s.expectFor)}}
	s.pushes.mu.Unlock()
	r.Expect("app", d, "")
	if err := r.grant("", uploadStep); !errors.Is(err, ErrNoRoom) {
		t.Errorf("%v", err)
	}
}

// pushBlob makes a blob of a repository.
func pushBlob(t *testing.T, r *Repositories, repo string, data []byte) digest.Digest {
	t.Helper()
	u, err := r.NewUpload(repo, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(data); err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(data)
	if err := u.Commit(d); err != nil {
		t.Fatal(err)
	}
	return d
}

// What a removed manifest needed, and a client keeps by asking for it, counts again.
func TestBlobsOfRemovedManifestsCount(t *testing.T) {
	s := open(t)
	r, err := s.Repositories("reg.test")
	if err != nil {
		t.Fatal(err)
	}
	r.Limit(RepositoryLimits{Uploads: 2 * uploadStep})
	layer, conf := pushBlob(t, r, "app", make([]byte, uploadStep)), pushBlob(t, r, "app", []byte("{}"))
	m, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageManifest,
		"config": ocispec.Descriptor{MediaType: ocispec.MediaTypeEmptyJSON, Digest: conf, Size: 2},
		"layers": []ocispec.Descriptor{{MediaType: "application/x", Digest: layer, Size: uploadStep}},
	})
	if err != nil {
		t.Fatal(err)
	}
	d, _, err := r.PutManifest(t.Context(), "app", "1", ocispec.MediaTypeImageManifest, m)
	if err != nil {
		t.Fatal(err)
	}
	collect := func() {
		t.Helper()
		s.gate.Lock()
		defer s.gate.Unlock()
		if _, err := s.collect(); err != nil {
			t.Fatal(err)
		}
	}
	r.Expect("app", layer, "")
	collect()
	if err := r.grant("", 2*uploadStep); err != nil {
		t.Fatal("what a manifest needs counts:", err)
	}
	r.ungrant("", 2*uploadStep)
	if err := r.DeleteManifest("app", d.String()); err != nil {
		t.Fatal(err)
	}
	r.Expect("app", layer, "")
	collect()
	if err := r.grant("", 2*uploadStep); !errors.Is(err, ErrNoRoom) {
		t.Errorf("%v", err)
	}
}

// One client can't have all the room for uploads, neither for those under way nor for
// blobs that no manifest needs.
func TestRoomOfOne(t *testing.T) {
	s := open(t)
	r, err := s.Repositories("reg.test")
	if err != nil {
		t.Fatal(err)
	}
	r.Limit(RepositoryLimits{Uploads: 4 * uploadStep})
	u, err := r.NewUpload("app", "a")
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, uploadStep)
	if _, err := u.Write(data); err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(data)
	if err := u.Commit(d); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		by   string
		want error
	}{{"a", nil}, {"a", ErrNoRoom}, {"b", nil}, {"b", nil}, {"b", ErrNoRoom}, {"c", ErrNoRoom}} {
		if err := r.grant(c.by, uploadStep); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.by, err)
		}
	}
	r.ungrant("a", uploadStep)
	r.ungrant("b", 2*uploadStep)
	s.pushes.settle(d)
	if p := &s.pushes; len(p.own) != 0 || p.granted != 0 || p.bytes != 0 {
		t.Errorf("not given back: %v, %d, %d", p.own, p.granted, p.bytes)
	}
}
