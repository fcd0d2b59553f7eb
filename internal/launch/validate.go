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

// validate refuses what cannot be honoured, before anything is compiled.
func (c *compiler) validate() error {
	s := *c.spec
	c.spec = &s
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	for _, check := range []func() error{
		c.checkPlatform, c.checkNamespaces, c.checkRoot, c.checkMountList, c.checkLinux, c.checkHooks,
		func() error { return checkProcess(s.Process, true) },
	} {
		if err := check(); err != nil {
			return err
		}
	}
	if c.opts.Hierarchies == nil {
		c.opts.Hierarchies = cgroup.Hierarchies()
	}
	return nil
}

func (c *compiler) checkPlatform() error {
	s := c.spec
	if v := s.Version; v != "" && !strings.HasPrefix(v, "1.") && !strings.HasPrefix(v, "0.") {
		return fmt.Errorf("ociVersion: %q is not version 1", v)
	}
	switch {
	case s.Windows != nil:
		return fmt.Errorf("windows: not a container of this platform")
	case s.Solaris != nil:
		return fmt.Errorf("solaris: not a container of this platform")
	case s.VM != nil:
		return fmt.Errorf("vm: not supported by this runtime")
	case s.ZOS != nil:
		return fmt.Errorf("zos: not a container of this platform")
	case s.FreeBSD != nil:
		return fmt.Errorf("freebsd: not a container of this platform")
	case s.Process == nil:
		return fmt.Errorf("process: is missing")
	}
	return nil
}

func (c *compiler) checkNamespaces() error {
	c.join = map[specs.LinuxNamespaceType]string{}
	seen := map[specs.LinuxNamespaceType]bool{}
	for i, n := range c.spec.Linux.Namespaces {
		f := namespaceFlag(n.Type)
		if f == 0 {
			return fmt.Errorf("linux.namespaces[%d]: type %q is unknown", i, n.Type)
		}
		if seen[n.Type] {
			return fmt.Errorf("linux.namespaces[%d]: %s is there twice", i, n.Type)
		}
		seen[n.Type] = true
		if n.Path == "" {
			c.fresh |= f
			continue
		}
		if !path.IsAbs(n.Path) || strings.IndexByte(n.Path, 0) >= 0 {
			return fmt.Errorf("linux.namespaces[%d]: path %q is not absolute", i, n.Path)
		}
		c.join[n.Type] = n.Path
	}
	return nil
}

func (c *compiler) checkRoot() error {
	if c.spec.Root == nil {
		if len(c.opts.Rootfs) == 0 {
			return fmt.Errorf("root: is missing")
		}
		c.spec.Root = &specs.Root{}
	}
	if len(c.opts.Rootfs) == 0 && c.spec.Root.Path == "" {
		return fmt.Errorf("root.path: is empty")
	}
	return nil
}

func (c *compiler) checkMountList() error {
	for i, m := range c.spec.Mounts {
		if strings.IndexByte(m.Destination+m.Source+m.Type, 0) >= 0 {
			return fmt.Errorf("mounts[%d]: zero byte", i)
		}
		if m.Destination == "" {
			return fmt.Errorf("mounts[%d].destination: is empty", i)
		}
	}
	return nil
}

func (c *compiler) checkLinux() error {
	l := c.spec.Linux
	if l.IntelRdt != nil {
		return fmt.Errorf("linux.intelRdt: resource director groups are not supported")
	}
	if l.MountLabel != "" {
		return fmt.Errorf("linux.mountLabel: SELinux is not supported")
	}
	switch l.RootfsPropagation {
	case "", "slave", "rslave", "private", "rprivate":
	case "shared", "rshared", "unbindable", "runbindable":
		c.shared = true
	default:
		return fmt.Errorf("linux.rootfsPropagation: %q is unknown", l.RootfsPropagation)
	}
	for _, list := range [][]string{l.MaskedPaths, l.ReadonlyPaths} {
		for _, p := range list {
			if !path.IsAbs(p) || strings.IndexByte(p, 0) >= 0 {
				return fmt.Errorf("linux.maskedPaths, readonlyPaths: %q is not an absolute path", p)
			}
		}
	}
	_, userPath := c.join[specs.UserNamespace]
	if c.fresh&unix.CLONE_NEWUSER != 0 {
		if len(l.UIDMappings) == 0 || len(l.GIDMappings) == 0 {
			return fmt.Errorf("linux.uidMappings, gidMappings: a new user namespace needs both")
		}
		if err := checkMaps(l.UIDMappings, l.GIDMappings); err != nil {
			return fmt.Errorf("linux.%w", err)
		}
	} else if !userPath && (len(l.UIDMappings) > 0 || len(l.GIDMappings) > 0) {
		return fmt.Errorf("linux.uidMappings, gidMappings: there is no user namespace")
	}
	if len(l.TimeOffsets) > 0 && c.fresh&unix.CLONE_NEWTIME == 0 {
		return fmt.Errorf("linux.timeOffsets: there is no new time namespace")
	}
	for clock, o := range l.TimeOffsets {
		if clock != "monotonic" && clock != "boottime" {
			return fmt.Errorf("linux.timeOffsets: clock %q is not monotonic or boottime", clock)
		}
		if o.Nanosecs >= 1e9 {
			return fmt.Errorf("linux.timeOffsets.%s.nanosecs: %d is a second or more", clock, o.Nanosecs)
		}
	}
	if (c.spec.Hostname != "" || c.spec.Domainname != "") && c.fresh&unix.CLONE_NEWUTS == 0 && c.join[specs.UTSNamespace] == "" {
		return fmt.Errorf("hostname, domainname: there is no uts namespace")
	}
	for name, s := range map[string]string{"hostname": c.spec.Hostname, "domainname": c.spec.Domainname} {
		if len(s) > 64 {
			return fmt.Errorf("%s: longer than 64 bytes", name)
		}
	}
	if c.fresh&unix.CLONE_NEWNS == 0 {
		return fmt.Errorf("linux.namespaces: a container needs a mount namespace of its own")
	}
	if len(l.NetDevices) > 0 && c.fresh&unix.CLONE_NEWNET == 0 && c.join[specs.NetworkNamespace] == "" {
		return fmt.Errorf("linux.netDevices: there is no new network namespace")
	}
	for host, d := range l.NetDevices {
		for _, n := range []string{host, d.Name} {
			if len(n) >= unix.IFNAMSIZ || strings.ContainsAny(n, "/ \t\n\x00:%") || n == "." || n == ".." {
				return fmt.Errorf("linux.netDevices: %q is no name of a device", n)
			}
		}
	}
	return c.checkSysctls()
}

// checkHooks refuses hooks that cannot be run when their time comes.
func (c *compiler) checkHooks() error {
	h := c.spec.Hooks
	if h == nil {
		return nil
	}
	for _, l := range []struct {
		name  string
		hooks []specs.Hook
	}{
		{"prestart", h.Prestart}, //nolint:staticcheck // deprecated, but still of the specification
		{"createRuntime", h.CreateRuntime}, {"createContainer", h.CreateContainer},
		{"startContainer", h.StartContainer}, {"poststart", h.Poststart}, {"poststop", h.Poststop},
	} {
		for i, hook := range l.hooks {
			if err := CheckHook(hook); err != nil {
				return fmt.Errorf("hooks.%s[%d]: %w", l.name, i, err)
			}
		}
	}
	return nil
}

// checkMaps refuses overlapping and empty id maps.
func checkMaps(uids, gids []specs.LinuxIDMapping) error {
	for name, maps := range map[string][]specs.LinuxIDMapping{"uidMappings": uids, "gidMappings": gids} {
		if len(maps) > 340 {
			return fmt.Errorf("%s: more than the kernel's 340 lines", name)
		}
		for i, m := range maps {
			if m.Size == 0 || uint64(m.ContainerID)+uint64(m.Size) > 1<<32-1 || uint64(m.HostID)+uint64(m.Size) > 1<<32-1 {
				return fmt.Errorf("%s[%d]: size %d", name, i, m.Size)
			}
			for _, n := range maps[:i] {
				if overlap(m.ContainerID, n.ContainerID, m.Size, n.Size) || overlap(m.HostID, n.HostID, m.Size, n.Size) {
					return fmt.Errorf("%s[%d]: overlaps another", name, i)
				}
			}
		}
	}
	return nil
}

func overlap(a, b, na, nb uint32) bool {
	return uint64(a) < uint64(b)+uint64(nb) && uint64(b) < uint64(a)+uint64(na)
}

// ipcSysctls are those of the ipc namespace beside kernel.msg*, sem and shm*.
var ipcSysctls = map[string]bool{
	"kernel/msgmax": true, "kernel/msgmnb": true, "kernel/msgmni": true, "kernel/sem": true,
	"kernel/shmall": true, "kernel/shmmax": true, "kernel/shmmni": true, "kernel/shm_rmid_forced": true,
}

// checkSysctls lets through what belongs to a namespace of the container's:
// anything else would change the host.
func (c *compiler) checkSysctls() error {
	has := func(flag uint64, kind specs.LinuxNamespaceType) bool {
		return c.fresh&flag != 0 || c.join[kind] != ""
	}
	for _, kv := range c.sysctlList() {
		key, value, file := kv[0], kv[1], kv[2]
		if path.Clean("/"+file) != "/"+file || strings.Contains(file, "..") || strings.IndexByte(file+value, 0) >= 0 {
			return fmt.Errorf("linux.sysctl: %q is no name of a kernel parameter", key)
		}
		need, ok := "", false
		switch {
		case ipcSysctls[file], strings.HasPrefix(file, "fs/mqueue/"):
			need, ok = "ipc", has(unix.CLONE_NEWIPC, specs.IPCNamespace)
		case strings.HasPrefix(file, "net/"):
			need, ok = "network", has(unix.CLONE_NEWNET, specs.NetworkNamespace)
		case file == "kernel/domainname":
			need, ok = "uts", has(unix.CLONE_NEWUTS, specs.UTSNamespace)
		case file == "kernel/hostname":
			return fmt.Errorf("linux.sysctl: %s: is set by hostname", key)
		case strings.HasPrefix(file, "user/"):
			need, ok = "user", has(unix.CLONE_NEWUSER, specs.UserNamespace)
		default:
			return fmt.Errorf("linux.sysctl: %s: is not of a namespace: it would change the host", key)
		}
		if !ok {
			return fmt.Errorf("linux.sysctl: %s: there is no %s namespace of its own: it would change the host", key, need)
		}
	}
	return nil
}

// sysctlList gives key, value and file of each sysctl, sorted.
func (c *compiler) sysctlList() (list [][3]string) {
	for k, v := range c.spec.Linux.Sysctl {
		file := k
		if !strings.Contains(k, "/") {
			file = strings.ReplaceAll(k, ".", "/")
		}
		list = append(list, [3]string{k, v, file})
	}
	sort.Slice(list, func(i, j int) bool { return list[i][0] < list[j][0] })
	return list
}

func checkProcess(p *specs.Process, init bool) error {
	if len(p.Args) == 0 {
		return fmt.Errorf("process.args: is empty")
	}
	if p.CommandLine != "" {
		return fmt.Errorf("process.commandLine: not for this platform")
	}
	if p.User.Username != "" {
		return fmt.Errorf("process.user.username: not for this platform")
	}
	if p.User.Umask != nil && *p.User.Umask > 0o777 {
		return fmt.Errorf("process.user.umask: %#o is above 0777", *p.User.Umask)
	}
	if !path.IsAbs(p.Cwd) {
		return fmt.Errorf("process.cwd: %q is not an absolute path", p.Cwd)
	}
	for _, list := range [][]string{p.Args, p.Env, {p.Cwd}} {
		for _, s := range list {
			if strings.IndexByte(s, 0) >= 0 {
				return fmt.Errorf("process: %q has a zero byte", s)
			}
		}
	}
	return nil
}
