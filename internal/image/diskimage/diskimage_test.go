package diskimage

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var sum = digest.FromString("disk")

const good = `{"architecture":"amd64","os":"linux","config":{"Labels":{"a":"b","dev.tenon.kind":"lie"}},
	"disk":{"format":"qcow2","virtualSize":1048576,"digest":"sha256:1e99bcdb7d8c9f2ab8e9ba1ffd3a7ea8b8bf0ca1b4d8fbd96d7a7b9a8d1d1a3c"}}`

func TestParse(t *testing.T) {
	c, err := Parse([]byte(good))
	if err != nil || c.Disk.Firmware != BIOS || c.Labels()["dev.tenon.kind"] != "disk" || c.Labels()["a"] != "b" || c.Config.Labels["dev.tenon.kind"] != "lie" {
		t.Fatalf("%+v, %v", c, err)
	}
	if c, err = Parse([]byte(strings.Replace(good, "amd64", "arm64", 1))); err != nil || c.Disk.Firmware != UEFI {
		t.Fatalf("%+v, %v", c, err)
	}
	for _, change := range [][2]string{
		{`"qcow2"`, `"vmdk"`}, {`1048576`, `0`}, {`1048576`, `-512`}, {`1048576`, `1000`}, {`sha256:1e`, `sha512:1e`},
		{`"digest"`, `"firmware":"coreboot","digest"`}, {`"digest"`, `"user":"a\nb","digest"`}, {`{"arch`, `["arch`},
	} {
		if _, err := Parse([]byte(strings.Replace(good, change[0], change[1], 1))); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", change, err)
		}
	}
}

func TestLayer(t *testing.T) {
	c := &Config{Disk: Disk{Format: QCOW2, VirtualSize: 512, Digest: sum}}
	l := ocispec.Descriptor{MediaType: LayerQCOW2, Digest: sum, Size: 1}
	if got, err := c.Layer([]ocispec.Descriptor{l}); err != nil || got.Digest != sum {
		t.Fatal(got, err)
	}
	raw, other := l, l
	raw.MediaType, other.Digest = LayerRaw, digest.FromString("other")
	for _, list := range [][]ocispec.Descriptor{nil, {l, l}, {raw}, {other}, {{MediaType: LayerQCOW2, Digest: "sha512:ab"}}} {
		if _, err := c.Layer(list); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", list, err)
		}
	}
}

func tarOf(t testing.TB, name string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// at puts marks into 64 KiB of zeros.
func at(off int, mark string) []byte {
	b := make([]byte, 64<<10)
	copy(b[off:], mark)
	return b
}

func TestSniff(t *testing.T) {
	tarWithBoot := tarOf(t, "manifest.json")
	copy(tarWithBoot[1024:], at(0, "")[:512]) // behind its first header may be anything
	for name, c := range map[string]struct {
		b    []byte
		want string
	}{
		"qcow2": {at(0, "QFI\xfb"), QCOW2}, "boot sector": {at(510, "\x55\xaa"), Raw}, "GPT": {at(512, "EFI PART"), Raw},
		"GPT of 4096": {at(4096, "EFI PART"), Raw}, "ext4": {at(1080, "\x53\xef"), Raw}, "XFS": {at(0, "XFSB"), Raw}, "ISO": {at(32769, "CD001"), Raw},
		"archive": {tarWithBoot, ""}, "zeros": {at(0, ""), ""}, "nothing": {nil, ""}, "short": {[]byte("QFI"), ""}, "text": {[]byte(strings.Repeat("hello ", 200)), ""},
	} {
		if got, err := Sniff(c.b); got != c.want || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, b := range [][]byte{at(0, "KDMV"), at(0, "vhdxfile"), at(64, "\x7f\x10\xda\xbe"), at(0, "\xfd7zXZ\x00"), at(0, "LUKS\xba\xbe")} {
		if got, err := Sniff(b); got != "" || !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q, %v", b[:8], got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Add(at(510, "\x55\xaa")[:2048])
	f.Add(tarOf(f, "a")[:1024])
	f.Fuzz(func(t *testing.T, b []byte) {
		if format, err := Sniff(b); format != "" && (err != nil || isTar(b)) {
			t.Fatal(format, err)
		}
		c, err := Parse(b)
		if err != nil {
			return
		}
		j, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := Parse(j); err != nil || again.Disk != c.Disk {
			t.Fatalf("%+v, %+v, %v", c, again, err)
		}
	})
}
