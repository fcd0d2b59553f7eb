package build

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
)

type said struct{ strings.Builder }

func (s *said) Text(t string) { s.WriteString(t) }
func (s *said) Aux(string, any) {
}

const twoStages = `ARG V=1
FROM busybox AS base
RUN one
FROM busybox AS unused
RUN never
FROM base
LABEL a=b
RUN two
COPY --from=base /x /y
`

func TestSteps(t *testing.T) {
	s, err := parseSteps("Dockerfile", []byte(twoStages), "", []string{"docker.io/library/app:latest"})
	if err != nil {
		t.Fatal(err)
	}
	var out said
	now := time.Now()
	vertex := func(name string, cached, done bool) *client.Vertex {
		v := &client.Vertex{Digest: digest.FromString(name), Name: name, Started: &now, Cached: cached}
		if done {
			v.Completed = &now
		}
		return v
	}
	log := func(name, text string) *client.SolveStatus {
		return &client.SolveStatus{Logs: []*client.VertexLog{{Vertex: digest.FromString(name), Data: []byte(text)}}}
	}
	two := "[stage-2 1/2] RUN two"
	s.update(&client.SolveStatus{Vertexes: []*client.Vertex{vertex("[internal] load", false, true), vertex(two, false, false)}}, &out)
	s.update(log(two, "from two\n"), &out)
	if strings.Contains(out.String(), "two") {
		t.Errorf("a later step is told first: %s", out.String())
	}
	s.update(&client.SolveStatus{Vertexes: []*client.Vertex{vertex("[base 1/2] FROM busybox", true, true), vertex("[base 2/2] RUN one", false, true)}}, &out)
	s.update(&client.SolveStatus{Vertexes: []*client.Vertex{vertex(two, false, true)}}, &out)
	s.finish(&out, "sha256:0123456789abcdef")
	want := `Step 1/7 : ARG V=1
Step 2/7 : FROM busybox AS base
 ---> Using cache
Step 3/7 : RUN one
Step 4/7 : FROM base
Step 5/7 : LABEL a=b
Step 6/7 : RUN two
from two
Step 7/7 : COPY --from=base /x /y
Successfully built 0123456789ab
Successfully tagged app:latest
`
	if got := out.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestBrokenDockerfiles(t *testing.T) {
	for text, want := range map[string]string{
		"FROM a\n FOO\n":       "(Dockerfile:2:2)",
		"RUN x\n":              "(Dockerfile:1:1)",
		"# only a comment\n":   "Dockerfile",
		"FROM a\nCOPY --x a b": "(Dockerfile:2:6)",
	} {
		_, err := parseSteps("Dockerfile", []byte(text), "", nil)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := parseSteps("Dockerfile", []byte("FROM a"), "nosuch", nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a missing target: %v", err)
	}
}

func FuzzSteps(f *testing.F) {
	f.Add(twoStages, "base", "[stage-2 1/2] RUN two")
	f.Add("FROM a\nONBUILD RUN x", "", "[ 3/9] ONBUILD RUN x")
	f.Fuzz(func(_ *testing.T, text, target, name string) {
		s, err := parseSteps("D", []byte(text), target, nil)
		if err != nil {
			return
		}
		var out said
		now := time.Now()
		s.update(&client.SolveStatus{Vertexes: []*client.Vertex{{Digest: digest.FromString(name), Name: name, Started: &now}}}, &out)
		s.finish(&out, "sha256:1")
	})
}

func TestStagesAreBounded(t *testing.T) {
	chain := func(n int) []byte {
		var b strings.Builder
		b.WriteString("FROM scratch AS s0\n")
		for i := range n - 1 {
			fmt.Fprintf(&b, "FROM s%d AS s%d\n", i, i+1)
		}
		return []byte(b.String())
	}
	if s, err := parseSteps("Dockerfile", chain(maxStages), "", nil); err != nil || len(s.list) != maxStages {
		t.Errorf("as many as there may be: %v", err)
	}
	if _, err := parseSteps("Dockerfile", chain(maxStages+1), "", nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("one more: %v", err)
	}
}
