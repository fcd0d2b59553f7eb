package diskimage

import (
	"bytes"
	"fmt"

	"github.com/containerd/errdefs"
)

// HeadBytes is how much of a file Sniff wants to see.
const HeadBytes = 36 << 10

// signs are marks of raw disks: bytes at an offset.
var signs = []struct {
	off  int
	mark string
}{
	{510, "\x55\xaa"},          // a boot sector or partition table
	{512, "EFI PART"},          // GPT of sectors of 512 bytes
	{4096, "EFI PART"},         // of 4096 bytes
	{1080, "\x53\xef"},         // ext2, 3, 4
	{0, "XFSB"},                // XFS
	{32769, "CD001"},           // ISO 9660
	{1024, "\x10\x20\xf5\xf2"}, // F2FS
}

// others are formats of disks that are not taken.
var others = []struct {
	off        int
	mark, name string
}{
	{0, "KDMV", "VMDK"},
	{0, "# Disk DescriptorFile", "VMDK"},
	{0, "vhdxfile", "VHDX"},
	{0, "conectix", "VHD"},
	{64, "\x7f\x10\xda\xbe", "VDI"},
	{0, "QED\x00", "QED"},
	{0, "LUKS\xba\xbe", "LUKS"},
	{0, "\xfd7zXZ\x00", "xz"},
	{0, "BZh", "bzip2"},
}

// Sniff tells by the first HeadBytes of an uncompressed file (fewer if it is shorter)
// whether it is a disk, and of which format; "" is no disk that can be told: an archive,
// or something else. What is a disk that isn't taken, or a disk and an archive at once, is an
// errdefs.ErrInvalidArgument.
func Sniff(head []byte) (format string, err error) {
	tar := isTar(head)
	at := func(off int, mark string) bool {
		return len(head) >= off+len(mark) && string(head[off:off+len(mark)]) == mark
	}
	if at(0, "QFI\xfb") {
		if tar {
			return "", fmt.Errorf("it is a qcow2 disk and a tar archive at once: %w", errdefs.ErrInvalidArgument)
		}
		return QCOW2, nil
	}
	if tar {
		return "", nil // whatever lies behind its first header
	}
	for _, o := range others {
		if at(o.off, o.mark) {
			return "", fmt.Errorf("%s is not taken: make it a qcow2 or raw disk first: %w", o.name, errdefs.ErrInvalidArgument)
		}
	}
	for _, s := range signs {
		if at(s.off, s.mark) {
			return Raw, nil
		}
	}
	return "", nil
}

// isTar tells whether the first block is a header of a tar archive, by its checksum.
// (A block of zeros is none.)
func isTar(b []byte) bool {
	if len(b) < 512 || b[0] == 0 {
		return false
	}
	var sum, want int64
	for i, c := range b[:512] {
		if i >= 148 && i < 156 {
			c = ' '
		}
		sum += int64(c)
	}
	for _, c := range bytes.TrimLeft(b[148:156], " ") {
		if c < '0' || c > '7' {
			break
		}
		want = want*8 + int64(c-'0')
	}
	return sum == want
}
