// Package spec translates a container's Docker settings into an OCI runtime
// specification. It is pure: what must be looked up (users, devices, paths,
// the kernel's abilities) comes in with Input. The defaults are Docker's,
// exactly, but for the limits that protect the host (Defaults).
//
// Build does not check what Validate refuses; call Validate when the container
// is created, before anything else happens.
package spec

import (
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// DefaultPath is PATH where neither image nor user set one.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Defaults are limits of containers that ask for none.
type Defaults struct {
	Pids    int64 // processes; 0 or negative: unlimited
	Memory  int64 // bytes; 0: unlimited
	ShmSize int64 // bytes of /dev/shm; 0: 64 MiB
}

// User is who runs the first process, resolved in the image.
type User struct {
	UID, GID   uint32
	Additional []uint32
	Home       string
}

// Device is a device node with what the control group allows on it.
type Device struct {
	specs.LinuxDevice
	Access string // some of rwm
}

// Input is everything that a specification is made of.
type Input struct {
	ID         string
	Config     *container.Config     // merged with the image's
	HostConfig *container.HostConfig // defaults filled in
	User       User
	Defaults   Defaults

	Hostname   string // empty: the namespace is not the container's own
	LinkEnv    []string
	Mounts     []Mount
	NetNS      string // path; empty: the kernel's own network
	NetReady   bool   // the namespace has Docker's sysctls already
	PidNS      string // path of the namespace to share, for container: modes
	IpcNS      string
	ShmSource  string // host directory bound to /dev/shm, if it is shared
	CgroupPath string
	CgroupV2   bool
	// Capabilities are those that the kernel lets its shim give away; nil: all.
	Capabilities []string
	Devices      []Device // of --device
	AllDevices   []Device // of the kernel, for --privileged
	Init         string   // host path of the init program; empty: none
	// UIDMap and GIDMap are those of the container's user namespace; UserNS is its
	// path, empty for a new one. None: the host's.
	UIDMap []specs.LinuxIDMapping
	GIDMap []specs.LinuxIDMapping
	UserNS string
}

// Build makes the specification. The result shares no memory with in but the
// seccomp profile, which nobody may change.
func Build(in Input) (*specs.Spec, error) {
	sec, err := parseSecurity(in.HostConfig)
	if err != nil {
		return nil, err
	}
	s := &specs.Spec{
		Version:  "1.2.0",
		Root:     &specs.Root{Path: "rootfs", Readonly: in.HostConfig.ReadonlyRootfs},
		Hostname: in.Hostname,
		Linux: &specs.Linux{
			CgroupsPath: in.CgroupPath,
			Namespaces:  namespaces(in),
			Sysctl:      sysctls(in),
			UIDMappings: in.UIDMap,
			GIDMappings: in.GIDMap,
		},
		Annotations: in.HostConfig.Annotations,
	}
	if in.Hostname != "" {
		s.Domainname = in.Config.Domainname
	}
	if s.Process, err = process(in, sec); err != nil {
		return nil, err
	}
	if err := mounts(s, in, sec); err != nil {
		return nil, err
	}
	devices(s, in)
	resources(s.Linux.Resources, in)
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = protectedPaths(in.HostConfig, sec)
	if s.Linux.Seccomp, err = sec.profile(s, in.HostConfig.Privileged); err != nil {
		return nil, err
	}
	return s, nil
}

func process(in Input, sec security) (*specs.Process, error) {
	c, h := in.Config, in.HostConfig
	caps, err := Capabilities(h.CapAdd, h.CapDrop, h.Privileged, in.Capabilities)
	if err != nil {
		return nil, err
	}
	argv := slices.Concat(c.Entrypoint, c.Cmd)
	if in.Init != "" {
		argv = append([]string{initTarget, "--"}, argv...)
	}
	oom := h.OomScoreAdj
	p := &specs.Process{
		Terminal:        c.Tty,
		User:            specs.User{UID: in.User.UID, GID: in.User.GID, AdditionalGids: in.User.Additional, Umask: h.Umask},
		Args:            argv,
		Env:             Environment(in.Config, in.Config.Hostname, in.LinkEnv, in.User.Home),
		Cwd:             c.WorkingDir,
		Capabilities:    ProcessCapabilities(caps, in.User.UID),
		NoNewPrivileges: sec.noNewPrivileges,
		ApparmorProfile: sec.apparmor,
		OOMScoreAdj:     &oom,
		Rlimits:         Rlimits(h.Ulimits),
	}
	if p.Cwd == "" {
		p.Cwd = "/"
	}
	if c.Tty && h.ConsoleSize[0] > 0 && h.ConsoleSize[1] > 0 {
		p.ConsoleSize = &specs.Box{Height: h.ConsoleSize[0], Width: h.ConsoleSize[1]}
	}
	return p, nil
}

// Environment is Docker's: PATH, HOSTNAME and TERM below the links' and the
// container's own variables, HOME where nobody set it.
func Environment(c *container.Config, hostname string, links []string, home string) []string {
	env := []string{"PATH=" + DefaultPath}
	if hostname != "" {
		env = append(env, "HOSTNAME="+hostname)
	}
	if c.Tty {
		env = append(env, "TERM=xterm")
	}
	env = MergeEnv(append(env, links...), c.Env)
	if home != "" && !slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, "HOME=") }) {
		env = append(env, "HOME="+home)
	}
	return env
}

// MergeEnv lays over on base: a variable replaces the one of its name where it
// stands, NAME without "=" removes it.
func MergeEnv(base, over []string) []string {
	out := slices.Clone(base)
	at := make(map[string]int, len(out))
	for i, e := range out {
		k, _, _ := strings.Cut(e, "=")
		at[k] = i
	}
	gone := false
	for _, e := range over {
		k, _, set := strings.Cut(e, "=")
		i, known := at[k]
		switch {
		case !set && known:
			out[i], gone = "", true
			delete(at, k)
		case !set:
		case known:
			out[i] = e
		default:
			at[k] = len(out)
			out = append(out, e)
		}
	}
	if gone {
		out = slices.DeleteFunc(out, func(e string) bool { return e == "" })
	}
	return out
}

func namespaces(in Input) []specs.LinuxNamespace {
	h := in.HostConfig
	ns := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	add := func(t specs.LinuxNamespaceType, path string) {
		ns = append(ns, specs.LinuxNamespace{Type: t, Path: path})
	}
	shared := h.NetworkMode.IsContainer() && in.NetNS == "" // with one that has the host's network
	if !h.NetworkMode.IsHost() && !shared {
		add(specs.NetworkNamespace, in.NetNS)
	}
	if !h.UTSMode.IsHost() {
		add(specs.UTSNamespace, "")
	}
	switch {
	case h.PidMode.IsContainer():
		add(specs.PIDNamespace, in.PidNS)
	case !h.PidMode.IsHost():
		add(specs.PIDNamespace, "")
	}
	switch {
	case h.IpcMode.IsContainer():
		add(specs.IPCNamespace, in.IpcNS)
	case !h.IpcMode.IsHost():
		add(specs.IPCNamespace, "")
	}
	if !h.CgroupnsMode.IsHost() {
		add(specs.CgroupNamespace, "")
	}
	if len(in.UIDMap) > 0 {
		add(specs.UserNamespace, in.UserNS)
	}
	return ns
}

// sysctls adds what lets any user bind low ports and ping, as Docker does in a
// network namespace of the container's own.
func sysctls(in Input) map[string]string {
	out := map[string]string{}
	if h := in.HostConfig; !h.NetworkMode.IsHost() && !h.NetworkMode.IsContainer() && !in.NetReady {
		out["net.ipv4.ip_unprivileged_port_start"] = "0"
		if len(in.UIDMap) == 0 {
			out["net.ipv4.ping_group_range"] = "0 2147483647"
		}
	}
	for k, v := range in.HostConfig.Sysctls {
		out[k] = v
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

// Rlimits translates --ulimit.
func Rlimits(us []*container.Ulimit) []specs.POSIXRlimit {
	var out []specs.POSIXRlimit
	for _, u := range us {
		out = append(out, specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard)})
	}
	return out
}
