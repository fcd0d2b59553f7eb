package build

import (
	"context"
	"encoding/json"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/solver/pb"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/build/api"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/image/signature"
)

func TestDefinitionOfABuild(t *testing.T) {
	for name, c := range map[string]struct {
		opt  map[string]string
		want string // as JSON; empty: none
	}{
		"a directory": {map[string]string{"filename": "D", "build-arg:A": "1", "label:l": "x", "no-cache": "", "image-resolve-mode": "default", "cgroup-parent": "tenon-isolation:vm//p"},
			`{"sent":true,"byDaemon":true,"dockerfile":"D","isolation":"vm","args":["A=1"],"labels":["l=x"],"flags":["--cgroup-parent=/p"]}`},
		"of a repository": {map[string]string{"filename": "D", "vcs:source": "https://u:p@git.test/a", "vcs:revision": "abc", "vcs:localdir:context": "a", "vcs:localdir:dockerfile": "a/b"},
			`{"sent":true,"byDaemon":true,"dockerfile":"b/D","source":"https://git.test/a#abc"}`},
		"Git": {map[string]string{"context": "https://tok:en@git.test/a.git#b", "target": "t", "platform": "linux/amd64", "attest:provenance": "mode=min,inline-only=true", "attest:sbom": "generator=x", "add-hosts": "a=1.2.3.4,b=::1", "ulimit": "nofile=5:6", "shm-size": "64", "force-network-mode": "host"},
			`{"context":"https://git.test/a.git#b","byDaemon":true,"target":"t","platform":"linux/amd64","network":"host","flags":["--add-host=a:1.2.3.4","--add-host=b:::1","--attest=type=sbom,generator=x","--shm-size=64","--ulimit=nofile=5:6"]}`},
		"Git, by the client":          {map[string]string{"input:context": "https://git.test/a.git"}, `{"context":"https://git.test/a.git","byDaemon":true}`},
		"with an image":               {map[string]string{"context:base": "docker-image://x"}, `{"sent":true,"byDaemon":true,"contexts":["base=docker-image://x"]}`},
		"with another directory":      {map[string]string{"context:other": "local:other"}, ""},
		"on another build":            {map[string]string{"context": "input:x"}, ""},
		"on another build's result":   {map[string]string{"context:base": "input:base"}, ""},
		"a directory of its name":     {map[string]string{"context": "/root"}, `{"sent":true,"byDaemon":true}`},
		"a directory as an input":     {map[string]string{"input:context": "/root"}, ""},
		"a directory as another":      {map[string]string{"context:o": "input:o", "input:context:o": "/root"}, ""},
		"a question":                  {map[string]string{"requestid": "frontend.lint"}, ""},
		"a repository's other branch": {map[string]string{"context:o": "input:git_state_o", "input:context:o": "git://git.test/o#x"}, `{"sent":true,"byDaemon":true,"contexts":["o=git://git.test/o#x"]}`},
	} {
		got, ok := definitionOf(c.opt)
		if ok != (c.want != "") {
			t.Errorf("%s: %v", name, ok)
		}
		if !ok {
			continue
		}
		var want imageapi.Definition
		if err := json.Unmarshal([]byte(c.want), &want); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			b, _ := json.Marshal(got) // of strings
			t.Errorf("%s: %s, want %s", name, b, c.want)
		}
	}
}

// What a client says of a result is not taken for what was asked of the daemon.
func TestOnlyWhatWasAsked(t *testing.T) {
	var told []imageapi.Definition
	r := &running{define: func(_ context.Context, _ string, d imageapi.Definition) error {
		told = append(told, d)
		return nil
	}}
	res := &frontend.Result{}
	res.AddMeta(definitionKey, []byte(`{"context":"https://git.test/evil"}`))
	r.record(t.Context(), "id", string(res.Metadata[definitionKey]), "s")
	r.asked.note(res, map[string]string{"requestid": "frontend.lint"})
	r.record(t.Context(), "id", string(res.Metadata[definitionKey]), "s")
	r.asked.note(res, map[string]string{"label:l": strings.Repeat("x", maxDefinition)})
	r.record(t.Context(), "id", string(res.Metadata[definitionKey]), "s")
	if len(told) != 0 {
		t.Errorf("recorded: %+v", told)
	}
	r.asked.note(res, map[string]string{"context": "https://git.test/a.git#b"})
	first := string(res.Metadata[definitionKey])
	r.commits.note(commitKey("https://git.test/a.git", "b"), "1", []string{"s"})
	r.commits.note(commitKey("https://git.test/a.git", "b"), "2", []string{"other"})
	for _, session := range []string{"s", "other", "third"} {
		r.record(t.Context(), "id", first, session)
	}
	if len(told) != 3 || told[0].Context != "https://git.test/a.git#b" || told[0].Revision != "1" || told[1].Revision != "2" || told[2].Revision != "2" {
		t.Errorf("recorded: %+v", told)
	}
	for range maxAsked {
		r.asked.note(res, nil)
	}
	if _, ok := r.asked.of(first); ok || len(r.asked.defs) != maxAsked {
		t.Errorf("%d are remembered", len(r.asked.defs))
	}
}

// The daemon records what it sees of builds: of a repository, with the commit.
func TestBuildsAreSeen(t *testing.T) {
	w, f := newGitWorld(t), newForge(t)
	var mu sync.Mutex
	seen := map[string]imageapi.Definition{}
	w.b.opt.Define = func(_ context.Context, id string, d imageapi.Definition) error {
		mu.Lock()
		defer mu.Unlock()
		seen[id] = d
		return nil
	}
	dir, url := f.repo("app", func(dir string) { f.write(dir, "Dockerfile", "FROM scratch\nCOPY Dockerfile /\n") })
	if err := w.buildRemote("s:1", url+"#main", nil); err != nil {
		t.Fatal(err)
	}
	img, err := w.images.Resolve(testContext(t), "s:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	if d := seen[img.ID]; d.Context != url+"#main" || d.Revision != f.git(dir, "rev-parse", "HEAD") || !d.ByDaemon {
		t.Errorf("a repository: %+v of %v", d, seen)
	}
	id := w.mustBuild(api.Request{Tags: []string{"docker.io/library/s:2"}, Target: "x"}, map[string]string{"Dockerfile": "FROM scratch AS x\nCOPY f /\n", "f": "f"})
	if d := seen[id]; !d.Sent || d.Target != "x" || d.Context != "" {
		t.Errorf("a directory: %+v of %v", d, seen)
	}
}

// A single blob of a registry has no signature: where one is needed it is not taken.
func TestBlobsAreJudged(t *testing.T) {
	policy, err := signature.New([]signature.Rule{{Prefix: "held.test", Action: signature.Reject}})
	if err != nil {
		t.Fatal(err)
	}
	s, err := image.Open(testContext(t), image.Config{Root: t.TempDir(), Registries: image.RegistryConfig{Policy: policy}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	blob := "@sha256:" + strings.Repeat("a", 64)
	for ref, ok := range map[string]bool{"held.test/x" + blob: false, "free.test/x" + blob: true, "HELD.test/X" + blob: false} {
		err := unjudged(s, "docker-image+blob://"+ref)
		if (err == nil) != ok || err != nil && !errdefs.IsPermissionDenied(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", ref, err)
		}
		if ok {
			continue
		}
		if _, err := (blobSource{images: s}).Identifier("docker-image+blob", ref, nil, nil); err == nil {
			t.Errorf("%s is taken", ref)
		}
		if _, err = (gitSource{images: s}).Identifier("git", "git.test/x", map[string]string{pb.AttrGitBundle: "docker-image+blob://" + ref}, nil); err == nil {
			t.Errorf("a bundle of %s is taken", ref)
		}
	}
	_, err = (gitSource{images: s}).Identifier("git", "git.test/x", map[string]string{pb.AttrGitCheckoutBundle: "true"}, nil)
	if !errdefs.IsNotImplemented(err) {
		t.Errorf("a bundle is to be made: %v", err)
	}
}
