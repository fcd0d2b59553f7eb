package audit

import (
	"bytes"
	"regexp"
	"strings"
	"sync"
)

// pattern is a kind of secret that can be told by its form.
type pattern struct {
	what string
	// anchors are bytes of which one is in every match: what has none is not searched.
	anchors []string
	expr    string
	re      *regexp.Regexp
	// not says that a match is an example.
	not func(string) bool
}

// patterns are compiled when the first is needed: whoever links this package and audits
// nothing pays nothing.
var patterns = sync.OnceValue(func() []*pattern {
	list := []*pattern{
		{what: "private key", anchors: []string{" PRIVATE KEY-----"}, expr: `-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?:\\r|\\n|\s)+(?:[A-Za-z-]+: [^\n]{0,100}\n\s*)*[A-Za-z0-9+/]{40,}`},
		{what: "AWS access key", anchors: []string{"AKIA", "ASIA"}, expr: `\b(?:AKIA|ASIA)[A-Z2-7]{16}\b`, not: example},
		{what: "AWS secret key", anchors: []string{"aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"}, expr: `(?i)aws_secret_access_key["']?\s{0,4}[=:]\s{0,4}["']?[A-Za-z0-9/+]{40}`, not: example},
		{what: "GitHub token", anchors: []string{"ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"}, expr: `\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{50,255})\b`, not: example},
		{what: "GitLab token", anchors: []string{"glpat-"}, expr: `\bglpat-[A-Za-z0-9_-]{20,100}`, not: example},
		{what: "Slack token", anchors: []string{"xoxb-", "xoxp-", "xoxa-", "xoxs-", "xoxr-"}, expr: `\bxox[abprs]-[0-9]{6,}-[A-Za-z0-9-]{16,}`, not: example},
		{what: "Google API key", anchors: []string{"AIza"}, expr: `\bAIza[0-9A-Za-z_-]{35}\b`, not: example},
		{what: "npm token", anchors: []string{"npm_"}, expr: `\bnpm_[A-Za-z0-9]{36}\b`, not: example},
		{what: "PyPI token", anchors: []string{"pypi-AgEI"}, expr: `\bpypi-AgEI[A-Za-z0-9_-]{50,}`},
		{what: "Stripe key", anchors: []string{"_live_"}, expr: `\b[sr]k_live_[A-Za-z0-9]{20,}`, not: example},
		{what: "password in a URL", anchors: []string{"://"}, expr: `\b(?:https?|ftp|postgres|postgresql|mysql|mongodb|redis|amqp)://[A-Za-z0-9._%+-]{1,64}:[^\s:/@"'<>$%{}()*\\]{6,64}@[A-Za-z0-9]`, not: example},
		{what: "registry credentials", anchors: []string{`"auths"`}, expr: `"auth"\s*:\s*"[A-Za-z0-9+/]{8,}={0,2}"`},
	}
	for _, p := range list {
		p.re = regexp.MustCompile(p.expr)
	}
	return list
})

func example(s string) bool {
	u := strings.ToUpper(s)
	for _, w := range []string{"EXAMPLE", "XXXX", "CHANGEME", "PASSWORD@", "USERNAME:", "USER:PASS", ":SECRET@", "FOO:BAR", "0000000000", "1234567890"} {
		if strings.Contains(u, w) {
			return true
		}
	}
	return false
}

// Secret is something found that looks like one.
type Secret struct {
	What string // "private key"
	// Shown is its beginning, never the whole.
	Shown string
}

// Secrets finds what looks like a secret in text, at most one of each kind. What it
// takes is linear in len(text).
func Secrets(text []byte) (out []Secret) {
	for _, p := range patterns() {
		if !p.maybe(text) {
			continue
		}
		for n, m := range p.re.FindAll(text, 32) {
			if p.not != nil && p.not(string(m)) && n < 31 {
				continue
			}
			if p.not == nil || !p.not(string(m)) {
				out = append(out, Secret{p.what, mask(string(m))})
			}
			break
		}
	}
	return out
}

func (p *pattern) maybe(text []byte) bool {
	for _, a := range p.anchors {
		if bytes.Contains(text, []byte(a)) {
			return true
		}
	}
	return false
}

// mask shows of a secret what helps to find it.
func mask(s string) string {
	if i := strings.IndexAny(s, "\r\n\\"); i > 0 {
		s = s[:i]
		if strings.HasPrefix(s, "-----BEGIN") {
			return s
		}
	}
	if scheme, rest, ok := strings.Cut(s, "://"); ok {
		user, _, _ := strings.Cut(rest, ":")
		return scheme + "://" + user + ":…"
	}
	if name, _, ok := strings.Cut(s, "="); ok && len(name) < 40 {
		return strings.TrimSpace(name) + "=…"
	}
	if name, _, ok := strings.Cut(s, ":"); ok && len(name) < 40 {
		return strings.TrimSpace(name) + ": …"
	}
	return s[:min(8, len(s)/2)] + "…"
}

var secretWords = []string{"PASSWORD", "PASSWD", "SECRET", "TOKEN", "APIKEY", "API_KEY", "PRIVATE_KEY", "ACCESS_KEY", "CREDENTIAL"}

// SecretVariable tells whether a variable looks as if its value were a secret. Names
// that say where a secret is (…_FILE, …_PATH) and empty values do not.
func SecretVariable(name, value string) bool {
	if value == "" {
		return false
	}
	u := strings.ToUpper(name)
	for _, end := range []string{"_FILE", "_PATH", "_DIR", "_URL", "_NAME", "_ID", "_TTL", "_EXPIRY", "_LENGTH", "_ALGORITHM", "_HEADER"} {
		if strings.HasSuffix(u, end) {
			return len(Secrets([]byte(value))) > 0
		}
	}
	for _, w := range secretWords {
		if strings.Contains(u, w) {
			return !plain(value)
		}
	}
	if u == "PASS" || strings.HasSuffix(u, "_PASS") {
		return !plain(value)
	}
	return len(Secrets([]byte(value))) > 0
}

// plain are values that are switches, not secrets.
func plain(v string) bool {
	switch strings.ToLower(v) {
	case "true", "false", "yes", "no", "on", "off", "0", "1", "none", "null":
		return true
	}
	return strings.HasPrefix(v, "/run/secrets/")
}
