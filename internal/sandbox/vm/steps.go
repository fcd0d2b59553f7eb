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
	out := sandbox.MachinePrepared{}
	var steps []*taskv1.Step
	var err error
	if m.lasting != nil {
		if steps, err = m.lastingRoot(ctx, h); err != nil {
			return out, err
		}
	} else {
		dir := place(h.ID)
		if h.Disks.Image != "" {
			steps = append(steps, mountStep("erofs", imageDisk, dir+"/image", unix.MS_RDONLY, ""))
		}
		options := diskOptions
		if h.Disks.Volatile {
			options += volatileOptions
		}
		steps = append(steps, mountStep("ext4", upperDisk, dir+"/disk", unix.MS_NOATIME, options))
	}
	for _, x := range m.rootOf(h.ID, h.Disks.Image != "", h.UserNS != nil).Mounts {
		out.Rootfs = append(out.Rootfs, task.Mount{Type: x.Type, Source: x.Source, Options: x.Options})
	}
	for _, more := range []func(context.Context, sandbox.MachineHandover, *sandbox.MachinePrepared) ([]*taskv1.Step, error){
		m.userSteps, m.netSteps, m.fileSteps, m.shareSteps, m.imageSteps,
	} {
		list, err := more(ctx, h, &out)
		if err != nil {
			return out, err
		}
		steps = append(steps, list...)
	}
	err = m.apply(ctx, steps)
	if h.UserNS != nil && errdefs.IsNotImplemented(err) {
		err = fmt.Errorf("its guest is of an older build, which makes no user namespaces: start the machine again, or use --userns host: %w", err)
	}
	return out, err
}

// diskOptions are those of the file systems that containers write to.
const diskOptions = "noinit_itable,discard,errors=remount-ro"

// volatileOptions are added for one that is new and ends with its machine: no table of
// the file system's own blocks is made to find out that it is damaged, and what is
// free is looked up where it is needed, not for all of the disk some seconds later.
const volatileOptions = ",noblock_validity,no_prefetch_block_bitmaps"

// userSteps make the user namespace, and what of the root is of its root.
func (m *machine) userSteps(_ context.Context, h sandbox.MachineHandover, out *sandbox.MachinePrepared) ([]*taskv1.Step, error) {
	u := h.UserNS
	if u == nil {
		return nil, nil
	}
	if m.lasting != nil {
		m.lasting.of(h.ID, func(x *holdings) { x.owner = u.Range.Start })
	}
	s := &taskv1.UserNS{Path: userns(h.ID), Start: u.Range.Start, Size: u.Range.Size, Base: userBase(h.ID)}
	if out.UserNS = s.Path; u.Path != "" {
		out.UserNS, s.Path = u.Path, ""
	}
	return []*taskv1.Step{{Kind: &taskv1.Step_UserNs{UserNs: s}}}, nil
}

func (m *machine) netSteps(_ context.Context, h sandbox.MachineHandover, out *sandbox.MachinePrepared) ([]*taskv1.Step, error) {
	if h.NoNet {
		return nil, nil
	}
	var plugs []network.Plug
	for _, n := range h.NICs {
		plugs = append(plugs, n.Plug)
	}
	out.NetNS = netns(h.ID)
	steps := []*taskv1.Step{{Kind: &taskv1.Step_Netns{Netns: &taskv1.NetNS{Path: out.NetNS, Sysctls: network.NamespaceSysctls(plugs), User: out.UserNS}}}}
	for _, n := range h.NICs {
		s, err := m.nicStep(out.NetNS, n)
		if err != nil {
			return nil, err
		}
		steps = append(steps, s)
	}
	return steps, nil
}

func (m *machine) fileSteps(_ context.Context, h sandbox.MachineHandover, out *sandbox.MachinePrepared) (steps []*taskv1.Step, _ error) {
	for _, f := range h.Files {
		p := path.Join(place(h.ID), "files", f.Name)
		out.Files = append(out.Files, p)
		steps = append(steps, fileStep(p, f))
	}
	return steps, nil
}

func fileStep(path string, f sandbox.File) *taskv1.Step {
	return &taskv1.Step{Kind: &taskv1.Step_File{File: &taskv1.File{Path: path, Mode: f.Mode, Data: f.Data, Owner: f.Owner}}}
}

func (m *machine) shareSteps(ctx context.Context, h sandbox.MachineHandover, out *sandbox.MachinePrepared) (steps []*taskv1.Step, _ error) {
	for _, s := range h.Shares {
		step, err := m.share(ctx, h.ID, s)
		if err != nil {
			return nil, err
		}
		target := step.GetShare().Target
		if s.File { // it is alone in a directory
			target = path.Join(target, path.Base(s.Path))
		}
		out.Shares = append(out.Shares, target)
		steps = append(steps, step)
	}
	return steps, nil
}

// imageSteps mounts the images that the container mounts beside its own.
func (m *machine) imageSteps(ctx context.Context, h sandbox.MachineHandover, out *sandbox.MachinePrepared) (steps []*taskv1.Step, _ error) {
	if len(h.Images) == 0 {
		return nil, nil
	}
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return nil, m.gone(err)
	}
	for i, file := range h.Images {
		if j := slices.Index(h.Images, file); j < i { // it is there
			out.Images = append(out.Images, out.Images[j])
			continue
		}
		if m.lasting != nil {
			at, err := m.mountImage(ctx, c, h.ID, file, true)
			if err != nil {
				return nil, fmt.Errorf("an image's disk: %w", err)
			}
			out.Images = append(out.Images, at)
			continue
		}
		r, err := c.client.AttachDisk(ctx, &vmv1.AttachDiskRequest{Id: m.about.Id, Disk: &vmv1.Disk{Path: file, ReadOnly: true}})
		if err != nil {
			return nil, fmt.Errorf("an image's disk: %w", err)
		}
		at := fmt.Sprintf("%s/images/%d", place(h.ID), i)
		out.Images = append(out.Images, at)
		steps = append(steps, mountStep("erofs", "serial:"+r.Serial, at, unix.MS_RDONLY, ""))
	}
	return steps, nil
}

// guestBase is the lowest layer of all roots, which the guest makes (shim/guest's Base).
const guestBase = "/run/tenon/base"

// Root is the root as Handover has made it, with plain owners.
func (m *machine) Root(id string, image bool) *taskv1.Root { return m.rootOf(id, image, false) }

// rootOf is Root, or with mapped the root of a container in a user namespace: its
// layers are mapped to it, and the lowest one is of its root.
func (m *machine) rootOf(id string, image, mapped bool) *taskv1.Root {
	lower, disk := place(id)+"/image", place(id)+"/disk"
	if m.lasting != nil {
		lower, disk = imagePlace(m.lasting.image(id)), dataPlace(id)
	}
	upper, work := disk+"/upper", disk+"/work"
	r := &taskv1.Root{Upper: upper}
	if !image {
		o := []string{"bind", "rw"}
		if mapped {
			o = append(o, "idmap")
		}
		r.Mounts = []*taskv1.Mount{{Type: "bind", Source: upper, Options: o}}
		return r
	}
	o := []string{"lowerdir=" + lower, "upperdir=" + upper, "workdir=" + work, "index=off"}
	switch {
	case mapped:
		o[0] += ":" + userBase(id)
		o = append(o, "idmap-at="+lower+":"+disk)
	case m.about.Base: // a tenon-vmm of an older build makes guests without it
		o[0] += ":" + guestBase
	}
	r.Mounts = []*taskv1.Mount{{Type: "overlay", Source: "overlay", Options: o}}
	return r
}

func mountStep(fstype, source, target string, flags uint64, data string) *taskv1.Step {
	return &taskv1.Step{Kind: &taskv1.Step_Mount{Mount: &taskv1.GuestMount{Type: fstype, Source: source, Target: target, Flags: flags, Data: data}}}
}

// share lets the guest mount a directory or file of the host.
func (m *machine) share(ctx context.Context, id string, s sandbox.Share) (*taskv1.Step, error) {
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return nil, m.gone(err)
	}
	m.mu.Lock()
	m.shares++
	hs := &vmv1.HostShare{Tag: fmt.Sprintf("s%d", m.shares), Path: s.Path, ReadOnly: s.ReadOnly, Cache: shareCache}
	m.mu.Unlock()
	if s.IDs != nil {
		hs.Ids = &vmv1.IDRange{Start: s.IDs.Start, Size: s.IDs.Size}
	}
	if m.lasting != nil {
		hs.Tag, hs.Owner = short(id)+"-"+hs.Tag, id
		m.lasting.of(id, func(h *holdings) { h.shares = append(h.shares, hs.Tag) })
	}
	if _, err := c.client.Share(ctx, &vmv1.ShareRequest{Id: m.about.Id, Share: hs}); err != nil {
		return nil, fmt.Errorf("share %s: %w", s.Path, err)
	}
	return &taskv1.Step{Kind: &taskv1.Step_Share{Share: &taskv1.Share{Tag: hs.Tag, Target: path.Join(place(id), "shares", hs.Tag), ReadOnly: s.ReadOnly}}}, nil
}

// nicStep puts an interface into the network namespace and configures it.
func (m *machine) nicStep(ns string, n sandbox.NIC) (*taskv1.Step, error) {
	mac, err := m.mac(n.Tap)
	if err != nil {
		return nil, err
	}
	p := n.Plug
	i := &taskv1.Interface{Mac: mac, Netns: ns, Name: p.Interface, NewMac: p.MAC.String(), Mtu: uint32(p.MTU), Wait: uint32(plugTime.Milliseconds())}
	for _, a := range append([]netip.Prefix{p.IPv4, p.IPv6}, p.LinkLocal...) {
		if a.IsValid() {
			i.Addresses = append(i.Addresses, a.String())
		}
	}
	for _, kv := range p.Sysctls {
		k, v, _ := strings.Cut(kv, "=")
		k = strings.ReplaceAll(strings.ReplaceAll(k, ".", "/"), "IFNAME", p.Interface)
		i.Sysctls = append(i.Sysctls, &taskv1.Sysctl{Name: k, Value: v})
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
	return m.apply(ctx, []*taskv1.Step{s})
}

// plugTime bounds how long a guest may take to see a new interface.
const plugTime = 20 * time.Second

// Unplug takes an interface out of a container's network namespace.
func (m *machine) Unplug(ctx context.Context, id string, n sandbox.NIC, remove bool) error {
	m.mu.Lock()
	i := slices.IndexFunc(m.nics, func(x *vmv1.NIC) bool { return x.Tap == n.Tap })
	if i < 0 {
		m.mu.Unlock()
		return fmt.Errorf("virtual machine %s: %s: %w", m.about.Id, n.Tap, errNoNIC)
	}
	nic := m.nics[i]
	m.mu.Unlock()
	if err := m.apply(ctx, []*taskv1.Step{takeBack(id, nic)}); err != nil {
		return err
	}
	if !remove {
		return nil
	}
	if m.lasting != nil {
		return m.returnNIC(ctx, id, nic, m.lasting.clean(id))
	}
	if i == 0 { // the template's: it waits for the next network
		return nil
	}
	return m.detachNIC(ctx, nic)
}

// takeBack has the guest take an interface out of a container's namespace.
func takeBack(id string, n *vmv1.NIC) *taskv1.Step {
	return &taskv1.Step{Kind: &taskv1.Step_Interface{Interface: &taskv1.Interface{Mac: n.Mac, Netns: netns(id), Name: "spare-" + n.Id, Remove: true}}}
}

// detachNIC takes an interface from the machine.
func (m *machine) detachNIC(ctx context.Context, nic *vmv1.NIC) error {
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return m.gone(err)
	}
	_, err = c.client.DetachNIC(ctx, &vmv1.DetachNICRequest{Id: m.about.Id, Nic: nic.Id})
	if err != nil && !errdefs.IsNotFound(err) { // an earlier daemon may have begun it
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.nics = slices.DeleteFunc(m.nics, func(x *vmv1.NIC) bool { return x.Id == nic.Id })
	return nil
}

// Files writes files again, in place: they are mounted.
func (m *machine) Files(ctx context.Context, id string, files []sandbox.File) error {
	var steps []*taskv1.Step
	for _, f := range files {
		steps = append(steps, fileStep(path.Join(place(id), "files", f.Name), f))
	}
	return m.apply(ctx, steps)
}
