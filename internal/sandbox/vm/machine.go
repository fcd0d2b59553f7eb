package vm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

// machine is sandbox.Machine.
type machine struct {
	v     *VMs
	about *vmv1.Machine
	facts sandbox.Facts

	ended chan struct{}
	once  sync.Once

	resizing sync.Mutex    // held while its size is changed, which the guest has a say in; taken before mu
	dialing  chan struct{} // has an element while somebody connects to guest

	mu     sync.Mutex // never held while somebody else has to answer
	reason string
	nics   []*vmv1.NIC
	rpc    *ttrpc.Client // to the guest's own service; nil: not connected
	guest  taskv1.GuestService
	shares int

	lasting *lasting // nil: it is one container's
}

var _ sandbox.Machine = (*machine)(nil)

// newMachine is called with v.mu held.
func (v *VMs) newMachine(d *vmv1.Machine) *machine {
	m := &machine{v: v, about: d, nics: d.Nics, ended: make(chan struct{}), dialing: make(chan struct{}, 1)}
	m.facts = sandbox.Facts{
		BootID: d.BootId, KernelRelease: d.KernelRelease, CgroupV2: true, Capabilities: spec.CapabilityNames(1<<41 - 1),
		CPUs: max(int(d.Cpus), 1), Memory: d.Memory,
	}
	m.facts.CPUSet, m.facts.MemorySet = cpuSet(m.facts.CPUs), "0"
	if d.Lasting {
		m.lasting = newLasting(d)
		m.adopt()
	}
	return m
}

// created says that the machine was there at a time (nanoseconds since 1970):
// an event of an earlier one of the same name is not its own.
func (m *machine) created(at int64) bool { return at >= m.about.Created }

func (m *machine) end(reason string) {
	m.once.Do(func() {
		m.mu.Lock()
		m.reason = reason
		if m.rpc != nil {
			m.rpc.Close()
			m.rpc, m.guest = nil, nil
		}
		m.mu.Unlock()
		close(m.ended)
	})
}

// learn keeps why a system's QEMU has ended, whose task is still there to be asked.
func (m *machine) learn(reason string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.reason == "" {
		m.reason = reason
	}
}

// ID is the machine's name.
func (m *machine) ID() string { return m.about.Id }

// Isolation is "vm", "machine", or "machine=" and the name of one that lasts.
func (m *machine) Isolation() string {
	if m.about.System {
		return sandbox.OwnSystem
	}
	if m.lasting != nil {
		return sandbox.OnMachine + m.about.Name
	}
	return sandbox.VM
}

// Facts are of the guest's kernel.
func (m *machine) Facts() sandbox.Facts {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.facts
}

// Proof is what the VMM's host sees of it.
func (m *machine) Proof() sandbox.Proof {
	return sandbox.Proof{Pid: int(m.about.Pid), Accel: m.about.Accel, KernelLog: m.about.KernelLog, Origin: m.about.Origin}
}

// Taps are the host's ends of a container's interfaces.
func (m *machine) Taps(id string) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for _, n := range m.nics {
		if m.lasting == nil || n.Owner == id {
			out = append(out, n.Tap)
		}
	}
	return out
}

// AddTap plugs in one more interface, or takes one that nobody has.
func (m *machine) AddTap(ctx context.Context, id string) (string, error) {
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return "", m.gone(err)
	}
	req := &vmv1.AttachNICRequest{Id: m.about.Id}
	if m.lasting != nil {
		req.Owner = id
	}
	r, err := c.client.AttachNIC(ctx, req)
	if err != nil {
		return "", err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.nics = append(slices.DeleteFunc(m.nics, func(n *vmv1.NIC) bool { return n.Id == r.Nic.Id }), r.Nic)
	return r.Nic.Tap, nil
}

func (m *machine) gone(err error) error {
	if err == nil {
		err = errdefs.ErrUnavailable.WithMessage("tenon-vmm does not run")
	}
	return fmt.Errorf("virtual machine %s: %w", m.about.Id, err)
}

// Ended is closed when it runs no more.
func (m *machine) Ended() <-chan struct{} { return m.ended }

// End is why.
func (m *machine) End() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reason
}

// Connect connects to the guest's shim, which is there as long as the machine.
func (m *machine) Connect(ctx context.Context) (*task.Client, bool, error) {
	c, err := task.Dial(ctx, m.about.Socket)
	return c, false, err
}

// apply has the guest do steps.
func (m *machine) apply(ctx context.Context, steps []*taskv1.Step) error {
	g, err := m.service(ctx)
	if err == nil {
		_, err = g.Apply(ctx, &taskv1.ApplyRequest{Steps: steps})
	}
	if err != nil {
		return fmt.Errorf("virtual machine %s: %w", m.about.Id, err)
	}
	return nil
}

// service is the connection to the guest's own service.
func (m *machine) service(ctx context.Context) (taskv1.GuestService, error) {
	if m.about.System {
		return nil, errdefs.ErrNotImplemented.WithMessage("nothing of Tenon runs in a machine with its own operating system")
	}
	if g, err := m.connected(); g != nil || err != nil {
		return g, err
	}
	select {
	case m.dialing <- struct{}{}:
		defer func() { <-m.dialing }()
	case <-m.ended:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if g, err := m.connected(); g != nil || err != nil { // by who dialed before
		return g, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	over := make(chan struct{})
	defer close(over)
	go func() { // whose guest is gone is waited for no longer
		select {
		case <-m.ended:
			cancel()
		case <-over:
		}
	}()
	c, err := channel.Unix(m.about.Socket).Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.reason != "" {
		c.Close()
		return nil, m.endedLocked()
	}
	var rpc *ttrpc.Client
	rpc = ttrpc.NewClient(c, ttrpc.WithUnaryClientInterceptor(task.ClientInterceptor), ttrpc.WithOnClose(func() {
		go func() { // it may be called with mu held
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.rpc == rpc {
				m.rpc, m.guest = nil, nil
			}
		}()
	}))
	m.rpc, m.guest = rpc, taskv1.NewGuestClient(rpc)
	return m.guest, nil
}

// connected is the connection that there is; neither it nor an error: one is to be
// made.
func (m *machine) connected() (taskv1.GuestService, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.guest == nil && m.reason != "" {
		return nil, m.endedLocked()
	}
	return m.guest, nil
}

func (m *machine) endedLocked() error {
	return fmt.Errorf("it ended: %s: %w", m.reason, errdefs.ErrUnavailable)
}

// PowerOff ends the guest in order.
func (m *machine) PowerOff(ctx context.Context) error {
	if m.about.System { // its task has ended, or it is to end at once
		return nil
	}
	g, err := m.service(ctx)
	if err != nil {
		return err
	}
	if _, err := g.PowerOff(ctx, &taskv1.PowerOffRequest{}); err != nil && errdefs.IsNotImplemented(err) {
		return err // any other error is the connection's end
	}
	select {
	case <-m.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("virtual machine %s does not power off: %w", m.about.Id, context.Cause(ctx))
	}
}

// Grow plugs in memory and processors.
func (m *machine) Grow(ctx context.Context, memory int64, cpus int) error {
	if m.about.System { // its task knows what it can have
		return nil
	}
	m.resizing.Lock()
	defer m.resizing.Unlock()
	f := m.Facts()
	req := &vmv1.ResizeRequest{Id: m.about.Id}
	if memory > 0 && memory+guestMemory > f.Memory {
		req.Memory = machineMemory(memory)
	}
	if most := max(int(m.about.MaxCpus), f.CPUs); cpus > f.CPUs && most > f.CPUs {
		req.Cpus = uint32(min(cpus, most))
	}
	if m.lasting != nil || req.Memory == 0 && req.Cpus == 0 { // one that lasts grows by Resize alone
		return nil
	}
	return m.resizeLocked(ctx, req)
}

// resizeLocked is called with resizing held.
func (m *machine) resizeLocked(ctx context.Context, req *vmv1.ResizeRequest) error {
	c, err := m.v.connect(ctx, false)
	if err != nil || c == nil {
		return m.gone(err)
	}
	r, err := c.client.Resize(ctx, req)
	if err != nil {
		return fmt.Errorf("another size of the virtual machine: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.facts.Memory, m.facts.CPUs = r.Memory, int(r.Cpus)
	m.facts.CPUSet = cpuSet(m.facts.CPUs)
	return nil
}

// Remove ends it and takes everything of it away.
func (m *machine) Remove(ctx context.Context) error {
	m.v.mu.Lock()
	other := m.v.machines[m.about.Id]
	m.v.mu.Unlock()
	if other != nil && other != m { // its name has a new owner: it was removed before that was made
		m.end("it was removed")
		return nil
	}
	c, err := m.v.connect(ctx, false)
	if err == nil && c != nil {
		if _, err = c.client.Remove(ctx, &vmv1.RemoveRequest{Id: m.about.Id}); errdefs.IsNotFound(err) {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("virtual machine %s: remove: %w", m.about.Id, err)
	}
	m.end("it was removed")
	m.v.mu.Lock()
	defer m.v.mu.Unlock()
	if m.v.machines[m.about.Id] == m {
		delete(m.v.machines, m.about.Id)
	}
	return nil
}

// Teardown is Remove: nothing is shared with other machines.
func (m *machine) Teardown(ctx context.Context) error { return m.Remove(ctx) }

// Prepare is what Handover does.
func (m *machine) Prepare(context.Context, sandbox.Handover) (sandbox.Prepared, error) {
	return sandbox.Prepared{}, unlike("a root by its path")
}

// NamespacePath is a namespace in the guest.
func (m *machine) NamespacePath(pid int, t specs.LinuxNamespaceType) string {
	names := map[specs.LinuxNamespaceType]string{specs.PIDNamespace: "pid", specs.NetworkNamespace: "net", specs.MountNamespace: "mnt",
		specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts", specs.UserNamespace: "user", specs.CgroupNamespace: "cgroup"}
	return fmt.Sprintf("/proc/%d/ns/%s", pid, names[t])
}

func unlike(what string) error {
	return fmt.Errorf("%s can't be had with isolation vm: %w", what, errdefs.ErrNotImplemented)
}

// Devices are the host's, and stay there.
func (m *machine) Devices(path, _, _ string) ([]spec.Device, error) {
	return nil, unlike("device " + path)
}

// AllDevices are not known before the guest runs.
func (m *machine) AllDevices() ([]spec.Device, error) { return nil, unlike("--privileged") }

// BlockDevice is the host's, and stays there.
func (m *machine) BlockDevice(path string) (major, minor uint32, err error) {
	return 0, 0, unlike("block device " + path)
}

// BindSource is for the host's kernel: directories are shared by Handover.
func (m *machine) BindSource(path string, _ bool) error { return unlike("directory " + path) }

// Init is not in the guest.
func (m *machine) Init() (string, error) { return "", unlike("--init") }

var errNoNIC = errors.New("no interface has this tap")

// mac is the hardware address by which the guest finds an interface first.
func (m *machine) mac(tap string) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.nics {
		if n.Tap == tap {
			return n.Mac, nil
		}
	}
	return "", fmt.Errorf("virtual machine %s: %s: %w", m.about.Id, tap, errNoNIC)
}

// place is the directory of a container in the guest.
func place(id string) string { return "/run/tenon/c/" + short(id) }

func short(id string) string { return id[:min(len(id), 20)] }

func netns(id string) string { return strings.Replace(place(id), "/c/", "/netns/", 1) }

func userns(id string) string { return strings.Replace(place(id), "/c/", "/userns/", 1) }

// userBase is guestBase for the roots in a container's user namespace.
func userBase(id string) string { return place(id) + "/base" }
