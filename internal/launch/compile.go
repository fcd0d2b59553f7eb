package launch

import (
	"fmt"
	"path"
	"sort"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/cgroup"
)

// namespaceFlags are the clone flags of the specification's namespaces, in the
// order in which they are joined.
var namespaceFlags = []struct {
	kind specs.LinuxNamespaceType
	flag uint64
}{
	{specs.UserNamespace, unix.CLONE_NEWUSER},
	{specs.PIDNamespace, unix.CLONE_NEWPID},
	{specs.NetworkNamespace, unix.CLONE_NEWNET},
	{specs.IPCNamespace, unix.CLONE_NEWIPC},
	{specs.UTSNamespace, unix.CLONE_NEWUTS},
	{specs.CgroupNamespace, unix.CLONE_NEWCGROUP},
	{specs.TimeNamespace, unix.CLONE_NEWTIME},
	{specs.MountNamespace, unix.CLONE_NEWNS},
}

func namespaceFlag(kind specs.LinuxNamespaceType) uint64 {
	for _, n := range namespaceFlags {
		if n.kind == kind {
			return n.flag
		}
	}
	return 0
}

// compiler holds what the parts of Compile share.
type compiler struct {
	*builder
	spec *specs.Spec
	opts Options

	fresh uint64                              // namespaces to make
	join  map[specs.LinuxNamespaceType]string // namespaces to join by path

	proc slot // the host's /proc, verified
	root slot // the container's root
	old  slot // the host's root
	late []func()
	// sources are the clones of what is bound.
	sources map[*specs.Mount]slot
	// idmaps are the user namespaces of idmapped mounts, by their maps; "" is
	// the container's own.
	idmaps map[string]slot
	// covered are the directories that idmapped clones of themselves cover.
	covered map[string]bool
	// nodes are the device nodes that a user namespace binds, by their paths.
	nodes map[string]slot

	userns bool
	shared bool // the root's propagation is shared: nothing may leak to the host
}

// Compile makes the plan of a container's first process. The whole
// specification is validated; an error names the field.
func Compile(spec *specs.Spec, opts Options) (_ *Plan, err error) {
	c := &compiler{builder: newBuilder(), spec: spec, opts: opts}
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	c.p.Preserve = opts.Preserve
	c.p.Gate = opts.Gate
	c.p.Terminal = spec.Process.Terminal
	parts := []func() error{
		c.enter, c.rootfs, c.mounts, c.devices, c.console, c.sysctls, c.leave,
	}
	for _, part := range parts {
		if err := part(); err != nil {
			return nil, fmt.Errorf("spec: %w", err)
		}
	}
	if err := c.memoryPolicy(c.spec.Linux.MemoryPolicy); err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	filter, err := compileFilter(nil, c.spec.Linux.Seccomp)
	if err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	if err := c.process(c.spec.Process, filter, c.spec.Linux.Personality, true); err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	return c.finish(), nil
}

// enter joins and makes namespaces and cgroups.
func (c *compiler) enter() error {
	c.proc, c.root, c.old = c.builder.slot(), c.builder.slot(), c.builder.slot()
	c.step("umask 022")
	c.call(unix.SYS_UMASK, num(0o022)) // what we make does not depend on the caller's
	c.hostProc()
	c.oomScoreAdj(c.spec.Process)
	c.cgroup()

	_, joinUser := c.join[specs.UserNamespace]
	second := c.fresh&unix.CLONE_NEWUSER != 0 || joinUser || c.fresh&unix.CLONE_NEWTIME != 0
	c.userns = c.fresh&unix.CLONE_NEWUSER != 0 || joinUser

	for _, n := range namespaceFlags {
		p, ok := c.join[n.kind]
		if !ok || n.flag == unix.CLONE_NEWUSER {
			continue
		}
		if n.flag == unix.CLONE_NEWPID && !second {
			c.step("join pid namespace " + p)
			c.p.JoinPid = p
			continue
		}
		c.step(fmt.Sprintf("join %s namespace %s", n.kind, p))
		fd := c.builder.slot()
		c.call(unix.SYS_OPENAT, fdcwd, c.str(p), num(unix.O_RDONLY|unix.O_CLOEXEC), num(0)).out(fd)
		c.call(unix.SYS_SETNS, fd.arg(), num(n.flag))
		c.call(unix.SYS_CLOSE, fd.arg())
	}
	c.p.OwnCaps = !c.userns
	fresh := c.fresh &^ (unix.CLONE_NEWCGROUP | unix.CLONE_NEWTIME)
	if !second {
		c.p.Clone = fresh
	} else if err := c.secondClone(fresh, joinUser); err != nil {
		return err
	}
	if c.fresh&unix.CLONE_NEWCGROUP != 0 {
		c.step("new cgroup namespace")
		c.call(unix.SYS_UNSHARE, num(unix.CLONE_NEWCGROUP))
	}
	c.step("new session")
	c.call(unix.SYS_SETSID)
	c.keyring()
	c.loopback()
	if devs := c.spec.Linux.NetDevices; len(devs) > 0 {
		c.p.NetDevices = map[string]string{}
		var names []string
		for host, d := range devs {
			c.p.NetDevices[host] = d.Name
			names = append(names, host)
		}
		sort.Strings(names)
		c.step("network devices", strings.Join(names, " "))
		c.call(OpPhase, num(PhaseNetDevices))
	}
	for _, ph := range c.opts.Phases {
		if ph == PhaseNamespaces {
			c.step("hooks createRuntime")
			c.call(OpPhase, num(PhaseNamespaces))
		}
	}
	if c.spec.Hostname != "" {
		c.step("hostname " + c.spec.Hostname)
		c.call(unix.SYS_SETHOSTNAME, mem([]byte(c.spec.Hostname)), num(len(c.spec.Hostname)))
	}
	if c.spec.Domainname != "" {
		c.step("domainname " + c.spec.Domainname)
		c.call(unix.SYS_SETDOMAINNAME, mem([]byte(c.spec.Domainname)), num(len(c.spec.Domainname)))
	}
	return nil
}

// hostProc opens the host's /proc and makes sure that it is procfs.
func (c *compiler) hostProc() {
	c.step("open /proc")
	c.call(unix.SYS_OPENAT, fdcwd, c.str("/proc"), num(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC), num(0)).out(c.proc)
	c.verifyFS(c.proc, unix.PROC_SUPER_MAGIC)
}

// verifyFS fails the step unless fd is on a file system of that magic.
func (c *compiler) verifyFS(fd slot, magic uint32) {
	ok := c.label()
	c.call(unix.SYS_FSTATFS, fd.arg(), c.statfs)
	c.call(OpTestMem, c.statfs, num(0), num(4), num(^uint32(0)), num(magic)).to(ok)
	c.call(OpFail, num(unix.EXDEV))
	c.mark(ok)
}

// openHow packs struct open_how.
func openHow(flags, resolve uint64) []byte { return words(flags, 0, resolve) }

const (
	resolveRoot = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS
	pathFlags   = unix.O_PATH | unix.O_CLOEXEC
)

// open opens p below dir by one openat2.
func (c *compiler) open(dir slot, p string, flags, resolve uint64) ins {
	return c.call(unix.SYS_OPENAT2, dir.arg(), c.str(p), c.how(flags, resolve), num(24))
}

// writeProc writes a file of the host's procfs, opened below the verified /proc.
func (c *compiler) writeProc(name, data string) (w ins) {
	fd := c.builder.slot()
	c.open(c.proc, name, unix.O_WRONLY|unix.O_CLOEXEC, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_XDEV).out(fd)
	w = c.call(unix.SYS_WRITE, fd.arg(), mem([]byte(data)), num(len(data)))
	c.call(unix.SYS_CLOSE, fd.arg())
	return w
}

func (c *compiler) oomScoreAdj(p *specs.Process) {
	if p.OOMScoreAdj == nil {
		return
	}
	c.step(fmt.Sprintf("oom_score_adj %d", *p.OOMScoreAdj))
	fd := c.builder.slot()
	data := fmt.Sprint(*p.OOMScoreAdj)
	// self is a link of procfs itself.
	c.open(c.proc, "self/oom_score_adj", unix.O_WRONLY|unix.O_CLOEXEC, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_XDEV|unix.RESOLVE_NO_MAGICLINKS).out(fd)
	c.call(unix.SYS_WRITE, fd.arg(), mem([]byte(data)), num(len(data))).warn(unix.EACCES, unix.EPERM)
	c.call(unix.SYS_CLOSE, fd.arg())
}

// cgroup joins the v1 hierarchies; v2 is joined by the clone.
func (c *compiler) cgroup() { c.joinCgroup(c.opts.Cgroup) }

func (b *builder) joinCgroup(g *cgroup.Group) {
	if g == nil {
		return
	}
	b.p.CgroupDir = g.V2()
	for _, dir := range g.JoinV1() {
		b.step("join cgroup " + dir)
		fd := b.slot()
		b.call(unix.SYS_OPENAT, fdcwd, b.str(path.Join(dir, "tasks")), num(unix.O_WRONLY|unix.O_CLOEXEC), num(0)).out(fd)
		b.call(unix.SYS_WRITE, fd.arg(), mem([]byte("0")), num(1))
		b.call(unix.SYS_CLOSE, fd.arg())
	}
}

// abs makes a path of the spec absolute.
func (c *compiler) abs(p string) string {
	if !strings.HasPrefix(p, "/") {
		p = path.Join(c.opts.Bundle, p)
	}
	return path.Clean(p)
}
