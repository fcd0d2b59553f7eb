package gitjail

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// What of the system is in the jail, read-only, if it is there.
var (
	systemDirs = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store",
		"/etc/ssl/certs", "/etc/pki/tls/certs", "/etc/pki/ca-trust", "/etc/ca-certificates", "/etc/alternatives", "/etc/crypto-policies"}
	systemFiles = []string{"/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf", "/etc/services",
		"/etc/ld.so.cache", "/etc/ssl/openssl.cnf", "/etc/ssl/cert.pem", "/etc/ssh/ssh_known_hosts"}
	devices = []string{"/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"}
)

const (
	maxSystemFile = 1 << 20
	passwd        = "root:x:0:0::/:/bin/false\nnobody:x:65534:65534::/tmp:/bin/false\n"
	group         = "root:x:0:\nnogroup:x:65534:\n"
)

// makeRoot makes the jail's root on at and enters it. It is called in a mount namespace
// of the calling thread's own.
func (c *call) makeRoot(at string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return os.NewSyscallError("mount", err)
	}
	if err := unix.Mount("tmpfs", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=16m,nr_inodes=4096"); err != nil {
		return fmt.Errorf("mount %s: %w", at, err)
	}
	for _, d := range systemDirs {
		if err := system(at, d); err != nil {
			return err
		}
	}
	for _, f := range systemFiles {
		if err := copyFile(at, f, 0, 0o644); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{"/etc/passwd": passwd, "/etc/group": group, userConfig: configText()} {
		if err := os.WriteFile(at+name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, d := range devices {
		if err := bind(at, d, d, 0); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(at+"/tmp", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", at+"/tmp", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777,size=64m,nr_inodes=4096"); err != nil {
		return fmt.Errorf("mount /tmp: %w", err)
	}
	if c.hosts != "" {
		if err := copyFile(at, c.hosts, uid, 0o600); err != nil {
			return err
		}
	}
	if c.agent != "" {
		if err := bind(at, c.agent, c.agent, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV); err != nil {
			return err
		}
	}
	for _, d := range c.from {
		if err := bind(at, d, d, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC); err != nil {
			return err
		}
	}
	for _, d := range c.owned() {
		if err := bind(at, d, d, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC); err != nil {
			return err
		}
	}
	return enter(at)
}

// enter makes at the root of the calling thread, and takes the former one away.
func enter(at string) error {
	if err := unix.Chdir(at); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return os.NewSyscallError("umount", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "")
	return os.NewSyscallError("mount", err)
}

// system puts a directory of the system, or the link that is in its place, into the root.
func system(at, dir string) error {
	info, err := os.Lstat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode()&fs.ModeSymlink != 0 && filepath.Dir(dir) == "/":
		to, err := os.Readlink(dir)
		if err != nil {
			return err
		}
		return os.Symlink(to, at+dir)
	}
	return bind(at, dir, dir, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
}

// bind shows from as to, with attributes that hold below it, too.
func bind(at, from, to string, attr uint64) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(at+to, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(at+to), 0o755); err == nil {
		err = os.WriteFile(at+to, nil, 0o644)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(from, at+to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s: %w", from, err)
	}
	if attr == 0 {
		return nil
	}
	err = unix.MountSetattr(unix.AT_FDCWD, at+to, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: attr})
	if err != nil {
		return fmt.Errorf("mount %s: %w", from, os.NewSyscallError("mount_setattr", err))
	}
	return nil
}

// copyFile copies a small file of the system, if it is there.
func copyFile(at, name string, owner int, mode fs.FileMode) error {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSystemFile))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(at+name), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(at+name, b, mode); err != nil {
		return err
	}
	return os.Lchown(at+name, owner, owner)
}

// give changes the owner of a file, or of all that is in a directory, without following
// a link.
func give(name string, owner int) error {
	info, err := os.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !info.IsDir():
		return os.Lchown(name, owner, owner)
	}
	root, err := os.OpenRoot(name)
	if err != nil {
		return err
	}
	defer root.Close()
	return giveBelow(root, ".", owner, 0)
}

// maxDepth is how deep directories may lie: what a path can say, and more than git makes.
const maxDepth = 4096

func giveBelow(root *os.Root, dir string, owner, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("chown: directories lie more than %d deep", maxDepth)
	}
	below, err := giveIn(root, dir, owner)
	for _, name := range below { // nothing is open: a level costs no descriptor
		if err == nil {
			err = giveBelow(root, filepath.Join(dir, name), owner, depth+1)
		}
	}
	return err
}

// giveIn changes the owner of a directory and of all in it but its directories, which it
// returns.
func giveIn(root *os.Root, dir string, owner int) (below []string, err error) {
	f, err := root.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Chown(owner, owner); err != nil {
		return nil, err
	}
	for {
		ents, readErr := f.ReadDir(1024)
		for _, e := range ents {
			if e.IsDir() {
				below = append(below, e.Name())
			} else if err := unix.Fchownat(int(f.Fd()), e.Name(), owner, owner, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return nil, fmt.Errorf("chown %s: %w", filepath.Join(dir, e.Name()), err)
			}
		}
		if errors.Is(readErr, io.EOF) {
			return below, nil
		}
		if readErr != nil {
			return nil, readErr
		}
	}
}
