// Package erofs writes the merged content of a stack of layers as one read-only
// file system (EROFS, Linux's Documentation/filesystems/erofs.rst), for guests
// that get it as a block device.
//
// The layers are merged by overlayfs's rules, without a mount: whiteouts hide,
// opaque directories hide what is below them. Modes, owners, times in
// nanoseconds, hard links, devices, extended attributes and holes are kept. The
// same layers and options give the same bytes.
//
//	tree.go    reading and merging the layers
//	sparse.go  a tree that is only told of, its files' contents left out
//	erofs.go   the layout, and writing it
//
// Files are stored as they are, a short tail behind the inode: nothing is
// compressed, since a file system made at a container's first start should be
// there soon, and guests without hardware help decompress slowly.
package erofs

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Of fs/erofs/erofs_fs.h.
const (
	magic         = 0xE0F5E1E2
	superOffset   = 1024
	blockBits     = 12
	blockSize     = 1 << blockBits
	slotSize      = 32 // nids count these
	inodeSize     = 64 // the extended form
	entrySize     = 12
	compatSum     = 1
	compatMtime   = 2
	layoutPlain   = 0
	layoutInline  = 2
	extendedInode = 1
	attrHeader    = 12
	attrEntry     = 4
	maxAttrs      = (math.MaxUint16 - 1) * 4 // bytes of one file's attributes

	// maxInline is the longest tail that lies behind its inode: longer ones would
	// leave large gaps.
	maxInline = blockSize / 2
	// maxFiles bounds what is held in memory.
	maxFiles = 16 << 20
)

// Options are the options of Write.
type Options struct {
	// UUID is the file system's.
	UUID [16]byte
	// MaxSize, in bytes, is what it may take; 0: what the format allows (16 TiB).
	MaxSize int64
}

// Write writes the merged directories, topmost first, to the empty file f. It
// does not sync. ResourceExhausted if it gets larger than allowed.
func Write(ctx context.Context, f *os.File, stack []string, o Options) error {
	m := &merger{links: map[inodeKey]*node{}, limit: maxFiles}
	defer func() {
		for _, fd := range m.roots {
			unix.Close(fd)
		}
	}()
	for _, d := range stack {
		fd, err := unix.Open(d, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("erofs: %w", &os.PathError{Op: "open", Path: d, Err: err})
		}
		m.roots = append(m.roots, fd)
	}
	root, err := m.merge(ctx)
	if err != nil {
		return fmt.Errorf("erofs: %w", err)
	}
	return writeOut(ctx, f, m, root, o)
}

// writeOut writes the tree that the merger has.
func writeOut(ctx context.Context, f *os.File, m *merger, root *node, o Options) error {
	w := &writer{f: f, m: m, buf: make([]byte, 256<<10)}
	if o.MaxSize <= 0 {
		o.MaxSize = math.MaxUint32 << blockBits
	}
	if size := w.place(); w.blocks > math.MaxUint32 || size > o.MaxSize {
		return fmt.Errorf("erofs: the image's files need %d bytes, more than %d: %w", size, o.MaxSize, errdefs.ErrResourceExhausted)
	}
	if err := w.write(ctx); err != nil {
		return fmt.Errorf("erofs: %w", err)
	}
	if _, err := f.WriteAt(w.super(root, o), superOffset); err != nil {
		return fmt.Errorf("erofs: %w", err)
	}
	return nil
}

type writer struct {
	f      *os.File
	m      *merger
	buf    []byte
	meta   int64 // bytes up to the end of the inodes
	blocks int64 // of all
	// The inodes are written in their order.
	out *bufio.Writer
	at  int64
}

// place gives each node its inode's place and its data blocks; it returns the
// size of all, in bytes.
func (w *writer) place() int64 {
	pos := int64(blockSize) // the first block has nothing but the super block
	for _, n := range w.m.nodes {
		n.size = n.dataSize()
		head := int64(inodeSize + attrsSize(n.attrs))
		tail := n.size % blockSize
		if n.mode&unix.S_IFMT == unix.S_IFREG && (tail > maxInline || w.m.sparse) || head+tail > blockSize {
			tail = 0
		}
		// The inode itself, and it together with its tail, lie in one block.
		need := int64(inodeSize)
		if tail > 0 {
			need = head + tail
		}
		if pos%blockSize+need > blockSize {
			pos = up(pos, blockSize)
		}
		n.nid, n.inline = uint64(pos/slotSize), int(tail)
		pos = up(pos+head+tail, slotSize)
	}
	w.meta = pos
	block := up(pos, blockSize) / blockSize
	for _, n := range w.m.nodes {
		n.blocks = up(n.size-int64(n.inline), blockSize) / blockSize
		if n.blocks > 0 {
			n.block = block
			block += n.blocks
		}
	}
	w.blocks = block
	return block * blockSize
}

func up(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// dataSize is what a node has beside its inode, in bytes.
func (n *node) dataSize() int64 {
	if n.mode&unix.S_IFMT != unix.S_IFDIR {
		return n.size
	}
	size := int64(0)
	n.eachBlock(func(_ []entry, used int, last bool) {
		if last {
			size += int64(used)
		} else {
			size += blockSize
		}
	})
	return size
}

// eachBlock divides a directory's entries, "." and ".." among them, into blocks.
func (n *node) eachBlock(f func(block []entry, used int, last bool)) {
	all := n.entries()
	for start := 0; start < len(all); {
		used, end := 0, start
		for end < len(all) && used+entrySize+len(all[end].name) <= blockSize {
			used += entrySize + len(all[end].name)
			end++
		}
		f(all[start:end], used, end == len(all))
		start = end
	}
}

// entries are a directory's with "." and "..", sorted.
func (n *node) entries() []entry {
	out := make([]entry, 0, len(n.names)+2)
	dots := []entry{{".", n}, {"..", n.parent}}
	for _, e := range n.names {
		for len(dots) > 0 && dots[0].name < e.name {
			out, dots = append(out, dots[0]), dots[1:]
		}
		out = append(out, e)
	}
	return append(out, dots...)
}

// write writes all but the super block.
func (w *writer) write(ctx context.Context) error {
	if err := w.f.Truncate(w.blocks * blockSize); err != nil {
		return err
	}
	w.at = blockSize
	w.out = bufio.NewWriterSize(io.NewOffsetWriter(w.f, blockSize), 1<<20)
	for _, n := range w.m.nodes {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := w.pad(int64(n.nid) * slotSize); err != nil {
			return err
		}
		if err := w.put(appendAttrs(n.inode(), n.attrs)); err != nil {
			return err
		}
		if err := w.data(n); err != nil {
			return fmt.Errorf("%.200q: %w", "/"+n.path, err)
		}
	}
	return w.out.Flush()
}

// pad writes zeros up to a position.
func (w *writer) pad(to int64) error {
	for w.at < to {
		clear(w.buf[:min(to-w.at, blockSize)])
		if err := w.put(w.buf[:min(to-w.at, blockSize)]); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) put(b []byte) error {
	w.at += int64(len(b))
	_, err := w.out.Write(b)
	return err
}

func (n *node) inode() []byte {
	b := make([]byte, inodeSize)
	layout := layoutPlain
	if n.inline > 0 {
		layout = layoutInline
	}
	le := binary.LittleEndian
	le.PutUint16(b[0:], extendedInode|uint16(layout)<<1)
	if size := attrsSize(n.attrs); size > 0 {
		le.PutUint16(b[2:], uint16((size-attrHeader)/4+1))
	}
	le.PutUint16(b[4:], uint16(n.mode))
	le.PutUint64(b[8:], uint64(n.size))
	le.PutUint32(b[16:], uint32(n.block))
	if k := n.mode & unix.S_IFMT; k == unix.S_IFCHR || k == unix.S_IFBLK {
		le.PutUint32(b[16:], n.rdev)
	}
	le.PutUint32(b[20:], n.ino)
	le.PutUint32(b[24:], n.uid)
	le.PutUint32(b[28:], n.gid)
	le.PutUint64(b[32:], uint64(n.mtime.Sec))
	le.PutUint32(b[40:], uint32(n.mtime.Nsec))
	le.PutUint32(b[44:], n.nlink)
	return b
}

// attrsSize is the size of what follows an inode with these attributes.
func attrsSize(list []attr) int {
	if len(list) == 0 {
		return 0
	}
	size := attrHeader
	for _, a := range list {
		size += int(up(int64(attrEntry+len(a.name)+len(a.value)), 4))
	}
	return size
}

func appendAttrs(b []byte, list []attr) []byte {
	if len(list) == 0 {
		return b
	}
	b = append(b, make([]byte, attrHeader)...)
	for _, a := range list {
		b = append(b, uint8(len(a.name)), a.prefix)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(a.value)))
		b = append(append(b, a.name...), a.value...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

// data writes a node's data: the tail behind the inode, the rest in its blocks.
func (w *writer) data(n *node) error {
	switch n.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return w.split(n, directory(n))
	case unix.S_IFLNK:
		return w.split(n, []byte(n.link))
	case unix.S_IFREG:
		if n.size > 0 && !w.m.sparse {
			return w.file(n)
		}
	}
	return nil
}

func (w *writer) split(n *node, b []byte) error {
	whole := len(b) - n.inline
	if whole > 0 {
		if _, err := w.f.WriteAt(b[:whole], n.block*blockSize); err != nil {
			return err
		}
	}
	return w.put(b[whole:])
}

// directory is a directory's data.
func directory(n *node) []byte {
	b := make([]byte, 0, n.size)
	n.eachBlock(func(block []entry, used int, last bool) {
		name := len(block) * entrySize
		for _, e := range block {
			b = binary.LittleEndian.AppendUint64(b, e.node.nid)
			b = binary.LittleEndian.AppendUint16(b, uint16(name))
			b = append(b, fileType(e.node.mode), 0)
			name += len(e.name)
		}
		for _, e := range block {
			b = append(b, e.name...)
		}
		if !last {
			b = append(b, make([]byte, blockSize-used)...)
		}
	})
	return b
}

func fileType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	case unix.S_IFSOCK:
		return 6
	case unix.S_IFLNK:
		return 7
	}
	return 0
}

// file copies a regular file.
func (w *writer) file(n *node) error {
	fd, err := w.m.open(n)
	if err != nil {
		return err
	}
	from := os.NewFile(uintptr(fd), n.path)
	defer from.Close()
	whole := n.size - int64(n.inline)
	if whole > 0 {
		err = w.copy(from, n.block*blockSize, whole)
	}
	if err == nil && n.inline > 0 {
		b := w.buf[:n.inline]
		if _, err = from.ReadAt(b, whole); err == nil {
			err = w.put(b)
		}
	}
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF // a layer does not change
	}
	return err
}

// small files are read and written, which is one call less.
const small = 64 << 10

// copy copies size bytes from the beginning, without the holes, to at. The
// kernel does it if it can, and shares the blocks if the file system can.
func (w *writer) copy(from *os.File, at, size int64) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(from.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Size < size {
		return io.ErrUnexpectedEOF
	}
	if st.Blocks*512 >= size {
		return w.copyData(from, at, 0, size)
	}
	for pos := int64(0); pos < size; {
		data, err := from.Seek(pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // the rest is a hole
		}
		if err != nil {
			return err
		}
		hole, err := from.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if pos = min(hole, size); data < pos {
			if err := w.copyData(from, at, data, pos); err != nil {
				return err
			}
		}
	}
	return nil
}

// copyData copies the bytes between start and end.
func (w *writer) copyData(from *os.File, at, start, end int64) error {
	for end-start > small {
		in, out := start, at+start
		n, err := unix.CopyFileRange(int(from.Fd()), &in, int(w.f.Fd()), &out, int(min(end-start, 1<<30)), 0)
		if err == unix.EINTR {
			continue
		}
		if err == unix.ENOSPC || err == unix.EDQUOT || err == unix.EIO {
			return os.NewSyscallError("copy_file_range", err)
		}
		if err != nil || n == 0 {
			break // not between these file systems
		}
		start += int64(n)
	}
	for start < end {
		b := w.buf[:min(end-start, int64(len(w.buf)))]
		if _, err := from.ReadAt(b, start); err != nil {
			return err
		}
		if _, err := w.f.WriteAt(b, at+start); err != nil {
			return err
		}
		start += int64(len(b))
	}
	return nil
}

// super is the super block with its sum, to the end of the first block.
func (w *writer) super(root *node, o Options) []byte {
	b := make([]byte, blockSize-superOffset)
	le := binary.LittleEndian
	le.PutUint32(b[0:], magic)
	le.PutUint32(b[8:], compatSum|compatMtime)
	b[12] = blockBits
	le.PutUint16(b[14:], uint16(root.nid))
	le.PutUint64(b[16:], uint64(len(w.m.nodes)))
	le.PutUint32(b[36:], uint32(w.blocks))
	copy(b[48:64], o.UUID[:])
	le.PutUint32(b[4:], ^crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}
