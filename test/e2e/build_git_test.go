package e2e

import (
	"net/http/cgi"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Git contexts are fetched in the jail of the daemon's program, by every client, and what
// is built from them is built again, from what the branch has now or at its commit.
func TestBuildFromGit(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	core, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	srv := httptest.NewServer(&cgi.Handler{Path: filepath.Join(strings.TrimSpace(string(core)), "git-http-backend"), Env: []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1"}})
	defer srv.Close()
	sh := func(script string) string {
		t.Helper()
		r := d.Sh(t, `export HOME=$1 GIT_CONFIG_NOSYSTEM=1 DOCKER_CONFIG=$1/config; cd "$1" && git config --global user.name t && git config --global user.email t@example.invalid && `+script, dir)
		if r.Code != 0 {
			t.Fatalf("%s: %d\n%s%s", script, r.Code, r.Out, r.Err)
		}
		return r.Out
	}
	commit := func(v string) string {
		return strings.TrimSpace(sh(`mkdir -p app/sub && cd app && git init -q -b main && printf 'FROM busybox\nCOPY v /v\nRUN stat -c %u /v >/owner\n' >sub/Dockerfile && echo ` + v + ` >sub/v && git add . && git commit -q -m ` + v + ` && git rev-parse HEAD`))
	}
	url := srv.URL + "/app/.git#main:sub"
	first := commit("one")
	for _, b := range builders(t) {
		d.mustBuild(t, b, dir, "-t", "git", url)
		if got := d.Must(t, "run", "--rm", "git", "cat", "/v", "/owner"); got != "one\n0" {
			t.Errorf("%s: %q", b.name, got)
		}
		d.Must(t, "rmi", "git")
	}
	d.mustBuild(t, legacy, dir, "-t", "git", url)
	second := commit("two")
	if out := sh("tenon image rebuild git --dry-run"); !strings.Contains(out, url+", which was at "+first[:12]+"; not recorded by you") {
		t.Errorf("the plan: %s", out)
	}
	sh("tenon image rebuild git --yes --revision")
	if got := d.Must(t, "run", "--rm", "git", "cat", "/v"); got != "one" {
		t.Errorf("at the commit %s: %q", first, got)
	}
	d.mustBuild(t, own, dir, "-t", "git", "--no-cache", url)
	if got := d.Must(t, "run", "--rm", "git", "cat", "/v"); got != "two" {
		t.Errorf("at %s: %q", second, got)
	}
	d.nothingOfBuilds(t)
}
