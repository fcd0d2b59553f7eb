package vm

import (
	"slices"
	"strings"

	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

// holdings are what a container has of a machine, beside its interfaces.
type holdings struct {
	image  string   // of its root: the disk's serial number; empty: none
	mounts []string // of other images
	shares []string
	clean  bool   // nobody can have changed its interfaces
	reach  bool   // it can change those of everybody on the machine
	owner  uint32 // the machine's id of its root
}

// mountsOwner follows a container's name where it owns a disk for a mount, and not for
// its root.
const mountsOwner = "/mounts"

// got notes a disk.
func (h *holdings) got(serial string, mounts bool) {
	switch {
	case !mounts:
		h.image = serial
	case !slices.Contains(h.mounts, serial):
		h.mounts = append(h.mounts, serial)
	}
}

func newLasting(d *vmv1.Machine) *lasting {
	l := &lasting{holds: map[string]*holdings{}, mounted: map[string]bool{}}
	for _, x := range d.Disks {
		for _, owner := range x.Owners {
			id, mounts := strings.CutSuffix(owner, mountsOwner)
			l.of(id, func(h *holdings) { h.got(x.Serial, mounts) })
		}
	}
	for tag, id := range d.Shares {
		l.of(id, func(h *holdings) { h.shares = append(h.shares, tag) })
	}
	return l
}

func (l *lasting) of(id string, f func(*holdings)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.holds[id]
	if h == nil {
		h = &holdings{}
		l.holds[id] = h
	}
	f(h)
}

// owner is the machine's id of a container's root.
func (l *lasting) owner(id string) uint32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.holds[id]; h != nil {
		return h.owner
	}
	return 0
}

func (l *lasting) image(id string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.holds[id]; h != nil {
		return h.image
	}
	return ""
}

func (l *lasting) clean(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.holds[id] != nil && l.holds[id].clean
}

// enter is a container's beginning on the machine. clean says that it can't change its
// own interfaces.
func (l *lasting) enter(id string, clean bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.holds[id]
	if h == nil {
		h = &holdings{}
		l.holds[id] = h
	}
	h.clean = clean
	for _, other := range l.holds {
		h.clean = h.clean && !other.reach
	}
}

// taint is Machine's Taint.
func (l *lasting) taint(ids []string, all bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, id := range ids {
		if h := l.holds[id]; h != nil {
			h.clean = false
		}
	}
	if !all {
		return
	}
	for _, h := range l.holds {
		h.clean = false
	}
	if h := l.holds[ids[0]]; h != nil {
		h.reach = true
	}
}

// Taint says that the interfaces of containers may be changed.
func (m *machine) Taint(ids []string, all bool) {
	if m.lasting != nil && len(ids) > 0 {
		m.lasting.taint(ids, all)
	}
}

// users counts the containers that have an image.
func (l *lasting) users(serial string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.holds {
		if h.image == serial || slices.Contains(h.mounts, serial) {
			n++
		}
	}
	return n
}
