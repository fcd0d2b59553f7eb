package cli

import (
	"slices"
	"strings"
	"testing"

	"tenon.dev/tenon/client/imageapi"
)

// What a daemon says of a build chooses neither files that are written here nor a
// directory that only has the name of the one it was built from.
func TestRebuildFromRecords(t *testing.T) {
	a, _ := testApp(t)
	here := t.TempDir()
	for _, c := range []struct {
		def  *imageapi.Definition
		do   string
		says string
	}{
		{&imageapi.Definition{Context: here, Secrets: []string{"id=a,src=/etc/shadow"}}, imageapi.StepBuild, here + ", secret id=a,src=/etc/shadow"},
		{&imageapi.Definition{Context: here, Host: "another.example"}, imageapi.StepNone, "built on another.example"},
		{&imageapi.Definition{Context: here + "/none"}, imageapi.StepNone, "not on this machine"},
		{&imageapi.Definition{Context: "git@host.example:a.git", Host: "another.example"}, imageapi.StepBuild, "git@host.example:a.git"},
		{nil, imageapi.StepNone, "does not tell"},
	} {
		s := imageapi.Step{Do: imageapi.StepBuild, Why: "built from somewhere", Definition: c.def}
		a.settle(t.Context(), nil, &s, false)
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
