package volume

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/store"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	db, err := store.Open(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(filepath.Join(dir, "volumes"), db, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		_ = db.Close() // closed twice by tests that reopen
	})
	return s
}

func TestLifeOfAVolume(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	v, err := s.Create(t.Context(), CreateOptions{Name: "data", Labels: map[string]string{"a": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.Path(v.Name), "f"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), CreateOptions{Name: "data"}); err != nil {
		t.Errorf("creating it again: %v", err)
	}
	if _, err := s.Create(t.Context(), CreateOptions{Name: "data", Options: map[string]string{"type": "tmpfs"}}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("other options: got %v, want AlreadyExists", err)
	}
	if err := s.MarkPopulated("data"); err != nil {
		t.Fatal(err)
	}
	_ = s.db.Close()
	s = open(t, dir)
	got, err := s.Get("data")
	if err != nil || !got.Populated || got.Labels["a"] != "b" {
		t.Fatalf("after reopening: %+v, %v", got, err)
	}
	if n, err := s.Size(t.Context(), "data"); err != nil || n < 512 {
		t.Errorf("size: %d, %v", n, err)
	}
	if err := s.Remove(t.Context(), "data"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "data"); !errdefs.IsNotFound(err) {
		t.Errorf("second removal: got %v, want NotFound", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	left, _ := os.ReadDir(filepath.Join(dir, "volumes", trashDir))
	if len(left) != 0 {
		t.Errorf("trash still holds %v", left)
	}
}

func TestNamesAndOptionsRefused(t *testing.T) {
	s := open(t, t.TempDir())
	for _, o := range []CreateOptions{
		{Name: "../etc"}, {Name: "a"}, {Name: ".trash"}, {Name: "a/b"}, {Name: "x\x00y"},
		{Name: "ok", Driver: "magic"}, // not NotFound: clients would take it for a missing image
		{Name: "ok", Options: map[string]string{"type": "nfs"}},
		{Name: "ok", Options: map[string]string{"sise": "1"}},
		{Name: "ok", Options: map[string]string{"type": "none", "o": "bind", "device": "relative"}},
	} {
		if _, err := s.Create(t.Context(), o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: got %v, want InvalidArgument", o, err)
		}
	}
	if n := len(s.List()); n != 0 {
		t.Errorf("%d volumes after refusals only", n)
	}
}

func TestSweepKeepsData(t *testing.T) {
	dir := t.TempDir()
	for _, p := range []string{"empty/_data", "full/_data/x"} {
		if err := os.MkdirAll(filepath.Join(dir, "volumes", p), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	open(t, dir)
	if _, err := os.Stat(filepath.Join(dir, "volumes", "empty")); err == nil {
		t.Error("a half-made volume's directory was kept")
	}
	if _, err := os.Stat(filepath.Join(dir, "volumes", "full/_data/x")); err != nil {
		t.Errorf("data without a record was lost: %v", err)
	}
}

func TestOwnerOfAnAnonymousVolume(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	anon, err := s.Create(t.Context(), CreateOptions{Owner: "c1"})
	if err != nil || anon.Owner != "c1" {
		t.Fatalf("%+v %v", anon, err)
	}
	if named, err := s.Create(t.Context(), CreateOptions{Name: "named", Owner: "c1"}); err != nil || named.Owner != "" {
		t.Fatalf("a named volume has an owner: %+v %v", named, err)
	}
	if err := s.Disown(anon.Name); err != nil {
		t.Fatal(err)
	}
	if err := s.Disown("nosuch"); err != nil {
		t.Error(err)
	}
	_ = s.db.Close()
	s = open(t, dir)
	if v, err := s.Get(anon.Name); err != nil || v.Owner != "" || !v.Anonymous {
		t.Errorf("after reopening: %+v %v", v, err)
	}
}
