package image

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// aptSource is an archive of apt's configuration.
type aptSource struct {
	uri, suite string
	components []string
	options    []string // signed-by=…, trusted=…
}

func (a aptSource) String() string {
	line := "deb "
	if len(a.options) > 0 {
		line += "[" + strings.Join(a.options, " ") + "] "
	}
	return line + strings.Join(append([]string{a.uri, a.suite}, a.components...), " ")
}

// aptSources are the lines of a sources.list for a suite: of mirror, or else of those
// archives that the configuration in dir has for it. If it has none, the archives of
// the host's own release are taken.
func aptSources(dir, suite, host, mirror string) (string, error) {
	if mirror != "" {
		u, err := url.Parse(mirror)
		if err != nil || !slices.Contains([]string{"http", "https", "file", "copy"}, u.Scheme) || strings.ContainsAny(mirror, " \t\n[]") {
			return "", fmt.Errorf("not the URL of a mirror: %.200q: %w", mirror, errdefs.ErrInvalidArgument)
		}
		if u.User != nil {
			return "", errCredentials
		}
		return aptSource{uri: mirror, suite: suite, components: []string{"main"}, options: aptKeyring()}.String() + "\n", nil
	}
	all, err := readAPT(dir)
	if err != nil {
		return "", err
	}
	var lines []string
	add := func(a aptSource) {
		if l := a.String(); !slices.Contains(lines, l) {
			lines = append(lines, l)
		}
	}
	for _, a := range all {
		if base, _, _ := strings.Cut(a.suite, "/"); base == suite || base == suite+"-updates" || base == suite+"-security" {
			add(a)
		}
	}
	if len(lines) == 0 {
		for _, a := range all {
			if a.suite == host {
				a.suite = suite
				add(a)
			}
		}
	}
	if len(lines) == 0 {
		return "", fmt.Errorf("apt's configuration in %s has no archive of %s: give one by --mirror: %w", dir, suite, errdefs.ErrFailedPrecondition)
	}
	for _, l := range lines {
		for _, f := range strings.Fields(l) {
			if u, err := url.Parse(f); err == nil && u.User != nil {
				return "", errCredentials
			}
		}
	}
	return strings.Join(lines, "\n") + "\n", nil
}

var errCredentials = fmt.Errorf("an archive's URL has credentials in it, which would be in the image: put them into a file of /etc/apt/auth.conf.d: %w", errdefs.ErrInvalidArgument)

// aptKeyring names the distribution's keys, if they are where its package has them.
func aptKeyring() []string {
	const path = "/usr/share/keyrings/debian-archive-keyring.gpg"
	if _, err := os.Stat(path); err != nil {
		return nil
	}
	return []string{"signed-by=" + path}
}

// readAPT reads sources.list and sources.list.d below dir.
func readAPT(dir string) ([]aptSource, error) {
	files, err := filepath.Glob(filepath.Join(dir, "sources.list.d", "*"))
	if err != nil {
		return nil, err
	}
	var all []aptSource
	for _, f := range append([]string{filepath.Join(dir, "sources.list")}, files...) {
		b, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		switch filepath.Ext(f) {
		case ".list":
			all = append(all, parseList(string(b))...)
		case ".sources":
			all = append(all, parseSources(string(b))...)
		}
	}
	return all, nil
}

// parseList reads apt's one-line format.
func parseList(text string) (all []aptSource) {
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb")
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '\t' {
			continue
		}
		var a aptSource
		rest = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "[") {
			opts, after, ok := strings.Cut(rest[1:], "]")
			if !ok {
				continue
			}
			for _, o := range strings.Fields(opts) {
				k, v, _ := strings.Cut(o, "=")
				a.option(k, v)
			}
			rest = after
		}
		if f := strings.Fields(rest); len(f) >= 2 {
			a.uri, a.suite, a.components = f[0], f[1], f[2:]
			all = append(all, a)
		}
	}
	return all
}

// option keeps those that matter for another root directory.
func (a *aptSource) option(k, v string) {
	switch k = strings.ToLower(k); {
	case k == "signed-by" && strings.HasPrefix(v, "/") && !strings.ContainsAny(v, " ,"), k == "trusted" && v == "yes", k == "check-valid-until" && v == "no":
		a.options = append(a.options, k+"="+v)
	}
}

// parseSources reads apt's format of paragraphs.
func parseSources(text string) (all []aptSource) {
	for _, para := range strings.Split(strings.ReplaceAll(text, "\r", ""), "\n\n") {
		f, last := map[string]string{}, ""
		for line := range strings.Lines(para) {
			if strings.HasPrefix(line, "#") {
				continue
			}
			if line[0] == ' ' || line[0] == '\t' {
				f[last] += " " + strings.TrimSpace(line)
				continue
			}
			if k, v, ok := strings.Cut(line, ":"); ok {
				last = strings.ToLower(k)
				f[last] = strings.TrimSpace(v)
			}
		}
		if !slices.Contains(strings.Fields(f["types"]), "deb") || strings.EqualFold(f["enabled"], "no") {
			continue
		}
		for _, uri := range strings.Fields(f["uris"]) {
			for _, suite := range strings.Fields(f["suites"]) {
				a := aptSource{uri: uri, suite: suite, components: strings.Fields(f["components"])}
				for _, k := range []string{"signed-by", "trusted", "check-valid-until"} {
					a.option(k, f[k])
				}
				all = append(all, a)
			}
		}
	}
	return all
}
