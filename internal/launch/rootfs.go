package launch

import (
	"fmt"
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const treeFlags = unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC

// slave keeps the host free of the container's mounts: from here on nothing
// that is mounted goes back. With a shared root only / and /proc, where the
// root is attached, are cut off, so that binds may be shared with the host.
func (c *compiler) slave() {
	prop := c.spec.Linux.RootfsPropagation
	if c.shared {
		c.step("propagation of / private")
		c.call(unix.SYS_MOUNT, num(0), c.str("/"), num(0), num(unix.MS_PRIVATE), num(0))
		c.call(unix.SYS_MOUNT, num(0), c.str("/proc"), num(0), num(unix.MS_PRIVATE), num(0)).ignore(unix.EINVAL)
		return
	}
	flag := uint64(unix.MS_SLAVE)
	name := "rslave"
	if strings.TrimPrefix(prop, "r") == "private" {
		flag, name = unix.MS_PRIVATE, "rprivate"
	}
	c.step("propagation of / " + name)
	c.call(unix.SYS_MOUNT, num(0), c.str("/"), num(0), num(unix.MS_REC|flag), num(0))
}

// rootfs mounts the root and leaves its descriptor in c.root.
func (c *compiler) rootfs() error {
	if c.userns {
		return nil // done before the second clone
	}
	return c.hostSide()
}

// hostSide does what needs to see the host as it is: what is bound is cloned
// before the root is attached anywhere, so that a bind of / or /proc has no
// container in it, and, if the root's propagation is shared, before / is cut
// off, so that it stays shared with the host.
func (c *compiler) hostSide() error {
	if !c.shared {
		c.slave()
	}
	for i := range c.spec.Mounts {
		if err := c.openSource(i); err != nil {
			return fmt.Errorf("mounts[%d]: %w", i, err)
		}
	}
	if c.shared {
		c.slave()
	}
	for i := range c.spec.Mounts {
		if err := c.openOverlay(i); err != nil {
			return fmt.Errorf("mounts[%d]: %w", i, err)
		}
	}
	if c.userns {
		if err := c.makeNodes(); err != nil {
			return err
		}
	}
	return c.mountRoot()
}

// mountRoot mounts the root file system over / and opens it.
func (c *compiler) mountRoot() error {
	c.step("open /")
	c.call(unix.SYS_OPENAT, fdcwd, c.str("/"), num(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC), num(0)).out(c.old)
	if len(c.opts.Rootfs) == 0 {
		p := c.abs(c.spec.Root.Path)
		c.step("bind "+p+" → /", "rbind")
		tree := c.root
		c.call(unix.SYS_OPEN_TREE, fdcwd, c.str(p), num(treeFlags|unix.AT_RECURSIVE)).out(tree)
		// The root's own mount must not be shared when it is moved or pivoted to.
		c.setAttr(tree, unix.AT_RECURSIVE, 0, 0, unix.MS_SLAVE)
		at := p
		if c.shared {
			at = "/"
		}
		if p == "/" {
			at = "/"
		}
		c.call(unix.SYS_MOVE_MOUNT, tree.arg(), c.str(""), fdcwd, c.str(at), num(unix.MOVE_MOUNT_F_EMPTY_PATH))
		return nil
	}
	for i, m := range c.opts.Rootfs {
		if i == 0 {
			if err := c.rootMount(m); err != nil {
				return fmt.Errorf("rootfs: %w", err)
			}
			continue
		}
		o, err := parseOptions(m.Options)
		if err != nil {
			return fmt.Errorf("rootfs: %w", err)
		}
		if err := c.mountAt(m.Type, m.Source, "/"+strings.TrimPrefix(m.Target, "/"), o, nil); err != nil {
			return fmt.Errorf("rootfs: %w", err)
		}
	}
	return nil
}

// rootMount mounts the first file system of the root. mount(2) needs a place
// that is there on every machine; /proc is, and is taken only until the mount
// is moved over /.
func (c *compiler) rootMount(m Mount) error {
	o, err := parseOptions(m.Options)
	if err != nil {
		return err
	}
	if strings.Trim(m.Target, "/") != "" {
		return fmt.Errorf("the first mount is on %s, not on the root", m.Target)
	}
	if o.bind || m.Type == "bind" {
		c.step("bind "+m.Source+" → /", o.describe())
		flags := uint64(treeFlags)
		if o.rbind {
			flags |= unix.AT_RECURSIVE
		}
		c.call(unix.SYS_OPEN_TREE, fdcwd, c.str(c.abs(m.Source)), num(flags)).out(c.root)
		c.setAttr(c.root, unix.AT_RECURSIVE, 0, 0, unix.MS_SLAVE)
		if o.idmap {
			c.idmapTree(c.root, c.idmapNS(&specs.Mount{}), o.ridmap)
		}
		if o.set|o.clr != 0 {
			c.setAttr(c.root, 0, o.set, o.clr, 0)
		}
	} else {
		if o.flags&unix.MS_RDONLY != 0 && m.Type == "overlay" {
			// Mount points are made first.
			o.flags &^= unix.MS_RDONLY
			o.set &^= unix.MOUNT_ATTR_RDONLY
			c.spec.Root = &specs.Root{Path: c.spec.Root.Path, Readonly: true}
		}
		if o.idmap {
			if m.Type != "overlay" {
				return fmt.Errorf("option idmap: %s mounts cannot be mapped", m.Type)
			}
			if err := c.idmapLayers(o); err != nil {
				return err
			}
		}
		c.step("mount "+m.Type+" → /", o.describe())
		as := func(call func()) { call() }
		if o.idmap {
			as = c.asMappedRoot
		}
		data := strings.Join(o.data, ",")
		if m.Type == "overlay" && len(data) > maxMountData {
			dir, rel, ok := relativeLayers(o.data)
			if !ok || len(rel) > maxMountData {
				as(func() { c.overlayByParts(m.Source, o).out(c.root) })
				c.call(unix.SYS_MOVE_MOUNT, c.root.arg(), c.str(""), fdcwd, c.str("/"), num(unix.MOVE_MOUNT_F_EMPTY_PATH))
				return nil
			}
			c.call(unix.SYS_CHDIR, c.str(dir))
			data = rel
		}
		if len(data) > 4095 {
			return fmt.Errorf("mount %s: options are longer than a page", m.Type)
		}
		as(func() {
			c.call(unix.SYS_MOUNT, c.str(m.Source), c.str("/proc"), c.str(m.Type), num(uint64(o.flags)), c.str(data))
		})
		c.call(unix.SYS_OPENAT, fdcwd, c.str("/proc"), num(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC), num(0)).out(c.root)
	}
	c.call(unix.SYS_MOVE_MOUNT, c.root.arg(), c.str(""), fdcwd, c.str("/"), num(unix.MOVE_MOUNT_F_EMPTY_PATH))
	return nil
}

// maxMountData leaves room in mount(2)'s page.
const maxMountData = 4000

// relativeLayers rewrites overlay options to names below a common directory.
func relativeLayers(options []string) (dir, data string, ok bool) {
	var paths []string
	for _, o := range options {
		k, v, _ := strings.Cut(o, "=")
		switch k {
		case "lowerdir":
			paths = append(paths, strings.Split(v, ":")...)
		case "upperdir", "workdir":
			paths = append(paths, v)
		}
	}
	for i, p := range paths {
		if !strings.HasPrefix(p, "/") || strings.Contains(p, "\\") {
			return "", "", false
		}
		d := path.Dir(path.Clean(p))
		if i == 0 {
			dir = d
		}
		for dir != "/" && d != dir && !strings.HasPrefix(d, dir+"/") {
			dir = path.Dir(dir)
		}
	}
	if dir == "/" || dir == "" {
		return "", "", false
	}
	out := make([]string, len(options))
	for i, o := range options {
		k, v, _ := strings.Cut(o, "=")
		switch k {
		case "lowerdir":
			var l []string
			for _, p := range strings.Split(v, ":") {
				l = append(l, strings.TrimPrefix(path.Clean(p), dir+"/"))
			}
			out[i] = k + "=" + strings.Join(l, ":")
		case "upperdir", "workdir":
			out[i] = k + "=" + strings.TrimPrefix(path.Clean(v), dir+"/")
		default:
			out[i] = o
		}
	}
	return dir, strings.Join(out, ","), true
}

// overlayByParts hands the layers over one by one, for which the kernel must be
// 6.8 or later. The result of the call that it returns is the mount.
func (c *compiler) overlayByParts(source string, o mountOptions) ins {
	fs := c.builder.slot()
	c.call(unix.SYS_FSOPEN, c.str("overlay"), num(unix.FSOPEN_CLOEXEC)).out(fs)
	set := func(k, v string) {
		c.call(unix.SYS_FSCONFIG, fs.arg(), num(unix.FSCONFIG_SET_STRING), c.str(k), c.str(v), num(0))
	}
	set("source", source)
	for _, opt := range o.data {
		k, v, hasValue := strings.Cut(opt, "=")
		switch {
		case k == "lowerdir":
			for _, p := range strings.Split(v, ":") {
				set("lowerdir+", p)
			}
		case hasValue:
			set(k, v)
		default:
			c.call(unix.SYS_FSCONFIG, fs.arg(), num(unix.FSCONFIG_SET_FLAG), c.str(k), num(0), num(0))
		}
	}
	c.call(unix.SYS_FSCONFIG, fs.arg(), num(unix.FSCONFIG_CMD_CREATE), num(0), num(0), num(0))
	return c.call(unix.SYS_FSMOUNT, fs.arg(), num(unix.FSMOUNT_CLOEXEC), num(o.set))
}

// setAttr is mount_setattr on the mount that fd is the root of.
func (b *builder) setAttr(fd slot, flags uint64, set, clr, propagation uint64) ins {
	return b.call(unix.SYS_MOUNT_SETATTR, fd.arg(), b.str(""), num(unix.AT_EMPTY_PATH|flags),
		mem(words(set, clr, propagation, 0)), num(32))
}

// leave makes the container's root the root, hides what is to be hidden and
// makes the rest read-only.
func (c *compiler) leave() error {
	for _, ph := range c.opts.Phases {
		if ph == PhaseMounts {
			c.step("hooks createContainer")
			c.call(OpPhase, num(PhaseMounts))
		}
	}
	for _, f := range c.late {
		f()
	}
	for _, p := range c.spec.Linux.ReadonlyPaths {
		c.readonlyPath(p)
	}
	for _, p := range c.spec.Linux.MaskedPaths {
		c.mask(p)
	}
	if c.spec.Root.Readonly {
		c.step("read-only /")
		c.setAttr(c.root, 0, unix.MOUNT_ATTR_RDONLY, 0, 0)
	}
	c.step("pivot to the root")
	c.call(unix.SYS_FCHDIR, c.root.arg())
	if c.opts.NoPivot {
		c.call(unix.SYS_MOVE_MOUNT, c.root.arg(), c.str(""), fdcwd, c.str("/"), num(unix.MOVE_MOUNT_F_EMPTY_PATH)).ignore(unix.EINVAL, unix.ELOOP)
		c.call(unix.SYS_CHROOT, c.str("."))
		c.call(unix.SYS_CHDIR, c.str("/"))
	} else {
		c.call(unix.SYS_PIVOT_ROOT, c.str("."), c.str("."))
		c.call(unix.SYS_FCHDIR, c.old.arg())
		// What is unmounted now must not go from the host as well.
		c.call(unix.SYS_MOUNT, num(0), c.str("."), num(0), num(unix.MS_SLAVE|unix.MS_REC), num(0))
		c.call(unix.SYS_UMOUNT2, c.str("."), num(unix.MNT_DETACH))
		c.call(unix.SYS_CHDIR, c.str("/"))
	}
	for _, fd := range []slot{c.old, c.proc, c.root} {
		c.call(unix.SYS_CLOSE, fd.arg())
	}
	if p, ok := propagations[c.spec.Linux.RootfsPropagation]; ok && p.flag != unix.MS_SLAVE && p.flag != unix.MS_PRIVATE {
		c.step("propagation of the root " + p.name)
		flag := p.flag
		if p.recursive {
			flag |= unix.MS_REC
		}
		c.call(unix.SYS_MOUNT, num(0), c.str("/"), num(0), num(flag), num(0))
	}
	return nil
}

// readonlyPath makes a path and what is mounted below it read-only; a path that
// is missing is no error.
func (c *compiler) readonlyPath(p string) {
	c.step("read-only " + p)
	done := c.label()
	t, tree := c.builder.slot(), c.builder.slot()
	c.open(c.root, p, pathFlags, resolveRoot).out(t).on(unix.ENOENT, done).on(unix.ENOTDIR, done)
	c.call(unix.SYS_OPEN_TREE, t.arg(), c.str(""), num(treeFlags|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)).out(tree)
	c.setAttr(tree, unix.AT_RECURSIVE, unix.MOUNT_ATTR_RDONLY, 0, 0)
	c.moveMount(tree, t)
	c.call(unix.SYS_CLOSE, tree.arg())
	c.call(unix.SYS_CLOSE, t.arg())
	c.mark(done)
}

// mask covers a directory with an empty read-only tmpfs, anything else with the
// host's /dev/null, which is made sure to be it.
func (c *compiler) mask(p string) {
	c.step("mask " + p)
	done, dir := c.label(), c.label()
	t, tree := c.builder.slot(), c.builder.slot()
	c.open(c.root, p, pathFlags, resolveRoot).out(t).on(unix.ENOENT, done).on(unix.ENOTDIR, done)
	c.call(unix.SYS_NEWFSTATAT, t.arg(), c.str(""), c.stat, num(unix.AT_EMPTY_PATH))
	c.call(OpTestMem, c.stat, num(statMode), num(4), num(unix.S_IFMT), num(unix.S_IFDIR)).to(dir)
	c.bindNull(tree)
	c.moveMount(tree, t)
	c.call(unix.SYS_CLOSE, tree.arg())
	closeT := c.label()
	c.call(OpJump).to(closeT)
	c.mark(dir)
	c.call(unix.SYS_FCHDIR, t.arg())
	c.call(unix.SYS_MOUNT, c.str("tmpfs"), c.str("."), c.str("tmpfs"), num(unix.MS_RDONLY), c.str("nr_blocks=1,nr_inodes=1,mode=755"))
	c.mark(closeT)
	c.call(unix.SYS_CLOSE, t.arg())
	c.mark(done)
}

// Offsets in struct stat.
const (
	statSize = 144
	statMode = 24
	statRdev = 40
)

// bindNull clones a /dev/null into tree: the container's, if its /dev is made
// here, else the host's, read-only so that nobody changes its mode. What is
// opened is made sure to be the null device, whatever happened to its name.
func (c *compiler) bindNull(tree slot) {
	ok1, ok2 := c.label(), c.label()
	from := c.root
	own := c.ownDev() && !c.userns
	if !own {
		from = c.old
	}
	c.open(from, "dev/null", pathFlags|unix.O_NOFOLLOW, resolveRoot).out(tree)
	c.call(unix.SYS_NEWFSTATAT, tree.arg(), c.str(""), c.stat, num(unix.AT_EMPTY_PATH))
	c.call(OpTestMem, c.stat, num(statMode), num(4), num(unix.S_IFMT), num(unix.S_IFCHR)).to(ok1)
	c.call(OpFail, num(unix.ENODEV))
	c.mark(ok1)
	c.call(OpTestMem, c.stat, num(statRdev), num(8), num(^uint64(0)), num(unix.Mkdev(1, 3))).to(ok2)
	c.call(OpFail, num(unix.ENODEV))
	c.mark(ok2)
	c.call(unix.SYS_OPEN_TREE, tree.arg(), c.str(""), num(treeFlags|unix.AT_EMPTY_PATH)).out(tree)
	if !own {
		c.setAttr(tree, 0, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOEXEC|unix.MOUNT_ATTR_NOSUID, 0, 0)
	}
}

func (b *builder) moveMount(tree, target slot) {
	b.call(unix.SYS_MOVE_MOUNT, tree.arg(), b.str(""), target.arg(), b.str(""),
		num(unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH))
}
