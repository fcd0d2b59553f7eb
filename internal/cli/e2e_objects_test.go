package cli

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestRootCopy(t *testing.T) {
	e := realEngine(t)
	name := e.unique(t, "")
	e.ok(t, "run", "-d", "--name", name, "busybox", "sh", "-c", "mkdir -p /c/dst /c/src/sub; echo a >/c/src/a; echo b >/c/src/sub/b; ln -s a /c/src/l; ln -s /c/src /c/ls; echo ok; sleep 1000")
	e.until(t, func(out string) bool { return out == "ok" }, "logs", name)
	for _, x := range []struct {
		cp   string
		want string // what is then in the working directory, or in /c/dst
		code int
	}{
		{"NAME:/c/src .", "src src/a src/l src/sub src/sub/b", 0},
		{"NAME:/c/src/. .", "a l sub sub/b", 0},
		{"NAME:/c/src new", "new new/a new/l new/sub new/sub/b", 0},
		{"NAME:/c/src/a .", "a", 0},
		{"NAME:/c/src/a b", "b", 0},
		{"NAME:/c/src/a new/", "", 1},
		{"NAME:/c/ls .", "ls", 0},
		{"-L NAME:/c/ls .", "ls ls/a ls/l ls/sub ls/sub/b", 0},
		{"NAME:/c/none .", "", 1},
		{"FROM NAME:/c/dst", "FROM FROM/f FROM/in FROM/in/g", 0},
		{"FROM/. NAME:/c/dst", "f in in/g", 0},
		{"FROM/f NAME:/c/dst/new", "new", 0},
		{"FROM/f NAME:/c/dst/new/", "", 1},
		{"FROM NAME:/c/dst/deep", "deep deep/f deep/in deep/in/g", 0},
	} {
		dir, from := t.TempDir(), filepath.Join(t.TempDir(), "FROM")
		if err := os.MkdirAll(filepath.Join(from, "in"), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"f", "in/g"} {
			if err := os.WriteFile(filepath.Join(from, f), []byte(f), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		line := strings.ReplaceAll(strings.ReplaceAll(x.cp, "NAME", name), "FROM", from)
		cmd := e.command(t, append([]string{"cp"}, strings.Fields(line)...)...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != x.code {
			t.Errorf("cp %s: %d, %v, %s", x.cp, code, err, out)
		}
		var got []string
		if strings.HasPrefix(x.cp, "FROM") {
			got = strings.Fields(e.ok(t, "exec", name, "sh", "-c", "cd /c/dst; find . -mindepth 1 | cut -c3-; rm -rf /c/dst/*"))
		} else {
			err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
				if rel, _ := filepath.Rel(dir, p); rel != "." {
					got = append(got, rel)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		slices.Sort(got)
		if s := strings.Join(got, " "); s != x.want {
			t.Errorf("cp %s: got %q, want %q", x.cp, s, x.want)
		}
	}
	tar, _, code := e.run(t, "", "cp", name+":/c/src", "-")
	if code != 0 || !strings.Contains(tar, "src/sub/b") {
		t.Errorf("cp to standard output: %d, %d bytes", code, len(tar))
	}
	if _, errOut, code := e.run(t, tar, "cp", "-", name+":/c/dst"); code != 0 {
		t.Errorf("cp from standard input: %s", errOut)
	}
	if got := e.ok(t, "exec", name, "cat", "/c/dst/src/sub/b"); got != "b" {
		t.Errorf("cp from standard input: %q", got)
	}
}

func TestRootImages(t *testing.T) {
	e := realEngine(t)
	name := e.unique(t, "")
	dir := t.TempDir()
	e.ok(t, "create", "--name", name, "busybox", "true")
	e.ok(t, "commit", "-m", "msg", "-c", "ENV A=b", name, "e2e/committed:1")
	if got := e.ok(t, "run", "--rm", "e2e/committed:1", "sh", "-c", "echo $A"); got != "b" {
		t.Errorf("commit: %q", got)
	}
	e.ok(t, "tag", "e2e/committed:1", "e2e/other")
	if got := e.ok(t, "images", "--format", "{{.Repository}}:{{.Tag}}", "e2e/*"); !strings.Contains(got, "e2e/other:latest") || !strings.Contains(got, "e2e/committed:1") {
		t.Errorf("images: %q", got)
	}
	if got := e.ok(t, "history", "-q", "e2e/other"); got == "" {
		t.Error("history shows nothing")
	}
	file := filepath.Join(dir, "save.tar")
	e.ok(t, "save", "-o", file, "e2e/committed:1", "e2e/other")
	e.ok(t, "rmi", "e2e/committed:1", "e2e/other")
	if _, _, code := e.run(t, "", "image", "inspect", "e2e/other"); code != 1 {
		t.Error("the image is still there")
	}
	if got := e.ok(t, "load", "-i", file); !strings.Contains(got, "Loaded image: e2e/other:latest") {
		t.Errorf("load: %q", got)
	}
	root := filepath.Join(dir, "root.tar")
	e.ok(t, "export", "-o", root, name)
	e.ok(t, "import", "-c", `CMD ["echo","imported"]`, root, "e2e/imported")
	if got := e.ok(t, "run", "--rm", "e2e/imported"); got != "imported" {
		t.Errorf("import: %q", got)
	}
	e.ok(t, "rmi", "-f", "e2e/committed:1", "e2e/other", "e2e/imported")
	e.ok(t, "image", "prune", "-f")
	if got := e.ok(t, "system", "df"); !strings.Contains(got, "Local Volumes") {
		t.Errorf("system df: %q", got)
	}
}

func TestRootNetworksAndVolumes(t *testing.T) {
	e := realEngine(t)
	name := e.unique(t, "")
	e.ok(t, "network", "create", "--label", "e2e=1", "e2e-net")
	t.Cleanup(func() { e.run(t, "", "network", "rm", "e2e-net") })
	e.ok(t, "volume", "create", "--label", "e2e=1", "e2e-vol")
	t.Cleanup(func() { e.run(t, "", "volume", "rm", "-f", "e2e-vol") })
	e.ok(t, "run", "-d", "--name", name, "-p", "127.0.0.1::80", "-v", "e2e-vol:/data", "--network", "e2e-net", "busybox", "sleep", "1000")
	if got := e.ok(t, "port", name, "80"); !strings.HasPrefix(got, "127.0.0.1:") {
		t.Errorf("port: %q", got)
	}
	if got := e.ok(t, "run", "--rm", "--network", "e2e-net", "busybox", "ping", "-c", "1", "-W", "5", name); !strings.Contains(got, "1 packets received") {
		t.Errorf("ping by name: %q", got)
	}
	e.ok(t, "network", "connect", "bridge", name)
	if got := e.ok(t, "inspect", "-f", "{{len .NetworkSettings.Networks}}", name); got != "2" {
		t.Errorf("connect: %q", got)
	}
	e.ok(t, "network", "disconnect", "bridge", name)
	if got := e.ok(t, "network", "ls", "-q", "--no-trunc", "-f", "label=e2e=1"); got != e.ok(t, "network", "inspect", "-f", "{{.Id}}", "e2e-net") {
		t.Errorf("network ls: %q", got)
	}
	if got := e.ok(t, "volume", "ls", "-q", "-f", "label=e2e=1"); got != "e2e-vol" {
		t.Errorf("volume ls: %q", got)
	}
	for _, args := range [][]string{{"network", "rm", "e2e-net"}, {"volume", "rm", "e2e-vol"}} {
		if _, errOut, code := e.run(t, "", args...); code != 1 || !strings.HasPrefix(errOut, "Error response from daemon:") {
			t.Errorf("%v in use: %d %s", args, code, errOut)
		}
	}
	if got := e.ok(t, "__complete", "stop", "e2e-testrootnet"); !strings.HasPrefix(got, name+"\n") {
		t.Errorf("completion of a container: %q", got)
	}
	if got := e.ok(t, "__complete", "volume", "rm", "e2e-v"); !strings.HasPrefix(got, "e2e-vol\n") {
		t.Errorf("completion of a volume: %q", got)
	}
	if got := e.ok(t, "__complete", "run", "--network", "e2e-n"); !strings.HasPrefix(got, "e2e-net\n") {
		t.Errorf("completion of a flag: %q", got)
	}
	e.ok(t, "rm", "-f", name)
	if got := e.ok(t, "volume", "prune", "-a", "-f", "--filter", "label=e2e=1"); !strings.Contains(got, "e2e-vol") {
		t.Errorf("volume prune: %q", got)
	}
	if got := e.ok(t, "network", "prune", "-f", "--filter", "label=e2e=1"); !strings.Contains(got, "e2e-net") {
		t.Errorf("network prune: %q", got)
	}
}

func TestRootSystem(t *testing.T) {
	e := realEngine(t)
	if got := e.ok(t, "doctor"); !strings.Contains(got, "overlay") {
		t.Errorf("doctor: %q", got)
	}
	if out, errOut, _ := e.run(t, "", "-H", "unix:///nonexistent", "doctor"); !strings.Contains(out, "overlay") || !strings.Contains(errOut, "by itself") {
		t.Errorf("doctor without a daemon: %q %q", out, errOut) // its code is the host's matter
	}
	if got := e.ok(t, "info", "-f", "{{.OSType}}"); got != "linux" {
		t.Errorf("info: %q", got)
	}
	if got := e.ok(t, "version", "-f", "{{.Server.Os}}"); got != "linux" {
		t.Errorf("version: %q", got)
	}
	if got := e.ok(t, "--help"); !strings.Contains(got, "tenon doctor") {
		t.Errorf("help: %q", got)
	}
	if out, errOut, code := e.run(t, "", "build", "."); code != 1 || out != "" || errOut == "" {
		t.Errorf("build: %q %q %d", out, errOut, code)
	}
	name := e.unique(t, "")
	e.ok(t, "create", "--name", name, "-l", "e2e-prune=1", "busybox")
	if out, _, code := e.run(t, "n\n", "container", "prune", "--filter", "label=e2e-prune=1"); code != 0 || !strings.Contains(out, "[y/N]") {
		t.Errorf("prune with a no: %q %d", out, code)
	}
	if out, _, code := e.run(t, "y\n", "container", "prune", "--filter", "label=e2e-prune=1"); code != 0 || !strings.Contains(out, "Deleted Containers:") {
		t.Errorf("prune with a yes: %q %d", out, code)
	}
}
