package build

import (
	"strings"
	"testing"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/solver/pb"
)

// What a result stands on is found through whatever its steps were.
func TestBaseOf(t *testing.T) {
	d := "sha256:" + strings.Repeat("a", 64)
	base := llb.Image("docker.io/library/base:1@" + d)
	other := llb.Image("docker.io/library/other:1@sha256:" + strings.Repeat("b", 64))
	many := llb.Copy(other, "/f", "/f").Mkdir("/d", 0o755).Mkfile("/d/g", 0o644, nil).Rm("/f")
	ran := base.Run(llb.Shlex("true"), llb.AddMount("/m", other)).Root()
	for name, c := range map[string]struct {
		state llb.State
		want  string
	}{
		"itself":          {base, "docker.io/library/base:1"},
		"a command":       {ran, "docker.io/library/base:1"},
		"files":           {ran.File(many), "docker.io/library/base:1"},
		"linked files":    {llb.Merge([]llb.State{ran, llb.Scratch().File(many)}), "docker.io/library/base:1"},
		"nothing":         {llb.Scratch().File(many), ""},
		"a directory":     {llb.Local("context").File(many), ""},
		"no digest":       {llb.Image("docker.io/library/base:1"), ""},
		"another's mount": {other.Run(llb.Shlex("true"), llb.AddMount("/m", base)).Root(), "docker.io/library/other:1"},
	} {
		def, err := c.state.Marshal(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got, dgst := baseOf(def.ToPB())
		if got != c.want || (dgst != "") != (c.want != "") || c.want == "docker.io/library/base:1" && dgst != d {
			t.Errorf("%s: %q %q, want %q", name, got, dgst, c.want)
		}
	}
}

// Definitions come from frontends, which may be anybody's.
func FuzzBaseOf(f *testing.F) {
	def, err := llb.Image("base@sha256:" + strings.Repeat("a", 64)).File(llb.Mkdir("/d", 0o755).Rm("/d")).Marshal(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	for _, op := range def.ToPB().Def {
		f.Add(op, op)
	}
	f.Fuzz(func(_ *testing.T, a, b []byte) {
		baseOf(&pb.Definition{Def: [][]byte{a, b}})
	})
}
