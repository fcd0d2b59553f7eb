package main

import (
	"testing"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

var dockerCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// dockerLike is what Docker makes of a run without flags.
func dockerLike(t *testing.T) *specs.Spec {
	t.Helper()
	rules := []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	for _, d := range [][2]int64{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}} {
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(d[0]), Minor: ptr(d[1]), Access: "rwm"})
	}
	s := &specs.Spec{
		Version: "1.0.2", Hostname: "probed", Root: &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args: []string{"/probe", "syscalls"}, Cwd: "/tmp",
			Env:          []string{"PATH=/usr/local/bin:/usr/bin:/bin", "HOSTNAME=probed", "A=b c", "A=twice"},
			Capabilities: &specs.LinuxCapabilities{Bounding: dockerCaps, Effective: dockerCaps, Permitted: dockerCaps},
			OOMScoreAdj:  ptr(7),
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=67108864"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.CgroupNamespace},
			},
			MaskedPaths: []string{
				"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
				"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
			},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
			Resources: &specs.LinuxResources{
				Memory:  &specs.LinuxMemory{Limit: ptr(int64(256 << 20))},
				CPU:     &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000))},
				Pids:    &specs.LinuxPids{Limit: ptr(int64(500))},
				Devices: rules,
			},
		},
	}
	withSeccomp(t, s)
	return s
}

func withSeccomp(t *testing.T, s *specs.Spec) {
	t.Helper()
	profile, err := seccomp.GetDefaultProfile(s)
	if err != nil {
		t.Fatal(err)
	}
	s.Linux.Seccomp = profile
}

// scene is a specification under which the probe runs.
type scene struct {
	name   string
	exec   bool // the probe is a further process, not the first
	change func(t *testing.T, s *specs.Spec)
}

var scenes = []scene{
	{"default", false, func(*testing.T, *specs.Spec) {}},
	{"exec", true, func(*testing.T, *specs.Spec) {}},
	{"privileged", false, func(_ *testing.T, s *specs.Spec) {
		all := []string{
			"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_KILL", "CAP_NET_ADMIN", "CAP_MKNOD",
			"CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_SYSLOG", "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_BPF",
		}
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
		s.Linux.Seccomp, s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil, nil
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		for i := range s.Mounts {
			switch s.Mounts[i].Type {
			case "sysfs", "cgroup":
				s.Mounts[i].Options = []string{"nosuid", "noexec", "nodev"}
			}
		}
	}},
	{"user namespace", false, func(_ *testing.T, s *specs.Spec) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
		s.Linux.UIDMappings, s.Linux.GIDMappings = ids, ids
		s.Process.OOMScoreAdj = nil
	}},
	{"host namespaces", false, func(_ *testing.T, s *specs.Spec) {
		s.Hostname = ""
		s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	}},
	{"read-only with tmpfs and binds", false, func(_ *testing.T, s *specs.Spec) {
		s.Root.Readonly = true
		s.Process.NoNewPrivileges = true
		s.Mounts = append(s.Mounts,
			specs.Mount{Destination: "/scratch", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "noexec", "mode=1777", "size=1m"}},
			specs.Mount{Destination: "/bound", Type: "bind", Source: "/usr", Options: []string{"rbind", "ro", "rprivate"}},
			specs.Mount{Destination: "/etc/hostname", Type: "bind", Source: "/etc/hostname", Options: []string{"bind", "nosuid", "rslave"}},
		)
	}},
	{"a user with groups, limits, umask, sysctls", false, func(_ *testing.T, s *specs.Spec) {
		s.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{5, 44}, Umask: ptr(uint32(0o27))}
		few := []string{"CAP_NET_BIND_SERVICE", "CAP_KILL"}
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: dockerCaps, Permitted: few, Inheritable: few, Ambient: few, Effective: few}
		s.Process.Rlimits = []specs.POSIXRlimit{
			{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}, {Type: "RLIMIT_CORE"}, {Type: "RLIMIT_NPROC", Soft: 1000, Hard: 2000},
		}
		s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "20"}
		s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, FileMode: ptr(fileMode(0o640)), UID: ptr(uint32(1)), GID: ptr(uint32(2))}}
		s.Domainname = "example.org"
	}},
	{"a terminal", false, func(_ *testing.T, s *specs.Spec) {
		s.Process.Terminal = true
		s.Process.ConsoleSize = &specs.Box{Height: 33, Width: 77}
	}},
}
