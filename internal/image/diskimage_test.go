package image

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/image/diskimage"
)

// qcow2Disk is the header of an empty qcow2 disk, with the tables that it names.
func qcow2Disk(virtual uint64) []byte {
	const cluster = 65536
	b := make([]byte, 4*cluster)
	be := binary.BigEndian
	copy(b, "QFI\xfb")
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], 16)
	be.PutUint64(b[24:], virtual)
	be.PutUint32(b[36:], 8)
	be.PutUint64(b[40:], 3*cluster)
	be.PutUint64(b[48:], cluster)
	be.PutUint32(b[56:], 1)
	be.PutUint32(b[96:], 4)
	be.PutUint32(b[100:], 104)
	return b
}

// rawDisk is a disk of size bytes with a boot sector, and something at its end.
func rawDisk(t testing.TB, size int) []byte {
	t.Helper()
	b := make([]byte, size)
	copy(b[510:], "\x55\xaa")
	if _, err := rand.Read(b[size-4096:]); err != nil {
		t.Fatal(err)
	}
	return b
}

func loadADisk(t testing.TB, s *Store, b []byte, o DiskOptions) *Image {
	t.Helper()
	l, err := s.Load(t.Context(), bytes.NewReader(b), LoadOptions{Disk: o})
	if err != nil || len(l) != 1 {
		t.Fatal(l, err)
	}
	img, err := s.Resolve(t.Context(), l[0].ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// sameDisk checks what a machine would see of a raw disk.
func sameDisk(t testing.TB, s *Store, img *Image, want []byte) string {
	t.Helper()
	f, release, err := s.DiskFile(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	b, err := os.ReadFile(f.Path)
	if err != nil || !bytes.Equal(b, want) {
		t.Fatalf("%s: %d bytes, want %d, %v", f.Path, len(b), len(want), err)
	}
	return f.Path
}

func TestLoadDisk(t *testing.T) {
	s := open(t)
	raw, q := rawDisk(t, 4<<20), qcow2Disk(1<<30)
	img := loadADisk(t, s, raw, DiskOptions{Names: []string{"os:1"}, Labels: map[string]string{"a": "b"}, User: "debian"})
	if d := img.Disk; d == nil || d.Disk.Format != "raw" || d.Disk.VirtualSize != 4<<20 || d.Disk.Firmware != diskimage.DefaultFirmware(img.Platform.Architecture) || img.Ref() != "os:1" {
		t.Fatalf("%+v", img)
	}
	l := img.Config.Config.Labels
	if l["a"] != "b" || l[imageapi.LabelKind] != "disk" || l[imageapi.LabelDiskVirtualSize] != strconv.Itoa(4<<20) || l[imageapi.LabelDiskUser] != "debian" {
		t.Fatal(l)
	}
	path := sameDisk(t, s, img, raw)
	if n, err := ownBlocks(path); err != nil || n > 1<<20 {
		t.Fatalf("%d bytes of holes and 5 KiB: %v", n, err)
	}
	// The same disk is the same image, compressed or not.
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	if _, err := w.Write(q); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	a, b := loadADisk(t, s, q, DiskOptions{}), loadADisk(t, s, gz.Bytes(), DiskOptions{Suggested: "guess"})
	if a.ID != b.ID || b.Ref() != "guess:latest" || a.Disk.Disk.VirtualSize != 1<<30 || a.Disk.Disk.Digest != a.LayerDescs[0].Digest {
		t.Fatalf("%+v, %+v", a, b)
	}
	sameDisk(t, s, a, q)
	imported, err := s.Import(t.Context(), bytes.NewReader(gz.Bytes()), ImportOptions{Ref: "imported"})
	if err != nil || imported.ID != a.ID || len(imported.RepoTags) != 2 {
		t.Fatalf("%+v, %v", imported, err)
	}
	if _, err := s.Layers(t.Context(), img); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "--isolation machine") {
		t.Fatal(err)
	}
	if _, err := s.EROFS(t.Context(), img); !errdefs.IsInvalidArgument(err) {
		t.Fatal(err)
	}
	h, err := s.History(t.Context(), "os:1", nil)
	if err != nil || len(h) != 1 || h[0].Size == 0 || h[0].CreatedBy != "load raw disk" {
		t.Fatal(h, err)
	}
}

func TestLoadDiskRefuses(t *testing.T) {
	s := open(t, func(c *Config) { c.Limits.DiskBytes = 8 << 20 })
	backed := qcow2Disk(1 << 20)
	binary.BigEndian.PutUint64(backed[8:], 512)
	binary.BigEndian.PutUint32(backed[16:], 11)
	copy(backed[512:], "/etc/shadow")
	tarred := mkTar(t, fileEntry("QFI{", "x"))
	tarred[3] = 0xfb // which is 0o200 more
	sum, err := strconv.ParseInt(strings.Trim(string(tarred[148:156]), " \x00"), 8, 64)
	if err != nil {
		t.Fatal(err)
	}
	copy(tarred[148:], fmt.Sprintf("%06o\x00 ", sum+0o200))
	for name, c := range map[string]struct {
		b    []byte
		o    DiskOptions
		want string
	}{
		"backing file":    {backed, DiskOptions{}, "backing file"},
		"too large":       {qcow2Disk(9 << 20), DiskOptions{}, "max-disk-size"},
		"too large raw":   {rawDisk(t, 9<<20), DiskOptions{}, "max-disk-size"},
		"half a sector":   {rawDisk(t, 1<<20+100), DiskOptions{}, "whole sectors"},
		"VMDK":            {append([]byte("KDMV"), make([]byte, 4096)...), DiskOptions{}, "VMDK"},
		"both":            {tarred, DiskOptions{}, "at once"},
		"zeros":           {make([]byte, 1<<20), DiskOptions{}, "neither a docker archive"},
		"anything":        {bytes.Repeat([]byte("text\n"), 1000), DiskOptions{}, "--disk raw"},
		"no qcow2":        {rawDisk(t, 1<<20), DiskOptions{Format: "qcow2"}, "magic"},
		"format":          {rawDisk(t, 1<<20), DiskOptions{Format: "vmdk"}, "neither qcow2 nor raw"},
		"firmware":        {rawDisk(t, 1<<20), DiskOptions{Firmware: "coreboot"}, "neither bios nor uefi"},
		"name":            {rawDisk(t, 1<<20), DiskOptions{Names: []string{"A B"}}, "reference"},
		"cut off":         {qcow2Disk(1 << 20)[:70], DiskOptions{}, "ends within"},
		"tables cut off":  {qcow2Disk(1 << 20)[:100000], DiskOptions{}, "within the file"},
		"unknown archive": {mkTar(t, fileEntry("a", "x")), DiskOptions{}, "neither a docker archive"},
	} {
		_, err := s.Load(t.Context(), bytes.NewReader(c.b), LoadOptions{Disk: c.o})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	loadADisk(t, s, make([]byte, 1<<20), DiskOptions{Format: "raw"}) // when it is said, zeros are a disk
	if all, err := s.All(t.Context()); err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
}

// A disk image goes through an archive whole, and what it left goes when it is removed.
func TestSaveLoadDisk(t *testing.T) {
	s, other := open(t), open(t)
	raw := rawDisk(t, 2<<20)
	img := loadADisk(t, s, raw, DiskOptions{Names: []string{"os:1"}})
	var b bytes.Buffer
	if err := s.Save(t.Context(), &b, []string{"os:1"}, nil); err != nil {
		t.Fatal(err)
	}
	l, err := other.Load(t.Context(), bytes.NewReader(b.Bytes()), LoadOptions{})
	if err != nil || len(l) != 1 || l[0].ID != img.ID || l[0].Ref != "os:1" {
		t.Fatal(l, err)
	}
	again, err := other.Resolve(t.Context(), "os:1", nil)
	if err != nil || again.Disk == nil {
		t.Fatal(err)
	}
	path := sameDisk(t, other, again, raw)
	sp, err := other.Space(t.Context())
	if err != nil || sp.Disks == 0 {
		t.Fatalf("%+v, %v", sp, err)
	}
	if du, err := other.DiskUsage(t.Context(), false); err != nil || du.TotalSize != sp.Images() || du.Reclaimable != du.TotalSize {
		t.Fatalf("%+v, %+v, %v", du, sp, err)
	}
	if err := os.Remove(path); err != nil { // it is made again when it is asked for
		t.Fatal(err)
	}
	sameDisk(t, other, again, raw)
	if _, err := other.Remove(t.Context(), "os:1", RemoveOptions{}, nil); err != nil {
		t.Fatal(err)
	}
	other.gate.Lock()
	_, err = other.collect()
	other.gate.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Fatal(err)
	}
}

// A compressed disk that isn't what its config says comes to nothing.
func TestDiskLies(t *testing.T) {
	s := open(t)
	img := loadADisk(t, s, rawDisk(t, 2<<20), DiskOptions{})
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	end, err := s.begin()
	if err != nil {
		t.Fatal(err)
	}
	defer end()
	layer, err := s.putBlob("", z.EncodeAll(make([]byte, 64<<20), nil)) // a bomb
	if err != nil {
		t.Fatal(err)
	}
	lie := *img
	lie.LayerDescs = append(lie.LayerDescs[:0:0], layer)
	if err := s.placeDisk(context.Background(), &lie); !errdefs.IsDataLoss(err) {
		t.Fatal(err)
	}
	if ents, err := os.ReadDir(s.layerTmp()); err != nil || len(ents) > 0 {
		t.Fatal(ents, err)
	}
}

// disk puts a disk image into the registry, and returns its manifest.
func (f *fakeRegistry) disk(arch, format string, layer, disk []byte, change func(c *diskimage.Config, l *ocispec.Descriptor)) ocispec.Descriptor {
	mt := diskimage.LayerQCOW2
	if format == diskimage.Raw {
		mt = diskimage.LayerRaw
	}
	l := f.put(mt, layer)
	c := &diskimage.Config{Platform: ocispec.Platform{OS: "linux", Architecture: arch}}
	c.Disk = diskimage.Disk{Format: format, VirtualSize: int64(len(disk)), Digest: digest.FromBytes(disk)}
	if change != nil {
		change(c, &l)
	}
	m := f.putJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: diskimage.ArtifactType,
		Config: f.putJSON(diskimage.ConfigMediaType, c), Layers: []ocispec.Descriptor{l},
	})
	m.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
	return m
}

func TestPullDisk(t *testing.T) {
	f, s := newFakeRegistry(t), open(t, func(c *Config) {
		c.Platform, c.Limits.DiskBytes = &ocispec.Platform{OS: "linux", Architecture: "amd64"}, 64<<20
	})
	raw := rawDisk(t, 1<<20)
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	packed := z.EncodeAll(raw, nil)
	qcow := qcow2Disk(16 << 20)
	sized := func(c *diskimage.Config, _ *ocispec.Descriptor) { c.Disk.VirtualSize = 16 << 20 }
	f.tags["q"] = f.disk("amd64", "qcow2", qcow, qcow, sized).Digest
	f.tags["both"] = f.putJSON(ocispec.MediaTypeImageIndex, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{
		f.disk("arm64", "raw", z.EncodeAll(rawDisk(t, 1<<20), nil), nil, nil), f.disk("amd64", "raw", packed, raw, nil),
	}}).Digest
	for _, lazy := range []string{LazyNever, LazyAuto, LazyAlways} { // what has no layers is whole at once
		if _, err := s.Pull(t.Context(), f.addr+"/os:q", PullOptions{Lazy: lazy}); err != nil {
			t.Fatal(lazy, err)
		}
	}
	img, err := s.Pull(t.Context(), f.addr+"/os:both", PullOptions{})
	if err != nil || img.Disk == nil || img.Platform.Architecture != "amd64" {
		t.Fatalf("%+v, %v", img, err)
	}
	sameDisk(t, s, img, raw)

	backed := qcow2Disk(16 << 20)
	binary.BigEndian.PutUint64(backed[8:], 512)
	binary.BigEndian.PutUint32(backed[16:], 11)
	larger := z.EncodeAll(append(make([]byte, 32<<20), raw...), nil)
	for name, c := range map[string]struct {
		m    ocispec.Descriptor
		want string
	}{
		"backing file":  {f.disk("amd64", "qcow2", backed, backed, sized), "backing file"},
		"other size":    {f.disk("amd64", "qcow2", qcow, qcow, func(c *diskimage.Config, _ *ocispec.Descriptor) { c.Disk.VirtualSize = 512 }), "config says 512"},
		"too large":     {f.disk("amd64", "qcow2", qcow, qcow, func(c *diskimage.Config, _ *ocispec.Descriptor) { c.Disk.VirtualSize = 1 << 40 }), "max-disk-size"},
		"no qcow2":      {f.disk("amd64", "qcow2", raw, raw, nil), "magic"},
		"bomb":          {f.disk("amd64", "raw", larger, raw, nil), "is not the disk"},
		"other content": {f.disk("amd64", "raw", z.EncodeAll(rawDisk(t, 1<<20), nil), raw, nil), "is not the disk"},
		"no zstd":       {f.disk("amd64", "raw", raw, raw, nil), "decompress"},
		"cut off":       {f.disk("amd64", "raw", packed[:len(packed)-5], raw, nil), "decompress"},
		"other type":    {f.disk("amd64", "raw", packed, raw, func(_ *diskimage.Config, l *ocispec.Descriptor) { l.MediaType = ocispec.MediaTypeImageLayer }), "layer of type"},
		"other layer":   {f.disk("amd64", "qcow2", qcow, raw, nil), "is not the disk"},
	} {
		f.tags["bad"] = c.m.Digest
		if _, err := s.Pull(t.Context(), f.addr+"/os:bad", PullOptions{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if all, err := s.All(t.Context()); err != nil || len(all) != 2 {
		t.Error(all, err)
	}
	s.gate.Lock()
	_, err = s.collect()
	s.gate.Unlock()
	if ents, derr := os.ReadDir(s.disksDir()); derr != nil || err != nil || len(ents) != 1 {
		t.Error(ents, derr, err)
	}
}

// A disk that breaks off on its way is no disk.
func TestLoadDiskBroken(t *testing.T) {
	s := open(t)
	for _, b := range [][]byte{rawDisk(t, 4<<20), qcow2Disk(1 << 20)} {
		for _, broken := range []error{io.ErrUnexpectedEOF, context.Canceled} {
			r := io.MultiReader(bytes.NewReader(b), iotest.ErrReader(broken))
			if _, err := s.Load(t.Context(), r, LoadOptions{}); !errors.Is(err, broken) {
				t.Error(err)
			}
		}
	}
	if all, err := s.All(t.Context()); err != nil || len(all) != 0 {
		t.Error(all, err)
	}
}
