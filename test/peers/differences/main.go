// Program differences asks two engines the same and shows what they answer
// differently: test/peers/differences.sh runs it, by hand.
//
//	differences run CASES OUT     run each line of CASES by bash, write what it said
//	differences flat              JSON of standard input as sorted lines "path = value"
//	differences api METHOD PATH [BODY]   one request to $DOCKER_HOST: status, kind and answer
//	differences compare A B       the cases that differ, ids and times made alike
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"
)

func main() {
	err := errors.New("usage: differences run CASES OUT | flat | api METHOD PATH [BODY] | compare A B")
	switch {
	case len(os.Args) == 4 && os.Args[1] == "run":
		err = run(os.Args[2], os.Args[3])
	case (len(os.Args) == 4 || len(os.Args) == 5) && os.Args[1] == "api":
		err = api(os.Args[2], os.Args[3], strings.Join(os.Args[4:], ""))
	case len(os.Args) == 2 && os.Args[1] == "flat":
		err = flat()
	case len(os.Args) == 4 && os.Args[1] == "compare":
		err = compare(os.Args[2], os.Args[3])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "differences:", err)
		os.Exit(1)
	}
}

// answer is what one case said.
type answer struct{ Case, Out, Err, Exit string }

func run(cases, out string) error {
	raw, err := os.ReadFile(cases)
	if err != nil {
		return err
	}
	var all []answer
	for line := range strings.Lines(string(raw)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		all = append(all, ask(line))
	}
	js, err := json.Marshal(all)
	if err != nil {
		return err
	}
	return os.WriteFile(out, js, 0o644)
}

func ask(line string) answer {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", line)
	cmd.WaitDelay = time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	exit := "0"
	if err := cmd.Run(); err != nil {
		exit = err.Error()
	}
	return answer{line, out.String(), errs.String(), exit}
}

func api(method, path, body string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimPrefix(os.Getenv("DOCKER_HOST"), "unix://"))
	}}}
	q, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	if body != "" {
		q.Header.Set("Content-Type", "application/json")
	}
	r, err := c.Do(q)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	fmt.Println("#", r.StatusCode, r.Header.Get("Content-Type"))
	raw, err := io.ReadAll(r.Body)
	if json.Valid(raw) {
		return errors.Join(err, flatten(bytes.NewReader(raw)))
	}
	fmt.Printf("%.500q\n", raw)
	return err
}

func flat() error { return flatten(bufio.NewReader(os.Stdin)) }

func flatten(r io.Reader) error {
	d := json.NewDecoder(r)
	d.UseNumber()
	for d.More() {
		var v any
		if err := d.Decode(&v); err != nil {
			return err
		}
		walk("", v)
	}
	return nil
}

func walk(path string, v any) {
	switch v := v.(type) {
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for _, k := range keys {
			walk(path+"."+k, v[k])
		}
		if len(v) == 0 {
			fmt.Println(path, "= {}")
		}
	case []any:
		for _, e := range v {
			walk(path+"[]", e)
		}
		if len(v) == 0 {
			fmt.Println(path, "= []")
		}
	default:
		js, _ := json.Marshal(v) // came from JSON
		fmt.Println(path, "=", string(js))
	}
}

// alike makes equal what has to differ from run to run and host to host.
var alike = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), "ID"},
	{regexp.MustCompile(`\b[0-9a-f]{12}\b`), "ID12"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( ?[+-]\d\d:?\d\d| UTC|Z)*`), "TIME"},
	{regexp.MustCompile(`\b(\d+|Less than a|About an?|About a) (seconds?|minutes?|hours?|days?|weeks?|months?)( ago)?\b`), "AGO"},
	{regexp.MustCompile(`\b\d+(\.\d+){3}(/\d+)?\b`), "IP"},
	{regexp.MustCompile(`\b([0-9a-f]{2}:){5}[0-9a-f]{2}\b`), "MAC"},
	{regexp.MustCompile(`\b\d+(\.\d+)?(e[+-]?\d+)?[kMG]?B\b`), "SIZE"}, // images are counted as Docker up to 28 does
	{regexp.MustCompile(`\b[A-Z][a-z]{2} [ \d]\d \d\d:\d\d\b`), "CLOCK"},
	{regexp.MustCompile(`[ \t]+`), " "},
	{regexp.MustCompile(`/state/(docker|tenon)|/run/(docker|tenon)\b`), "/ROOT"},
}

//go:embed allowed.txt
var allowedText string

// allowed are the lines of answers that may differ.
func allowed() *regexp.Regexp {
	var all []string
	for line := range strings.Lines(allowedText) {
		if why, re, ok := strings.Cut(strings.TrimSpace(line), " "); ok && why != "#" {
			all = append(all, strings.TrimSpace(re))
		}
	}
	return regexp.MustCompile(strings.Join(all, "|"))
}

var mayDiffer = allowed()

func normal(s string) string {
	for _, a := range alike {
		s = a.re.ReplaceAllString(s, a.with)
	}
	return s
}

func compare(a, b string) error {
	var as, bs []answer
	for path, into := range map[string]*[]answer{a: &as, b: &bs} {
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(raw, into); err != nil {
			return err
		}
	}
	same, worded := 0, 0
	for k := range min(len(as), len(bs)) {
		x, y := as[k], bs[k]
		if e := words(&x, &y); e {
			worded++
		}
		if d := cmp.Or(lines("", x.Out, y.Out)+lines("stderr ", x.Err, y.Err), "") + lines("exit ", x.Exit, y.Exit); d != "" {
			fmt.Printf("@@ %s\n%s", x.Case, d)
		} else {
			same++
		}
	}
	fmt.Printf("%d of %d alike, in %d of them errors are said in other words\n", same, len(as), worded)
	return nil
}

// said are lines that tell an error.
var said = regexp.MustCompile(`(?m)^(docker: )?(Error|invalid|OCI runtime|unable to|failed to|tag does not|image with reference|push |unexpected EOF|Run 'docker|Unable to find).*\n?`)

// words takes the errors out of what both answered, if both have as many: that they
// are errors, with which status, is compared, and not their words.
func words(x, y *answer) (other bool) {
	var texts [2][]string
	for k, a := range []*answer{x, y} {
		texts[k] = said.FindAllString(normal(a.Err)+"\n"+normal(a.Out), -1)
	}
	if len(texts[0]) == 0 || len(texts[0]) != len(texts[1]) && (x.Exit == "0" || x.Exit != y.Exit) {
		return false
	}
	for _, a := range []*answer{x, y} {
		a.Err, a.Out = said.ReplaceAllString(a.Err, ""), said.ReplaceAllString(a.Out, "")
	}
	return !slices.Equal(texts[0], texts[1])
}

// lines is what a says and b doesn't, and the other way round.
func lines(what, a, b string) string {
	as, bs := strings.Split(strings.TrimSpace(normal(a)), "\n"), strings.Split(strings.TrimSpace(normal(b)), "\n")
	if slices.Equal(as, bs) {
		return ""
	}
	var out strings.Builder
	moved := true
	left := slices.Clone(bs)
	for _, l := range as {
		if k := slices.Index(left, l); k >= 0 {
			left = slices.Delete(left, k, k+1)
			continue
		}
		moved = false
		if !mayDiffer.MatchString(l) {
			fmt.Fprintf(&out, "  -%s%s\n", what, l)
		}
	}
	for _, l := range left {
		if moved = false; mayDiffer.MatchString(l) {
			continue
		}
		fmt.Fprintf(&out, "  +%s%s\n", what, l)
	}
	if moved {
		fmt.Fprintf(&out, "  ~%sother order\n", what)
	}
	return out.String()
}
