package layer

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Settle completes an unpacked layer with what depends on its parents: the
// attributes of implied directories and the files that hard links name.
// lowers are the parents' directories, topmost first, themselves settled.
func Settle(dir string, res Result, lowers []string) error {
	if len(res.implied) == 0 && len(res.links) == 0 {
		return nil
	}
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(root)
	var low []int
	defer func() {
		for _, fd := range low {
			unix.Close(fd)
		}
	}()
	for _, l := range lowers {
		fd, err := unix.Open(l, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: l, Err: err}
		}
		low = append(low, fd)
	}
	// Deepest first, since setting a directory's times comes after its entries.
	implied := slices.SortedFunc(slices.Values(res.implied), func(a, b string) int {
		return cmp.Or(strings.Count(b, "/")-strings.Count(a, "/"), strings.Compare(b, a))
	})
	for _, l := range res.links {
		if err := settleLink(root, low, l); err != nil {
			return err
		}
	}
	for _, p := range implied {
		if err := settleDir(root, low, p); err != nil {
			return fmt.Errorf("layer: implied directory %.200q: %w", p, err)
		}
	}
	return nil
}

// find opens (O_PATH) a name in the topmost of the stacked directories that
// has it, as overlay would show it, following no symlink. -1 without an error: none has.
func find(low []int, name string) (int, error) {
	for _, root := range low {
		fd, hidden, err := findOne(root, name)
		if fd >= 0 || err != nil || hidden {
			return fd, err
		}
	}
	return -1, nil
}

// findOne looks into one layer; hidden: the layer hides the name in those below.
func findOne(root int, name string) (fd int, hidden bool, err error) {
	if name == "" {
		fd, err := unix.FcntlInt(uintptr(root), unix.F_DUPFD_CLOEXEC, 0)
		return fd, false, err
	}
	const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV
	for end := 0; ; {
		i := strings.IndexByte(name[end:], '/')
		last := i < 0
		if last {
			end = len(name)
		} else {
			end += i
		}
		fd, err := unix.Openat2(root, name[:end], &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: beneath})
		if err == unix.ENOENT {
			return -1, hidden, nil
		}
		if err == unix.ENOTDIR || err == unix.ELOOP {
			return -1, true, nil
		}
		if err != nil {
			return -1, false, err
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			unix.Close(fd)
			return -1, false, err
		}
		isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		if isWhiteout(&st) || (!last && !isDir) {
			unix.Close(fd)
			return -1, true, nil
		}
		if last {
			return fd, hidden, nil
		}
		var v [1]byte
		n, err := unix.Getxattr(procPath(fd), opaqueXattr, v[:])
		if err == nil && n == 1 && v[0] == 'y' {
			hidden = true
		}
		unix.Close(fd)
		end++
	}
}

func procPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func settleDir(root int, low []int, name string) error {
	src, err := find(low, name)
	if err != nil || src < 0 {
		return err
	}
	defer unix.Close(src)
	var st unix.Stat_t
	if err := unix.Fstat(src, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil // the layer puts a directory over a file
	}
	dst := root
	if name != "" {
		dst, err = openIn(root, name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return nil // replaced by a later entry of the layer
		}
		defer unix.Close(dst)
	}
	return copyAttrs(src, dst, &st)
}

// copyAttrs copies owner, mode, the attributes an image may have, and times.
func copyAttrs(src, dst int, st *unix.Stat_t) error {
	if err := unix.Fchown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(dst, st.Mode&0o7777); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	n, err := unix.Listxattr(procPath(src), buf)
	if err == nil {
		for _, a := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
			if a == "" || !keepXattr(a) {
				continue
			}
			val := make([]byte, 64<<10)
			m, err := unix.Getxattr(procPath(src), a, val)
			if err != nil {
				return err
			}
			if err := unix.Fsetxattr(dst, a, val[:m], 0); err != nil && err != unix.ENOTSUP {
				return err
			}
		}
	}
	return futimens(dst, [2]unix.Timespec{st.Atim, st.Mtim})
}

// settleLink makes the hard link that could not be made: a link to the target
// if another of the layer's links has brought it here, a copy otherwise, as
// overlay's copy-up would.
func settleLink(root int, low []int, l link) error {
	fail := func(err error) error {
		return fmt.Errorf("layer entry %.200q: hard link to %.200q: %w", l.name, l.target, err)
	}
	dir, base := split(l.name)
	p := root
	if dir != "" {
		var err error
		if p, err = openIn(root, dir, unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
			return fail(err)
		}
		defer unix.Close(p)
	}
	if src, hidden, err := findOne(root, l.target); err != nil {
		return fail(err)
	} else if src >= 0 {
		defer unix.Close(src)
		err := unix.Linkat(unix.AT_FDCWD, procPath(src), p, base, unix.AT_SYMLINK_FOLLOW)
		if err != nil && err != unix.EEXIST {
			return fail(err)
		}
		return nil
	} else if hidden {
		return errEntry(l.name, "hard link to %.200q, which the layer removes", l.target)
	}
	src, err := find(low, l.target)
	if err != nil {
		return fail(err)
	}
	if src < 0 {
		return errEntry(l.name, "hard link to %.200q, which does not exist", l.target)
	}
	defer unix.Close(src)
	var st unix.Stat_t
	if err := unix.Fstat(src, &st); err != nil {
		return fail(err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFLNK:
		b := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(src, "", b)
		if err == nil {
			if err = unix.Symlinkat(string(b[:n]), p, base); err == unix.EEXIST {
				return nil
			}
		}
		if err == nil {
			err = unix.Fchownat(p, base, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW)
		}
		if err != nil {
			return fail(err)
		}
		return nil
	default:
		return errEntry(l.name, "hard link to %.200q, which is not a file", l.target)
	}
	fd, err := openat(p, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err == unix.EEXIST {
		return nil // a later entry of the layer has the name
	}
	if err != nil {
		return fail(err)
	}
	out := os.NewFile(uintptr(fd), l.name)
	defer out.Close()
	in, err := os.Open(procPath(src))
	if err != nil {
		return fail(err)
	}
	defer in.Close()
	if _, err := io.Copy(out, in); err != nil {
		return fail(err)
	}
	if err := copyAttrs(src, fd, &st); err != nil {
		return fail(err)
	}
	return nil
}
