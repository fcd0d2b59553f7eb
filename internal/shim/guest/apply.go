package guest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel/mux"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// service is the Guest service.
type service struct {
	session *mux.Session
	log     *slog.Logger

	mu    sync.Mutex // held while spare is made or used
	spare string     // path of a network namespace made ahead; empty: none
	// spareSysctls are its settings.
	spareSysctls map[string]string

	removed removed
}

var _ taskv1.GuestService = (*service)(nil)

// Apply does the steps.
func (g *service) Apply(ctx context.Context, r *taskv1.ApplyRequest) (*taskv1.ApplyResponse, error) {
	resp := new(taskv1.ApplyResponse)
	plugged := map[string]bool{} // namespaces that get an interface
	for _, s := range r.Steps {
		if i := s.GetInterface(); i != nil && !i.Remove {
			plugged[i.Netns] = true
		}
	}
	for i, s := range r.Steps {
		if err := g.step(ctx, s, plugged, resp); err != nil {
			return nil, fmt.Errorf("guest: step %d (%s): %w", i+1, stepName(s), err)
		}
	}
	return resp, nil
}

func stepName(s *taskv1.Step) string {
	return strings.ToLower(strings.TrimPrefix(fmt.Sprintf("%T", s.Kind), "*taskv1.Step_"))
}

func (g *service) step(ctx context.Context, s *taskv1.Step, plugged map[string]bool, resp *taskv1.ApplyResponse) (err error) {
	switch k := s.Kind.(type) {
	case *taskv1.Step_Identity:
		resp.Identity, err = identify(k.Identity)
		return err
	case *taskv1.Step_Mount:
		return mountStep(ctx, k.Mount)
	case *taskv1.Step_Unmount:
		return unmountIdle(ctx, k.Unmount)
	case *taskv1.Step_Directory:
		if err := os.MkdirAll(k.Directory.Path, os.FileMode(k.Directory.Mode)); err != nil {
			return err
		}
		return os.Chmod(k.Directory.Path, os.FileMode(k.Directory.Mode))
	case *taskv1.Step_File:
		if err := os.MkdirAll(filepath.Dir(k.File.Path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(k.File.Path, k.File.Data, os.FileMode(k.File.Mode)); err != nil {
			return err
		}
		if k.File.Owner != 0 {
			if err := os.Chown(k.File.Path, int(k.File.Owner), int(k.File.Owner)); err != nil {
				return err
			}
		}
		return os.Chmod(k.File.Path, os.FileMode(k.File.Mode))
	case *taskv1.Step_Remove:
		g.removed.add(k.Remove.Path)
		return removeTree(k.Remove.Path)
	case *taskv1.Step_Netns:
		if k.Netns.Remove {
			return unmount(k.Netns.Path)
		}
		return g.netns(k.Netns, plugged[k.Netns.Path])
	case *taskv1.Step_Interface:
		return g.setInterface(k.Interface)
	case *taskv1.Step_Share:
		return g.share(ctx, k.Share)
	case *taskv1.Step_Sysctl:
		return writeSysctl(k.Sysctl.Name, k.Sysctl.Value)
	case *taskv1.Step_Online:
		return online(ctx, int(k.Online.Cpus))
	case *taskv1.Step_Upper:
		return g.removed.unless(k.Upper.Path, func() error { return upper(k.Upper) })
	case *taskv1.Step_Keep:
		return keep(k.Keep, g.removed.add)
	case *taskv1.Step_GrowFs:
		return growFS(ctx, k.GrowFs)
	case *taskv1.Step_UserNs:
		return userNS(k.UserNs)
	}
	return fmt.Errorf("unknown step: %w", errdefs.ErrNotImplemented)
}

// identify makes this machine different from its template.
func identify(id *taskv1.Identity) (*taskv1.IdentityResult, error) {
	if len(id.Seed) < 32 {
		return nil, fmt.Errorf("seed of %d bytes: %w", len(id.Seed), errdefs.ErrInvalidArgument)
	}
	if err := seed(id.Seed); err != nil {
		return nil, err
	}
	if id.Time > 0 {
		ts := unix.NsecToTimespec(id.Time)
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
			return nil, os.NewSyscallError("clock_settime", err)
		}
	}
	if id.Hostname != "" {
		if err := unix.Sethostname([]byte(id.Hostname)); err != nil {
			return nil, os.NewSyscallError("sethostname", err)
		}
	}
	if id.MachineId != "" {
		if err := os.WriteFile("/etc/machine-id", []byte(id.MachineId+"\n"), 0o444); err != nil {
			return nil, err
		}
	}
	// The kernel makes it when it is first read, so not before the seed.
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, os.NewSyscallError("uname", err)
	}
	return &taskv1.IdentityResult{BootId: strings.TrimSpace(string(boot)), KernelRelease: unix.ByteSliceToString(u.Release[:])}, nil
}

// seed gives the kernel's random number generator new entropy and makes it use
// it at once (random(4), RNDADDENTROPY and RNDRESEEDCRNG).
func seed(b []byte) error {
	f, err := os.OpenFile("/dev/urandom", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.Sum256(b)
	var pool struct {
		bits, size int32
		data       [sha256.Size]byte
	}
	pool.bits, pool.size, pool.data = 8*sha256.Size, sha256.Size, sum
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&pool))); e != 0 {
		return os.NewSyscallError("RNDADDENTROPY", e)
	}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDRESEEDCRNG, 0); e != 0 {
		return os.NewSyscallError("RNDRESEEDCRNG", e)
	}
	return nil
}

// appearTurn is how often a device is looked for at the least: looking takes time
// from the kernel that is to find it.
const appearTurn = 20 * time.Millisecond

// deviceTime is how long a disk may take to appear.
const deviceTime = time.Minute

// openTime is how long a disk that has appeared may take until it can be opened.
const openTime = 10 * time.Second

// blockDevice finds the disk of a serial number.
func blockDevice(ctx context.Context, serial string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, deviceTime)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(2*wait, appearTurn) {
		list, err := names("/sys/block")
		if err != nil {
			return "", err
		}
		for _, name := range list {
			if !strings.HasPrefix(name, "vd") {
				continue
			}
			if b, err := os.ReadFile("/sys/block/" + name + "/serial"); err == nil && strings.TrimSpace(string(b)) == serial {
				return "/dev/" + name, nil
			}
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("disk %s: %w", serial, errdefs.ErrNotFound)
		case <-time.After(wait):
		}
	}
}

// names lists a directory as it comes.
func names(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

func mountStep(ctx context.Context, m *taskv1.GuestMount) error {
	source := m.Source
	serial, disk := strings.CutPrefix(source, "serial:")
	if disk {
		var err error
		if source, err = blockDevice(ctx, serial); err != nil {
			return err
		}
	}
	if err := makeTarget(source, m.Target, m.Flags&unix.MS_BIND != 0); err != nil {
		return err
	}
	if m.Once && mountPoint(m.Target) {
		return nil
	}
	err := unix.Mount(source, m.Target, m.Type, uintptr(m.Flags), m.Data)
	// The kernel shows a disk that was just plugged a moment before it can be opened.
	for end := time.Now().Add(openTime); disk && (err == unix.ENXIO || err == unix.ENOENT) && time.Now().Before(end) && ctx.Err() == nil; {
		time.Sleep(time.Millisecond)
		err = unix.Mount(source, m.Target, m.Type, uintptr(m.Flags), m.Data)
	}
	if err != nil {
		return fmt.Errorf("mount %s (%s) on %s: %w", m.Source, m.Type, m.Target, err)
	}
	return nil
}

// makeTarget makes a mount point: a file for a bind mount of one.
func makeTarget(source, target string, bind bool) error {
	if _, err := os.Lstat(target); err == nil {
		return nil
	}
	if st, err := os.Stat(source); bind && err == nil && !st.IsDir() {
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		f, err := os.OpenFile(target, os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		return f.Close()
	}
	return os.MkdirAll(target, 0o755)
}

// mountPoint says whether something is mounted at path.
func mountPoint(path string) bool {
	var here, above unix.Stat_t
	return unix.Lstat(path, &here) == nil && unix.Lstat(filepath.Dir(path), &above) == nil && here.Dev != above.Dev
}

// unmountIdle waits for a mount's users to end.
func unmountIdle(ctx context.Context, u *taskv1.Unmount) error {
	end := time.Now().Add(time.Duration(min(u.Wait, maxIdle)) * time.Millisecond)
	for u.Wait > 0 && unix.Unmount(u.Target, unix.UMOUNT_NOFOLLOW) == unix.EBUSY && time.Now().Before(end) && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	return unmount(u.Target)
}

// maxIdle bounds the wait for a mount's users, in milliseconds.
const maxIdle = 10_000

// unmount unmounts all that is on target, and removes target.
func unmount(target string) error {
	for {
		err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err == unix.EINVAL || err == unix.ENOENT {
			break
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", target, err)
		}
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func writeSysctl(name, value string) error {
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("sysctl %s: %w", name, err)
	}
	return nil
}

// setPath sets a parameter of the thread's network namespace that is there, by
// its path below /proc/sys.
func setPath(name, value string) error {
	if !filepath.IsLocal(name) {
		return fmt.Errorf("no path of a sysctl: %w", errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile("/proc/sys/"+name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(value)
	return err
}

// cpuTime is how long a plugged CPU may take to appear.
const cpuTime = 20 * time.Second

// online brings CPUs and memory blocks that are there and off into use, until
// cpus are.
func online(ctx context.Context, cpus int) error {
	ctx, cancel := context.WithTimeout(ctx, cpuTime)
	defer cancel()
	for {
		var errs []error
		for _, pattern := range []string{"/sys/devices/system/cpu/cpu*/online", "/sys/devices/system/memory/memory*/online"} {
			list, _ := filepath.Glob(pattern) // no bad pattern
			for _, p := range list {
				b, err := os.ReadFile(p)
				if err == nil && strings.TrimSpace(string(b)) != "1" {
					err = os.WriteFile(p, []byte("1"), 0)
				}
				if err != nil {
					errs = append(errs, err)
				}
			}
		}
		have := onlineCPUs()
		if have >= cpus {
			return errors.Join(errs...)
		}
		select {
		case <-ctx.Done():
			return errors.Join(append(errs, fmt.Errorf("%d processors are in use, not %d: %w", have, cpus, errdefs.ErrUnavailable))...)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// onlineCPUs counts the CPUs in use: runtime.NumCPU counted them at the start.
func onlineCPUs() int {
	b, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		return runtime.NumCPU()
	}
	n := 0
	for part := range strings.SplitSeq(strings.TrimSpace(string(b)), ",") {
		var first, last int
		switch got, _ := fmt.Sscanf(part, "%d-%d", &first, &last); got {
		case 1:
			n++
		case 2:
			n += last - first + 1
		}
	}
	return n
}

// PowerOff ends the machine.
func (g *service) PowerOff(context.Context, *taskv1.PowerOffRequest) (*taskv1.PowerOffResponse, error) {
	g.log.Info("power off")
	time.AfterFunc(answerTime, powerOff) // the answer goes first
	return new(taskv1.PowerOffResponse), nil
}

// answerTime is what an answer needs to be under way.
const answerTime = 5 * time.Millisecond

// Usage reads the kernel's own figures.
func (g *service) Usage(_ context.Context, q *taskv1.UsageRequest) (*taskv1.UsageResponse, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	r := &taskv1.UsageResponse{Cpus: uint32(onlineCPUs())}
	if q.Path != "" {
		var st unix.Statfs_t
		if err := unix.Statfs(q.Path, &st); err != nil {
			return nil, &os.PathError{Op: "statfs", Path: q.Path, Err: err}
		}
		r.DiskSize, r.DiskUsed = st.Blocks*uint64(st.Bsize), (st.Blocks-st.Bfree)*uint64(st.Bsize)
	}
	if q.Upper != "" {
		if r.UpperUsed, err = upperUsed(q.Upper); err != nil {
			return nil, err
		}
	}
	for line := range strings.Lines(string(b)) {
		var kib uint64
		name, rest, _ := strings.Cut(line, ":")
		if _, err := fmt.Sscan(rest, &kib); err != nil {
			continue // not a number
		}
		switch name {
		case "MemTotal":
			r.MemoryTotal = kib << 10
		case "MemFree":
			r.MemoryFree = kib << 10
		case "MemAvailable":
			r.MemoryAvailable = kib << 10
		}
	}
	return r, nil
}
