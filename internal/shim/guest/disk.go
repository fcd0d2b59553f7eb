package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// upper makes the directories that a container writes to.
func upper(u *taskv1.Upper) error {
	if err := os.MkdirAll(u.Path, 0o700); err != nil {
		return err
	}
	if err := limit(u.Path, u.Limit); err != nil {
		return fmt.Errorf("size limit: %w", err)
	}
	if err := os.Mkdir(filepath.Join(u.Path, "work"), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	dir := filepath.Join(u.Path, "upper")
	if _, err := os.Lstat(dir); err == nil {
		return nil // it has been written to
	}
	mode, uid, gid := uint32(0o755), 0, 0
	if u.Like != "" {
		var st unix.Stat_t
		if err := unix.Stat(u.Like, &st); err != nil {
			return &os.PathError{Op: "stat", Path: u.Like, Err: err}
		}
		mode, uid, gid = st.Mode&0o7777, int(st.Uid), int(st.Gid)
	}
	tmp := filepath.Join(u.Path, "new")
	if err := os.RemoveAll(tmp); err != nil { // nobody has written to it
		return err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	if err := unix.Chown(tmp, uid, gid); err != nil {
		return &os.PathError{Op: "chown", Path: tmp, Err: err}
	}
	if err := unix.Chmod(tmp, mode); err != nil {
		return &os.PathError{Op: "chmod", Path: tmp, Err: err}
	}
	return os.Rename(tmp, dir)
}

// fsxattr is struct fsxattr of <linux/fs.h>.
type fsxattr struct {
	flags, extent, extents, project, cow uint32
	_                                    [8]byte
}

// diskQuota is struct if_dqblk of <linux/quota.h>.
type diskQuota struct {
	hard, soft, used, ihard, isoft, inodes, btime, itime uint64
	valid                                                uint32
	_                                                    uint32
}

const (
	getProject     = 0x801c581f      // FS_IOC_FSGETXATTR
	putProject     = 0x401c5820      // FS_IOC_FSSETXATTR
	projectInherit = 0x200           // FS_XFLAG_PROJINHERIT
	getQuota       = 0x800007<<8 | 2 // QCMD(Q_GETQUOTA, PRJQUOTA)
	setQuota       = 0x800008<<8 | 2 // QCMD(Q_SETQUOTA, PRJQUOTA)
	quotaBlocks    = 1               // QIF_BLIMITS
	quotaUnit      = 1024            // bytes
	resizeFS       = 0x40086610      // EXT4_IOC_RESIZE_FS
	maxFSSize      = int64(1) << 50  // bytes
)

// limit bounds and counts what is below a directory, which is empty or has been
// given to it before: its inode's number names the project.
func limit(path string, bytes int64) error {
	f, x, err := projectOf(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if x.project == 0 {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return os.NewSyscallError("fstat", err)
		}
		x.project = uint32(st.Ino) // ext4's have 32 bits
		x.flags |= projectInherit
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), putProject, uintptr(unsafe.Pointer(x))); e != 0 {
			return os.NewSyscallError("FS_IOC_FSSETXATTR", e)
		}
	}
	q := diskQuota{hard: uint64(bytes+quotaUnit-1) / quotaUnit, valid: quotaBlocks}
	if _, _, e := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), setQuota, uintptr(x.project), uintptr(unsafe.Pointer(&q)), 0, 0); e != 0 {
		return os.NewSyscallError("quotactl", e)
	}
	return nil
}

// projectOf opens a directory and finds its project.
func projectOf(path string) (*os.File, *fsxattr, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
	}
	if err != nil {
		return nil, nil, err
	}
	x := new(fsxattr)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), getProject, uintptr(unsafe.Pointer(x))); e != 0 {
		f.Close()
		return nil, nil, os.NewSyscallError("FS_IOC_FSGETXATTR", e)
	}
	return f, x, nil
}

// emptyUpper is what the directories of an Upper take that nothing was written to.
const emptyUpper = 4 * 4096

// upperUsed is what a container has written.
func upperUsed(path string) (uint64, error) {
	f, x, err := projectOf(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var q diskQuota
	if _, _, e := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), getQuota, uintptr(x.project), uintptr(unsafe.Pointer(&q)), 0, 0); e != 0 {
		return 0, os.NewSyscallError("quotactl", e)
	}
	return q.used - min(q.used, emptyUpper), nil
}

// removed are the last paths that were removed. What a killed daemon has asked for may
// be done after the next one has taken it back: the place of a container's files is
// not made again once it was removed, since no other container gets its name.
type removed struct {
	mu    sync.Mutex
	paths map[string]bool
	order []string
}

// maxRemoved is how many are remembered.
const maxRemoved = 1024

// add returns when nobody makes the path any more, or will.
func (r *removed) add(path string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.paths[path] {
		return
	}
	if r.paths == nil {
		r.paths = map[string]bool{}
	}
	if len(r.order) >= maxRemoved {
		delete(r.paths, r.order[0])
		r.order = r.order[1:]
	}
	r.paths[path] = true
	r.order = append(r.order, path)
}

// unless runs f, which makes the path, if it was not removed.
func (r *removed) unless(path string, f func() error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.paths[path] {
		return fmt.Errorf("%s was removed: %w", path, errdefs.ErrFailedPrecondition)
	}
	return f()
}

// keep removes what is not named, after it has told of each.
func keep(k *taskv1.Keep, tell func(path string)) error {
	list, err := os.ReadDir(k.Path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range list {
		if !slices.Contains(k.Names, e.Name()) {
			path := filepath.Join(k.Path, e.Name())
			tell(path)
			errs = append(errs, removeTree(path))
		}
	}
	return errors.Join(errs...)
}

// removeTree removes a file or a tree that containers have made, of any depth: a
// directory within it is emptied after it was moved to the top.
func removeTree(path string) error {
	err := unix.Unlink(path)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	top, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer top.Close()
	unfreeze(top, ofProject)
	moved := 0
	for {
		again := false
		err := eachEntry(top, func(name string) error {
			again = true
			return removeEntry(top, top, name, &moved)
		})
		if err != nil {
			return fmt.Errorf("remove %s: %w", path, err)
		}
		if !again {
			return os.Remove(path)
		}
	}
}

// removeEntry removes a file, or a directory whose own directories it moves to
// top.
func removeEntry(top, dir *os.File, name string, moved *int) error {
	at := int(dir.Fd())
	err := unix.Unlinkat(at, name, 0)
	if err == unix.EPERM { // or one that can't be changed
		if fd, e := unix.Openat(at, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); e == nil {
			f := os.NewFile(uintptr(fd), name)
			unfreeze(f, 0)
			f.Close()
			err = unix.Unlinkat(at, name, 0)
		}
	}
	if err == nil || err == unix.ENOENT {
		return nil
	}
	if err != unix.EISDIR && err != unix.EPERM {
		return &os.PathError{Op: "unlink", Path: name, Err: err}
	}
	if err := unix.Unlinkat(at, name, unix.AT_REMOVEDIR); err != unix.ENOTEMPTY {
		if err == unix.ENOENT {
			return nil
		}
		return err
	}
	if top != dir {
		*moved++
		err := unix.Renameat(at, name, int(top.Fd()), movedName(*moved))
		for err == unix.ENOTEMPTY || err == unix.EEXIST || err == unix.ENOTDIR { // of a removal that was cut off
			*moved++
			err = unix.Renameat(at, name, int(top.Fd()), movedName(*moved))
		}
		return err
	}
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	inner := os.NewFile(uintptr(fd), name)
	defer inner.Close()
	unfreeze(inner, 0)
	for {
		some := false
		if err := eachEntry(inner, func(name string) error {
			some = true
			return removeEntry(top, inner, name, moved)
		}); err != nil {
			return err
		}
		if !some {
			return unix.Unlinkat(at, name, unix.AT_REMOVEDIR)
		}
	}
}

func movedName(n int) string { return ".tenon-" + strconv.Itoa(n) }

// removeBatch is how many names are read at once.
const removeBatch = 1024

// eachEntry calls f for names in a directory, from its beginning.
func eachEntry(dir *os.File, f func(name string) error) error {
	if _, err := dir.Seek(0, 0); err != nil {
		return err
	}
	names, err := dir.Readdirnames(removeBatch)
	if len(names) == 0 {
		return nil // or an error that removing the directory shows
	}
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := f(n); err != nil {
			return err
		}
	}
	return nil
}

// Flags of files, of <linux/fs.h>.
const (
	frozen    = 0x10 | 0x20 // FS_IMMUTABLE_FL, FS_APPEND_FL
	ofProject = 0x20000000  // FS_PROJINHERIT_FL: only what is of the same project can be moved to it
)

// unfreeze lets a file be removed that was made immutable, or can only grow, and
// takes more flags away.
func unfreeze(f *os.File, more int) {
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err == nil && flags&(frozen|more) != 0 {
		_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags&^(frozen|more)) // removing it says so
	}
}

// growTime is how long a disk may take to show its new size.
const growTime = 10 * time.Second

// growFS makes a file system larger.
func growFS(ctx context.Context, g *taskv1.GrowFS) error {
	if g.Size < 0 || g.Size > maxFSSize {
		return fmt.Errorf("size %d: %w", g.Size, errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile(g.Path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return os.NewSyscallError("statfs", err)
	}
	ctx, cancel := context.WithTimeout(ctx, growTime)
	defer cancel()
	blocks := uint64(g.Size) / uint64(st.Bsize)
	for {
		_, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), resizeFS, uintptr(unsafe.Pointer(&blocks)))
		if e == 0 {
			return nil
		}
		if e != unix.EINVAL && e != unix.EBUSY { // the disk is not known to be larger yet
			return os.NewSyscallError("EXT4_IOC_RESIZE_FS", e)
		}
		select {
		case <-ctx.Done():
			return os.NewSyscallError("EXT4_IOC_RESIZE_FS", e)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
