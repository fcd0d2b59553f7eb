package e2e

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// writeKeys makes a pair of keys, as `openssl genpkey` and `openssl pkey -pubout` do.
func writeKeys(t *testing.T, path string) {
	t.Helper()
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*pem.Block{path + ".key": {Type: "PRIVATE KEY", Bytes: secret}, path + ".pem": {Type: "PUBLIC KEY", Bytes: public}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// A daemon that takes images signed by one key only.
func TestOnlySignedImagesAreTaken(t *testing.T) {
	reg := startRegistry(t, false)
	dir := t.TempDir()
	a := NewDaemon(t)
	for _, k := range []string{"release", "other"} {
		writeKeys(t, filepath.Join(dir, k))
	}
	config := filepath.Join(dir, "tenond.toml")
	text := "[[registries.policy]]\nprefix = '" + reg.addr + "/prod'\nrequire = 'signed'\nkeys = ['" + dir + "/release.pem']\n" +
		"[[registries.policy]]\nprefix = '" + reg.addr + "/never'\nrequire = 'reject'\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	b := NewDaemon(t, "--config", config)
	a.Busybox(t)
	ref, never, child := reg.addr+"/prod/app:1", reg.addr+"/never/app:1", reg.addr+"/prod/app:2"
	for _, name := range []string{ref, never} {
		a.Must(t, "tag", "busybox", name)
		a.Must(t, "push", name)
	}
	dockerfile := filepath.Join(dir, "ctx")
	if err := os.Mkdir(dockerfile, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dockerfile, "Dockerfile"), []byte("FROM "+ref+"\nRUN echo built >/built\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused := func(why string) {
		t.Helper()
		for _, command := range []string{"docker pull " + ref, "docker run --rm " + ref + " true", "tenon run --rm " + ref + " true", "tenon build -t x " + dockerfile} {
			if r := b.Sh(t, command); r.Code == 0 || !strings.Contains(r.Err+r.Out, why) {
				t.Errorf("%s: exit %d, want a refusal that says %q:\n%s%s", command, r.Code, why, r.Out, r.Err)
			}
		}
		if out := b.Must(t, "images", "-q"); out != "" {
			t.Errorf("images are here: %s", out)
		}
	}
	refused("no signature of it was found")
	sign := func(key, ref string) {
		t.Helper()
		if r := a.Sh(t, "tenon image sign "+dir+"/"+key+".key "+ref); r.Code != 0 || !strings.HasPrefix(r.Out, "sha256:") {
			t.Fatalf("sign: %d %s%s", r.Code, r.Out, r.Err)
		}
	}
	sign("other", ref)
	refused("made by none of the keys")
	if r := b.Docker(t, "pull", never); r.Code == 0 || !strings.Contains(r.Err, "rejects such images") {
		t.Errorf("a rejected image: exit %d, %s", r.Code, r.Err)
	}

	sign("release", ref)
	if r := b.Sh(t, "tenon image verify "+ref); r.Code != 0 || !strings.Contains(r.Out, "release.pem") {
		t.Errorf("verify: exit %d %s%s", r.Code, r.Out, r.Err)
	}
	if r := b.Sh(t, "tenon build -t x "+dockerfile+" && tenon run --rm x cat /built"); r.Code != 0 || !strings.Contains(r.Out, "built") {
		t.Errorf("build: exit %d %s%s", r.Code, r.Out, r.Err)
	}
	if out := b.Must(t, "pull", ref); !strings.Contains(out, "Signed by release.pem") {
		t.Errorf("pull: %s", out)
	}
	// The tags that its signatures have are no images.
	if out := b.Must(t, "pull", "-a", reg.addr+"/prod/app"); strings.Contains(out, "sha256-") || b.Must(t, "images", "--format", "{{.Tag}}", reg.addr+"/prod/app") != "1" {
		t.Errorf("pull -a: %s%s", out, b.Must(t, "images"))
	}
	if got := b.Must(t, "run", "--rm", ref, "echo", "ok"); got != "ok" {
		t.Errorf("run: %q", got)
	}
	// What the name is moved to is another image, and not signed.
	a.Must(t, "run", "--name", "c1", "busybox", "sh", "-c", "echo 2 >/v")
	a.Must(t, "commit", "c1", child)
	a.Must(t, "tag", child, ref)
	a.Must(t, "push", ref)
	if r := b.Docker(t, "pull", ref); r.Code == 0 || !strings.Contains(r.Err, "no signature of it was found") {
		t.Errorf("a moved name: exit %d, %s", r.Code, r.Err)
	}
	for command, code := range map[string]int{"verify --key " + dir + "/release.pem " + ref: 0, "verify --key " + dir + "/release.pem " + never: 1} {
		if r := b.Sh(t, "tenon image "+command); r.Code != code {
			t.Errorf("%s: exit %d, want %d: %s%s", command, r.Code, code, r.Out, r.Err)
		}
	}
}
