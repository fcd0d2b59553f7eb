package launch

import (
	"fmt"
	"path"
	"sort"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

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
		c.checkPlatform, c.checkNamespaces, c.checkRoot, c.checkMountList, c.checkLinux,
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
