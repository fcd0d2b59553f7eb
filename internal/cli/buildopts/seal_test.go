package buildopts

import (
	"encoding/json"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tenon.dev/tenon/client/imageapi"
)

// A seal holds over the daemon's records, and over nothing else.
func TestSeal(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "config")
	d := imageapi.Definition{Context: "/src/app", Dockerfile: "/src/app/Dockerfile", Args: []string{"V=1", "TOKEN"}, Secrets: []string{"id=a,src=/a"}, Host: "here"}
	names := []string{"app", "app:2"}
	if Sealed(dir, "unix:///d", names, d) {
		t.Error("sealed without a key")
	}
	seals := make([]string, 4) // the first builds of a user, at once
	var g sync.WaitGroup
	for i := range seals {
		g.Go(func() {
			var err error
			if seals[i], err = Seal(dir, "unix:///d", names, d); err != nil {
				t.Error(err)
			}
		})
	}
	g.Wait()
	for _, s := range seals {
		if s != seals[0] {
			t.Fatalf("several keys: %q", seals)
		}
	}
	if st, err := os.Stat(filepath.Join(dir, keyFile)); err != nil || st.Mode() != 0o600 {
		t.Errorf("key: %v %v", st, err)
	}
	if list, _ := os.ReadDir(dir); len(list) != 1 {
		t.Errorf("left behind: %v", list)
	}
	// What the daemon adds, and the way there and back, change nothing.
	d.Seal, d.Created, d.Bases = seals[0], time.Now().UTC(), []imageapi.Base{{Name: "a:1"}}
	b, err := json.Marshal(d)
	var back imageapi.Definition
	if err != nil || json.Unmarshal(b, &back) != nil || !Sealed(dir, "unix:///d", names, back) {
		t.Errorf("not sealed: %s", b)
	}
	for what, forge := range map[string]func(*imageapi.Definition){
		"context":  func(d *imageapi.Definition) { d.Context = "/root" },
		"file":     func(d *imageapi.Definition) { d.Dockerfile = "/etc/shadow" },
		"variable": func(d *imageapi.Definition) { d.Args = []string{"V", "TOKEN"} },
		"secret":   func(d *imageapi.Definition) { d.Secrets = []string{"id=a,src=/b"} },
		"agent":    func(d *imageapi.Definition) { d.SSH = []string{"default"} },
		"contexts": func(d *imageapi.Definition) { d.Contexts = []string{"x=/root"} },
		"flag":     func(d *imageapi.Definition) { d.Flags = []string{"--allow=security.insecure"} },
		"host":     func(d *imageapi.Definition) { d.Host = "there" },
		"seal":     func(d *imageapi.Definition) { d.Seal = "" },
	} {
		f := back
		forge(&f)
		if Sealed(dir, "unix:///d", names, f) {
			t.Errorf("a forged %s is sealed", what)
		}
	}
	if !Sealed(dir, "unix:///d", []string{"other:1", "docker.io/library/app:latest"}, back) {
		t.Error("the image's is not sealed under its full name")
	}
	for _, other := range [][]string{nil, {"other"}, {"app:2"}} {
		if Sealed(dir, "unix:///d", other, back) {
			t.Errorf("another image's is sealed: %q", other)
		}
	}
	if Sealed(dir, "tcp://elsewhere:1", names, back) {
		t.Error("another daemon's is sealed")
	}
	if Sealed(t.TempDir(), "unix:///d", names, back) {
		t.Error("another user's is sealed")
	}
}
