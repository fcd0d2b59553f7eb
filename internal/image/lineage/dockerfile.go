package lineage

import (
	"slices"
	"strings"
)

// From finds by which name a Dockerfile's target (empty: the last stage) uses its base
// image. args are NAME=VALUE of --build-arg. It is empty where that is scratch, or can't
// be told.
func From(dockerfile, target string, args []string) string {
	vars := map[string]string{}
	stages := map[string]string{} // names and numbers of stages to what they stand on
	last, n := "", 0
	for _, line := range instructions(dockerfile) {
		f := strings.Fields(line)
		switch strings.ToUpper(f[0]) {
		case "ARG":
			if n > 0 {
				continue // of a stage
			}
			for _, a := range f[1:] {
				k, v, ok := strings.Cut(a, "=")
				if given := lookup(args, k); given != "" {
					vars[k] = given
				} else if ok {
					vars[k] = expand(strings.Trim(v, `"'`), vars)
				}
			}
		case "FROM":
			rest := slices.DeleteFunc(f[1:], func(s string) bool { return strings.HasPrefix(s, "--") })
			if len(rest) == 0 {
				continue
			}
			name := expand(rest[0], vars)
			if on, ok := stages[strings.ToLower(name)]; ok {
				name = on
			}
			last = name
			if len(rest) == 3 && strings.EqualFold(rest[1], "AS") {
				stages[strings.ToLower(rest[2])] = name
				if strings.EqualFold(rest[2], target) {
					return imageName(name)
				}
			}
			n++
		}
	}
	if target != "" {
		return ""
	}
	return imageName(last)
}

// imageName is "" for what is no image's name.
func imageName(name string) string {
	if name == "scratch" || strings.ContainsAny(name, "$ \t") {
		return ""
	}
	return name
}

func lookup(args []string, name string) string {
	for _, a := range args {
		if v, ok := strings.CutPrefix(a, name+"="); ok {
			return v
		}
	}
	return ""
}

// instructions are the lines that are neither comments nor empty, with those that go on
// joined.
func instructions(text string) (out []string) {
	line := ""
	for l := range strings.Lines(text) {
		l = strings.TrimSpace(l)
		if l == "" || strings.HasPrefix(l, "#") {
			continue
		}
		if rest, ok := strings.CutSuffix(l, `\`); ok {
			line += rest + " "
			continue
		}
		if line += l; strings.TrimSpace(line) != "" {
			out = append(out, line)
		}
		line = ""
	}
	return out
}

// expand puts in $NAME, ${NAME}, ${NAME:-DEFAULT}; what is not known stays.
func expand(s string, vars map[string]string) string {
	var b strings.Builder
	for {
		before, rest, ok := strings.Cut(s, "$")
		b.WriteString(before)
		if !ok {
			return b.String()
		}
		var name, def string
		if inner, ok := strings.CutPrefix(rest, "{"); ok {
			name, s, ok = strings.Cut(inner, "}")
			if !ok {
				return b.String() + "$"
			}
			name, def, _ = strings.Cut(name, ":-")
		} else {
			i := strings.IndexFunc(rest, func(r rune) bool {
				return !(r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z')
			})
			if i < 0 {
				i = len(rest)
			}
			name, s = rest[:i], rest[i:]
		}
		switch v := vars[name]; {
		case v != "":
			b.WriteString(v)
		case def != "":
			b.WriteString(def)
		default:
			b.WriteString("$")
		}
	}
}
