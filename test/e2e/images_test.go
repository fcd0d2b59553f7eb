package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// tarOf packs entries given as header and content.
func tarOf(t *testing.T, hs ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range hs {
		data := h.Uname // the content travels here, to keep the tables short
		h.Uname, h.Size = "", 0
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(data))
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write([]byte(data)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func file(name, data string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Uname: data}
}

func hexSum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// layout writes an OCI layout with an index of one image for each architecture.
func layout(t *testing.T, path, name string, layers map[string][]byte) {
	t.Helper()
	type desc map[string]any
	var files []tar.Header
	blob := func(mt string, b []byte) desc {
		files = append(files, file("blobs/sha256/"+hexSum(b), string(b)))
		return desc{"mediaType": mt, "digest": "sha256:" + hexSum(b), "size": len(b)}
	}
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var manifests []desc
	for _, arch := range []string{"amd64", "arm64"} {
		l, ok := layers[arch]
		if !ok {
			continue
		}
		conf := blob("application/vnd.oci.image.config.v1+json", encode(map[string]any{"os": "linux", "architecture": arch,
			"config": map[string]any{"Cmd": []string{"/bin/sh"}}, "rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hexSum(l)}}}))
		m := blob("application/vnd.oci.image.manifest.v1+json", encode(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
			"config": conf, "layers": []desc{blob("application/vnd.oci.image.layer.v1.tar", l)}}))
		m["platform"] = map[string]string{"os": "linux", "architecture": arch}
		manifests = append(manifests, m)
	}
	idx := blob("application/vnd.oci.image.index.v1+json", encode(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}))
	idx["annotations"] = map[string]string{"io.containerd.image.name": name}
	files = append(files, file("index.json", string(encode(map[string]any{"schemaVersion": 2, "manifests": []desc{idx}}))),
		file("oci-layout", `{"imageLayoutVersion":"1.0.0"}`))
	if err := os.WriteFile(path, tarOf(t, files...), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestSaveLoadEmptyStore (FEATURES I3): an archive gives the same image ID in a
// store that has never seen the image.
func TestSaveLoadEmptyStore(t *testing.T) {
	a, b := NewDaemon(t), NewDaemon(t)
	a.Busybox(t)
	a.Must(t, "run", "--name", "ctr", "busybox", "sh", "-c", "echo v1 >/version; rm /bin/vi")
	a.Must(t, "commit", "-c", "CMD [\"cat\",\"/version\"]", "ctr", "app:1")
	ar := filepath.Join(t.TempDir(), "app.tar")
	a.Must(t, "save", "-o", ar, "app:1")
	b.Must(t, "load", "-i", ar)
	if x, y := a.Must(t, "inspect", "-f", "{{.Id}}", "app:1"), b.Must(t, "inspect", "-f", "{{.Id}}", "app:1"); x != y {
		t.Errorf("%s became %s", x, y)
	}
	if got := b.Must(t, "run", "--rm", "app:1"); got != "v1" {
		t.Errorf("%q", got)
	}
	if r := b.Docker(t, "run", "--rm", "app:1", "ls", "/bin/vi"); r.Code == 0 {
		t.Error("a removed file is back")
	}
}

// TestPlatforms (FEATURES I4): an index of two architectures.
func TestPlatforms(t *testing.T) {
	d := NewDaemon(t)
	prog, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	layers := map[string][]byte{}
	for _, arch := range []string{"amd64", "arm64"} {
		layers[arch] = tarOf(t, file("bin/sh", string(prog)), file("bin/cat", string(prog)), file("arch", arch))
	}
	ar := filepath.Join(t.TempDir(), "multi.tar")
	layout(t, ar, "docker.io/library/multi:1", layers)
	d.Must(t, "load", "-i", ar)
	for _, arch := range []string{"amd64", "arm64"} { // the program is the host's in both
		if got := d.Must(t, "run", "--rm", "--platform", "linux/"+arch, "multi:1", "/bin/cat", "/arch"); got != arch {
			t.Errorf("%s: %q", arch, got)
		}
	}
	if r := d.Docker(t, "run", "--rm", "--pull", "never", "--platform", "linux/s390x", "multi:1", "/bin/cat", "/arch"); r.Code == 0 {
		t.Errorf("ran for another platform: %s", r.Out)
	}
	part := filepath.Join(t.TempDir(), "part.tar")
	d.Must(t, "save", "--platform", "linux/arm64", "-o", part, "multi:1")
	d.Must(t, "tag", "multi:1", "multi:2")
	d.Sh(t, "docker ps -aq | xargs -r docker rm -f")
	if r := d.Docker(t, "rmi", "--platform", "linux/s390x", "multi:1"); r.Code == 0 {
		t.Errorf("removed what is not there: %s", r.Out)
	}
	if r := d.Docker(t, "rmi", "--platform", "linux/arm64", "multi:1"); r.Code != 0 || !strings.Contains(r.Out, "Deleted: sha256:") {
		t.Errorf("rmi --platform: exit %d, %s%s", r.Code, r.Out, r.Err)
	}
	if r := d.Docker(t, "run", "--rm", "--pull", "never", "--platform", "linux/arm64", "multi:2", "/bin/cat", "/arch"); r.Code == 0 {
		t.Errorf("ran for a removed platform: %s", r.Out)
	}
	if got := d.Must(t, "run", "--rm", "multi:2", "/bin/cat", "/arch"); got != "amd64" {
		t.Errorf("the other platform: %q", got)
	}
	if r := d.Docker(t, "rmi", "--platform", "linux/amd64", "multi:1"); r.Code == 0 || !strings.Contains(r.Err, "nothing would be left") {
		t.Errorf("removing the last: exit %d, %s", r.Code, r.Err)
	}
	d.Must(t, "load", "--platform", "linux/arm64", "-i", part)
	if got := d.Must(t, "run", "--rm", "--platform", "linux/arm64", "multi:1", "/bin/cat", "/arch"); got != "arm64" {
		t.Errorf("loaded again: %q", got)
	}
	r := d.Docker(t, "image", "inspect", "--platform", "linux/s390x", "multi:1")
	if r.Code == 0 || !strings.Contains(r.Err, "linux/amd64") || !strings.Contains(r.Err, "linux/arm64") {
		t.Errorf("another platform: exit %d, %s", r.Code, r.Err)
	}
}

// TestHostileImages (FEATURES M1, M2): what tries to get out of its layer is
// refused or stays inside, and the engine stays up.
func TestHostileImages(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	outside := t.TempDir()
	canary := filepath.Join(outside, "canary")
	if err := os.WriteFile(canary, []byte("alive"), 0o600); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 20) + strings.TrimPrefix(outside, "/")
	for name, es := range map[string][]tar.Header{
		"name":       {file(up+"/canary", "dead")},
		"symlink":    {{Typeflag: tar.TypeSymlink, Name: "e", Linkname: outside}, file("e/canary", "dead")},
		"up":         {{Typeflag: tar.TypeSymlink, Name: "e", Linkname: up}, file("e/canary", "dead")},
		"hard link":  {{Typeflag: tar.TypeSymlink, Name: "e", Linkname: outside}, {Typeflag: tar.TypeLink, Name: "h", Linkname: "e/canary"}, file("h", "dead")},
		"whiteout":   {{Typeflag: tar.TypeSymlink, Name: "e", Linkname: outside}, file("e/.wh.canary", "")},
		"opaque":     {{Typeflag: tar.TypeSymlink, Name: "e", Linkname: outside}, file("e/.wh..wh..opq", "")},
		"long name":  {file(strings.Repeat("n", 300), "x")},
		"duplicates": {file("f", "1"), {Typeflag: tar.TypeDir, Name: "f"}, file("f/g", "2"), file("f", "3")},
		"device":     {{Typeflag: tar.TypeBlock, Name: "sda", Devmajor: 8, Mode: 0o666}, {Typeflag: tar.TypeFifo, Name: "p"}},
		"dev link":   {{Typeflag: tar.TypeSymlink, Name: "dev", Linkname: "/proc"}, {Typeflag: tar.TypeSymlink, Name: "etc", Linkname: outside}, {Typeflag: tar.TypeSymlink, Name: "proc", Linkname: outside}},
	} {
		t.Run(name, func(t *testing.T) {
			ar := filepath.Join(t.TempDir(), "evil.tar")
			layout(t, ar, "docker.io/library/evil:1", map[string][]byte{"amd64": tarOf(t, es...)})
			if r := d.Docker(t, "load", "-q", "-i", ar); r.Code == 0 {
				d.Docker(t, "run", "--rm", "--entrypoint", "/x", "evil:1") // there is nothing to run, but the root is mounted
				d.Must(t, "rmi", "evil:1")
			}
			if b, err := os.ReadFile(canary); err != nil || string(b) != "alive" {
				t.Errorf("canary: %q %v", b, err)
			}
			if l, err := os.ReadDir(outside); err != nil || len(l) != 1 {
				t.Errorf("outside: %v %v", l, err)
			}
		})
	}
	if got := d.Must(t, "run", "--rm", "busybox", "echo", "up"); got != "up" {
		t.Errorf("the engine: %q", got)
	}
}

// TestImportExportHistory: a container's root as a tar and back.
func TestImportExportHistory(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	d.Must(t, "run", "--name", "ctr", "busybox", "sh", "-c", "echo x >/kept; mkdir -p /a/b; ln -s /kept /a/l; chown 12:34 /kept")
	ar := filepath.Join(t.TempDir(), "root.tar")
	d.Must(t, "export", "-o", ar, "ctr")
	d.Must(t, "import", "-m", "from a test", "-c", "ENV A=b", "-c", "CMD [\"sh\",\"-c\",\"cat /a/l; stat -c %u:%g /kept; echo $A\"]", ar, "imp:1")
	if got := d.Must(t, "run", "--rm", "imp:1"); got != "x\n12:34\nb" {
		t.Errorf("%q", got)
	}
	if got := d.Must(t, "history", "--format", "{{.Comment}}", "imp:1"); got != "from a test" {
		t.Errorf("%q", got)
	}
	if r := d.Sh(t, "docker import - nothing </dev/null && docker rmi nothing"); r.Code != 0 {
		t.Errorf("an empty archive: exit %d, %s", r.Code, r.Err)
	}
	// In use, it is not removed; without its name it goes with a prune.
	d.Must(t, "create", "--name", "user", "imp:1")
	if r := d.Docker(t, "rmi", "imp:1"); r.Code == 0 || !strings.Contains(r.Err, "conflict") {
		t.Errorf("exit %d, %s", r.Code, r.Err)
	}
	d.Must(t, "rmi", "-f", "imp:1")
	d.Must(t, "start", "-a", "user")
	d.Must(t, "run", "-d", "--name", "running", "busybox", "sleep", "1000")
	id := d.Must(t, "inspect", "-f", "{{.Image}}", "running")
	if r := d.Docker(t, "rmi", "-f", id); r.Code == 0 || !strings.Contains(r.Err, "cannot be forced") {
		t.Errorf("rmi -f of a running container's image by its ID: exit %d, %s%s", r.Code, r.Out, r.Err)
	}
	d.Must(t, "rm", "-f", "running")
	d.Must(t, "rm", "user")
	if out := d.Must(t, "image", "prune", "-f"); !strings.Contains(out, "deleted: sha256:") {
		t.Errorf("%s", out)
	}
	// Removed by ID and force, nobody sees it any more but its stopped container.
	d.Must(t, "import", "-c", "CMD [\"cat\",\"/kept\"]", ar, "imp:2")
	d.Must(t, "create", "--name", "user", "imp:2")
	id = d.Must(t, "inspect", "-f", "{{.Image}}", "user")
	if out := d.Must(t, "rmi", "-f", id); !strings.Contains(out, "Untagged: imp:2") || !strings.Contains(out, "Deleted: "+id) {
		t.Errorf("%s", out)
	}
	short := id[len("sha256:"):][:12]
	if out := d.Must(t, "images", "-a", "-q"); strings.Contains(out, short) {
		t.Errorf("in the list: %s", out)
	}
	if r := d.Docker(t, "rmi", short); r.Code == 0 || !strings.Contains(r.Err, "No such image") {
		t.Errorf("exit %d, %s%s", r.Code, r.Out, r.Err)
	}
	d.Kill(t)
	d.Start(t)
	d.Must(t, "image", "prune", "-af")
	if got := d.Must(t, "start", "-a", "user"); got != "x" {
		t.Errorf("%q", got)
	}
	d.Must(t, "rm", "user")
	blob := filepath.Join(d.Root, "images", "content", "blobs", "sha256", id[len("sha256:"):])
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) { // polls the collector
		if _, err := os.Stat(blob); os.IsNotExist(err) {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the image's files stay after its last container")
		}
	}
}
