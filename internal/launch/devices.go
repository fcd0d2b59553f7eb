package launch

import (
	"fmt"
	"path"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// defaultDevices are those that the specification asks for.
var defaultDevices = []specs.LinuxDevice{
	{Path: "/dev/null", Type: "c", Major: 1, Minor: 3},
	{Path: "/dev/zero", Type: "c", Major: 1, Minor: 5},
	{Path: "/dev/full", Type: "c", Major: 1, Minor: 7},
	{Path: "/dev/random", Type: "c", Major: 1, Minor: 8},
	{Path: "/dev/urandom", Type: "c", Major: 1, Minor: 9},
	{Path: "/dev/tty", Type: "c", Major: 5, Minor: 0},
}

var defaultLinks = [][2]string{
	{"/proc/self/fd", "fd"},
	{"/proc/self/fd/0", "stdin"},
	{"/proc/self/fd/1", "stdout"},
	{"/proc/self/fd/2", "stderr"},
	{"pts/ptmx", "ptmx"},
}

// ownDev tells whether /dev is the container's own rather than a bind of the
// host's: devices are made only then.
func (c *compiler) ownDev() bool {
	for _, m := range c.spec.Mounts {
		if path.Clean("/"+m.Destination) == "/dev" {
			o, err := parseOptions(m.Options)
			return err == nil && !o.bind && m.Type != "bind"
		}
	}
	return true
}

// deviceList is what is to be in /dev.
func (c *compiler) deviceList() []specs.LinuxDevice {
	list := c.spec.Linux.Devices
	if c.ownDev() {
		for _, d := range defaultDevices {
			if !hasDevice(c.spec.Linux.Devices, d.Path) {
				list = append(list[:len(list):len(list)], d)
			}
		}
	}
	return list
}

// makeNodes makes the device nodes of a container in a user namespace, which
// may not make any itself, on a file system that is mounted nowhere when it is
// done: each node is bound to its place later. Where the runtime may not make
// any either, the host's are bound.
func (c *compiler) makeNodes() error {
	list := c.deviceList()
	if len(list) == 0 {
		return nil
	}
	c.step("make device nodes")
	// For the while, on a place that is there on every machine.
	c.call(unix.SYS_MOUNT, c.str("devices"), c.str("/proc"), c.str("tmpfs"), num(unix.MS_NOSUID|unix.MS_NOEXEC), c.str("mode=755"))
	dir := c.builder.slot()
	c.call(unix.SYS_OPENAT, fdcwd, c.str("/proc"), num(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC), num(0)).out(dir)
	c.call(unix.SYS_UMASK, num(0))
	c.nodes = map[string]slot{}
	for i, d := range list {
		typ, mode, err := nodeMode(&d)
		if err != nil {
			return fmt.Errorf("linux.devices: %w", err)
		}
		if d.Type == "p" {
			continue
		}
		tree, denied, done := c.builder.slot(), c.label(), c.label()
		name := fmt.Sprint(i)
		c.call(unix.SYS_MKNODAT, dir.arg(), c.str(name), num(typ|mode), num(unix.Mkdev(uint32(d.Major), uint32(d.Minor)))).on(unix.EPERM, denied)
		uid, gid := uint32(0), uint32(0)
		if d.UID != nil {
			uid = *d.UID
		}
		if d.GID != nil {
			gid = *d.GID
		}
		c.call(unix.SYS_FCHOWNAT, dir.arg(), c.str(name), num(mapped(c.spec.Linux.UIDMappings, uid)), num(mapped(c.spec.Linux.GIDMappings, gid)), num(unix.AT_SYMLINK_NOFOLLOW))
		c.call(unix.SYS_OPEN_TREE, dir.arg(), c.str(name), num(treeFlags)).out(tree).to(done)
		c.mark(denied)
		c.call(unix.SYS_OPEN_TREE, fdcwd, c.str(path.Clean(d.Path)), num(treeFlags)).out(tree)
		c.mark(done)
		c.nodes[path.Clean(d.Path)] = tree
	}
	c.call(unix.SYS_UMASK, num(0o022))
	c.call(unix.SYS_CLOSE, dir.arg())
	c.call(unix.SYS_UMOUNT2, c.str("/proc"), num(unix.MNT_DETACH))
	return nil
}

// mapped is the host's id of one of the container's; the container's root's, if
// it has no place there.
func mapped(maps []specs.LinuxIDMapping, id uint32) uint32 {
	for _, m := range maps {
		if id >= m.ContainerID && id-m.ContainerID < m.Size {
			return m.HostID + id - m.ContainerID
		}
	}
	root, _ := mapsRoot(maps)
	return uint32(root)
}

// CgroupOwner is the host's user whom a container's control group is to be given
// to, by the rules of the specification (config-linux.md, Cgroup ownership): the
// one that its first process runs as, if the container has a cgroup namespace of
// its own and may write its groups.
func CgroupOwner(s *specs.Spec) (uid uint32, ok bool) {
	if s.Linux == nil || s.Process == nil {
		return 0, false
	}
	if !slices.ContainsFunc(s.Mounts, func(m specs.Mount) bool {
		return m.Source == "cgroup" && m.Destination == "/sys/fs/cgroup" && !slices.Contains(m.Options, "ro")
	}) {
		return 0, false
	}
	own := false
	for _, n := range s.Linux.Namespaces {
		switch n.Type {
		case specs.CgroupNamespace:
			own = n.Path == ""
		case specs.UserNamespace:
			if n.Path != "" {
				return 0, false // whose ids those are is not said
			}
		}
	}
	uid = s.Process.User.UID
	if len(s.Linux.UIDMappings) > 0 {
		uid = mapped(s.Linux.UIDMappings, uid)
	}
	return uid, own && uid != 0
}

// devices makes /dev's nodes and links.
func (c *compiler) devices() error {
	list := c.deviceList()
	if len(list) == 0 {
		return nil
	}
	c.step("devices")
	c.call(unix.SYS_UMASK, num(0))
	for i := range list {
		if err := c.device(&list[i]); err != nil {
			return fmt.Errorf("linux.devices: %w", err)
		}
	}
	c.step("umask 022")
	c.call(unix.SYS_UMASK, num(0o022))
	if !c.ownDev() {
		return nil
	}
	c.step("links in /dev")
	dev := c.builder.slot()
	c.target("/dev", dev, dirTarget, resolveRoot, noLabel)
	for _, l := range defaultLinks {
		if l[1] == "ptmx" {
			// A ptmx of the image's would open the host's terminals.
			c.call(unix.SYS_UNLINKAT, dev.arg(), c.str("ptmx"), num(0)).ignore(unix.ENOENT, unix.EISDIR, unix.EBUSY)
		}
		c.call(unix.SYS_SYMLINKAT, c.str(l[0]), dev.arg(), c.str(l[1])).ignore(unix.EEXIST)
	}
	c.call(unix.SYS_CLOSE, dev.arg())
	return nil
}

func hasDevice(list []specs.LinuxDevice, p string) bool {
	for _, d := range list {
		if path.Clean(d.Path) == p {
			return true
		}
	}
	return false
}

// device makes one node, or binds the host's in a user namespace.
func (c *compiler) device(d *specs.LinuxDevice) error {
	p := path.Clean(d.Path)
	dir, name := path.Split(p)
	if !path.IsAbs(p) || name == "" {
		return fmt.Errorf("path %q", d.Path)
	}
	typ, mode, err := nodeMode(d)
	if err != nil {
		return err
	}
	mode |= typ
	c.step("device "+p, fmt.Sprintf("%s %d:%d %#o", d.Type, d.Major, d.Minor, mode&0o7777))
	parent := c.builder.slot()
	c.target(dir, parent, dirTarget, resolveRoot, noLabel)
	if c.userns && d.Type != "p" {
		return c.deviceBind(d, parent, name)
	}
	exists, done := c.label(), c.label()
	c.call(unix.SYS_MKNODAT, parent.arg(), c.str(name), num(mode), num(unix.Mkdev(uint32(d.Major), uint32(d.Minor)))).on(unix.EEXIST, exists)
	uid, gid := -1, -1
	if d.UID != nil {
		uid = int(*d.UID)
	}
	if d.GID != nil {
		gid = int(*d.GID)
	}
	if uid > 0 || gid > 0 {
		c.call(unix.SYS_FCHOWNAT, parent.arg(), c.str(name), num(uid), num(gid), num(unix.AT_SYMLINK_NOFOLLOW))
	}
	c.call(OpJump).to(done)
	c.mark(exists)
	// A node of the image's or the mount's must be the right one.
	ok1 := c.label()
	c.call(unix.SYS_NEWFSTATAT, parent.arg(), c.str(name), c.stat, num(unix.AT_SYMLINK_NOFOLLOW))
	c.call(OpTestMem, c.stat, num(statMode), num(4), num(unix.S_IFMT), num(mode&unix.S_IFMT)).to(ok1)
	c.call(OpFail, num(unix.EEXIST))
	c.mark(ok1)
	if d.Type != "p" {
		c.call(OpTestMem, c.stat, num(statRdev), num(8), num(^uint64(0)), num(unix.Mkdev(uint32(d.Major), uint32(d.Minor)))).to(done)
		c.call(OpFail, num(unix.EEXIST))
	}
	c.mark(done)
	c.call(unix.SYS_CLOSE, parent.arg())
	return nil
}

// nodeMode gives the type and the permissions of a node.
func nodeMode(d *specs.LinuxDevice) (typ, mode uint32, err error) {
	mode = 0o666
	if d.FileMode != nil {
		mode = uint32(*d.FileMode) & 0o7777
	}
	switch d.Type {
	case "c", "u":
		return unix.S_IFCHR, mode, nil
	case "b":
		return unix.S_IFBLK, mode, nil
	case "p":
		return unix.S_IFIFO, mode, nil
	}
	return 0, 0, fmt.Errorf("%s: type %q", path.Clean(d.Path), d.Type)
}

// deviceBind binds a node that makeNodes made.
func (c *compiler) deviceBind(d *specs.LinuxDevice, parent slot, name string) error {
	p := path.Clean(d.Path)
	tree, ok := c.nodes[p]
	if !ok { // named twice: it is there
		c.call(unix.SYS_CLOSE, parent.arg())
		return nil
	}
	delete(c.nodes, p)
	t := c.builder.slot()
	c.call(unix.SYS_MKNODAT, parent.arg(), c.str(name), num(unix.S_IFREG|0o644), num(0)).ignore(unix.EEXIST)
	c.call(unix.SYS_OPENAT, parent.arg(), c.str(name), num(pathFlags|unix.O_NOFOLLOW), num(0)).out(t)
	c.moveMount(tree, t)
	c.call(unix.SYS_CLOSE, tree.arg())
	c.call(unix.SYS_CLOSE, t.arg())
	c.call(unix.SYS_CLOSE, parent.arg())
	return nil
}

// console allocates the pty in the container's devpts and sends its master back.
func (c *compiler) console() error {
	if !c.spec.Process.Terminal {
		return nil
	}
	slave := c.terminal(c.root, c.spec.Process)
	if !c.ownDev() {
		c.attachTerminal(slave)
		return nil
	}
	c.step("bind the terminal → /dev/console")
	t, tree := c.builder.slot(), c.builder.slot()
	c.target("/dev/console", t, fileTarget, resolveRoot|unix.RESOLVE_NO_SYMLINKS, noLabel)
	c.call(unix.SYS_OPEN_TREE, slave.arg(), c.str(""), num(treeFlags|unix.AT_EMPTY_PATH)).out(tree)
	c.moveMount(tree, t)
	c.call(unix.SYS_CLOSE, tree.arg())
	c.call(unix.SYS_CLOSE, t.arg())
	c.attachTerminal(slave)
	return nil
}

// terminal opens a new pty below root.
func (b *builder) terminal(root slot, p *specs.Process) slot {
	b.step("allocate a terminal")
	master, slave := b.slot(), b.slot()
	unlocked := make([]byte, 4)
	ok := b.label()
	b.call(unix.SYS_OPENAT2, root.arg(), b.str("dev/pts/ptmx"), b.how(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, resolveRoot|unix.RESOLVE_NO_SYMLINKS), num(24)).out(master)
	b.call(unix.SYS_FSTATFS, master.arg(), b.statfs)
	b.call(OpTestMem, b.statfs, num(0), num(4), num(^uint32(0)), num(unix.DEVPTS_SUPER_MAGIC)).to(ok)
	b.call(OpFail, num(unix.ENODEV))
	b.mark(ok)
	b.call(unix.SYS_IOCTL, master.arg(), num(unix.TIOCSPTLCK), mem(unlocked))
	b.call(unix.SYS_IOCTL, master.arg(), num(unix.TIOCGPTPEER), num(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)).out(slave)
	if s := p.ConsoleSize; s != nil {
		ws := make([]byte, 8)
		ws[0], ws[1] = byte(s.Height), byte(s.Height>>8)
		ws[2], ws[3] = byte(s.Width), byte(s.Width>>8)
		b.call(unix.SYS_IOCTL, slave.arg(), num(unix.TIOCSWINSZ), mem(ws))
	}
	b.call(unix.SYS_FCHOWN, slave.arg(), num(p.User.UID), num(^uint32(0))).ignore(unix.EINVAL, unix.EPERM)
	b.call(OpSendFD, num(0), master.arg(), num(0), num(FDConsole))
	b.call(unix.SYS_CLOSE, master.arg())
	return slave
}

// attachTerminal makes the slave the controlling terminal and standard streams.
func (b *builder) attachTerminal(slave slot) {
	b.step("controlling terminal")
	b.call(unix.SYS_IOCTL, slave.arg(), num(unix.TIOCSCTTY), num(0))
	for fd := range 3 {
		b.call(unix.SYS_DUP3, slave.arg(), num(fd), num(0))
	}
	b.call(unix.SYS_CLOSE, slave.arg())
}

// sysctls writes kernel parameters through the host's procfs, in the
// container's namespaces.
func (c *compiler) sysctls() error {
	for _, kv := range c.sysctlList() {
		c.step("sysctl " + kv[0] + "=" + kv[1])
		c.writeProc("sys/"+kv[2], kv[1])
	}
	return nil
}
