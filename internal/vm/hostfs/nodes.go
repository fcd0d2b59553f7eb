package hostfs

import (
	"cmp"
	"encoding/binary"
	"os"
	"slices"
	"strconv"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A guest's kernel keeps what it has looked up for as long as it has memory: more
// files than a process can have open. So nodes that were not used for longest
// lose their descriptors, and get them back by their name below their parent. The
// identity of what is found there is compared; another file is ESTALE, upon which
// kernels look the path up again.

// node is a file that the guest knows.
type node struct {
	id    uint64
	fd    int // O_PATH; -1: to be opened by its name
	key   key
	refs  uint64 // lookups that the guest has not forgotten
	users int    // handles
	used  int64  // when, by the server's clock
	mode  uint32 // type bits
	gone  bool   // forgotten
	// Where it was found last.
	parent *node
	name   string
	told   version // what the guest knows of it
	// The version whose content it was told when it opened it; and whether it has
	// written itself, and so has its content.
	content version
	written atomic.Bool
}

// version is what a change of a file changes.
type version struct {
	size         int64
	mtime, ctime unix.Timespec
}

func versionOf(st *unix.Stat_t) version { return version{st.Size, st.Mtim, st.Ctim} }

// notifyInode is FUSE_NOTIFY_INVAL_INODE.
const notifyInode = 2

// refresh has the guest ask again for a file's attributes, if they are others
// than it knows: so it sees what others wrote when it opens a file, or takes a lock.
// Its kernel then drops what it keeps of the content.
func (s *server) refresh(n *node) error {
	if s.opts.Cache == 0 || s.send == nil {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(n.fd, &st); err != nil {
		return err
	}
	s.mu.Lock()
	same := n.told == versionOf(&st)
	s.mu.Unlock()
	if same {
		return nil
	}
	// struct fuse_out_header and fuse_notify_inval_inode_out, of the attributes
	// alone: for the content the kernel would wait for reads that wait for us.
	b := make([]byte, 0, outHeaderSize+24)
	b = binary.NativeEndian.AppendUint32(b, outHeaderSize+24)
	b = binary.NativeEndian.AppendUint32(b, notifyInode)
	b = binary.NativeEndian.AppendUint64(b, 0)
	b = binary.NativeEndian.AppendUint64(b, n.id)
	b = binary.NativeEndian.AppendUint64(b, ^uint64(0)) // offset -1
	b = binary.NativeEndian.AppendUint64(b, 0)
	s.send(b)
	return nil
}

// key identifies a file on the host, also after its number is used again.
type key struct {
	dev, ino uint64
	sec      int64 // of its birth, where the file system knows it
	nsec     uint32
}

const (
	// maxDead is how many descriptors may wait to be closed while requests run.
	maxDead = 256
	// maxCold is how many parents are opened for one node.
	maxCold = 256
)

// identify returns a file's attributes and identity.
func identify(fd int, st *unix.Stat_t) (key, error) {
	if err := unix.Fstat(fd, st); err != nil {
		return key{}, err
	}
	k := key{dev: uint64(st.Dev), ino: st.Ino}
	var x unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BTIME, &x); err == nil && x.Mask&unix.STATX_BTIME != 0 {
		k.sec, k.nsec = x.Btime.Sec, x.Btime.Nsec
	}
	return k, nil
}

// enterRoot makes the tree's root the first node.
func (s *server) enterRoot() error {
	var st unix.Stat_t
	k, err := identify(s.opts.Root, &st)
	if err != nil {
		unix.Close(s.opts.Root)
		return os.NewSyscallError("fstat", err)
	}
	root := &node{id: fuse.FUSE_ROOT_ID, fd: s.opts.Root, key: k, refs: 1, mode: st.Mode & unix.S_IFMT}
	s.nodes[root.id], s.byKey[root.key] = root, root
	return nil
}

// node finds what a number means, with a descriptor that stays while s.use is
// held.
func (s *server) node(id uint64) (*node, error) {
	s.mu.Lock()
	n := s.nodes[id]
	if n == nil {
		s.mu.Unlock()
		return nil, unix.ESTALE
	}
	s.clock++
	n.used = s.clock
	cold := n.fd < 0
	s.mu.Unlock()
	if cold {
		if err := s.warm(n, 0); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// warm opens a node again.
func (s *server) warm(n *node, depth int) error {
	s.mu.Lock()
	p, name, cold := n.parent, n.name, n.fd < 0
	lost := p == nil || p.gone
	s.mu.Unlock()
	switch {
	case !cold:
		return nil
	case lost || depth >= maxCold: // or a ring, made of stale places
		return unix.ESTALE
	}
	if err := s.warm(p, depth+1); err != nil {
		return err
	}
	fd, err := unix.Openat(p.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		err = unix.ESTALE
	}
	if err != nil {
		return err
	}
	var st unix.Stat_t
	k, err := identify(fd, &st)
	if err == nil && k != n.key {
		err = unix.ESTALE
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.adopt(n, fd)
	return nil
}

// adopt gives a node a descriptor, unless it has one. s.mu is held.
func (s *server) adopt(n *node, fd int) {
	if n.fd >= 0 {
		unix.Close(fd)
		return
	}
	n.fd = fd
	s.open++
}

// enter puts a file that was looked up into the table; it owns fd.
func (s *server) enter(parent *node, name string, fd int, out *fuse.EntryOut) error {
	var st unix.Stat_t
	k, err := identify(fd, &st)
	if err != nil {
		unix.Close(fd)
		return err
	}
	s.mu.Lock()
	n := s.byKey[k]
	if n == nil {
		n = &node{id: s.next, fd: -1, key: k, mode: st.Mode & unix.S_IFMT}
		s.next++
		s.nodes[n.id], s.byKey[k] = n, n
	}
	s.adopt(n, fd)
	n.refs++
	s.clock++
	n.used = s.clock
	if n.id != fuse.FUSE_ROOT_ID {
		n.parent, n.name = parent, name
	}
	n.told = versionOf(&st)
	s.mu.Unlock()
	out.NodeId = n.id
	out.Generation = 1
	out.SetEntryTimeout(s.opts.Cache)
	out.SetAttrTimeout(s.opts.Cache)
	s.fillAttr(&out.Attr, &st)
	return nil
}

// moved notes where a node is now.
func (s *server) moved(parent *node, name string) {
	fd, err := unix.Openat(parent.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return // it is elsewhere already
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	k, err := identify(fd, &st)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.byKey[k]; n != nil && n.id != fuse.FUSE_ROOT_ID {
		n.parent, n.name = parent, name
	}
}

// Forget drops lookups of a node.
func (s *server) Forget(id, lookups uint64) {
	if id == fuse.FUSE_ROOT_ID {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes[id]
	if n == nil {
		return
	}
	if n.refs -= min(lookups, n.refs); n.refs == 0 {
		delete(s.nodes, id)
		delete(s.byKey, n.key)
		n.gone = true
		if n.fd >= 0 {
			s.dead = append(s.dead, n.fd) // somebody may be using it
			s.open--
		}
	}
}

// tidy closes the descriptors of forgotten nodes, and those of nodes that were
// not used for longest when there are too many.
func (s *server) tidy() {
	s.mu.Lock()
	some, must := len(s.dead) > 0, len(s.dead) > maxDead || s.open > s.maxOpen
	s.mu.Unlock()
	switch {
	case must:
		s.use.Lock()
	case !some || !s.use.TryLock():
		return // the last request of those that run does it
	}
	defer s.use.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, fd := range s.dead {
		unix.Close(fd)
	}
	s.dead = s.dead[:0]
	if s.open > s.maxOpen {
		s.chill()
	}
}

// chill takes a quarter of the descriptors away. Both locks are held.
func (s *server) chill() {
	list := make([]*node, 0, s.open)
	for _, n := range s.nodes {
		// What is open may have no name any more.
		if n.fd >= 0 && n.users == 0 && n.parent != nil && !n.parent.gone {
			list = append(list, n)
		}
	}
	slices.SortFunc(list, func(a, b *node) int { return cmp.Compare(a.used, b.used) })
	for _, n := range list[:min(len(list), s.open-s.maxOpen*3/4)] {
		unix.Close(n.fd)
		n.fd = -1
		s.open--
	}
}

// reopen opens a node's file itself.
func (s *server) reopen(n *node, flags int) (int, error) {
	switch n.mode {
	case unix.S_IFREG, unix.S_IFDIR:
	case unix.S_IFLNK:
		return -1, unix.ELOOP
	default:
		return -1, unix.ENXIO // guests open devices and pipes of their own kernel
	}
	return unix.Open(s.link(n), flags&^unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// link is a path that leads to a node: for the calls that take no O_PATH
// descriptor.
func (s *server) link(n *node) string {
	return "/proc/self/fd/" + strconv.Itoa(n.fd)
}
