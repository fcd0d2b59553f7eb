package cli

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

// allCommands calls f for every verb of the tree.
func allCommands(root *cobra.Command, f func(*cobra.Command)) {
	for _, c := range root.Commands() {
		if c.Name() == "help" || strings.HasPrefix(c.Name(), "__") {
			continue
		}
		f(c)
		allCommands(c, f)
	}
}

func TestEveryVerbTeaches(t *testing.T) {
	a, _ := testApp(t)
	n := 0
	allCommands(a.root(nil), func(c *cobra.Command) {
		n++
		if c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: short description %q", c.CommandPath(), c.Short)
		}
		if !c.HasSubCommands() && !c.Hidden {
			if c.Example == "" {
				t.Errorf("%s has no example", c.CommandPath())
			}
			for line := range strings.Lines(c.Example) {
				if !strings.Contains(line, "tenon ") {
					t.Errorf("%s: example %q", c.CommandPath(), line)
				}
			}
		}
		var b bytes.Buffer
		writeHelp(&b, c, 80)
		if !strings.HasPrefix(b.String(), "Usage:  tenon ") {
			t.Errorf("%s: help begins with %.40q", c.CommandPath(), b.String())
		}
	})
	if n < 80 {
		t.Errorf("only %d verbs", n)
	}
}

func TestExamplesParse(t *testing.T) {
	a, _ := testApp(t)
	allCommands(a.root(nil), func(c *cobra.Command) {
		if c.HasSubCommands() || c.DisableFlagParsing {
			return
		}
		for line := range strings.Lines(c.Example) {
			i := strings.Index(line, c.CommandPath()+" ")
			if i < 0 {
				continue
			}
			rest := strings.Fields(strings.TrimSpace(line[i+len(c.CommandPath()):]))
			for j, w := range rest {
				if strings.ContainsAny(w, "|&;><$'\"(") {
					rest = rest[:j] // what belongs to the shell
					break
				}
			}
			fresh, _, err := a.root(nil).Find(strings.Fields(c.CommandPath())[1:])
			if err != nil {
				t.Fatal(err)
			}
			if err := fresh.ParseFlags(rest); err != nil && !strings.Contains(err.Error(), "needs an argument") {
				t.Errorf("%s: %v", line, err)
			}
		}
	})
}

func TestUnknownVerbs(t *testing.T) {
	for _, x := range []struct{ args, want string }{
		{"pss", "ps"},
		{"sotp", "stop"},
		{"imges", "images"},
		{"container strat", "start"},
		{"volume lss", "ls"},
		{"inspct x", "inspect"},
		{"help inspct", "inspect"},
	} {
		out, errOut, code := tenon(t, "unix:///nonexistent", "", strings.Fields(x.args)...)
		if code != 1 || out != "" || !strings.Contains(errOut, "Did you mean this?\n    "+x.want) {
			t.Errorf("%s: %d %q %q", x.args, code, out, errOut)
		}
	}
	if _, errOut, _ := tenon(t, "unix:///nonexistent", "", "xyzzy"); strings.Contains(errOut, "mean") {
		t.Errorf("a wild guess: %s", errOut)
	}
}

func TestMistakes(t *testing.T) {
	for _, x := range []struct {
		args string
		code int
		want string
	}{
		{"ps --nope", 125, "unknown flag: --nope"},
		{"rename a", 1, "'tenon rename' requires 2 arguments"},
		{"run", 1, "requires at least 1 argument"},
		{"run busybox", 125, "tenon: cannot connect to the Tenon daemon at unix:///nonexistent"},
		{"ps", 1, "Start it with"},
		{"--nope", 125, "unknown flag"},
		{"-H bad:x ps", 1, "daemon address"},
		{"network create --subnet x n", 1, "invalid subnet"},
		{"start -a a b", 1, "cannot start and attach multiple"},
		{"pull -a x:y", 1, "tag can't be used"},
	} {
		_, errOut, code := tenon(t, "unix:///nonexistent", "", strings.Fields(x.args)...)
		if !strings.Contains(errOut, x.want) || code != x.code {
			t.Errorf("%s: %d %q", x.args, code, errOut)
		}
	}
}

func TestVersionFlag(t *testing.T) {
	if out, _, code := tenon(t, "unix:///nonexistent", "", "--version"); out != "Tenon version test\n" || code != 0 {
		t.Errorf("got %q, %d", out, code)
	}
	out, _, code := tenon(t, "unix:///nonexistent", "", "version")
	if !strings.Contains(out, "Client: Tenon") || code != 1 {
		t.Errorf("without a daemon: %q, %d", out, code)
	}
}

func TestTimestamps(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	for _, x := range []struct{ in, want string }{
		{"10m", "1767322445.000000006"},
		{"1700000000", "1700000000"},
		{"1700000000.5", "1700000000.5"},
		{"2026-01-01T00:00:00Z", "1767225600.000000000"},
		{"2026-01-01T00:00:00.25+01:00", "1767222000.250000000"},
		{"2026-01-01", "1767225600.000000000"},
		{"2026-01-01T10:30", "1767263400.000000000"},
		{"yesterday", ""},
		{"", ""},
	} {
		got, err := parseTimestamp(x.in, now)
		if got != x.want || (err != nil) != (x.want == "") {
			t.Errorf("%s: got %q, %v; want %q", x.in, got, err, x.want)
		}
	}
}

func TestSafeWriter(t *testing.T) {
	var b bytes.Buffer
	w := &safeWriter{w: &b}
	for _, s := range []string{"plain\ttext\r\n", "\x1b[31mred\x07", "ü\xc3", "\xa4", "\xff\u009b", "\u202e!", "\xe2\x82"} {
		if n, err := w.Write([]byte(s)); n != len(s) || err != nil {
			t.Fatal(n, err)
		}
	}
	w.flush()
	want := "plain\ttext\n" + `\x1b[31mred\a` + "üä" + `\xff\u009b` + `\u202e!` + `\xe2\x82`
	if b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}

func FuzzSafeWriter(f *testing.F) {
	f.Add([]byte("a\x1b[0m\xc3"), 2)
	f.Fuzz(func(t *testing.T, in []byte, cut int) {
		var whole, parts bytes.Buffer
		w := &safeWriter{w: &whole}
		w.Write(in)
		w.flush()
		if cut < 0 || cut > len(in) {
			cut = len(in) / 2
		}
		w = &safeWriter{w: &parts}
		w.Write(in[:cut])
		w.Write(in[cut:])
		w.flush()
		for _, c := range whole.Bytes() {
			if c < ' ' && c != '\n' && c != '\t' || c == 0x7f {
				t.Fatalf("%q leaves %q", in, c)
			}
		}
		// Only a line end may be seen differently when it is cut.
		norm := func(b []byte) string { return strings.ReplaceAll(string(b), `\r`, "") }
		if norm(whole.Bytes()) != norm(parts.Bytes()) {
			t.Fatalf("%q cut at %d: %q and %q", in, cut, whole.Bytes(), parts.Bytes())
		}
	})
}

func TestNames(t *testing.T) {
	for _, x := range []struct{ ref, registry, canonical string }{
		{"busybox", dockerHub, "docker.io/library/busybox:latest"},
		{"team/web:2", dockerHub, "docker.io/team/web:2"},
		{"docker.io/busybox", dockerHub, "docker.io/library/busybox:latest"},
		{"localhost/web", "localhost", "localhost/web:latest"},
		{"reg:5000/web", "reg:5000", "reg:5000/web:latest"},
		{"reg.example.com/a/b@sha256:1", "reg.example.com", "reg.example.com/a/b@sha256:1"},
	} {
		if got := registryOf(x.ref); got != x.registry {
			t.Errorf("%s: registry %s", x.ref, got)
		}
		if got := canonicalName(x.ref); got != x.canonical {
			t.Errorf("%s: canonical %s", x.ref, got)
		}
	}
	if got := serverArg([]string{"https://reg.example.com/"}); got != "reg.example.com" {
		t.Errorf("server %s", got)
	}
}

func TestConfigFileKeepsTheRest(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	path := filepath.Join(dir, "config.json")
	if err := os.WriteFile(path, []byte(`{"psFormat":"{{.ID}}","auths":{"a":{"auth":"eDp5"}},"proxies":{"x":1}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	a, out := testApp(t)
	t.Setenv("DOCKER_CONFIG", dir)
	c, err := a.loadConfig()
	if err != nil {
		t.Fatal(err)
	}
	auth, err := c.get(t.Context(), "a")
	if err != nil || auth.Username != "x" || auth.Password != "y" {
		t.Errorf("got %+v, %v", auth, err)
	}
	auth.Username, auth.Password = "me", "p:w"
	if err := c.put(t.Context(), "reg:5000", auth, out); err != nil {
		t.Fatal(err)
	}
	if c, err = a.loadConfig(); err != nil {
		t.Fatal(err)
	}
	if auth, err = c.get(t.Context(), "reg:5000"); err != nil || auth.Username != "me" || auth.Password != "p:w" {
		t.Errorf("got %+v, %v", auth, err)
	}
	b, _ := os.ReadFile(path)
	for _, want := range []string{`"psFormat"`, `"proxies"`, `"a"`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s is gone: %s", want, b)
		}
	}
	if fi, _ := os.Stat(path); fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", fi.Mode())
	}
	if a.configFormat("psFormat") != "{{.ID}}" {
		t.Error("psFormat is not found")
	}
}

func TestCompletionScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		out, errOut, code := tenon(t, "unix:///nonexistent", "", "completion", shell)
		if code != 0 || !strings.Contains(out, "__complete") {
			t.Errorf("%s: %d %s", shell, code, errOut)
		}
		if shell == "bash" {
			cmd := exec.Command("bash", "-n")
			cmd.Stdin = strings.NewReader(out)
			if b, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, b)
			}
		}
	}
	if _, _, code := tenon(t, "unix:///nonexistent", "", "completion", "tcsh"); code != 1 {
		t.Errorf("tcsh: %d", code)
	}
}

// TestImports keeps the daemon out of the command, and what costs time at its
// start.
func TestImports(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", "tenon.dev/tenon/cmd/tenon")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	b, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	allowed := map[string]bool{
		"tenon.dev/tenon/cmd/tenon": true, "tenon.dev/tenon/internal/cli": true, "tenon.dev/tenon/internal/cli/quick": true, "tenon.dev/tenon/internal/version": true,
		"tenon.dev/tenon/client": true, "tenon.dev/tenon/client/machineapi": true, "tenon.dev/tenon/client/runproto": true,
		"tenon.dev/tenon/client/imageapi": true, "tenon.dev/tenon/client/registryapi": true, "tenon.dev/tenon/internal/cli/buildopts": true,
		"tenon.dev/tenon/internal/image/signature": true, "tenon.dev/tenon/internal/image/crypt/keyfile": true,
	}
	for _, dep := range strings.Fields(string(b)) {
		if strings.HasPrefix(dep, "tenon.dev/tenon") && !allowed[dep] {
			t.Errorf("the command imports %s", dep)
		}
		for _, bad := range []string{"go.opentelemetry.io", "google.golang.org", "github.com/docker/cli", "github.com/moby/moby/client", "github.com/containerd/containerd"} {
			if strings.HasPrefix(dep, bad) {
				t.Errorf("the command imports %s", dep)
			}
		}
	}
}
