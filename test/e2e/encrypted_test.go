package e2e

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// rsaKeys writes NAME.key and NAME.pem.
func rsaKeys(t *testing.T, path string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*pem.Block{path + ".key": {Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}, path + ".pem": {Type: "PUBLIC KEY", Bytes: public}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// sealedLayers tells which layers of an image in a registry are encrypted.
func sealedLayers(t *testing.T, addr, repo string) (out []bool) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+"/v2/"+repo+"/manifests/1", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	var m ocispec.Manifest
	if err != nil || json.Unmarshal(b, &m) != nil || len(m.Layers) == 0 {
		t.Fatalf("manifest of %s: %v %s", repo, err, b)
	}
	for _, l := range m.Layers {
		sealed := strings.HasSuffix(l.MediaType, "+encrypted")
		if sealed != (l.Annotations["org.opencontainers.image.enc.pubopts"] != "") {
			t.Errorf("%s: a layer of %s with the annotations %v", repo, l.MediaType, l.Annotations)
		}
		out = append(out, sealed)
	}
	return out
}

// An encrypted image runs with its key, and without it nothing of it is to be had: on any
// kernel, by its name when it is here already, on a machine's own socket.
func TestEncryptedImages(t *testing.T) {
	t.Parallel()
	reg := startRegistry(t, false)
	dir := t.TempDir()
	for _, k := range []string{"team", "other"} {
		rsaKeys(t, filepath.Join(dir, k))
	}
	plain, ref := reg.addr+"/e/plain:1", reg.addr+"/e/secret:1"
	with := " --decryption-key " + dir + "/team.key "

	a := NewDaemon(t)
	a.Busybox(t)
	a.Must(t, "run", "--name", "c1", "busybox", "sh", "-c", "echo hidden >/secret")
	a.Must(t, "commit", "c1", plain)
	a.Must(t, "tag", plain, ref)
	a.Must(t, "push", plain)
	sh := func(d *Daemon, script string) string {
		t.Helper()
		r := d.Sh(t, script)
		if r.Code != 0 {
			t.Fatalf("%s: exit %d\n%s%s", script, r.Code, r.Out, r.Err)
		}
		return strings.TrimSpace(r.Out)
	}
	sh(a, "tenon push --encryption-key jwe:"+dir+"/team.pem "+ref)
	if got := sealedLayers(t, reg.addr, "e/secret"); !slices.Equal(got, []bool{true, true}) {
		t.Errorf("encrypted layers: %v", got)
	}

	d := newVMDaemon(t)
	refused := func(d *Daemon, scripts ...string) {
		t.Helper()
		for _, s := range scripts {
			if r := d.Sh(t, s); r.Code == 0 || !strings.Contains(r.Out+r.Err, "is encrypted for 1 by jwe") {
				t.Errorf("%s: exit %d, want a refusal: %s%s", s, r.Code, r.Out, r.Err)
			}
		}
	}
	refused(d, "docker pull "+ref, "docker run --rm "+ref+" cat /secret", "tenon pull --decryption-key "+dir+"/other.key "+ref)
	if out := d.Must(t, "images", "-aq"); out != "" {
		t.Errorf("images are here after refusals: %s", out)
	}
	d.Busybox(t)
	d.tenon(t, "machine create m --memory 512m --disk 1g")
	for _, isolation := range []string{"process", "vm", "machine=m"} {
		mode := " --rm --isolation " + isolation + " "
		if got := sh(d, "tenon run"+mode+with+ref+" cat /secret"); got != "hidden" {
			t.Errorf("%s: %q", isolation, got)
		}
		refused(d, "docker run"+mode+ref+" cat /secret", "tenon run"+mode+"--decryption-key "+dir+"/other.key "+ref+" cat /secret")
	}
	refused(d, "docker create --mount type=image,source="+ref+",target=/x busybox", "tenon image sbom "+ref,
		"printf 'FROM "+ref+"\\nRUN cat /secret\\n' | docker build -", "docker -H unix://"+d.machine(t, "m").Socket+" run --rm "+ref+" cat /secret")
	if out := d.Must(t, "ps", "-aq"); out != "" {
		t.Errorf("containers are here after refusals: %s", out)
	}
	// A container that was made with the key starts without, and again.
	if got := sh(d, "docker image rm "+ref+" >/dev/null; tenon create --name kept"+with+ref+" cat /secret >/dev/null; docker start -a kept; docker start -a kept; docker rm kept >/dev/null"); got != "hidden\nhidden" {
		t.Errorf("a container that was created with the key: %q", got)
	}
	// What is pushed of it is as it came.
	sh(d, "docker tag "+ref+" "+reg.addr+"/e/copy:1 && docker push "+reg.addr+"/e/copy:1")
	if got := sealedLayers(t, reg.addr, "e/copy"); !slices.Equal(got, []bool{true, true}) {
		t.Errorf("encrypted layers of a copy: %v", got)
	}
}

// A daemon that has the key in its settings serves clients that know nothing of it; and
// what skopeo encrypts and decrypts is the same.
func TestEncryptedImagesByTheSettings(t *testing.T) {
	t.Parallel()
	reg := startRegistry(t, false)
	dir := t.TempDir()
	rsaKeys(t, filepath.Join(dir, "team"))
	config := filepath.Join(dir, "tenond.toml")
	if err := os.WriteFile(config, []byte("[images]\ndecryption-keys = ['"+dir+"/team.key']\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := NewDaemon(t, "--config", config)
	d.Busybox(t)
	at := reg.addr + "/e/"
	script := func(s string) string {
		t.Helper()
		r := d.Sh(t, "set -e; "+s)
		if r.Code != 0 {
			t.Fatalf("%s: exit %d\n%s%s", s, r.Code, r.Out, r.Err)
		}
		return strings.TrimSpace(r.Out)
	}
	script("docker tag busybox " + at + "plain:1; docker push -q " + at + "plain:1; docker tag busybox " + at + "ours:1; tenon push --encryption-key jwe:" + dir + "/team.pem " + at + "ours:1; docker rmi " + at + "ours:1")
	const skopeo = "skopeo copy -q --src-tls-verify=false --dest-tls-verify=false "
	script(skopeo + "--encryption-key jwe:" + dir + "/team.pem docker://" + at + "plain:1 docker://" + at + "theirs:1")
	script(skopeo + "--decryption-key " + dir + "/team.key docker://" + at + "ours:1 docker://" + at + "back:1")
	if got := sealedLayers(t, reg.addr, "e/back"); got[0] {
		t.Error("skopeo has not decrypted it")
	}
	for _, name := range []string{"ours:1", "theirs:1"} {
		if got := script("docker run --rm " + at + name + " echo runs"); got != "runs" {
			t.Errorf("%s: %q", name, got)
		}
	}
	got := script("printf 'FROM " + at + "theirs:1\\nRUN echo built >/own\\n' | docker build -q -t " + at + "child:1 - >/dev/null; docker run --rm " + at + "child:1 cat /own; docker push -q " + at + "child:1 >/dev/null")
	if got != "built" {
		t.Errorf("what was built on an encrypted image: %q", got)
	}
	if got := sealedLayers(t, reg.addr, "e/child"); !slices.Equal(got, []bool{true, false}) {
		t.Errorf("encrypted layers of a child: %v", got)
	}
}
