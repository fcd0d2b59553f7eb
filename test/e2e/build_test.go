package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// builder is one of the clients that users build with.
type builder struct {
	name string
	env  []string
	cmd  []string
}

// builders are the docker CLI's own, for the older builder; buildx with the driver
// docker; and ours.
func builders(t *testing.T) []builder {
	t.Helper()
	return []builder{
		{"legacy", []string{"DOCKER_BUILDKIT=0"}, []string{"docker", "build"}},
		{"buildx", []string{"DOCKER_CONFIG=" + buildxConfig(t)}, []string{"docker", "buildx", "build", "--progress", "plain"}},
		{"tenon", nil, []string{"tenon", "build", "--progress", "plain"}},
	}
}

// buildxConfig is a directory of client configuration with buildx as a plugin.
func buildxConfig(t *testing.T) string {
	t.Helper()
	args := []string{"../tools/buildx.sh"}
	if dir := os.Getenv("TENON_TEST_TOOLS"); dir != "" {
		args = append(args, dir)
	}
	out, err := exec.Command("sh", args...).Output()
	if err != nil {
		t.Fatalf("building buildx: %v", err)
	}
	plugins := filepath.Join(t.TempDir(), "cli-plugins")
	if err := os.Mkdir(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(strings.TrimSpace(string(out)), filepath.Join(plugins, "docker-buildx")); err != nil {
		t.Fatal(err)
	}
	return filepath.Dir(plugins)
}

// buildLimit bounds one build, as Docker does its commands: the first on a machine makes
// the template.
const buildLimit = 2 * time.Minute

// build runs a client's build in dir.
func (d *Daemon) build(t *testing.T, b builder, dir, stdin string, env []string, args ...string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience(buildLimit))
	defer cancel()
	list := append(append([]string{}, b.cmd[1:]...), args...)
	prog := b.cmd[0]
	if prog == "tenon" {
		prog = filepath.Join(d.Bin, "tenon")
	}
	cmd := exec.CommandContext(ctx, prog, list...)
	cmd.Dir, cmd.Env = dir, append(append(d.Environ(), b.env...), env...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("%s %v: no end after %v\n%s%s\ndaemon: %s", b.name, args, buildLimit, out.String(), errOut.String(), d.Tail())
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", b.name, err)
	}
	return Result{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}
}

// contextOf writes files (NAME to text; a text "-> X" is a link) into a new directory.
func contextOf(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(text, "-> "); ok {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// buildRow is a build, and what must come of it.
type buildRow struct {
	name  string
	not   string // clients that can't do it
	files map[string]string
	args  []string
	env   []string
	stdin string
	// run is the command run in the image, want what it must print (a regular
	// expression); without run, what the build must say.
	run, want string
	fails     bool
}

var buildRows = []buildRow{
	{name: "stages, of which one is not needed", files: map[string]string{"Dockerfile": `FROM busybox AS a
RUN echo from-a >/a
FROM busybox AS never
RUN false
FROM busybox
COPY --from=a /a /b
`}, run: "cat /b", want: "from-a"},
	{name: "target", files: map[string]string{"Dockerfile": "FROM busybox AS one\nRUN echo 1 >/n\nFROM busybox AS two\nRUN echo 2 >/n\n"}, args: []string{"--target", "one"}, run: "cat /n", want: "1"},
	{name: "arguments and labels", files: map[string]string{"Dockerfile": "ARG BASE=nosuch\nFROM $BASE\nARG A=1\nARG B\nRUN echo $A-$B >/args\nLABEL l=$A\n"},
		args: []string{"--build-arg", "BASE=busybox", "--build-arg", "A=x", "--build-arg", "B", "--label", "own=1"}, env: []string{"B=fromenv"}, run: "cat /args", want: "x-fromenv"},
	{name: "heredocs", files: map[string]string{"Dockerfile": "FROM busybox\nRUN <<E sh -e\necho one >/f\necho two >>/f\nE\nCOPY <<E /g\nthree\nE\nRUN cat /g >>/f\n"}, run: "cat /f", want: "one\ntwo\nthree"},
	{name: "the context and .dockerignore", files: map[string]string{".dockerignore": "*.log\nsecret\n!keep.log\n", "a.log": "a", "keep.log": "k", "secret/x": "s", "dir/f": "f",
		"Dockerfile": "FROM busybox\nCOPY . /ctx\n"}, run: "find /ctx -type f | sort", want: "/ctx/.dockerignore\n/ctx/Dockerfile\n/ctx/dir/f\n/ctx/keep.log"},
	{name: "another Dockerfile", files: map[string]string{"sub/My.dockerfile": "FROM busybox\nCOPY sub/f /f\n", "sub/f": "here"}, args: []string{"-f", "sub/My.dockerfile"}, run: "cat /f", want: "here"},
	{name: "a Dockerfile on the standard input", files: map[string]string{"f": "ctx"}, args: []string{"-f", "-"}, stdin: "FROM busybox\nCOPY f /f\n", run: "cat /f", want: "ctx"},
	{name: "configuration", files: map[string]string{"Dockerfile": "FROM busybox\nENV P=/w\nWORKDIR $P/d\nUSER 12:34\nENTRYPOINT [\"sh\",\"-c\"]\nCMD [\"pwd; id -u\"]\n"}, want: "/w/d\n12", run: " "},
	{name: "no network", files: map[string]string{"Dockerfile": "FROM busybox\nRUN ip -o link | wc -l >/n; ip -o link | grep -c ' lo:' >>/n\n"}, args: []string{"--network", "none"}, run: "cat /n", want: "1\n1"},
	{name: "the default network", files: map[string]string{"Dockerfile": "FROM busybox\nRUN ip -o -4 addr | grep -vc ' lo ' >/n\n"}, run: "cat /n", want: "1"},
	{name: "the host's network", not: "buildx", files: map[string]string{"Dockerfile": "FROM busybox\nRUN readlink /proc/self/ns/net >/n\n"}, args: []string{"--network", "host"}, run: "cat /n", want: "HOSTNET"},
	{name: "extra hosts, limits and shm", files: map[string]string{"Dockerfile": "FROM busybox\nRUN grep -c '10.1.2.3.*other' /etc/hosts >/n; ulimit -n >>/n; df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d' ' -f2 >>/n\n"},
		args: []string{"--add-host", "other:10.1.2.3", "--ulimit", "nofile=123:123", "--shm-size", "1m"}, run: "cat /n", want: "1\n123\n1024"},
	{name: "the platform", files: map[string]string{"Dockerfile": "FROM busybox\nARG TARGETARCH\nARG TARGETOS\nRUN echo $TARGETOS/$TARGETARCH >/p\n"}, args: []string{"--platform", "linux/amd64"}, run: "cat /p", want: "linux/amd64"},
	{name: "ONBUILD and SHELL", files: map[string]string{"Dockerfile": "FROM busybox\nSHELL [\"sh\",\"-ec\"]\nRUN echo $0 >/s\n"}, run: "test -s /s && echo ok", want: "ok"},
	{name: "ADD unpacks an archive", files: map[string]string{"Dockerfile": "FROM busybox\nADD a.tar /x/\n", "a.tar": string(smallTar)}, run: "cat /x/in", want: "tar"},
	{name: "links in the context stay in it", files: map[string]string{"Dockerfile": "FROM busybox\nCOPY l /l\nCOPY d /d\n", "l": "-> /etc/hostname", "d/up": "-> ../../../../../../etc/shadow"}, fails: true, want: "l"},
	{name: "files above the context are not there", files: map[string]string{"Dockerfile": "FROM busybox\nCOPY ../../../../etc/hostname /h\n"}, fails: true, want: "/etc/hostname"},
	{name: "a step that fails", files: map[string]string{"Dockerfile": "FROM busybox\nRUN echo said-this; exit 7\n"}, fails: true, want: "said-this"},
	{name: "an unknown instruction", files: map[string]string{"Dockerfile": "FROM busybox\n FOO bar\n"}, fails: true, want: "unknown instruction: FOO"},
	{name: "an unknown target", files: map[string]string{"Dockerfile": "FROM busybox\n"}, args: []string{"--target", "nosuch"}, fails: true, want: "nosuch.*could not be found"},
	{name: "an empty Dockerfile", files: map[string]string{"Dockerfile": ""}, fails: true, want: "empty|no build stage|no instructions"},
}

// smallTar is an archive with one file.
var smallTar = func() []byte {
	var b bytes.Buffer
	if err := writeTar(&b, "in", "tar\n"); err != nil {
		panic(err) // writes to memory
	}
	return b.Bytes()
}()

// TestBuild runs the table by every client; what they make runs at once.
func TestBuild(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	host, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range builders(t) {
		for i, row := range buildRows {
			if strings.Contains(row.not, b.name) {
				continue
			}
			t.Run(b.name+"/"+row.name, func(t *testing.T) {
				tag := fmt.Sprintf("built:%s-%d", b.name, i)
				r := d.build(t, b, contextOf(t, row.files), row.stdin, row.env, append(append([]string{"-t", tag}, row.args...), ".")...)
				all := r.Out + r.Err
				if (r.Code != 0) != row.fails {
					t.Fatalf("exit %d\n%s\n%s", r.Code, all, d.Tail())
				}
				want := regexp.MustCompile(`(?m)` + strings.ReplaceAll(row.want, "HOSTNET", regexp.QuoteMeta(host)))
				if row.run == "" {
					if !want.MatchString(all) {
						t.Errorf("says\n%s", all)
					}
					return
				}
				args := []string{"run", "--rm", tag}
				if strings.TrimSpace(row.run) != "" {
					args = append(args, "sh", "-c", row.run)
				}
				if got := d.Must(t, args...); !regexp.MustCompile(`^(?:` + want.String() + `)$`).MatchString(got) {
					t.Errorf("got %q, want %q", got, row.want)
				}
			})
		}
	}
}

// TestBuildCache: what did not change is not run again, by whichever client; cache
// mounts are kept; prune and df; export and import by a directory, a registry, inline.
func TestBuildCache(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	all := builders(t)
	buildx, own := all[1], all[2]
	dir := contextOf(t, map[string]string{"Dockerfile": `FROM busybox
RUN cat /proc/sys/kernel/random/uuid >/id
RUN --mount=type=cache,target=/c echo x >>/c/f; wc -l </c/f >/n
COPY f /f
`, "f": "1"})
	must := func(b builder, args ...string) Result {
		t.Helper()
		r := d.build(t, b, dir, "", nil, args...)
		if r.Code != 0 {
			t.Fatalf("%s %v: exit %d\n%s%s", b.name, args, r.Code, r.Out, r.Err)
		}
		return r
	}
	ids := map[string]bool{}
	for _, b := range all {
		must(b, "-t", "c", ".")
		ids[d.Must(t, "run", "--rm", "c", "cat", "/id")] = true
	}
	if len(ids) != 1 {
		t.Errorf("%d clients' builds of the same thing ran it %d times", len(all), len(ids))
	}
	change := func(name, from, to string) {
		t.Helper()
		path := filepath.Join(dir, name)
		text, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, bytes.Replace(text, []byte(from), []byte(to), 1), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	change("Dockerfile", "wc -l", "wc  -l") // another step, with the same mount
	must(own, "-t", "c", ".")
	if got := d.Must(t, "run", "--rm", "c", "cat", "/n"); got != "2" {
		t.Errorf("the cache mount has %s lines", got)
	}
	change("f", "1", "2")
	before := d.Must(t, "run", "--rm", "c", "cat", "/id")
	if r := must(own, "-t", "c", "."); !strings.Contains(r.Err, "CACHED") {
		t.Errorf("no step was taken from the cache: %s", r.Err)
	}
	if got := d.Must(t, "run", "--rm", "c", "sh", "-c", "cat /id /f"); got != before+"\n2" {
		t.Errorf("after a change: %q", got)
	}

	// What one daemon's cache has another takes over: a directory, a registry, inline.
	reg := startRegistry(t, false)
	store := filepath.Join(t.TempDir(), "cache")
	must(own, "--cache-to", "type=local,mode=max,dest="+store, ".")
	must(buildx, "--cache-to", "type=registry,mode=max,ref="+reg.addr+"/cache:1", "-t", reg.addr+"/img:1", "--push", ".")
	must(own, "--cache-to", "type=inline", "-t", reg.addr+"/inline:1", "--push", ".")
	want := d.Must(t, "run", "--rm", "c", "cat", "/id")
	for _, from := range []string{"type=local,src=" + store, "type=registry,ref=" + reg.addr + "/cache:1", "type=registry,ref=" + reg.addr + "/inline:1"} {
		if r := d.run(t, time.Minute, filepath.Join(d.Bin, "tenon"), "builder", "prune", "-af"); r.Code != 0 || !strings.Contains(r.Out, "Total") {
			t.Fatalf("prune: %d %s%s", r.Code, r.Out, r.Err)
		}
		must(own, "-t", "again", "--cache-from", from, ".")
		if got := d.Must(t, "run", "--rm", "again", "cat", "/id"); got != want {
			t.Errorf("from %s: the step was run again", from)
		}
	}
	var du struct{ TotalCount, TotalSize int64 }
	if r := d.run(t, time.Minute, filepath.Join(d.Bin, "tenon"), "builder", "du", "--format", "json"); json.Unmarshal([]byte(r.Out), &du) != nil || du.TotalCount == 0 {
		t.Errorf("builder du: %s%s", r.Out, r.Err)
	}
	d.Must(t, "builder", "prune", "-af")
	if out := d.Must(t, "system", "df", "--format", "{{.Type}} {{.TotalCount}}"); !strings.Contains(out, "Build Cache 0") {
		t.Errorf("after prune: %s", out)
	}
	if got := d.Must(t, "run", "--rm", "again", "cat", "/id"); got != want {
		t.Errorf("the image after prune: %q", got)
	}
}

// TestBuildOutputs: directories, archives and OCI layouts, attestations, files that
// say what was made, and the same digest twice.
func TestBuildOutputs(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	dir := contextOf(t, map[string]string{"Dockerfile": "FROM busybox AS b\nRUN date +%N >/x; cat /x >/y\nFROM scratch\nCOPY --from=b /y /y\n"})
	for _, b := range builders(t)[1:] {
		t.Run(b.name, func(t *testing.T) {
			out := t.TempDir()
			must := func(env []string, args ...string) Result {
				t.Helper()
				r := d.build(t, b, dir, "", env, args...)
				if r.Code != 0 {
					t.Fatalf("%v: exit %d\n%s%s", args, r.Code, r.Out, r.Err)
				}
				return r
			}
			must(nil, "-o", filepath.Join(out, "dir"), ".")
			if _, err := os.Stat(filepath.Join(out, "dir/y")); err != nil {
				t.Error(err)
			}
			must(nil, "-o", "type=tar,dest="+filepath.Join(out, "t.tar"), ".")
			must(nil, "-o", "type=oci,dest="+filepath.Join(out, "oci.tar"), ".")
			for file, has := range map[string]string{"t.tar": "y", "oci.tar": "index.json"} {
				if list, err := exec.Command("tar", "tf", filepath.Join(out, file)).Output(); err != nil || !strings.Contains("\n"+string(list), "\n"+has+"\n") {
					t.Errorf("%s: %v %s", file, err, list)
				}
			}
			must(nil, "--provenance", "mode=max", "-t", "attested", "-o", "type=oci,dest="+filepath.Join(out, "att.tar"), ".")
			if list, err := exec.Command("sh", "-c", "tar xOf "+filepath.Join(out, "att.tar")+" | grep -ac slsa.dev/provenance").Output(); err != nil {
				t.Errorf("no provenance: %v %s", err, list)
			}
			iid, meta := filepath.Join(out, "iid"), filepath.Join(out, "meta")
			must(nil, "--iidfile", iid, "--metadata-file", meta, "-t", "files:1", ".")
			id, err := os.ReadFile(iid)
			if err != nil || d.Must(t, "inspect", "-f", "{{.Id}}", strings.TrimSpace(string(id))) != d.Must(t, "inspect", "-f", "{{.Id}}", "files:1") {
				t.Errorf("iidfile: %s %v", id, err)
			}
			var m map[string]any
			if data, err := os.ReadFile(meta); err != nil || json.Unmarshal(data, &m) != nil || m["containerimage.digest"] == nil {
				t.Errorf("metadata: %v %v", m, err)
			}
		})
	}
	// The same twice, though the second time nothing comes from the cache.
	own := builders(t)[2]
	same := contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN echo a >/a; mkdir /d\nCOPY f /f\n", "f": "f"})
	var digests []string
	for range 2 {
		r := d.build(t, own, same, "", []string{"SOURCE_DATE_EPOCH=1700000000"}, "-q", "--no-cache", ".")
		if r.Code != 0 {
			t.Fatalf("exit %d %s", r.Code, r.Err)
		}
		digests = append(digests, r.Out)
		later := time.Now().Add(time.Hour)
		if err := os.Chtimes(filepath.Join(same, "f"), later, later); err != nil {
			t.Fatal(err)
		}
	}
	if digests[0] != digests[1] || digests[0] == "" {
		t.Errorf("two builds, two digests: %q", digests)
	}
}

// TestBuildSecrets: neither secrets nor agents are in any file that a build leaves.
func TestBuildSecrets(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	// One that is not written here as it is searched for.
	secret := "s3cr" + fmt.Sprint(os.Getpid()) + "et" + fmt.Sprint(time.Now().UnixNano())
	dir := contextOf(t, map[string]string{"Dockerfile": `FROM busybox
RUN --mount=type=secret,id=tok,required=true tr a-z A-Z </run/secrets/tok | wc -c >/len
RUN --mount=type=secret,id=tok,env=TOK test -n "$TOK"
RUN --mount=type=ssh test -S "$SSH_AUTH_SOCK" && echo agent >/agent
RUN test ! -e /run/secrets/tok && test -z "$SSH_AUTH_SOCK" && echo gone >/gone
`})
	file := filepath.Join(t.TempDir(), "tok")
	if err := os.WriteFile(file, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(t.TempDir(), "key")
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(private)}), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, b := range builders(t)[1:] {
		r := d.build(t, b, dir, "", nil, "--no-cache", "--secret", "id=tok,src="+file, "--ssh", "default="+key, "-t", "sec", ".")
		if r.Code != 0 {
			t.Fatalf("%s: exit %d\n%s%s", b.name, r.Code, r.Out, r.Err)
		}
		if got := d.Must(t, "run", "--rm", "sec", "cat", "/len", "/agent", "/gone"); got != fmt.Sprintf("%d\nagent\ngone", len(secret)) {
			t.Errorf("%s: %q", b.name, got)
		}
		if strings.Contains(r.Out+r.Err, secret) || strings.Contains(d.Must(t, "history", "--no-trunc", "sec"), secret) {
			t.Errorf("%s: the secret is shown", b.name)
		}
	}
	for _, root := range []string{d.Root, d.RunRoot} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return nil // gone meanwhile
			}
			if data, err := os.ReadFile(path); err == nil && bytes.Contains(data, []byte(secret)) {
				t.Errorf("the secret is in %s", path)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func writeTar(b *bytes.Buffer, name, text string) error {
	w := tar.NewWriter(b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(text))}); err != nil {
		return err
	}
	if _, err := w.Write([]byte(text)); err != nil {
		return err
	}
	return w.Close()
}
