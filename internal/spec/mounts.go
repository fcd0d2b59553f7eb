package spec

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// initTarget is where --init's program stands in the container.
const initTarget = "/sbin/docker-init"

// BeneathOption and a path are a bind's option that names what of the source is
// mounted (Mount.Beneath): the launcher's own.
const BeneathOption = "src-beneath="

// Mount is a mount asked for, its source resolved on the container's kernel.
type Mount struct {
	Type        string // "bind", "tmpfs", or what a volume's driver options say
	Source      string
	Destination string
	Options     []string // beyond ro and propagation
	ReadOnly    bool
	// Recursive makes all mounts below read-only too, where ReadOnly.
	Recursive   bool
	Propagation mount.Propagation
	// Beneath, where Type is "bind", is what of the directory Source is mounted: a
	// path that others may change, looked up by whoever mounts and never out of Source.
	Beneath string
	// Engine marks the engine's own files (hosts, resolv.conf …).
	Engine bool
}

func defaultMounts(in Input) []specs.Mount {
	shm := in.HostConfig.ShmSize
	if shm == 0 {
		shm = in.Defaults.ShmSize
	}
	if shm == 0 {
		shm = 64 << 20
	}
	ms := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
	}
	if in.HostConfig.IpcMode.IsHost() && len(in.UIDMap) > 0 { // a user namespace can't mount the host's queues
		ms[5] = specs.Mount{Destination: "/dev/mqueue", Type: "bind", Source: "/dev/mqueue", Options: []string{"rbind", "nosuid", "noexec", "nodev"}}
	}
	if in.HostConfig.PidMode.IsHost() && len(in.UIDMap) > 0 {
		ms[0] = specs.Mount{Destination: "/proc", Type: "bind", Source: "/proc", Options: []string{"rbind", "nosuid", "noexec", "nodev"}}
	}
	switch {
	case in.HostConfig.IpcMode.IsNone():
	case in.ShmSource != "":
		ms = append(ms, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: in.ShmSource, Options: []string{"rbind", "nosuid", "noexec", "nodev", "rprivate"}})
	default:
		ms = append(ms, specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(shm, 10)}})
	}
	return ms
}

func mounts(s *specs.Spec, in Input, sec security) error {
	user := map[string]bool{}
	for _, m := range in.Mounts {
		user[path.Clean(m.Destination)] = true
	}
	cgroups := in.HostConfig.Privileged
	if sec.cgroups != nil {
		cgroups = *sec.cgroups
	}
	for _, m := range defaultMounts(in) {
		if user[m.Destination] || user["/dev"] && strings.HasPrefix(m.Destination, "/dev/") {
			continue
		}
		switch {
		case in.HostConfig.Privileged && m.Destination == "/sys", cgroups && m.Type == "cgroup":
			m.Options = slices.DeleteFunc(m.Options, func(o string) bool { return o == "ro" })
		case in.HostConfig.ReadonlyRootfs && !staysWritable(m.Destination) && !slices.Contains(m.Options, "ro"):
			m.Options = append(m.Options, "ro")
		}
		s.Mounts = append(s.Mounts, m)
	}
	extra := slices.Clone(in.Mounts)
	if in.Init != "" {
		extra = append(extra, Mount{Type: "bind", Source: in.Init, Destination: initTarget, ReadOnly: true})
	}
	// Parents before children, otherwise as given.
	slices.SortStableFunc(extra, func(a, b Mount) int { return depth(a.Destination) - depth(b.Destination) })
	for _, m := range extra {
		o, err := options(m)
		if err != nil {
			return err
		}
		s.Mounts = append(s.Mounts, specs.Mount{Destination: m.Destination, Type: m.Type, Source: m.Source, Options: o})
		raisePropagation(s, m.Propagation)
	}
	return nil
}

func staysWritable(dest string) bool {
	switch dest {
	case "/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue":
		return true
	}
	return false
}

func depth(p string) int { return strings.Count(path.Clean(p), "/") }

// raisePropagation lets a shared or slave mount reach through the root.
func raisePropagation(s *specs.Spec, p mount.Propagation) {
	switch p {
	case mount.PropagationShared, mount.PropagationRShared:
		s.Linux.RootfsPropagation = "shared"
	case mount.PropagationSlave, mount.PropagationRSlave:
		if s.Linux.RootfsPropagation == "" {
			s.Linux.RootfsPropagation = "slave"
		}
	}
}

func options(m Mount) ([]string, error) {
	if m.Type == "tmpfs" {
		return tmpfsOptions(m)
	}
	o := slices.Clone(m.Options)
	if m.Type == "bind" && !slices.Contains(o, "bind") && !slices.Contains(o, "rbind") {
		o = append([]string{"rbind"}, o...)
	}
	switch {
	case m.ReadOnly && m.Recursive && m.Type == "bind":
		o = append(o, "ro", "rro")
	case m.ReadOnly:
		o = append(o, "ro")
	}
	if m.Type == "bind" {
		p := m.Propagation
		if p == "" {
			p = mount.PropagationRPrivate
		}
		o = append(o, string(p))
		if m.Beneath != "" {
			o = append(o, BeneathOption+m.Beneath)
		}
	}
	return o, nil
}

// opposites are tmpfs options of which the later wins.
var opposites = map[string]string{
	"exec": "noexec", "noexec": "exec", "suid": "nosuid", "nosuid": "suid", "dev": "nodev", "nodev": "dev",
	"rw": "ro", "ro": "rw", "async": "sync", "sync": "async", "atime": "noatime", "noatime": "atime",
	"diratime": "nodiratime", "nodiratime": "diratime", "relatime": "norelatime", "norelatime": "relatime",
	"strictatime": "nostrictatime", "nostrictatime": "strictatime", "private": "", "rprivate": "", "shared": "", "rshared": "", "slave": "", "rslave": "",
}

func tmpfsOptions(m Mount) ([]string, error) {
	out := []string{"noexec", "nosuid", "nodev"}
	if m.ReadOnly {
		out = append(out, "ro")
	}
	set := func(key, opt string) {
		out = slices.DeleteFunc(out, func(o string) bool {
			k, _, _ := strings.Cut(o, "=")
			return k == key || opposites[key] != "" && k == opposites[key]
		})
		out = append(out, opt)
	}
	for _, o := range m.Options {
		if o == "" {
			continue
		}
		k, _, hasValue := strings.Cut(o, "=")
		switch k {
		case "size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol", "huge":
			if !hasValue {
				return nil, invalid("tmpfs option %q needs a value", o)
			}
		default:
			if _, ok := opposites[k]; !ok || hasValue {
				return nil, invalid("invalid tmpfs option %q", o)
			}
		}
		set(k, o)
	}
	return out, nil
}

// TmpfsOptions writes the options of --mount type=tmpfs.
func TmpfsOptions(t *mount.TmpfsOptions) []string {
	if t == nil {
		return nil
	}
	var out []string
	if t.SizeBytes > 0 {
		out = append(out, "size="+strconv.FormatInt(t.SizeBytes, 10))
	}
	if t.Mode != 0 {
		out = append(out, fmt.Sprintf("mode=%o", tmpfsMode(t.Mode)))
	}
	for _, kv := range t.Options {
		out = append(out, strings.Join(kv, "="))
	}
	return out
}

// tmpfsMode takes Unix bits as clients send them (01777), and Go's own.
func tmpfsMode(m os.FileMode) uint32 {
	bits := uint32(m) & 0o7777
	if m&os.ModeSticky != 0 {
		bits |= 0o1000
	}
	return bits
}

// CheckTmpfs splits and checks the options of --tmpfs.
func CheckTmpfs(opts string) ([]string, error) {
	if opts == "" {
		return nil, nil
	}
	list := strings.Split(opts, ",")
	_, err := tmpfsOptions(Mount{Options: list})
	return list, err
}
