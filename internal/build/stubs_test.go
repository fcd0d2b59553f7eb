package build

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/spec"
)

// What a step has put in the way of its mount points leads the cleaning nowhere, and
// what is not empty stays.
func TestStubsStayInTheLayer(t *testing.T) {
	dir := t.TempDir()
	upper, lower, outside := filepath.Join(dir, "upper"), filepath.Join(dir, "lower"), filepath.Join(dir, "outside")
	for _, d := range []string{upper, lower, outside, lower + "/have", outside + "/victim"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	then := time.Unix(1_000_000, 0)
	if err := os.Chtimes(lower+"/have", then, then); err != nil {
		t.Fatal(err)
	}
	st := &engine.Step{Upper: upper, Lower: []string{lower}}
	for _, dest := range []string{"/have", "/have/new", "/a/b", "/full", "/link/victim", "/written"} {
		st.Mounts = append(st.Mounts, spec.Mount{Destination: dest})
	}
	s := findStubs(st, true)
	// The launch, and the step.
	for _, d := range []string{"/have/new", "/a/b", "/full/of"} {
		if err := os.MkdirAll(upper+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, upper+"/link"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(upper+"/written", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.remove(); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{
		upper + "/have": true, upper + "/have/new": false, upper + "/a/b": false, upper + "/a": false, upper + "/full/of": true,
		upper + "/written": true, outside + "/victim": true, upper + "/link": true,
	} {
		if _, err := os.Lstat(path); (err == nil) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
	if info, err := os.Stat(upper + "/have"); err != nil || !info.ModTime().Equal(then) {
		t.Errorf("the directory above was changed %v, %v", info.ModTime(), err)
	}
}
