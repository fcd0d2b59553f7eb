// Package vm makes kernels of isolation "vm": a virtual machine for each
// container. The machines are held by tenon-vmm, a process that outlives the
// daemon; this package starts it when it is needed, asks it for machines by its
// service (tenon.vm.v1), and prepares their guests by the service of their
// shims (tenon.task.v1.Guest). What then happens in a guest, the engine asks the
// guest's shim for, as it asks the host's.
package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/internal/aside"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
	"tenon.dev/tenon/internal/version"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

// Config says where tenon-vmm is and where it works.
type Config struct {
	// Program and Shim are the paths of tenon-vmm, and of tenon-shim, which is the
	// guests' init. Required.
	Program, Shim string
	// RunRoot and Root are the daemon's; tenon-vmm's socket is RunRoot/vmm.sock.
	RunRoot, Root string
	// Name is the daemon's prefix.
	Name string
	// Accel is "auto", "kvm" (nothing else will do) or "tcg".
	Accel string
	// Kernel of the guests: "auto", "debian", "host", or the path of an image.
	Kernel string
	// KernelDir is where fetched kernels are unpacked; empty: below Root.
	KernelDir string
	// Memory (bytes) and CPUs of a machine; 0: tenon-vmm's own defaults.
	Memory int64
	CPUs   int
	// Pool is how many machines wait for containers, PoolMemory what they may
	// cost together (bytes; 0: any).
	Pool       int
	PoolMemory int64
	// HangTime is how long a guest may not answer before its machine is ended; 0:
	// tenon-vmm's own default.
	HangTime time.Duration
	// IdleTrim is how long an emulated machine has stood still before it gives the
	// memory of its translated code back; 0: never.
	IdleTrim time.Duration
	Log      *slog.Logger
}

// VMs is sandbox.Machines.
type VMs struct {
	cfg   Config
	later later

	starting sync.Mutex // held while tenon-vmm is being reached or started

	mu       sync.Mutex
	conn     *conn // nil: none
	machines map[string]*machine
	info     *vmv1.InfoResponse // of the last probe; nil: none
	making   int                // machines that are being made
	closed   bool
}

var _ sandbox.Machines = (*VMs)(nil)

// conn is a connection to one tenon-vmm.
type conn struct {
	rpc    *ttrpc.Client
	client vmv1.VMMClient
	pid    int
	// version is its build's.
	version string
	own     bool            // this VMs has started it
	over    context.Context // ends with the connection
}

// New has no side effects.
func New(cfg Config) *VMs {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	v := &VMs{cfg: cfg, machines: map[string]*machine{}}
	v.later.over, v.later.end = context.WithCancel(context.Background())
	return v
}

// Socket is where tenon-vmm listens.
func (v *VMs) Socket() string { return filepath.Join(v.cfg.RunRoot, "vmm.sock") }

// startTime is how long tenon-vmm may take until it listens; it first removes
// what a killed one has left.
const startTime = 30 * time.Second

// connect returns the connection, and makes it if there is none; with start it
// starts tenon-vmm if none listens. nil without an error: none listens.
func (v *VMs) connect(ctx context.Context, start bool) (*conn, error) {
	v.starting.Lock()
	defer v.starting.Unlock()
	return v.connectLocked(ctx, start)
}

// connectToMake is connect with start for one who makes a machine: until made is
// called nobody takes tenon-vmm for idle.
func (v *VMs) connectToMake(ctx context.Context) (c *conn, made func(), err error) {
	v.starting.Lock()
	defer v.starting.Unlock()
	if c, err = v.connectLocked(ctx, true); err != nil {
		return nil, nil, err
	}
	add := func(n int) {
		v.mu.Lock()
		v.making += n
		v.mu.Unlock()
	}
	add(1)
	return c, func() { add(-1) }, nil
}

// connectLocked is connect with starting held.
func (v *VMs) connectLocked(ctx context.Context, start bool) (*conn, error) {
	v.mu.Lock()
	c, closed := v.conn, v.closed
	v.mu.Unlock()
	if closed {
		return nil, errdefs.ErrUnavailable.WithMessage("the daemon is shutting down")
	}
	if c != nil && c.over.Err() == nil {
		if !start || !v.outdated(c) {
			return c, nil
		}
		v.retire(ctx, c)
	}
	c, seq, err := v.dial(ctx)
	if err == nil && v.outdated(c) {
		v.retire(ctx, c)
		c, seq, err = v.dial(ctx)
	}
	if err != nil && start && dead(err) {
		v.allEnded()
		if err = v.start(ctx); err == nil {
			if c, seq, err = v.dial(ctx); err == nil {
				c.own = true
			}
		}
	}
	if err != nil {
		if !start && dead(err) {
			return nil, nil
		}
		return nil, fmt.Errorf("tenon-vmm: %w", err)
	}
	v.mu.Lock()
	v.conn = c
	v.mu.Unlock()
	go v.follow(c, seq)
	return c, nil
}

// outdated says whether tenon-vmm is of another build and holds no machine: guests
// that it makes have another shim than this daemon expects.
func (v *VMs) outdated(c *conn) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return !c.own && c.version != version.Version && len(v.machines) == 0 && v.making == 0
}

// retire ends a tenon-vmm that is outdated.
func (v *VMs) retire(ctx context.Context, c *conn) {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	if _, err := c.client.Shutdown(ctx, &vmv1.ShutdownRequest{}); err != nil && c.over.Err() == nil {
		v.cfg.Log.Warn("tenon-vmm of another build does not end", "pid", c.pid, "version", c.version, "err", err)
	}
	select {
	case <-c.over.Done():
	case <-ctx.Done():
	}
	c.rpc.Close()
	v.cfg.Log.Info("tenon-vmm of another build had no machines, and makes place", "pid", c.pid, "version", c.version)
}

// dead says that an error of a dial means that nobody listens.
func dead(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// dial connects and takes over the list of machines.
func (v *VMs) dial(ctx context.Context) (*conn, uint64, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", v.Socket())
	if err != nil {
		return nil, 0, err
	}
	over, cancel := context.WithCancel(context.Background())
	rpc := ttrpc.NewClient(nc, ttrpc.WithOnClose(cancel), ttrpc.WithUnaryClientInterceptor(task.ClientInterceptor))
	c := &conn{rpc: rpc, client: vmv1.NewVMMClient(rpc), over: over}
	info, err := c.client.Info(ctx, &vmv1.InfoRequest{})
	if err != nil {
		rpc.Close()
		return nil, 0, err
	}
	c.pid, c.version = int(info.Pid), info.Version
	seq, err := v.list(ctx, c)
	if err != nil {
		rpc.Close()
		return nil, 0, err
	}
	return c, seq, nil
}

// list makes the known machines agree with tenon-vmm's.
func (v *VMs) list(ctx context.Context, c *conn) (uint64, error) {
	r, err := c.client.List(ctx, &vmv1.ListRequest{})
	if err != nil {
		return 0, err
	}
	there := map[string]*vmv1.Machine{}
	for _, d := range r.Machines {
		there[d.Id] = d
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for id, m := range v.machines {
		if d := there[id]; d == nil || d.Pid != m.about.Pid {
			m.end("it is gone")
			delete(v.machines, id)
		}
	}
	for id, d := range there {
		m := v.machines[id]
		if m == nil {
			m = v.newMachine(d)
			v.machines[id] = m
		}
		if d.Ended {
			m.end(d.Reason)
		} else {
			m.learn(d.Reason)
		}
	}
	return r.Sequence, nil
}

// follow hears of machines' ends until the connection ends; then it finds out
// whether tenon-vmm has.
func (v *VMs) follow(c *conn, seq uint64) {
	for c.over.Err() == nil {
		s, err := c.client.Events(c.over, &vmv1.EventsRequest{After: seq})
		for err == nil {
			var ev *vmv1.Event
			if ev, err = s.Recv(); err != nil {
				break
			}
			seq = ev.Sequence
			switch ev.Type {
			case vmv1.Event_ENDED, vmv1.Event_REMOVED:
				v.mu.Lock()
				m := v.machines[ev.Id]
				v.mu.Unlock()
				if m != nil && m.created(ev.Time) {
					m.end(ev.Reason)
				}
			case vmv1.Event_GAP:
				if seq, err = v.list(c.over, c); err == nil {
					err = errors.New("events were lost")
				}
			}
		}
		v.mu.Lock()
		closed := v.closed
		v.mu.Unlock()
		if c.over.Err() == nil && !closed {
			v.cfg.Log.Warn("events of tenon-vmm ended", "err", err)
		}
		select {
		case <-c.over.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	c.rpc.Close()
	v.mu.Lock()
	if v.conn == c {
		v.conn = nil
	}
	closed := v.closed
	v.mu.Unlock()
	if closed {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	if next, err := v.connect(ctx, false); err != nil || next == nil {
		v.cfg.Log.Warn("tenon-vmm is gone", "pid", c.pid, "err", err)
		v.allEnded()
	}
}

// allEnded says that no machine runs any more.
func (v *VMs) allEnded() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for id, m := range v.machines {
		m.end("tenon-vmm was killed, and its virtual machines with it")
		delete(v.machines, id)
	}
}

// start runs tenon-vmm in a session of its own, so that neither the daemon's end
// nor its terminal reaches it.
func (v *VMs) start(ctx context.Context) error {
	if _, err := os.Stat(v.cfg.Program); err != nil {
		return fmt.Errorf("%s must lie beside tenond: %w", filepath.Base(v.cfg.Program), err)
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	logPath := filepath.Join(v.cfg.RunRoot, "vmm.log")
	cmd := exec.Command(v.cfg.Program, "serve", "--socket", v.Socket(), "--run-dir", filepath.Join(v.cfg.RunRoot, "vms"),
		"--state-dir", filepath.Join(v.cfg.Root, "vm"), "--name", v.cfg.Name, "--shim", v.cfg.Shim, "--ready-fd", "3", "--log", logPath)
	for flag, value := range map[string]string{"--accel": v.cfg.Accel, "--kernel": v.cfg.Kernel, "--kernel-dir": v.cfg.KernelDir, "--memory": number(v.cfg.Memory),
		"--cpus": number(int64(v.cfg.CPUs)), "--pool": number(int64(v.cfg.Pool)), "--pool-memory": number(v.cfg.PoolMemory), "--hang-time": duration(v.cfg.HangTime),
		"--idle-trim": duration(v.cfg.IdleTrim)} {
		if value != "" {
			cmd.Args = append(cmd.Args, flag, value)
		}
	}
	defaults := filepath.Join(v.cfg.RunRoot, "vmm-defaults.json")
	if err := writeDefaults(defaults); err == nil {
		cmd.Args = append(cmd.Args, "--defaults", defaults)
	} else {
		v.cfg.Log.Warn("waiting virtual machines do not know what containers have by default: they start more slowly", "err", err)
	}
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	logFile, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		theirs.Close()
		return err
	}
	cmd.Stdout, cmd.Stderr = logFile, logFile
	err = cmd.Start()
	theirs.Close()
	logFile.Close()
	if err != nil {
		return fmt.Errorf("start %s: %w: %w", v.cfg.Program, err, errdefs.ErrUnavailable)
	}
	go func() { _ = cmd.Wait() }() // reaps it, if it ends while the daemon lives
	if err := aside.Move(v.cfg.Name, cmd.Process.Pid); err != nil {
		v.cfg.Log.Warn("tenon-vmm stays in the daemon's control group, and shares its fate if a service manager kills that", "err", err)
	}
	if err := ready.SetReadDeadline(time.Now().Add(startTime)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("it did not start (%v); see %s: %w", err, logPath, errdefs.ErrUnavailable)
	}
	v.cfg.Log.Info("tenon-vmm started", "pid", cmd.Process.Pid)
	return nil
}

// writeDefaults writes the specification of a container that asks for nothing: what
// every machine runs once before it waits.
func writeDefaults(path string) error {
	pids := int64(4096)
	s, err := spec.Build(spec.Input{
		Config:     &container.Config{Cmd: []string{"true"}},
		HostConfig: &container.HostConfig{NetworkMode: "bridge", IpcMode: "private", CgroupnsMode: "private", Resources: container.Resources{PidsLimit: &pids}},
		User:       spec.User{Additional: []uint32{0, 10}, Home: "/root"},
		Hostname:   "warm", NetNS: "/", NetReady: true, CgroupV2: true, Capabilities: spec.CapabilityNames(1<<41 - 1),
	})
	if err != nil {
		return err
	}
	b, err := spec.Encode(s)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

func number(n int64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

func duration(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return d.String()
}

// probe finds out what machines run on, once for each tenon-vmm.
func (v *VMs) probe(ctx context.Context) (*vmv1.InfoResponse, error) {
	c, err := v.connect(ctx, true)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	info := v.info
	v.mu.Unlock()
	if info != nil && int(info.Pid) == c.pid {
		return info, nil
	}
	if info, err = c.client.Info(ctx, &vmv1.InfoRequest{Probe: true}); err != nil {
		return nil, err
	}
	v.mu.Lock()
	v.info = info
	v.mu.Unlock()
	return info, nil
}

// Check says why there can be no machine.
func (v *VMs) Check(ctx context.Context) (sandbox.About, error) {
	info, err := v.probe(ctx)
	if err != nil {
		return sandbox.About{}, err
	}
	return about(info), nil
}

// Prepare makes the template and fills the pool.
func (v *VMs) Prepare(ctx context.Context) (sandbox.About, error) {
	if _, err := v.probe(ctx); err != nil {
		return sandbox.About{}, err
	}
	c, err := v.connect(ctx, true)
	if err == nil {
		_, err = c.client.Prepare(ctx, &vmv1.PrepareRequest{})
	}
	if err != nil {
		return sandbox.About{}, err
	}
	return v.About(ctx)
}

// About asks tenon-vmm, if it runs; it is empty if not.
func (v *VMs) About(ctx context.Context) (sandbox.About, error) {
	c, err := v.connect(ctx, false)
	if err != nil || c == nil {
		return sandbox.About{}, err
	}
	info, err := c.client.Info(ctx, &vmv1.InfoRequest{})
	if err != nil {
		return sandbox.About{}, err
	}
	return about(info), nil
}

func about(i *vmv1.InfoResponse) sandbox.About {
	return sandbox.About{Accel: i.Accel, AccelReason: i.AccelReason, QEMU: i.QemuVersion, Kernel: i.KernelRelease, Origin: i.KernelOrigin,
		Ready: int(i.PoolReady), Machines: int(i.Machines)}
}

// Facts are of a machine's kernel: as the probe found it.
func (v *VMs) Facts() sandbox.Facts {
	v.mu.Lock()
	info := v.info
	v.mu.Unlock()
	f := sandbox.Facts{CgroupV2: true, Capabilities: spec.CapabilityNames(1<<41 - 1), CPUs: 1}
	if info != nil {
		f.KernelRelease, f.Memory = info.KernelRelease, info.MachineMemory
		f.CPUs = max(int(info.MachineCpus), runtime.NumCPU()) // more are plugged in where they are asked for
	}
	f.CPUSet, f.MemorySet = cpuSet(f.CPUs), "0"
	return f
}

// cpuSet lists n processors.
func cpuSet(n int) string {
	if n > 1 {
		return "0-" + strconv.Itoa(n-1)
	}
	return "0"
}

// Create makes a machine.
func (v *VMs) Create(ctx context.Context, r sandbox.MachineRequest) (sandbox.Machine, error) {
	info, err := v.probe(ctx)
	if err != nil {
		return nil, err
	}
	c, made, err := v.connectToMake(ctx)
	if err != nil {
		return nil, err
	}
	defer made()
	req := &vmv1.CreateRequest{Id: r.ID, Hostname: r.Hostname, Logs: r.Logs}
	if r.System != nil {
		systemRequest(r, req)
	} else if r.Lasting != nil {
		if err := lastingRequest(ctx, r, req); err != nil {
			return nil, err
		}
	} else {
		req.Disks = []*vmv1.Disk{{Path: r.Disks.Image, ReadOnly: true}, {Path: r.Disks.Upper, Volatile: r.Disks.Volatile}}
		if r.Memory > 0 && r.Memory+guestMemory > info.MachineMemory {
			req.Memory = machineMemory(r.Memory)
		}
		if r.CPUs > int(info.MachineCpus) {
			req.Cpus = uint32(min(r.CPUs, max(int(info.MachineCpus), runtime.NumCPU())))
		}
	}
	a, err := c.client.Create(ctx, req)
	if errdefs.IsAlreadyExists(err) { // of an earlier run, whose end could not be cleaned up
		if _, err = c.client.Remove(ctx, &vmv1.RemoveRequest{Id: r.ID}); err == nil || errdefs.IsNotFound(err) {
			a, err = c.client.Create(ctx, req)
		}
	}
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if old := v.machines[r.ID]; old != nil {
		old.end("it was removed")
	}
	m := v.newMachine(a.Machine)
	v.machines[r.ID] = m
	return m, nil
}

// guestMemory is what a guest needs for itself, in bytes.
const guestMemory = 96 << 20

// machineMemory is what a machine needs whose containers may use some.
func machineMemory(containers int64) int64 {
	const step = 128 << 20 // that memory is plugged in by
	return (containers + guestMemory + step - 1) / step * step
}

// List returns the machines of a tenon-vmm that runs.
func (v *VMs) List(ctx context.Context) ([]sandbox.Machine, error) {
	c, err := v.connect(ctx, false)
	if err != nil || c == nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	var out []sandbox.Machine
	for _, m := range v.machines {
		out = append(out, m)
	}
	return out, nil
}
