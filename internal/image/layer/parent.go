package layer

import (
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// parent returns the directory with the cleaned name, making what is missing.
func (x *unpacker) parent(dir string) (*dirHandle, error) {
	x.clock++
	if dir == "" {
		return &dirHandle{fd: x.root, setgid: x.rootGid}, nil
	}
	if d := x.dirs[dir]; d != nil {
		d.used = x.clock
		return d, nil
	}
	fd, err := openIn(x.root, dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		links := 0
		fd, err = x.ensure(dir, &links)
	}
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return x.cache(dir, fd, st.Mode&unix.S_ISGID != 0), nil
}

func (x *unpacker) cache(name string, fd int, setgid bool) *dirHandle {
	if d := x.dirs[name]; d != nil {
		unix.Close(d.fd)
	} else if len(x.dirs) >= maxDirs {
		oldest, at := "", int64(1<<62)
		for n, d := range x.dirs {
			if d.used < at {
				oldest, at = n, d.used
			}
		}
		unix.Close(x.dirs[oldest].fd)
		delete(x.dirs, oldest)
	}
	d := &dirHandle{fd: fd, setgid: setgid, used: x.clock}
	x.dirs[name] = d
	return d
}

// ensure opens dir, making each missing component; links counts the dangling
// symlinks followed.
func (x *unpacker) ensure(dir string, links *int) (int, error) {
	fd, err := unix.FcntlInt(uintptr(x.root), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	done := ""
	for rest := dir; rest != ""; {
		var c string
		c, rest, _ = strings.Cut(rest, "/")
		at := path.Join(done, c)
		next, err := openIn(x.root, at, unix.O_RDONLY|unix.O_DIRECTORY)
		if err == unix.ENOENT || err == unix.ENOTDIR {
			next, err = x.makeImplied(fd, done, c, links)
		}
		unix.Close(fd)
		if err != nil {
			return -1, err
		}
		fd, done = next, at
	}
	return fd, nil
}

// makeImplied makes and opens the directory c in the open directory fd, called
// at in the layer. A dangling symlink in its place is followed inside the layer.
func (x *unpacker) makeImplied(fd int, at, c string, links *int) (int, error) {
	err := eintr(func() error { return unix.Mkdirat(fd, c, 0o755) })
	opaque := false
	if err == unix.EEXIST {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, c, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return -1, err
		}
		switch {
		case isWhiteout(&st):
			opaque = true
			if err = removeAll(fd, c); err == nil {
				err = unix.Mkdirat(fd, c, 0o755)
			}
		case st.Mode&unix.S_IFMT == unix.S_IFLNK:
			if *links++; *links > maxLinkDepth {
				return -1, unix.ELOOP
			}
			b := make([]byte, unix.PathMax)
			n, err := unix.Readlinkat(fd, c, b)
			if err != nil {
				return -1, err
			}
			t := string(b[:n])
			if !path.IsAbs(t) {
				t = "/" + at + "/" + t
			}
			return x.ensure(strings.TrimPrefix(path.Clean("/"+t), "/"), links)
		default:
			return -1, unix.ENOTDIR
		}
	}
	if err != nil {
		return -1, err
	}
	next, err := openat(fd, c, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Fchown(next, 0, 0); err == nil {
		err = unix.Fchmod(next, 0o755)
	}
	if err == nil && opaque {
		err = unix.Fsetxattr(next, opaqueXattr, []byte("y"), 0)
	}
	if err != nil {
		unix.Close(next)
		return -1, err
	}
	if !opaque {
		x.implied[path.Join(at, c)] = true
	}
	return next, nil
}
