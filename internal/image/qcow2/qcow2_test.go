package qcow2

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// disk is a version 3 header of a disk of 1 MiB, with the tables that it names, in a
// file of four clusters.
func disk() []byte {
	const cluster = 65536
	b := make([]byte, 4*cluster)
	be := binary.BigEndian
	copy(b, Magic)
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], 16)
	be.PutUint64(b[24:], 1<<20)
	be.PutUint32(b[36:], 1)
	be.PutUint64(b[40:], 3*cluster)
	be.PutUint64(b[48:], cluster)
	be.PutUint32(b[56:], 1)
	be.PutUint32(b[96:], 4)
	be.PutUint32(b[100:], 104)
	return b
}

func TestRead(t *testing.T) {
	h, err := Read(bytes.NewReader(disk()), int64(len(disk())))
	if err != nil || h.Version != 3 || h.VirtualSize != 1<<20 || h.ClusterSize != 65536 || h.Zstd {
		t.Fatalf("%+v, %v", h, err)
	}
	be := binary.BigEndian
	for name, c := range map[string]struct {
		change func(b []byte)
		want   string
	}{
		"magic":               {func(b []byte) { b[3] = 0 }, "magic"},
		"version":             {func(b []byte) { be.PutUint32(b[4:], 1) }, "version 1"},
		"backing file":        {func(b []byte) { be.PutUint64(b[8:], 200); be.PutUint32(b[16:], 5) }, "backing file"},
		"backing name":        {func(b []byte) { be.PutUint32(b[16:], 5) }, "backing file"},
		"tiny clusters":       {func(b []byte) { be.PutUint32(b[20:], 8) }, "clusters of"},
		"huge clusters":       {func(b []byte) { be.PutUint32(b[20:], 63) }, "clusters of"},
		"no size":             {func(b []byte) { be.PutUint64(b[24:], 0) }, "virtual size"},
		"negative size":       {func(b []byte) { be.PutUint64(b[24:], 1<<63) }, "virtual size"},
		"odd size":            {func(b []byte) { be.PutUint64(b[24:], 1000) }, "virtual size"},
		"too large":           {func(b []byte) { be.PutUint64(b[24:], 1<<61) }, "table of clusters"},
		"encrypted":           {func(b []byte) { be.PutUint32(b[32:], 2) }, "encrypted"},
		"short L1":            {func(b []byte) { be.PutUint64(b[24:], 1<<40) }, "entries for"},
		"long L1":             {func(b []byte) { be.PutUint32(b[36:], 1<<31) }, "more than"},
		"L1 beyond the end":   {func(b []byte) { be.PutUint64(b[40:], 4<<16) }, "within the file"},
		"L1 far beyond":       {func(b []byte) { be.PutUint64(b[40:], 0xffffffffffff0000) }, "within the file"},
		"L1 in the header":    {func(b []byte) { be.PutUint64(b[40:], 0) }, "within the file"},
		"L1 askew":            {func(b []byte) { be.PutUint64(b[40:], 3<<16+8) }, "begin with a cluster"},
		"refcounts beyond":    {func(b []byte) { be.PutUint64(b[48:], 1<<40) }, "within the file"},
		"no refcounts":        {func(b []byte) { be.PutUint32(b[56:], 0) }, "reference counts of 0"},
		"many refcounts":      {func(b []byte) { be.PutUint32(b[56:], 1<<20) }, "reference counts of"},
		"wide refcounts":      {func(b []byte) { be.PutUint32(b[96:], 7) }, "2^7 bits"},
		"many snapshots":      {func(b []byte) { be.PutUint32(b[60:], 1<<20) }, "internal snapshots"},
		"snapshots beyond":    {func(b []byte) { be.PutUint32(b[60:], 1); be.PutUint64(b[64:], 1<<30) }, "within the file"},
		"corrupt":             {func(b []byte) { be.PutUint64(b[72:], 2) }, "corrupt"},
		"data file":           {func(b []byte) { be.PutUint64(b[72:], 4) }, "another file"},
		"unknown feature":     {func(b []byte) { be.PutUint64(b[72:], 1<<20) }, "not known"},
		"compression":         {func(b []byte) { be.PutUint64(b[72:], 8); be.PutUint32(b[100:], 112); b[104] = 7 }, "compression 7"},
		"zstd unsaid":         {func(b []byte) { be.PutUint32(b[100:], 112); b[104] = 1 }, "compression 1"},
		"short header":        {func(b []byte) { be.PutUint32(b[100:], 72) }, "header of 72"},
		"header of all":       {func(b []byte) { be.PutUint32(b[100:], 1<<30) }, "header of"},
		"data file extension": {func(b []byte) { be.PutUint32(b[104:], extDataFile); be.PutUint32(b[108:], 8) }, "another file"},
		"crypto extension":    {func(b []byte) { be.PutUint32(b[104:], extCrypto); be.PutUint32(b[108:], 16) }, "encrypted"},
		"long extension":      {func(b []byte) { be.PutUint32(b[104:], 1); be.PutUint32(b[108:], 1<<31) }, "extension of"},
		"many extensions": {func(b []byte) {
			for i := range 100 {
				be.PutUint32(b[104+8*i:], 7)
			}
		}, "extensions"},
	} {
		b := disk()
		c.change(b)
		if _, err := Read(bytes.NewReader(b), int64(len(b))); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, n := range []int{0, 3, 71, 80, 104, 110, 65536} {
		if _, err := Read(bytes.NewReader(disk()[:n]), int64(n)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("cut off at %d: %v", n, err)
		}
	}
}

func TestReadTakes(t *testing.T) {
	be := binary.BigEndian
	for name, change := range map[string]func(b []byte){
		"version 2":     func(b []byte) { be.PutUint32(b[4:], 2) },
		"dirty":         func(b []byte) { be.PutUint64(b[72:], 1) },
		"zstd":          func(b []byte) { be.PutUint64(b[72:], 8); be.PutUint32(b[100:], 112); b[104] = 1 },
		"subclusters":   func(b []byte) { be.PutUint64(b[72:], 16) },
		"feature names": func(b []byte) { be.PutUint32(b[104:], 0x6803f857); be.PutUint32(b[108:], 144) },
	} {
		b := disk()
		change(b)
		if _, err := Read(bytes.NewReader(b), int64(len(b))); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(disk()[:512], int64(4<<16))
	b := disk()
	binary.BigEndian.PutUint32(b[104:], 0x6803f857)
	binary.BigEndian.PutUint32(b[108:], 144)
	f.Add(b[:1024], int64(1<<30))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		h, err := Read(bytes.NewReader(b), max(size, 0))
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatal(err)
			}
			return
		}
		if h.VirtualSize <= 0 || h.VirtualSize%512 != 0 || h.ClusterSize < 512 || h.ClusterSize > 2<<20 || h.Snapshots > maxSnapshots {
			t.Fatalf("%+v", h)
		}
	})
}
