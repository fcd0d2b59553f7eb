package build

import (
	"fmt"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tenon.dev/tenon/internal/build/api"
	"tenon.dev/tenon/internal/build/gitjail"
)

// realGit is the git that the tests themselves call.
var realGit string

func TestMain(m *testing.M) {
	if gitjail.Is(os.Args[0]) {
		os.Exit(gitjail.Main())
	}
	realGit, _ = exec.LookPath("git") // the tests that need it say that it is missing
	os.Exit(m.Run())
}

// forge serves repositories over HTTP.
type forge struct {
	t    *testing.T
	dir  string
	url  string
	home string
}

func newForge(t *testing.T) *forge {
	f := &forge{t: t, dir: t.TempDir(), home: t.TempDir()}
	core, err := exec.Command(realGit, "--exec-path").Output()
	if err != nil {
		t.Fatalf("the tests need git: %v", err)
	}
	srv := httptest.NewServer(&cgi.Handler{
		Path: filepath.Join(strings.TrimSpace(string(core)), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + f.dir, "GIT_HTTP_EXPORT_ALL=1"},
	})
	t.Cleanup(srv.Close)
	f.url = srv.URL
	return f
}

func (f *forge) git(dir string, args ...string) string {
	f.t.Helper()
	cmd := exec.Command(realGit, append([]string{"-C", dir, "-c", "user.name=t", "-c", "user.email=t@example.invalid", "-c", "protocol.file.allow=always"}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+f.home, "GIT_CONFIG_NOSYSTEM=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		f.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// repo makes a repository with one commit: prepare fills its directory.
func (f *forge) repo(name string, prepare func(dir string)) (dir, url string) {
	f.t.Helper()
	dir = filepath.Join(f.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		f.t.Fatal(err)
	}
	f.git(dir, "init", "-q", "-b", "main")
	prepare(dir)
	f.git(dir, "add", "-A", "-f")
	f.git(dir, "commit", "-q", "-m", "one")
	return dir, f.url + "/" + name + "/.git"
}

func (f *forge) write(dir, name, text string) {
	f.t.Helper()
	p := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func newGitWorld(t *testing.T) *world {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	w.b.opt.Git = self
	return w
}

func (w *world) buildRemote(tag, url string, args map[string]*string) error {
	_, err := w.b.Build(testContext(w.t), api.Request{Version: api.BuildKit, Remote: url, Tags: []string{"docker.io/library/" + tag}, Args: args}, new(printed))
	return err
}

// A repository is a context, with its submodules, and what is in it is root's.
func TestGitContext(t *testing.T) {
	w, f := newGitWorld(t), newForge(t)
	f.repo("sub", func(dir string) { f.write(dir, "inner", "submodule") })
	dir, url := f.repo("app", func(dir string) {
		f.write(dir, "Dockerfile", "FROM scratch\nCOPY . /\n")
		f.write(dir, "sub dir/f", "one")
		if err := os.Symlink("sub dir/f", filepath.Join(dir, "link")); err != nil {
			t.Fatal(err)
		}
		f.git(dir, "submodule", "add", "-q", f.url+"/sub/.git", "mod")
	})
	if err := w.buildRemote("g:1", url, nil); err != nil {
		t.Fatal(err)
	}
	if got := w.layerFile("g:1", "sub dir/f") + w.layerFile("g:1", "mod/inner") + w.layerFile("g:1", "link"); got != "onesubmoduleone" {
		t.Fatalf("files are %q", got)
	}
	info, err := os.Lstat(w.layerPath("g:1", "mod/inner"))
	if err != nil || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Fatalf("the file of a submodule is %v's, %v", info, err)
	}
	// The next commit, by its branch and by its name, and with the repository itself.
	f.write(dir, "sub dir/f", "two")
	f.git(dir, "commit", "-q", "-a", "-m", "two")
	one, keep := f.git(dir, "rev-parse", "HEAD~1"), "1"
	for _, c := range []struct {
		ref, want string
		args      map[string]*string
	}{{"#main", "two", nil}, {"#" + one, "one", nil}, {"#main", "two", map[string]*string{"BUILDKIT_CONTEXT_KEEP_GIT_DIR": &keep}}} {
		if err := w.buildRemote("g:2", url+c.ref, c.args); err != nil {
			t.Fatal(err)
		}
		if got := w.layerFile("g:2", "sub dir/f"); got != c.want {
			t.Errorf("%s has %q, want %q", c.ref, got, c.want)
		}
	}
	if got := w.layerFile("g:2", ".git/HEAD"); got == "" {
		t.Error("no .git")
	}
	// A directory of it.
	sub, surl := f.repo("below", func(dir string) { f.write(dir, "a/b/Dockerfile", "FROM scratch\nCOPY Dockerfile /got\n") })
	if err := w.buildRemote("g:3", surl+"#main:a/b", nil); err != nil {
		t.Fatalf("%s: %v", sub, err)
	}
}

// layerPath is where a file of an image's layers is.
func (w *world) layerPath(ref, name string) string {
	w.t.Helper()
	img, err := w.images.Resolve(testContext(w.t), ref, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	dirs, err := w.images.Layers(testContext(w.t), img)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, d := range dirs {
		if _, err := os.Lstat(filepath.Join(d, name)); err == nil {
			return filepath.Join(d, name)
		}
	}
	w.t.Fatalf("%s has no %s", ref, name)
	return ""
}

// What a repository says, asks for and leads to is nothing to the host.
func TestHostileRepositories(t *testing.T) {
	w, f := newGitWorld(t), newForge(t)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.MkdirAll(filepath.Join(secret, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	f.write(secret, "file", "host's")
	mark := filepath.Join(t.TempDir(), "ran")
	run := "touch " + mark
	f.git(secret, "init", "-q", "-b", "main")
	f.git(secret, "add", "file")
	f.git(secret, "commit", "-q", "-m", "s")
	head := f.git(secret, "rev-parse", "HEAD")
	module := func(url string) func(string) {
		return func(dir string) {
			f.write(dir, "Dockerfile", "FROM scratch\nCOPY . /\n")
			f.write(dir, ".gitmodules", "[submodule \"x\"]\n\tpath = x\n\turl = "+url+"\n")
		}
	}
	for name, c := range map[string]struct {
		prepare func(dir string)
		want    string // in the error
	}{
		"file":   {module("file://" + secret), "transport 'file' not allowed"},
		"path":   {module(secret), ""},
		"ext":    {module("ext::sh -c " + run + "%% >&2"), "transport 'ext' not allowed"},
		"dash":   {module("-u./payload"), ""},
		"update": {module(f.url + "/links/.git\n\tupdate = !" + run), ""},
		"sshop":  {module("ssh://-oProxyCommand=" + mark + "/x"), ""},
	} {
		dir, url := f.repo("m-"+name, c.prepare)
		f.git(dir, "update-index", "--add", "--cacheinfo", "160000,"+head+",x")
		f.git(dir, "commit", "-q", "--amend", "-m", "m")
		err := w.buildRemote("m:1", url, nil)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("a submodule by %s: %v, want %q", name, err, c.want)
		}
	}
	// Hooks and filters that are in it do not run, and links lead nowhere.
	_, url := f.repo("links", func(dir string) {
		f.write(dir, "Dockerfile", "FROM scratch\nCOPY out/file /got\n")
		f.write(dir, ".gitattributes", "* filter=evil diff=evil\n")
		f.write(dir, "hooks/post-checkout", "#!/bin/sh\n"+run+"\n")
		f.write(dir, ".gitconfig", "[filter \"evil\"]\n\tsmudge = "+run+"\n[core]\n\tfsmonitor = "+run+"\n")
		if err := os.Symlink(secret, filepath.Join(dir, "out")); err != nil {
			t.Fatal(err)
		}
	})
	if err := w.buildRemote("m:2", url, nil); err == nil {
		t.Error("a link out of the repository was followed")
	}
	if err := w.buildRemote("m:3", url+"#main:out", nil); err == nil {
		t.Error("a link out of the repository was a directory of it")
	}
	if _, err := os.Lstat(mark); err == nil {
		t.Error("a program of the repository ran")
	}
	// A server that never stops talking.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Type", "application/x-git-upload-pack-advertisement")
		fmt.Fprint(rw, "001e# service=git-upload-pack\n0000")
		for i := 0; r.Context().Err() == nil; i++ {
			line := fmt.Sprintf("%040x refs/%0900d/heads/main", i+1, i)
			if i == 0 {
				line += "\x00agent=x"
			}
			if _, err := fmt.Fprintf(rw, "%04x%s\n", len(line)+5, line); err != nil || i == 40000 {
				fmt.Fprint(rw, "0000")
				return
			}
		}
	})}
	go func() { _ = srv.Serve(l) }() // ends with Close
	defer srv.Close()
	err = w.buildRemote("m:4", "http://"+l.Addr().String()+"/x.git#main", nil)
	if err == nil || !strings.Contains(err.Error(), "it has written more than") {
		t.Errorf("endless output: %v", err)
	}
}
