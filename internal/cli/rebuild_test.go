package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/cli/buildopts"
)

// A directory that the user names takes the place of one that nobody knows, or that is
// elsewhere; a Git context is built at its commit if that is asked for.
func TestRebuildElsewhere(t *testing.T) {
	a, _ := testApp(t)
	a.config = t.TempDir()
	daemon, err := client.New("unix:///none.sock")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, f := range []string{"Dockerfile", "sub/x.Dockerfile"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, f)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	sent := imageapi.Definition{Sent: true, ByDaemon: true, Args: []string{"TOKEN"}}
	git := imageapi.Definition{Context: "https://git.test/a.git#main:dir", Revision: strings.Repeat("ab", 20), ByDaemon: true}
	for _, c := range []struct {
		def  imageapi.Definition
		file string
		how  rebuilding
		do   string
		says string
	}{
		{sent, "", rebuilding{}, imageapi.StepRebase, "--context app:1=DIRECTORY builds it"},
		{sent, "", rebuilding{contexts: []string{"app:1=" + dir}}, imageapi.StepBuild, "built from " + dir + ", variable TOKEN; not recorded"},
		{sent, "sub/x.Dockerfile", rebuilding{contexts: []string{"app:1=" + dir}}, imageapi.StepBuild, "Dockerfile " + dir + "/sub/x.Dockerfile"},
		{sent, "../../etc/passwd", rebuilding{contexts: []string{"app:1=" + dir}}, imageapi.StepNone, "not in its context"},
		{sent, "none", rebuilding{contexts: []string{"app:1=" + dir}}, imageapi.StepNone, "has no none"},
		{sent, "", rebuilding{contexts: []string{"other:1=" + dir}}, imageapi.StepRebase, "DIRECTORY"},
		{imageapi.Definition{Context: "/away", Dockerfile: "/away/sub/x.Dockerfile", Host: "another.test"}, "", rebuilding{contexts: []string{"app:1=" + dir}}, imageapi.StepBuild, "built from " + dir},
		{imageapi.Definition{Context: "/away", Dockerfile: "/etc/shadow"}, "", rebuilding{contexts: []string{"app:1=" + dir}}, imageapi.StepNone, "not in its context"},
		{git, "", rebuilding{}, imageapi.StepBuild, "a.git#main:dir, which was at abababababab"},
		{git, "", rebuilding{revision: true}, imageapi.StepBuild, "a.git#" + git.Revision + ":dir;"},
		{git, "", rebuilding{contexts: []string{"app:1=" + dir}}, imageapi.StepNone, "not from a directory"},
		{imageapi.Definition{Context: "https://git.test/a.git?branch=x", Revision: git.Revision}, "", rebuilding{revision: true}, imageapi.StepNone, "another commit"},
	} {
		if c.file != "" {
			c.def.Dockerfile = c.file
		}
		s := imageapi.Step{Do: imageapi.StepBuild, Names: []string{"app:1"}, Definition: &c.def}
		if c.def.Sent {
			s.Do = imageapi.StepRebase // what the daemon says
		}
		a.settle(t.Context(), daemon, &s, c.how)
		if s.Do != c.do || !strings.Contains(s.Why, c.says) || s.Do == imageapi.StepBuild && !s.Unconfirmed {
			t.Errorf("%+v, %+v: %s, %s; want %s, %s", c.def, c.how, s.Do, s.Why, c.do, c.says)
		}
	}
	// Of the user's own definition nothing is asked, whatever she says now.
	for _, c := range []struct {
		def imageapi.Definition
		how rebuilding
	}{
		{imageapi.Definition{Context: "/away", Dockerfile: "/away/Dockerfile", Host: "another.test"}, rebuilding{contexts: []string{"app:1=" + dir}}},
		{imageapi.Definition{Context: git.Context}, rebuilding{revision: true}},
	} {
		seal, err := buildopts.Seal(configDir(a.config), daemon.Host(), []string{"app:1"}, c.def)
		if err != nil {
			t.Fatal(err)
		}
		c.def.Seal, c.def.Revision = seal, git.Revision
		for _, changed := range []bool{false, true} {
			if changed {
				c.def.Secrets = []string{"id=x,src=/etc/shadow"}
			}
			s := imageapi.Step{Do: imageapi.StepBuild, Names: []string{"app:1"}, Definition: new(c.def)}
			a.settle(t.Context(), daemon, &s, c.how)
			if s.Do != imageapi.StepBuild || s.Unconfirmed != changed {
				t.Errorf("%+v: %s, %s, unconfirmed %v", c.def, s.Do, s.Why, s.Unconfirmed)
			}
		}
	}
	for _, bad := range []string{"app:1", "=x", "app:1=", "nosuch=" + dir} {
		if err := (rebuilding{contexts: []string{bad}}).check([]imageapi.Step{{Names: []string{"app:1"}}}); err == nil {
			t.Errorf("--context %s is taken", bad)
		}
	}
	if err := (rebuilding{contexts: []string{"app=" + dir}}).check([]imageapi.Step{{Names: []string{"app:latest"}}}); err != nil {
		t.Error(err)
	}
}
