package where

import (
	"bytes"
	"testing"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

func parseError(text string) error {
	ast, err := parser.Parse(bytes.NewReader([]byte(text)))
	if err == nil {
		_, _, err = instructions.Parse(ast.AST, nil)
	}
	return err
}

func TestPlaces(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"FROM a\nRUN true\n  FOO bar\n", "D:3:3"},
		{"FROM a\nCOPY --frm=x a b\n", "D:2:6"},
		{"FROM a\n# c\n\nCOPY a\n", "D:4:1"},
		{"RUN true\n", "D:1:1"},
		{"FROM a\nENV\n", "D:2:1"},
		{"FROM a\nRUN a && \\\n  b\nEXPOSE\n", "D:4:1"},
		{"FROM a\nüü --x\n", "D:2:1"},
	} {
		err := parseError(c.text)
		if err == nil {
			t.Errorf("%q: no error", c.text)
			continue
		}
		p, ok := InFile("D", []byte(c.text), err)
		if got := p.String(); !ok || got != c.want {
			t.Errorf("%q: %v: %v %s, want %s", c.text, err, ok, got, c.want)
		}
	}
}

func TestPlain(t *testing.T) {
	got := Plain(`failed to solve: failed to compute cache key: failed to calculate checksum of ref abc::def: "/missing": not found`)
	if want := `"/missing" is not there to be copied: it is not in the build context or the stage, or .dockerignore leaves it out`; got != want {
		t.Errorf("%s", got)
	}
}

func FuzzInFile(f *testing.F) {
	f.Add("FROM a\nFOO\n", "parse error on line 2: unknown instruction: FOO", 2)
	f.Add("", "\"", -1)
	f.Fuzz(func(_ *testing.T, data, msg string, line int) {
		_, _ = at("D", data, line, line+1, 0, msg)
	})
}
