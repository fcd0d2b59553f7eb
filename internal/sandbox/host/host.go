// Package host is the sandbox of the host's own kernel: one tenon-shim process
// for all containers of a daemon, which outlives the daemon.
package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/aside"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	"tenon.dev/tenon/internal/version"
)

// Config says where the shim is and where it works.
type Config struct {
	// Shim is the path of the tenon-shim program. Required.
	Shim string
	// RunRoot is the daemon's run root; the shim's socket is RunRoot/shim.sock. Required.
	RunRoot string
	// Name is the daemon's prefix.
	Name string
	// MemoryReserve is what all containers together leave to the host; bytes, 0:
	// nothing.
	MemoryReserve int64
	// CDIDirs are where specifications of devices lie, the last first in rank.
	CDIDirs []string
	Log     *slog.Logger
}

// Host is the host's kernel.
type Host struct {
	cfg   Config
	facts sandbox.Facts

	mu sync.Mutex // held while a shim is being started
}

var _ sandbox.Sandbox = (*Host)(nil)

// New reads the kernel's facts; it starts nothing.
func New(cfg Config) (*Host, error) {
	h := &Host{cfg: cfg}
	if err := h.readFacts(); err != nil {
		return nil, err
	}
	return h, nil
}

// ID is "host".
func (h *Host) ID() string { return "host" }

// Isolation is "process".
func (h *Host) Isolation() string { return "process" }

// Facts are the host's.
func (h *Host) Facts() sandbox.Facts { return h.facts }

func (h *Host) readFacts() error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("host: boot id: %w", err)
	}
	h.facts.BootID = strings.TrimSpace(string(boot))
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("host: uname: %w", err)
	}
	h.facts.KernelRelease = unix.ByteSliceToString(u.Release[:])
	var st unix.Statfs_t
	h.facts.CgroupV2 = unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return fmt.Errorf("host: sysinfo: %w", err)
	}
	h.facts.Memory = int64(si.Totalram) * int64(si.Unit)
	h.facts.Swap = int64(si.Totalswap) * int64(si.Unit)
	h.facts.CPUs = runtime.NumCPU()
	h.facts.CPUSet = firstLine("/sys/fs/cgroup/cpuset/cpuset.effective_cpus", "/sys/fs/cgroup/cpuset.cpus.effective", "/sys/devices/system/cpu/online")
	h.facts.MemorySet = firstLine("/sys/fs/cgroup/cpuset/cpuset.effective_mems", "/sys/fs/cgroup/cpuset.mems.effective", "/sys/devices/system/node/online")
	for _, dir := range []string{"cpu", "cpu,cpuacct"} {
		if _, err := os.Stat("/sys/fs/cgroup/" + dir + "/cpu.rt_runtime_us"); err == nil && !h.facts.CgroupV2 {
			h.facts.RealTime = true
		}
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&hdr, &caps[0]); err != nil {
		return fmt.Errorf("host: capabilities: %w", err)
	}
	h.facts.Capabilities = spec.CapabilityNames(uint64(caps[0].Permitted) | uint64(caps[1].Permitted)<<32)
	return nil
}

// firstLine is the content of the first file that there is.
func firstLine(paths ...string) string {
	for _, p := range paths {
		if b, err := os.ReadFile(p); err == nil && len(b) > 1 {
			return strings.TrimSpace(string(b))
		}
	}
	return ""
}

// Socket is where the shim listens.
func (h *Host) Socket() string { return filepath.Join(h.cfg.RunRoot, "shim.sock") }

// startTime is how long a new shim may take until it listens, and how long the
// cleaning up after a killed one may take. A machine under load needs seconds.
const startTime = 30 * time.Second

// Connect connects to the daemon's shim and starts one if none listens.
func (h *Host) Connect(ctx context.Context) (*task.Client, bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c, started, err := h.connect(ctx)
	if err == nil {
		if err := h.limitMemory(); err != nil {
			h.cfg.Log.Warn("the host's reserve of memory holds for each container, but not for their sum", "err", err)
		}
	}
	return c, started, err
}

func (h *Host) connect(ctx context.Context) (*task.Client, bool, error) {
	if c, err := task.Dial(ctx, h.Socket()); err == nil {
		info, err := c.Info(ctx)
		if err == nil && (info.ShimVersion == version.Version || !h.retire(ctx, c, info)) {
			return c, false, nil
		}
		c.Close()
	}
	c, err := h.start(ctx)
	return c, err == nil, err
}

// retire ends the shim of another build, unless it has containers: they keep it.
func (h *Host) retire(ctx context.Context, c *task.Client, info *taskv1.InfoResponse) bool {
	if err := c.Shutdown(ctx, false); err != nil {
		h.cfg.Log.Info("containers keep the shim of another build; a start of the daemon without any replaces it", "pid", info.ShimPid, "version", info.ShimVersion)
		return false
	}
	select {
	case <-c.Closed():
	case <-ctx.Done():
	case <-time.After(startTime):
	}
	h.cfg.Log.Info("the shim of another build had no containers, and makes place", "pid", info.ShimPid, "version", info.ShimVersion)
	return true
}

// start runs the shim in a session of its own, so that neither the daemon's
// end nor its terminal reaches it.
func (h *Host) start(ctx context.Context) (*task.Client, error) {
	dir := h.cfg.RunRoot
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("shim: %w", err)
	}
	logFile, err := os.OpenFile(filepath.Join(dir, "shim.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("shim: %w", err)
	}
	defer logFile.Close()
	// A socket without a listener is what a killed shim leaves.
	if _, err := os.Lstat(h.Socket()); err == nil {
		if err := h.reap(ctx, logFile); err != nil {
			h.cfg.Log.Warn("what a killed shim left is still there", "err", err)
		}
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("shim: %w", err)
	}
	defer ready.Close()
	cmd := exec.Command(h.cfg.Shim, "serve", "--socket", h.Socket(), "--run-dir", h.runDir(), "--cgroup-parent", h.cfg.Name, "--name", h.cfg.Name, "--ready-fd", "3")
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w (install tenon-shim beside tenond): %w", h.cfg.Shim, err, errdefs.ErrUnavailable)
	}
	go func() { _ = cmd.Wait() }() // reaps it, if it ends while the daemon lives
	if err := aside.Move(h.cfg.Name, cmd.Process.Pid); err != nil {
		h.cfg.Log.Warn("the shim stays in the daemon's control group, and shares its fate if a service manager kills that", "err", err)
	}
	if err := ready.SetReadDeadline(time.Now().Add(startTime)); err != nil {
		return nil, fmt.Errorf("shim: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		return nil, fmt.Errorf("shim did not start (%v); see %s: %w", err, logFile.Name(), errdefs.ErrUnavailable)
	}
	c, err := task.Dial(ctx, h.Socket())
	if err != nil {
		return nil, err
	}
	h.cfg.Log.Info("shim started", "pid", cmd.Process.Pid)
	return c, nil
}

func (h *Host) runDir() string { return filepath.Join(h.cfg.RunRoot, "shim") }

// reap ends and frees what containers of an earlier shim, that was killed, have
// left: processes and control groups.
func (h *Host) reap(ctx context.Context, logFile *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.cfg.Shim, "reap", "--run-dir", h.runDir(), "--cgroup-parent", h.cfg.Name)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.Dir = "/"
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s reap: %w", h.cfg.Shim, err)
	}
	return nil
}

// Teardown removes the shim's directories and the control group that held the
// containers' groups, in every hierarchy. What is not empty stays, and is told.
func (h *Host) Teardown(context.Context) error {
	var errs []error
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + h.cfg.Name) // no bad pattern: names are [a-z0-9-]
	for _, g := range append(groups, "/sys/fs/cgroup/"+h.cfg.Name) {
		errs = append(errs, removeGroup(g))
	}
	for _, p := range []string{h.Socket(), h.runDir(), filepath.Join(h.cfg.RunRoot, "shm")} {
		errs = append(errs, os.RemoveAll(p))
	}
	return errors.Join(errs...)
}

// removeGroup removes a control group and those below it (--cgroup-parent), if
// no process is in them.
func removeGroup(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() {
			errs = append(errs, removeGroup(filepath.Join(path, e.Name())))
		}
	}
	if err := unix.Rmdir(path); err != nil && err != unix.ENOENT {
		errs = append(errs, &os.PathError{Op: "rmdir", Path: path, Err: err})
	}
	return errors.Join(errs...)
}

// Prepare passes on what it is given: host paths are what the host's shim needs.
func (h *Host) Prepare(_ context.Context, o sandbox.Handover) (sandbox.Prepared, error) {
	return sandbox.Prepared{Rootfs: o.Root, NetNS: o.NetNS}, nil
}

func (h *Host) shmPath(id string) string { return filepath.Join(h.cfg.RunRoot, "shm", id) }

// Release unmounts the shared memory, if there is any.
func (h *Host) Release(_ context.Context, id string) error {
	dir := h.shmPath(id)
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("shared memory: %w", err)
	}
	return nil
}

// SharedMemory mounts a tmpfs under the run root.
func (h *Host) SharedMemory(_ context.Context, id string, size int64) (string, error) {
	dir := h.shmPath(id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("shared memory: %w", err)
	}
	var st unix.Stat_t
	var parent unix.Stat_t
	if unix.Stat(dir, &st) == nil && unix.Stat(filepath.Dir(dir), &parent) == nil && st.Dev != parent.Dev {
		return dir, nil // mounted already
	}
	if err := unix.Mount("shm", dir, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("mode=1777,size=%d", size)); err != nil {
		return "", fmt.Errorf("shared memory: mount tmpfs on %s: %w", dir, err)
	}
	return dir, nil
}

// nsNames are the names in /proc/PID/ns.
var nsNames = map[specs.LinuxNamespaceType]string{
	specs.PIDNamespace: "pid", specs.NetworkNamespace: "net", specs.MountNamespace: "mnt", specs.IPCNamespace: "ipc",
	specs.UTSNamespace: "uts", specs.UserNamespace: "user", specs.CgroupNamespace: "cgroup", specs.TimeNamespace: "time",
}

// NamespacePath is in /proc.
func (h *Host) NamespacePath(pid int, t specs.LinuxNamespaceType) string {
	return fmt.Sprintf("/proc/%d/ns/%s", pid, nsNames[t])
}

// BindSource checks, and makes, a directory of the host.
func (h *Host) BindSource(path string, create bool) error {
	_, err := os.Stat(path)
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("bind source: %w", err)
	}
	if !create {
		return errdefs.ErrInvalidArgument.WithMessage("bind source path does not exist: " + path)
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return fmt.Errorf("bind source: %w", err)
	}
	return nil
}

// inits are where --init's program may be, in the order of preference.
var inits = []string{"/usr/bin/tini-static", "/usr/local/bin/docker-init", "/usr/bin/docker-init", "/usr/libexec/docker/docker-init", "/usr/libexec/podman/catatonit", "/usr/bin/catatonit"}

// Init finds a static init program.
func (h *Host) Init() (string, error) {
	for _, p := range inits {
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", errdefs.ErrFailedPrecondition.WithMessage("--init needs tini, docker-init or catatonit on the host: install one (Debian: apt-get install tini)")
}
