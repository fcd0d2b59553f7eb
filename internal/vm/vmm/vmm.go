// Package vmm holds an engine's virtual machines: it makes and keeps the
// template, a pool of clones that wait for use, and the machines in use, and
// serves the daemon's VMM service (api/v1).
//
//	vmm.go       configuration, start and end
//	platform.go  what machines run on here: QEMU, accelerator, kernel
//	machine.go   one QEMU and its guest, from birth to end
//	warm.go      what runs in a guest before it is saved or waits
//	pool.go      clones that wait
//	rest.go      machines that stand still
//	service.go   the service's calls; devices.go: those about disks, NICs, memory
//	streams.go   the shim's socket, streams that guests open
//	share.go     host directories
//	console.go   the guest kernel's log
//	events.go    what happened
//
// A machine's QEMU dies with this process. What it leaves then (directories,
// cgroups) the next start removes.
//
// Lock order: machine.mu before Manager.mu; neither is held across a call to
// QEMU or a guest. machine.change, which is, comes before both.
package vmm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/cgroup"
	"tenon.dev/tenon/internal/task/replay"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
	"tenon.dev/tenon/internal/vm/qemu"
	"tenon.dev/tenon/internal/vm/template"
)

// Config is what a Manager works with. Paths are absolute.
type Config struct {
	StateDir     string // durable: kernels, initramfs, templates
	RunDir       string // volatile: a directory for each machine
	Name         string // prefix of interfaces
	CgroupParent string // machines' cgroups are below it
	// Self is this program: it calls qemu.Jailed if its first argument is
	// qemu.JailArg, and Shared if it is ShareArg.
	Self string
	Shim string // the static tenon-shim that becomes the guests' init

	QEMU      string // path; empty: the installed one
	Kernel    string // see kernel.Config
	Modules   string
	KernelDir string // where kernels are unpacked; empty: StateDir/kernel
	Accel     string // see accel.Select
	Type      string // of machine; empty: pc

	Memory int64 // bytes of a cloned machine; 0: 512 MiB
	CPUs   int   // of a cloned machine; 0: the host's

	Pool       int   // clones that wait for use; 0: none
	PoolMemory int64 // bytes that they may cost together; 0: unbounded

	// Defaults is the OCI specification of a container that asks for nothing, as the
	// engine writes it: machines that wait have run one like it. Empty: another.
	Defaults []byte

	HangTime time.Duration // a guest that does not answer for so long is ended; 0: three minutes
	IdleTrim time.Duration // an emulated machine that rests for so long gives up its translated code; 0: none does

	Log *slog.Logger
}

const (
	defaultMemory = 512 << 20
	defaultHang   = 3 * time.Minute
	memorySlots   = 32
	firstUID      = 0x6e000000 // far from users, subordinate ids and systemd's
)

// Manager holds the machines. Its methods are safe for concurrent use.
type Manager struct {
	cfg      Config
	log      *slog.Logger
	instance string
	uids     uint32 // the first of this engine's
	launcher *qemu.Launcher
	store    *template.Store
	events   *replay.Ring[vmv1.Event]
	lock     *os.File
	ctx      context.Context // ends with the Manager
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	pool     *pool

	setup sync.Mutex        // held while found is found, and for empty
	empty map[bool]*os.File // see emptyFS; with a journal, and without
	found atomic.Pointer[platform]

	trimWarned atomic.Bool

	mu       sync.Mutex
	machines map[string]*machine
	busy     map[string]bool // being made
	down     bool
	indices  map[int]bool
}

// New takes over the directories and removes what an earlier Manager left. The
// pool is filled once a machine, or Prepare, was asked for. A Manager that still
// runs is errdefs.ErrConflict.
func New(ctx context.Context, c Config) (_ *Manager, err error) {
	if c.Memory == 0 {
		c.Memory = defaultMemory
	}
	if c.HangTime == 0 {
		c.HangTime = defaultHang
	}
	if c.Memory%qemu.MemoryUnit != 0 {
		return nil, fmt.Errorf("vm.memory of %d bytes: not a multiple of %d: %w", c.Memory, qemu.MemoryUnit, errdefs.ErrInvalidArgument)
	}
	if c.Type == "" {
		c.Type = "pc"
	}
	if c.KernelDir == "" {
		c.KernelDir = filepath.Join(c.StateDir, "kernel")
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	h := fnv.New32a()
	_, _ = h.Write([]byte(c.RunDir))
	m := &Manager{
		cfg: c, log: c.Log, instance: hex.EncodeToString(id[:]), uids: firstUID + h.Sum32()%4096*4096,
		store: template.NewStore(filepath.Join(c.StateDir, "templates")), events: newRing(),
		machines: map[string]*machine{}, empty: map[bool]*os.File{}, busy: map[string]bool{}, indices: map[int]bool{},
	}
	m.pool = newPool(m)
	if err := os.MkdirAll(c.RunDir, 0o711); err != nil { // a jail is built on it
		return nil, fmt.Errorf("virtual machines: %w", err)
	}
	if m.lock, err = os.OpenFile(filepath.Join(c.RunDir, ".lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("virtual machines: %w", err)
	}
	if err := unix.Flock(int(m.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		m.lock.Close()
		return nil, fmt.Errorf("another process holds the machines of %s: %w", c.RunDir, errdefs.ErrConflict)
	}
	if err := m.reap(ctx); err != nil {
		m.lock.Close()
		return nil, err
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.launcher = qemu.NewLauncher(c.Self)
	m.wg.Add(1)
	go m.pool.run()
	return m, nil
}

// Close ends all machines and frees everything that is theirs.
func (m *Manager) Close() error {
	m.cancel()
	m.wg.Wait() // the pool, which gives its machines back, and what is being made
	m.mu.Lock()
	list := make([]*machine, 0, len(m.machines))
	for _, v := range m.machines {
		list = append(list, v)
	}
	clear(m.machines)
	m.mu.Unlock()
	var wg sync.WaitGroup
	for _, v := range list {
		wg.Go(v.free)
	}
	wg.Wait()
	m.launcher.Close()
	for _, f := range m.empty {
		f.Close()
	}
	return errors.Join(m.removeParent(), m.lock.Close())
}

// removeParent removes the cgroup that held the machines', if it is empty.
func (m *Manager) removeParent() error {
	g, err := cgroup.Load(filepath.Join("/", m.cfg.CgroupParent))
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), freeTime)
	defer cancel()
	return g.Delete(ctx)
}

// reapTime bounds the removal of what an earlier process left.
const reapTime = 30 * time.Second

// reap removes what a Manager left that did not end by Close.
func (m *Manager) reap(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, reapTime)
	defer cancel()
	entries, err := os.ReadDir(m.cfg.RunDir)
	if err != nil {
		return fmt.Errorf("virtual machines: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := os.RemoveAll(filepath.Join(m.cfg.RunDir, e.Name())); err != nil {
				return fmt.Errorf("virtual machines: %w", err)
			}
		}
	}
	seen := map[string]bool{}
	var errs []error
	for _, h := range cgroup.Hierarchies() {
		left, err := filepath.Glob(filepath.Join(h.Path, m.cfg.CgroupParent, groupPrefix+"*"))
		if err != nil {
			return err
		}
		for _, dir := range left {
			path := filepath.Join("/", m.cfg.CgroupParent, filepath.Base(dir))
			if seen[path] {
				continue
			}
			seen[path] = true
			g, err := cgroup.Load(path)
			if err != nil {
				continue // gone
			}
			m.log.Info("removing what an earlier process left", "cgroup", path)
			errs = append(errs, g.Kill(unix.SIGKILL), g.Delete(ctx))
		}
	}
	return errors.Join(errs...)
}

// newIndex reserves the smallest number that no machine has.
func (m *Manager) newIndex() (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range maxMachines {
		if !m.indices[i] {
			m.indices[i] = true
			return i, nil
		}
	}
	return 0, fmt.Errorf("%d virtual machines are there: %w", maxMachines, errdefs.ErrResourceExhausted)
}

// maxMachines bounds an engine's machines by the users that they run as.
const maxMachines = 4096

func (m *Manager) freeIndex(i int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.indices, i)
}

// get returns a machine in use.
func (m *Manager) get(id string) (*machine, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.machines[id]
	if v == nil {
		return nil, fmt.Errorf("virtual machine %s: %w", id, errdefs.ErrNotFound)
	}
	return v, nil
}
