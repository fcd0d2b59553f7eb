package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tenon.dev/tenon/client/imageapi"
)

// TestImageLife follows row I6: A, B on A, C on B and D beside them; A is replaced, and
// what stands on it is found, with the containers, and made anew in order.
func TestImageLife(t *testing.T) {
	d := NewDaemon(t)
	config := t.TempDir()
	mine := config
	tenon := func(args ...string) (string, int) {
		t.Helper()
		cmd := exec.Command(filepath.Join(d.Bin, "tenon"), args...)
		cmd.Env = append(d.Environ(), "DOCKER_CONFIG="+config)
		cmd.WaitDelay = time.Second
		stop := time.AfterFunc(patience(time.Minute), func() { _ = cmd.Process.Kill() })
		defer stop.Stop()
		out, err := cmd.CombinedOutput()
		if err != nil && cmd.ProcessState == nil {
			t.Fatalf("tenon %s: %v", strings.Join(args, " "), err)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	must := func(args ...string) string {
		t.Helper()
		out, code := tenon(args...)
		if code != 0 {
			t.Fatalf("tenon %s: %d: %s", strings.Join(args, " "), code, out)
		}
		return out
	}
	decode := func(v any, args ...string) {
		t.Helper()
		if out := must(args...); json.Unmarshal([]byte(out), v) != nil {
			t.Fatalf("tenon %s: %s", strings.Join(args, " "), out)
		}
	}
	dir := t.TempDir()
	build := func(name, dockerfile string, flags ...string) {
		t.Helper()
		ctx := filepath.Join(dir, strings.ReplaceAll(name, ":", "-"))
		if err := os.MkdirAll(ctx, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(ctx, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
			t.Fatal(err)
		}
		must(append(append([]string{"build", "-q", "-t", name}, flags...), ctx)...)
	}
	outdated := func() (names []string, r imageapi.OutdatedReport) {
		t.Helper()
		decode(&r, "image", "outdated", "--format", "json")
		for _, o := range r.Images {
			names = append(names, o.Names...)
		}
		return names, r
	}
	must("image", "bootstrap", "-q", "busybox")
	build("a:1", "FROM busybox\nRUN echo one >/base\nENV FROM_BASE=one\n")
	must("tag", "a:1", "a:kept") // another name must not hide that the first has moved
	build("b:1", "FROM a:1\nARG GREETING\nARG NPM_TOKEN\nLABEL dev.tenon.owner=team-b\nRUN echo $GREETING >/own\n", "--build-arg", "GREETING=hello", "--build-arg", "NPM_TOKEN=hunter22")
	build("c:1", "FROM b:1\nRUN echo c >/c\n")
	must("run", "-d", "--name", "on-b", "b:1", "sleep", "600")
	must("create", "--name", "make-e", "a:1", "touch", "/e")
	must("start", "-a", "make-e")
	must("commit", "make-e", "e:1") // no definition of a build
	build("other:1", "FROM busybox\nRUN echo x >/x\n")

	var tree []imageapi.Node
	decode(&tree, "image", "tree", "--format", "json")
	var lines []string
	var walk func(n imageapi.Node, above string)
	walk = func(n imageapi.Node, above string) {
		at := above + "/" + strings.Join(n.Names, ",")
		lines = append(lines, at)
		for _, c := range n.Children {
			walk(c, at)
		}
	}
	for _, n := range tree {
		walk(n, "")
	}
	for _, want := range []string{"/busybox:latest/a:1,a:kept/b:1/c:1", "/busybox:latest/a:1,a:kept/e:1", "/busybox:latest/other:1"} {
		if !slices.Contains(lines, want) {
			t.Errorf("the tree has no %s: %q", want, lines)
		}
	}
	if out := must("image", "tree", "c:1"); !strings.Contains(out, "team-b") || !strings.Contains(out, "on-b") || strings.Contains(out, "other:1") {
		t.Errorf("the line of c:1:\n%s", out)
	}
	if names, _ := outdated(); len(names) > 0 {
		t.Errorf("outdated before anything moved: %v", names)
	}

	build("a:1", "FROM busybox\nRUN echo two >/base\nENV FROM_BASE=two\n")
	names, r := outdated()
	if slices.Sort(names); !slices.Equal(names, []string{"b:1", "c:1", "e:1"}) {
		t.Fatalf("outdated: %v", names)
	}
	for _, o := range r.Images {
		if o.Names[0] == "b:1" && (len(o.Containers) != 1 || o.Containers[0].Name != "on-b" || o.Base != "a:1" || o.Owners["owner"] != "team-b") {
			t.Errorf("b:1: %+v", o)
		}
		if o.Names[0] == "c:1" && o.Through != "b:1" {
			t.Errorf("c:1: %+v", o)
		}
	}
	if _, code := tenon("image", "outdated", "--exit-code"); code != 1 {
		t.Errorf("--exit-code: %d", code)
	}
	var steps []imageapi.Step
	decode(&steps, "image", "rebuild", "--chain", "a:1", "--dry-run", "--format", "json")
	var plan []string
	for _, s := range steps {
		plan = append(plan, s.Names[0]+" "+s.Do)
		if s.Definition != nil && strings.Contains(strings.Join(s.Definition.Args, " "), "hunter22") {
			t.Errorf("a secret was recorded: %v", s.Definition.Args)
		}
	}
	if !slices.Equal(plan, []string{"b:1 build", "e:1 rebase", "c:1 build"}) {
		t.Errorf("the plan: %v", plan)
	}
	before := must("image", "inspect", "-f", "{{.Id}}", "other:1")
	// Whoever did not record these builds is asked, and has not said yes.
	config = t.TempDir()
	if out, code := tenon("image", "rebuild", "--chain", "a:1"); code != 1 || !strings.Contains(out, "b:1: built from "+filepath.Join(dir, "b-1")+", variable NPM_TOKEN") || !strings.Contains(out, "nothing was done") {
		t.Errorf("another user's builds (%d): %s", code, out)
	}
	config = mine
	must("image", "rebuild", "--chain", "a:1")
	if names, _ := outdated(); len(names) > 0 {
		t.Errorf("outdated after all was rebuilt: %v", names)
	}
	for _, c := range []struct{ image, want string }{
		{"c:1", "two two hello c"}, {"e:1", "two two"},
	} {
		out := must("run", "--rm", c.image, "sh", "-c", "echo $FROM_BASE $(cat /base /own /c 2>/dev/null); ls /e 2>/dev/null || :")
		if got := strings.Join(strings.Fields(strings.TrimSuffix(strings.TrimSpace(out), "/e")), " "); got != c.want {
			t.Errorf("%s: %q, want %q", c.image, got, c.want)
		}
	}
	if after := must("image", "inspect", "-f", "{{.Id}}", "other:1"); after != before {
		t.Error("other:1 was rebuilt, too")
	}
	if out := must("inspect", "-f", "{{.State.Running}} {{.Config.Image}}", "on-b"); strings.TrimSpace(out) != "true b:1" {
		t.Errorf("the container was touched: %s", out)
	}
	if _, r := outdated(); len(r.Containers) == 0 || !slices.ContainsFunc(r.Containers, func(s imageapi.Stale) bool { return s.Name == "on-b" }) {
		t.Errorf("on-b runs the former image, and that is not said: %+v", r.Containers)
	}

	// A build that fails leaves it, and what stands on it, as they were.
	own := filepath.Join(dir, "b-1", "Dockerfile")
	if err := os.WriteFile(own, []byte("FROM a:1\nRUN false\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	build("a:1", "FROM busybox\nRUN echo more >/base\nENV FROM_BASE=more\n")
	ids := must("image", "inspect", "-f", "{{.Id}}", "b:1", "c:1")
	if out, code := tenon("image", "rebuild", "--chain", "a:1"); code != 1 || !strings.Contains(out, "b:1: build") || !strings.Contains(out, "c:1: its base could not be made") {
		t.Errorf("a build that fails (%d): %s", code, out)
	}
	if now := must("image", "inspect", "-f", "{{.Id}}", "b:1", "c:1"); now != ids {
		t.Errorf("after a build that failed: %s, before %s", now, ids)
	}
	if names, _ := outdated(); !slices.Contains(names, "b:1") || !slices.Contains(names, "c:1") || slices.Contains(names, "e:1") {
		t.Errorf("outdated after a build that failed: %v", names)
	}

	// A base whose files the image has changed itself is not swapped.
	must("create", "--name", "make-f", "a:1", "sh", "-c", "echo mine >/base")
	must("start", "-a", "make-f")
	must("commit", "make-f", "f:1")
	build("a:1", "FROM busybox\nRUN echo three >/base\n")
	if out, code := tenon("image", "rebuild", "f:1"); code == 0 || !strings.Contains(out, "/base") {
		t.Errorf("f:1 was re-based (%d): %s", code, out)
	}
	// Others' clients do not tell where they build: the daemon knows the rest.
	sent := contextOf(t, map[string]string{"D": "FROM a:1\nARG WHO\nRUN cat /base >/got && echo $WHO >>/got\n"})
	if r := d.build(t, legacy, sent, "", nil, "-q", "-f", "D", "-t", "g:1", "--build-arg", "WHO=me", "."); r.Code != 0 {
		t.Fatalf("%s%s", r.Out, r.Err)
	}
	build("a:1", "FROM busybox\nRUN echo four >/base\n")
	if out := must("image", "rebuild", "--chain", "a:1", "--dry-run"); !strings.Contains(out, "did not name: its own layers are put on the new base; ") || !strings.Contains(out, "--context g:1=DIRECTORY builds it") {
		t.Errorf("a build by docker build: %s", out)
	}
	must("image", "rebuild", "g:1", "--yes", "--context", "g:1="+sent)
	if out := must("run", "--rm", "g:1", "cat", "/got"); out != "four\nme\n" {
		t.Errorf("g:1 built again has %q", out)
	}
	if out := must("image", "rebuild", "g:1", "--dry-run"); !strings.Contains(out, "built from "+sent) || strings.Contains(out, "asks") {
		t.Errorf("g:1 once it was built from a directory that is known: %s", out)
	}
	if out := must("image", "diff", "--files", "a:kept", "a:1"); !strings.Contains(out, "C /base") || !strings.Contains(out, "- Env FROM_BASE one") {
		t.Errorf("diff: %s", out)
	}
}

// TestAudit seeds faults and looks for all of them.
func TestAudit(t *testing.T) {
	d := NewDaemon(t)
	run := func(want int, args ...string) string {
		t.Helper()
		r := d.Sh(t, filepath.Join(d.Bin, "tenon")+" "+strings.Join(args, " "))
		if r.Code != want {
			t.Fatalf("tenon %s: %d, want %d: %s%s", strings.Join(args, " "), r.Code, want, r.Out, r.Err)
		}
		return r.Out
	}
	run(0, "image", "bootstrap", "-q", "busybox")
	key := "-----BEGIN OPENSSH PRIV" + "ATE KEY-----\n" + strings.Repeat("b3BlbnNzaC1rZXktdjEA", 4) + "\n"
	d.forge(t, "bad", map[string]any{"Env": []string{"PATH=/bin", "DB_PASSWORD=hunter22"}, "ExposedPorts": map[string]any{"22/tcp": map[string]any{}}},
		file("id", key), file("su", "x"))
	run(0, "create", "--name", "rm", "-v", "/:/host:ro", "--privileged", "-p", "6379", "--pid", "host", "busybox", "sleep", "1")

	// What a container writes is looked at, too.
	run(0, "run", "--name", "wrote", "busybox", "sh", "-c", `"cp /bin/busybox /door; chmod 4755 /door; mkfifo /fifo; ln -s / /loop; printf '%s' '`+strings.ReplaceAll(key, "\n", `\n`)+`' > /id"`)

	rules := func(r imageapi.AuditReport) map[string]string {
		m := map[string]string{}
		for _, f := range r.Findings {
			if f.Fix == "" {
				t.Errorf("no fix: %+v", f)
			}
			m[f.Rule] = f.Severity
		}
		return m
	}
	var img, ctr, wrote imageapi.AuditReport
	for _, c := range []struct {
		into *imageapi.AuditReport
		args []string
		want map[string]string
	}{
		{&img, []string{"image", "audit", "--format", "json", "bad"}, map[string]string{
			"root-user": "medium", "secret-file": "critical", "secret-env": "high", "no-healthcheck": "low", "open-port": "medium"}},
		{&ctr, []string{"audit", "--format", "json", "rm"}, map[string]string{
			"privileged": "critical", "host-mount": "critical", "host-namespace": "high", "open-port": "high", "no-memory-limit": "medium", "root-user": "medium", "mutable-tag": "low"}},
		{&wrote, []string{"audit", "--format", "json", "wrote"}, map[string]string{"setuid-file": "high", "secret-file": "high", "no-healthcheck": "low"}},
	} {
		if err := json.Unmarshal([]byte(run(0, c.args...)), c.into); err != nil {
			t.Fatal(err)
		}
		got := rules(*c.into)
		for rule, severity := range c.want {
			if got[rule] != severity {
				t.Errorf("%v: %s is %q, want %q", c.args, rule, got[rule], severity)
			}
		}
	}
	if out, _ := json.Marshal([]imageapi.AuditReport{img, wrote}); strings.Contains(string(out), "hunter22") || strings.Contains(string(out), "b3BlbnNzaC1rZXktdjEA") {
		t.Error("the report shows a secret")
	}
	run(1, "image", "audit", "--fail-on", "critical", "bad")
	run(0, "image", "audit", "--fail-on", "high", "busybox")
	if out := run(1, "audit", "--fail-on", "critical"); strings.Contains(out, "container rm") || !strings.Contains(out, "image bad") {
		t.Errorf("what does not run is looked at, or images are not: %s", out)
	}
	var sarif struct {
		Version string
		Runs    []struct{ Results []struct{ RuleID string } }
	}
	if err := json.Unmarshal([]byte(run(0, "image", "audit", "--format", "sarif", "bad")), &sarif); err != nil || sarif.Version != "2.1.0" || len(sarif.Runs) != 1 || len(sarif.Runs[0].Results) != len(img.Findings) {
		t.Errorf("sarif: %+v %v", sarif, err)
	}
}

// TestBootstrapDebian makes the distribution's minimum twice, and wants the same to the
// byte.
func TestBootstrapDebian(t *testing.T) {
	d := NewDaemon(t)
	// It takes half a minute of processor time; nothing waits for it but its own bound.
	try := func(args ...string) (string, error) {
		cmd := exec.Command(filepath.Join(d.Bin, "tenon"), args...)
		cmd.Env = d.Environ()
		cmd.WaitDelay = time.Second
		stop := time.AfterFunc(patience(10*time.Minute), func() { _ = cmd.Process.Kill() })
		defer stop.Stop()
		out, err := cmd.CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	run := func(args ...string) string {
		t.Helper()
		out, err := try(args...)
		if err != nil && strings.Contains(out, "E: ") { // apt's: the archive may not have answered
			t.Logf("once more: %s", out)
			out, err = try(args...)
		}
		if err != nil {
			t.Fatalf("tenon %s: %v: %s", strings.Join(args, " "), err, out)
		}
		return out
	}
	made := func(tag string) (id, releases string) {
		t.Helper()
		id = run("image", "bootstrap", "-q", "debian", "--tag", tag)
		return id, run("image", "inspect", "-f", `{{index .Config.Labels "dev.tenon.source.releases"}}`, tag)
	}
	first, from := made("deb:1")
	if again, now := made("deb:2"); again != first && now == from { // the archive may be updated between the two
		t.Errorf("not the same twice: %s, %s", first, again)
	}
	var s imageapi.SBOM
	if err := json.Unmarshal([]byte(run("image", "sbom", "--format", "json", "deb:1")), &s); err != nil || s.Origin != "attestation" || len(s.Packages) < 50 {
		t.Errorf("sbom: %v %s %d", err, s.Origin, len(s.Packages))
	}
	if !strings.Contains(from, "sha256:") {
		t.Errorf("releases: %s", from)
	}
	if out := run("run", "--rm", "deb:1", "sh", "-c", "dpkg -s bash | grep ^Status; ls /etc/hostname /etc/resolv.conf | wc -l; apt-get --version | head -1"); !strings.Contains(out, "install ok installed") {
		t.Errorf("in it: %s", out)
	}
}
