package layered

import (
	"errors"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// List returns the names in the merged directory at name, sorted, at most limit of
// each layer. The error is fs.ErrNotExist if there is nothing, syscall.ENOTDIR if it
// is no directory.
func (s Stack) List(name string, limit int) ([]string, error) {
	n, err := s.lookup(name)
	if err == nil && n.mode&unix.S_IFMT != unix.S_IFDIR {
		err = syscall.ENOTDIR
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	seen := map[string]bool{}
	for _, l := range n.layers {
		entries, err := names(l, n.path, limit)
		if err != nil {
			return nil, &os.PathError{Op: "read", Path: name, Err: err}
		}
		for _, e := range entries {
			if _, known := seen[e]; !known {
				seen[e] = true
			}
		}
	}
	var out []string
	for e := range seen {
		if _, _, err := step(n, e); err == nil { // no whiteout
			out = append(out, e)
		}
	}
	slices.Sort(out)
	return out, nil
}

func names(layer, dir string, limit int) ([]string, error) {
	fd, err := open(layer, dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), dir)
	defer f.Close()
	list, err := f.Readdirnames(limit)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return list, err
}

// Entry is something in a layer, as WalkLayer finds it.
type Entry struct {
	// Path is absolute, without the layer.
	Path string
	// Whiteout: the entry hides what layers below have at this path.
	Whiteout bool
	// Opaque directories hide what layers below have in them.
	Opaque bool
	Stat   unix.Stat_t
	layer  string
}

// Open opens a regular file for reading.
func (e *Entry) Open() (*os.File, error) {
	fd, err := open(e.layer, e.Path[1:], unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: e.Path, Err: err}
	}
	return os.NewFile(uintptr(fd), e.Path), nil
}

// Link reads where a symbolic link leads to.
func (e *Entry) Link() (string, error) {
	fd, err := open(e.layer, e.Path[1:], unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: e.Path, Err: err}
	}
	defer unix.Close(fd)
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: e.Path, Err: err}
	}
	return string(buf[:n]), nil
}

// Kind is the type of file, as in st_mode.
func (e *Entry) Kind() uint32 { return e.Stat.Mode & unix.S_IFMT }

// tree is a merged directory.
type tree struct {
	entry Entry
	kids  map[string]*tree
}

// ErrTooMany says that there are more entries than asked for.
var ErrTooMany = errors.New("too many files")

// Merged lists everything in the stack by its absolute path. With more than limit
// entries in any of its layers, or all together, the error is ErrTooMany.
func (s Stack) Merged(limit int, live func() error) (map[string]*Entry, error) {
	root := &tree{kids: map[string]*tree{}}
	n := 0
	for _, layer := range slices.Backward(s) {
		err := WalkLayer(layer, "/", func(e Entry) error {
			if n++; n > limit {
				return ErrTooMany
			}
			if n%1024 == 0 {
				if err := live(); err != nil {
					return err
				}
			}
			root.put(e)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	out := map[string]*Entry{}
	root.collect(out)
	return out, nil
}

func (t *tree) put(e Entry) {
	at := t
	parts := strings.Split(e.Path[1:], "/")
	for _, p := range parts[:len(parts)-1] {
		if at = at.kids[p]; at == nil {
			return // a layer's directories come before what is in them
		}
	}
	name := parts[len(parts)-1]
	old := at.kids[name]
	switch {
	case e.Whiteout:
		delete(at.kids, name)
	case e.Kind() == unix.S_IFDIR && old != nil && old.entry.Kind() == unix.S_IFDIR && !e.Opaque:
		old.entry = e
	case e.Kind() == unix.S_IFDIR:
		at.kids[name] = &tree{entry: e, kids: map[string]*tree{}}
	default:
		at.kids[name] = &tree{entry: e}
	}
}

func (t *tree) collect(out map[string]*Entry) {
	for _, k := range t.kids {
		out[k.entry.Path] = &k.entry
		k.collect(out)
	}
}

// Lookup finds what is at name, without following a symbolic link at its end. The
// error is fs.ErrNotExist if there is nothing, also where a directory of name is none.
func (s Stack) Lookup(name string) (*Entry, error) {
	name = path.Clean("/" + name)
	dir, last := path.Split(name)
	n, err := s.lookup(dir)
	if err == nil && n.mode&unix.S_IFMT != unix.S_IFDIR || errors.Is(err, syscall.ENOTDIR) {
		err = syscall.ENOENT
	}
	if err == nil {
		n, _, err = step(n, last)
	}
	if err != nil {
		return nil, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	e := &Entry{Path: "/" + n.path, layer: n.layers[0]}
	fd, err := open(e.layer, n.path, unix.O_PATH|unix.O_NOFOLLOW)
	if err == nil {
		err = unix.Fstat(fd, &e.Stat)
		unix.Close(fd)
	}
	if err != nil {
		return nil, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	return e, nil
}

// MaxDepth is the number of directories in a path that WalkLayer follows.
const MaxDepth = 256

// WalkLayer calls f for everything in one layer below from ("/" is all of it),
// directories first, sorted by name. No link is followed, and no file system but the
// layer's is entered. It ends with f's first error, or with ErrTooMany at a directory
// of more than 262,144 names.
func WalkLayer(layer, from string, f func(Entry) error) error {
	return walk(layer, strings.Trim(path.Clean("/"+from), "/"), 0, f)
}

// maxNames bounds what is read of one directory: images are hostile, and 255 bytes
// times this is memory of the daemon's.
const maxNames = 1 << 18

func walk(layer, dir string, depth int, f func(Entry) error) error {
	if depth > MaxDepth {
		return nil
	}
	fd, err := open(layer, dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/" + dir, Err: err}
	}
	d := os.NewFile(uintptr(fd), dir)
	list, err := d.Readdirnames(maxNames + 1)
	if err == nil && len(list) > maxNames {
		err = ErrTooMany
	}
	if err != nil && err != io.EOF {
		d.Close()
		return &os.PathError{Op: "read", Path: "/" + dir, Err: err}
	}
	slices.Sort(list)
	var dirs []string
	for _, name := range list {
		e := Entry{Path: "/" + path.Join(dir, name), layer: layer}
		if err := unix.Fstatat(fd, name, &e.Stat, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			d.Close()
			return &os.PathError{Op: "stat", Path: e.Path, Err: err}
		}
		switch e.Stat.Mode & unix.S_IFMT {
		case unix.S_IFCHR:
			e.Whiteout = e.Stat.Rdev == 0
		case unix.S_IFDIR:
			dirs = append(dirs, name)
			e.Opaque = opaque(layer, e.Path[1:])
		}
		if err := f(e); err != nil {
			d.Close()
			return err
		}
	}
	d.Close()
	for _, name := range dirs {
		if err := walk(layer, path.Join(dir, name), depth+1, f); err != nil {
			return err
		}
	}
	return nil
}

func opaque(layer, name string) bool {
	fd, err := open(layer, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	var val [2]byte
	m, err := unix.Fgetxattr(fd, "trusted.overlay.opaque", val[:])
	return err == nil && m >= 1 && val[0] == 'y'
}
