package cli

import (
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/registry"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/cli/buildopts"
)

// Credentials go by their registry's host, however they are kept; a file of null is empty.
func TestAllCredentials(t *testing.T) {
	a, _ := testApp(t)
	a.config = t.TempDir()
	for text, want := range map[string]map[string]string{
		`null`:            {},
		`{"auths": null}`: {},
		`{"auths": {"https://a.test/v2/": {"auth": "bWU6eA=="}, "b.test:5000": {"auth": "eW91Ong="}, "https://index.docker.io/v1/": {"auth": "aHViOng="}}}`: {"a.test": "me", "b.test:5000": "you", "https://index.docker.io/v1/": "hub"},
	} {
		if err := os.WriteFile(filepath.Join(a.config, "config.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		header, err := a.allAuth(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		b, err := base64.URLEncoding.DecodeString(header)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]registry.AuthConfig{}
		if len(b) > 0 {
			if err := json.Unmarshal(b, &got); err != nil {
				t.Fatal(err)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%s: %v", text, got)
		}
		for host, user := range want {
			if got[host].Username != user {
				t.Errorf("%s of %s: %+v", host, text, got[host])
			}
		}
		c, err := a.loadConfig()
		if err != nil {
			t.Fatal(err)
		}
		c.auths["new.test"] = authEntry{}
		if err := c.save(); err != nil {
			t.Errorf("%s: %v", text, err)
		}
		if st, err := os.Stat(c.path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("config.json: %v, %v", st, err)
		}
	}
}

// What a daemon says of a build chooses neither files that are written here nor a
// directory that only has the name of the one it was built from.
func TestRebuildFromRecords(t *testing.T) {
	a, out := testApp(t)
	a.config = t.TempDir()
	daemon, err := client.New("unix:///none.sock")
	if err != nil {
		t.Fatal(err)
	}
	here := t.TempDir()
	mine := imageapi.Definition{Context: here, Args: []string{"NPM_TOKEN", "V=1"}}
	if mine.Seal, err = buildopts.Seal(a.config, daemon.Host(), []string{"app:1"}, mine); err != nil {
		t.Fatal(err)
	}
	forged := mine
	forged.Context = "/root"
	for _, c := range []struct {
		def          imageapi.Definition
		answer       string
		asked, taken bool
	}{
		{mine, "", false, true},
		{forged, "", true, false},
		{forged, "n\n", true, false},
		{forged, "y\n", true, true},
		{imageapi.Definition{Context: here}, "", true, false},
	} {
		s := imageapi.Step{Do: imageapi.StepBuild, Names: []string{"app:1"}, Definition: &c.def}
		a.settle(t.Context(), daemon, &s, rebuilding{})
		out.Reset()
		a.in = strings.NewReader(c.answer)
		err := a.agree([]imageapi.Step{s})
		if asked := strings.Contains(out.String(), "app:1: built from "+c.def.Context); s.Unconfirmed != c.asked || asked != c.asked || (err == nil) != c.taken {
			t.Errorf("%+v, %q: %v, %v: %s", c.def, c.answer, s.Unconfirmed, err, out)
		}
	}
	if why := takes(&mine); !strings.Contains(why, "variable NPM_TOKEN") || strings.Contains(why, "V=1") {
		t.Errorf("what it takes: %s", why)
	}
	for _, c := range []struct {
		def  *imageapi.Definition
		do   string
		says string
	}{
		{&imageapi.Definition{Context: here, Secrets: []string{"id=a,src=/etc/shadow"}}, imageapi.StepBuild, here + ", secret id=a,src=/etc/shadow"},
		{&imageapi.Definition{Context: here, Dockerfile: "/etc/shadow"}, imageapi.StepBuild, here + ", Dockerfile /etc/shadow;"},
		{&imageapi.Definition{Context: here, Dockerfile: here + "/Dockerfile"}, imageapi.StepBuild, here + ";"},
		{&imageapi.Definition{Context: here, Host: "another.example"}, imageapi.StepNone, "built on another.example"},
		{&imageapi.Definition{Context: here + "/none"}, imageapi.StepNone, "not on this machine"},
		{&imageapi.Definition{Context: "git@host.example:a.git", Host: "another.example"}, imageapi.StepBuild, "git@host.example:a.git"},
		{nil, imageapi.StepNone, "does not tell"},
	} {
		s := imageapi.Step{Do: imageapi.StepBuild, Why: "built from somewhere", Definition: c.def}
		a.settle(t.Context(), daemon, &s, rebuilding{})
		if s.Do != c.do || !strings.Contains(s.Why, c.says) {
			t.Errorf("%+v: %s, %s; want %s, %s", c.def, s.Do, s.Why, c.do, c.says)
		}
	}
	for flag, ok := range map[string]bool{"--shm-size=1048576": true, "--iidfile=/etc/x": false, "--output=/": false, "-o/": false, "--config=/x": false} {
		args, err := buildArgs(imageapi.Step{Names: []string{"a:1"}, Definition: &imageapi.Definition{Context: "--help", Flags: []string{flag}}})
		if (err == nil) != ok {
			t.Errorf("%s: %v, %v", flag, args, err)
		}
		if want := []string{"build", "--tag=a:1", flag, "--", "--help"}; ok && !slices.Equal(args, want) {
			t.Errorf("%q, want %q", args, want)
		}
	}
}
