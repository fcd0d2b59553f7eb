package files

import (
	"fmt"
	"os"
	"path"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// split is Docker's way with an archive path: its directory is resolved, its
// last element is not, unless a slash or "/." follows it.
func split(p string) (dir, base string) {
	clean := path.Join("/", p)
	if strings.HasSuffix(p, "/") || strings.HasSuffix(p, "/.") || p == "." || clean == "/" {
		return clean, "."
	}
	dir, base = path.Split(clean)
	return dir, base
}

// rename is the name that an archive of p begins with.
func rename(p string) string {
	if strings.HasSuffix(p, "/.") || p == "." {
		return "."
	}
	return path.Base(path.Join("/", p))
}

// openDir opens a directory of the container, following links.
func (s *session) openDir(dir string) (int, error) {
	fd, err := unix.Openat2(s.root, dir, &unix.OpenHow{Flags: unix.O_DIRECTORY | unix.O_RDONLY | unix.O_CLOEXEC, Resolve: inRoot})
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return fd, nil
}

// stat looks at a path.
func (s *session) stat(p string) (*taskv1.FileStat, error) {
	dir, base := split(p)
	fd, err := s.openDir(dir)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstatat(fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, &os.PathError{Op: "stat", Path: p, Err: err}
	}
	r := &taskv1.FileStat{Name: rename(p), Size: st.Size, Mode: uint32(fileMode(st.Mode)), Mtime: st.Mtim.Nano()}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		r.LinkTarget = s.eval(path.Join("/", p))
	}
	return r, nil
}

// maxLinks bounds the links of one path, as the kernel does.
const maxLinks = 40

// eval follows all links of an absolute path, in text. What does not exist
// stays as it is.
func (s *session) eval(p string) string {
	done, rest := "/", strings.TrimPrefix(p, "/")
	for links := 0; rest != "" && links < maxLinks; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			done = path.Dir(done)
			continue
		}
		next := path.Join(done, name)
		target, ok := s.readlink(next)
		if !ok {
			done = next
			continue
		}
		links++
		if strings.HasPrefix(target, "/") {
			done = "/"
		}
		rest = target + "/" + rest
	}
	return path.Join(done, rest)
}

func (s *session) readlink(p string) (string, bool) {
	fd, err := unix.Openat2(s.root, p, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: inRoot})
	if err != nil {
		return "", false
	}
	defer unix.Close(fd)
	var b [unix.PathMax]byte
	n, err := unix.Readlinkat(fd, "", b[:])
	if err != nil {
		return "", false
	}
	return string(b[:n]), true
}

// destination resolves the directory that an archive is unpacked into.
func (s *session) destination(p string) (string, error) {
	clean := path.Join("/", p)
	fd, err := unix.Openat2(s.root, clean, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: inRoot})
	if err != nil {
		return "", &os.PathError{Op: "open", Path: p, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: p, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return "", fmt.Errorf("extraction point %s is not a directory: %w", p, errdefs.ErrInvalidArgument)
	}
	// Writing is refused before anything is sent, if it is hopeless.
	var fs unix.Statfs_t
	if dir, err := unix.Openat2(s.root, clean, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: inRoot}); err == nil {
		err = unix.Fstatfs(dir, &fs)
		unix.Close(dir)
		if err == nil && fs.Flags&unix.ST_RDONLY != 0 {
			return "", fmt.Errorf("%s is mounted read-only: %w", p, errdefs.ErrPermissionDenied)
		}
	}
	return clean, nil
}

// fileMode makes Go's mode bits of the kernel's.
func fileMode(m uint32) os.FileMode {
	mode := os.FileMode(m & 0o777)
	switch m & unix.S_IFMT {
	case unix.S_IFBLK:
		mode |= os.ModeDevice
	case unix.S_IFCHR:
		mode |= os.ModeDevice | os.ModeCharDevice
	case unix.S_IFDIR:
		mode |= os.ModeDir
	case unix.S_IFIFO:
		mode |= os.ModeNamedPipe
	case unix.S_IFLNK:
		mode |= os.ModeSymlink
	case unix.S_IFSOCK:
		mode |= os.ModeSocket
	}
	if m&unix.S_ISGID != 0 {
		mode |= os.ModeSetgid
	}
	if m&unix.S_ISUID != 0 {
		mode |= os.ModeSetuid
	}
	if m&unix.S_ISVTX != 0 {
		mode |= os.ModeSticky
	}
	return mode
}

func mtime(st *unix.Stat_t) time.Time { return time.Unix(st.Mtim.Sec, 0) }
