package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/cgroup"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
	"tenon.dev/tenon/internal/vm/dhcp"
	"tenon.dev/tenon/internal/vm/qemu"
)

// A system is a machine that boots an operating system from its own disk. Nobody in
// it speaks with tenon-vmm: what answers on its socket, the Task API of one task, is
// here (systemtask.go, systemservice.go), and goes on when its QEMU has ended, until it
// is removed.

// fromDisk is the origin of such machines.
const fromDisk = "disk"

// quotaPeriod is the period of a system's quota of processor time, in microseconds.
const quotaPeriod = 100000

// systemTime bounds the start of a QEMU that stands still.
const systemTime = time.Minute

// createSystem makes one. It stands still.
func (m *Manager) createSystem(ctx context.Context, r *vmv1.CreateRequest) (_ *machine, err error) {
	p, err := m.findPlatform(ctx)
	if err != nil {
		return nil, err
	}
	s := r.System
	h := qemu.Hardware{Type: m.cfg.Type, Accel: p.accel.Accel, CPUs: max(1, int(r.Cpus)), Memory: r.Memory, NICs: len(s.Nics)}
	switch {
	case h.Memory < minMemory || h.Memory%(1<<20) != 0:
		return nil, fmt.Errorf("%d bytes of memory: give at least %d, in MiB: %w", h.Memory, minMemory, errdefs.ErrInvalidArgument)
	case h.NICs > maxNICs:
		return nil, fmt.Errorf("%d network interfaces: at most %d: %w", h.NICs, maxNICs, errdefs.ErrInvalidArgument)
	}
	v := &machine{
		m: m, hardware: h, console: newConsole(), memory: h.Memory, cpus: h.CPUs, origin: fromDisk, id: r.Id, created: time.Now(),
		disks: map[string]bool{}, owned: map[string]*ownedDisk{}, logs: map[string]*keptLog{}, shares: map[string]*share{},
	}
	close(v.console.done) // the task has it
	if v.index, err = m.newIndex(); err != nil {
		return nil, err
	}
	v.uid = m.uids + uint32(v.index)
	defer func() {
		if err != nil {
			v.free()
		}
	}()
	res := &specs.LinuxResources{}
	if s.Quota > 0 {
		quota, period := s.Quota*quotaPeriod/1e6, uint64(quotaPeriod)
		res.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period}
	}
	if v.group, err = cgroup.Create(filepath.Join("/", m.cfg.CgroupParent, fmt.Sprintf("%s%d", groupPrefix, v.index)), res, "cpu", "cpuacct", "memory"); err != nil {
		return nil, err
	}
	v.system = newSystemTask(v)
	c := qemu.Config{Hardware: h, Binary: p.binary, Share: true, Events: v.event, Jail: qemu.Jail{UID: v.uid, Dir: m.cfg.RunDir}}
	for _, dir := range v.group.Paths() {
		c.Jail.Groups = append(c.Jail.Groups, filepath.Join(dir, "cgroup.procs"))
	}
	var own []*os.File
	defer func() {
		for _, f := range own {
			f.Close() // QEMU has them
		}
	}()
	open := func(to **os.File, path string, readOnly bool) {
		if path == "" || err != nil {
			return
		}
		if *to, err = openDisk(path, readOnly); err == nil {
			own = append(own, *to)
		}
	}
	c.System = &qemu.System{UUID: s.Uuid, BaseFormat: s.BaseFormat, Volatile: s.Volatile}
	if s.BaseFormat != "raw" && s.BaseFormat != "qcow2" || s.Base == "" || s.Disk == "" {
		return nil, fmt.Errorf("a disk of format %q: %w", s.BaseFormat, errdefs.ErrInvalidArgument)
	}
	open(&c.System.Base, s.Base, true)
	open(&c.System.Disk, s.Disk, false)
	open(&c.System.Seed, s.Seed, true)
	if s.Uefi {
		code, _, ferr := qemu.UEFI()
		if ferr != nil {
			return nil, ferr
		}
		open(&c.System.Code, code, true)
		open(&c.System.Vars, s.Vars, false)
	}
	if err != nil {
		return nil, err
	}
	if c.RAM, err = qemu.NewRAM(h.Memory); err != nil {
		return nil, err
	}
	own = append(own, c.RAM)
	for i, n := range s.Nics {
		nic := &vmv1.NIC{Id: qemu.NICID(i), Tap: v.tapName(i), Mac: n.Mac}
		tap, err := qemu.NewTap(nic.Tap)
		if err != nil {
			return nil, err
		}
		own = append(own, tap)
		c.Taps, c.System.MACs = append(c.Taps, tap), append(c.System.MACs, n.Mac)
		v.nics = append(v.nics, nic)
		if err := v.system.serveDHCP(nic.Tap, n); err != nil {
			return nil, err
		}
	}
	if err := os.Mkdir(v.dir(), 0o711); err != nil {
		return nil, err
	}
	sctx, cancel := context.WithTimeout(ctx, systemTime) // a disk that QEMU does not come to an end with
	defer cancel()
	if v.proc, err = m.launcher.Start(sctx, c); err != nil {
		return nil, err
	}
	go v.system.follow()
	if err := v.system.listen(); err != nil {
		return nil, err
	}
	return v, nil
}

// serveDHCP answers the machine's requests for an address on one of its interfaces.
func (t *systemTask) serveDHCP(tap string, n *vmv1.SystemNIC) error {
	if n.Address == "" {
		return nil
	}
	l := dhcp.Lease{Search: n.Search, MTU: int(n.Mtu), Hostname: n.Hostname}
	var err error
	bad := func(err error) error { return fmt.Errorf("network interface: %w: %w", err, errdefs.ErrInvalidArgument) }
	if l.MAC, err = net.ParseMAC(n.Mac); err != nil {
		return bad(err)
	}
	if l.Address, err = netip.ParsePrefix(n.Address); err != nil {
		return bad(err)
	}
	l.Server = l.Address.Addr()
	if n.Router != "" {
		if l.Router, err = netip.ParseAddr(n.Router); err != nil {
			return bad(err)
		}
		l.Server = l.Router
	}
	for _, d := range n.Dns {
		a, err := netip.ParseAddr(d)
		if err != nil {
			return bad(err)
		}
		l.DNS = append(l.DNS, a)
	}
	s, err := dhcp.Serve(tap, l)
	if err != nil {
		return err
	}
	t.dhcp = append(t.dhcp, s)
	return nil
}

// systemReason says why a system ended.
func (v *machine) systemReason() string {
	switch {
	case v.verdict.Load() != nil:
		return *v.verdict.Load()
	case v.panicked.Load():
		return "kernel panic"
	case v.poweroff.Load():
		return "power off"
	}
	return "QEMU: " + v.proc.Exit().String()
}

// addSystem shows a machine that is ready.
func (m *Manager) addSystem(v *machine) error {
	if !v.alive() {
		return fmt.Errorf("virtual machine %s has ended (%s): %w", v.id, v.systemReason(), errdefs.ErrUnavailable)
	}
	v.mu.Lock()
	v.used = true
	v.mu.Unlock()
	m.mu.Lock()
	down := m.down
	if !down {
		m.machines[v.id] = v
	}
	m.mu.Unlock()
	if down {
		return errors.New("the process that holds virtual machines ends")
	}
	m.events.Publish(&vmv1.Event{Type: vmv1.Event_CREATED, Id: v.id})
	return nil
}
