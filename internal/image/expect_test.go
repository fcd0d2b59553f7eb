package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
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
	u, err := r.NewUpload("app")
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
		if err := r.grant(uploadStep); err != nil {
			last = err.Error()
			continue
		}
		break
	}
	r.ungrant(uploadStep)
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
	s.pushes.add(d, 1)
	s.pushes.mu.Lock()
	s.pushes.loose[d] = looseBlob{1, time.Now().Add(-2 * s.expectFor)}
	s.pushes.mu.Unlock()
	r.Expect("app", d)
	if err := r.grant(uploadStep); !errors.Is(err, ErrNoRoom) {
		t.Errorf("%v", err)
	}
}
