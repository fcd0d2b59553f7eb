package spec

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "write the golden files anew")

func input(edit func(*Input)) Input {
	in := Input{
		ID:         "0123456789ab",
		Config:     &container.Config{Hostname: "box", Cmd: []string{"sh"}, Env: []string{"A=1", "PATH=/bin"}},
		HostConfig: &container.HostConfig{NetworkMode: "bridge", IpcMode: "private", CgroupnsMode: "private"},
		Hostname:   "box", NetNS: "/run/netns/x", CgroupPath: "/tenon/0123456789ab", User: User{Home: "/root"},
		Defaults: Defaults{Pids: 4096, Memory: 8 << 30, ShmSize: 64 << 20},
		Mounts:   []Mount{{Type: "bind", Source: "/run/c/hosts", Destination: "/etc/hosts", Engine: true}},
	}
	if edit != nil {
		edit(&in)
	}
	return in
}

// TestGolden compares whole specifications, but for the seccomp rules, with
// files that a person can read.
func TestGolden(t *testing.T) {
	yes := true
	swappiness, pids := int64(10), int64(-1)
	for name, in := range map[string]Input{
		"default": input(nil),
		"everything": input(func(in *Input) {
			in.Config = &container.Config{Hostname: "box", Domainname: "example", Tty: true, Entrypoint: []string{"/entry"}, Cmd: []string{"a", "b"}, WorkingDir: "/w", Env: []string{"TERM=vt100", "HOME=/own", "HOSTNAME"}}
			in.User = User{UID: 1000, GID: 100, Additional: []uint32{100, 5}, Home: "/home/u"}
			in.HostConfig = &container.HostConfig{
				NetworkMode: "bridge", IpcMode: "shareable", CgroupnsMode: "private", ReadonlyRootfs: true, CapAdd: []string{"NET_ADMIN", "cap_sys_time"}, CapDrop: []string{"MKNOD"},
				SecurityOpt: []string{"no-new-privileges", "seccomp=unconfined"}, OomScoreAdj: 500, Sysctls: map[string]string{"net.core.somaxconn": "99"}, ConsoleSize: [2]uint{24, 80},
				Annotations: map[string]string{"linux": "{"},
				Resources: container.Resources{
					Memory: 64 << 20, MemorySwap: 128 << 20, MemoryReservation: 32 << 20, MemorySwappiness: &swappiness, NanoCPUs: 1_500_000_000, CPUShares: 512, CpusetCpus: "0-1", PidsLimit: &pids,
					BlkioWeight: 300, BlkioDeviceReadBps: []*blkiodev.ThrottleDevice{{Path: DevPath(8, 0), Rate: 1000}}, DeviceCgroupRules: []string{"c 10:* rw"},
					Ulimits: []*container.Ulimit{{Name: "nofile", Soft: 10, Hard: 20}},
				},
			}
			in.ShmSource, in.Init = "/run/shm/x", "/usr/bin/tini-static"
			in.Devices = []Device{{LinuxDevice: specs.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}, Access: "rw"}}
			in.Mounts = append(in.Mounts, Mount{Type: "bind", Source: "/b", Destination: "/a/b", ReadOnly: true, Recursive: true}, Mount{Type: "bind", Source: "/s", Destination: "/a", Propagation: mount.PropagationRShared}, Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/t", Options: []string{"exec", "size=1m", "mode=1777"}})
		}),
		"privileged": input(func(in *Input) {
			in.HostConfig = &container.HostConfig{NetworkMode: "host", IpcMode: "host", PidMode: "host", UTSMode: "host", CgroupnsMode: "host", Privileged: true, Init: &yes}
			in.Hostname, in.NetNS, in.ShmSource = "", "", "/dev/shm"
			in.Capabilities = []string{"CAP_CHOWN", "CAP_SYS_ADMIN"}
			in.AllDevices = []Device{{LinuxDevice: specs.LinuxDevice{Path: "/dev/loop0", Type: "b", Major: 7}}}
		}),
		"shared-namespaces": input(func(in *Input) {
			in.HostConfig = &container.HostConfig{NetworkMode: "container:x", IpcMode: "container:x", PidMode: "container:x", CgroupnsMode: "private"}
			in.PidNS, in.IpcNS, in.ShmSource = "/proc/7/ns/pid", "/proc/7/ns/ipc", "/run/shm/x"
		}),
	} {
		s, err := Build(in)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if s.Linux.Seccomp != nil {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: s.Linux.Seccomp.DefaultAction}
		}
		got, err := json.MarshalIndent(s, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join("testdata", name+".json")
		if *update {
			if err := os.WriteFile(file, append(got, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(bytes.TrimSpace(want), got) {
			t.Errorf("%s differs from %s (go test -update writes it):\n%s", name, file, got)
		}
	}
}

func TestEncodeIsMarshal(t *testing.T) {
	for range 2 { // the second time from the cache
		s, err := Build(input(func(in *Input) { in.HostConfig.Annotations = map[string]string{"linux": `"linux":{`} }))
		if err != nil {
			t.Fatal(err)
		}
		if s.Linux.Seccomp == nil || len(s.Linux.Seccomp.Syscalls) < 5 {
			t.Fatal("no default seccomp profile")
		}
		b, err := Encode(s)
		if err != nil {
			t.Fatal(err)
		}
		var back specs.Spec
		if err := json.Unmarshal(b, &back); err != nil {
			t.Fatal(err)
		}
		want, _ := json.Marshal(s)
		got, _ := json.Marshal(back)
		if !bytes.Equal(want, got) {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

func TestCapabilities(t *testing.T) {
	for _, c := range []struct {
		add, drop   []string
		privileged  bool
		available   []string
		has, hasNot string
		n           int
	}{
		{n: 14, has: "CAP_CHOWN", hasNot: "CAP_SYS_ADMIN"},
		{add: []string{"sys_admin"}, n: 15, has: "CAP_SYS_ADMIN"},
		{add: []string{"CAP_CHOWN"}, n: 14},
		{drop: []string{"chown"}, n: 13, hasNot: "CAP_CHOWN"},
		{drop: []string{"all"}, n: 0},
		{add: []string{"NET_RAW"}, drop: []string{"ALL"}, n: 1, has: "CAP_NET_RAW"},
		{add: []string{"ALL"}, n: 41}, {add: []string{"ALL"}, drop: []string{"SYS_ADMIN"}, n: 40, hasNot: "CAP_SYS_ADMIN"},
		{privileged: true, drop: []string{"ALL"}, n: 41},
		{privileged: true, available: []string{"CAP_CHOWN"}, n: 1},
	} {
		got, err := Capabilities(c.add, c.drop, c.privileged, c.available)
		if err != nil || len(got) != c.n || c.has != "" && !slices.Contains(got, c.has) || c.hasNot != "" && slices.Contains(got, c.hasNot) {
			t.Errorf("%+v: got %v %v", c, got, err)
		}
	}
	if _, err := Capabilities([]string{"CAP_NONSENSE"}, nil, false, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown: %v", err)
	}
	if got := CapabilityNames(1<<0 | 1<<21); !reflect.DeepEqual(got, []string{"CAP_CHOWN", "CAP_SYS_ADMIN"}) {
		t.Errorf("names: %v", got)
	}
}

func TestResolveUser(t *testing.T) {
	passwd := []byte("root:x:0:0:root:/root:/bin/sh\napp:x:1000:100:App:/home/app:/bin/sh\n")
	group := []byte("root:x:0:\nusers:x:100:\nextra:x:5:app\naudio:x:29:\n")
	for _, c := range []struct {
		text string
		add  []string
		want User
	}{
		{"", nil, User{Additional: []uint32{0}, Home: "/root"}},
		{"app", nil, User{UID: 1000, GID: 100, Additional: []uint32{100, 5}, Home: "/home/app"}},
		{"1000", nil, User{UID: 1000, GID: 100, Additional: []uint32{100, 5}, Home: "/home/app"}},
		{"app:root", nil, User{UID: 1000, GID: 0, Additional: []uint32{0}, Home: "/home/app"}},
		{"4242", nil, User{UID: 4242, Additional: []uint32{0}, Home: "/"}},
		{"4242:77", []string{"audio", "123"}, User{UID: 4242, GID: 77, Additional: []uint32{77, 29, 123}, Home: "/"}},
	} {
		got, err := ResolveUser(c.text, c.add, passwd, group)
		slices.Sort(got.Additional[min(1, len(got.Additional)):])
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q: got %+v %v, want %+v", c.text, got, err, c.want)
		}
	}
	// Beyond 31 bits it would wrap around to root in what comes after us.
	for _, bad := range []string{"nobody-here", "app:nogroup", "2147483648", "4294967296", "0:4294967296", "-1", "99999999999999999999"} {
		if u, err := ResolveUser(bad, nil, passwd, group); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %+v %v, want InvalidArgument", bad, u, err)
		}
	}
	// Lines whose ids are no ids must not become root.
	evil := []byte("big:x:4294967296:1::/:\nminus:x:-1:1::/:\nhex:x:0x10:1::/:\nempty:x:::/:\nshort:x\ngid:x:7:-2::/:\nplus:x:+0:0::/:\n")
	for _, bad := range []string{"big", "minus", "hex", "empty", "short", "gid", "plus", "+0", "1000:+0", "1000:big", "1000:minus"} {
		if u, err := ResolveUser(bad, nil, evil, []byte("big:x:4294967296:\nminus:x:-1:\n")); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %+v %v, want InvalidArgument", bad, u, err)
		}
	}
	if _, err := ResolveUser("app", nil, nil, nil); err == nil {
		t.Error("a name without /etc/passwd was found")
	}
	if _, err := ResolveUser("0", []string{"4294967297"}, passwd, group); err == nil {
		t.Error("a group beyond 31 bits was taken")
	}
}

func FuzzResolveUser(f *testing.F) {
	f.Add("app:users", "app:x:1000:100::/h:/s\n", "users:x:100:app\n")
	f.Add("", "root:x:0:0:", ":::")
	f.Fuzz(func(t *testing.T, text, passwd, group string) {
		u, err := ResolveUser(text, nil, []byte(passwd), []byte(group))
		if err == nil && (u.UID > 1<<31-1 || u.GID > 1<<31-1) {
			t.Errorf("%q: %+v", text, u)
		}
	})
}

func TestSignal(t *testing.T) {
	for text, want := range map[string]syscall.Signal{"": 15, "9": 9, "KILL": 9, "sigkill": 9, "SIGRTMIN": 34, "RTMIN+3": 37, "RTMAX-1": 63, "64": 64, "SIGUSR1": 10} {
		if got, err := Signal(text); err != nil || got != want {
			t.Errorf("%q: got %v %v, want %v", text, got, err, want)
		}
	}
	for _, bad := range []string{"0", "65", "NOPE", "RTMIN+40", "-1", "SIGRTMINx"} {
		if _, err := Signal(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestValidateRefuses(t *testing.T) {
	two := int64(200)
	for name, edit := range map[string]func(*container.Config, *container.HostConfig){
		"relative workdir": func(c *container.Config, _ *container.HostConfig) { c.WorkingDir = "rel" },
		"no command":       func(c *container.Config, _ *container.HostConfig) { c.Cmd = nil },
		"empty variable":   func(c *container.Config, _ *container.HostConfig) { c.Env = []string{"=x"} },
		"rm with restart": func(_ *container.Config, h *container.HostConfig) {
			h.AutoRemove, h.RestartPolicy.Name = true, "always"
		},
		"restart policy": func(_ *container.Config, h *container.HostConfig) { h.RestartPolicy.Name = "sometimes" },
		"retries with always": func(_ *container.Config, h *container.HostConfig) {
			h.RestartPolicy.Name, h.RestartPolicy.MaximumRetryCount = "always", 3
		},
		"stop signal":     func(c *container.Config, _ *container.HostConfig) { c.StopSignal = "NOPE" },
		"security option": func(_ *container.Config, h *container.HostConfig) { h.SecurityOpt = []string{"what=ever"} },
		"capability":      func(_ *container.Config, h *container.HostConfig) { h.CapAdd = []string{"FLY"} },
		"ipc mode":        func(_ *container.Config, h *container.HostConfig) { h.IpcMode = "what" },
		"pid mode":        func(_ *container.Config, h *container.HostConfig) { h.PidMode = "container:" },
		"uts mode":        func(_ *container.Config, h *container.HostConfig) { h.UTSMode = "x" },
		"userns mode":     func(_ *container.Config, h *container.HostConfig) { h.UsernsMode = "x" },
		"foreign sysctl":  func(_ *container.Config, h *container.HostConfig) { h.Sysctls = map[string]string{"kernel.panic": "1"} },
		"net sysctl on host": func(_ *container.Config, h *container.HostConfig) {
			h.NetworkMode, h.Sysctls = "host", map[string]string{"net.x": "1"}
		},
		"small memory":      func(_ *container.Config, h *container.HostConfig) { h.Memory = 1000 },
		"swap below memory": func(_ *container.Config, h *container.HostConfig) { h.Memory, h.MemorySwap = 64<<20, 32<<20 },
		"swap alone":        func(_ *container.Config, h *container.HostConfig) { h.MemorySwap = 64 << 20 },
		"swappiness":        func(_ *container.Config, h *container.HostConfig) { h.MemorySwappiness = &two },
		"cpus and period":   func(_ *container.Config, h *container.HostConfig) { h.NanoCPUs, h.CPUPeriod = 1e9, 10000 },
		"period":            func(_ *container.Config, h *container.HostConfig) { h.CPUPeriod = 10 },
		"weight":            func(_ *container.Config, h *container.HostConfig) { h.BlkioWeight = 5 },
		"cpuset":            func(_ *container.Config, h *container.HostConfig) { h.CpusetCpus = "a-b" },
		"oom score":         func(_ *container.Config, h *container.HostConfig) { h.OomScoreAdj = 2000 },
		"device rule":       func(_ *container.Config, h *container.HostConfig) { h.DeviceCgroupRules = []string{"x 1:1 r"} },
		"device access": func(_ *container.Config, h *container.HostConfig) {
			h.Devices = []container.DeviceMapping{{CgroupPermissions: "x"}}
		},
		"ulimit": func(_ *container.Config, h *container.HostConfig) { h.Ulimits = []*units.Ulimit{{Name: "nope"}} },
		"ulimit order": func(_ *container.Config, h *container.HostConfig) {
			h.Ulimits = []*units.Ulimit{{Name: "nofile", Soft: 2, Hard: 1}}
		},
		"health interval": func(c *container.Config, _ *container.HostConfig) {
			c.Healthcheck = &container.HealthConfig{Interval: 1}
		},
		"hyper-v":          func(_ *container.Config, h *container.HostConfig) { h.Isolation = "hyperv" },
		"hostname and net": func(c *container.Config, h *container.HostConfig) { c.Hostname, h.NetworkMode = "x", "container:y" },
	} {
		c, h := &container.Config{Cmd: []string{"x"}}, &container.HostConfig{}
		if err := Validate(c, h); err != nil {
			t.Fatalf("the plain one: %v", err)
		}
		edit(c, h)
		if err := Validate(c, h); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v, want InvalidArgument", name, err)
		}
	}
	for _, bad := range []container.Isolation{"machine=", "machine=../x", "machine=a b", "machines=a"} {
		if err := Validate(&container.Config{Cmd: []string{"x"}}, &container.HostConfig{Isolation: bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("isolation %q: %v", bad, err)
		}
	}
	for asked, want := range map[container.Isolation]string{"": "", "Default": "", "process": "process", "VM": "vm", "machine=Team-a": "machine=team-a"} {
		if got, err := Isolation(asked); err != nil || got != want {
			t.Errorf("isolation %q: %q, %v", asked, got, err)
		}
	}
}

func TestCheckTmpfs(t *testing.T) {
	if _, err := CheckTmpfs("size=64m,mode=1777,exec,uid=5"); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"size", "bind", "remount", "nosuchoption", "exec=1"} {
		if _, err := CheckTmpfs(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// 32-bit programs get no socket of a family that the profile refuses by way of
// a call whose arguments no filter sees.
func TestSocketcall(t *testing.T) {
	s, err := Build(input(nil))
	if err != nil {
		t.Fatal(err)
	}
	var rules []specs.LinuxSyscall
	for _, r := range s.Linux.Seccomp.Syscalls {
		if slices.Contains(r.Names, "socketcall") {
			rules = append(rules, r)
		}
	}
	if len(rules) != 2 || rules[0].Action != specs.ActAllow || len(rules[0].Args) != 1 || rules[0].Args[0].Op != specs.OpNotEqual || rules[1].Action != specs.ActErrno {
		t.Errorf("%+v", rules)
	}
}
