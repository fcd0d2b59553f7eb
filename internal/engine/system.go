package engine

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/seed"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
)

// A system is a container that is a whole machine: it boots the operating system on
// the disk that its image is. Its task is the machine, which tenon-vmm answers for:
// start turns it on, the stop signal presses its power button, SIGKILL ends it, its
// terminal is the serial console. Nothing of Tenon runs in it, so that all that
// needs a process there is refused.

// isSystem says that a container is one.
func isSystem(r *container.Record) bool { return r.Isolation == sandbox.OwnSystem }

// UserDataAnnotation is the user-data that a system gets (cloud-init).
const UserDataAnnotation = "tenon.user-data"

const (
	// systemMemory is what a system has, in bytes, if nobody says.
	systemMemory = 1 << 30
	// minSystemMemory is the least.
	minSystemMemory = 128 << 20
	// systemStop is how many seconds a system has to turn itself off, if nobody says.
	systemStop = 60
	// maxUserData bounds user-data, in bytes.
	maxUserData = 64 << 10
	mebibyte    = 1 << 20
)

// matchImage refuses an image of the other kind.
func matchImage(isolation string, img *image.Image, ref string) error {
	switch {
	case img.Disk != nil && isolation != sandbox.OwnSystem:
		return invalid("image %s is a disk with an operating system of its own: it runs as a machine (--isolation machine), not with --isolation %s; nothing was started", ref, isolation)
	case img.Disk == nil && isolation == sandbox.OwnSystem:
		return invalid("image %s is no disk with an operating system: --isolation machine boots disk images (tenon load -i disk.qcow2); for a container on a kernel of its own use --isolation vm, on a machine machine=NAME; nothing was started", ref)
	}
	return nil
}

// systemRefuses is the sentence for what a system can't have.
func systemRefuses(what string) error {
	return errdefs.ErrNotImplemented.WithMessage(what + " can't be had with --isolation machine: the container is a machine with its own operating system, in which nothing of Tenon runs; nothing was started")
}

// checkSystem refuses what was asked for that a system can't have. Nothing is made.
func checkSystem(cfg *mobycontainer.Config, h *mobycontainer.HostConfig) error {
	if h == nil {
		h = &mobycontainer.HostConfig{}
	}
	if what := unfitForSystem(cfg, h); what != "" {
		return systemRefuses(what)
	}
	if err := checkSystemMemory(h.Memory); err != nil {
		return err
	}
	if n := len(h.Annotations[UserDataAnnotation]); n > maxUserData {
		return invalid("user-data of %d bytes: at most %d; nothing was started", n, maxUserData)
	}
	if sig, err := spec.Signal(cfg.StopSignal); err == nil && !knownToSystem(sig) {
		return systemRefuses("--stop-signal " + cfg.StopSignal)
	}
	return nil
}

// checkSystemUpdate refuses limits that a system can't have. Nothing is changed.
func checkSystemUpdate(u *mobycontainer.Resources) error {
	if what := unfitForSystem(&mobycontainer.Config{}, &mobycontainer.HostConfig{Resources: *u}); what != "" {
		return errdefs.ErrNotImplemented.WithMessage(what + " can't be had of a machine with its own operating system; nothing was changed")
	}
	return checkSystemMemory(u.Memory)
}

// checkSystemMemory refuses less memory than a system boots with; 0 is the default.
func checkSystemMemory(bytes int64) error {
	if bytes != 0 && bytes < minSystemMemory {
		return invalid("--memory of %d bytes: a machine with its own operating system has at least %d MiB; nothing was started or changed", bytes, int64(minSystemMemory)>>20)
	}
	return nil
}

// knownToSystem says whether a signal means something to a system: its power button,
// or its end.
func knownToSystem(sig syscall.Signal) bool {
	const rtminHalt, rtminPoweroff = 37, 38 // what stops systemd in a container
	switch sig {
	case syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGPWR, rtminHalt, rtminPoweroff, syscall.SIGKILL:
		return true
	}
	return false
}

// unfitForSystem names the first that was asked for and a system can't have; empty:
// there is nothing.
func unfitForSystem(cfg *mobycontainer.Config, h *mobycontainer.HostConfig) string {
	on := func(n int) bool { return n > 0 }
	yes := func(b *bool) bool { return b != nil && *b }
	res := &h.Resources
	for _, x := range []struct {
		asked bool
		what  string
	}{
		{on(len(cfg.Cmd)), "a command"},
		{on(len(cfg.Entrypoint)), "--entrypoint"},
		{cfg.User != "", "--user"},
		{cfg.WorkingDir != "", "--workdir"},
		{cfg.Healthcheck != nil && on(len(cfg.Healthcheck.Test)) && cfg.Healthcheck.Test[0] != "NONE", "a health check"},
		{on(len(h.Binds)) || on(len(h.Mounts)) || on(len(cfg.Volumes)) || on(len(h.VolumesFrom)), "a volume or a directory of the host (-v, --mount)"},
		{on(len(h.Tmpfs)), "--tmpfs"},
		{on(len(h.Devices)) || on(len(h.DeviceRequests)) || on(len(h.DeviceCgroupRules)), "a device of the host"},
		{h.NetworkMode.IsContainer(), "--network container:…"},
		{h.NetworkMode.IsHost(), "--network host"},
		{h.PidMode != "" && h.PidMode != "private", "--pid"},
		{h.IpcMode != "" && h.IpcMode != "private", "--ipc"},
		{h.UTSMode != "", "--uts"},
		{h.UsernsMode != "" && h.UsernsMode != "host", "--userns"},
		{h.Privileged, "--privileged"},
		{on(len(h.CapAdd)) || on(len(h.CapDrop)), "--cap-add and --cap-drop"},
		{on(len(h.SecurityOpt)), "--security-opt"},
		{h.ReadonlyRootfs, "--read-only"},
		{yes(h.Init), "--init"},
		{on(len(h.GroupAdd)), "--group-add"},
		{on(len(h.Sysctls)), "--sysctl"},
		{on(len(h.Links)), "--link"},
		{on(len(h.ExtraHosts)), "--add-host"},
		{on(len(h.DNSOptions)), "--dns-option"},
		{cfg.Domainname != "", "--domainname"},
		{h.ShmSize > 0, "--shm-size"},
		{on(len(res.Ulimits)), "--ulimit"},
		{h.CgroupParent != "", "--cgroup-parent"},
		{h.Runtime != "" && h.Runtime != "tenon", "--runtime " + h.Runtime},
		{h.OomScoreAdj != 0 || yes(res.OomKillDisable), "--oom-score-adj and --oom-kill-disable"},
		{res.PidsLimit != nil && *res.PidsLimit > 0, "--pids-limit"},
		{res.CpusetCpus != "" || res.CpusetMems != "", "--cpuset-cpus and --cpuset-mems"},
		{res.BlkioWeight != 0 || on(len(res.BlkioWeightDevice)) || throttled(res), "limits of block devices"},
		{res.MemoryReservation != 0, "--memory-reservation"},
		// The host swaps what it likes: no limit, and the defaults of clients, ask for nothing.
		{res.MemorySwap > 0 && res.MemorySwap != res.Memory && res.MemorySwap != 2*res.Memory, "--memory-swap"},
		{res.MemorySwappiness != nil && *res.MemorySwappiness != -1, "--memory-swappiness"},
		{res.CPUShares != 0, "--cpu-shares"},
		{res.CPURealtimePeriod != 0 || res.CPURealtimeRuntime != 0, "--cpu-rt-period and --cpu-rt-runtime"},
	} {
		if x.asked {
			return x.what
		}
	}
	return ""
}

// completeSystem finishes the record of one: what spec.Validate and the checks of a
// container's kernel would ask for does not matter.
func (e *Engine) completeSystem(r *container.Record, img *image.Image) error {
	if r.Config.StopTimeout == nil {
		n := systemStop
		r.Config.StopTimeout = &n
	}
	if img.Disk.Disk.Firmware == "uefi" {
		if _, _, err := e.cfg.Machines.SystemFirmware(); err != nil {
			return remark{err, err.Error() + "; nothing was started"}
		}
	}
	if arch := img.Platform.Architecture; arch != "" && arch != "amd64" && arch != "386" {
		return invalid("image %s is a disk for %s; machines here are amd64; nothing was started", r.Image.Ref, arch)
	}
	limit, err := spec.DiskLimit(r.HostConfig)
	if err != nil {
		return err
	}
	if size := img.Disk.Disk.VirtualSize; limit != 0 && limit < size {
		if limit == e.cfg.DiskLimit { // which nobody else asked for, as far as one can see
			return invalid("the disk of %s has %d bytes, and the daemon's setting limits.disk gives a container that does not say %d: ask for as much (--storage-opt size=%d), or have the setting changed; nothing was started", r.Image.Ref, size, limit, size)
		}
		return invalid("--storage-opt size of %d bytes: the disk of %s has %d, and can't be made smaller; nothing was started", limit, r.Image.Ref, size)
	}
	for name := range r.Networks {
		n, err := e.cfg.Networks.Inspect(e.ctx, name)
		if err == nil { // of one that is not there the start speaks
			err = machineNetwork(r, n)
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// prepareSystem makes a system's machine, turned off, and connects to its task.
func (e *Engine) prepareSystem(ctx context.Context, c *ctr, rn *run, u *undo) (_ *prepared, _ *task.Client, err error) {
	r := c.record()
	if _, err := e.machines(ctx); err != nil {
		return nil, nil, err
	}
	q, err := e.networkRequest(r)
	if err != nil {
		return nil, nil, err
	}
	q.Plumbing = network.PlumbVM
	for i, ep := range q.Endpoints {
		if len(ep.MAC) == 0 {
			q.Endpoints[i].MAC = systemMAC(r.ID, ep.Network)
		}
	}
	p := &prepared{held: func() {}}
	u.add("network", func(ctx context.Context) error {
		c.setNetwork(nil)
		return e.cfg.Networks.Disconnect(ctx, c.id)
	})
	if p.ns, err = e.cfg.Networks.Connect(ctx, q); err != nil {
		return nil, nil, err
	}
	c.setNetwork(p.ns)
	if err := failpoint("start-network"); err != nil {
		return nil, nil, err
	}
	req, release, err := e.systemRequest(ctx, r, p.ns)
	if err != nil {
		return nil, nil, err
	}
	defer release() // QEMU has the disk open, and the record the image in use
	m, err := e.cfg.Machines.Create(ctx, req)
	if err != nil {
		return nil, nil, err
	}
	g := e.newGuest(m)
	c.setMachine(g)
	u.add("machine", func(ctx context.Context) error { return e.endMachine(ctx, c, g, false) })
	p.on = m
	taps := m.Taps(c.id)
	for _, ep := range p.ns.Endpoints {
		if ep.HostInterface == "" { // "none": no interface
			continue
		}
		if len(taps) == 0 {
			return nil, nil, fmt.Errorf("container %s: its machine has fewer interfaces than it has networks: %w", c.id, errdefs.ErrInternal)
		}
		if _, err := e.cfg.Networks.PlugTap(ctx, c.id, ep.NetworkID, taps[0]); err != nil {
			return nil, nil, err
		}
		taps = taps[1:]
	}
	client, watch, err := e.guestClient(ctx, c, rn, g)
	if err != nil {
		return nil, nil, err
	}
	e.spawn(watch)
	return p, client, nil
}

// systemRequest is the machine that a system needs. Its files are made, or found
// again; the image's disk is held until release is called.
func (e *Engine) systemRequest(ctx context.Context, r *container.Record, ns *network.Namespace) (req sandbox.MachineRequest, release func(), err error) {
	img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
	if err != nil {
		return req, nil, fmt.Errorf("container %s: its image: %w", r.ID, err)
	}
	disk, release, err := e.cfg.Images.DiskFile(ctx, img)
	if err != nil {
		return req, nil, err
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	limit, err := spec.DiskLimit(r.HostConfig)
	if err != nil {
		return req, nil, err
	}
	s := &sandbox.System{Base: disk.Path, BaseFormat: disk.Format, Volatile: r.HostConfig.AutoRemove, UUID: systemUUID(r.ID), Quota: systemQuota(&r.HostConfig.Resources)}
	if s.Disk, err = e.cfg.Roots.SystemDisk(r.ID, disk.VirtualSize, limit, s.Volatile); err != nil {
		return req, nil, err
	}
	if disk.Config.Disk.Firmware == "uefi" {
		_, vars, err := e.cfg.Machines.SystemFirmware()
		if err != nil {
			return req, nil, err
		}
		if s.Vars, err = e.cfg.Roots.SystemVars(r.ID, vars, s.Volatile); err != nil {
			return req, nil, err
		}
		s.UEFI = true
	}
	plugs, err := e.cfg.Networks.Plugs(r.ID)
	if err != nil {
		return req, nil, err
	}
	told := seed.Data{Instance: r.ID[:20], Hostname: r.Config.Hostname, User: r.HostConfig.Annotations[UserDataAnnotation], Env: r.Config.Env}
	for _, p := range plugs {
		s.NICs = append(s.NICs, systemNIC(r, p, ns.Resolver))
		told.NICs = append(told.NICs, seedNIC(p, ns.Resolver))
	}
	s.Seed = filepath.Join(e.stateDir(r.ID), "seed.iso")
	if err := os.MkdirAll(filepath.Dir(s.Seed), 0o700); err != nil {
		return req, nil, fmt.Errorf("container's files: %w", err)
	}
	if err := os.WriteFile(s.Seed, told.Disk(), 0o600); err != nil {
		return req, nil, fmt.Errorf("container's files: %w", err)
	}
	memory := r.HostConfig.Memory
	if memory == 0 {
		memory = systemMemory
	}
	cpus := min(cpusFor(&r.HostConfig.Resources), e.factsOf(r.Isolation).CPUs) // a quota can be of any number
	return sandbox.MachineRequest{
		ID: machineID(r.ID), Hostname: r.Config.Hostname, Memory: (memory + mebibyte - 1) &^ (mebibyte - 1), CPUs: max(1, cpus), System: s,
	}, release, nil
}

// systemUUID is the same at each start.
func systemUUID(id string) string {
	return id[:8] + "-" + id[8:12] + "-4" + id[13:16] + "-8" + id[17:20] + "-" + id[20:32]
}

// systemQuota is what a system may take of processors, in millionths of one; 0: any.
func systemQuota(r *mobycontainer.Resources) int64 {
	if r.CPUQuota > 0 {
		period := r.CPUPeriod
		if period <= 0 {
			period = 100_000 // the kernel's own
		}
		return r.CPUQuota * 1e6 / period
	}
	return r.NanoCPUs / 1e3
}

// systemNIC is an interface, and what DHCP tells on it.
func systemNIC(r *container.Record, p network.Plug, dns network.Resolver) sandbox.SystemNIC {
	n := sandbox.SystemNIC{MAC: p.MAC.String(), Address: p.IPv4, Router: p.Default4, MTU: p.MTU, Hostname: r.Config.Hostname, Search: dns.Search}
	for _, a := range dns.Nameservers {
		if a.Is4() {
			n.DNS = append(n.DNS, a)
		}
	}
	return n
}

// seedNIC is what the seed says of it. The systems that read it do so at their first
// boot: what may be another the next time, the address, comes by DHCP.
func seedNIC(p network.Plug, dns network.Resolver) seed.NIC {
	n := seed.NIC{MAC: p.MAC.String(), MTU: p.MTU, DHCP: p.IPv4.IsValid()}
	for _, a := range append([]netip.Prefix{p.IPv6}, p.LinkLocal...) {
		if a.IsValid() {
			n.Addresses = append(n.Addresses, a)
		}
	}
	if p.Default6.IsValid() {
		n.Gateways = append(n.Gateways, p.Default6)
	}
	if !n.DHCP {
		n.DNS, n.Search = dns.Nameservers, dns.Search
	}
	return n
}

// systemMAC is the hardware address of a system's interface on a network, the same at
// each start, by which it knows it again.
func systemMAC(id, network string) net.HardwareAddr {
	h := sha256.Sum256([]byte(id + " " + network))
	return append(net.HardwareAddr{0x02}, h[:5]...)
}

// systemTask is what tenon-vmm is asked for.
func (e *Engine) systemTask(c *ctr, rn *run) (task.CreateRequest, error) {
	r := c.record()
	req := task.CreateRequest{ID: c.id, Terminal: r.Config.Tty, Stdin: r.Config.OpenStdin, StdinOnce: r.Config.StdinOnce, Owner: ownerOf(r.ID, rn.n)}
	var err error
	if req.Log, err = e.logSettings(r); err != nil || req.Log == nil {
		return req, err
	}
	if err := os.MkdirAll(filepath.Dir(req.Log.Path), 0o700); err != nil {
		return req, fmt.Errorf("container log: %w", err)
	}
	return req, nil
}

// noSystem refuses a verb that needs a process in a container, or its files.
func noSystem(c *ctr, what string) error {
	if !isSystem(c.record()) {
		return nil
	}
	return errdefs.ErrNotImplemented.WithMessage(fmt.Sprintf("%s can't be had of container %s: it is a machine with its own operating system, in which nothing of Tenon runs; use its console (attach) or its network", what, c.record().Name))
}

// noSystemNetwork refuses another network for a system that runs.
func noSystemNetwork(r *container.Record) error {
	if !isSystem(r) || !r.Running() {
		return nil
	}
	return errdefs.ErrNotImplemented.WithMessage(fmt.Sprintf("container %s is a machine with its own operating system: its networks can be changed while it is stopped only", r.Name))
}
