package rootfs

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image"
)

// A container on a virtual machine has two disks instead of an overlay: the
// image's files as a read-only file system that all machines share, and a
// writable one of its own, an ext4 in a sparse file, in which the guest keeps
// the overlay's upper directory. The guest writes to it, so the host never
// mounts it: it makes it, hands it over as an open file and removes it.
//
//	rootfs/vm.img   the writable disk; made whole beside it and renamed
//	<root>/disks/…  new, empty ones of each size, to copy from: a copy takes a
//	                fraction of a millisecond, mkfs.ext4 tens of them

const (
	vmDiskFile = "vm.img"
	// baseAttr remembers what the empty file system took, in bytes.
	baseAttr = "user.tenon.base"
	// templateVersion changes with how templates are made.
	templateVersion = "3"
	maxTemplates    = 64
)

// DefaultDisk is the size, in bytes, of a writable disk without a limit.
const DefaultDisk = 64 << 30

// MaxDisk is the largest, in bytes: the size of the device that guests see.
const MaxDisk = 1 << 40

// Disks are the disks of a container on a virtual machine.
type Disks struct {
	// Image is the file of the image's read-only file system (EROFS), for many
	// machines; empty for an image without layers.
	Image string
	// Upper is the file of the writable one (ext4, to be mounted with
	// noinit_itable and discard): the directories "upper", with the attributes of
	// the image's root, and "work" are in it.
	Upper string
	// Volatile says that nothing of Upper has to outlive the machine's crash.
	Volatile bool
	// Lower are the directories of the image's layers on the host, topmost first.
	Lower []string
}

// CheckDisk tells whether a writable disk with this limit, in bytes, can be made;
// 0 is none. InvalidArgument, FailedPrecondition.
func (s *Store) CheckDisk(limit int64) error {
	if limit != 0 && (limit < MinLimit || limit > MaxDisk) {
		return fmt.Errorf("size limit of the writable layer: %d bytes; on a virtual machine it must be between %d MiB and %d GiB: %w", limit, MinLimit>>20, int64(MaxDisk)>>30, errdefs.ErrInvalidArgument)
	}
	_, err := mkfs()
	return err
}

// PrepareDisks makes, or finds again, the disks of a container on a virtual
// machine. Of the options only Volatile and SizeLimit matter. InvalidArgument (the
// limit), FailedPrecondition (no mkfs.ext4), ENOSPC, ResourceExhausted.
func (s *Store) PrepareDisks(ctx context.Context, id string, img *image.Image, opts Options) (*Disks, error) {
	dir, err := s.dir(id)
	if err != nil {
		return nil, err
	}
	d := &Disks{Upper: filepath.Join(dir, vmDiskFile), Volatile: opts.Volatile}
	if d.Lower, _, err = s.cfg.Images.Root(ctx, img); err != nil {
		return nil, err
	}
	if d.Image, err = s.cfg.Images.EROFS(ctx, img); err != nil {
		return nil, err
	}
	if _, err := os.Lstat(d.Upper); err == nil {
		return d, nil
	}
	if err := s.makeUpper(ctx, dir, d.Lower, opts); err != nil {
		return nil, fmt.Errorf("container %s: writable disk: %w", id, err)
	}
	return d, nil
}

// likeness is what the templates of writable disks differ in.
type likeness struct {
	size    int64
	journal bool
	mode    uint32 // of the upper directory, and its owner
	uid     uint32
	gid     uint32
}

func (l likeness) name() string {
	return fmt.Sprintf("%s-%d-%t-%o-%d-%d", templateVersion, l.size, l.journal, l.mode, l.uid, l.gid)
}

func (s *Store) makeUpper(ctx context.Context, dir string, lower []string, opts Options) (err error) {
	if err := s.CheckDisk(opts.SizeLimit); err != nil {
		return err
	}
	l := likeness{size: opts.SizeLimit, journal: !opts.Volatile, mode: 0o755}
	if l.size == 0 {
		l.size = DefaultDisk
	}
	l.size &^= 4095 // whole blocks
	if len(lower) > 0 {
		var st unix.Stat_t
		if err := unix.Stat(lower[0], &st); err != nil {
			return &os.PathError{Op: "stat", Path: lower[0], Err: err}
		}
		l.mode, l.uid, l.gid = st.Mode&0o7777, st.Uid, st.Gid
	}
	from, err := s.template(ctx, l)
	if err != nil {
		return err
	}
	defer from.Close()
	if err := os.MkdirAll(dir, 0o710); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return err
	}
	tmp := filepath.Join(dir, vmDiskFile+".tmp")
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err == nil {
			err = os.Rename(tmp, filepath.Join(dir, vmDiskFile))
		}
		if err != nil {
			_ = os.Remove(tmp)
		}
	}()
	if err := copySparse(f, from, l.size); err != nil {
		return err
	}
	if err := identify(f); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	// Without it the file system's own blocks count as the container's.
	_ = unix.Fsetxattr(int(f.Fd()), baseAttr, []byte(strconv.FormatInt(st.Blocks*512, 10)), 0)
	if opts.Volatile {
		return nil
	}
	return f.Sync() // its name stands for all of it at the next start
}

// template opens a new, empty disk of this kind, and makes it if it is the first.
func (s *Store) template(ctx context.Context, l likeness) (*os.File, error) {
	path := filepath.Join(s.templates(), l.name())
	if f, err := os.Open(path); err == nil {
		return f, nil
	}
	s.disks.Lock()
	defer s.disks.Unlock()
	if f, err := os.Open(path); err == nil {
		return f, nil
	}
	if ents, err := os.ReadDir(s.templates()); err == nil && len(ents) >= maxTemplates {
		for _, e := range ents { // they are made again
			_ = os.RemoveAll(filepath.Join(s.templates(), e.Name()))
		}
	}
	program, err := mkfs()
	if err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(s.templates(), "tmp-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	file, content := filepath.Join(tmp, "disk"), filepath.Join(tmp, "content")
	for _, d := range []struct {
		path string
		mode uint32
	}{{content, 0o700}, {content + "/work", 0o700}, {content + "/upper", l.mode}} {
		if err := os.Mkdir(d.path, 0o700); err != nil {
			return nil, err
		}
		if err := unix.Chmod(d.path, d.mode); err != nil { // whatever the daemon's umask
			return nil, &os.PathError{Op: "chmod", Path: d.path, Err: err}
		}
	}
	if err := os.Chown(content+"/upper", int(l.uid), int(l.gid)); err != nil {
		return nil, err
	}
	if err := unix.Chmod(content+"/upper", l.mode); err != nil { // chown clears bits
		return nil, &os.PathError{Op: "chmod", Path: content + "/upper", Err: err}
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(file, l.size); err != nil {
		return nil, err
	}
	// With a seed of its own for its sums a copy can be given another identity by
	// its super block alone. No space is kept for growing the tables: the size of
	// a container's disk does not change.
	//
	// One that ends with its machine has no journal and no sums: mounting it takes an
	// emulated guest half as long.
	args := []string{"-q", "-F", "-b", "4096", "-m", "0", "-d", content, "-E"}
	if l.journal {
		args = append(args, "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0", "-O", "^resize_inode,metadata_csum,metadata_csum_seed")
	} else {
		args = append(args, "root_owner=0:0", "-O", "^resize_inode,^metadata_csum,^uninit_bg,^has_journal")
	}
	switch {
	case !l.journal:
	case l.size >= 256<<20:
		args = append(args, "-J", "size=16")
	}
	if l.size >= 1<<30 {
		args = append(args, "-i", "32768") // tables half as large
	}
	ctx, cancel := context.WithTimeout(ctx, mkfsTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, append(args, file)...).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", program, err, strings.TrimSpace(string(out)))
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := punchZeros(f); err != nil {
		f.Close()
		return nil, err
	}
	// It is there for all, so it has to be whole after a power cut as well.
	if err = f.Sync(); err == nil {
		err = os.Rename(file, path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// copySparse copies a file of this size without its holes to an empty one.
func copySparse(to, from *os.File, size int64) error {
	if err := to.Truncate(size); err != nil {
		return err
	}
	buf := make([]byte, 256<<10)
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(from.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil
		}
		if err != nil {
			return &os.PathError{Op: "seek", Path: from.Name(), Err: err}
		}
		hole, err := unix.Seek(int(from.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return &os.PathError{Op: "seek", Path: from.Name(), Err: err}
		}
		for at = data; at < hole; {
			b := buf[:min(int64(len(buf)), hole-at)]
			if _, err := from.ReadAt(b, at); err != nil {
				return err
			}
			if _, err := to.WriteAt(b, at); err != nil {
				return err
			}
			at += int64(len(b))
		}
	}
	return nil
}

// punchZeros makes holes of a file's blocks that are zero.
func punchZeros(f *os.File) error {
	const block = 4096
	var buf [block]byte
	for at := int64(0); ; at += block {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil
		}
		if err != nil {
			return &os.PathError{Op: "seek", Path: f.Name(), Err: err}
		}
		at = data / block * block
		n, err := f.ReadAt(buf[:], at)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n == block && buf == [block]byte{} {
			if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, block); err != nil {
				return &os.PathError{Op: "fallocate", Path: f.Name(), Err: err}
			}
		}
	}
}

// Where ext4's super block is, and in it what identify changes
// (Documentation/filesystems/ext4/super.rst).
const (
	superAt, superLen = 1024, 1024
	superUUID         = 0x68
	superHashSeed     = 0xEC
	superSum          = 0x3FC
)

// identify gives a copied file system a UUID and a seed of its own.
func identify(f *os.File) error {
	b := make([]byte, superLen)
	if _, err := f.ReadAt(b, superAt); err != nil {
		return err
	}
	for _, at := range []int{superUUID, superHashSeed} {
		id := b[at : at+16]
		_, _ = rand.Read(id) // never fails
		id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	}
	binary.LittleEndian.PutUint32(b[superSum:], ^crc32.Checksum(b[:superSum], crc32.MakeTable(crc32.Castagnoli)))
	_, err := f.WriteAt(b, superAt)
	return err
}

// vmUsage is what the guest has written, in bytes; ErrNotExist if there is no disk.
func vmUsage(dir string) (int64, error) {
	path := filepath.Join(dir, vmDiskFile)
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	used := st.Blocks * 512
	var b [20]byte
	if n, err := unix.Lgetxattr(path, baseAttr, b[:]); err == nil {
		if base, err := strconv.ParseInt(string(b[:n]), 10, 64); err == nil {
			used -= base
		}
	}
	return max(used, 0), nil
}

// cleanTemplates removes what a killed process was making.
func (s *Store) cleanTemplates() error {
	ents, err := os.ReadDir(s.templates())
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range ents {
		if !e.Type().IsRegular() || !strings.HasPrefix(e.Name(), templateVersion+"-") {
			errs = append(errs, os.RemoveAll(filepath.Join(s.templates(), e.Name())))
		}
	}
	return errors.Join(errs...)
}
