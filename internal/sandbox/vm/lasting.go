package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/sandbox"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

// lasting is what a machine that lasts has for its containers. What it holds is
// tenon-vmm's to remember: another daemon finds it there.
type lasting struct {
	images sync.Mutex // held while one is attached and mounted, or the reverse

	mu      sync.Mutex
	holds   map[string]*holdings // by container
	mounted map[string]bool      // images, by serial number
}

// Where a guest that lasts has its data disk, and on it what containers write.
const (
	dataDir = "/run/tenon/data"
	dataC   = dataDir + "/c"
)

func dataPlace(id string) string { return dataC + "/" + id }

func imagePlace(serial string) string { return "/run/tenon/images/" + serial }

// lastingRequest asks for a machine that lasts; its data disk is made if there is
// none.
func lastingRequest(ctx context.Context, r sandbox.MachineRequest, req *vmv1.CreateRequest) error {
	l := r.Lasting
	size, err := dataDisk(ctx, l.Data, l.DataSize)
	if err != nil {
		return fmt.Errorf("data disk: %w", err)
	}
	req.Lasting, req.Name, req.KernelLog = true, l.Name, l.KernelLog
	req.Memory, req.Cpus = r.Memory, uint32(r.CPUs)
	req.Disks = []*vmv1.Disk{{}, {Path: l.Data}}
	req.Steps = []*taskv1.Step{
		mountStep("ext4", upperDisk, dataDir, unix.MS_NOATIME, diskOptions+",prjquota"),
		{Kind: &taskv1.Step_GrowFs{GrowFs: &taskv1.GrowFS{Path: dataDir, Size: size}}},
		{Kind: &taskv1.Step_Directory{Directory: &taskv1.Directory{Path: dataC, Mode: 0o700}}},
		keepStep(l.Containers),
	}
	return nil
}

func keepStep(ids []string) *taskv1.Step {
	return &taskv1.Step{Kind: &taskv1.Step_Keep{Keep: &taskv1.Keep{Path: dataC, Names: ids}}}
}

// mkfsTime bounds the making of an empty file system.
const mkfsTime = time.Minute

// dataDisk makes a data disk if there is none, or makes it larger, and returns
// its size.
func dataDisk(ctx context.Context, path string, size int64) (int64, error) {
	size &^= 4095
	st, err := os.Stat(path)
	if err == nil && st.Size() >= size {
		return st.Size(), nil
	}
	if err == nil {
		return size, os.Truncate(path, size)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	if size < sandbox.MinDisk {
		return 0, fmt.Errorf("%d bytes: at least %d: %w", size, sandbox.MinDisk, errdefs.ErrInvalidArgument)
	}
	program := ""
	for _, p := range []string{"/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"} { // whatever the daemon's PATH
		if _, err := os.Stat(p); err == nil {
			program = p
			break
		}
	}
	if program == "" {
		if program, err = exec.LookPath("mkfs.ext4"); err != nil {
			return 0, fmt.Errorf("it needs mkfs.ext4; install e2fsprogs: %w", errdefs.ErrFailedPrecondition)
		}
	}
	tmp := path + ".tmp"
	defer os.Remove(tmp) // not there if all went well
	if err := os.WriteFile(tmp, nil, 0o600); err != nil {
		return 0, err
	}
	if err := os.Truncate(tmp, size); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, mkfsTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "-q", "-F", "-b", "4096", "-m", "0", "-O", "metadata_csum,quota,project", "-E",
		"quotatype=prjquota,lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0", tmp)
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("%s: %w: %s", program, err, strings.TrimSpace(string(out)))
	}
	f, err := os.OpenFile(tmp, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return 0, err
	}
	return size, os.Rename(tmp, path)
}

// lastingRoot attaches a container's image, where no other has done so, and makes
// the place that it writes to.
func (m *machine) lastingRoot(ctx context.Context, h sandbox.MachineHandover) ([]*taskv1.Step, error) {
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return nil, m.gone(err)
	}
	m.lasting.enter(h.ID, !h.NetAdmin)
	if h.Log != nil {
		if _, err := c.client.KeepLog(ctx, &vmv1.KeepLogRequest{Id: m.about.Id, Container: h.ID, Log: h.Log}); err != nil {
			return nil, err
		}
	}
	upper := &taskv1.Upper{Path: dataPlace(h.ID), Limit: h.SizeLimit}
	if h.Disks.Image != "" {
		if upper.Like, err = m.mountImage(ctx, c, h.ID, h.Disks.Image, false); err != nil {
			return nil, fmt.Errorf("the image's disk: %w", err)
		}
	}
	return []*taskv1.Step{{Kind: &taskv1.Step_Upper{Upper: upper}}}, nil
}

// mountImage returns where a container's image is mounted, for its root or for a
// mount.
func (m *machine) mountImage(ctx context.Context, c *conn, id, file string, mounts bool) (string, error) {
	l := m.lasting
	l.images.Lock()
	defer l.images.Unlock()
	owner := id
	if mounts {
		owner += mountsOwner
	}
	r, err := c.client.AttachDisk(ctx, &vmv1.AttachDiskRequest{Id: m.about.Id, Owner: owner, Disk: &vmv1.Disk{Path: file, ReadOnly: true}})
	if err != nil {
		return "", err
	}
	at := imagePlace(r.Serial)
	l.of(id, func(x *holdings) { x.got(r.Serial, mounts) })
	l.mu.Lock()
	mounted := l.mounted[r.Serial]
	l.mu.Unlock()
	if mounted {
		return at, nil
	}
	s := mountStep("erofs", "serial:"+r.Serial, at, unix.MS_RDONLY, "")
	s.GetMount().Once = true // another daemon may have done it
	if err := m.apply(ctx, []*taskv1.Step{s}); err != nil {
		return "", err
	}
	l.mu.Lock()
	l.mounted[r.Serial] = true
	l.mu.Unlock()
	return at, nil
}

const (
	// idleTime is how long an image stays on a machine that no container uses: the
	// next container finds it there.
	idleTime = 10 * time.Second
	// letGo is how long its last user may take to let go of it.
	letGo = 5 * time.Second
	// dropTime bounds taking it from the machine.
	dropTime = time.Minute
)

// dropImage takes a container's image back, and from the machine if nobody uses
// it for a while.
func (m *machine) dropImage(ctx context.Context, c *conn, id, serial string, mounts bool) error {
	m.lasting.images.Lock()
	defer m.lasting.images.Unlock()
	owner := id
	if mounts {
		owner += mountsOwner
	}
	_, err := c.client.DetachDisk(ctx, &vmv1.DetachDiskRequest{Id: m.about.Id, Serial: serial, Owner: owner, Keep: true})
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	m.lasting.of(id, func(h *holdings) {
		if mounts {
			h.mounts = slices.DeleteFunc(h.mounts, func(s string) bool { return s == serial })
		} else {
			h.image = ""
		}
	})
	if err == nil && m.lasting.users(serial) == 0 {
		m.dropLater(serial)
	}
	return nil
}

// dropLater takes an image from the machine if it is still idle then.
func (m *machine) dropLater(serial string) {
	m.v.later.after(idleTime, func(over context.Context) {
		l := m.lasting
		l.images.Lock()
		defer l.images.Unlock()
		if l.users(serial) > 0 || m.hasEnded() {
			return
		}
		ctx, cancel := context.WithTimeout(over, dropTime)
		defer cancel()
		if err := m.detachImage(ctx, serial); err != nil && !errdefs.IsNotFound(err) && !m.hasEnded() && !m.v.isClosed() {
			m.v.cfg.Log.Warn("an image that nobody uses stays on a virtual machine", "machine", m.about.Name, "err", err)
		}
	})
}

// detachImage is called with images held.
func (m *machine) detachImage(ctx context.Context, serial string) error {
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return m.gone(err)
	}
	l := m.lasting
	l.mu.Lock()
	delete(l.mounted, serial)
	l.mu.Unlock()
	if err := m.apply(ctx, []*taskv1.Step{{Kind: &taskv1.Step_Unmount{Unmount: &taskv1.Unmount{
		Target: imagePlace(serial), Wait: uint32(letGo.Milliseconds())}}}}); err != nil {
		return err
	}
	_, err = c.client.DetachDisk(ctx, &vmv1.DetachDiskRequest{Id: m.about.Id, Serial: serial})
	return err
}

// adopt has the images that an earlier daemon left idle taken away.
func (m *machine) adopt() {
	for _, d := range m.about.Disks {
		if len(d.Owners) == 0 && "serial:"+d.Serial != upperDisk {
			m.dropLater(d.Serial)
		}
	}
}

// Lasting says whether it holds several containers.
func (m *machine) Lasting() bool { return m.lasting != nil }

// Release takes back what a container has got on a machine that lasts; what one
// has of a machine of its own goes with the machine.
func (m *machine) Release(ctx context.Context, id string) error {
	if m.lasting == nil || m.hasEnded() {
		return nil
	}
	err := m.release(ctx, id)
	if err != nil && m.hasEnded() {
		return nil // and with it everything
	}
	return err
}

// Holds says whether a container has something of a machine that lasts: its Release
// is to come, or has failed.
func (m *machine) Holds(id string) bool {
	if m.lasting == nil || m.hasEnded() {
		return false
	}
	m.lasting.mu.Lock()
	held := m.lasting.holds[id] != nil
	m.lasting.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	return held || slices.ContainsFunc(m.nics, func(n *vmv1.NIC) bool { return n.Owner == id })
}

func (m *machine) hasEnded() bool {
	select {
	case <-m.ended:
		return true
	default:
		return false
	}
}

func (m *machine) release(ctx context.Context, id string) error {
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return m.gone(err)
	}
	l := m.lasting
	var h holdings
	l.mu.Lock()
	if x := l.holds[id]; x != nil {
		h = holdings{image: x.image, mounts: slices.Clone(x.mounts), shares: slices.Clone(x.shares), clean: x.clean}
	}
	l.mu.Unlock()
	var nics []*vmv1.NIC
	m.mu.Lock()
	for _, n := range m.nics {
		if n.Owner == id {
			nics = append(nics, n)
		}
	}
	m.mu.Unlock()
	var errs []error
	for _, n := range nics {
		clean := m.apply(ctx, []*taskv1.Step{takeBack(id, n)}) == nil && h.clean
		errs = append(errs, m.returnNIC(ctx, id, n, clean))
	}
	var steps []*taskv1.Step
	unmount := func(target string) {
		steps = append(steps, &taskv1.Step{Kind: &taskv1.Step_Unmount{Unmount: &taskv1.Unmount{Target: target}}})
	}
	for _, tag := range h.shares {
		unmount(place(id) + "/shares/" + tag)
	}
	unmount(shmPlace(id))
	unmount(userns(id))
	steps = append(steps, &taskv1.Step{Kind: &taskv1.Step_Netns{Netns: &taskv1.NetNS{Path: netns(id), Remove: true}}},
		&taskv1.Step{Kind: &taskv1.Step_Remove{Remove: &taskv1.Remove{Path: place(id)}}})
	errs = append(errs, m.apply(ctx, steps))
	for _, tag := range h.shares {
		_, err := c.client.Unshare(ctx, &vmv1.UnshareRequest{Id: m.about.Id, Tag: tag})
		errs = append(errs, err)
	}
	if h.image != "" {
		errs = append(errs, m.dropImage(ctx, c, id, h.image, false))
	}
	for _, serial := range h.mounts {
		errs = append(errs, m.dropImage(ctx, c, id, serial, true))
	}
	_, err = c.client.KeepLog(ctx, &vmv1.KeepLogRequest{Id: m.about.Id, Container: id})
	errs = append(errs, err)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("virtual machine %s: what container %s had: %w", m.about.Id, short(id), err)
	}
	l.mu.Lock()
	delete(l.holds, id)
	l.mu.Unlock()
	return nil
}

// returnNIC gives an interface that the guest has taken back from a container to
// the next one, or takes it from the machine.
func (m *machine) returnNIC(ctx context.Context, id string, nic *vmv1.NIC, clean bool) error {
	if !clean {
		return m.detachNIC(ctx, nic)
	}
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return m.gone(err)
	}
	_, err = c.client.DetachNIC(ctx, &vmv1.DetachNICRequest{Id: m.about.Id, Nic: nic.Id, Spare: true})
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.nics = slices.DeleteFunc(m.nics, func(n *vmv1.NIC) bool { return n.Id == nic.Id && n.Owner == id })
	return nil
}

func shmPlace(id string) string { return place(id) + "/shm" }

// SharedMemory mounts a tmpfs in the guest.
func (m *machine) SharedMemory(ctx context.Context, id string, size int64) (string, error) {
	if m.lasting == nil {
		return "", unlike("shared memory")
	}
	s := mountStep("tmpfs", "shm", shmPlace(id), unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("mode=1777,size=%d,uid=%d,gid=%[2]d", size, m.lasting.owner(id)))
	s.GetMount().Once = true
	return shmPlace(id), m.apply(ctx, []*taskv1.Step{s})
}

var errOnlyLasting = errdefs.ErrNotImplemented.WithMessage("only a machine that lasts can do that")

// Discard removes what a container has written.
func (m *machine) Discard(ctx context.Context, id string) error {
	if m.lasting == nil {
		return errOnlyLasting
	}
	return m.apply(ctx, []*taskv1.Step{{Kind: &taskv1.Step_Remove{Remove: &taskv1.Remove{Path: dataPlace(id)}}}})
}

// Written is how much a container has written.
func (m *machine) Written(ctx context.Context, id string) (int64, error) {
	if m.lasting == nil {
		return 0, errOnlyLasting
	}
	g, err := m.service(ctx)
	if err != nil {
		return 0, err
	}
	u, err := g.Usage(ctx, &taskv1.UsageRequest{Upper: dataPlace(id)})
	if err != nil {
		return 0, fmt.Errorf("virtual machine %s: %w", m.about.Id, err)
	}
	return int64(min(u.UpperUsed, math.MaxInt64)), nil
}

// Keep removes what is of no container that is listed.
func (m *machine) Keep(ctx context.Context, ids []string) error {
	if m.lasting == nil {
		return errOnlyLasting
	}
	return errors.Join(m.releaseOthers(ctx, ids), m.apply(ctx, []*taskv1.Step{keepStep(ids)}))
}

// Resize gives the machine another size.
func (m *machine) Resize(ctx context.Context, memory int64, cpus int) error {
	m.resizing.Lock()
	defer m.resizing.Unlock()
	f := m.Facts()
	switch {
	case m.lasting == nil:
		return errOnlyLasting
	case cpus > 0 && cpus < f.CPUs:
		return fmt.Errorf("%d processors: the machine has %d, and can't lose any while it runs: %w", cpus, f.CPUs, errdefs.ErrInvalidArgument)
	case memory < 0 || cpus > math.MaxInt32:
		return fmt.Errorf("%d bytes, %d processors: %w", memory, cpus, errdefs.ErrInvalidArgument)
	}
	return m.resizeLocked(ctx, &vmv1.ResizeRequest{Id: m.about.Id, Memory: memory, Cpus: uint32(cpus)})
}

// data is the path of the data disk.
func (m *machine) data() string {
	for _, d := range m.about.Disks {
		if "serial:"+d.Serial == upperDisk {
			return d.Path
		}
	}
	return ""
}

// GrowDisk makes the data disk larger.
func (m *machine) GrowDisk(ctx context.Context, size int64) error {
	if m.lasting == nil {
		return errOnlyLasting
	}
	size &^= 4095
	st, err := os.Stat(m.data())
	if err != nil {
		return fmt.Errorf("data disk: %w", err)
	}
	if size < st.Size() {
		return fmt.Errorf("a data disk of %d bytes can't become one of %d: it only grows: %w", st.Size(), size, errdefs.ErrInvalidArgument)
	}
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return m.gone(err)
	}
	if size > st.Size() {
		if _, err := c.client.GrowDisk(ctx, &vmv1.GrowDiskRequest{Id: m.about.Id, Serial: strings.TrimPrefix(upperDisk, "serial:"), Size: size}); err != nil {
			return fmt.Errorf("data disk: %w", err)
		}
	}
	return m.apply(ctx, []*taskv1.Step{{Kind: &taskv1.Step_GrowFs{GrowFs: &taskv1.GrowFS{Path: dataDir, Size: size}}}})
}

// Usage is what the machine uses. What the guest says of itself may be false.
func (m *machine) Usage(ctx context.Context) (sandbox.MachineUsage, error) {
	var u sandbox.MachineUsage
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return u, m.gone(err)
	}
	r, err := c.client.Usage(ctx, &vmv1.UsageRequest{Ids: []string{m.about.Id}})
	if err != nil {
		return u, err
	}
	for _, x := range r.Usages {
		u.CPU, u.HostPrivate = time.Duration(x.Cpu), int64(x.PrivateBytes)
	}
	if m.lasting == nil { // its container's use is the shim's to say
		return u, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(m.data(), &st); err == nil {
		u.DiskOnHost = st.Blocks * 512
	}
	g, err := m.service(ctx)
	if err != nil {
		return u, err
	}
	x, err := g.Usage(ctx, &taskv1.UsageRequest{Path: dataDir})
	if err != nil {
		return u, fmt.Errorf("virtual machine %s: %w", m.about.Id, err)
	}
	number := func(n uint64) int64 { return int64(min(n, math.MaxInt64)) }
	u.MemoryTotal, u.MemoryFree, u.DiskSize, u.DiskUsed = number(x.MemoryTotal), number(x.MemoryAvailable), number(x.DiskSize), number(x.DiskUsed)
	return u, nil
}
