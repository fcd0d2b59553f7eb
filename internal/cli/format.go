package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
	"text/tabwriter"
	"text/template"
	"unicode/utf8"
)

// A listing prints rows as a table, as JSON lines or by a Go template.
//
// A row is a struct (or a pointer to one) whose exported methods without
// arguments are the fields a template can name: {{.ID}}. JSON shows the values
// of all of them.
type listing struct {
	// table is the template of the table, columns separated by tabs.
	table string
	// headers gives the title of each field.
	headers headers
}

// headers is the "row" that the table's first line is made of.
type headers map[string]string

// Label is the header of {{.Label "name"}}.
func (headers) Label(name string) string {
	parts := strings.Split(name, ".")
	return strings.NewReplacer("-", " ", "_", " ").Replace(parts[len(parts)-1])
}

// templateFuncs are Docker's functions for --format.
func templateFuncs() template.FuncMap {
	return template.FuncMap{
		"json": func(v any) (string, error) {
			var b bytes.Buffer
			enc := json.NewEncoder(&b)
			enc.SetEscapeHTML(false)
			v, err := jsonValue(v)
			if err != nil {
				return "", err
			}
			if err := enc.Encode(v); err != nil {
				return "", err
			}
			return strings.TrimSpace(b.String()), nil
		},
		"split": strings.Split,
		"join":  joinAny,
		"title": func(s string) string {
			if s == "" {
				return s
			}
			return strings.ToUpper(s[:1]) + s[1:]
		},
		"lower": strings.ToLower,
		"upper": strings.ToUpper,
		"pad": func(s string, before, after int) string {
			if s == "" {
				return s
			}
			return strings.Repeat(" ", before) + s + strings.Repeat(" ", after)
		},
		"truncate": func(s string, n int) string { return truncate(s, n) },
		"println":  fmt.Sprintln,
	}
}

// joinAny is strings.Join that also takes the []any of decoded JSON.
func joinAny(list any, sep string) (string, error) {
	switch l := list.(type) {
	case []string:
		return strings.Join(l, sep), nil
	case []any:
		var out []string
		for _, v := range l {
			out = append(out, fmt.Sprint(v))
		}
		return strings.Join(out, sep), nil
	}
	return "", fmt.Errorf("join: %T is not a list", list)
}

// truncate cuts s to at most n characters.
func truncate(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	return string([]rune(s)[:n])
}

// ellipsis cuts s to at most n characters, the last of which is then "…".
func ellipsis(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	return string([]rune(s)[:n-1]) + "…"
}

// parseTemplate compiles a --format text.
func parseTemplate(text string) (*template.Template, error) {
	text = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(text)
	t, err := template.New("").Funcs(templateFuncs()).Option("missingkey=error").Parse(text)
	if err != nil {
		return nil, &exitError{64, fmt.Errorf("template parsing error: %w", err)}
	}
	return t, nil
}

// print writes rows in the given --format: "" or "table", "table TEMPLATE",
// "json", or a template.
func (l listing) print(w io.Writer, format string, rows []any) error {
	text, isTable := l.table, true
	switch {
	case format == "" || format == "table":
	case format == "json":
		text, isTable = "{{json .}}", false
	case strings.HasPrefix(format, "table ") || strings.HasPrefix(format, `table\t`):
		text = strings.TrimSpace(strings.TrimPrefix(strings.TrimPrefix(format, "table"), `\t`))
	default:
		text, isTable = format, false
	}
	t, err := parseTemplate(text)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	out := io.Writer(&b)
	var tw *tabwriter.Writer
	if isTable {
		tw = tabwriter.NewWriter(&b, 10, 1, 3, ' ', 0)
		out = tw
		if err := l.header(tw, text); err != nil {
			return err
		}
	}
	for _, r := range rows {
		if err := t.Execute(out, r); err != nil {
			return fmt.Errorf("template parsing error: %w", err)
		}
		fmt.Fprintln(out)
	}
	if tw != nil {
		_ = tw.Flush() // writes to memory
	}
	return writeText(w, b.Bytes())
}

// writeText writes text that names, labels and messages of others are part of:
// on a terminal it cannot command the terminal.
func writeText(w io.Writer, text []byte) error {
	if _, is := terminal(w); is {
		s := &safeWriter{w: w}
		defer s.flush()
		_, err := s.Write(text)
		return err
	}
	_, err := w.Write(text)
	return err
}

// header writes the line of titles: the table's own template over the titles,
// with functions that leave their text as it is.
func (l listing) header(w io.Writer, text string) error {
	text = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(text)
	fs := templateFuncs()
	same := func(s string, _ ...any) string { return s }
	for _, name := range []string{"json", "title", "lower", "upper", "truncate", "split", "join"} {
		fs[name] = same
	}
	t, err := template.New("").Funcs(fs).Parse(text)
	if err != nil {
		return err
	}
	if err := t.Execute(w, l.headers); err != nil {
		return fmt.Errorf("template parsing error: %w", err)
	}
	_, err = fmt.Fprintln(w)
	return err
}

// jsonValue turns a row into the JSON of what its methods return, escaped as
// Docker escapes it; other values stay as they are.
func jsonValue(v any) (any, error) {
	r, ok := v.(row)
	if !ok {
		return v, nil
	}
	out := map[string]any{}
	rv := reflect.ValueOf(r)
	for i := range rv.NumMethod() {
		m := rv.Type().Method(i)
		if m.Type.NumIn() == 1 && m.Type.NumOut() == 1 && m.Name != "String" && m.Name != "IsRow" {
			out[m.Name] = rv.Method(i).Call(nil)[0].Interface()
		}
	}
	b, err := json.Marshal(out)
	return json.RawMessage(b), err
}

// row marks the structs that jsonValue turns into maps.
type row interface{ IsRow() }

// isRow is embedded in rows.
type isRow struct{}

// IsRow marks the struct that embeds it as a row of a listing.
func (isRow) IsRow() {}

// labelList renders labels as Docker does: k=v, sorted, comma-separated.
func labelList(m map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, k+"="+m[k])
	}
	return strings.Join(out, ",")
}

// shortID cuts an ID to 12 digits, without its algorithm, unless full is set.
func shortID(id string, full bool) string {
	if full {
		return id
	}
	if _, hex, ok := strings.Cut(id, ":"); ok {
		id = hex
	}
	return truncate(id, 12)
}

const formatUsage = `Format output using a custom template:
'table':            Print output in table format with column headers (default)
'table TEMPLATE':   Print output in table format using the given Go template
'json':             Print in JSON format
'TEMPLATE':         Print output using the given Go template.`

const inspectFormatUsage = `Format output using a custom template:
'json':             Print in JSON format
'TEMPLATE':         Print output using the given Go template.`
