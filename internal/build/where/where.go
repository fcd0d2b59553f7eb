// Package where points at the line and the column of a Dockerfile that an error is about.
// BuildKit knows the lines; the column is found by the word that the error names.
package where

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/errdefs"
)

// Place is a position in a file. Line and Column count from one; columns are characters.
type Place struct {
	File         string
	Line, Column int
	// Text is the line.
	Text string
}

// String is FILE:LINE:COLUMN, as editors and compilers write it.
func (p Place) String() string { return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column) }

// named are the words that errors of the Dockerfile frontend name.
var named = regexp.MustCompile(`(?:unknown (?:instruction|flag|type|option|parameter)|unexpected (?:key|argument|token)|invalid (?:field|flag|value|option)|mount type|missing|keyword|parse|argument)[^"'` + "`" + `\s]*:? ["'` + "`" + `]?([^"'` + "`" + `\s,()]+)`)

var quoted = regexp.MustCompile("[\"'`]([^\"'`\n]+)[\"'`]")

// Find is the place that an error of BuildKit's is about; false if it is about none.
func Find(err error) (Place, bool) {
	sources := errdefs.Sources(err)
	for i := len(sources) - 1; i >= 0; i-- {
		s := sources[i]
		if s.Info == nil || len(s.Ranges) == 0 || s.Ranges[0].Start == nil {
			continue
		}
		start := s.Ranges[0]
		last := start.Start.Line
		for _, r := range s.Ranges {
			if r.End != nil {
				last = max(last, r.End.Line)
			}
		}
		return at(s.Info.Filename, string(s.Info.Data), int(start.Start.Line), int(last), int(start.Start.Character), err.Error())
	}
	return Place{}, false
}

// line is how the parser's own errors name it, before they have a source.
var line = regexp.MustCompile(`parse error on line (\d+)`)

// InFile is the place in a file that an error of the Dockerfile parser is about.
func InFile(file string, data []byte, err error) (Place, bool) {
	first, last, char := 0, 0, 0
	var le *parser.LocationError
	if errors.As(err, &le) && len(le.Locations) > 0 && len(le.Locations[0]) > 0 {
		r := le.Locations[0][0]
		first, last, char = r.Start.Line, r.End.Line, r.Start.Character
	} else if m := line.FindStringSubmatch(err.Error()); m != nil {
		_, _ = fmt.Sscan(m[1], &first) // only digits
		last = first
	}
	return at(file, string(data), first, last, char, err.Error())
}

// missing is how BuildKit says that a file is not there that is to be copied.
var missing = regexp.MustCompile(`failed to compute cache key: failed to calculate checksum of ref \S+: ("[^"]*"): not found`)

// Plain says in a user's words what BuildKit says in its own.
func Plain(msg string) string {
	for _, s := range []string{"failed to solve: ", "rpc error: code = Unknown desc = ", "failed to solve: ", "failed to dial gRPC: "} {
		msg = strings.TrimPrefix(msg, s)
	}
	return missing.ReplaceAllString(msg, "$1 is not there to be copied: it is not in the build context or the stage, or .dockerignore leaves it out")
}

// InLines is the place in a file, of whose lines first to last an error is about.
func InLines(file string, data []byte, first, last int, msg string) (Place, bool) {
	return at(file, string(data), first, last, 0, msg)
}

// at finds the column, in the first of the lines that has the word that msg names.
func at(file, data string, first, last, char int, msg string) (Place, bool) {
	lines := strings.Split(data, "\n")
	if first < 1 || first > len(lines) {
		return Place{}, false
	}
	last = max(first, min(last, len(lines)))
	if char > 0 {
		return Place{file, first, char + 1, lines[first-1]}, true
	}
	var words []string
	for _, re := range []*regexp.Regexp{named, quoted} {
		for _, m := range re.FindAllStringSubmatch(msg, -1) {
			words = append(words, m[1])
		}
	}
	for _, w := range words {
		if !strings.Contains(data, w) {
			w = strings.TrimPrefix(w, "/") // paths are named from the context's root
		}
		for n := first; n <= last; n++ {
			if i := strings.Index(strings.ToLower(lines[n-1]), strings.ToLower(w)); i >= 0 && i <= len(lines[n-1]) {
				return Place{file, n, utf8.RuneCountInString(lines[n-1][:i]) + 1, lines[n-1]}, true
			}
		}
	}
	text := lines[first-1]
	return Place{file, first, utf8.RuneCountInString(text) - utf8.RuneCountInString(strings.TrimLeft(text, " \t")) + 1, text}, true
}
