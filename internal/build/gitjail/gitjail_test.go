package gitjail

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh/agent"
)

func TestMain(m *testing.M) {
	if Is(os.Args[0]) {
		os.Exit(Main())
	}
	os.Exit(m.Run())
}

// jail calls git as BuildKit does. An alias stands for a git that a repository has taken
// over: it is any program, in the jail.
type jail struct {
	t         *testing.T
	dir, work string
	path      string
}

func newJail(t *testing.T) *jail {
	t.Helper()
	j := &jail{t: t, dir: filepath.Join(t.TempDir(), "git"), work: t.TempDir()}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	before := os.Getenv("PATH")
	remove, err := Install(j.dir, self)
	if err != nil {
		t.Fatal(err)
	}
	j.path = os.Getenv("PATH")
	if err := remove(); err != nil || os.Getenv("PATH") != before {
		t.Fatalf("PATH is %q, was %q: %v", os.Getenv("PATH"), before, err)
	}
	return j
}

func (j *jail) command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	j.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, filepath.Join(j.dir, Name), append([]string{"-c", "protocol.file.allow=user", "--work-tree", j.work, "--git-dir", filepath.Join(j.work, ".git")}, args...)...)
	cmd.Args[0], cmd.Dir, cmd.WaitDelay = Name, j.work, 5*time.Second
	cmd.Env = []string{"PATH=" + j.path, "LC_ALL=C", "HOME=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null"}
	return cmd
}

func (j *jail) run(args ...string) (string, error) {
	var out bytes.Buffer
	cmd := j.command(args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

func (j *jail) shell(script string) (string, error) { return j.run("-c", "alias.x=!"+script, "x") }

// A git that is somebody else's has nothing of the host.
func TestTakenOver(t *testing.T) {
	j := newJail(t)
	if out, err := j.run("init", "-q"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	beside := filepath.Join(filepath.Dir(j.work), "secret")
	if err := os.WriteFile(beside, []byte("host's"), 0o644); err != nil {
		t.Fatal(err)
	}
	for script, want := range map[string]string{
		"id -u; id -g":                  "65534\n65534\n",
		"cat " + beside:                 "No such file",
		"ls /proc /sys /root /home":     "No such file",
		"cat /etc/shadow":               "No such file",
		"touch /usr/x /etc/x":           "Read-only",
		"ls /":                          "tmp",
		"unshare -U true":               "Operation not permitted",
		"unshare -m true":               "Operation not permitted",
		"mknod n c 1 3":                 "Operation not permitted",
		"echo $$ $PPID $(ls /dev) done": "null random urandom zero done",
		"sh -c 'ulimit -c'":             "0\n",
		"git config core.hooksPath":     "/dev/null",
		"git config protocol.allow":     "never",
		"env -i git config --show-scope core.fsmonitor; git -c core.fsmonitor=false config core.fsmonitor": "false",
	} {
		out, _ := j.shell(script)
		if !strings.Contains(out, want) {
			t.Errorf("%s: %q, want %q", script, out, want)
		}
	}
	if out, _ := j.shell("ls /"); strings.Contains(out, "var") || strings.Contains(out, "home") {
		t.Errorf("the root has %q", out)
	}
}

// What it leaves is root's, without more rights, and what it leads to is untouched.
func TestOwners(t *testing.T) {
	j := newJail(t)
	outside := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(outside, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(outside, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if out, err := j.run("init", "-q"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := j.shell("mkdir -p a/b && cp /bin/true a/suid && chmod 6755 a/suid && echo x >a/b/f && chmod 0 a/b/f && ln -s " + outside + " a/out && ln -s " + filepath.Dir(outside) + " a/dir"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	const levels = 1100 // more than it may have files open
	if out, err := j.shell(fmt.Sprintf("n=0; while [ $n -lt %d ]; do mkdir d && cd d || exit 1; n=$((n+1)); done", levels)); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	deepest := strings.Repeat("d/", levels-1) + "d"
	for _, name := range []string{deepest, ".git/HEAD", "a", "a/b", "a/b/f", "a/suid", "a/out", "a/dir"} {
		info, err := os.Lstat(filepath.Join(j.work, name))
		if err != nil {
			t.Fatal(err)
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != 0 || st.Gid != 0 {
			t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
		}
		if info.Mode()&(os.ModeSetuid|os.ModeSetgid) != 0 {
			t.Errorf("%s is %s", name, info.Mode())
		}
	}
	if info, err := os.Stat(outside); err != nil || info.Sys().(*syscall.Stat_t).Uid != 12345 {
		t.Errorf("a link's end has another owner: %v", err)
	}
	if got, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(got), j.dir) {
		t.Errorf("a mount is left, or %v", err)
	}
}

// It ends when it is told to, whatever it has started.
func TestEnds(t *testing.T) {
	j := newJail(t)
	if out, err := j.run("init", "-q"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, end := range map[string]func(p *os.Process) error{
		"asked":  func(p *os.Process) error { return p.Signal(syscall.SIGTERM) },
		"killed": func(p *os.Process) error { return p.Kill() },
	} {
		cmd := j.command("-c", "alias.x=!trap '' TERM; (setsid sleep 1000 &) ; echo up; sleep 1000", "x")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := end(cmd.Process); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil || time.Since(began) > 20*time.Second {
			t.Errorf("%s: %v after %s", name, err, time.Since(began))
		}
	}
	if out, err := j.shell("dd if=/dev/zero bs=1M count=64 2>&1"); err == nil || !strings.Contains(out, "written more than") {
		t.Errorf("much output: %v, %d bytes", err, len(out))
	}
}

// It stops before the disk is full.
func TestFullDisk(t *testing.T) {
	j := newJail(t)
	if err := syscall.Mount("tmpfs", j.work, "tmpfs", 0, "size=300m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(j.work, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if out, err := j.run("init", "-q"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	began := time.Now()
	if out, err := j.shell("head -c 100000000 /dev/zero >f; sleep 50"); err == nil || !strings.Contains(out, "the disk is full") || time.Since(began) > 40*time.Second {
		t.Errorf("%v after %s: %s", err, time.Since(began), out)
	}
}

// The client's agent is reached, by nobody as well, and no other socket.
func TestAgent(t *testing.T) {
	j := newJail(t)
	sock := filepath.Join(t.TempDir(), "agent")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Chmod(sock, 0o600); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			go func() { _ = agent.ServeAgent(agent.NewKeyring(), c) }() // ends with its client
		}
	}()
	if out, err := j.run("init", "-q"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var out bytes.Buffer
	cmd := j.command("-c", "alias.x=!ssh-add -l", "x")
	cmd.Env = append(cmd.Env, "SSH_AUTH_SOCK="+sock)
	cmd.Stdout, cmd.Stderr = &out, &out
	if _ = cmd.Run(); !strings.Contains(out.String(), "no identities") { // ssh-add ends with 1 then
		t.Errorf("ssh-add says %q", out.String())
	}
}

// Only what BuildKit asks for is known.
func TestCalls(t *testing.T) {
	notes := t.TempDir()
	bare, co := "/s/1/fs", "/s/2/fs"
	parsed := func(args ...string) *call {
		t.Helper()
		c, err := parse(args, []string{"GIT_SSH_COMMAND=ssh -F /dev/null -o UserKnownHostsFile=/t/known", "SSH_AUTH_SOCK=/t/agent"}, "/", "/t", notes)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if c := parsed("--git-dir", bare, "fetch", "/t/b/bundle.pack", "+refs/*:refs/*"); strings.Join(c.from, " ") != "/t/b/bundle.pack" || c.agent != "/t/agent" || c.hosts != "/t/known" {
		t.Errorf("a bundle: %+v", c)
	}
	if c := parsed("--git-dir", bare, "fetch", "file:///etc", "/etc", "/t/../etc"); len(c.from) != 0 {
		t.Errorf("files of the host: %v", c.from)
	}
	for _, ref := range []string{"/t", "/t/other", "file:///t/other"} { // a build says what the commit is called
		for _, args := range [][]string{{"ls-remote", "--", "https://example.invalid/x", ref, ref + "^{}"}, {"fetch", "--depth=1", "--no-tags", "origin", "--force", "--", ref + ":tags/" + ref},
			{"fetch", "--tags", "origin", ref}, {"cat-file", "-e", "--", ref}, {"checkout", ref, "--", "."}, {"fetch", "/t"}} {
			if c := parsed(append([]string{"--git-dir", bare}, args...)...); len(c.from) != 0 {
				t.Errorf("%v: %v", args, c.from)
			}
		}
	}
	parsed("--work-tree", co, "--git-dir", co+"/.git", "remote", "add", "origin", "file://"+bare)
	if c := parsed("--work-tree", co, "--git-dir", co+"/.git", "fetch", "origin"); strings.Join(c.from, " ") != bare || strings.Join(c.owned(), " ") != co {
		t.Errorf("a copy of a repository: %+v", c)
	}
	if c := parsed("--git-dir", "/s/3/fs", "fetch", "origin"); len(c.from) != 0 {
		t.Errorf("another repository: %v", c.from)
	}
	parsed("--work-tree", co, "--git-dir", co+"/.git", "remote", "set-url", "origin", "https://example.invalid/x")
	if c := parsed("--work-tree", co, "--git-dir", co+"/.git", "fetch", "origin"); len(c.from) != 0 {
		t.Errorf("later: %v", c.from)
	}
	for _, bad := range [][]string{{"--exec-path=/x", "fetch"}, {"--git-dir", "../x", "fetch"}, {"--work-tree", "/a/../b", "init"}} {
		if _, err := parse(bad, nil, "/", "/t", notes); err == nil {
			t.Errorf("%v is taken", bad)
		}
	}
}
