package files

import (
	"archive/tar"
	"fmt"
	"io"
	"path"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// layers is a container's writable layer and what it lies on.
type layers struct {
	s      *session
	upper  int // the overlay's own directory
	lower  int // the image, as it is seen
	merged int // all of it, as the container sees it, read-only
	skip   map[string]bool
}

// openLayers mounts the parts in a namespace of the child's own.
func (s *session) openLayers() (*layers, error) {
	r := s.f.Root
	if r == nil || len(r.Mounts) == 0 {
		return nil, fmt.Errorf("the container's root is not given: %w", errdefs.ErrInvalidArgument)
	}
	m := r.Mounts[0]
	if m.Type != "overlay" {
		return nil, fmt.Errorf("changes of a root of type %s: %w", m.Type, errdefs.ErrNotImplemented)
	}
	o := parseOverlay(m.Options)
	if r.Upper != "" {
		o.upper = r.Upper
	}
	if o.upper == "" {
		return nil, fmt.Errorf("the root has no writable layer: %w", errdefs.ErrFailedPrecondition)
	}
	if err := s.private(); err != nil {
		return nil, err
	}
	d := &layers{s: s, skip: map[string]bool{}}
	for _, p := range s.f.Skip {
		d.skip[path.Join("/", p)] = true
	}
	// The three are mounted over each other in one place; what counts is the
	// descriptor of each.
	for _, part := range []struct {
		fd    *int
		mount func(string) error
	}{
		{&d.lower, func(t string) error { return o.mountRead(t, "") }},
		{&d.merged, func(t string) error { return o.mountRead(t, o.upper) }},
		{&d.upper, nil},
	} {
		dir := o.upper
		if part.mount != nil {
			dir = s.r.Dir
			if err := part.mount(dir); err != nil {
				return nil, err
			}
		}
		fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, pathError("open", dir, err)
		}
		*part.fd = fd
	}
	return d, nil
}

// lowerStat looks for a path in the image; no link of it is followed.
func (d *layers) lowerStat(p string, st *unix.Stat_t) (bool, error) {
	return d.statIn(d.lower, p, st)
}

func (d *layers) statIn(root int, p string, st *unix.Stat_t) (bool, error) {
	fd, err := unix.Openat2(root, path.Join(".", p), &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS,
	})
	switch err {
	case nil:
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.EXDEV:
		return false, nil
	default:
		return false, pathError("open", p, err)
	}
	defer unix.Close(fd)
	return true, pathError("stat", p, unix.Fstat(fd, st))
}

func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

func getxattr(fd int, name string) string {
	var b [4096]byte
	n, err := unix.Fgetxattr(fd, name, b[:])
	if err != nil {
		return ""
	}
	return string(b[:n])
}

// dirState is a directory of the upper layer during a walk.
type dirState struct {
	fd      int
	path    string
	st      unix.Stat_t
	inLower bool // there is a directory below that it adds to
	opaque  bool
	moved   bool // it was renamed: its old contents come from elsewhere
	told    bool
	parent  *dirState
}

// visitor is told of a walk's finds, parents before what is in them.
type visitor interface {
	dir(d *dirState) error
	file(parent *dirState, name string, st *unix.Stat_t, inLower bool) error
	deleted(parent *dirState, name string) error
}

// walk goes through the upper layer. A directory that is there only for what
// is in it is told of when something is.
func (d *layers) walk(v visitor) error {
	root := &dirState{fd: d.upper, path: "/", inLower: true, told: true}
	return d.walkDir(root, v)
}

func (d *layers) walkDir(dir *dirState, v visitor) error {
	names, err := list(dir.fd)
	if err != nil {
		return pathError("read", dir.path, err)
	}
	for _, n := range names {
		p := path.Join(dir.path, n)
		if d.skip[p] {
			continue
		}
		var st, lst unix.Stat_t
		if err := unix.Fstatat(dir.fd, n, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			if gone(err) == nil {
				continue
			}
			return pathError("stat", p, err)
		}
		inLower := false
		if dir.inLower && !dir.opaque && !dir.moved {
			if inLower, err = d.lowerStat(p, &lst); err != nil {
				return err
			}
		}
		switch {
		case isWhiteout(&st):
			if inLower {
				if err := dir.tell(v); err != nil {
					return err
				}
				if err := v.deleted(dir, n); err != nil {
					return err
				}
			}
		case st.Mode&unix.S_IFMT == unix.S_IFDIR:
			if err := d.subdir(dir, n, p, st, inLower, &lst, v); err != nil {
				return err
			}
		default:
			if err := dir.tell(v); err != nil {
				return err
			}
			if err := v.file(dir, n, &st, inLower); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *layers) subdir(dir *dirState, n, p string, st unix.Stat_t, inLower bool, lst *unix.Stat_t, v visitor) error {
	fd, err := unix.Openat(dir.fd, n, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return gone(pathError("open", p, err))
	}
	defer unix.Close(fd)
	sub := &dirState{fd: fd, path: p, st: st, parent: dir}
	sub.inLower = inLower && lst.Mode&unix.S_IFMT == unix.S_IFDIR
	sub.opaque = getxattr(fd, "trusted.overlay.opaque") == "y"
	sub.moved = getxattr(fd, "trusted.overlay.redirect") != ""
	changed := !sub.inLower || sub.opaque || sub.moved || st.Mode != lst.Mode || st.Uid != lst.Uid || st.Gid != lst.Gid
	if changed {
		if err := sub.tell(v); err != nil {
			return err
		}
	}
	if sub.moved {
		return d.walkMerged(sub, v)
	}
	if err := d.walkDir(sub, v); err != nil || !sub.opaque || !sub.inLower {
		return err
	}
	return d.hiddenBy(sub, v)
}

// tell tells of a directory, and of those above it, once.
func (s *dirState) tell(v visitor) error {
	if s.told {
		return nil
	}
	if err := s.parent.tell(v); err != nil {
		return err
	}
	s.told = true
	return v.dir(s)
}

// hiddenBy tells what an opaque directory hides of the image.
func (d *layers) hiddenBy(dir *dirState, v visitor) error {
	o, ok := v.(interface{ hides() bool })
	if !ok || !o.hides() {
		return nil
	}
	fd, err := unix.Openat2(d.lower, path.Join(".", dir.path), &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return gone(pathError("open", dir.path, err))
	}
	defer unix.Close(fd)
	names, err := list(fd)
	if err != nil {
		return pathError("read", dir.path, err)
	}
	for _, n := range names {
		var st unix.Stat_t
		if unix.Fstatat(dir.fd, n, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && !isWhiteout(&st) {
			continue
		}
		if err := v.deleted(dir, n); err != nil {
			return err
		}
	}
	return nil
}

// walkMerged tells all of a renamed directory as new, as it is seen.
func (d *layers) walkMerged(dir *dirState, v visitor) error {
	fd, err := unix.Openat2(d.merged, path.Join(".", dir.path), &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return gone(pathError("open", dir.path, err))
	}
	defer unix.Close(fd)
	return d.mergedDir(&dirState{fd: fd, path: dir.path, st: dir.st, told: true, parent: dir.parent}, v)
}

func (d *layers) mergedDir(dir *dirState, v visitor) error {
	names, err := list(dir.fd)
	if err != nil {
		return pathError("read", dir.path, err)
	}
	for _, n := range names {
		p := path.Join(dir.path, n)
		var st unix.Stat_t
		if err := unix.Fstatat(dir.fd, n, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			continue
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if err := v.file(dir, n, &st, false); err != nil {
				return err
			}
			continue
		}
		fd, err := unix.Openat(dir.fd, n, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		sub := &dirState{fd: fd, path: p, st: st, parent: dir}
		err = sub.tell(v)
		if err == nil {
			err = d.mergedDir(sub, v)
		}
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return nil
}

// lister makes Docker's list of changes.
type lister struct {
	send func(*taskv1.Change) error
}

func (l *lister) hides() bool { return true }

func (l *lister) dir(d *dirState) error {
	kind := taskv1.Change_ADDED
	if d.inLower && !d.moved {
		kind = taskv1.Change_MODIFIED
	}
	return l.send(&taskv1.Change{Path: d.path, Kind: kind})
}

func (l *lister) file(parent *dirState, name string, _ *unix.Stat_t, inLower bool) error {
	kind := taskv1.Change_ADDED
	if inLower {
		kind = taskv1.Change_MODIFIED
	}
	return l.send(&taskv1.Change{Path: path.Join(parent.path, name), Kind: kind})
}

func (l *lister) deleted(parent *dirState, name string) error {
	return l.send(&taskv1.Change{Path: path.Join(parent.path, name), Kind: taskv1.Change_DELETED})
}

func (d *layers) changes(send func(*taskv1.Change) error) error {
	return d.walk(&lister{send})
}

// differ writes an OCI layer.
type differ struct {
	a *archiver
	d *layers
}

// Names of whiteouts in an OCI layer (image-spec, layer.md).
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

func (d *layers) diff(w io.Writer) error {
	f := &differ{a: d.s.archiver(w), d: d}
	if err := d.walk(f); err != nil {
		return err
	}
	return f.a.tw.Close()
}

func layerName(p string) string { return p[1:] }

func (f *differ) dir(d *dirState) error {
	h := f.a.header(layerName(d.path), &d.st)
	if err := xattrs(d.fd, h); err != nil {
		return err
	}
	if err := f.a.tw.WriteHeader(h); err != nil {
		return err
	}
	if d.opaque && d.inLower || d.moved && d.inLower {
		return f.whiteout(path.Join(d.path, opaqueName), &d.st)
	}
	return nil
}

func (f *differ) whiteout(p string, st *unix.Stat_t) error {
	return f.a.tw.WriteHeader(&tar.Header{Name: layerName(p), Typeflag: tar.TypeReg, Mode: 0o600, ModTime: mtime(st), Format: tar.FormatPAX})
}

func (f *differ) deleted(parent *dirState, name string) error {
	return f.whiteout(path.Join(parent.path, whiteoutPrefix+name), &parent.st)
}

func (f *differ) file(parent *dirState, name string, st *unix.Stat_t, _ bool) error {
	p := path.Join(parent.path, name)
	if st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		return nil
	}
	fd := -1
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		// Through the merged view: a file of which only the attributes were
		// changed has its contents below.
		var err error
		fd, err = unix.Openat2(f.d.merged, path.Join(".", p), &unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		})
		if err != nil {
			return gone(pathError("open", p, err))
		}
		defer unix.Close(fd)
		upper := *st
		if err := unix.Fstat(fd, st); err != nil {
			return pathError("stat", p, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return nil
		}
		st.Nlink, st.Dev, st.Ino = upper.Nlink, upper.Dev, upper.Ino
	}
	if err := f.a.entry(parent.fd, fd, name, layerName(p), st); err != nil {
		return fmt.Errorf("layer: %s: %w", p, err)
	}
	return nil
}
