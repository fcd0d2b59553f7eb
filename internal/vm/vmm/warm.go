package vmm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
	"tenon.dev/tenon/internal/vm/qemu"
)

// warmVersion changes when what runs in a template does.
const warmVersion = "10"

const (
	// A turn in a copy leads an emulator to translate some 90 percent of what a
	// container needs; further ones take half as long each, and gain nothing.
	templateTurns = 3
	cloneTurns    = 1

	warmID  = "warm"
	warmDir = "/run/tenon/warm"
	warmNet = "/run/tenon/netns/warm"
	// guestBase is the lowest layer of all roots, which the guest makes (shim/guest's Base).
	guestBase = "/run/tenon/base"
	warmMAC   = "52:54:00:74:6e:ff"
	warmTime  = 5 * time.Minute // on a busy host, emulated
)

// warm runs what every container does: its code is then in memory, in the state
// in which it is quickest, and an emulator has translated it. A copy of a template
// is given an identity, and does what nearly every container does only: what is
// translated takes memory. Afterwards a network namespace waits.
func (v *machine) warm(ctx context.Context, turns int, copied bool) error {
	ctx, cancel := context.WithTimeout(ctx, warmTime)
	defer cancel()
	for range turns {
		if err := v.warmTurn(ctx, copied); err != nil {
			return err
		}
		if _, err := v.guest.Apply(ctx, &taskv1.ApplyRequest{Steps: []*taskv1.Step{spareStep()}}); err != nil {
			return err
		}
	}
	return nil
}

func (v *machine) warmTurn(ctx context.Context, copied bool) error {
	// A template knows disks with a journal, too. Its copies, in which all that runs
	// takes memory, know those of containers that are removed at their end.
	if err := v.warmDisks(ctx, !copied); err != nil {
		return err
	}
	options := "noinit_itable,discard,errors=remount-ro"
	if copied {
		options += ",noblock_validity,no_prefetch_block_bitmaps"
	}
	var steps []*taskv1.Step
	if copied { // with a seed of its own, or all copies would have the same boot ID
		var err error
		if steps, err = identify(&vmv1.CreateRequest{Hostname: warmID}); err != nil {
			return err
		}
	}
	steps = append(steps,
		mountStep("erofs", qemu.DiskSerial(0), warmDir+"/lower", unix.MS_RDONLY, ""),
		mountStep("ext4", qemu.DiskSerial(1), warmDir+"/rw", unix.MS_NOATIME, options),
		&taskv1.Step{Kind: &taskv1.Step_Directory{Directory: &taskv1.Directory{Path: warmDir + "/rw/upper", Mode: 0o755}}},
		&taskv1.Step{Kind: &taskv1.Step_Directory{Directory: &taskv1.Directory{Path: warmDir + "/rw/work", Mode: 0o755}}},
		warmFile("hosts", "127.0.0.1 localhost\n"), warmFile("hostname", warmID+"\n"), warmFile("resolv.conf", "nameserver 169.254.77.1\n"),
		&taskv1.Step{Kind: &taskv1.Step_Netns{Netns: &taskv1.NetNS{Path: warmNet, Sysctls: warmSysctls()}}},
		interfaceStep(&taskv1.Interface{
			Mac: qemu.NICMAC(0), NewMac: warmMAC, Netns: warmNet, Name: "eth0", Mtu: 1500, Addresses: []string{"169.254.77.2/30"},
			Routes: []*taskv1.Interface_Route{{Gateway: "169.254.77.1"}},
		}),
	)
	if _, err := v.guest.Apply(ctx, &taskv1.ApplyRequest{Steps: steps}); err != nil {
		return err
	}
	if err := v.warmContainer(ctx, copied); err != nil {
		return err
	}
	unmount := func(path string) *taskv1.Step {
		return &taskv1.Step{Kind: &taskv1.Step_Unmount{Unmount: &taskv1.Unmount{Target: path}}}
	}
	if _, err := v.guest.Apply(ctx, &taskv1.ApplyRequest{Steps: []*taskv1.Step{
		interfaceStep(&taskv1.Interface{Mac: warmMAC, Netns: warmNet, Name: "eth0", Remove: true}),
		interfaceStep(&taskv1.Interface{Mac: warmMAC, NewMac: qemu.NICMAC(0)}),
		{Kind: &taskv1.Step_Netns{Netns: &taskv1.NetNS{Path: warmNet, Remove: true}}},
		unmount(warmDir + "/rw"), unmount(warmDir + "/lower"),
		{Kind: &taskv1.Step_Remove{Remove: &taskv1.Remove{Path: warmDir}}},
	}}); err != nil {
		return err
	}
	// Unmounting is lazy, and a disk that is still in use must not become another.
	for i, other := range []string{"ext4", "erofs"} {
		if err := v.released(ctx, qemu.DiskSerial(i), other); err != nil {
			return err
		}
		if err := v.proc.Empty(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

func mountStep(fstype, serial, target string, flags uint64, data string) *taskv1.Step {
	return &taskv1.Step{Kind: &taskv1.Step_Mount{Mount: &taskv1.GuestMount{Type: fstype, Source: "serial:" + serial, Target: target, Flags: flags, Data: data}}}
}

func warmFile(name, text string) *taskv1.Step {
	return &taskv1.Step{Kind: &taskv1.Step_File{File: &taskv1.File{Path: warmDir + "/" + name, Mode: 0o644, Data: []byte(text)}}}
}

// warmSysctls are the settings of a network namespace without IPv6, as the engine
// asks for it (internal/network's NamespaceSysctls): what waits has them.
func warmSysctls() map[string]string {
	return map[string]string{
		"net.ipv4.ping_group_range": "0 2147483647", "net.ipv4.ip_unprivileged_port_start": "0",
		"net.ipv6.conf.default.disable_ipv6": "1",
	}
}

// spareStep has a network namespace wait with the machine's interface in it:
// moving one takes a kernel long.
func spareStep() *taskv1.Step {
	return &taskv1.Step{Kind: &taskv1.Step_Netns{Netns: &taskv1.NetNS{Path: "/run/tenon/netns.spare", Spare: true, Sysctls: warmSysctls()}}}
}

func interfaceStep(i *taskv1.Interface) *taskv1.Step {
	return &taskv1.Step{Kind: &taskv1.Step_Interface{Interface: i}}
}

// released returns when no file system has the disk any more: mounting it as
// what it is not then fails because of that.
func (v *machine) released(ctx context.Context, serial, other string) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		_, err := v.guest.Apply(ctx, &taskv1.ApplyRequest{Steps: []*taskv1.Step{mountStep(other, serial, warmDir, unix.MS_RDONLY, "")}})
		switch {
		case err == nil:
			return fmt.Errorf("disk %s can be mounted as %s", serial, other)
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case strings.Contains(err.Error(), unix.EINVAL.Error()):
			return nil
		case !strings.Contains(err.Error(), unix.EBUSY.Error()):
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

// warmDisks gives the machine two small disks.
func (v *machine) warmDisks(ctx context.Context, journal bool) error {
	image, err := memoryFile(int64(len(tinyImage())), bytes.NewReader(tinyImage()))
	if err != nil {
		return err
	}
	defer image.Close()
	lower, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", image.Fd())) // QEMU wants one that can only be read
	if err != nil {
		return err
	}
	defer lower.Close() // QEMU has it
	empty, err := v.m.emptyFS(ctx, journal)
	if err != nil {
		return err
	}
	upper, err := memoryFile(emptySize, io.NewSectionReader(empty, 0, emptySize))
	if err != nil {
		return err
	}
	defer upper.Close() // QEMU has it
	if err := v.proc.Fill(ctx, 0, qemu.Disk{File: lower, ReadOnly: true}); err != nil {
		return err
	}
	return v.proc.Fill(ctx, 1, qemu.Disk{File: upper, Volatile: true})
}

// memoryFile is a file of size bytes with what r gives.
func memoryFile(size int64, r io.Reader) (*os.File, error) {
	fd, err := unix.MemfdCreate("tenon-warm", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "warm")
	if err = f.Truncate(size); err == nil {
		_, err = io.Copy(f, r)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("disk for warming: %w", err)
	}
	return f, nil
}

// emptySize is the size of the file system that containers that warm a machine
// write to, in bytes.
const emptySize = 8 << 20

// emptyFS is an empty ext4 as internal/rootfs makes them, made once.
func (m *Manager) emptyFS(ctx context.Context, journal bool) (*os.File, error) {
	m.setup.Lock()
	defer m.setup.Unlock()
	if f := m.empty[journal]; f != nil {
		return f, nil
	}
	f, err := os.CreateTemp(m.cfg.RunDir, ".ext4-")
	if err != nil {
		return nil, fmt.Errorf("disk for warming: %w", err)
	}
	defer os.Remove(f.Name())
	features := "^resize_inode,metadata_csum"
	if !journal {
		features = "^resize_inode,^metadata_csum,^uninit_bg,^has_journal"
	}
	if err = f.Truncate(emptySize); err == nil {
		cmd := exec.CommandContext(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-O", features, f.Name())
		cmd.WaitDelay = time.Second
		var out []byte
		if out, err = cmd.CombinedOutput(); err != nil {
			err = fmt.Errorf("mke2fs (install e2fsprogs): %w: %s", err, bytes.TrimSpace(out))
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("disk for warming: %w", err)
	}
	m.empty[journal] = f
	return f, nil
}

func (v *machine) warmContainer(ctx context.Context, copied bool) error {
	c, err := task.New(ctx, v.session)
	if err != nil {
		return err
	}
	defer c.Close()
	spec, more, err := v.m.warmSpec()
	if err != nil {
		return err
	}
	// As the engine does: it asks what there is, and follows the events.
	_, seq, err := c.List(ctx, "")
	if err != nil {
		return err
	}
	ectx, cancel := context.WithCancel(ctx)
	defer cancel()
	over := make(chan error, 1)
	go func() {
		over <- c.Events(ectx, seq, func(e *taskv1.Event) error {
			if e.Type == taskv1.Event_EXIT && e.Id == warmID && e.ExecId == "" {
				return errWarmExit
			}
			return nil
		})
	}()
	if _, err := c.Create(ctx, task.CreateRequest{
		ID: warmID, Spec: spec, Log: &taskv1.Log{Driver: logs.Local, Path: "/dev/null"},
		Rootfs: []task.Mount{{Type: "overlay", Source: "overlay", Options: []string{
			"lowerdir=" + warmDir + "/lower:" + guestBase, "upperdir=" + warmDir + "/rw/upper", "workdir=" + warmDir + "/rw/work", "index=off"}}},
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
	// Each is read from the disk. A kernel that an emulator translates for the first
	// time is interrupted by its clock before it has done what it was asked for, and
	// goes on in another state of the processor, for which it is translated, too.
	for _, process := range more {
		if err := warmExec(ctx, c, process); err != nil {
			return err
		}
	}
	if !copied { // by a program of its own
		if err := warmRead(ctx, c); err != nil {
			return err
		}
	}
	if err := c.Kill(ctx, warmID, "", syscall.SIGKILL, false); err != nil {
		return err
	}
	if err := <-over; !errors.Is(err, errWarmExit) {
		return err
	}
	if err := c.FlushLog(ctx, warmID); err != nil {
		return err
	}
	_, err = c.Delete(ctx, warmID, "")
	return err
}

// errWarmExit ends the following of events.
var errWarmExit = errors.New("the container has ended")

// warmSpec is the specification of a container that asks for nothing
// (Config.Defaults) and runs the small program, which waits; and what its
// further processes are. The seccomp profile stands where the engine writes it: shims keep
// what they make of one by its text.
func (m *Manager) warmSpec() (container []byte, more [][]byte, err error) {
	sp, seccomp := plainSpec(), json.RawMessage(nil)
	if len(m.cfg.Defaults) > 0 {
		var d struct {
			Linux struct{ Seccomp json.RawMessage }
		}
		sp = new(specs.Spec)
		if err = errors.Join(json.Unmarshal(m.cfg.Defaults, sp), json.Unmarshal(m.cfg.Defaults, &d)); err == nil && (sp.Process == nil || sp.Linux == nil) {
			err = errors.New("no process")
		}
		if err != nil {
			return nil, nil, fmt.Errorf("containers' defaults: %w", err)
		}
		seccomp, sp.Linux.Seccomp = d.Linux.Seccomp, nil
	}
	sp.Hostname, sp.Linux.CgroupsPath = warmID, "/"+m.cfg.Name+"/"+warmID
	for i, ns := range sp.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			sp.Linux.Namespaces[i].Path = warmNet
		}
	}
	for _, name := range []string{"resolv.conf", "hostname", "hosts"} {
		sp.Mounts = append(sp.Mounts, specs.Mount{Destination: "/etc/" + name, Type: "bind", Source: warmDir + "/" + name, Options: []string{"rbind", "rprivate"}})
	}
	for _, program := range []string{"y", "z"} {
		sp.Process.Args = []string{program}
		process, err := json.Marshal(sp.Process)
		if err != nil {
			return nil, nil, err
		}
		more = append(more, process)
	}
	sp.Process.Args = []string{"x", "wait"}
	b, err := json.Marshal(sp)
	if err != nil || len(seccomp) == 0 {
		return b, more, err
	}
	const at = `,"linux":{`
	before, after, ok := bytes.Cut(b, []byte(at))
	if !ok {
		return nil, nil, errors.New("a specification without linux")
	}
	return slices.Concat(before, []byte(at+`"seccomp":`), seccomp, []byte{','}, after), more, nil
}

// warmExec runs a further process.
func warmExec(ctx context.Context, c *task.Client, process []byte) error {
	const id = "exec"
	a, _, err := c.Execute(ctx, task.ExecRequest{ID: warmID, ExecID: id, Process: process}, task.Stdio{Stdout: discard{}, Stderr: discard{}})
	if err != nil {
		return err
	}
	defer a.Close()
	exit, err := c.Wait(ctx, warmID, id)
	if err != nil {
		return err
	}
	if exit.Status != 0 {
		return fmt.Errorf("exit status %d", exit.Status)
	}
	_, err = c.Delete(ctx, warmID, id)
	return err
}

// warmRead reads a file.
func warmRead(ctx context.Context, c *task.Client) error {
	s, _, err := c.Stream(ctx, &taskv1.StreamHeader{Kind: &taskv1.StreamHeader_Files{Files: &taskv1.Files{
		Id: warmID, Operation: taskv1.Files_READ, Path: "/etc/hosts"}}})
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.SetReadDeadline(time.Now().Add(warmTime)); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, s)
	return err
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }

// quiet ends this end's streams and returns when the guest knows, and has nothing
// left to do: a saved guest has nobody to talk to, and what it had begun (taking a
// network namespace apart, say) every copy of it would have to end.
func (v *machine) quiet(ctx context.Context) error {
	if err := v.rpc.Close(); err != nil {
		return err
	}
	if err := v.ping(ctx); err != nil {
		return err
	}
	for end := time.Now().Add(quietTime); time.Now().Before(end); {
		before, err := v.group.Stats()
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(quietTurn):
		}
		after, err := v.group.Stats()
		if err != nil {
			return err
		}
		if used := time.Duration(after.CPU.Usage - before.CPU.Usage); used < quietTurn/quietShare {
			break
		}
	}
	return v.ping(ctx)
}

// A guest is quiet that has used less than the quietShare-th part of a processor
// for quietTurn; one that never does is taken as it is after quietTime. The turn is
// longer than the kernel's own delays: of reporting free memory, two seconds.
const (
	quietTurn  = 2500 * time.Millisecond
	quietShare = 25
	quietTime  = 20 * time.Second
)

// plainSpec is a container much as the engine makes them by default.
func plainSpec() *specs.Spec {
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
			Args: []string{"/w"}, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=" + warmID}, Cwd: "/",
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
