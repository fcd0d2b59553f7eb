package vmm

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"sort"
	"time"

	"github.com/containerd/errdefs"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	"tenon.dev/tenon/internal/version"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
	"tenon.dev/tenon/internal/vm/qemu"
)

// Service answers the daemon's calls.
type Service struct {
	m *Manager
	// Stop ends the process, after the answer to Shutdown.
	Stop func()
}

var _ vmv1.VMMService = (*Service)(nil)

// NewService makes the service of a Manager.
func NewService(m *Manager, stop func()) *Service { return &Service{m: m, Stop: stop} }

// machineID is what the service takes for a machine's name.
var machineID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// Info says what machines run on here.
func (s *Service) Info(ctx context.Context, r *vmv1.InfoRequest) (*vmv1.InfoResponse, error) {
	m := s.m
	if r.Probe {
		if _, err := m.findPlatform(ctx); err != nil {
			return nil, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	a := &vmv1.InfoResponse{
		Version: version.Version, Instance: m.instance, Machines: uint32(len(m.machines)), Pid: uint32(os.Getpid()),
		PoolSize: uint32(m.cfg.Pool), PoolReady: uint32(m.pool.ready()), MachineMemory: m.cfg.Memory,
	}
	if p := m.found.Load(); p != nil {
		a.QemuPath, a.QemuVersion, a.Accel, a.AccelReason = p.binary.Path, p.binary.Version, p.accel.Accel, p.accel.Reason
		a.KernelRelease, a.KernelOrigin, a.MachineCpus = p.kernel.Release, p.kernel.Origin, uint32(p.hardware.CPUs)
	}
	if t := m.store.Loaded(); t != nil {
		a.Template = t.Hash
	}
	return a, nil
}

// Prepare makes the template and fills the pool.
func (s *Service) Prepare(ctx context.Context, _ *vmv1.PrepareRequest) (*vmv1.PrepareResponse, error) {
	begin := time.Now()
	_, t, err := s.m.getTemplate(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.m.pool.fill(ctx); err != nil {
		return nil, err
	}
	return &vmv1.PrepareResponse{Template: t.Hash, Took: int64(time.Since(begin))}, nil
}

// Create makes a machine.
func (s *Service) Create(ctx context.Context, r *vmv1.CreateRequest) (_ *vmv1.CreateResponse, err error) {
	m := s.m
	if !machineID.MatchString(r.Id) {
		return nil, fmt.Errorf("virtual machine %q: not a name: %w", r.Id, errdefs.ErrInvalidArgument)
	}
	if err := m.reserve(r.Id); err != nil {
		return nil, err
	}
	defer m.unreserve(r.Id, r.System == nil)
	if r.KernelLog != "" && !filepath.IsAbs(r.KernelLog) {
		return nil, fmt.Errorf("virtual machine %s: kernel log %q: %w", r.Id, r.KernelLog, errdefs.ErrInvalidArgument)
	}
	if r.System != nil {
		v, err := m.createSystem(ctx, r)
		if err == nil {
			if err = m.addSystem(v); err == nil {
				return &vmv1.CreateResponse{Machine: v.describe()}, nil
			}
			v.free()
		}
		return nil, fmt.Errorf("virtual machine %s: %w", r.Id, err)
	}
	if err := m.lasting(ctx, r); err != nil {
		return nil, fmt.Errorf("virtual machine %s: %w", r.Id, err)
	}
	for {
		var v *machine
		if r.Cold {
			v, err = m.boot(ctx, r)
		} else {
			v, err = m.clone(ctx)
		}
		if err != nil {
			return nil, fmt.Errorf("virtual machine %s: %w", r.Id, err)
		}
		uctx, cancel := context.WithTimeout(ctx, bootTime) // a guest that hangs
		err := v.use(uctx, r)
		cancel()
		if err != nil {
			err = v.explain(err)
			died := v.origin == fromPool && !v.alive()
			v.free()
			if died && ctx.Err() == nil { // while it waited, which was not known yet
				m.log.Warn("a waiting virtual machine has ended", "reason", v.reason())
				continue
			}
			return nil, fmt.Errorf("virtual machine %s: %w", r.Id, err)
		}
		if err := m.add(v); err != nil {
			v.free()
			return nil, err
		}
		return &vmv1.CreateResponse{Machine: v.describe(), Identity: v.identity}, nil
	}
}

// reserve takes a name.
func (m *Manager) reserve(id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.down:
		return fmt.Errorf("virtual machine %s: the process that holds them ends: %w", id, errdefs.ErrUnavailable)
	case m.busy[id] || m.machines[id] != nil:
		return fmt.Errorf("virtual machine %s: %w", id, errdefs.ErrAlreadyExists)
	}
	m.busy[id] = true
	m.wg.Add(1)
	return nil
}

// unreserve gives it back. touch says that the pool is to be looked after: machines
// with systems of their own have nothing of it.
func (m *Manager) unreserve(id string, touch bool) {
	m.mu.Lock()
	delete(m.busy, id)
	m.mu.Unlock()
	m.wg.Done()
	if touch {
		m.pool.touch()
	}
}

// clone takes a machine from the pool, or makes one.
func (m *Manager) clone(ctx context.Context) (*machine, error) {
	if v := m.pool.take(); v != nil {
		v.origin = fromPool
		return v, nil
	}
	p, t, err := m.getTemplate(ctx)
	if err != nil {
		return nil, err
	}
	v, err := m.birth(ctx, birth{platform: p, hardware: p.hardware, template: t})
	if err != nil {
		return nil, err
	}
	v.origin = fromClone
	return v, nil
}

// lasting has a machine that lasts boot if it is to have less than a clone: what a
// guest was born with it can take again.
func (m *Manager) lasting(ctx context.Context, r *vmv1.CreateRequest) error {
	if !r.Lasting || r.Cold {
		return nil
	}
	p, err := m.findPlatform(ctx)
	if err != nil {
		return err
	}
	h := p.hardware
	if r.Memory > 0 && r.Memory < h.Memory || r.Cpus > 0 && int(r.Cpus) < h.CPUs {
		r.Cold, r.Nics, r.Memory, r.Cpus = true, uint32(h.NICs), cmp.Or(r.Memory, h.Memory), cmp.Or(r.Cpus, uint32(h.CPUs))
		r.MaxMemory, r.MaxCpus = h.MaxMemory, uint32(h.MaxCPUs)
	}
	return nil
}

// boot makes a machine of the size asked for.
func (m *Manager) boot(ctx context.Context, r *vmv1.CreateRequest) (*machine, error) {
	p, err := m.findPlatform(ctx)
	if err != nil {
		return nil, err
	}
	cpus := int(r.Cpus)
	if cpus == 0 {
		cpus = runtime.NumCPU()
	}
	if r.Memory == 0 {
		r.Memory = m.cfg.Memory
	}
	h := m.hardware(p, r.Memory, max(r.Memory, r.MaxMemory), cpus)
	if h.Memory < minMemory || h.Memory%(1<<20) != 0 {
		return nil, fmt.Errorf("%d bytes of memory: give at least %d, in MiB: %w", h.Memory, minMemory, errdefs.ErrInvalidArgument)
	}
	h.MaxCPUs = max(cpus, int(r.MaxCpus))
	h.NICs = int(r.Nics)
	if h.NICs > maxNICs {
		return nil, fmt.Errorf("%d network interfaces: at most %d: %w", h.NICs, maxNICs, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	v, err := m.birth(ctx, birth{platform: p, hardware: h})
	if err != nil {
		return nil, err
	}
	v.origin = fromBoot
	return v, nil
}

const (
	minMemory = 128 << 20 // bytes that a guest boots with
	maxNICs   = 8         // at birth
)

// use makes a waiting machine the one that was asked for.
func (v *machine) use(ctx context.Context, r *vmv1.CreateRequest) error {
	v.mu.Lock()
	v.id, v.created, v.lasting, v.title = r.Id, time.Now(), r.Lasting, r.Name
	v.mu.Unlock()
	if err := os.Mkdir(v.dir(), 0o711); err != nil {
		return err
	}
	kernelLog := filepath.Join(v.dir(), "kernel.log")
	if r.KernelLog != "" {
		kernelLog = r.KernelLog
	}
	if err := v.console.keep(kernelLog, r.KernelLog != ""); err != nil {
		return err
	}
	for container, l := range r.Logs {
		if err := v.setLog(container, l); err != nil {
			return err
		}
	}
	for _, sh := range r.Shares {
		if err := v.setShare(sh); err != nil {
			return err
		}
	}
	for i, d := range r.Disks {
		if d.GetPath() == "" {
			continue
		}
		if err := v.attach(ctx, qemu.DiskSerial(i), d); err != nil {
			return err
		}
		if r.Lasting { // the daemon asks for it
			v.mu.Lock()
			v.owned[qemu.DiskSerial(i)] = &ownedDisk{path: d.Path}
			v.mu.Unlock()
		}
	}
	if r.Memory > v.hardware.Memory {
		if _, err := v.resize(ctx, r.Memory); err != nil {
			return err
		}
	}
	if v.origin != fromBoot {
		if err := v.proc.Cont(ctx); err != nil {
			return err
		}
	}
	steps, err := identify(r)
	if err != nil {
		return err
	}
	if have := v.hardware.CPUs; int(r.Cpus) > have {
		n, err := v.addCPUs(ctx, r.Cpus)
		if err != nil {
			return err
		}
		r.Steps = append([]*taskv1.Step{{Kind: &taskv1.Step_Online{Online: &taskv1.Online{Cpus: n}}}}, r.Steps...)
	}
	answer, err := v.guest.Apply(ctx, &taskv1.ApplyRequest{Steps: append(steps, r.Steps...)})
	if err != nil {
		return err
	}
	v.identity = answer.Identity
	if r.Memory > 0 && r.Memory < v.hardware.Memory {
		if _, err := v.resize(ctx, r.Memory); err != nil {
			return err
		}
	}
	return v.listen()
}

// identify is the step that makes a machine another than its template.
func identify(r *vmv1.CreateRequest) ([]*taskv1.Step, error) {
	id := &taskv1.Identity{Seed: make([]byte, 64), Hostname: r.Hostname, MachineId: r.MachineId}
	if _, err := rand.Read(id.Seed); err != nil {
		return nil, err
	}
	if id.MachineId == "" {
		id.MachineId = hex.EncodeToString(id.Seed[48:])
		id.Seed = id.Seed[:48]
	}
	id.Time = time.Now().UnixNano()
	return []*taskv1.Step{{Kind: &taskv1.Step_Identity{Identity: id}}}, nil
}

// add shows a machine that is ready.
func (m *Manager) add(v *machine) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ended {
		return fmt.Errorf("virtual machine %s has ended (%s): %w", v.id, v.why, errdefs.ErrUnavailable)
	}
	v.used = true
	m.mu.Lock()
	m.machines[v.id] = v
	m.mu.Unlock()
	m.events.Publish(&vmv1.Event{Type: vmv1.Event_CREATED, Id: v.id})
	go v.heed()
	go v.rests()
	return nil
}

// List shows the machines in use.
func (s *Service) List(context.Context, *vmv1.ListRequest) (*vmv1.ListResponse, error) {
	// What happens meanwhile is then both in the list and among the events.
	a := &vmv1.ListResponse{Sequence: s.m.events.Sequence()}
	for _, v := range s.m.list() {
		a.Machines = append(a.Machines, v.describe())
	}
	return a, nil
}

func (m *Manager) list() []*machine {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]*machine, 0, len(m.machines))
	for _, v := range m.machines {
		list = append(list, v)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].id < list[j].id })
	return list
}

// Remove ends a machine at once.
func (s *Service) Remove(_ context.Context, r *vmv1.RemoveRequest) (*vmv1.RemoveResponse, error) {
	m := s.m
	m.mu.Lock()
	v := m.machines[r.Id]
	delete(m.machines, r.Id)
	if v != nil {
		m.busy[r.Id] = true // until its directory is gone
	}
	m.mu.Unlock()
	if v == nil {
		return nil, fmt.Errorf("virtual machine %s: %w", r.Id, errdefs.ErrNotFound)
	}
	v.free()
	m.mu.Lock()
	delete(m.busy, r.Id)
	m.mu.Unlock()
	m.events.Publish(&vmv1.Event{Type: vmv1.Event_REMOVED, Id: r.Id})
	return new(vmv1.RemoveResponse), nil
}

// KeepLog says where a container's output is kept.
func (s *Service) KeepLog(_ context.Context, r *vmv1.KeepLogRequest) (*vmv1.KeepLogResponse, error) {
	v, err := s.m.get(r.Id)
	if err != nil {
		return nil, err
	}
	return new(vmv1.KeepLogResponse), v.setLog(r.Container, r.Log)
}

// Share makes a directory of the host available to a machine.
func (s *Service) Share(_ context.Context, r *vmv1.ShareRequest) (*vmv1.ShareResponse, error) {
	v, err := s.m.get(r.Id)
	if err != nil {
		return nil, err
	}
	return new(vmv1.ShareResponse), v.setShare(r.Share)
}

// Unshare takes it back.
func (s *Service) Unshare(_ context.Context, r *vmv1.UnshareRequest) (*vmv1.UnshareResponse, error) {
	v, err := s.m.get(r.Id)
	if err != nil {
		return nil, err
	}
	v.dropShare(r.Tag)
	return new(vmv1.UnshareResponse), nil
}

// Usage is what machines cost the host.
func (s *Service) Usage(_ context.Context, r *vmv1.UsageRequest) (*vmv1.UsageResponse, error) {
	a := new(vmv1.UsageResponse)
	var list []*machine
	if len(r.Ids) == 0 {
		list = s.m.list()
	}
	for _, id := range r.Ids {
		v, err := s.m.get(id)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	for _, v := range list {
		if u, err := v.usage(); err == nil { // else it has just ended
			a.Usages = append(a.Usages, u)
		}
	}
	return a, nil
}

// Events streams what happened.
func (s *Service) Events(ctx context.Context, r *vmv1.EventsRequest, srv vmv1.VMM_EventsServer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(s.m.ctx, cancel)
	defer stop()
	return s.m.events.Stream(ctx, r.After, srv.Send)
}

// Shutdown ends all machines and the process.
func (s *Service) Shutdown(context.Context, *vmv1.ShutdownRequest) (*vmv1.ShutdownResponse, error) {
	s.m.mu.Lock()
	again := s.m.down
	s.m.down = true
	s.m.mu.Unlock()
	if again {
		return new(vmv1.ShutdownResponse), nil
	}
	err := s.m.Close()
	time.AfterFunc(answerTime, s.Stop) // the answer goes first
	return new(vmv1.ShutdownResponse), errors.Join(err)
}

const answerTime = 5 * time.Millisecond
