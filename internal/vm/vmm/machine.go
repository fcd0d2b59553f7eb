package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	"tenon.dev/tenon/internal/cgroup"
	"tenon.dev/tenon/internal/channel/mux"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
	"tenon.dev/tenon/internal/vm/qemu"
	"tenon.dev/tenon/internal/vm/qmp"
	"tenon.dev/tenon/internal/vm/template"
)

// Origins of machines.
const (
	fromPool  = "pool"
	fromClone = "clone"
	fromBoot  = "boot"
)

// machine is one QEMU and its guest.
type machine struct {
	m          *Manager
	index      int
	uid        uint32
	hardware   qemu.Hardware
	template   string // hash; empty: booted
	group      *cgroup.Group
	proc       *qemu.Process
	console    *console
	session    *mux.Session
	rpc        *ttrpc.Client
	guest      taskv1.GuestService
	nics       []*vmv1.NIC
	panicked   atomic.Bool
	poweroff   atomic.Bool // the guest asked for it
	diskWarned atomic.Bool
	verdict    atomic.Pointer[string] // why it was killed
	freeOnce   sync.Once
	serving    sync.WaitGroup // of shares
	ahead      sync.WaitGroup // what makes interfaces for the next containers
	system     *systemTask    // of a machine with an operating system of its own; nil: a kernel of ours

	// Of a machine in use.
	id       string
	origin   string
	created  time.Time
	identity *taskv1.IdentityResult
	listener net.Listener
	change   sync.Mutex // held while devices are changed
	lasting  bool
	title    string // the daemon's name of one that lasts

	mu        sync.Mutex
	disks     map[string]bool       // attached, by serial number
	owned     map[string]*ownedDisk // those with owners
	serials   int                   // given to disks so far
	nicNumber int                   // of the next one
	plugs     int                   // memory modules so far
	plugged   int64                 // bytes of them
	memory    int64
	cpus      int
	logs      map[string]*keptLog
	shares    map[string]*share
	servers   int  // of shares
	used      bool // the service shows it
	ended     bool
	freed     bool
	why       string // of its end
	clean     bool
}

// birth describes a machine to start.
type birth struct {
	platform *platform
	hardware qemu.Hardware
	ram      *os.File           // its memory, to be saved; nil: its own
	template *template.Template // nil: it boots
}

// birth starts a machine. A clone stands still; a booted one runs, and answers.
func (m *Manager) birth(ctx context.Context, b birth) (_ *machine, err error) {
	v := &machine{
		m: m, hardware: b.hardware, console: newConsole(), memory: b.hardware.Memory, cpus: b.hardware.CPUs,
		disks: map[string]bool{}, owned: map[string]*ownedDisk{}, logs: map[string]*keptLog{}, shares: map[string]*share{}, created: time.Now(),
	}
	if v.index, err = m.newIndex(); err != nil {
		return nil, err
	}
	v.uid = m.uids + uint32(v.index)
	defer func() {
		if err != nil {
			v.free()
		}
	}()
	if v.group, err = cgroup.Create(filepath.Join("/", m.cfg.CgroupParent, fmt.Sprintf("%s%d", groupPrefix, v.index)), nil, "cpuacct", "memory"); err != nil {
		return nil, err
	}
	c := qemu.Config{
		Hardware: b.hardware, Binary: b.platform.binary, RAM: b.ram, Share: true, Events: v.event,
		Jail: qemu.Jail{UID: v.uid, Dir: m.cfg.RunDir},
	}
	for _, dir := range v.group.Paths() {
		c.Jail.Groups = append(c.Jail.Groups, filepath.Join(dir, "cgroup.procs"))
	}
	var own []*os.File
	defer func() {
		for _, f := range own {
			f.Close() // QEMU has them
		}
	}()
	for i := range b.hardware.NICs {
		n := &vmv1.NIC{Id: qemu.NICID(i), Tap: v.tapName(i), Mac: qemu.NICMAC(i)}
		tap, err := qemu.NewTap(n.Tap)
		if err != nil {
			return nil, err
		}
		own = append(own, tap)
		c.Taps = append(c.Taps, tap)
		v.nics = append(v.nics, n)
	}
	v.nicNumber = b.hardware.NICs
	if b.template == nil { // a clone has them in its memory
		for _, f := range []struct {
			to   **os.File
			path string
		}{{&c.Kernel, b.platform.kernel.Image}, {&c.Initrd, b.platform.initramfs.Path}} {
			if *f.to, err = os.Open(f.path); err != nil {
				return nil, fmt.Errorf("virtual machine: %w", err)
			}
			own = append(own, *f.to)
		}
	}
	c.Append = b.hardware.Append(b.platform.tsc, kernelHZ)
	if b.template != nil {
		v.template = b.template.Hash
		c.RAM, c.Share, c.Incoming = b.template.RAM, false, true
	} else if c.RAM == nil {
		if c.RAM, err = qemu.NewRAM(b.hardware.Memory); err != nil {
			return nil, err
		}
		own = append(own, c.RAM)
	}
	if v.proc, err = m.launcher.Start(ctx, c); err != nil {
		return nil, err
	}
	go v.console.collect(v.proc.Console)
	if b.template != nil {
		if err := v.proc.Restore(ctx, b.template.State); err != nil {
			return nil, err
		}
	}
	v.session = mux.New(v.proc.Port, mux.Config{Host: true})
	go v.accept()
	go v.watch()
	if b.template == nil {
		if err := v.ping(ctx); err != nil {
			return nil, v.explain(err)
		}
	}
	conn, err := v.session.Dial(ctx)
	if err != nil {
		return nil, v.explain(err)
	}
	v.rpc = ttrpc.NewClient(conn, ttrpc.WithUnaryClientInterceptor(task.ClientInterceptor))
	v.guest = taskv1.NewGuestClient(v.rpc)
	return v, nil
}

// groupPrefix begins the names of machines' cgroups.
const groupPrefix = "vm-"

// maxInterface bounds an interface's name: IFNAMSIZ without its end.
const maxInterface = 15

// tapName is the i-th interface's on the host.
func (v *machine) tapName(i int) string {
	name := fmt.Sprintf("%s-v%x.%x", v.m.cfg.Name, v.index, i)
	if len(name) > maxInterface {
		h := fnv.New32a()
		_, _ = h.Write([]byte(v.m.cfg.Name)) // never fails
		name = fmt.Sprintf("v%06x-%x.%x", h.Sum32()&0xffffff, v.index, i)
	}
	return name
}

// event is told by QEMU.
func (v *machine) event(e qmp.Event) {
	switch e.Name {
	case "GUEST_PANICKED":
		v.panicked.Store(true)
	case "SHUTDOWN":
		v.poweroff.Store(strings.Contains(string(e.Data), `"guest-shutdown"`))
	case "BLOCK_IO_ERROR":
		v.diskError(e.Data)
	}
}

// ping returns when the guest answers, or can't any more.
func (v *machine) ping(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-v.proc.Done():
			cancel(errors.New("it ended"))
		case <-ctx.Done():
		}
	}()
	return v.session.Ping(ctx)
}

// explain adds to an error how the machine ended, if it did.
func (v *machine) explain(err error) error {
	select {
	case <-v.proc.Done():
		return fmt.Errorf("virtual machine ended (%s): %w", v.reason(), err)
	case <-time.After(explainTime(err)):
		return err
	}
}

// explainTime is how long the end of QEMU may take to be known after it was seen.
func explainTime(err error) time.Duration {
	for _, broken := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE, net.ErrClosed, ttrpc.ErrClosed} {
		if errors.Is(err, broken) {
			return 2 * time.Second
		}
	}
	return 10 * time.Millisecond
}

// reason says why the machine ended.
func (v *machine) reason() string {
	switch words := v.console.lastWords(); {
	case words != "":
		return words
	case v.verdict.Load() != nil:
		return *v.verdict.Load()
	case v.panicked.Load():
		return "kernel panic"
	case v.poweroff.Load():
		return "power off"
	}
	return "QEMU: " + v.proc.Exit().String()
}

// watch waits for the end of QEMU.
func (v *machine) watch() {
	<-v.proc.Done()
	why := v.reason()
	v.session.Close() // whoever talks to the guest hears of it
	v.mu.Lock()
	v.ended, v.why, v.clean = true, why, v.poweroff.Load() && !v.panicked.Load()
	tell := v.used && !v.freed
	v.mu.Unlock()
	if tell {
		v.tellEnd()
		return
	}
	v.m.pool.lost(v)
}

// tellEnd reports the end of a machine in use.
func (v *machine) tellEnd() {
	if v.listener != nil {
		v.listener.Close()
	}
	v.m.log.Info("a virtual machine has ended", "sandbox", v.id, "reason", v.why)
	v.m.events.Publish(&vmv1.Event{Type: vmv1.Event_ENDED, Id: v.id, Reason: v.why, Clean: v.clean})
}

// name is for messages.
func (v *machine) name() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.id
}

// alive says whether QEMU runs.
func (v *machine) alive() bool {
	select {
	case <-v.proc.Done():
		return false
	default:
		return true
	}
}

// freeTime bounds the removal of a machine's cgroup.
const freeTime = 10 * time.Second

// free ends the machine and removes everything of it, from any state.
func (v *machine) free() {
	v.freeOnce.Do(func() {
		v.mu.Lock()
		v.freed = true
		listener := v.listener
		v.mu.Unlock()
		if listener != nil {
			listener.Close()
		}
		if v.proc != nil {
			v.proc.Close()
		}
		if v.rpc != nil {
			v.rpc.Close()
		}
		if v.session != nil {
			v.session.Close()
		}
		if v.system != nil {
			v.system.close()
		}
		v.ahead.Wait() // QEMU refuses everything now
		v.dropShares()
		if v.id != "" {
			if err := os.RemoveAll(v.dir()); err != nil {
				v.m.log.Warn("a virtual machine's directory is left", "sandbox", v.id, "err", err)
			}
		}
		v.console.close()
		if v.group != nil {
			ctx, cancel := context.WithTimeout(context.Background(), freeTime)
			defer cancel()
			if err := v.group.Delete(ctx); err != nil {
				v.m.log.Warn("a virtual machine's cgroup is left; the next start removes it", "cgroup", v.group.Path(), "err", err)
				return // its number is not used again
			}
		}
		v.m.freeIndex(v.index)
	})
}

func (v *machine) dir() string { return filepath.Join(v.m.cfg.RunDir, v.id) }

// describe is the machine as the service shows it.
func (v *machine) describe() *vmv1.Machine {
	v.mu.Lock()
	defer v.mu.Unlock()
	d := &vmv1.Machine{
		Id: v.id, Pid: uint32(v.proc.PID()), Socket: filepath.Join(v.dir(), socketName), Accel: v.hardware.Accel,
		Created: v.created.UnixNano(), Origin: v.origin, Memory: v.memory, Cpus: uint32(v.cpus),
		KernelLog: v.console.file(), Uid: v.uid, Template: v.template, Lasting: v.lasting, Name: v.title,
		MaxCpus: uint32(max(v.hardware.MaxCPUs, v.hardware.CPUs)), MaxMemory: max(v.hardware.MaxMemory, v.hardware.Memory),
		Disks: v.ownedLocked(), Shares: map[string]string{}, Base: true, System: v.system != nil,
	}
	for tag, s := range v.shares {
		if s.owner != "" {
			d.Shares[tag] = s.owner
		}
	}
	d.Nics = append(d.Nics, v.nics...)
	d.Ended, d.Reason, d.Clean = v.ended, v.why, v.clean
	if v.identity != nil {
		d.BootId, d.KernelRelease = v.identity.BootId, v.identity.KernelRelease
	}
	return d
}

// running is an error for a machine that has ended.
func (v *machine) running() error {
	if !v.alive() {
		return fmt.Errorf("virtual machine %s has ended (%s): %w", v.id, v.reason(), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// hangTurns is how often in Config.HangTime a guest is asked whether it is alive.
const hangTurns = 6

// heed ends the machine if its guest hangs.
func (v *machine) heed() {
	limit := v.m.cfg.HangTime
	t := time.NewTicker(limit / hangTurns)
	defer t.Stop()
	for {
		select {
		case <-v.proc.Done():
			return
		case <-t.C:
		}
		ctx, cancel := context.WithTimeout(v.m.ctx, limit)
		err := v.ping(ctx)
		cancel()
		if err == nil || !v.alive() || v.m.ctx.Err() != nil {
			continue
		}
		why := "the guest hangs: it has not answered for " + limit.String()
		if !errors.Is(err, context.DeadlineExceeded) {
			why = "the guest is out of order: " + err.Error()
		}
		v.kill(why)
	}
}

// kill ends the machine; why is its reason, if there is none yet.
func (v *machine) kill(why string) {
	v.verdict.CompareAndSwap(nil, &why)
	v.proc.Kill()
}

// diskError is told by QEMU when the host can't write, or read, what the guest
// asks for. QEMU has stopped the machine where the host's disk is full: it could
// only wait, for nobody knows how long, so it ends and says why. Any other error
// is the guest's, as that of a disk.
func (v *machine) diskError(data json.RawMessage) {
	var e struct {
		Node      string `json:"node-name"`
		Operation string `json:"operation"`
		Action    string `json:"action"`
		NoSpace   bool   `json:"nospace"`
		Reason    string `json:"reason"`
	}
	if err := json.Unmarshal(data, &e); err != nil {
		e.Reason = err.Error()
	}
	if e.Action == "stop" {
		why := "a disk of it could not be written: " + e.Reason
		if e.NoSpace {
			why = "no space left on the host's disk for what the container writes"
		}
		v.kill(why)
		return
	}
	if !v.diskWarned.Swap(true) {
		v.m.log.Warn("a disk of a virtual machine fails; further errors are not logged", "sandbox", v.name(), "disk", e.Node, "operation", e.Operation, "err", e.Reason)
	}
}
