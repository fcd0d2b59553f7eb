package vm

import (
	"context"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

// The guest sees its disks by these serial numbers.
const (
	imageDisk = "serial:disk0"
	upperDisk = "serial:disk1"
)

// shareCache is how long a guest may keep names and attributes of the host's
// files, in nanoseconds.
const shareCache = int64(1e9)

// Handover mounts the root's disks, makes the network namespace with its
// interfaces, writes the files and mounts the host's directories.
func (m *machine) Handover(ctx context.Context, h sandbox.MachineHandover) (sandbox.MachinePrepared, error) {
	dir := place(h.ID)
	out := sandbox.MachinePrepared{}
	var steps []*taskv1.Step
	if h.Disks.Image != "" {
		steps = append(steps, mountStep("erofs", imageDisk, dir+"/image", unix.MS_RDONLY, ""))
	}
	steps = append(steps, mountStep("ext4", upperDisk, dir+"/disk", unix.MS_NOATIME, "noinit_itable,discard,errors=remount-ro"))
	out.Rootfs = rootMounts(dir, h.Disks.Image != "")
	if !h.NoNet {
		var plugs []network.Plug
		for _, n := range h.NICs {
			plugs = append(plugs, n.Plug)
		}
		out.NetNS = netns(h.ID)
		steps = append(steps, &taskv1.Step{Kind: &taskv1.Step_Netns{Netns: &taskv1.NetNS{Path: out.NetNS, Sysctls: network.NamespaceSysctls(plugs)}}})
		for _, n := range h.NICs {
			s, err := m.nicStep(out.NetNS, n)
			if err != nil {
				return out, err
			}
			steps = append(steps, s)
		}
	}
	for _, f := range h.Files {
		p := path.Join(dir, "files", f.Name)
		out.Files = append(out.Files, p)
		steps = append(steps, &taskv1.Step{Kind: &taskv1.Step_File{File: &taskv1.File{Path: p, Mode: f.Mode, Data: f.Data}}})
	}
	for _, s := range h.Shares {
		step, err := m.share(ctx, dir, s)
		if err != nil {
			return out, err
		}
		target := step.GetShare().Target
		if s.File { // it is alone in a directory
			target = path.Join(target, path.Base(s.Path))
		}
		out.Shares = append(out.Shares, target)
		steps = append(steps, step)
	}
	return out, m.apply(ctx, steps)
}

// rootMounts make a container's root from its mounted disks.
func rootMounts(dir string, image bool) []task.Mount {
	upper, work := dir+"/disk/upper", dir+"/disk/work"
	if !image {
		return []task.Mount{{Type: "bind", Source: upper, Options: []string{"bind", "rw"}}}
	}
	return []task.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"lowerdir=" + dir + "/image", "upperdir=" + upper, "workdir=" + work, "index=off",
	}}}
}

// Root is the root as Handover has made it.
func (m *machine) Root(id string, image bool) *taskv1.Root {
	dir := place(id)
	r := &taskv1.Root{Upper: dir + "/disk/upper"}
	for _, x := range rootMounts(dir, image) {
		r.Mounts = append(r.Mounts, &taskv1.Mount{Type: x.Type, Source: x.Source, Options: x.Options})
	}
	return r
}

func mountStep(fstype, source, target string, flags uint64, data string) *taskv1.Step {
	return &taskv1.Step{Kind: &taskv1.Step_Mount{Mount: &taskv1.GuestMount{Type: fstype, Source: source, Target: target, Flags: flags, Data: data}}}
}

// share lets the guest mount a directory or file of the host.
func (m *machine) share(ctx context.Context, dir string, s sandbox.Share) (*taskv1.Step, error) {
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return nil, m.gone(err)
	}
	m.mu.Lock()
	m.shares++
	tag := fmt.Sprintf("s%d", m.shares)
	m.mu.Unlock()
	if _, err := c.client.Share(ctx, &vmv1.ShareRequest{Id: m.about.Id, Share: &vmv1.HostShare{Tag: tag, Path: s.Path, ReadOnly: s.ReadOnly, Cache: shareCache}}); err != nil {
		return nil, fmt.Errorf("share %s: %w", s.Path, err)
	}
	return &taskv1.Step{Kind: &taskv1.Step_Share{Share: &taskv1.Share{Tag: tag, Target: path.Join(dir, "shares", tag), ReadOnly: s.ReadOnly}}}, nil
}

// nicStep puts an interface into the network namespace and configures it.
func (m *machine) nicStep(ns string, n sandbox.NIC) (*taskv1.Step, error) {
	mac, err := m.mac(n.Tap)
	if err != nil {
		return nil, err
	}
	p := n.Plug
	if len(p.Sysctls) > 0 {
		return nil, unlike("a sysctl of an interface (" + strings.Join(p.Sysctls, ", ") + ")")
	}
	i := &taskv1.Interface{Mac: mac, Netns: ns, Name: p.Interface, NewMac: p.MAC.String(), Mtu: uint32(p.MTU)}
	for _, a := range append([]netip.Prefix{p.IPv4, p.IPv6}, p.LinkLocal...) {
		if a.IsValid() {
			i.Addresses = append(i.Addresses, a.String())
		}
	}
	for _, gw := range []netip.Addr{p.Default4, p.Default6} {
		if gw.IsValid() {
			i.Routes = append(i.Routes, &taskv1.Interface_Route{Gateway: gw.String()})
		}
	}
	return &taskv1.Step{Kind: &taskv1.Step_Interface{Interface: i}}, nil
}

// Plug gives a container one more interface.
func (m *machine) Plug(ctx context.Context, id string, n sandbox.NIC) error {
	s, err := m.nicStep(netns(id), n)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, plugTime)
	defer cancel()
	for {
		err := m.apply(ctx, []*taskv1.Step{s})
		if !errdefs.IsNotFound(err) {
			return err
		}
		select { // the guest has not seen the new one yet
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// plugTime bounds how long a guest may take to see a new interface.
const plugTime = 20 * time.Second

// Unplug takes an interface out of a container's network namespace.
func (m *machine) Unplug(ctx context.Context, id string, n sandbox.NIC, remove bool) error {
	m.mu.Lock()
	i := slices.IndexFunc(m.nics, func(x *vmv1.NIC) bool { return x.Tap == n.Tap })
	m.mu.Unlock()
	if i < 0 {
		return fmt.Errorf("virtual machine %s: %s: %w", m.about.Id, n.Tap, errNoNIC)
	}
	mac := n.Plug.MAC.String()
	err := m.apply(ctx, []*taskv1.Step{{Kind: &taskv1.Step_Interface{Interface: &taskv1.Interface{
		Mac: mac, Netns: netns(id), Name: fmt.Sprintf("spare%d", i), Remove: true,
	}}}})
	if err != nil {
		return err
	}
	m.mu.Lock()
	nic := &vmv1.NIC{Id: m.nics[i].Id, Tap: n.Tap, Mac: mac} // it keeps the address that it got
	m.nics[i] = nic
	m.mu.Unlock()
	if !remove || i == 0 { // the first is the template's: it waits for the next network
		return nil
	}
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return m.gone(err)
	}
	if _, err := c.client.DetachNIC(ctx, &vmv1.DetachNICRequest{Id: m.about.Id, Nic: nic.Id}); err != nil {
		return err
	}
	m.mu.Lock()
	m.nics = slices.DeleteFunc(m.nics, func(x *vmv1.NIC) bool { return x == nic })
	m.mu.Unlock()
	return nil
}

// Files writes files again, in place: they are mounted.
func (m *machine) Files(ctx context.Context, id string, files []sandbox.File) error {
	var steps []*taskv1.Step
	for _, f := range files {
		steps = append(steps, &taskv1.Step{Kind: &taskv1.Step_File{File: &taskv1.File{Path: path.Join(place(id), "files", f.Name), Mode: f.Mode, Data: f.Data}}})
	}
	return m.apply(ctx, steps)
}
