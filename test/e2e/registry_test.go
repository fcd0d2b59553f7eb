package e2e

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// registry is distribution's own program on a loopback port.
type registry struct {
	addr, dir string
	stop      func() // ends it; it may be called again
}

func startRegistry(t *testing.T, auth bool) *registry {
	t.Helper()
	args := []string{"../tools/registry.sh"}
	if dir := os.Getenv("TENON_TEST_TOOLS"); dir != "" {
		args = append(args, dir)
	}
	out, err := exec.Command("sh", args...).Output()
	if err != nil {
		t.Fatalf("building the registry: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &registry{addr: l.Addr().String(), dir: t.TempDir()}
	_ = l.Close() // the registry takes the port
	config := fmt.Sprintf("version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: %s\n  delete:\n    enabled: true\nhttp:\n  addr: %s\n", r.dir, r.addr)
	if auth {
		// user "me", password "secret" (bcrypt)
		passwd := filepath.Join(t.TempDir(), "htpasswd")
		if err := os.WriteFile(passwd, []byte("me:"+bcryptSecret(t)+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		config += fmt.Sprintf("auth:\n  htpasswd:\n    realm: test\n    path: %s\n", passwd)
	}
	file := filepath.Join(t.TempDir(), "config.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(strings.TrimSpace(string(out)), "serve", file)
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.stop = sync.OnceFunc(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
	})
	t.Cleanup(func() {
		r.stop()
		if t.Failed() {
			t.Logf("registry: %s", log.String())
		}
	})
	eventually(t, "registry", func() string {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			return err.Error()
		}
		return closeErr(c)
	})
	return r
}

func closeErr(c net.Conn) string {
	if err := c.Close(); err != nil {
		return err.Error()
	}
	return ""
}

func TestPushAndPull(t *testing.T) {
	reg := startRegistry(t, false)
	a, b := NewDaemon(t), NewDaemon(t)
	a.Busybox(t)
	ref := reg.addr + "/team/app:1"
	a.Must(t, "run", "--name", "c1", "busybox", "sh", "-c", "head -c 300000 /dev/urandom >/blob; echo v1 >/version")
	a.Must(t, "commit", "c1", ref)
	out := a.Must(t, "push", ref)
	at := strings.Index(out, "sha256:")
	if at < 0 {
		t.Fatalf("push names no digest: %s", out)
	}
	digest := strings.Fields(out[at:])[0]

	b.Must(t, "pull", ref)
	if got := b.Must(t, "run", "--rm", ref, "cat", "/version"); got != "v1" {
		t.Errorf("by tag: %q", got)
	}
	byDigest := reg.addr + "/team/app@" + digest
	b.Must(t, "rmi", ref)
	if got := b.Must(t, "run", "--rm", byDigest, "cat", "/version"); got != "v1" {
		t.Errorf("by digest: %q", got)
	}
	if got := b.Must(t, "inspect", "-f", "{{index .RepoDigests 0}}", byDigest); got != byDigest {
		t.Errorf("RepoDigests: %q, want %q", got, byDigest)
	}
	if r := b.Docker(t, "pull", reg.addr+"/team/app:nosuch"); r.Code == 0 || !strings.Contains(r.Err, "nosuch") {
		t.Errorf("a missing tag: exit %d, %s", r.Code, r.Err)
	}
	other := reg.addr + "/team/app:2"
	a.Must(t, "run", "--name", "c2", ref, "sh", "-c", "echo v2 >/version")
	a.Must(t, "commit", "c2", other)
	a.Must(t, "push", "-a", reg.addr+"/team/app")
	b.Must(t, "pull", "-a", reg.addr+"/team/app")
	for r, want := range map[string]string{ref: "v1", other: "v2"} {
		if got := b.Must(t, "run", "--rm", "--pull", "never", r, "cat", "/version"); got != want {
			t.Errorf("pull -a, %s: %q", r, got)
		}
	}
	if r := b.Docker(t, "pull", "-a", reg.addr+"/team/nosuch"); r.Code == 0 {
		t.Error("pulled all tags of a repository that is not there")
	}
	// Another image under the same name: who asks always gets it.
	a.Must(t, "tag", other, ref)
	a.Must(t, "push", ref)
	for _, c := range []struct{ program, pull, want string }{
		{"docker", "missing", "v1"}, {"tenon", "missing", "v1"}, {"tenon", "never", "v1"}, {"tenon", "always", "v2"}, {"docker", "never", "v2"},
	} {
		if r := b.Sh(t, c.program+" run --rm --pull "+c.pull+" "+ref+" cat /version"); strings.TrimSpace(r.Out) != c.want {
			t.Errorf("%s run --pull %s: %q %s", c.program, c.pull, r.Out, r.Err)
		}
	}
	// Children share their parent's layers: pushing one again moves nothing.
	if out := a.Must(t, "push", ref); !strings.Contains(out, "already exists") {
		t.Errorf("second push: %s", out)
	}
}

func TestFlippedByteIsRefused(t *testing.T) {
	reg := startRegistry(t, false)
	a, b := NewDaemon(t), NewDaemon(t)
	a.Busybox(t)
	ref := reg.addr + "/app:1"
	a.Must(t, "run", "--name", "c1", "busybox", "sh", "-c", "head -c 300000 /dev/urandom >/blob")
	a.Must(t, "commit", "c1", ref)
	a.Must(t, "push", ref)
	flipped := false
	_ = filepath.Walk(reg.dir, func(path string, info os.FileInfo, err error) error {
		if err == nil && !flipped && filepath.Base(path) == "data" && info.Size() > 200000 {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			data[len(data)/2] ^= 1
			flipped = os.WriteFile(path, data, 0o600) == nil
		}
		return nil
	})
	if !flipped {
		t.Fatal("no blob to flip")
	}
	if r := b.Docker(t, "pull", ref); r.Code == 0 {
		t.Error("a layer with a flipped byte was accepted")
	}
	if got := b.Must(t, "images", "-q"); got != "" {
		t.Errorf("half an image is left: %s", got)
	}
}

func TestRegistryAuth(t *testing.T) {
	reg := startRegistry(t, true)
	d := NewDaemon(t)
	d.Busybox(t)
	cfg := t.TempDir()
	d.Must(t, "tag", "busybox", reg.addr+"/app")
	if r := d.Docker(t, "--config", cfg, "push", reg.addr+"/app"); r.Code == 0 {
		t.Error("push without credentials went through")
	}
	if r := d.Docker(t, "--config", cfg, "login", "-u", "me", "-p", "wrong", reg.addr); r.Code == 0 {
		t.Error("login with a wrong password went through")
	}
	d.Must(t, "--config", cfg, "login", "-u", "me", "-p", "secret", reg.addr)
	d.Must(t, "--config", cfg, "push", reg.addr+"/app")
	d.Must(t, "rmi", reg.addr+"/app")
	d.Must(t, "--config", cfg, "pull", reg.addr+"/app")
	if r := d.Docker(t, "--config", t.TempDir(), "pull", reg.addr+"/app"); r.Code == 0 {
		t.Error("pull without credentials went through")
	}
}

func TestMirrors(t *testing.T) {
	reg := startRegistry(t, false)
	a := NewDaemon(t)
	a.Busybox(t)
	a.Must(t, "tag", "busybox", reg.addr+"/library/box:1")
	a.Must(t, "push", reg.addr+"/library/box:1")
	file := filepath.Join(t.TempDir(), "c.toml")
	text := fmt.Sprintf("[registries.mirrors]\n\"docker.io\" = [\"http://127.0.0.1:1\", \"http://%s\"]\n", reg.addr)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	b := NewDaemon(t, "--config", file)
	b.Must(t, "pull", "box:1")
	if got := b.Must(t, "run", "--rm", "box:1", "echo", "mirrored"); got != "mirrored" {
		t.Errorf("got %q", got)
	}
}

// bcryptSecret is the bcrypt hash of the password "secret", by htpasswd (of
// Debian's apache2-utils).
func bcryptSecret(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", "htpasswd -nbBC 5 me secret 2>/dev/null | cut -d: -f2").Output()
	if err != nil || len(bytes.TrimSpace(out)) == 0 {
		t.Fatal("htpasswd is missing: the test set-up installs apache2-utils")
	}
	return string(bytes.TrimSpace(out))
}
