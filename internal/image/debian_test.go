package image

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestAptSources(t *testing.T) {
	dir := t.TempDir()
	put := func(name, data string) {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("sources.list", "# none\ndeb [arch=amd64 signed-by=/k.gpg] http://a.test/x old main contrib # why\ndeb-src http://a.test/x old main\ndeb\n")
	put("sources.list.d/b.sources", "Types: deb deb-src\n# a comment\nURIs: http://b.test/y\nSuites: new new-updates\nComponents: main\nSigned-By: /k.gpg\n\nTypes: deb\nEnabled: no\nURIs: http://no.test\nSuites: new\n\nTypes: deb\nURIs: http://s.test/z\nSuites: new-security\nComponents: main\nSigned-By:\n -----BEGIN PGP\n .\n")
	put("sources.list.d/c.save", "deb http://no.test new main\n")
	for _, c := range []struct{ suite, mirror, want string }{
		{"new", "", "deb [signed-by=/k.gpg] http://b.test/y new main\ndeb [signed-by=/k.gpg] http://b.test/y new-updates main\ndeb http://s.test/z new-security main\n"},
		{"old", "", "deb [signed-by=/k.gpg] http://a.test/x old main contrib\n"},
		{"other", "", "deb [signed-by=/k.gpg] http://b.test/y other main\n"},
	} {
		got, err := aptSources(dir, c.suite, "new", c.mirror)
		if err != nil || got != c.want {
			t.Errorf("%s: %v\n%s\nwant\n%s", c.suite, err, got, c.want)
		}
	}
	if got, err := aptSources(dir, "new", "new", "https://m.test/d"); err != nil || !strings.HasSuffix(got, " https://m.test/d new main\n") {
		t.Errorf("mirror: %q %v", got, err)
	}
	for _, bad := range []string{"ssh://x", "http://u:p@x/", "http://x y", "nothing"} {
		if _, err := aptSources(dir, "new", "new", bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if _, err := aptSources(dir, "x", "y", ""); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("no archive: %v", err)
	}
	put("sources.list", "deb http://u:p@a.test/x old main\n")
	if _, err := aptSources(dir, "old", "new", ""); !errors.Is(err, errCredentials) {
		t.Errorf("credentials: %v", err)
	}
}

func TestDebianOptions(t *testing.T) {
	for _, bad := range []DebianOptions{
		{Suite: ""}, {Suite: "-x"}, {Suite: "a b"}, {Suite: "a;b"}, {Suite: "../x"},
		{Suite: "x", Include: []string{"--hook"}}, {Suite: "x", Include: []string{"a,b"}}, {Suite: "x", Include: []string{"/tmp/a.deb"}}, {Suite: "x", Include: []string{""}},
	} {
		if err := bad.check(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if err := (DebianOptions{Suite: "bookworm-backports", Include: []string{"g++", "libc6:amd64", "nginx=1.2~x"}}).check(); err != nil {
		t.Error(err)
	}
}

const someRelease = "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nOrigin: Debian\nSuite: oldstable\nVersion: 12.15\nCodename: bookworm\nDate: Sat, 11 Jul 2026 10:16:37 UTC\nSHA256:\n x 1 main\n"

func TestParseRelease(t *testing.T) {
	r, err := parseRelease([]byte(someRelease))
	if err != nil || r.Suite != "oldstable" || r.Codename != "bookworm" || !r.Date.Equal(time.Date(2026, 7, 11, 10, 16, 37, 0, time.UTC)) || !strings.HasPrefix(r.Digest, "sha256:") {
		t.Errorf("%+v %v", r, err)
	}
	if got := releaseURI("a.test_x_dists_new_InRelease", "deb http://a.test/x new main\n"); got != "http://a.test/x" {
		t.Errorf("uri %q", got)
	}
	if _, err := parseRelease([]byte("Suite: x\n")); err == nil {
		t.Error("one without a date was taken")
	}
}

func FuzzAptSources(f *testing.F) {
	f.Add("deb [a=b] http://a.test/x old main\n")
	f.Add("Types: deb\nURIs: a\n b\nSuites: x\n")
	f.Add(someRelease)
	f.Fuzz(func(t *testing.T, text string) {
		for _, a := range append(parseList(text), parseSources(text)...) {
			if strings.Contains(a.String(), "\n") {
				t.Errorf("%q", a.String())
			}
		}
		_, _ = parseRelease([]byte(text))
	})
}

// What apt says is told in a sentence; none of its own is lost.
func TestAptErrors(t *testing.T) {
	failed := errors.New("exit status 25")
	for said, want := range map[string]string{
		"Reading package lists...\nE: Unable to locate package no-such\nE: setup failed: E: apt-get -o x failed":                                                                     "the archives have no package no-such: not found",
		"E: The repository 'http://a.test/debian nosuch Release' does not have a Release file.":                                                                                      "the archive http://a.test/debian has no release nosuch: not found",
		"E: Failed to fetch http://a.test/dists/x/InRelease  Could not connect to a.test:80 (1.2.3.4). - connect (111: Connection refused)\nE: Some index files failed to download.": "http://a.test/dists/x/InRelease: Could not connect to a.test:80 (1.2.3.4). - connect (111: Connection refused): unavailable",
		"W: x\nE: something new\nE: setup failed": "mmdebstrap: exit status 25: E: something new; E: setup failed",
		"only this": "mmdebstrap: exit status 25: only this",
		"":          "mmdebstrap: exit status 25",
	} {
		lines := strings.FieldsFunc(said, func(r rune) bool { return r == '\n' })
		if got := aptError("mmdebstrap", failed, lines).Error(); got != want {
			t.Errorf("%q: %q, want %q", said, got, want)
		}
	}
}

// A base that can't be made says why, and leaves nothing half made.
func TestBootstrapDebianFails(t *testing.T) {
	s := open(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, c := range []struct {
		o    DebianOptions
		path string
		is   func(error) bool
		says string
	}{
		{DebianOptions{Suite: "bookworm"}, t.TempDir(), errdefs.IsNotFound, "install Debian's package mmdebstrap"},
		{DebianOptions{Suite: "bookworm", Mirror: "file:///nowhere"}, os.Getenv("PATH"), func(err error) bool { return err != nil }, "/nowhere"},
		{DebianOptions{Suite: "../etc"}, os.Getenv("PATH"), errdefs.IsInvalidArgument, "not the name of a release"},
		{DebianOptions{Suite: "bookworm", Include: []string{"x y"}}, os.Getenv("PATH"), errdefs.IsInvalidArgument, "not the name of a package"},
	} {
		t.Setenv("PATH", c.path)
		if _, err := s.BootstrapDebian(ctx, c.o); !c.is(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: %v", c.o, err)
		}
	}
	if list, err := s.All(ctx); err != nil || len(list) > 0 {
		t.Errorf("images: %v %v", list, err)
	}
	if left, err := os.ReadDir(s.ingestDir()); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}
