package erofs

import (
	"context"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Node is a file of a tree that lies on no disk, for [WriteSparse]. The same node
// under several names is a file with hard links; a directory has one name.
type Node struct {
	// Mode has the type's bits, as stat's.
	Mode         uint32
	UID, GID     uint32
	Major, Minor uint32 // of a device
	ModTime      time.Time
	// Size is a regular file's, in bytes.
	Size int64
	// Link is a symbolic link's target.
	Link string
	// Attrs are the extended attributes, by their whole names; those that an image
	// cannot have are left out.
	Attrs map[string][]byte
	// Names are a directory's.
	Names map[string]*Node
	// At is where WriteSparse has put a regular file's contents, in bytes; 0 if it
	// has none.
	At int64

	made *node
}

// WriteSparse writes a tree to the empty file f without the contents of its regular
// files: for those it leaves holes, each in one piece, at [Node.At], zeros to the end
// of the last block included. Names must be such as directories can have. It returns
// the file's size, and does not sync. InvalidArgument for a tree that no file system
// can hold, ResourceExhausted if it gets larger than allowed.
func WriteSparse(ctx context.Context, f *os.File, root *Node, o Options) (int64, error) {
	m := &merger{limit: maxFiles, sparse: true}
	top, err := m.graft(ctx, root)
	if err != nil {
		return 0, fmt.Errorf("erofs: %w", err)
	}
	if err := writeOut(ctx, f, m, top, o); err != nil {
		return 0, err
	}
	for _, n := range m.nodes {
		if n.mode&unix.S_IFMT == unix.S_IFREG && n.blocks > 0 {
			n.from.At = n.block * blockSize
		}
	}
	st, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("erofs: %w", err)
	}
	return st.Size(), nil
}

// graft makes the nodes of a tree, breadth first as merge does.
func (m *merger) graft(ctx context.Context, root *Node) (*node, error) {
	if root.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, fmt.Errorf("the root is no directory: %w", errdefs.ErrInvalidArgument)
	}
	top, err := m.known(root, "")
	if err != nil {
		return nil, err
	}
	top.parent = top
	for queue := []*Node{root}; len(queue) > 0; queue = queue[1:] {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		d := queue[0]
		for _, name := range slices.Sorted(maps.Keys(d.Names)) {
			if !goodName(name) {
				return nil, fmt.Errorf("%.300q is no file's name: %w", name, errdefs.ErrInvalidArgument)
			}
			n := d.Names[name]
			isDir := n.Mode&unix.S_IFMT == unix.S_IFDIR
			if n.made != nil {
				if isDir {
					return nil, fmt.Errorf("directory %.255q has two names: %w", name, errdefs.ErrInvalidArgument)
				}
				n.made.nlink++
			} else if _, err := m.known(n, name); err != nil {
				return nil, err
			} else if isDir {
				n.made.parent = d.made
				d.made.nlink++
				queue = append(queue, n)
			}
			d.made.names = append(d.made.names, entry{name, n.made})
		}
	}
	return top, nil
}

func goodName(s string) bool {
	return s != "" && s != "." && s != ".." && len(s) <= unix.NAME_MAX && !strings.ContainsAny(s, "/\x00")
}

// known makes a node of the tree's.
func (m *merger) known(from *Node, name string) (*node, error) {
	fail := func(what string) error {
		return fmt.Errorf("file %.255q: %s: %w", name, what, errdefs.ErrInvalidArgument)
	}
	if len(m.nodes) >= m.limit {
		return nil, fmt.Errorf("more than %d files: %w", m.limit, errdefs.ErrResourceExhausted)
	}
	n := &node{from: from, path: name, mode: from.Mode, uid: from.UID, gid: from.GID, nlink: 1}
	if sec := from.ModTime.Unix(); sec >= 0 && sec < 1<<34 {
		n.mtime = unix.Timespec{Sec: sec, Nsec: int64(from.ModTime.Nanosecond())}
	}
	switch n.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		n.nlink = 2
	case unix.S_IFREG:
		if n.size = from.Size; n.size < 0 || n.size > math.MaxUint32<<blockBits {
			return nil, fail("a size that cannot be") // and sums of which might wrap
		}
	case unix.S_IFLNK:
		if len(from.Link) == 0 || len(from.Link) >= blockSize || strings.IndexByte(from.Link, 0) >= 0 {
			return nil, fail("a symbolic link's target that cannot be")
		}
		n.link, n.size = from.Link, int64(len(from.Link))
	case unix.S_IFCHR, unix.S_IFBLK:
		if from.Major >= 1<<12 || from.Minor >= 1<<20 {
			return nil, fail("a device number that cannot be")
		}
		n.rdev = rdev(from.Major, from.Minor)
	case unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return nil, fail("no type of file")
	}
	for full, v := range from.Attrs {
		a, ok := attrOf(full)
		if !ok {
			continue
		}
		if len(a.name) > unix.NAME_MAX || len(v) > 1<<16-1 || strings.IndexByte(a.name, 0) >= 0 {
			return nil, fail("an extended attribute that cannot be")
		}
		a.value = v
		n.attrs = append(n.attrs, a)
	}
	sortAttrs(n.attrs)
	if attrsSize(n.attrs) > maxAttrs {
		return nil, fail("too many extended attributes")
	}
	m.add(n)
	from.made = n
	return n, nil
}
