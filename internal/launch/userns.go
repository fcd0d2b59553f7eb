package launch

import (
	"fmt"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// secondClone makes a user or time namespace. The first child still has the
// host's privileges: it mounts the root and opens what is bound, then clones
// the container's process as its sibling into the new namespaces and ends.
func (c *compiler) secondClone(fresh uint64, joinUser bool) error {
	if c.userns {
		if c.fresh&unix.CLONE_NEWNS == 0 {
			return fmt.Errorf("linux.namespaces: a user namespace needs a mount namespace of its own")
		}
		c.p.Clone = unix.CLONE_NEWNS
		if err := c.hostSide(); err != nil {
			return err
		}
		c.step("detach the root")
		c.call(unix.SYS_FCHDIR, c.root.arg())
		c.call(unix.SYS_OPEN_TREE, c.root.arg(), c.str(""), num(treeFlags|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)).out(c.root)
		// The clone alone: what covers / would be locked there, in the copy of this
		// mount namespace, and could not be unmounted with the host's root.
		c.call(unix.SYS_UMOUNT2, c.str("."), num(unix.MNT_DETACH))
		c.call(unix.SYS_CHDIR, c.str("/"))
		c.call(unix.SYS_CLOSE, c.old.arg())
	}
	if c.fresh&unix.CLONE_NEWTIME != 0 {
		c.step("new time namespace", c.timeOffsets())
		c.call(unix.SYS_UNSHARE, num(unix.CLONE_NEWTIME))
		if data := c.timeOffsets(); data != "" {
			fd := c.builder.slot()
			c.open(c.proc, "self/timens_offsets", unix.O_WRONLY|unix.O_CLOEXEC, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_XDEV|unix.RESOLVE_NO_MAGICLINKS).out(fd)
			c.call(unix.SYS_WRITE, fd.arg(), mem([]byte(data)), num(len(data)))
			c.call(unix.SYS_CLOSE, fd.arg())
		}
	}
	if joinUser {
		p := c.join[specs.UserNamespace]
		c.step("join user namespace " + p)
		fd := c.builder.slot()
		c.call(unix.SYS_OPENAT, fdcwd, c.str(p), num(unix.O_RDONLY|unix.O_CLOEXEC), num(0)).out(fd)
		c.call(unix.SYS_SETNS, fd.arg(), num(unix.CLONE_NEWUSER))
		c.call(unix.SYS_CLOSE, fd.arg())
	}
	// Made after the id maps, so that its /dev/mqueue is of the mapped root.
	ipc := c.userns && fresh&unix.CLONE_NEWIPC != 0
	if ipc {
		fresh &^= unix.CLONE_NEWIPC
	}
	c.step("clone into the new namespaces")
	c.call(OpClone, mem(words(fresh|unix.CLONE_PARENT, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)))
	if !c.userns {
		return nil
	}
	root := true
	l := c.spec.Linux
	uid, okUID := mapsRoot(l.UIDMappings)
	gid, okGID := mapsRoot(l.GIDMappings)
	c.p.MapRoot = [2]int{uid, gid}
	if !joinUser {
		c.step("id maps", strings.ReplaceAll("uid "+mapText(l.UIDMappings)+"gid "+mapText(l.GIDMappings), "\n", "; "))
		c.p.Maps = &IDMaps{UID: mapText(l.UIDMappings), GID: mapText(l.GIDMappings)}
		c.call(OpPhase, num(PhaseMaps))
		root = okUID && okGID
	}
	if root {
		c.step("root of the user namespace")
		c.call(unix.SYS_SETGROUPS, num(0), num(0)).ignore(unix.EPERM)
		c.call(unix.SYS_SETRESGID, num(0), num(0), num(0))
		c.call(unix.SYS_SETRESUID, num(0), num(0), num(0))
		c.call(unix.SYS_PRCTL, num(unix.PR_SET_DUMPABLE), num(0))
	}
	if ipc {
		c.step("new ipc namespace")
		c.call(unix.SYS_UNSHARE, num(unix.CLONE_NEWIPC))
	}
	c.step("attach the root")
	c.call(unix.SYS_OPENAT, fdcwd, c.str("/"), num(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC), num(0)).out(c.old)
	c.call(unix.SYS_MOVE_MOUNT, c.root.arg(), c.str(""), fdcwd, c.str("/"), num(unix.MOVE_MOUNT_F_EMPTY_PATH))
	return nil
}

// timeOffsets is the text for timens_offsets (time_namespaces(7)).
func (c *compiler) timeOffsets() string {
	var lines []string
	for clock, o := range c.spec.Linux.TimeOffsets {
		lines = append(lines, fmt.Sprintf("%s %d %d\n", clock, o.Secs, o.Nanosecs))
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

func mapText(maps []specs.LinuxIDMapping) string {
	var s strings.Builder
	for _, m := range maps {
		fmt.Fprintf(&s, "%d %d %d\n", m.ContainerID, m.HostID, m.Size)
	}
	return s.String()
}

// mapsRoot gives the host's id of the container's root.
func mapsRoot(maps []specs.LinuxIDMapping) (int, bool) {
	for _, m := range maps {
		if m.ContainerID == 0 && m.Size > 0 {
			return int(m.HostID), true
		}
	}
	return 0, false
}

// openSource clones the source of spec.Mounts[i], if it is a bind.
func (c *compiler) openSource(i int) error {
	m := &c.spec.Mounts[i]
	o, err := parseOptions(m.Options)
	if err != nil {
		return err
	}
	if !o.bind && m.Type != "bind" || m.Source == "" {
		return nil
	}
	tree := c.builder.slot()
	c.step("open " + path.Join(c.abs(m.Source), o.srcBeneath))
	if err := c.sourceTree(tree, m, o); err != nil {
		return err
	}
	if c.sources == nil {
		c.sources = map[*specs.Mount]slot{}
	}
	c.sources[m] = tree
	return nil
}

// asMappedRoot has call made with the file ids of the container's root: an
// overlay makes its own files as whoever mounted it, and the host's root has no
// id in an idmapped upper directory.
func (c *compiler) asMappedRoot(call func()) {
	uid, okUID := mapsRoot(c.spec.Linux.UIDMappings)
	gid, okGID := mapsRoot(c.spec.Linux.GIDMappings)
	if !okUID || !okGID {
		call()
		return
	}
	// Else the capabilities that go with root's file id would go with it.
	c.call(unix.SYS_PRCTL, num(unix.PR_SET_SECUREBITS), num(secbitNoSetuidFixup))
	c.call(unix.SYS_SETFSGID, num(gid))
	c.call(unix.SYS_SETFSUID, num(uid))
	call()
	c.call(unix.SYS_SETFSUID, num(0))
	c.call(unix.SYS_SETFSGID, num(0))
	c.call(unix.SYS_PRCTL, num(unix.PR_SET_SECUREBITS), num(0))
}

// secbitNoSetuidFixup is SECBIT_NO_SETUID_FIXUP of linux/securebits.h.
const secbitNoSetuidFixup = 1 << 2

// openOverlay mounts spec.Mounts[i], if it is an overlay of idmapped layers,
// nowhere yet: a user namespace could not open the layers. mount(2) needs a place,
// which /proc is for the moment; only more layers than its page holds are given one
// by one (Linux 6.8). It comes after the binds, whose sources must not be found covered.
func (c *compiler) openOverlay(i int) error {
	m := &c.spec.Mounts[i]
	if m.Type != "overlay" {
		return nil
	}
	o, err := parseOptions(m.Options)
	if err != nil || !o.idmap {
		return err
	}
	if err := c.idmapLayers(o); err != nil {
		return err
	}
	tree := c.builder.slot()
	c.step("mount overlay for "+m.Destination, o.describe())
	if data := strings.Join(o.data, ","); len(data) <= maxMountData {
		c.asMappedRoot(func() {
			c.call(unix.SYS_MOUNT, c.str(m.Source), c.str("/proc"), c.str(m.Type), num(uint64(o.flags)), c.str(data))
		})
		c.call(unix.SYS_OPEN_TREE, fdcwd, c.str("/proc"), num(treeFlags)).out(tree)
		c.call(unix.SYS_UMOUNT2, c.str("/proc"), num(unix.MNT_DETACH))
	} else {
		c.asMappedRoot(func() { c.overlayByParts(m.Source, o).out(tree) })
	}
	if c.sources == nil {
		c.sources = map[*specs.Mount]slot{}
	}
	c.sources[m] = tree
	return nil
}

// sourceTree clones a bind's source into tree, with its ids mapped if it is so.
func (c *compiler) sourceTree(tree slot, m *specs.Mount, o mountOptions) error {
	flags := uint64(treeFlags)
	if o.rbind {
		flags |= unix.AT_RECURSIVE
	}
	if o.srcNoFollow {
		flags |= unix.AT_SYMLINK_NOFOLLOW
	}
	if o.srcBeneath == "" {
		c.call(unix.SYS_OPEN_TREE, fdcwd, c.str(c.abs(m.Source)), num(flags)).out(tree)
	} else {
		c.beneathTree(tree, c.abs(m.Source), o.srcBeneath, flags)
	}
	uids, gids := m.UIDMappings, m.GIDMappings
	if len(uids) == 0 && len(gids) == 0 {
		if !o.idmap {
			return nil
		}
		uids, gids = c.spec.Linux.UIDMappings, c.spec.Linux.GIDMappings
	}
	if len(uids) == 0 || len(gids) == 0 {
		return fmt.Errorf("uidMappings and gidMappings: an idmapped mount needs both")
	}
	if err := checkMaps(uids, gids); err != nil {
		return err
	}
	c.idmapTree(tree, c.idmapNS(m), o.ridmap)
	return nil
}

// beneathTree clones what sub is in the directory source: others may exchange it
// at any time, so it is looked up once and never out of source.
func (c *compiler) beneathTree(tree slot, source, sub string, flags uint64) {
	top, found := c.builder.slot(), c.builder.slot()
	c.call(unix.SYS_OPENAT, fdcwd, c.str(source), num(pathFlags|unix.O_DIRECTORY), num(0)).out(top)
	var resolve uint64 = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS
	if flags&unix.AT_SYMLINK_NOFOLLOW != 0 {
		resolve |= unix.RESOLVE_NO_SYMLINKS
	}
	done := c.label()
	for range 8 { // EAGAIN: something was renamed while a link led upwards
		again := c.label()
		c.open(top, sub, pathFlags, resolve).out(found).on(unix.EAGAIN, again).to(done)
		c.mark(again)
	}
	c.open(top, sub, pathFlags, resolve).out(found)
	c.mark(done)
	c.call(unix.SYS_OPEN_TREE, found.arg(), c.str(""), num(flags|unix.AT_EMPTY_PATH)).out(tree)
	c.call(unix.SYS_CLOSE, found.arg())
	c.call(unix.SYS_CLOSE, top.arg())
}

// idmapTree maps the ids of a detached mount by the user namespace ns.
func (c *compiler) idmapTree(tree, ns slot, recursive bool) {
	attr := mem(words(unix.MOUNT_ATTR_IDMAP, 0, 0, 0))
	c.call(OpPoke, attr, num(24), num(8), ns.arg())
	var rec uint64
	if recursive {
		rec = unix.AT_RECURSIVE
	}
	c.call(unix.SYS_MOUNT_SETATTR, tree.arg(), c.str(""), num(unix.AT_EMPTY_PATH|rec), attr, num(32))
}

// idmapNS opens the user namespace of an idmapped mount: one with the mount's
// own maps, which the parent makes, or the container's. Mounts with the same
// maps share it.
func (c *compiler) idmapNS(m *specs.Mount) slot {
	uids, gids := m.UIDMappings, m.GIDMappings
	key := "uid " + mapText(uids) + "gid " + mapText(gids)
	p, join := c.join[specs.UserNamespace]
	if len(uids) == 0 && len(gids) == 0 {
		uids, gids, key = c.spec.Linux.UIDMappings, c.spec.Linux.GIDMappings, ""
	} else {
		join = false
	}
	if ns, ok := c.idmaps[key]; ok {
		return ns
	}
	ns := c.builder.slot()
	if join {
		c.call(unix.SYS_OPENAT, fdcwd, c.str(p), num(unix.O_RDONLY|unix.O_CLOEXEC), num(0)).out(ns)
	} else {
		c.p.IDMaps = append(c.p.IDMaps, IDMapFD{Slot: int(ns), IDMaps: IDMaps{UID: mapText(uids), GID: mapText(gids)}})
	}
	if c.idmaps == nil {
		c.idmaps = map[string]slot{}
	}
	c.idmaps[key] = ns
	return ns
}

// idmapLayers covers the directories that an overlay's layers lie in with
// idmapped clones of themselves, in this mount namespace only, so that the
// overlay is made of idmapped layers and its upper directory keeps the ids that
// the container sees. Upper and work directory must stay in one mount. With
// idmap-at=DIR:… these directories are covered instead: layers that are file systems of
// their own lie where nothing can be mapped, and some need not be.
func (c *compiler) idmapLayers(opts mountOptions) error {
	if _, join := c.join[specs.UserNamespace]; !join && len(c.spec.Linux.UIDMappings) == 0 {
		return fmt.Errorf("option idmap: the container has no user namespace")
	}
	if c.shared {
		return fmt.Errorf("option idmap: not with a shared propagation of the root, which would show the host the maps")
	}
	ns := c.idmapNS(&specs.Mount{})
	covered := func(dir string) bool {
		for ; ; dir = path.Dir(dir) {
			if c.covered[dir] {
				return true
			}
			if dir == "/" {
				return false
			}
		}
	}
	cover := func(d string) {
		if covered(d) {
			return
		}
		if c.covered == nil {
			c.covered = map[string]bool{}
		}
		c.covered[d] = true
		c.step("map the ids of " + d)
		tree := c.builder.slot()
		c.call(unix.SYS_OPEN_TREE, fdcwd, c.str(d), num(treeFlags)).out(tree)
		c.idmapTree(tree, ns, false)
		c.call(unix.SYS_MOVE_MOUNT, tree.arg(), c.str(""), fdcwd, c.str(d), num(unix.MOVE_MOUNT_F_EMPTY_PATH))
		c.call(unix.SYS_CLOSE, tree.arg())
	}
	for _, d := range opts.idmapAt {
		if !path.IsAbs(d) || path.Clean(d) == "/" {
			return fmt.Errorf("option idmap-at: %q is not an absolute path", d)
		}
		cover(path.Clean(d))
	}
	if len(opts.idmapAt) > 0 {
		return nil
	}
	for _, o := range opts.data {
		k, v, _ := strings.Cut(o, "=")
		var dirs []string
		switch k {
		case "lowerdir":
			dirs = strings.Split(v, ":")
		case "upperdir", "workdir":
			dirs = []string{v}
		}
		for _, d := range dirs {
			if !path.IsAbs(d) || path.Clean(d) == "/" || strings.Contains(d, "\\") {
				return fmt.Errorf("option idmap: layer %q is not an absolute path", d)
			}
			cover(path.Dir(path.Clean(d)))
		}
	}
	return nil
}

// UserNamespace is the plan of a process that only holds a user namespace.
func UserNamespace(maps IDMaps) *Plan {
	b := newBuilder()
	b.p.Clone = unix.CLONE_NEWUSER
	b.p.Maps = &maps
	b.step("id maps")
	b.call(OpPhase, num(PhaseMaps))
	b.step("hold the user namespace")
	b.call(OpBarrier)
	b.call(OpFail, num(unix.ECANCELED))
	return b.finish()
}

// NetNamespace is the plan of a process that only holds a network namespace, which
// belongs to the user namespace at a path.
func NetNamespace(user string) *Plan {
	b := newBuilder()
	b.step("join user namespace " + user)
	fd := b.slot()
	b.call(unix.SYS_OPENAT, fdcwd, b.str(user), num(unix.O_RDONLY|unix.O_CLOEXEC), num(0)).out(fd)
	b.call(unix.SYS_SETNS, fd.arg(), num(unix.CLONE_NEWUSER))
	b.call(unix.SYS_PRCTL, num(unix.PR_SET_DUMPABLE), num(0)) // setns(2) may have changed it
	b.step("new network namespace")
	b.call(unix.SYS_UNSHARE, num(unix.CLONE_NEWNET))
	b.step("hold the network namespace")
	b.call(OpBarrier)
	b.call(OpFail, num(unix.ECANCELED))
	return b.finish()
}
