package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The engine is a registry: stock clients of another engine push and pull, what is
// pushed is an image at once, blobs are not kept twice, a push that dies leaves nothing.
func TestEngineAsRegistry(t *testing.T) {
	other, err := net.Listen("tcp", "127.0.0.1:0") // it has the address when the daemon starts
	if err != nil {
		t.Fatal(err)
	}
	addr := other.Addr().String()
	a, b := NewDaemon(t, "--registry-listen", addr), NewDaemon(t)
	b.Busybox(t)
	if r := a.Docker(t, "info"); !strings.Contains(r.Err, "WARNING: registry: ") {
		t.Errorf("info does not tell of the registry that is missing: %s", r.Err)
	}
	if r := a.Sh(t, "tenon doctor"); !strings.Contains(r.Out, "address already in use") {
		t.Errorf("doctor does not either:\n%s%s", r.Out, r.Err)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the registry", func() string {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err.Error()
		}
		return closeErr(c)
	})
	ref := addr + "/team/app:1"
	b.Must(t, "run", "--name", "c1", "busybox", "sh", "-c", "head -c 300000 /dev/urandom >/blob; echo v1 >/version")
	b.Must(t, "commit", "c1", ref)
	b.Must(t, "push", ref)
	if got := a.Must(t, "images", "--format", "{{.Repository}}:{{.Tag}}"); got != ref {
		t.Errorf("images of the registry's engine: %q", got)
	}
	if got := a.Must(t, "run", "--rm", "--pull", "never", ref, "cat", "/version"); got != "v1" {
		t.Errorf("the pushed image says %q", got)
	}
	// A child in another repository: what its base has is mounted.
	b.Must(t, "tag", ref, addr+"/team/other:1")
	if out := b.Must(t, "push", addr+"/team/other:1"); !strings.Contains(out, "Mounted from team/app") {
		t.Errorf("nothing was mounted:\n%s", out)
	}
	// The engine's own images can be pulled by their names, and by clients that take it
	// for a mirror.
	a.Must(t, "tag", ref, "busybox:theirs")
	b.Must(t, "rm", "c1")
	b.Must(t, "rmi", ref, addr+"/team/other:1", "busybox")
	b.Must(t, "pull", addr+"/busybox:theirs")
	b.Must(t, "pull", "-a", addr+"/team/app")
	if got := b.Must(t, "run", "--rm", "--pull", "never", ref, "cat", "/version"); got != "v1" {
		t.Errorf("pulled: %q", got)
	}
	if r := b.Docker(t, "push", addr+"/busybox:theirs"); r.Code != 0 {
		t.Errorf("push: %s", r.Err)
	}
	if got := a.Must(t, "images", "-q", "--no-trunc", "busybox:theirs"); got != a.Must(t, "images", "-q", "--no-trunc", ref) {
		t.Error("a push has taken a name of the engine's own")
	}

	// The daemon dies in the middle of an upload.
	c := &http.Client{Timeout: patience(time.Minute)}
	resp, err := c.Post("http://"+addr+"/v2/team/app/blobs/uploads/", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience(time.Minute))
	defer cancel()
	body, send := net.Pipe()
	defer body.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodPatch, "http://"+addr+resp.Header.Get("Location"), body)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if resp, err := http.DefaultClient.Do(req); err == nil {
			_ = resp.Body.Close()
		}
	}()
	if _, err := send.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	ingest := filepath.Join(a.Root, "images", "content", "ingest-t")
	eventually(t, "the upload is on the disk", func() string {
		ents, err := os.ReadDir(ingest)
		if err != nil || len(ents) != 1 {
			return fmt.Sprint(len(ents), err)
		}
		return ""
	})
	a.Kill(t)
	_ = send.Close()
	<-ended
	a.Start(t)
	if ents, err := os.ReadDir(ingest); err != nil || len(ents) > 0 {
		t.Errorf("of the upload %d files are left, %v", len(ents), err)
	}
	b.Must(t, "pull", ref)
}

// `tenon registry serve` with users, and logins by a credential helper.
func TestRegistryServeAndLogin(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	users := filepath.Join(t.TempDir(), "users")
	if err := os.WriteFile(users, []byte("me:"+bcryptSecret(t)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience(3*time.Minute)) // it outlasts all that is done with it
	defer cancel()
	serve := exec.CommandContext(ctx, filepath.Join(d.Bin, "tenon"), "registry", "serve", "--listen", "127.0.0.1:0", "--htpasswd", users)
	serve.Env = d.Environ()
	serve.WaitDelay = 5 * time.Second
	out, err := serve.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("registry serve says nothing: ", serve.Wait())
	}
	_, rest, _ := strings.Cut(lines.Text(), "http://")
	addr, _, _ := strings.Cut(rest, ";")

	// A helper as there are for keychains: it keeps credentials in a file by server.
	dir := t.TempDir()
	helper := `#!/bin/sh
cd "$KEYS" || exit 1
case $1 in
store)
	in=$(cat)
	f=$(printf %s "$in" | sed 's/.*"ServerURL": *"\([^"]*\)".*/\1/' | tr / _)
	printf %s "$in" >"$f" ;;
get)
	f=$(cat | tr / _)
	[ -f "$f" ] || { echo "credentials not found in native keychain"; exit 1; }
	cat "$f" ;;
erase) rm -f "$(cat | tr / _)" ;;
*) exit 2 ;;
esac
`
	keys := filepath.Join(dir, "keys")
	config := filepath.Join(dir, "config")
	for _, p := range []string{keys, config} {
		if err := os.Mkdir(p, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-testkeys"), []byte(helper), 0o700); err != nil {
		t.Fatal(err)
	}
	ref := addr + "/box:1"
	d.Must(t, "tag", "busybox", ref)
	script := `export PATH="$1:$PATH" KEYS="$2" DOCKER_CONFIG="$3"; addr=$4; ref=$5; set -e
deny() { if "$@" >out 2>&1; then echo "went through: $*"; exit 1; fi; }
cd "$3"
for way in '"credsStore":"testkeys"' "\"credHelpers\":{\"$addr\":\"testkeys\"}" '"x":1'; do
	echo "{$way}" >config.json
	deny tenon push "$ref"
	echo wrong | deny tenon login -u me --password-stdin "$addr"
	echo secret | tenon login -u me --password-stdin "$addr" 2>/dev/null
	case $way in
	*testkeys*) grep -q secret "$KEYS"/*; deny grep -q '"auth":' config.json ;;
	*) grep -q '"auth":' config.json; test "$(stat -c %a config.json)" = 600 ;;
	esac
	tenon push "$ref"; tenon pull "$ref"; docker --config "$3" push "$ref"
	tenon run --rm --pull always "$ref" true
	tenon logout "$addr"
	deny tenon pull "$ref"; deny docker --config "$3" pull "$ref"
	test -z "$(ls "$KEYS")"
done
echo '{"credsStore":"nosuch"}' >config.json
deny tenon push "$ref"; grep -q docker-credential-nosuch out
`
	if r := d.Sh(t, script, dir, keys, config, addr, ref); r.Code != 0 {
		t.Errorf("exit %d\n%s%s", r.Code, r.Out, r.Err)
	}
	// It shows what it answers, and ends with the command.
	if err := serve.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	var log []string
	for lines.Scan() {
		log = append(log, lines.Text())
	}
	if err := serve.Wait(); err != nil {
		t.Errorf("registry serve: %v", err)
	}
	if all := strings.Join(log, "\n"); !strings.Contains(all, `me HEAD "/v2/box/manifests/1" 200`) || !strings.Contains(all, " 401 ") {
		t.Errorf("requests shown:\n%s", all)
	}
	eventually(t, "the registry's end", func() string {
		if c, err := net.Dial("tcp", addr); err == nil {
			_ = c.Close()
			return "it listens still"
		}
		return ""
	})
	// What would be open to all is refused.
	if r := d.Sh(t, "tenon registry serve --listen 0.0.0.0:0"); r.Code == 0 || !strings.Contains(r.Err, "--htpasswd") {
		t.Errorf("exit %d, %s", r.Code, r.Err)
	}
}
