package vmm

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// warmVersion changes when what runs in a template does.
const warmVersion = "1"

const (
	templateTurns = 3
	cloneTurns    = 1

	warmID   = "warm"
	warmDir  = "/run/tenon/warm"
	warmNet  = "/run/tenon/netns/warm"
	warmTime = 2 * time.Minute // on a busy host, emulated
)

// warm runs what every container does: its code is then in memory, in the state
// in which it is quickest, and an emulator has translated it.
func (v *machine) warm(ctx context.Context, turns int) error {
	ctx, cancel := context.WithTimeout(ctx, warmTime)
	defer cancel()
	for range turns {
		if err := v.warmTurn(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (v *machine) warmTurn(ctx context.Context) error {
	_, err := v.guest.Apply(ctx, &taskv1.ApplyRequest{Steps: []*taskv1.Step{
		{Kind: &taskv1.Step_File{File: &taskv1.File{Path: warmDir + "/lower/bin/w", Mode: 0o755, Data: tinyProgram()}}},
		{Kind: &taskv1.Step_Directory{Directory: &taskv1.Directory{Path: warmDir + "/upper", Mode: 0o755}}},
		{Kind: &taskv1.Step_Directory{Directory: &taskv1.Directory{Path: warmDir + "/work", Mode: 0o755}}},
		{Kind: &taskv1.Step_Netns{Netns: &taskv1.NetNS{Path: warmNet, Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}}}},
	}})
	if err != nil {
		return err
	}
	if err := v.warmContainer(ctx); err != nil {
		return err
	}
	_, err = v.guest.Apply(ctx, &taskv1.ApplyRequest{Steps: []*taskv1.Step{
		{Kind: &taskv1.Step_Netns{Netns: &taskv1.NetNS{Path: warmNet, Remove: true}}},
		{Kind: &taskv1.Step_Remove{Remove: &taskv1.Remove{Path: warmDir}}},
	}})
	return err
}

func (v *machine) warmContainer(ctx context.Context) error {
	c, err := task.New(ctx, v.session)
	if err != nil {
		return err
	}
	defer c.Close()
	spec, err := json.Marshal(warmSpec())
	if err != nil {
		return err
	}
	if _, err := c.Create(ctx, task.CreateRequest{
		ID: warmID, Spec: spec, Rootfs: []task.Mount{{Type: "overlay", Source: "overlay", Options: []string{
			"lowerdir=" + warmDir + "/lower", "upperdir=" + warmDir + "/upper", "workdir=" + warmDir + "/work"}}},
	}); err != nil {
		return err
	}
	a, err := c.Attach(ctx, warmID, "", task.Stdio{Stdout: discard{}, Stderr: discard{}})
	if err != nil {
		return err
	}
	defer a.Close()
	if _, err := c.Start(ctx, warmID, ""); err != nil {
		return err
	}
	exit, err := c.Wait(ctx, warmID, "")
	if err != nil {
		return err
	}
	if exit.Status != 0 {
		return fmt.Errorf("exit status %d", exit.Status)
	}
	_, err = c.Delete(ctx, warmID, "")
	return err
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }

// quiet ends this end's streams and returns when the guest knows: a saved guest
// has nobody to talk to.
func (v *machine) quiet(ctx context.Context) error {
	if err := v.rpc.Close(); err != nil {
		return err
	}
	for range 2 {
		if err := v.ping(ctx); err != nil {
			return err
		}
		time.Sleep(quietPause) // what still runs there comes to its end
	}
	return v.ping(ctx)
}

const quietPause = 20 * time.Millisecond

// warmSpec is a container as the engine makes them by default.
func warmSpec() *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
		"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE"}
	no := uint(1)
	var limit, pids int64 = 256 << 20, 1000
	devices := []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	for _, d := range [][2]int64{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}, {136, -1}} {
		devices = append(devices, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &d[0], Minor: &d[1], Access: "rwm"})
	}
	return &specs.Spec{
		Version: specs.Version, Hostname: warmID, Root: &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args: []string{"/bin/w"}, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=" + warmID}, Cwd: "/",
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.CgroupNamespace}, {Type: specs.NetworkNamespace, Path: warmNet}},
			Resources: &specs.LinuxResources{
				Memory: &specs.LinuxMemory{Limit: &limit}, Pids: &specs.LinuxPids{Limit: &pids},
				Devices: devices,
			},
			MaskedPaths: []string{"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
				"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
			Seccomp: &specs.LinuxSeccomp{
				DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32},
				Syscalls: []specs.LinuxSyscall{{Names: []string{"kexec_load", "init_module", "finit_module", "delete_module", "bpf", "ptrace", "reboot",
					"swapon", "swapoff", "add_key", "request_key", "keyctl"}, Action: specs.ActErrno, ErrnoRet: &no}},
			},
		},
	}
}

// tinyProgram is a static program for x86-64 that prints a line: an ELF header,
// one segment, its code.
func tinyProgram() []byte {
	const base, headers = 0x400000, 64 + 56
	code := []byte{
		0xb8, 1, 0, 0, 0, // mov eax, SYS_write
		0xbf, 1, 0, 0, 0, // mov edi, 1
		0x48, 0x8d, 0x35, 16, 0, 0, 0, // lea rsi, [rip+16]
		0xba, 3, 0, 0, 0, // mov edx, 3
		0x0f, 0x05, // syscall
		0xb8, 60, 0, 0, 0, // mov eax, SYS_exit
		0x31, 0xff, // xor edi, edi
		0x0f, 0x05, // syscall
		'o', 'k', '\n',
	}
	size := uint64(headers + len(code))
	le := binary.LittleEndian
	b := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	b = le.AppendUint16(b, 2)  // ET_EXEC
	b = le.AppendUint16(b, 62) // EM_X86_64
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, base+headers) // entry
	b = le.AppendUint64(b, 64)           // program headers
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, 0)
	for _, n := range []uint16{64, 56, 1, 0, 0, 0} {
		b = le.AppendUint16(b, n)
	}
	b = le.AppendUint32(b, 1) // PT_LOAD
	b = le.AppendUint32(b, 5) // readable, executable
	for _, n := range []uint64{0, base, base, size, size, 4096} {
		b = le.AppendUint64(b, n)
	}
	return append(b, code...)
}
