package engine

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/sandbox"
)

// MachineEventType is the type of machines' events.
const MachineEventType events.Type = "machine"

// machinesBucket holds the machines' records, by ID.
const machinesBucket = "machines"

// mach is a machine that the engine knows.
type mach struct {
	id string
	op lock // life-cycle operations, one at a time; taken before a container's

	rec    atomic.Pointer[machine.Record] // published; never changed in place
	saveMu sync.Mutex                     // held while a record is changed and written

	mu      sync.Mutex
	kernel  *kernel            // nil: it does not run
	retry   context.CancelFunc // of a restart that waits; nil: none
	backoff backoff
	gone    bool
}

func newMach(r *machine.Record) *mach {
	m := &mach{id: r.ID, op: newLock()}
	m.rec.Store(r)
	return m
}

// record is the machine's as it is now. Read only.
func (m *mach) record() *machine.Record { return m.rec.Load() }

// running is the machine if containers can be started on it.
func (m *mach) running() (*kernel, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.record()
	switch s := r.State(); {
	case m.gone || s == machine.Removing:
		return nil, conflict("machine %s is being removed", r.Name)
	case s == machine.Stopping:
		return nil, conflict("machine %s is being stopped", r.Name)
	case m.kernel != nil && (isClosed(m.kernel.over) || isClosed(m.kernel.machine.Ended())):
		return nil, conflict("machine %s is ending", r.Name)
	case m.kernel != nil:
		return m.kernel, nil
	case s == machine.Starting || s == machine.Creating:
		return nil, conflict("machine %s is still starting", r.Name)
	case s == machine.Crashed:
		return nil, conflict("machine %s has ended (%s): tenon machine start %s", r.Name, r.Facts.Error, r.Name)
	}
	return nil, conflict("machine %s is stopped: tenon machine start %s", r.Name, r.Name)
}

// current is the machine's kernel; nil: it does not run.
func (m *mach) current() *kernel {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.kernel
}

func (m *mach) setKernel(k *kernel) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.kernel = k
}

// changeMach publishes a changed record and returns when it is on the disk.
func (e *Engine) changeMach(m *mach, f func(*machine.Record)) error {
	m.saveMu.Lock()
	defer m.saveMu.Unlock()
	r := m.record().Clone()
	f(r)
	m.rec.Store(r)
	if err := e.cfg.DB.Put(machinesBucket, r.ID, r); err != nil {
		return fmt.Errorf("machine %s: record: %w", r.Name, err)
	}
	return nil
}

func (e *Engine) emitMach(m *mach, action events.Action, attrs map[string]string) {
	r := m.record()
	a := maps.Clone(r.Labels)
	if a == nil {
		a = map[string]string{}
	}
	maps.Copy(a, attrs)
	a["name"] = r.Name
	e.cfg.Events.Publish(events.Message{Type: MachineEventType, Action: action, Actor: events.Actor{ID: r.ID, Attributes: a}})
}

// machineDir is where a machine's data disk and kernel log lie.
func (e *Engine) machineDir(id string) string { return filepath.Join(e.cfg.Root, "machines", id) }

// findMach returns a machine by name, ID or unique prefix of the ID.
func (e *Engine) findMach(ref string) (*mach, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if m := e.machs[ref]; m != nil {
		return m, nil
	}
	var found *mach
	for _, m := range e.machs {
		switch {
		case m.id == ref:
			return m, nil
		case ref != "" && strings.HasPrefix(m.id, ref) && found != nil:
			return nil, invalid("Multiple machines found with provided prefix: %s", ref)
		case ref != "" && strings.HasPrefix(m.id, ref):
			found = m
		}
	}
	if found == nil {
		return nil, notFound("No such machine: %s", ref)
	}
	return found, nil
}

// machOf is the machine that a container belongs to; nil: none that lasts.
func (e *Engine) machOf(r *container.Record) *mach {
	name := machine.Named(r.Isolation)
	if name == "" {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.machs[name]
}

func (e *Engine) allMachs() []*mach {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Values(e.machs))
}

// containersOf are the containers that belong to a machine.
func (e *Engine) containersOf(m *mach) []*ctr {
	iso := m.record().Isolation()
	return slices.DeleteFunc(e.all(), func(c *ctr) bool { return c.record().Isolation != iso })
}

func idsOf(list []*ctr) []string {
	out := []string{}
	for _, c := range list {
		out = append(out, c.id)
	}
	slices.Sort(out)
	return out
}

// Machine describes a machine.
type Machine struct {
	Record     *machine.Record // read only
	State      machine.State
	Containers []string // IDs of all that belong to it
	Running    int      // of them
	Usage      *sandbox.MachineUsage
	Facts      sandbox.Facts // of its kernel, while it runs
	Socket     string        // its own API; set by who serves it
}

func (e *Engine) describeMach(ctx context.Context, m *mach, usage bool) Machine {
	r := m.record()
	d := Machine{Record: r, State: r.State()}
	list := e.containersOf(m)
	d.Containers = idsOf(list)
	for _, c := range list {
		d.Running += boolInt(c.record().Running())
	}
	if k := m.current(); k != nil {
		d.Facts = k.machine.Facts()
		if usage {
			ctx, cancel := context.WithTimeout(ctx, killAnswerTime)
			defer cancel()
			if u, err := k.machine.Usage(ctx); err == nil { // a machine that does not answer is described without
				d.Usage = &u
			}
		}
	}
	return d
}

// MachineInspect describes a machine; usage says that what it takes is measured.
func (e *Engine) MachineInspect(ctx context.Context, ref string, usage bool) (Machine, error) {
	m, err := e.findMach(ref)
	if err != nil {
		return Machine{}, err
	}
	return e.describeMach(ctx, m, usage), nil
}

// MachineList describes the machines that pass the filters name, id, label and
// state, by name.
func (e *Engine) MachineList(ctx context.Context, f Filters) ([]Machine, error) {
	if err := checkFilters(f, "name", "id", "label", "state"); err != nil {
		return nil, err
	}
	out := []Machine{}
	for _, m := range e.allMachs() {
		r := m.record()
		if !matchSubstring(f["name"], r.Name) || !matchLabels(f["label"], r.Labels) ||
			len(f["state"]) > 0 && !slices.Contains(f["state"], string(r.State())) ||
			len(f["id"]) > 0 && !slices.ContainsFunc(f["id"], func(p string) bool { return strings.HasPrefix(r.ID, p) }) {
			continue
		}
		out = append(out, e.describeMach(ctx, m, false))
	}
	slices.SortFunc(out, func(a, b Machine) int { return strings.Compare(a.Record.Name, b.Record.Name) })
	return out, nil
}

// MachineCreate makes a machine; with start it runs when the call returns. All
// of it or nothing is made. Errors: InvalidArgument, AlreadyExists (the name),
// FailedPrecondition (machines can't be had here).
func (e *Engine) MachineCreate(ctx context.Context, r *machine.Record, start bool) (_ Machine, err error) {
	if e.isClosing() {
		return Machine{}, errdefs.ErrUnavailable.WithMessage("the daemon is shutting down")
	}
	if err := r.Complete(runtime.NumCPU()); err != nil {
		return Machine{}, err
	}
	for _, s := range r.Shares {
		if st, err := os.Stat(s.Path); err != nil || !st.IsDir() {
			return Machine{}, invalid("share %s: it is no directory of the host", s.Path)
		}
		if real, err := filepath.EvalSymlinks(s.Path); err != nil || real != s.Path { // links can be changed, by another's tenants, too
			return Machine{}, invalid("share %s: a symbolic link is on the way to it; give %s", s.Path, real)
		}
	}
	if _, err := e.machines(ctx); err != nil {
		return Machine{}, err
	}
	b := make([]byte, 10)
	if _, err := rand.Read(b); err != nil {
		return Machine{}, fmt.Errorf("machine id: %w", err)
	}
	r.V, r.ID, r.Created = machine.Version, "m"+hex.EncodeToString(b)[:19], time.Now().UTC()
	r.Facts = machine.Facts{Pending: machine.Creating}
	m := newMach(r)
	if err := m.op.lock(ctx); err != nil {
		return Machine{}, err
	}
	defer m.op.unlock()
	ctx = context.WithoutCancel(ctx) // a client that hangs up leaves nothing half-made
	e.mu.Lock()
	taken := e.machs[r.Name] != nil
	if !taken {
		e.machs[r.Name] = m
	}
	e.mu.Unlock()
	if taken {
		return Machine{}, errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("Conflict. The machine name %q is already in use", r.Name))
	}
	var u undo
	defer func() { err = u.onError(ctx, err) }()
	u.add("record", func(context.Context) error { return e.forgetMach(m) })
	if err := e.changeMach(m, func(*machine.Record) {}); err != nil {
		return Machine{}, err
	}
	u.add("files", func(context.Context) error { return os.RemoveAll(e.machineDir(m.id)) })
	if err := os.MkdirAll(e.machineDir(m.id), 0o700); err != nil {
		return Machine{}, fmt.Errorf("machine %s: %w", r.Name, err)
	}
	if err := failpoint("machine-made"); err != nil {
		return Machine{}, err
	}
	if start {
		if err := e.startMachLocked(ctx, m); err != nil {
			return Machine{}, err
		}
	} else if err := e.changeMach(m, func(r *machine.Record) { r.Facts.Pending = "" }); err != nil {
		return Machine{}, err
	}
	e.emitMach(m, events.ActionCreate, nil)
	if start {
		e.emitMach(m, events.ActionStart, nil)
	}
	return e.describeMach(ctx, m, false), nil
}

// forgetMach takes the record and the name away.
func (e *Engine) forgetMach(m *mach) error {
	m.mu.Lock()
	m.gone = true
	m.mu.Unlock()
	e.mu.Lock()
	if name := m.record().Name; e.machs[name] == m {
		delete(e.machs, name)
	}
	e.mu.Unlock()
	return e.cfg.DB.Delete(machinesBucket, m.id)
}

// MachineRemoveOptions says how a machine is removed.
type MachineRemoveOptions struct {
	Force   bool // end it, and remove its containers
	Volumes bool // and the volumes made by its own socket
	// Removing is called with the name of the machine once its removal is certain, and
	// before the name can be another's. May be nil.
	Removing func(name string)
}

// MachineLabel says, on a network or volume, which machine's own socket made it
// and shows it.
const MachineLabel = "tenon.machine"

// MachineRemove removes a machine and its disk. FailedPrecondition if it runs or
// has containers, without force.
func (e *Engine) MachineRemove(ctx context.Context, ref string, o MachineRemoveOptions) error {
	m, err := e.findMach(ref)
	if err != nil {
		return err
	}
	if err := m.op.lock(ctx); err != nil {
		return err
	}
	defer m.op.unlock()
	return e.removeMachLocked(context.WithoutCancel(ctx), m, o)
}

func (e *Engine) removeMachLocked(ctx context.Context, m *mach, o MachineRemoveOptions) error {
	m.mu.Lock()
	gone := m.gone
	m.mu.Unlock()
	r := m.record()
	if gone {
		return notFound("No such machine: %s", r.Name)
	}
	list := e.containersOf(m)
	switch {
	case o.Force:
	case len(list) > 0:
		return conflict("cannot remove machine %q: it has %d containers; remove them first, or force", r.Name, len(list))
	case r.Running():
		return conflict("cannot remove machine %q: it is running; stop it first, or force", r.Name)
	}
	m.cancelRetry()
	if err := e.changeMach(m, func(r *machine.Record) {
		r.Facts.Pending, r.Facts.Wanted, r.Facts.Volumes = machine.Removing, false, o.Volumes
	}); err != nil {
		return err
	}
	if o.Removing != nil {
		o.Removing(r.Name)
	}
	if err := failpoint("machine-removing"); err != nil {
		return err
	}
	return e.finishRemoveMach(ctx, m)
}

// finishRemoveMach does the rest of a removal, also of one that was cut off.
func (e *Engine) finishRemoveMach(ctx context.Context, m *mach) error {
	if k := m.current(); k != nil { // its disk goes: nothing is to be written back
		e.endKernel(ctx, m, k, false, "the machine was removed")
	}
	var errs []error
	for _, c := range e.containersOf(m) {
		if err := e.remove(ctx, c, RemoveOptions{Force: true, Volumes: true}); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("machine %s: %w", m.record().Name, err)
	}
	e.dropTenants(ctx, m.record().Name, m.record().Facts.Volumes)
	if err := os.RemoveAll(e.machineDir(m.id)); err != nil {
		return fmt.Errorf("machine %s: %w", m.record().Name, err)
	}
	if err := e.forgetMach(m); err != nil {
		return err
	}
	e.emitMach(m, events.ActionDestroy, nil)
	return nil
}

// dropTenants removes the networks that a machine's socket has made, and its
// volumes if asked to.
func (e *Engine) dropTenants(ctx context.Context, name string, volumes bool) {
	nets, err := e.cfg.Networks.List(ctx, map[string][]string{"label": {MachineLabel + "=" + name}})
	if err != nil {
		e.log.Warn("networks of a removed machine are left", "machine", name, "err", err)
	}
	for i := range nets {
		if err := e.cfg.Networks.Remove(ctx, nets[i].ID); err != nil {
			e.log.Warn("network of a removed machine is left", "machine", name, "network", nets[i].Name, "err", err)
		}
	}
	for _, v := range e.cfg.Volumes.List() {
		if !volumes || v.Labels[MachineLabel] != name || len(e.volumeUsers(v.Name, "")) > 0 {
			continue
		}
		if err := e.cfg.Volumes.Remove(ctx, v.Name); err != nil {
			e.log.Warn("volume of a removed machine is left", "machine", name, "volume", v.Name, "err", err)
			continue
		}
		e.emitVolume(v.Name, events.ActionDestroy, nil)
	}
}

// MachinePrune removes the machines that don't run and have no containers. removing is
// MachineRemoveOptions'.
func (e *Engine) MachinePrune(ctx context.Context, f Filters, removing func(name string)) ([]string, error) {
	if err := checkFilters(f, "label"); err != nil {
		return nil, err
	}
	out := []string{}
	for _, m := range e.allMachs() {
		r := m.record()
		if !matchLabels(f["label"], r.Labels) || r.Running() || r.Facts.Pending != "" || r.Facts.Wanted && r.Restart == machine.Always {
			continue
		}
		switch err := e.MachineRemove(ctx, r.Name, MachineRemoveOptions{Removing: removing}); {
		case err == nil:
			out = append(out, r.Name)
		case !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err):
			return out, err
		}
	}
	slices.Sort(out)
	return out, nil
}

// loadMachs reads the records.
func (e *Engine) loadMachs() error {
	return e.cfg.DB.Each(machinesBucket, func(_ string, value []byte) error {
		r := new(machine.Record)
		if err := json.Unmarshal(value, r); err != nil {
			return err
		}
		if r.V != machine.Version || r.ID == "" || machine.CheckName(r.Name) != nil {
			return fmt.Errorf("machine record version %s, this program knows %d", strconv.Itoa(r.V), machine.Version)
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.machs[r.Name] != nil {
			return fmt.Errorf("two machines are named %s", r.Name)
		}
		e.machs[r.Name] = newMach(r)
		return nil
	})
}
