package build

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	errcode "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/opencontainers/go-digest"

	"tenon.dev/tenon/internal/build/api"
	"tenon.dev/tenon/internal/build/where"
)

// steps tell a build as the classic builder did: every instruction, in the order of the
// Dockerfile, with what its command prints. BuildKit runs stages at the same time and
// skips what nobody needs; what a later step prints waits for the earlier ones.
type steps struct {
	list []*step
	cur  int // the one that is being told
	byID map[digest.Digest]*step
	tags []string
}

// step is one instruction.
type step struct {
	text    string
	stage   string // of a step that BuildKit runs, as it names it
	index   int    // among those of its stage, from one; 0: BuildKit runs nothing for it
	begun   bool
	ended   bool
	cached  bool
	told    bool // its header
	pending []byte
}

const (
	// maxDockerfileBytes bounds a Dockerfile in a context.
	maxDockerfileBytes = 16 << 20
	// maxStages bounds its stages, which are looked for among each other.
	maxStages = 4096
)

// readSteps reads the Dockerfile of an unpacked context: the first to notice what is
// wrong with it.
func readSteps(dir string, req *api.Request) (*steps, error) {
	name := req.Dockerfile
	if name == "" || name == "." {
		name = "Dockerfile"
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("build context: %w", err)
	}
	defer func() { _ = root.Close() }() // only read
	f, err := root.Open(strings.TrimPrefix(path.Clean("/"+name), "/"))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, invalid("Cannot locate specified Dockerfile: %s", name)
		}
		return nil, invalid("the Dockerfile %s can't be read: %v", name, err)
	}
	defer func() { _ = f.Close() }() // only read
	text, err := io.ReadAll(io.LimitReader(f, maxDockerfileBytes+1))
	if err != nil {
		return nil, invalid("the Dockerfile %s can't be read: %v", name, err)
	}
	if len(text) > maxDockerfileBytes {
		return nil, invalid("the Dockerfile %s has more than %d MiB", name, maxDockerfileBytes>>20)
	}
	if len(bytes.TrimSpace(text)) == 0 {
		return nil, invalid("the Dockerfile (%s) cannot be empty", name)
	}
	return parseSteps(name, text, req.Target, req.Tags)
}

// remoteSteps are of a Dockerfile that only BuildKit reads: what is run is told, as it comes.
func remoteSteps(req *api.Request) *steps {
	return &steps{byID: map[digest.Digest]*step{}, tags: req.Tags}
}

// parseSteps parses a Dockerfile; errors name line and column.
func parseSteps(name string, text []byte, target string, tags []string) (*steps, error) {
	bad := func(err error) error {
		if p, ok := where.InFile(name, text, err); ok {
			return invalid("%v (%s)", err, p)
		}
		return invalid("%v (%s)", err, name)
	}
	ast, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		return nil, bad(err)
	}
	stages, _, err := instructions.Parse(ast.AST, nil)
	if err != nil {
		return nil, bad(err)
	}
	if len(stages) == 0 {
		return nil, invalid("file with no instructions or no FROM (%s)", name)
	}
	if len(stages) > maxStages {
		return nil, invalid("%s has %d stages, more than %d", name, len(stages), maxStages)
	}
	last := len(stages) - 1
	if target != "" {
		if last = stageOf(stages, len(stages), target); last < 0 {
			return nil, invalid("target stage %q could not be found in %s", target, name)
		}
	}
	needed := make([]bool, len(stages))
	need(stages, last, needed)

	s := &steps{byID: map[digest.Digest]*step{}, tags: tags}
	stage, index := -1, 0
	for _, n := range ast.AST.Children {
		st := &step{text: n.Original}
		switch strings.ToUpper(n.Value) {
		case "FROM":
			stage++
			index = 0
			if base := stages[stage].BaseName; !strings.EqualFold(base, "scratch") && stageOf(stages, stage, base) < 0 {
				index++
				st.index = index
			}
		case "RUN", "COPY", "ADD", "WORKDIR":
			index++
			st.index = index
		}
		if stage >= 0 {
			if !needed[stage] {
				continue
			}
			if st.stage = stages[stage].Name; st.stage == "" {
				st.stage = "stage-" + strconv.Itoa(stage)
			}
			if len(stages) == 1 {
				st.stage = ""
			}
		}
		s.list = append(s.list, st)
	}
	return s, nil
}

// stageOf finds an earlier stage by its name or number.
func stageOf(stages []instructions.Stage, before int, name string) int {
	for i := before - 1; i >= 0; i-- {
		if strings.EqualFold(stages[i].Name, name) {
			return i
		}
	}
	if n, err := strconv.Atoi(name); err == nil && n >= 0 && n < before {
		return n
	}
	return -1
}

var mountFrom = regexp.MustCompile(`--mount=\S*\bfrom=([^,\s]+)`)

// need marks the stages that one is made of.
func need(stages []instructions.Stage, i int, needed []bool) {
	if i < 0 || needed[i] {
		return
	}
	needed[i] = true
	need(stages, stageOf(stages, i, stages[i].BaseName), needed)
	for _, c := range stages[i].Commands {
		switch c := c.(type) {
		case *instructions.CopyCommand:
			need(stages, stageOf(stages, i, c.From), needed)
		case *instructions.RunCommand:
			for _, m := range mountFrom.FindAllStringSubmatch(c.String(), -1) {
				need(stages, stageOf(stages, i, m[1]), needed)
			}
		}
	}
}

// vertexName is how BuildKit names what it runs for an instruction: [stage 2/5] RUN ….
var vertexName = regexp.MustCompile(`(?s)^\[(?:(\S+) +)? *(\d+)/\d+\] (.*)$`)

// update takes BuildKit's news.
func (s *steps) update(m *client.SolveStatus, p api.Printer) {
	for _, v := range m.Vertexes {
		st := s.byID[v.Digest]
		if st == nil {
			if st = s.find(v.Name); st == nil {
				continue
			}
			s.byID[v.Digest] = st
		}
		st.begun = st.begun || v.Started != nil
		if v.Completed != nil {
			st.ended, st.cached = true, v.Cached
		}
	}
	for _, l := range m.Logs {
		if st := s.byID[l.Vertex]; st != nil {
			st.pending = append(st.pending, l.Data...)
		}
	}
	s.tell(p, false)
}

// find is the step of a vertex.
func (s *steps) find(name string) *step {
	m := vertexName.FindStringSubmatch(name)
	if m == nil {
		return nil
	}
	index, _ := strconv.Atoi(m[2]) // only digits; a huge one is none
	for _, st := range s.list {
		if st.index == index && st.index > 0 && st.stage == m[1] {
			return st
		}
	}
	st := &step{text: m[3], stage: m[1], index: index} // of ONBUILD, or of a remote Dockerfile
	at := len(s.list)
	for i := s.cur; i < len(s.list); i++ { // behind what its stage has
		if s.list[i].stage == m[1] && s.list[i].index > index {
			at = i
			break
		}
	}
	s.list = append(s.list[:at:at], append([]*step{st}, s.list[at:]...)...)
	return st
}

// tell prints what can be printed now; everything if the build has ended well.
func (s *steps) tell(p api.Printer, all bool) {
	for ; s.cur < len(s.list); s.cur++ {
		st := s.list[s.cur]
		if st.index > 0 && !st.begun && !st.ended && !all {
			return
		}
		s.print(st, p)
		if st.index > 0 && !st.ended && !all {
			return
		}
		if st.cached {
			p.Text(" ---> Using cache\n")
		}
	}
}

// print prints a step's header and what its command has printed since.
func (s *steps) print(st *step, p api.Printer) {
	if !st.told {
		st.told = true
		n := 0
		for i, x := range s.list {
			if x == st {
				n = i + 1
			}
		}
		p.Text(fmt.Sprintf("Step %d/%d : %s\n", n, len(s.list), st.text))
	}
	if len(st.pending) > 0 {
		p.Text(string(st.pending))
		st.pending = nil
	}
}

// fail prints what the steps have printed that have begun: one of them is why.
func (s *steps) fail(p api.Printer) {
	s.tell(p, false)
	for _, st := range s.list {
		if st.begun && (!st.told || len(st.pending) > 0) {
			s.print(st, p)
		}
	}
}

// finish tells the rest and the result.
func (s *steps) finish(p api.Printer, imageID string) {
	s.tell(p, true)
	if imageID == "" {
		return
	}
	p.Text("Successfully built " + short(imageID) + "\n")
	for _, t := range s.tags {
		p.Text("Successfully tagged " + familiar(t) + "\n")
	}
}

// short is an image's ID as users see it.
func short(id string) string {
	_, hex, ok := strings.Cut(id, ":")
	if !ok {
		hex = id
	}
	return hex[:min(len(hex), 12)]
}

// familiar is a full name as users write it.
func familiar(name string) string {
	if n, err := reference.ParseNormalizedNamed(name); err == nil {
		return reference.FamiliarString(n)
	}
	return name
}

// process is how BuildKit's errors name a command.
var process = regexp.MustCompile(`process ("(?:[^"\\]|\\.)*") did not complete`)

// explain makes BuildKit's error one for users of POST /build.
func explain(err error, classic bool) error {
	place, known := where.Find(err)
	at := ""
	if known {
		at = place.String()
	}
	var exit *gatewaypb.ExitError
	if errors.As(err, &exit) {
		if !classic {
			return err // its client shows the line
		}
		if exit.Err != nil && (exit.ExitCode == gatewaypb.UnknownExitStatus || strings.Contains(exit.Err.Error(), syscall.ENOEXEC.Error())) {
			return err // it could not be run: that says why
		}
		e := &api.StepError{Code: int(exit.ExitCode), Command: "?", Place: at}
		if m := process.FindStringSubmatch(err.Error()); m != nil {
			if text, uerr := strconv.Unquote(m[1]); uerr == nil {
				e.Command = text
			}
		}
		return e
	}
	if !known || !classic {
		return err
	}
	var ve *errdefs.VertexError
	if text := where.Plain(err.Error()); text != err.Error() {
		return errcode.ErrNotFound.WithMessage(text + " (" + at + ")")
	}
	if errors.As(err, &ve) {
		return fmt.Errorf("%w (%s)", err, at)
	}
	return invalid("%v (%s)", err, at)
}
