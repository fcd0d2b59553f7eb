package launch

import (
	"fmt"
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/cgroup"
)

// mounts does spec.Mounts in order.
func (c *compiler) mounts() error {
	for i, m := range c.spec.Mounts {
		o, err := parseOptions(m.Options)
		if err != nil {
			return fmt.Errorf("mounts[%d]: %w", i, err)
		}
		if err := c.mountAt(m.Type, m.Source, m.Destination, o, &c.spec.Mounts[i]); err != nil {
			return fmt.Errorf("mounts[%d] (%s): %w", i, m.Destination, err)
		}
	}
	return nil
}

// components splits a path below the root, cleaned.
func components(p string) []string {
	p = strings.Trim(path.Clean("/"+p), "/")
	if p == "" {
		return nil
	}
	return strings.Split(p, "/")
}

// dirKind is what a mount's target is made as when it is missing.
type targetKind int

const (
	dirTarget targetKind = iota
	fileTarget
	likeStat // as the stat buffer says
)

// target opens dest below the root into t, and makes it when it is missing: the
// last component here, all else (missing parents, links that lead nowhere) by
// the parent, which is asked. It goes to made, if that is not noLabel, when
// dest was missing.
func (c *compiler) target(dest string, t slot, kind targetKind, resolve uint64, made label) {
	done, missing, ask := c.label(), c.label(), c.label()
	c.open(c.root, dest, pathFlags, resolve).out(t).on(unix.ENOENT, missing).to(done)
	c.mark(missing)
	if len(components(dest)) == 0 {
		c.call(OpFail, num(unix.ENOENT))
		c.mark(ask)
		c.mark(done)
		return
	}
	dir, base := path.Split(path.Clean("/" + dest))
	parent := c.builder.slot()
	c.open(c.root, dir, pathFlags|unix.O_DIRECTORY, resolve).out(parent).on(unix.ENOENT, ask)
	isDir, open := c.label(), c.label()
	if kind == likeStat {
		c.call(OpTestMem, c.stat, num(statMode), num(4), num(unix.S_IFMT), num(unix.S_IFDIR)).to(isDir)
	}
	if kind != dirTarget {
		c.call(unix.SYS_MKNODAT, parent.arg(), c.str(base), num(unix.S_IFREG|0o755), num(0)).on(unix.EEXIST, ask)
		c.call(OpJump).to(open)
	}
	c.mark(isDir)
	if kind != fileTarget {
		c.call(unix.SYS_MKDIRAT, parent.arg(), c.str(base), num(0o755)).on(unix.EEXIST, ask)
	}
	c.mark(open)
	c.call(unix.SYS_CLOSE, parent.arg())
	c.open(c.root, dest, pathFlags, resolve).out(t).to(c.orDone(made, done))

	c.mark(ask)
	c.call(OpSendFD, num(0), c.root.arg(), num(0), num(FDRoot))
	n := len(c.p.Targets)
	c.p.Targets = append(c.p.Targets, dest)
	asDir, asked := c.label(), c.label()
	if kind == likeStat {
		c.call(OpTestMem, c.stat, num(statMode), num(4), num(unix.S_IFMT), num(unix.S_IFDIR)).to(asDir)
	}
	if kind != dirTarget {
		c.call(OpPhase, num(int(PhaseTargetFile)|n<<8)).to(asked)
	}
	c.mark(asDir)
	if kind != fileTarget {
		c.call(OpPhase, num(int(PhaseTargetDir)|n<<8))
	}
	c.mark(asked)
	c.open(c.root, dest, pathFlags, resolve).out(t).to(c.orDone(made, done))
	c.mark(done)
}

// orDone is l, or done if there is no l.
func (c *compiler) orDone(l, done label) label {
	if l == noLabel {
		return done
	}
	return l
}

// procFiles are the files of /proc that may be covered: those by which lxcfs and
// the like show a container its limits.
var procFiles = map[string]bool{
	"/proc/cpuinfo": true, "/proc/diskstats": true, "/proc/meminfo": true, "/proc/stat": true, "/proc/swaps": true,
	"/proc/uptime": true, "/proc/loadavg": true, "/proc/slabinfo": true, "/proc/sys/kernel/ns_last_pid": true,
	"/proc/sys/crypto/fips_enabled": true,
}

// notProc fails the step if t lies in procfs, where a link of the image may have
// led to: what covers files there could take the place of those that the
// runtime writes to.
func (c *compiler) notProc(t slot, dest string) {
	if procFiles[path.Clean("/"+dest)] {
		return
	}
	bad, ok := c.label(), c.label()
	c.call(unix.SYS_FSTATFS, t.arg(), c.statfs)
	c.call(OpTestMem, c.statfs, num(0), num(4), num(^uint32(0)), num(unix.PROC_SUPER_MAGIC)).to(bad)
	c.call(OpJump).to(ok)
	c.mark(bad)
	c.call(OpFail, num(unix.EPERM))
	c.mark(ok)
}

// mountAt compiles one mount.
func (c *compiler) mountAt(typ, source, dest string, o mountOptions, m *specs.Mount) error {
	if o.remount {
		return fmt.Errorf("option remount: a mount of the container cannot be one of the host's changed")
	}
	if d := path.Clean("/" + dest); strings.HasPrefix(d, "/proc/") && !procFiles[d] {
		return fmt.Errorf("destination is inside /proc")
	}
	if _, opened := c.sources[m]; opened && typ == "overlay" {
		return c.bind(source, dest, mountOptions{flags: o.flags, set: o.set, clr: o.clr, propagation: o.propagation}, m)
	}
	if o.bind || typ == "bind" {
		return c.bind(source, dest, o, m)
	}
	if o.srcNoFollow {
		return fmt.Errorf("option src-nofollow: only for a bind")
	}
	if o.srcBeneath != "" {
		return fmt.Errorf("option src-beneath: only for a bind")
	}
	if m != nil && (len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0) {
		return fmt.Errorf("uidMappings: only for a bind")
	}
	switch typ {
	case "cgroup":
		return c.cgroupMount(dest, o)
	case "":
		return fmt.Errorf("type is empty and it is no bind")
	}
	resolve := uint64(resolveRoot)
	if o.destNoFollow || typ == "proc" || typ == "sysfs" {
		// A link in the image must not send /proc elsewhere (CVE-2019-19921).
		resolve |= unix.RESOLVE_NO_SYMLINKS
	}
	data := strings.Join(o.data, ",")
	parts := typ == "overlay" && len(data) > maxMountData
	if len(data) > 4095 && !parts {
		return fmt.Errorf("options are longer than a page")
	}
	if source == "" {
		source = typ
	}
	c.step("mount "+typ+" → "+dest, o.describe())
	t := c.builder.slot()
	if len(components(dest)) == 0 {
		return fmt.Errorf("destination is the root")
	}
	made := c.label()
	c.target(dest, t, dirTarget, resolve, made)
	// A tmpfs over a directory of the image has its mode, if no other is asked for.
	keepMode := typ == "tmpfs" && !hasData(o.data, "mode")
	mode := c.builder.slot()
	if keepMode {
		c.call(unix.SYS_NEWFSTATAT, t.arg(), c.str(""), c.stat, num(unix.AT_EMPTY_PATH))
		c.call(OpLoad, c.stat, num(statMode), num(4), num(0o7777)).out(mode)
	}
	c.mark(made)
	if typ != "proc" {
		c.notProc(t, dest)
	}
	flags := o.flags
	readonly := typ == "tmpfs" && flags&unix.MS_RDONLY != 0
	if readonly {
		flags &^= unix.MS_RDONLY // until everything below is made
	}
	if o.copyUp {
		if typ != "tmpfs" {
			return fmt.Errorf("option tmpcopyup: only for a tmpfs")
		}
		c.copyUp(t, dest, resolve, flags, data)
		c.call(unix.SYS_CLOSE, t.arg())
		c.afterMount(dest, resolve, o, readonly)
		return nil
	}
	if parts {
		tree := c.builder.slot()
		c.overlayByParts(source, o).out(tree)
		c.moveMount(tree, t)
		c.call(unix.SYS_CLOSE, t.arg())
		c.afterMount(dest, resolve, o, false)
		return nil
	}
	c.call(unix.SYS_FCHDIR, t.arg())
	mount := c.call(unix.SYS_MOUNT, c.str(source), c.str("."), c.str(typ), num(uint64(flags)), c.str(data))
	if typ == "sysfs" || typ == "cgroup2" {
		// The network (cgroup) namespace belongs to a user namespace above ours.
		denied, done := c.label(), c.label()
		mount.on(unix.EPERM, denied).on(unix.EBUSY, denied).to(done)
		c.mark(denied)
		from := "sys"
		if typ == "cgroup2" {
			from = "sys/fs/cgroup"
			if c.opts.Cgroup != nil && c.fresh&unix.CLONE_NEWCGROUP == 0 {
				if d := c.opts.Cgroup.V2(); d != "" {
					from = strings.TrimPrefix(d, "/")
				}
			}
		}
		tree := c.builder.slot()
		c.call(unix.SYS_OPEN_TREE, c.old.arg(), c.str(from), num(treeFlags|unix.AT_RECURSIVE)).out(tree)
		c.setAttr(tree, unix.AT_RECURSIVE, o.set, o.clr, unix.MS_SLAVE)
		c.moveMount(tree, t)
		c.mark(done)
	}
	c.call(unix.SYS_CLOSE, t.arg())
	if keepMode {
		done := c.label()
		top := c.builder.slot()
		c.call(OpTestSlot, mode.arg(), num(0)).to(done)
		c.open(c.root, dest, pathFlags, resolve).out(top)
		c.call(unix.SYS_FCHDIR, top.arg())
		c.call(unix.SYS_CHMOD, c.str("."), mode.arg())
		c.call(unix.SYS_CLOSE, top.arg())
		c.mark(done)
	}
	c.afterMount(dest, resolve, o, readonly)
	return nil
}

// hasData tells whether an option of the file system is given.
func hasData(data []string, key string) bool {
	for _, d := range data {
		if strings.HasPrefix(d, key+"=") {
			return true
		}
	}
	return false
}

// afterMount sets what mount(2) could not, on the mount that is now at dest.
func (c *compiler) afterMount(dest string, resolve uint64, o mountOptions, readonly bool) {
	if o.rset|o.rclr == 0 && len(o.propagation) == 0 && !readonly {
		return
	}
	t := c.builder.slot()
	c.open(c.root, dest, pathFlags, resolve).out(t)
	if o.rset|o.rclr != 0 {
		c.setAttr(t, unix.AT_RECURSIVE, o.rset, o.rclr, 0)
	}
	c.propagate(t, o)
	if readonly {
		c.late = append(c.late, func() {
			c.step("read-only " + dest)
			c.setAttr(t, 0, unix.MOUNT_ATTR_RDONLY, 0, 0)
		})
	}
}

func (c *compiler) propagate(t slot, o mountOptions) {
	for _, p := range o.propagation {
		var rec uint64
		if p.recursive {
			rec = unix.AT_RECURSIVE
		}
		c.setAttr(t, rec, 0, 0, p.flag)
	}
}

// bind compiles a bind mount: a detached clone of the source is given its
// attributes and then moved onto the target, so that it is never seen without.
func (c *compiler) bind(source, dest string, o mountOptions, m *specs.Mount) error {
	if len(o.data) > 0 {
		return fmt.Errorf("option %q: a bind takes no data", o.data[0])
	}
	if source == "" {
		return fmt.Errorf("source is empty")
	}
	kind := "bind"
	if o.rbind {
		kind = "rbind"
	}
	t := c.builder.slot()
	c.step(kind+" "+path.Join(c.abs(source), o.srcBeneath)+" → "+dest, o.describe())
	tree, opened := c.sources[m]
	if !opened { // of Options.Rootfs
		tree = c.builder.slot()
		if err := c.sourceTree(tree, &specs.Mount{Source: source}, o); err != nil {
			return err
		}
	}
	c.call(unix.SYS_NEWFSTATAT, tree.arg(), c.str(""), c.stat, num(unix.AT_EMPTY_PATH))
	if len(o.propagation) == 0 {
		c.setAttr(tree, unix.AT_RECURSIVE, 0, 0, unix.MS_PRIVATE)
	}
	c.propagate(tree, o)
	if o.set|o.clr != 0 {
		c.setAttr(tree, 0, o.set, o.clr, 0)
	}
	if o.rset|o.rclr != 0 {
		c.setAttr(tree, unix.AT_RECURSIVE, o.rset, o.rclr, 0)
	}
	resolve := uint64(resolveRoot)
	if o.destNoFollow {
		resolve |= unix.RESOLVE_NO_SYMLINKS
	}
	if len(components(dest)) == 0 {
		return fmt.Errorf("destination is the root")
	}
	c.target(dest, t, likeStat, resolve, noLabel)
	c.notProc(t, dest)
	c.moveMount(tree, t)
	c.call(unix.SYS_CLOSE, tree.arg())
	c.call(unix.SYS_CLOSE, t.arg())
	return nil
}

// copyUp mounts a tmpfs over t, and has the parent copy into it what was there.
func (c *compiler) copyUp(t slot, dest string, resolve uint64, flags uintptr, data string) {
	c.call(unix.SYS_FCHDIR, t.arg())
	c.call(unix.SYS_MOUNT, c.str("tmpfs"), c.str("."), c.str("tmpfs"), num(uint64(flags)), c.str(data))
	top := c.builder.slot()
	c.open(c.root, dest, pathFlags, resolve).out(top)
	c.call(OpSendFD, num(0), t.arg(), num(0), num(FDCopyFrom))
	c.call(OpSendFD, num(0), top.arg(), num(0), num(FDCopyTo))
	c.call(OpPhase, num(PhaseCopyUp))
	c.call(unix.SYS_CLOSE, top.arg())
}

// foreign tells whether the container's group is not in the hierarchy and the
// container is not to see those that are.
func (c *compiler) foreign(h cgroup.Hierarchy) bool {
	if !c.opts.OwnHierarchies || c.opts.Cgroup == nil {
		return false
	}
	_, own := c.opts.Cgroup.Paths()[h.Controllers]
	return !own
}

// cgroupMount mounts the cgroup hierarchies below dest.
func (c *compiler) cgroupMount(dest string, o mountOptions) error {
	hs := c.opts.Hierarchies
	v2 := false
	var v1 []string
	for _, h := range hs {
		if h.V2 {
			v2 = true
		} else {
			v1 = append(v1, h.Controllers)
		}
	}
	if len(v1) == 0 {
		if !v2 {
			return fmt.Errorf("the machine has no cgroup hierarchy")
		}
		return c.mountAt("cgroup2", "cgroup", dest, o, nil)
	}
	c.step("mount cgroup → "+dest, o.describe())
	t := c.builder.slot()
	c.target(dest, t, dirTarget, resolveRoot, noLabel)
	c.call(unix.SYS_FCHDIR, t.arg())
	c.call(unix.SYS_MOUNT, c.str("tmpfs"), c.str("."), c.str("tmpfs"), num(uint64(o.flags&^unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC)), c.str("mode=755"))
	top := c.builder.slot()
	c.open(c.root, dest, pathFlags, resolveRoot).out(top)
	for _, h := range hs {
		if h.V2 {
			continue
		}
		if c.foreign(h) && o.flags&unix.MS_RDONLY != 0 {
			continue
		}
		name := h.Name()
		sub := c.builder.slot()
		c.call(unix.SYS_MKDIRAT, top.arg(), c.str(name), num(0o755))
		c.call(unix.SYS_OPENAT, top.arg(), c.str(name), num(pathFlags|unix.O_NOFOLLOW), num(0)).out(sub)
		if c.fresh&unix.CLONE_NEWCGROUP != 0 && !c.userns {
			c.call(unix.SYS_FCHDIR, sub.arg())
			c.call(unix.SYS_MOUNT, c.str("cgroup"), c.str("."), c.str("cgroup"), num(uint64(o.flags|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC)), c.str(h.Controllers))
		} else {
			dir := h.Path
			if c.opts.Cgroup != nil {
				if d, ok := c.opts.Cgroup.Paths()[h.Controllers]; ok {
					dir = d
				}
			}
			tree := c.builder.slot()
			c.call(unix.SYS_OPEN_TREE, c.old.arg(), c.str(strings.TrimPrefix(dir, "/")), num(treeFlags)).out(tree)
			c.setAttr(tree, 0, o.set|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC, o.clr&^(unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC), 0)
			c.moveMount(tree, sub)
			c.call(unix.SYS_CLOSE, tree.arg())
		}
		c.call(unix.SYS_CLOSE, sub.arg())
		if strings.Contains(name, ",") {
			for _, one := range strings.Split(name, ",") {
				c.call(unix.SYS_SYMLINKAT, c.str(name), top.arg(), c.str(one)).ignore(unix.EEXIST)
			}
		}
	}
	if o.flags&unix.MS_RDONLY != 0 {
		c.setAttr(top, 0, unix.MOUNT_ATTR_RDONLY, 0, 0)
	}
	c.propagate(top, o)
	c.call(unix.SYS_CLOSE, top.arg())
	c.call(unix.SYS_CLOSE, t.arg())
	return nil
}
