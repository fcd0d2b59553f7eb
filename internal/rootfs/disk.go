package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/loop"
)

// A writable layer with a limit lies in a file system of its own: an ext4 in a
// sparse file, by a loop device. Project quotas would be cheaper, but ext4's do
// not bind whoever has CAP_SYS_RESOURCE, and overlay writes to the upper
// directory with the rights of its mounter.
//
//	rootfs/disk.img   the file; made whole beside it and renamed
//	rootfs/disk       where it is mounted, from the first use to the removal;
//	                  upper and work lie in it
//
// The loop device goes with the last mount (LO_FLAGS_AUTOCLEAR), also that of a
// daemon that is killed in between.

const (
	diskFile = "disk.img"
	diskDir  = "disk"
	mkfsTime = time.Minute
)

// MinLimit and MaxLimit bound Options.SizeLimit, in bytes.
const (
	MinLimit = 16 << 20
	MaxLimit = 16 << 40
)

// CheckLimit tells whether a writable layer of this many bytes can be made
// here. InvalidArgument, FailedPrecondition.
func (s *Store) CheckLimit(size int64) error {
	if size < MinLimit || size > MaxLimit {
		return fmt.Errorf("size limit of the writable layer: %d bytes; it must be between %d MiB and %d TiB: %w", size, MinLimit>>20, MaxLimit>>40, errdefs.ErrInvalidArgument)
	}
	if _, err := mkfs(); err != nil {
		return err
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		return fmt.Errorf("size limit of the writable layer: this needs loop devices (modprobe loop): %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// mkfs finds the program where systems have it, whatever the daemon's PATH.
func mkfs() (string, error) {
	for _, p := range []string{"/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"} {
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p, nil
		}
	}
	p, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		return "", fmt.Errorf("size limit of the writable layer: this needs mkfs.ext4; install e2fsprogs: %w", errdefs.ErrFailedPrecondition)
	}
	return p, nil
}

// limitedPair makes, or finds again, a pair in a file system of limited size.
func (s *Store) limitedPair(ctx context.Context, r *Root, dir string, opts Options) error {
	if err := os.MkdirAll(dir, 0o710); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, diskDir), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	s.disks.Lock()
	defer s.disks.Unlock()
	if _, err := os.Lstat(filepath.Join(dir, diskFile)); errors.Is(err, fs.ErrNotExist) {
		if err := s.CheckLimit(opts.SizeLimit); err != nil {
			return err
		}
		if err := makeDisk(ctx, dir, opts); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	if err := mountDisk(dir); err != nil {
		return err
	}
	if _, err := os.Lstat(r.Upper); err == nil {
		return nil
	}
	part := r.Upper + ".part"
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{r.Work, 0o700}, {part, 0o755}} {
		if err := os.Mkdir(d.path, d.mode); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := os.Chmod(d.path, d.mode); err != nil { // whatever the daemon's umask
			return err
		}
	}
	if err := likeImage(part, r.Lower); err != nil {
		return err
	}
	return os.Rename(part, r.Upper)
}

// makeDisk makes the file system whole and then gives it its name.
func makeDisk(ctx context.Context, dir string, opts Options) (err error) {
	program, err := mkfs()
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, diskFile+".tmp")
	defer func() {
		if err != nil {
			_ = os.Remove(tmp)
		}
	}()
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	err = f.Truncate(opts.SizeLimit)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	args := []string{"-q", "-F", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"}
	if opts.Volatile { // it does not outlive the machine's crash
		args = append(args, "-O", "^has_journal")
	}
	ctx, cancel := context.WithTimeout(ctx, mkfsTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, append(args, tmp)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", program, err, strings.TrimSpace(string(out)))
	}
	return os.Rename(tmp, filepath.Join(dir, diskFile))
}

// mounted tells whether something is mounted on dir's disk directory.
func mounted(dir string) (bool, error) {
	var in, at unix.Stat_t
	if err := unix.Lstat(dir, &in); err != nil {
		return false, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	if err := unix.Lstat(filepath.Join(dir, diskDir), &at); err != nil {
		return false, &os.PathError{Op: "stat", Path: filepath.Join(dir, diskDir), Err: err}
	}
	return in.Dev != at.Dev, nil
}

// mountDisk mounts the file system unless it is. The caller holds s.disks.
func mountDisk(dir string) error {
	if is, err := mounted(dir); is || err != nil {
		return err
	}
	loop, err := loop.Attach(filepath.Join(dir, diskFile), false)
	if err != nil {
		return err
	}
	defer loop.Close()
	at := filepath.Join(dir, diskDir)
	// What the container may do with its files, its own mount says. What it
	// deletes goes back to the host.
	if err := unix.Mount(loop.Name(), at, "ext4", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, "errors=remount-ro,discard"); err != nil {
		return &os.PathError{Op: "mount", Path: at, Err: err}
	}
	// Containers that share mounts with the host have no use for it.
	if err := unix.Mount("", at, "", unix.MS_PRIVATE, ""); err != nil {
		return &os.PathError{Op: "make private", Path: at, Err: err}
	}
	return nil
}

// unmountDisk is no error if nothing is mounted or there is no disk.
func unmountDisk(dir string) error {
	at := filepath.Join(dir, diskDir)
	err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err == nil || err == unix.EINVAL || err == unix.ENOENT {
		return nil
	}
	return &os.PathError{Op: "unmount", Path: at, Err: err}
}

// upper is the directory of what the container has changed, mounted if it has a
// file system of its own.
func (s *Store) upper(dir string) (string, error) {
	if _, err := os.Lstat(filepath.Join(dir, diskFile)); err != nil {
		return dir + "/upper", nil
	}
	s.disks.Lock()
	defer s.disks.Unlock()
	if err := mountDisk(dir); err != nil {
		return "", err
	}
	return filepath.Join(dir, diskDir, "upper"), nil
}

// Unmount takes away what is mounted for containers, none of which runs any
// more; the next use of one mounts again.
func (s *Store) Unmount() error {
	ids, err := s.List()
	if err != nil {
		return err
	}
	s.disks.Lock()
	defer s.disks.Unlock()
	var errs []error
	for _, id := range ids {
		errs = append(errs, unmountDisk(filepath.Join(s.containers(), id, "rootfs")))
	}
	return errors.Join(errs...)
}
