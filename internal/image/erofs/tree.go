package erofs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// node is one file of the merged tree. A file with several names has one node
// for all of them.
type node struct {
	layer int    // where it lies: index of the stack
	path  string // below the layer's root
	mode  uint32
	uid   uint32
	gid   uint32
	nlink uint32
	rdev  uint32 // as the format has it
	mtime unix.Timespec
	size  int64
	attrs []attr
	link  string  // a symbolic link's target
	names []entry // a directory's, sorted
	from  *Node   // what it was made of, if it lies in no layer

	ino    uint32
	parent *node  // a directory's
	nid    uint64 // place of the inode, in slots
	inline int    // bytes of the tail behind the inode
	block  int64  // first data block
	blocks int64
}

type entry struct {
	name string
	node *node
}

type attr struct {
	prefix uint8
	name   string // without the prefix
	value  []byte
}

// inodeKey identifies a file of the host.
type inodeKey struct{ dev, ino uint64 }

// merger walks a stack of directories as overlayfs does.
type merger struct {
	roots []int
	links map[inodeKey]*node // files with several names
	nodes []*node            // in the order of their inodes
	limit int
	// sparse says that the files' contents are left out.
	sparse bool
}

// dir is a directory of one layer that takes part in a merged one.
type dir struct{ fd, layer int }

// pending is a directory that is still to be read: in which layers it lies,
// topmost first.
type pending struct {
	n      *node
	layers []int
}

// merge reads the whole tree, breadth first: the files of a directory lie
// together.
func (m *merger) merge(ctx context.Context) (*node, error) {
	if len(m.roots) == 0 {
		root := &node{mode: unix.S_IFDIR | 0o755, nlink: 2}
		root.parent = root
		m.add(root)
		return root, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(m.roots[0], &st); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	root, err := m.node(dir{m.roots[0], 0}, "", "", &st)
	if err != nil {
		return nil, err
	}
	root.parent = root
	first := pending{n: root}
	for i, fd := range m.roots {
		first.layers = append(first.layers, i)
		if opaque(fd) {
			break
		}
	}
	for queue := []pending{first}; len(queue) > 0; queue = queue[1:] {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		more, err := m.fill(queue[0])
		if err != nil {
			return nil, fmt.Errorf("directory %.200q: %w", "/"+queue[0].n.path, err)
		}
		queue = append(queue, more...)
	}
	return root, nil
}

// opaque tells whether a directory hides those below it.
func opaque(fd int) bool {
	var b [2]byte
	n, err := unix.Fgetxattr(fd, "trusted.overlay.opaque", b[:])
	return err == nil && n == 1 && b[0] == 'y'
}

func (m *merger) add(n *node) {
	n.ino = uint32(len(m.nodes) + 1)
	m.nodes = append(m.nodes, n)
}

// found is what a name leads to while the layers of a directory are read.
type found struct {
	st     unix.Stat_t
	in     dir   // where it lies
	layers []int // of a directory
	done   bool  // no further layer takes part
}

// fill reads a merged directory and returns those in it.
func (m *merger) fill(p pending) (more []pending, err error) {
	var dirs []dir
	defer func() {
		for _, d := range dirs {
			unix.Close(d.fd)
		}
	}()
	all := map[string]*found{}
	for _, l := range p.layers {
		fd, err := openBelow(m.roots[l], cmp.Or(p.n.path, "."), unix.O_DIRECTORY)
		if err != nil {
			return nil, os.NewSyscallError("open", err)
		}
		d := dir{fd, l}
		dirs = append(dirs, d)
		if err := readLayer(d, all); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(all)) { // by bytes, as the format wants it
		f := all[name]
		if f.st.Mode&unix.S_IFMT == unix.S_IFCHR && f.st.Rdev == 0 {
			continue // a whiteout
		}
		c, err := m.node(f.in, name, path.Join(p.n.path, name), &f.st)
		if err != nil {
			return nil, fmt.Errorf("%.255q: %w", name, err)
		}
		p.n.names = append(p.n.names, entry{name, c})
		if f.layers != nil {
			c.parent = p.n
			p.n.nlink++
			more = append(more, pending{c, f.layers})
		}
	}
	return more, nil
}

// readLayer adds what one layer has of a directory.
func readLayer(d dir, all map[string]*found) error {
	names, err := readNames(d.fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		f := all[name]
		if f != nil && f.done {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		if f == nil {
			f = &found{st: st, in: d}
			all[name] = f
		} else if !isDir {
			f.done = true // hidden, and it hides what is below it
			continue
		}
		if !isDir {
			f.done = true
			continue
		}
		fd, err := unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f.layers, f.done = append(f.layers, d.layer), opaque(fd)
		unix.Close(fd)
	}
	return nil
}

// readNames lists a directory without "." and "..".
func readNames(fd int) ([]string, error) {
	var names []string
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("getdents", err)
		}
		if n == 0 {
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// node makes, or finds again, the node of a file.
func (m *merger) node(in dir, name, p string, st *unix.Stat_t) (*node, error) {
	kind := st.Mode & unix.S_IFMT
	key := inodeKey{uint64(st.Dev), st.Ino}
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		if n := m.links[key]; n != nil {
			n.nlink++
			return n, nil
		}
	}
	if len(m.nodes) >= m.limit {
		return nil, fmt.Errorf("more than %d files: %w", m.limit, unix.EFBIG)
	}
	n := &node{layer: in.layer, path: p, mode: st.Mode, uid: st.Uid, gid: st.Gid, nlink: 1, mtime: st.Mtim}
	var err error
	switch kind {
	case unix.S_IFDIR:
		n.nlink = 2
	case unix.S_IFREG:
		n.size = st.Size
	case unix.S_IFLNK:
		if n.link, err = readLink(in.fd, name); err != nil {
			return nil, err
		}
		n.size = int64(len(n.link))
	case unix.S_IFCHR, unix.S_IFBLK:
		n.rdev = rdev(unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)))
	}
	if n.attrs, err = readAttrs(in.fd, name, kind); err != nil {
		return nil, err
	}
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		m.links[key] = n
	}
	m.add(n)
	return n, nil
}

// rdev is a device's number as the format has it.
func rdev(major, minor uint32) uint32 { return minor&0xff | major<<8 | minor&^0xff<<12 }

func readLink(dirfd int, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dirfd, name, buf)
	if err != nil {
		return "", os.NewSyscallError("readlink", err)
	}
	if n == 0 || n >= blockSize {
		return "", unix.ENAMETOOLONG
	}
	return string(buf[:n]), nil
}

// prefixes are the format's numbers for the first part of an attribute's name.
var prefixes = []struct {
	number uint8
	text   string
}{{2, "system.posix_acl_access"}, {3, "system.posix_acl_default"}, {1, "user."}, {6, "security."}}

// readAttrs reads the extended attributes that an image can have; others are the
// host's business, or overlayfs's own.
func readAttrs(dirfd int, name string, kind uint32) ([]attr, error) {
	// By its path below /proc, since there are no calls for (directory, name);
	// the l-calls follow /proc's link and not the file's.
	p := fmt.Sprintf("/proc/self/fd/%d/%s", dirfd, name)
	if name == "" {
		p += "."
	}
	size, err := unix.Llistxattr(p, nil)
	if errors.Is(err, unix.EOPNOTSUPP) || err == nil && size == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, os.NewSyscallError("listxattr", err)
	}
	buf := make([]byte, size)
	if size, err = unix.Llistxattr(p, buf); err != nil {
		return nil, os.NewSyscallError("listxattr", err)
	}
	var out []attr
	for full := range strings.SplitSeq(strings.TrimSuffix(string(buf[:size]), "\x00"), "\x00") {
		a, ok := attrOf(full)
		if !ok {
			continue
		}
		n, err := unix.Lgetxattr(p, full, nil)
		if err != nil {
			return nil, os.NewSyscallError("getxattr", err)
		}
		v := make([]byte, n)
		if n > 0 {
			if n, err = unix.Lgetxattr(p, full, v); err != nil {
				return nil, os.NewSyscallError("getxattr", err)
			}
		}
		a.value = v[:n]
		out = append(out, a)
	}
	if attrsSize(out) > maxAttrs {
		return nil, fmt.Errorf("extended attributes: %w", unix.E2BIG)
	}
	sortAttrs(out)
	return out, nil
}

// attrOf is the attribute of this name, without its value; not ok for those that an
// image cannot have.
func attrOf(full string) (attr, bool) {
	if strings.HasPrefix(full, "security.") && full != "security.capability" {
		return attr{}, false
	}
	for _, pre := range prefixes {
		if rest, ok := strings.CutPrefix(full, pre.text); ok {
			return attr{prefix: pre.number, name: rest}, true
		}
	}
	return attr{}, false
}

func sortAttrs(list []attr) {
	slices.SortFunc(list, func(a, b attr) int {
		if a.prefix != b.prefix {
			return int(a.prefix) - int(b.prefix)
		}
		return strings.Compare(a.name, b.name)
	})
}

// open opens a regular file of the tree for reading.
func (m *merger) open(n *node) (int, error) {
	fd, err := openBelow(m.roots[n.layer], n.path, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: n.path, Err: err}
	}
	return fd, nil
}

// longPath is as much of a path as one call is given.
const longPath = 2048

// openBelow opens a path of any length without following a link.
func openBelow(root int, p string, flags uint64) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV}
	at := root
	for {
		first, rest := p, ""
		if len(p) > longPath {
			i := strings.LastIndexByte(p[:longPath], '/')
			first, rest = p[:i], p[i+1:]
		}
		h := how
		if rest != "" {
			h.Flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
		}
		fd, err := unix.Openat2(at, first, &h)
		for err == unix.EINTR || err == unix.EAGAIN {
			fd, err = unix.Openat2(at, first, &h)
		}
		if at != root {
			unix.Close(at)
		}
		if err != nil || rest == "" {
			return fd, err
		}
		at, p = fd, rest
	}
}
