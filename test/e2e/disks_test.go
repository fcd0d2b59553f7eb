package e2e

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDiskImages: disks with an operating system are images for all verbs that need no
// files: stock clients load, list, tag, save, push, pull and remove them, what needs
// files refuses them, and hostile disks are refused. (Running them: TestSystem….)
func TestDiskImages(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	own := l.Addr().String()
	if err := l.Close(); err != nil { // the daemon takes the port
		t.Fatal(err)
	}
	r, d := startRegistry(t, false), NewDaemon(t, "--registry-listen", own)
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	raw := make([]byte, 32<<20) // nearly all of it holes
	copy(raw[510:], "\x55\xaa")
	if _, err := rand.Read(raw[8<<20 : 8<<20+100000]); err != nil {
		t.Fatal(err)
	}
	qcow2 := make([]byte, 4<<16) // an empty disk of 1 GiB
	be := binary.BigEndian
	copy(qcow2, "QFI\xfb")
	for off, v := range map[int]uint32{4: 3, 20: 16, 36: 2, 56: 1, 96: 4, 100: 104} {
		be.PutUint32(qcow2[off:], v)
	}
	for off, v := range map[int]uint64{24: 1 << 30, 40: 3 << 16, 48: 1 << 16} {
		be.PutUint64(qcow2[off:], v)
	}
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	if _, err := w.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	disk := write("Debian 12.qcow2", qcow2)
	sh := func(script string) string {
		t.Helper()
		r := d.Sh(t, "set -e; cd "+dir+"\n"+script)
		if r.Code != 0 {
			t.Fatalf("%s\n%s%s", script, r.Out, r.Err)
		}
		return r.Out
	}
	write("disk.raw.gz", gz.Bytes())
	if out := sh("tenon load 'Debian 12.qcow2'"); !strings.Contains(out, "Loaded image: debian-12:latest") {
		t.Error(out)
	}
	if out := sh("tenon load -i disk.raw.gz --tag os:1 --label team=a --firmware uefi"); !strings.Contains(out, "Loaded image: os:1") {
		t.Error(out)
	}
	id := d.Must(t, "images", "-q", "--no-trunc", "debian-12")
	if out := d.Must(t, "load", "-i", disk); out != "Loaded image ID: "+id {
		t.Errorf("docker load: %s, the same disk is %s", out, id)
	}
	if out := sh("tenon images --format '{{.Repository}} {{.Kind}}' | sort; tenon images"); !strings.HasPrefix(out, "debian-12 disk\nos disk\n") || !strings.Contains(out, "KIND") {
		t.Error(out)
	}
	if out := d.Must(t, "images", "-q", "--filter", "label=dev.tenon.kind=disk", "--filter", "label=team=a"); len(strings.Fields(out)) != 1 {
		t.Error(out)
	}
	if out := d.Must(t, "inspect", "-f", `{{.Os}} {{.Descriptor.artifactType}} {{index .Config.Labels "dev.tenon.disk.virtual-size"}} {{index .Config.Labels "dev.tenon.disk.firmware"}}`, "os:1"); out != "linux application/vnd.tenon.disk.v1 33554432 uefi" {
		t.Error(out)
	}
	if out := d.Must(t, "history", "--format", "{{.CreatedBy}} {{.Size}}", "os:1"); !strings.HasPrefix(out, "load raw disk ") || strings.HasSuffix(out, " 0B") {
		t.Error(out)
	}

	// Through the field's registry and our own, and through an archive.
	os1 := d.Must(t, "images", "-q", "--no-trunc", "os:1")
	for _, addr := range []string{r.addr, own} {
		for local, ref := range map[string]string{"os:1": addr + "/team/os:1", id: addr + "/team/debian:12"} {
			d.Must(t, "tag", local, ref)
			d.Must(t, "push", "-q", ref)
		}
	}
	d.Must(t, "save", "-o", filepath.Join(dir, "both.tar"), "os:1", "debian-12")
	d.Sh(t, "docker rmi -f $(docker images -q --no-trunc | sort -u)")
	if out := d.Must(t, "images", "-q"); out != "" {
		t.Errorf("left: %s", out)
	}
	d.Must(t, "pull", "-q", r.addr+"/team/os@"+os1)
	d.Must(t, "pull", "-q", r.addr+"/team/debian:12")
	if out := d.Must(t, "images", "-q", "--no-trunc"); !strings.Contains(out, os1) || !strings.Contains(out, id) {
		t.Error(out)
	}
	sh("docker rmi -f " + os1 + "; docker load -q -i both.tar")
	files, err := filepath.Glob(filepath.Join(d.Root, "images/disks/*"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	if b, err := os.ReadFile(files[0]); err != nil || !bytes.Equal(b, raw) {
		t.Errorf("the disk has changed: %v", err)
	}
	if out := strings.Fields(sh("du -B1 " + files[0])); len(out) == 0 || len(out[0]) > 6 {
		t.Errorf("holes are not holes: %s", out)
	}

	// What needs files, and what is no disk that can be used.
	write("Dockerfile", []byte("FROM os:1\nRUN true\n"))
	backed := bytes.Clone(qcow2)
	be.PutUint64(backed[8:], 512)
	be.PutUint32(backed[16:], 11)
	copy(backed[512:], "/etc/shadow")
	write("backed.qcow2", backed)
	write("text", bytes.Repeat([]byte("no disk\n"), 200))
	for script, want := range map[string]string{
		"docker run --rm os:1 true":                      "--isolation machine",
		"docker create --isolation vm os:1 true":         "--isolation machine",
		"docker build -q .":                              "--isolation machine",
		"tenon image sbom os:1":                          "--isolation machine",
		"docker load -i backed.qcow2":                    "backing file",
		"docker load -i text":                            "neither a tar archive nor a disk",
		"docker import backed.qcow2 x:1":                 "backing file",
		"tenon load -i text --disk raw --firmware magic": "neither bios nor uefi",
		"tenon load 'Debian 12.qcow2' --tag 'No Name'":   "invalid reference",
	} {
		if out := d.Sh(t, "cd "+dir+"\n"+script); !strings.Contains(out.Out+out.Err, want) {
			t.Errorf("%s: %s%s", script, out.Out, out.Err)
		}
	}
	if out := sh("docker image prune -af >&2; docker images -q | wc -l; tenon system df | grep Images"); !strings.HasPrefix(out, "0\n") || !strings.Contains(out, "0B") {
		t.Errorf("pruned: %s", out)
	}
}
