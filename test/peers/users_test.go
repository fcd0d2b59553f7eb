// Package peers has the scripts that install and build the engines that Tenon
// is compared with, and the tests in which they are users of tenon-oci.
package peers

import (
	"archive/tar"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// check is one command line of an engine: its output must match, its exit
// status be the same.
type check struct {
	args string // as typed into a shell, behind the engine's own words
	want string // regular expression, on output and errors together
	code int
	only string // the engine that is asked; empty: all
}

// The same checks for all engines: what each asks of its OCI runtime.
var checks = []check{
	{`run --rm --network none box echo hello`, `^hello\n$`, 0, ""},
	{`run --rm --network none box sh -c 'echo out; echo err >&2; exit 7'`, `out\n(.|\n)*err|err\n(.|\n)*out`, 7, ""},
	{`run --rm --network none box nosuch`, `executable file not found in \$PATH`, 127, ""},
	{`run --rm --network none box /etc`, `(?i)permission denied`, 126, ""},
	{`run --rm --network none box sh -c 'kill -9 $$$$; sleep 1; exit 3'`, ``, 3, ""},
	{`run -d --network none --name idle --memory 64m box sleep 100000`, `^[0-9a-f]{64}\n`, 0, ""},
	{`exec idle sh -c 'echo inside; exit 5'`, `inside`, 5, ""},
	{`exec -u 1000:1001 -w /tmp -e A=b idle sh -c 'id -u; id -g; pwd; echo $A'`, `1000\n1001\n/tmp\nb\n`, 0, ""},
	{`exec idle nosuch; [ $? = 126 -o $? = 127 ]`, `executable file not found in \$PATH`, 0, ""}, // Docker 20 says 126
	{`pause idle`, `idle`, 0, ""},
	{`inspect --format '{{.State.Status}}' idle`, `^paused\n`, 0, ""},
	{`unpause idle`, `idle`, 0, ""},
	{`top idle`, `sleep 100000`, 0, ""},
	{`kill -s USR1 idle`, `idle`, 0, ""},
	{`kill idle`, `idle`, 0, ""},
	{`wait idle`, `^137\n`, 0, ""},
	{`start idle`, `idle`, 0, ""},
	{`rm -f idle`, `idle`, 0, ""},
	{`run --network none --name grows --memory 20m box sh -c 'exec awk "BEGIN{s=\"xxxxxxxxxxxxxxxx\"; while(1) s=s s}"'`, ``, 137, ""},
	// Debian 12's Podman says false on some machines, with runc and crun too.
	{`inspect --format '{{.State.OOMKilled}} {{.State.ExitCode}}' grows`, `^true 137\n`, 0, "docker"},
	{`logs grows`, ``, 0, ""},
	{`run --rm --network none --read-only --tmpfs /t --cap-drop all --security-opt no-new-privileges box ` +
		`sh -c 'touch /x 2>&1; touch /t/x && grep -E "CapEff|NoNew|Seccomp:" /proc/self/status'`,
		`Read-only file system\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n`, 0, ""},
	{`run --rm --network none --privileged box sh -c 'grep Seccomp: /proc/self/status; mount -t tmpfs t /tmp && echo mounted'`, `Seccomp:\t0\nmounted\n`, 0, ""},
	{`run --rm --network none --pids-limit 8 box sh -c 'for i in 1 2 3 4 5 6 7 8 9 10; do sleep 1 & done; wait'`, `Resource temporarily unavailable`, 2, ""},
	// Podman adds a limit of processes that only CAP_SYS_RESOURCE may set.
	{`run --rm --network none --ulimit nofile=100:200 --hostname other box sh -c 'ulimit -n; hostname'`, `^100\nother\n`, 0, "docker"},
	{`run --rm --network none --pid host --ipc host --uts host box sh -c 'ls -d /proc/1'`, `^/proc/1\n`, 0, ""},
	{`run --rm --network none -v /usr/share:/x:ro box sh -c 'touch /x/y'`, `Read-only file system`, 1, ""},
	{`run --rm --network none --user 12:34 box id`, `^uid=12\b.* gid=34\b`, 0, ""},
}

// terminal is tried through script(1), which has a terminal to give.
const terminal = `run --rm -it --network none box sh -c "tty; exit 4"`

// inside runs all checks in namespaces of their own, where prepare has made
// the engine's word do what it says, and compares.
func inside(t *testing.T, name, prepare, engine string) {
	t.Helper()
	var script strings.Builder
	fmt.Fprintf(&script, "mount --make-rprivate /\nip link set lo up\n%s\n", prepare)
	for i, c := range checks {
		if c.only != "" && c.only != name {
			continue
		}
		fmt.Fprintf(&script, "echo '=== begin %d'; timeout 60 %s %s </dev/null 2>&1; echo \"=== end %d $?\"\n", i, engine, c.args, i)
	}
	n := len(checks)
	// Its input is a pipe without an end: an end would be typed into the terminal,
	// after which engines, with any runtime, may let go of the output too.
	fmt.Fprintf(&script, "exec 9<> <(:); echo '=== begin %d'; timeout 60 script -qec '%s %s' /dev/null <&9 2>&1; echo \"=== end %d $?\"\n", n, engine, terminal, n)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute) // --kill-child takes all along
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "-m", "-n", "-p", "-i", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script.String())
	cmd.WaitDelay = 5 * time.Second
	raw, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, raw)
	}
	all := append(append([]check(nil), checks...), check{terminal, `/dev/pts/0`, 4, ""})
	for i, c := range all {
		if c.only != "" && c.only != name {
			continue
		}
		out, code := section(t, string(raw), i)
		if code != c.code || !regexp.MustCompile(c.want).MatchString(out) {
			t.Errorf("%s %s:\nexit %d, want %d; output %q, want %q", engine, c.args, code, c.code, out, c.want)
		}
	}
}

func section(t *testing.T, raw string, i int) (string, int) {
	t.Helper()
	_, rest, _ := strings.Cut(raw, fmt.Sprintf("=== begin %d\n", i))
	out, rest, ok := strings.Cut(rest, fmt.Sprintf("=== end %d ", i))
	if !ok {
		t.Fatalf("no output of check %d in %q", i, raw)
	}
	line, _, _ := strings.Cut(rest, "\n")
	code, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(out, "\r", ""), code
}

// boxArchive is a root of busybox as a tar file, for `import`.
func boxArchive(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("busybox-static is not installed: %v", err)
	}
	add := func(h *tar.Header, body []byte) {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"bin", "etc", "proc", "sys", "dev", "tmp", "root", "t", "x"} {
		add(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755}, nil)
	}
	add(&tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755, Size: int64(len(busybox))}, busybox)
	for _, a := range strings.Fields("sh echo sleep cat id pwd kill touch grep mount ls awk hostname tty true") {
		add(&tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + a, Linkname: "busybox", Mode: 0o777}, nil)
	}
	for name, text := range map[string]string{"etc/passwd": "root:x:0:0::/root:/bin/sh\n", "etc/group": "root:x:0:\n"} {
		add(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(text))}, []byte(text))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// place is a directory with tenon-oci and the archive, and a cgroup parent
// that is removed at the end.
func place(t *testing.T) (dir, parent string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "tenon-peer-") // short: sockets lie in it
	if err != nil {
		t.Fatal(err)
	}
	parent = filepath.Base(dir)
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
		for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
			tops, _ := filepath.Glob(pattern + parent)
			for _, top := range tops {
				removeTree(t, top)
			}
		}
	})
	cmd := exec.Command("go", "build", "-o", dir+"/", "tenon.dev/tenon/cmd/tenon-oci")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	boxArchive(t, filepath.Join(dir, "box.tar"))
	return dir, parent
}

// removeTree removes a cgroup and those below it, whose last processes may
// still be dying.
func removeTree(t *testing.T, dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if e.IsDir() {
			removeTree(t, filepath.Join(dir, e.Name()))
		}
	}
	deadline := time.Now().Add(time.Minute)
	for err := os.Remove(dir); err != nil; err = os.Remove(dir) {
		if time.Now().After(deadline) {
			t.Error(err)
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Fatalf("%s is not installed: run test/peers/podman.sh and test/peers/dockerd.sh", p)
		}
	}
}

// TestPodman: Podman with tenon-oci as its runtime.
func TestPodman(t *testing.T) {
	needs(t, "podman", "conmon", "script")
	t.Parallel()
	dir, parent := place(t)
	engine := filepath.Join(dir, "podman")
	script := fmt.Sprintf(`#!/bin/sh
export PODMAN_IGNORE_CGROUPSV1_WARNING=1
verb=$1
shift
[ "$verb" != run ] || set -- --cgroup-parent /%[2]s --log-driver k8s-file "$@"
exec podman --root %[1]s/root --runroot %[1]s/run --tmpdir %[1]s/tmp --cgroup-manager cgroupfs \
	--events-backend file --runtime %[1]s/tenon-oci "$verb" "$@"
`, dir, parent)
	if err := os.WriteFile(engine, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	prepare := fmt.Sprintf(`
%[2]s import -q %[1]s/box.tar box >/dev/null 2>&1
trap '%[2]s rm -fa -t 0 >/dev/null 2>&1; umount %[1]s/root/overlay 2>/dev/null || true' EXIT
`, dir, engine)
	inside(t, "podman", prepare, engine)
}

// TestDockerd: Docker's daemon with tenon-oci as its default runtime.
func TestDockerd(t *testing.T) {
	needs(t, "dockerd", "containerd", "docker", "script")
	t.Parallel()
	dir, parent := place(t)
	engine := fmt.Sprintf("docker -H unix://%s/sock", dir)
	prepare := fmt.Sprintf(`
echo '{"runtimes":{"tenon":{"path":"%[1]s/tenon-oci"}}}' >%[1]s/daemon.json
dockerd --config-file %[1]s/daemon.json --default-runtime tenon --data-root %[1]s/root --exec-root %[1]s/run \
	--pidfile %[1]s/pid -H unix://%[1]s/sock --bridge none --iptables=false --cgroup-parent /%[2]s >%[1]s/log 2>&1 &
daemon=$!
trap '%[3]s rm -f $(%[3]s ps -aq) >/dev/null 2>&1; kill $daemon; wait $daemon' EXIT
for i in $(seq 300); do %[3]s version >/dev/null 2>&1 && break; sleep 0.1; done
%[3]s import %[1]s/box.tar box >/dev/null || { cat %[1]s/log; exit 1; }
`, dir, parent, engine)
	inside(t, "docker", prepare, engine)
}
