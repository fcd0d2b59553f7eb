package hostfs

import (
	"encoding/binary"
	"slices"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// IDs say how a tree's ids are the guest's, as an idmapped mount would: the
// tree's 0…Size-1 are the guest's Start…Start+Size-1, for users and groups alike.
// The tree's other ids are nobody's to the guest, and the guest's others can own
// nothing in the tree. The zero value maps nothing: ids are what they are.
type IDs struct {
	Start, Size uint32
}

// Valid says whether the range is one of ids.
func (m IDs) Valid() bool { return uint64(m.Start)+uint64(m.Size) < 1<<32 }

// nobody is what the guest sees of ids that are not its: the kernel's overflow
// id. A map that has it takes one that nothing maps.
func (m IDs) nobody() uint32 {
	const overflow = 65534
	if overflow-m.Start < m.Size { // wraps below Start
		return ^uint32(0) - 1
	}
	return overflow
}

// in says whether an id of the tree is one of the guest's.
func (m IDs) in(id uint32) bool { return m.Size == 0 || id < m.Size }

// guest is an id of the tree as the guest has it.
func (m IDs) guest(id uint32) uint32 {
	switch {
	case m.Size == 0:
		return id
	case id < m.Size:
		return m.Start + id
	}
	return m.nobody()
}

// tree is an id of the guest as the tree has it.
func (m IDs) tree(id uint32) (uint32, bool) {
	if m.Size == 0 {
		return id, true
	}
	id -= m.Start // wraps below Start
	return id, id < m.Size
}

// caller makes a request's ids the tree's, and refuses one that could own
// nothing there.
func (m IDs) caller(h *fuse.InHeader) error {
	uid, uok := m.tree(h.Uid)
	gid, gok := m.tree(h.Gid)
	if !uok || !gok {
		return unix.EOVERFLOW
	}
	h.Uid, h.Gid = uid, gid
	return nil
}

// mapped refuses a change of what a file is whose owners aren't the guest's.
func (s *server) mapped(n *node, refusal error) error {
	if s.opts.IDs.Size == 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(n.fd, &st); err != nil {
		return err
	}
	if !s.opts.IDs.in(st.Uid) || !s.opts.IDs.in(st.Gid) {
		return refusal
	}
	return nil
}

// mappedEntry is mapped for what has a name.
func (s *server) mappedEntry(parent *node, name string) error {
	if s.opts.IDs.Size == 0 {
		return nil
	}
	var st unix.Statx_t
	if err := unix.Statx(parent.fd, name, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_UID|unix.STATX_GID, &st); err != nil {
		return err
	}
	if !s.opts.IDs.in(st.Uid) || !s.opts.IDs.in(st.Gid) {
		return unix.EOVERFLOW
	}
	return nil
}

// Values of extended attributes with ids in them (include/uapi/linux/posix_acl_xattr.h
// and capability.h), little-endian.
const (
	aclAccess   = "system.posix_acl_access"
	aclDefault  = "system.posix_acl_default"
	aclHead     = 4
	aclEntry    = 8 // tag, permissions: 2 bytes each; id
	aclUser     = 0x02
	aclGroup    = 0x08
	capability  = "security.capability"
	capRevision = 0x03000000 // with the id of a namespace's root
	capMask     = 0xff000000
	capSize     = 24
	capRoot     = 20
)

// attributeIDs gives the places of ids in an extended attribute's value.
func attributeIDs(name string, value []byte) (at []int) {
	switch name {
	case aclAccess, aclDefault:
		for i := aclHead; i+aclEntry <= len(value); i += aclEntry {
			if tag := binary.LittleEndian.Uint16(value[i:]); tag == aclUser || tag == aclGroup {
				at = append(at, i+4)
			}
		}
	case capability:
		if len(value) == capSize && binary.LittleEndian.Uint32(value)&capMask == capRevision {
			at = []int{capRoot}
		}
	}
	return at
}

// toGuest makes the ids in an attribute's value the guest's, in place.
// Capabilities that belong to a namespace it has no part in are none to it.
func (m IDs) toGuest(name string, value []byte) error {
	if m.Size == 0 {
		return nil
	}
	for _, i := range attributeIDs(name, value) {
		id := binary.LittleEndian.Uint32(value[i:])
		if name == capability && !m.in(id) {
			return unix.ENODATA
		}
		binary.LittleEndian.PutUint32(value[i:], m.guest(id))
	}
	return nil
}

// toTree is value with the tree's ids.
func (m IDs) toTree(name string, value []byte) ([]byte, error) {
	if m.Size == 0 {
		return value, nil
	}
	places := attributeIDs(name, value)
	if len(places) == 0 {
		return value, nil
	}
	value = slices.Clone(value)
	for _, i := range places {
		id, ok := m.tree(binary.LittleEndian.Uint32(value[i:]))
		if !ok {
			return nil, unix.EINVAL
		}
		binary.LittleEndian.PutUint32(value[i:], id)
	}
	return value, nil
}
