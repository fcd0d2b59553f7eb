package lazy

import (
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/erofs"
)

const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"

	// maxDepth bounds names, as the kernel bounds paths.
	maxDepth = 2048
	// maxRounds bounds for how many links one after the other a link may lead to one
	// that comes behind it; writers of tars put what is linked to first.
	maxRounds = 32
)

// file is a file of a layer's tree, or of the merged one.
type file struct {
	node    *erofs.Node
	content *content // of a regular file with any
	names   map[string]*file
	// implied says that the layer's table has only what is below the directory.
	implied bool
	opaque  bool
	// whiteout says that the layer removes the name.
	whiteout bool
}

func (f *file) isDir() bool { return f.node != nil && f.node.Mode&unix.S_IFMT == unix.S_IFDIR }

func newDir() *file {
	return &file{implied: true, names: map[string]*file{}, node: &erofs.Node{Mode: unix.S_IFDIR | 0o755, ModTime: time.Unix(0, 0)}}
}

// layerTree is one layer's tree while its table is read.
type layerTree struct {
	index int
	root  *file
	last  *content // of the entry before, to which pieces belong
	name  string   // of that entry
	all   []*content
	links []hardLink // to what is not in the layer, or not yet
	// implied counts the directories that the table has no entry for, up to limit.
	implied, limit int
}

type hardLink struct{ name, target string }

func newLayerTree(index, limit int) *layerTree {
	return &layerTree{index: index, root: newDir(), limit: limit}
}

// cleanName returns a name's components joined, without a leading slash; "" is the root.
func cleanName(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 || len(name) > unix.PathMax {
		return "", bad("the name %.200q", name)
	}
	c := path.Clean(strings.TrimLeft(name, "/"))
	if c == ".." || strings.HasPrefix(c, "../") {
		return "", bad("the name %.200q leaves the layer", name)
	}
	if c == "." {
		return "", nil
	}
	if strings.Count(c, "/") > maxDepth {
		return "", bad("the name %.200q is too deep", name)
	}
	return c, nil
}

// dir returns a directory of the layer, made if the table has not told of it.
func (t *layerTree) dir(name string) (*file, error) {
	at := t.root
	for part := range strings.SplitSeq(name, "/") {
		if part == "" {
			continue
		}
		n := at.names[part]
		switch {
		case n == nil, n.whiteout:
			if t.implied++; t.implied > t.limit {
				return nil, fmt.Errorf("table of contents: more than %d directories without entries: %w", t.limit, errdefs.ErrResourceExhausted)
			}
			hides := n != nil
			n = newDir()
			n.opaque = hides
			at.names[part] = n
		case n.node.Mode&unix.S_IFMT == unix.S_IFLNK:
			return nil, why("its table of contents has files below the symbolic link %.200q", name)
		case !n.isDir():
			return nil, bad("there are files below the file %.200q", name)
		}
		at = n
	}
	return at, nil
}

// add puts an entry into the tree.
func (t *layerTree) add(e *tableEntry) error {
	if e.Type == "chunk" {
		if t.last == nil {
			return bad("a piece of no file")
		}
		e.Name = t.name
		return t.last.add(e, false)
	}
	if !t.last.whole() {
		return bad("file %.200q has %d bytes, but not all its pieces", t.name, t.last.size)
	}
	t.last = nil
	name, err := cleanName(e.Name)
	if err != nil {
		return err
	}
	n, err := e.node()
	if err != nil {
		return err
	}
	if name == "" {
		if e.Type != "dir" {
			return bad("the layer's root is no directory")
		}
		t.root.node, t.root.implied = n, false
		return nil
	}
	parent, base := path.Split(name)
	d, err := t.dir(parent)
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return t.whiteout(d, base)
	}
	if len(base) > unix.NAME_MAX {
		return bad("the name %.200q is too long", base)
	}
	old := d.names[base]
	if e.Type == "dir" {
		switch {
		case old != nil && old.isDir():
			old.node, old.implied = n, false
		default:
			d.names[base] = &file{node: n, names: map[string]*file{}, opaque: old != nil && old.whiteout}
		}
		return nil
	}
	f := &file{node: n}
	switch e.Type {
	case "hardlink":
		target, err := cleanName(e.LinkName)
		if err != nil || target == "" {
			return bad("hard link %.200q to %.200q", e.Name, e.LinkName)
		}
		if target != name {
			t.links = append(t.links, hardLink{name, target})
		}
		return nil
	case "reg":
		f.content = &content{layer: t.index, size: e.Size}
		t.last, t.name = f.content, e.Name
		if e.Size > 0 {
			if err := f.content.add(e, true); err != nil {
				return err
			}
			t.all = append(t.all, f.content)
		}
	case "char":
		if e.DevMajor == 0 && e.DevMinor == 0 {
			f = &file{whiteout: true} // as overlayfs takes it
		}
	}
	d.names[base] = f
	return nil
}

// whiteout notes a removed name. What the layer itself has put there stays.
func (t *layerTree) whiteout(d *file, base string) error {
	if base == whiteoutOpaque {
		d.opaque = true
		return nil
	}
	if strings.HasPrefix(base, whiteoutMeta) {
		return nil // AUFS's own
	}
	victim := base[len(whiteoutPrefix):]
	if victim == "" || victim == "." || victim == ".." || len(victim) > unix.NAME_MAX {
		return bad("the whiteout %.200q", base)
	}
	if old := d.names[victim]; old == nil {
		d.names[victim] = &file{whiteout: true}
	} else if old.isDir() {
		old.opaque = true
	}
	return nil
}

// node makes an entry's node, contents aside.
func (e *tableEntry) node() (*erofs.Node, error) {
	uid, gid, err := e.owner()
	if err != nil {
		return nil, err
	}
	mtime, err := e.modTime()
	if err != nil {
		return nil, err
	}
	n := &erofs.Node{Mode: uint32(e.Mode & 0o7777), UID: uid, GID: gid, ModTime: mtime}
	switch e.Type {
	case "dir":
		n.Mode |= unix.S_IFDIR
	case "reg":
		if n.Mode |= unix.S_IFREG; e.Size < 0 || e.Size > 1<<44 {
			return nil, bad("file %.200q of %d bytes", e.Name, e.Size)
		}
		n.Size = e.Size
	case "symlink":
		n.Mode = unix.S_IFLNK | 0o777
		if n.Link = e.LinkName; n.Link == "" || len(n.Link) >= unix.PathMax || strings.IndexByte(n.Link, 0) >= 0 {
			return nil, bad("symbolic link %.200q to %.200q", e.Name, e.LinkName)
		}
	case "char", "block":
		if e.DevMajor < 0 || e.DevMajor >= 1<<12 || e.DevMinor < 0 || e.DevMinor >= 1<<20 {
			return nil, bad("device %.200q: number %d:%d is out of range", e.Name, e.DevMajor, e.DevMinor)
		}
		n.Major, n.Minor = uint32(e.DevMajor), uint32(e.DevMinor)
		if n.Mode |= unix.S_IFBLK; e.Type == "char" {
			n.Mode = n.Mode&0o7777 | unix.S_IFCHR
		}
	case "fifo":
		n.Mode |= unix.S_IFIFO
	case "hardlink":
	default:
		return nil, bad("entry %.200q has the type %.60q", e.Name, e.Type)
	}
	for name, v := range e.Xattrs {
		if keepXattr(name) {
			if n.Attrs == nil {
				n.Attrs = map[string][]byte{}
			}
			n.Attrs[name] = v
		}
	}
	return n, nil
}

// keepXattr tells which extended attributes an image may set, as package layer does.
func keepXattr(name string) bool {
	switch {
	case name == "security.capability", name == "system.posix_acl_access", name == "system.posix_acl_default":
		return true
	case strings.HasPrefix(name, "user.overlay."):
		return false
	}
	return strings.HasPrefix(name, "user.")
}

// look finds a name in a tree, without following links; hidden: the tree hides it in
// those below.
func look(root *file, name string) (f *file, hidden bool) {
	for part := range strings.SplitSeq(name, "/") {
		if part == "" {
			continue
		}
		if !root.isDir() {
			return nil, true
		}
		hidden = hidden || root.opaque
		if root = root.names[part]; root == nil {
			return nil, hidden
		}
		if root.whiteout {
			return nil, true
		}
	}
	return root, hidden
}

// finish makes the layer's hard links, when all below it is merged.
func (t *layerTree) finish(below *file) error {
	if !t.last.whole() {
		return bad("file %.200q has %d bytes, but not all its pieces", t.name, t.last.size)
	}
	// Links to links come in any order: each round makes those whose target is there.
	copied := map[string]*file{} // from the layers below
	for rest, round := t.links, 0; len(rest) > 0; round++ {
		if round == maxRounds {
			return bad("hard link %.200q to %.200q: more than %d that lead to later ones", rest[0].name, rest[0].target, maxRounds)
		}
		var later []hardLink
		for _, l := range rest {
			target, hidden := look(t.root, l.target)
			if target == nil && !hidden {
				if target = copied[l.target]; target == nil {
					// As if copied up: the file's contents lie in the layer below.
					if low, _ := look(below, l.target); low != nil && !low.isDir() {
						n := *low.node
						target = &file{node: &n, content: low.content}
						copied[l.target] = target
					}
				}
			}
			if target == nil {
				later = append(later, l)
				continue
			}
			if target.isDir() {
				return bad("hard link %.200q to the directory %.200q", l.name, l.target)
			}
			if err := t.place(l.name, target); err != nil {
				return err
			}
		}
		if len(later) == len(rest) {
			return bad("hard link %.200q to %.200q, which does not exist", rest[0].name, rest[0].target)
		}
		rest = later
	}
	return nil
}

func (t *layerTree) place(name string, f *file) error {
	parent, base := path.Split(name)
	d, err := t.dir(parent)
	if err != nil {
		return err
	}
	if len(base) > unix.NAME_MAX {
		return bad("the name %.200q is too long", base)
	}
	if old := d.names[base]; old != nil && old.isDir() {
		return bad("hard link in the place of the directory %.200q", name)
	}
	d.names[base] = f
	return nil
}

// put lays a layer's tree over the merged one, in place, by overlayfs's rules: the
// upper directory's attributes count, unless the layer does not tell them.
func put(below, upper *file) {
	type pair struct{ below, upper *file }
	for queue := []pair{{below, upper}}; len(queue) > 0; queue = queue[1:] {
		b, u := queue[0].below, queue[0].upper
		if !u.implied {
			b.node = u.node
		}
		if u.opaque {
			b.names = map[string]*file{}
		}
		for name, f := range u.names {
			old := b.names[name]
			switch {
			case f.whiteout:
				delete(b.names, name)
			case !f.isDir():
				b.names[name] = f
			default:
				if old == nil || !old.isDir() {
					old = newDir()
					b.names[name] = old
					if f.implied {
						old.node = f.node
					}
				}
				queue = append(queue, pair{old, f})
			}
		}
	}
}
