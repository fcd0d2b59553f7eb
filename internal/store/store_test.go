package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

// records is what both stores can do.
type records interface {
	Put(bucket, key string, v any) error
	Get(bucket, key string, v any) error
	Delete(bucket, key string) error
	Each(bucket string, f func(key string, value []byte) error) error
}

// Random operations against a map, with the store closed and opened again in
// between.
func TestAgainstAModel(t *testing.T) {
	for name, open := range map[string]func(dir string) (records, func() error, error){
		"durable": func(dir string) (records, func() error, error) {
			db, err := Open(filepath.Join(dir, "state.db"))
			if err != nil {
				return nil, nil, err
			}
			return db, db.Close, nil
		},
		"volatile": func(dir string) (records, func() error, error) {
			v, err := OpenVolatile(dir)
			return v, func() error { return nil }, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, closeStore, err := open(dir)
			if err != nil {
				t.Fatal(err)
			}
			model := map[string]int{}
			rng := rand.New(rand.NewPCG(7, 7))
			for step := range 400 {
				key := fmt.Sprintf("k%d", rng.IntN(20))
				switch rng.IntN(10) {
				case 0, 1, 2, 3:
					err = s.Put("b", key, step)
					model[key] = step
				case 4, 5, 6:
					err = s.Delete("b", key)
					delete(model, key)
				case 7, 8:
					var got int
					err = s.Get("b", key, &got)
					want, ok := model[key]
					if !ok && errdefs.IsNotFound(err) {
						err = nil
					} else if !ok || got != want {
						t.Fatalf("step %d: %s is %d (%v), want %d, %v", step, key, got, err, want, ok)
					}
				default:
					if err = closeStore(); err == nil {
						s, closeStore, err = open(dir)
					}
				}
				if err != nil {
					t.Fatalf("step %d: %v", step, err)
				}
			}
			all := map[string]int{}
			err = s.Each("b", func(key string, value []byte) error {
				var v int
				err := json.Unmarshal(value, &v)
				all[key] = v
				return err
			})
			if diff := cmp.Diff(model, all); err != nil || diff != "" {
				t.Error(err, diff)
			}
			if err := closeStore(); err != nil {
				t.Error(err)
			}
		})
	}
}

// One record that can't be read does not hide the others.
func TestABadRecordIsToldAndTheRestIsRead(t *testing.T) {
	v, err := OpenVolatile(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"a", "bad", "c"} {
		if err := v.Put("b", key, key); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(v.dir, "b", ".tmp-123"), []byte("{"), 0o600); err != nil {
		t.Fatal(err) // what a killed writer leaves
	}
	var seen []string
	err = v.Each("b", func(key string, _ []byte) error {
		if key == "bad" {
			return errors.New("unreadable")
		}
		seen = append(seen, key)
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "b/bad") || strings.Join(seen, "") != "ac" {
		t.Errorf("got %v and %v", seen, err)
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, "state.db")); !errdefs.IsUnavailable(err) {
		t.Errorf("a second daemon: got %v, want Unavailable", err)
	}
	if err := db.Put("meta", "version", layout+1); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, "state.db")); err == nil {
		t.Error("a layout of the future was opened")
	}
	v, err := OpenVolatile(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"", "../x", "a/b", ".hidden", "a\x00b"} {
		if err := v.Put("b", key, 1); !errdefs.IsInvalidArgument(err) {
			t.Errorf("key %q: %v", key, err)
		}
	}
}

func TestWriteFileLeavesNothingHalfMade(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "f")
	for _, durable := range []bool{false, true} {
		if err := WriteFile(path, []byte("x"), 0o640, durable); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", st, err)
	}
	// The target is a directory: the rename fails, the temporary file goes.
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(filepath.Join(dir, "d"), nil, 0o600, false); err == nil {
		t.Error("a directory was replaced")
	}
	_ = filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if strings.Contains(p, ".tmp-") {
			t.Errorf("left: %s", p)
		}
		return err
	})
}
