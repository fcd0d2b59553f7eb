// Package qcow2 reads the header of a disk in QEMU's qcow2 format, and says
// whether the file can be given to a machine: it must stand alone (no backing file,
// no external data file, no encryption), and all that the header points at must lie
// within the file and within bounds. It is pure: it reads what it is given, and opens
// nothing. The clusters' tables are not walked; QEMU does that, in its jail.
package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// Magic begins each file.
const Magic = "QFI\xfb"

const (
	v2Header = 72
	v3Header = 104

	// maxL1 and maxRefcounts are QEMU's own bounds for tables that it keeps in memory.
	maxL1         = 32 << 20
	maxRefcounts  = 8 << 20
	maxSnapshots  = 65536
	maxExtensions = 64
)

// Incompatible features.
const (
	featureDirty       = 1 << 0 // reference counts may be wrong; data can be read
	featureCorrupt     = 1 << 1
	featureDataFile    = 1 << 2
	featureCompression = 1 << 3
	featureExtendedL2  = 1 << 4
)

const (
	extEnd      = 0
	extDataFile = 0x44415441
	extCrypto   = 0x0537be77
)

// Header is what is known of a disk from its header.
type Header struct {
	Version     int
	VirtualSize int64 // bytes that the machine sees
	ClusterSize int64 // bytes
	// Zstd: compressed clusters are compressed with zstd, not zlib.
	Zstd bool
	// Snapshots is the number of internal snapshots.
	Snapshots int
}

// Is tells whether a file that begins with b is one, by its magic.
func Is(b []byte) bool { return len(b) >= 4 && string(b[:4]) == Magic }

// Read reads and checks the header of a file of size bytes. A file that isn't one, or
// that can't be used alone, is an errdefs.ErrInvalidArgument whose text says why.
func Read(r io.ReaderAt, size int64) (Header, error) {
	h, err := read(r, size)
	if err != nil && !errdefs.IsInvalidArgument(err) {
		return h, fmt.Errorf("qcow2: read header: %w", err)
	}
	return h, err
}

func bad(format string, a ...any) error {
	return fmt.Errorf("qcow2: %s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}

func readAt(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
		return bad("the file ends within its header")
	}
	return err
}

func read(r io.ReaderAt, size int64) (h Header, err error) {
	var b [112]byte
	if err := readAt(r, b[:v2Header], 0); err != nil {
		return h, err
	}
	be := binary.BigEndian
	if !Is(b[:]) {
		return h, bad("no such magic")
	}
	h.Version = int(be.Uint32(b[4:]))
	if h.Version != 2 && h.Version != 3 {
		return h, bad("version %d is not known", be.Uint32(b[4:]))
	}
	if be.Uint64(b[8:]) != 0 || be.Uint32(b[16:]) != 0 {
		return h, bad("it has a backing file: flatten it first (qemu-img convert -O qcow2)")
	}
	bits := be.Uint32(b[20:])
	if bits < 9 || bits > 21 {
		return h, bad("clusters of 2^%d bytes", bits)
	}
	h.ClusterSize = 1 << bits
	virtual := be.Uint64(b[24:])
	if virtual == 0 || virtual > 1<<62 || virtual%512 != 0 {
		return h, bad("a virtual size of %d bytes", virtual)
	}
	h.VirtualSize = int64(virtual)
	if be.Uint32(b[32:]) != 0 {
		return h, bad("it is encrypted")
	}
	l1Entries, l1 := be.Uint32(b[36:]), be.Uint64(b[40:])
	refs, refClusters := be.Uint64(b[48:]), be.Uint32(b[56:])
	snapshots, snapshotTable := be.Uint32(b[60:]), be.Uint64(b[64:])

	length, refOrder, entry := uint32(v2Header), uint32(4), int64(8)
	if h.Version == 3 {
		if err := readAt(r, b[v2Header:v3Header], v2Header); err != nil {
			return h, err
		}
		features := be.Uint64(b[72:])
		refOrder, length = be.Uint32(b[96:]), be.Uint32(b[100:])
		switch {
		case features&featureCorrupt != 0:
			return h, bad("it is marked as corrupt")
		case features&featureDataFile != 0:
			return h, bad("its data are in another file")
		case features&^(featureDirty|featureCompression|featureExtendedL2) != 0:
			return h, bad("features %#x are not known", features)
		case length < v3Header || length%8 != 0 || int64(length) > h.ClusterSize:
			return h, bad("a header of %d bytes", length)
		}
		if features&featureExtendedL2 != 0 {
			if entry = 16; bits < 14 {
				return h, bad("subclusters of clusters of 2^%d bytes", bits)
			}
		}
		kind := byte(0)
		if length > v3Header {
			if err := readAt(r, b[v3Header:v3Header+1], v3Header); err != nil {
				return h, err
			}
			kind = b[v3Header]
		}
		if kind > 1 || (kind != 0) != (features&featureCompression != 0) {
			return h, bad("compression %d is not known", kind)
		}
		h.Zstd = kind == 1
	}
	if refOrder > 6 {
		return h, bad("reference counts of 2^%d bits", refOrder)
	}
	// A table lies on whole clusters of the file, behind the header.
	table := func(what string, off, bytes uint64) error {
		switch {
		case off%uint64(h.ClusterSize) != 0:
			return bad("the table of %s does not begin with a cluster", what)
		case off < uint64(h.ClusterSize) || off > uint64(size) || bytes > uint64(size)-off:
			return bad("the table of %s is not within the file", what)
		}
		return nil
	}
	perL1 := uint64(h.ClusterSize) * uint64(h.ClusterSize/entry)
	need := (virtual + perL1 - 1) / perL1
	switch {
	case need > maxL1/8 || l1Entries > maxL1/8:
		return h, bad("a table of clusters of more than %d bytes", maxL1)
	case uint64(l1Entries) < need:
		return h, bad("the table of clusters has %d entries for %d", l1Entries, need)
	case refClusters == 0 || int64(refClusters) > maxRefcounts/h.ClusterSize:
		return h, bad("a table of reference counts of %d clusters", refClusters)
	}
	if err := table("clusters", l1, uint64(l1Entries)*8); err != nil {
		return h, err
	}
	if err := table("reference counts", refs, uint64(refClusters)*uint64(h.ClusterSize)); err != nil {
		return h, err
	}
	if h.Snapshots = int(snapshots); snapshots > maxSnapshots {
		return h, bad("%d internal snapshots", snapshots)
	}
	if snapshots > 0 {
		if err := table("snapshots", snapshotTable, uint64(snapshots)*40); err != nil {
			return h, err
		}
	}
	return h, extensions(r, int64(length), h.ClusterSize)
}

// extensions looks at what follows the header, up to the end of the first cluster.
func extensions(r io.ReaderAt, off, cluster int64) error {
	var b [8]byte
	for range maxExtensions {
		if off+8 > cluster {
			return nil
		}
		if err := readAt(r, b[:], off); err != nil {
			return err
		}
		kind, n := binary.BigEndian.Uint32(b[:]), int64(binary.BigEndian.Uint32(b[4:]))
		switch kind {
		case extEnd:
			return nil
		case extDataFile:
			return bad("its data are in another file")
		case extCrypto:
			return bad("it is encrypted")
		}
		if off += 8; n > cluster-off {
			return bad("a header extension of %d bytes", n)
		}
		off += (n + 7) &^ 7
	}
	return bad("more than %d header extensions", maxExtensions)
}
