// Package layer unpacks image layers into directories that serve as overlay
// lower directories.
//
// A layer is unpacked without its parents: Unpack applies the tar to an empty
// directory, turning whiteouts into overlay's own marks, and remembers what it
// could not know (directories that the tar implies without holding them, hard
// links to files that are not in this layer). Settle, called when the parents
// are in place, completes that. So the layers of an image can be unpacked all
// at the same time, in any order.
//
// The tar is hostile: every name is resolved by the kernel beneath a
// descriptor of the layer's directory (openat2 with RESOLVE_IN_ROOT), objects
// are made with O_EXCL and *at calls on their parent's descriptor, and the
// number of entries and bytes is bounded. An unpacked directory is used by one
// goroutine at a time; nothing here is shared between calls.
package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Limits bound one unpacking. All must be positive.
type Limits struct {
	Bytes     int64 // sum of the files' sizes, holes counted as zeros
	Entries   int64
	FreeBytes int64 // kept free on the file system, or unix.ENOSPC
}

// Result is what an unpacking found, to be handed to Settle.
type Result struct {
	// Bytes is the sum of the regular files' sizes, Entries the number of tar
	// entries.
	Bytes, Entries int64
	implied        []string
	links          []link
}

// link is a hard link whose target is not in the layer.
type link struct{ name, target string }

const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
	opaqueXattr    = "trusted.overlay.opaque"
	paxXattr       = "SCHILY.xattr."

	copyBuffer    = 256 << 10
	freeEvery     = 64 << 20 // bytes between two looks at the free space
	maxDirs       = 64       // descriptors of directories kept open
	maxLinkDepth  = 40       // dangling symlinks followed for one parent
	resolveInRoot = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV
)

// errEntry marks what is wrong with the archive, not with the machine.
func errEntry(name, format string, a ...any) error {
	return fmt.Errorf("layer entry %.200q: %s: %w", name, fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}

// Unpack applies the uncompressed tar r to dir, which must be an empty
// directory. The reader is left behind the tar's end marker; what follows is
// the caller's to drain. On an error dir holds rubbish and is to be removed.
func Unpack(ctx context.Context, r io.Reader, dir string, lim Limits) (Result, error) {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Result{}, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	x := &unpacker{
		root: root, lim: lim, buf: make([]byte, copyBuffer),
		dirs: map[string]*dirHandle{}, mtimes: map[string][2]unix.Timespec{},
		implied: map[string]bool{"": true}, umask: umask(),
	}
	defer x.close()
	if err := x.checkFree(); err != nil {
		return Result{}, err
	}
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return Result{}, context.Cause(ctx)
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return Result{}, fmt.Errorf("layer tar: %w", err)
		}
		x.res.Entries++
		if x.res.Entries > lim.Entries {
			return Result{}, fmt.Errorf("layer has more than %d entries: %w", lim.Entries, errdefs.ErrResourceExhausted)
		}
		if err := x.entry(ctx, hdr, tr); err != nil {
			return Result{}, err
		}
	}
	if err := x.finish(); err != nil {
		return Result{}, err
	}
	for p := range x.implied {
		x.res.implied = append(x.res.implied, p)
	}
	return x.res, nil
}

type dirHandle struct {
	fd     int
	setgid bool
	used   int64
}

type unpacker struct {
	root    int
	lim     Limits
	res     Result
	buf     []byte
	dirs    map[string]*dirHandle // by cleaned name; "" is not in it
	clock   int64
	mtimes  map[string][2]unix.Timespec // of directories, set at the end
	implied map[string]bool
	umask   uint32
	unfreed int64 // bytes since the last look at the free space
	rootGid bool  // the root directory is setgid
}

func (x *unpacker) close() {
	x.forget()
	unix.Close(x.root)
}

// forget closes the cached directories, after something that may have changed
// what their names mean.
func (x *unpacker) forget() {
	for _, d := range x.dirs {
		unix.Close(d.fd)
	}
	clear(x.dirs)
}

// clean returns a name's components joined, without a leading slash; "" is the root.
func clean(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", errEntry(name, "name holds a zero byte")
	}
	c := path.Clean(strings.TrimLeft(name, "/"))
	if c == ".." || strings.HasPrefix(c, "../") {
		return "", errEntry(name, "name leaves the layer")
	}
	if c == "." {
		return "", nil
	}
	return c, nil
}

func split(name string) (dir, base string) {
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return name[:i], name[i+1:]
	}
	return "", name
}

func (x *unpacker) entry(ctx context.Context, hdr *tar.Header, r io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := clean(hdr.Name)
	if err != nil {
		return err
	}
	if hdr.Uid < 0 || hdr.Gid < 0 || int64(hdr.Uid) >= 1<<32-1 || int64(hdr.Gid) >= 1<<32-1 {
		return errEntry(hdr.Name, "owner %d:%d is out of range", hdr.Uid, hdr.Gid)
	}
	if name == "" {
		if hdr.Typeflag != tar.TypeDir {
			return errEntry(hdr.Name, "the layer's root is not a directory")
		}
		delete(x.implied, "")
		return x.dirAttrs(x.root, "", hdr)
	}
	dir, base := split(name)
	if strings.HasPrefix(base, whiteoutPrefix) {
		return x.whiteout(hdr, dir, base)
	}
	p, err := x.parent(dir)
	if err != nil {
		return fmt.Errorf("layer entry %.200q: parent: %w", hdr.Name, err)
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		return x.mkdir(p, name, base, hdr)
	case tar.TypeReg, '\x00', tar.TypeGNUSparse, tar.TypeCont:
		return x.regular(ctx, p, name, base, hdr, r)
	case tar.TypeLink:
		return x.hardlink(p, name, base, hdr)
	case tar.TypeSymlink:
		if hdr.Linkname == "" {
			return errEntry(hdr.Name, "symlink to nowhere")
		}
		err = x.replacing(p.fd, base, func() error { return unix.Symlinkat(hdr.Linkname, p.fd, base) })
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		mode, dev := uint32(unix.S_IFIFO), uint64(0)
		if hdr.Typeflag != tar.TypeFifo {
			if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
				return errEntry(hdr.Name, "device number %d:%d is out of range", hdr.Devmajor, hdr.Devminor)
			}
			mode, dev = unix.S_IFBLK, unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
			if hdr.Typeflag == tar.TypeChar {
				mode = unix.S_IFCHR
			}
		}
		err = x.replacing(p.fd, base, func() error {
			return unix.Mknodat(p.fd, base, mode|uint32(hdr.Mode&0o777), int(dev))
		})
	default:
		return errEntry(hdr.Name, "unknown type %q", hdr.Typeflag)
	}
	if err != nil {
		return fmt.Errorf("layer entry %.200q: %w", hdr.Name, err)
	}
	return x.nodeAttrs(p, base, hdr)
}

// replacing runs create, after removing what has the name if something has.
func (x *unpacker) replacing(dir int, base string, create func() error) error {
	err := eintr(create)
	if err != unix.EEXIST {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil {
		if m := st.Mode & unix.S_IFMT; m == unix.S_IFDIR || m == unix.S_IFLNK {
			x.forgetBut(dir)
		}
	}
	if err := removeAll(dir, base); err != nil {
		return err
	}
	return eintr(create)
}

// forgetBut forgets the cached directories except the one in use.
func (x *unpacker) forgetBut(fd int) {
	for n, d := range x.dirs {
		if d.fd != fd {
			unix.Close(d.fd)
		}
		if d.fd != fd || n == "" {
			delete(x.dirs, n)
		}
	}
}

func (x *unpacker) mkdir(p *dirHandle, name, base string, hdr *tar.Header) error {
	mode := uint32(hdr.Mode & 0o777)
	err := eintr(func() error { return unix.Mkdirat(p.fd, base, mode) })
	opaque := false
	if err == unix.EEXIST {
		var st unix.Stat_t
		if err := unix.Fstatat(p.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("layer entry %.200q: %w", hdr.Name, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			opaque = isWhiteout(&st)
			err = x.replacing(p.fd, base, func() error { return unix.Mkdirat(p.fd, base, mode) })
		} else {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("layer entry %.200q: %w", hdr.Name, err)
	}
	fd, err := openat(p.fd, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("layer entry %.200q: %w", hdr.Name, err)
	}
	if p.setgid && hdr.Uid == 0 && hdr.Gid == 0 {
		if err := unix.Fchown(fd, 0, 0); err != nil {
			unix.Close(fd)
			return fmt.Errorf("layer entry %.200q: chown: %w", hdr.Name, err)
		}
	}
	if opaque {
		if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
			unix.Close(fd)
			return fmt.Errorf("layer entry %.200q: mark opaque: %w", hdr.Name, err)
		}
	}
	delete(x.implied, name)
	if err := x.dirAttrs(fd, name, hdr); err != nil {
		unix.Close(fd)
		return err
	}
	x.cache(name, fd, hdr.Mode&0o2000 != 0)
	return nil
}

// dirAttrs gives a directory the header's attributes; its times come last of all.
func (x *unpacker) dirAttrs(fd int, name string, hdr *tar.Header) error {
	if err := fdAttrs(fd, hdr, true); err != nil {
		return err
	}
	x.mtimes[name] = times(hdr)
	if d := x.dirs[name]; d != nil {
		d.setgid = hdr.Mode&0o2000 != 0
	} else if name == "" {
		x.rootGid = hdr.Mode&0o2000 != 0
	}
	return nil
}

func (x *unpacker) regular(ctx context.Context, p *dirHandle, name, base string, hdr *tar.Header, r io.Reader) error {
	if hdr.Size < 0 || hdr.Size > x.lim.Bytes-x.res.Bytes {
		return fmt.Errorf("layer entry %.200q: layer is larger than %d bytes: %w", hdr.Name, x.lim.Bytes, errdefs.ErrResourceExhausted)
	}
	x.res.Bytes += hdr.Size
	fd := -1
	mode := uint32(hdr.Mode & 0o777)
	err := x.replacing(p.fd, base, func() (err error) {
		fd, err = openat(p.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, mode)
		return err
	})
	if err != nil {
		return fmt.Errorf("layer entry %.200q: %w", hdr.Name, err)
	}
	defer unix.Close(fd)
	if err := x.fill(ctx, fd, hdr, r); err != nil {
		return fmt.Errorf("layer entry %.200q: %w", hdr.Name, err)
	}
	force := p.setgid || hdr.Mode&0o7000 != 0 || mode&x.umask != 0
	if err := fdAttrs(fd, hdr, force); err != nil {
		return err
	}
	return futimens(fd, times(hdr))
}

// fill writes the file's bytes; runs of zeros the size of the buffer become holes.
func (x *unpacker) fill(ctx context.Context, fd int, hdr *tar.Header, r io.Reader) error {
	var off int64
	hole := false
	for off < hdr.Size {
		n, err := io.ReadFull(r, x.buf[:min(int64(len(x.buf)), hdr.Size-off)])
		if n > 0 {
			b := x.buf[:n]
			if n == len(x.buf) && allZero(b) {
				hole = true
				if err := ctx.Err(); err != nil {
					return context.Cause(ctx)
				}
			} else if err := pwrite(fd, b, off); err != nil {
				return err
			} else {
				hole = false
			}
			off += int64(n)
			if x.unfreed += int64(n); x.unfreed >= freeEvery {
				x.unfreed = 0
				if err := x.checkFree(); err != nil {
					return err
				}
				if err := ctx.Err(); err != nil {
					return context.Cause(ctx)
				}
			}
		}
		if err != nil {
			return fmt.Errorf("layer tar: %w", err)
		}
	}
	if hole {
		return unix.Ftruncate(fd, off)
	}
	return nil
}

// allZero compares a buffer with itself, shifted: the run time's memequal is fast.
func allZero(b []byte) bool {
	return b[0] == 0 && string(b[:len(b)-1]) == string(b[1:])
}

func (x *unpacker) checkFree() error {
	if x.lim.FreeBytes <= 0 {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(x.root, &st); err != nil {
		return os.NewSyscallError("fstatfs", err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < x.lim.FreeBytes {
		return fmt.Errorf("unpack layer: only %d bytes are free on the disk, %d must stay free: %w", free, x.lim.FreeBytes, unix.ENOSPC)
	}
	return nil
}

func (x *unpacker) hardlink(p *dirHandle, name, base string, hdr *tar.Header) error {
	target, err := clean(hdr.Linkname)
	if err != nil {
		return errEntry(hdr.Name, "hard link to %.200q, which leaves the layer", hdr.Linkname)
	}
	if target == "" {
		return errEntry(hdr.Name, "hard link to the layer's root")
	}
	if target == name {
		return nil
	}
	tdir, tbase := split(target)
	tfd := x.root
	if tdir != "" {
		if d := x.dirs[tdir]; d != nil {
			tfd = d.fd
		} else {
			tfd, err = openIn(x.root, tdir, unix.O_PATH|unix.O_DIRECTORY)
			if err == unix.ENOENT || err == unix.ENOTDIR {
				x.res.links = append(x.res.links, link{name, target})
				return nil
			}
			if err != nil {
				return fmt.Errorf("layer entry %.200q: hard link to %.200q: %w", hdr.Name, hdr.Linkname, err)
			}
			defer unix.Close(tfd)
		}
	}
	var st, old unix.Stat_t
	err = unix.Fstatat(tfd, tbase, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		x.res.links = append(x.res.links, link{name, target})
		return nil
	}
	if err == nil && isWhiteout(&st) {
		return errEntry(hdr.Name, "hard link to %.200q, which the layer removes", hdr.Linkname)
	}
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return errEntry(hdr.Name, "hard link to the directory %.200q", hdr.Linkname)
	}
	if err == nil && unix.Fstatat(p.fd, base, &old, unix.AT_SYMLINK_NOFOLLOW) == nil && old.Ino == st.Ino && old.Dev == st.Dev {
		return nil
	}
	if err == nil {
		err = x.replacing(p.fd, base, func() error { return unix.Linkat(tfd, tbase, p.fd, base, 0) })
	}
	if err != nil {
		return fmt.Errorf("layer entry %.200q: hard link to %.200q: %w", hdr.Name, hdr.Linkname, err)
	}
	return nil
}

// whiteout marks a removed name or an opaque directory the way overlay does.
// What this layer itself has put there stays: a whiteout speaks of the layers below.
func (x *unpacker) whiteout(hdr *tar.Header, dir, base string) error {
	fail := func(err error) error {
		return fmt.Errorf("layer entry %.200q: whiteout: %w", hdr.Name, err)
	}
	if base != whiteoutOpaque && strings.HasPrefix(base, whiteoutMeta) {
		return nil // AUFS's own
	}
	victim := base[len(whiteoutPrefix):]
	if victim == "" || victim == "." || victim == ".." {
		return errEntry(hdr.Name, "whiteout of %q", victim)
	}
	p, err := x.parent(dir)
	if err != nil {
		return fail(err)
	}
	if base == whiteoutOpaque {
		if err := unix.Fsetxattr(p.fd, opaqueXattr, []byte("y"), 0); err != nil {
			return fail(err)
		}
		return nil
	}
	err = eintr(func() error { return unix.Mknodat(p.fd, victim, unix.S_IFCHR, 0) })
	if err == unix.EEXIST {
		fd, err := openat(p.fd, victim, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil // a file of this layer hides the lower one by itself
		}
		defer unix.Close(fd)
		if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
			return fail(err)
		}
		return nil
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

// finish sets the directories' times, which making their entries has changed.
func (x *unpacker) finish() error {
	for name, ts := range x.mtimes {
		fd := x.root
		if name != "" {
			if d := x.dirs[name]; d != nil {
				fd = d.fd
			} else {
				var err error
				fd, err = openIn(x.root, name, unix.O_RDONLY|unix.O_DIRECTORY)
				if err != nil {
					continue // replaced by a later entry
				}
				defer unix.Close(fd)
			}
		}
		if err := futimens(fd, ts); err != nil {
			return fmt.Errorf("layer entry %.200q: %w", name, err)
		}
	}
	return nil
}

// times returns the access and modification times, kept within what file
// systems can hold.
func times(hdr *tar.Header) [2]unix.Timespec {
	at := hdr.AccessTime
	if at.Before(hdr.ModTime) {
		at = hdr.ModTime
	}
	return [2]unix.Timespec{timespec(at), timespec(hdr.ModTime)}
}

func timespec(t time.Time) unix.Timespec {
	s := t.Unix()
	if s < 0 || s > 1<<34-1 { // ext4's range ends in 2446
		return unix.Timespec{}
	}
	return unix.Timespec{Sec: s, Nsec: int64(t.Nanosecond())}
}

var errShort = errors.New("short write")
