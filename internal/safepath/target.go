package safepath

import (
	"errors"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLinks is the kernel's own bound.
const maxLinks = 40

// MakeTarget makes the mount point name, a directory or an empty file, with all
// that is missing on the way. Links are followed inside the root, those that
// lead to nothing too: what they lead to is made. New entries belong to uid and
// gid. One that exists is left as it is.
func MakeTarget(root *os.File, name string, dir bool, uid, gid int) error {
	rest := components(name)
	var done []string // resolved, without links, as far as nobody moves things
	links := 0
	for len(rest) > 0 {
		part := rest[0]
		rest = rest[1:]
		if part == ".." {
			if len(done) > 0 {
				done = done[:len(done)-1]
			}
			continue
		}
		parent, err := Open(root, strings.Join(done, "/"), unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		link, err := readlink(parent, part)
		switch {
		case err == nil:
			if links++; links > maxLinks {
				parent.Close()
				return &os.PathError{Op: "make", Path: name, Err: unix.ELOOP}
			}
			if path.IsAbs(link) {
				done = done[:0]
			}
			rest = append(split(link), rest...)
			parent.Close()
			continue
		case errors.Is(err, unix.EINVAL): // no link
		case errors.Is(err, unix.ENOENT):
			err := makeEntry(int(parent.Fd()), part, dir || len(rest) > 0, uid, gid)
			if err != nil {
				parent.Close()
				return &os.PathError{Op: "make", Path: path.Join(append(done, part)...), Err: err}
			}
		default:
			parent.Close()
			return err
		}
		parent.Close()
		done = append(done[:len(done):len(done)], part)
	}
	return nil
}

// makeEntry makes one directory or file; another's that came first will do.
func makeEntry(parent int, name string, dir bool, uid, gid int) error {
	var err error
	if dir {
		err = unix.Mkdirat(parent, name, 0o755)
	} else {
		err = unix.Mknodat(parent, name, unix.S_IFREG|0o755, 0)
	}
	if err == unix.EEXIST {
		return nil
	}
	if err == nil && (uid != 0 || gid != 0) {
		err = unix.Fchownat(parent, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
	}
	return err
}

func readlink(dir *os.File, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: name, Err: err}
	}
	return string(buf[:n]), nil
}

// components splits a path that is cleaned; split keeps its "..".
func components(p string) []string { return split(path.Clean("/" + p)) }

func split(p string) (list []string) {
	for part := range strings.SplitSeq(p, "/") {
		if part != "" && part != "." {
			list = append(list, part)
		}
	}
	return list
}
