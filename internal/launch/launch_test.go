package launch

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/cgroup"
)

var update = flag.Bool("update", false, "write the golden files anew")

var (
	v1Machine = []cgroup.Hierarchy{
		{Controllers: "cpu,cpuacct", Path: "/sys/fs/cgroup/cpu,cpuacct"},
		{Controllers: "memory", Path: "/sys/fs/cgroup/memory"},
		{Controllers: "name=systemd", Path: "/sys/fs/cgroup/systemd"},
		{Path: "/sys/fs/cgroup/unified", V2: true},
	}
	v2Machine = []cgroup.Hierarchy{{Path: "/sys/fs/cgroup", V2: true}}
)

// readSpec reads testdata/name.json.
func readSpec(t testing.TB, name string) *specs.Spec {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var s specs.Spec
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	return &s
}

func TestGolden(t *testing.T) {
	overlay := []Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/l/2:/l/1", "upperdir=/u", "workdir=/w"}}}
	var long []string
	for range 300 {
		long = append(long, "/var/lib/tenon/image/snapshots/12345/fs")
	}
	for _, c := range []struct {
		golden, spec string
		opts         Options
	}{
		{"docker", "docker", Options{Rootfs: overlay, Hierarchies: v1Machine}},
		{"docker-v2", "docker", Options{Rootfs: overlay, Hierarchies: v2Machine}},
		{"docker-bundle", "docker", Options{Bundle: "/b", Hierarchies: v2Machine, Phases: []Phase{PhaseNamespaces, PhaseMounts}}},
		{"docker-long", "docker", Options{Rootfs: []Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + strings.Join(long, ":")}}}, Hierarchies: v2Machine}},
		{"userns", "userns", Options{Rootfs: overlay, Hierarchies: v2Machine}},
		{"everything", "everything", Options{Bundle: "/b", Hierarchies: v1Machine, Preserve: 2}},
	} {
		t.Run(c.golden, func(t *testing.T) {
			p, err := Compile(readSpec(t, c.spec), c.opts)
			if err != nil {
				t.Fatal(err)
			}
			checkPlan(t, p)
			compareGolden(t, c.golden, p.String())
		})
	}
	p, err := CompileExec(readSpec(t, "everything").Process, ExecOptions{Pidfd: 9})
	if err != nil {
		t.Fatal(err)
	}
	checkPlan(t, p)
	compareGolden(t, "exec", p.String())
}

func compareGolden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: run with -update and look at the difference; got\n%s", file, got)
	}
}

// checkPlan looks for what the child relies on.
func checkPlan(t testing.TB, p *Plan) {
	t.Helper()
	for i, in := range p.Code {
		if in.Step < 0 || in.Step >= len(p.Steps) {
			t.Fatalf("instruction %d: step %d", i, in.Step)
		}
		if in.Ok <= i || in.Ok > len(p.Code) {
			t.Fatalf("instruction %d goes to %d", i, in.Ok) // forward only: it ends
		}
		if len(in.On) > 4 {
			t.Fatalf("instruction %d has %d branches", i, len(in.On))
		}
		for _, b := range in.On {
			if b.To <= i || b.To > len(p.Code) {
				t.Fatalf("instruction %d branches to %d", i, b.To)
			}
		}
		if in.Out >= p.Slots {
			t.Fatalf("instruction %d: slot %d of %d", i, in.Out, p.Slots)
		}
		for _, a := range in.Args {
			if a.Kind == ArgSlot && a.N >= uint64(p.Slots) {
				t.Fatalf("instruction %d: slot %d of %d", i, a.N, p.Slots)
			}
		}
	}
}

// TestRefused: what cannot be honoured is refused with the field's name.
func TestRefused(t *testing.T) {
	neg := -1
	for want, change := range map[string]func(*specs.Spec){
		"spec: process: is missing":                                        func(s *specs.Spec) { s.Process = nil },
		"spec: process.args: is empty":                                     func(s *specs.Spec) { s.Process.Args = nil },
		`spec: process.cwd: "x" is not an absolute path`:                   func(s *specs.Spec) { s.Process.Cwd = "x" },
		"spec: process.commandLine: not for this platform":                 func(s *specs.Spec) { s.Process.CommandLine = "x" },
		"spec: process.user.username: not for this platform":               func(s *specs.Spec) { s.Process.User.Username = "x" },
		"spec: windows: not a container of this platform":                  func(s *specs.Spec) { s.Windows = &specs.Windows{} },
		"spec: solaris: not a container of this platform":                  func(s *specs.Spec) { s.Solaris = &specs.Solaris{} },
		"spec: zos: not a container of this platform":                      func(s *specs.Spec) { s.ZOS = &specs.ZOS{} },
		"spec: freebsd: not a container of this platform":                  func(s *specs.Spec) { s.FreeBSD = &specs.FreeBSD{} },
		"spec: vm: not supported by this runtime":                          func(s *specs.Spec) { s.VM = &specs.VM{} },
		"spec: root: is missing":                                           func(s *specs.Spec) { s.Root = nil },
		"spec: root.path: is empty":                                        func(s *specs.Spec) { s.Root.Path = "" },
		`spec: linux.namespaces[0]: type "x" is unknown`:                   func(s *specs.Spec) { s.Linux.Namespaces[0].Type = "x" },
		`spec: linux.namespaces[1]: mount is there twice`:                  func(s *specs.Spec) { s.Linux.Namespaces[1].Type = "mount"; s.Linux.Namespaces[0].Type = "mount" },
		`spec: linux.namespaces[0]: path "x" is not absolute`:              func(s *specs.Spec) { s.Linux.Namespaces[0].Path = "x" },
		"spec: linux.intelRdt: resource director groups are not supported": func(s *specs.Spec) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{} },
		"spec: linux.mountLabel: SELinux is not supported":                 func(s *specs.Spec) { s.Linux.MountLabel = "x" },
		"spec: process.selinuxLabel: SELinux is not supported":             func(s *specs.Spec) { s.Process.SelinuxLabel = "x" },
		`spec: linux.rootfsPropagation: "x" is unknown`:                    func(s *specs.Spec) { s.Linux.RootfsPropagation = "x" },
		"spec: linux.timeOffsets: there is no new time namespace":          func(s *specs.Spec) { s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {}} },
		"spec: linux.uidMappings, gidMappings: there is no user namespace": func(s *specs.Spec) { s.Linux.UIDMappings = []specs.LinuxIDMapping{{}} },
		`spec: linux.personality.domain: "x" is unknown`:                   func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "x"} },
		`spec: linux.memoryPolicy.mode: "x" is unknown`:                    func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: "x"} },
		`spec: process.rlimits[0]: type "x" is unknown`:                    func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "x"}} },
		`spec: process.capabilities.bounding: "CAP_X" is unknown`:          func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{"CAP_X"} },
		`spec: process.scheduler.policy: "x" is unknown`:                   func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: "x"} },
		`spec: process.ioPriority.class: "x" is unknown`:                   func(s *specs.Spec) { s.Process.IOPriority = &specs.LinuxIOPriority{Class: "x"} },
		"spec: linux.sysctl: kernel.panic: is not of a namespace: it would change the host": func(s *specs.Spec) {
			s.Linux.Sysctl = map[string]string{"kernel.panic": "1"}
		},
		`spec: linux.sysctl: "net/../x" is no name of a kernel parameter`: func(s *specs.Spec) {
			s.Linux.Sysctl = map[string]string{"net/../x": "1"}
		},
		`spec: linux.seccomp: defaultAction: "x" is unknown`: func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: "x"} },
		`spec: linux.devices: /dev/x: type "x"`:              func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "x"}} },
		`spec: mounts[0] (/x): type is empty and it is no bind`: func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/x"}}
		},
		`spec: mounts[0] (/x): option "size=1": a bind takes no data`: func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/x", Source: "/y", Options: []string{"bind", "size=1"}}}
		},
		"spec: mounts[0] (/tmp/../proc/self/attr): destination is inside /proc": func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/tmp/../proc/self/attr", Type: "tmpfs"}}
		},
		"spec: mounts[0] (/): destination is the root": func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/", Source: "/y", Options: []string{"bind"}}}
		},
		"spec: hooks.prestart[0]: hook: path \"x\" is not absolute": func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{Prestart: []specs.Hook{{Path: "x"}}} //nolint:staticcheck // deprecated, but still of the specification
		},
		"spec: hooks.poststop[0]: hook /x: timeout -1 is not positive": func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/x", Timeout: &neg}}}
		},
		"spec: linux.netDevices: there is no new network namespace": func(s *specs.Spec) {
			s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth1": {}}
			for i, n := range s.Linux.Namespaces {
				if n.Type == specs.NetworkNamespace {
					s.Linux.Namespaces = append(s.Linux.Namespaces[:i], s.Linux.Namespaces[i+1:]...)
					break
				}
			}
		},
	} {
		s := readSpec(t, "docker")
		change(s)
		if _, err := Compile(s, Options{Hierarchies: v2Machine}); err == nil || err.Error() != want {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
}

func FuzzCompile(f *testing.F) {
	for _, name := range []string{"docker", "userns", "everything"} {
		b, err := os.ReadFile(filepath.Join("testdata", name+".json"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s specs.Spec
		if json.Unmarshal(b, &s) != nil {
			return
		}
		p, err := Compile(&s, Options{Bundle: "/b", Hierarchies: v1Machine})
		if err == nil {
			checkPlan(t, p)
			_ = p.String()
		}
		if s.Process != nil {
			if p, err := CompileExec(s.Process, ExecOptions{Pidfd: 9}); err == nil {
				checkPlan(t, p)
			}
		}
	})
}

func BenchmarkCompile(b *testing.B) {
	s := readSpec(b, "docker")
	opts := Options{Bundle: "/b", Hierarchies: v1Machine}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Compile(s, opts); err != nil {
			b.Fatal(err)
		}
	}
}
