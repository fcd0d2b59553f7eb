package engine

import (
	"context"
	"errors"
	"time"

	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// findGuests judges the containers of a machine that lasts. vm is what an earlier
// engine left of it; nil: it does not run; a is nil if it does not answer.
func (e *Engine) findGuests(ctx context.Context, m *mach, vm sandbox.Machine, a *answer, out map[*ctr]*foundMachine) {
	var k *kernel
	var client *task.Client
	var seq uint64
	tasks := map[string]*taskv1.Process{}
	if a != nil {
		k, client, seq, tasks = a.kernel, a.client, a.seq, initTasks(a.procs)
		m.setKernel(k)
		e.dropTasks(ctx, client, tasks)
	}
	for _, c := range e.containersOf(m) {
		f := &foundMachine{machine: vm, client: client, seq: seq, task: tasks[c.id]}
		if k != nil {
			f.guest = &guest{kernel: k, root: vm.Root(c.id, e.hasLayers(ctx, c.record()))}
		}
		f.verdict = decide(seen{record: c.record(), task: f.task, run: runOf(f.task)})
		out[c] = f
	}
	if k != nil {
		e.spawn(func() { e.watchMachine(k, client, seq, lasting{e, m, k}) })
		return
	}
	if vm != nil {
		if err := vm.Remove(ctx); err != nil {
			e.log.Error("something of a machine is left", "machine", m.record().Name, "err", err)
		}
	}
	if r := m.record(); r.Running() && r.Facts.Pending != machine.Removing {
		why := "the host was restarted while it ran"
		switch {
		case vm != nil && vm.End() != "":
			why = vm.End()
		case r.Facts.HostBoot == e.cfg.Kernel.Facts().BootID:
			why = "it ended while the daemon was away"
		}
		err := e.changeMach(m, func(r *machine.Record) {
			f := &r.Facts
			f.Finished, f.Pid, f.Crashed, f.Error = time.Now().UTC(), 0, true, why
		})
		if err != nil {
			e.log.Error("end of a machine is not recorded", "machine", r.Name, "err", err)
		}
		e.emitMach(m, "die", map[string]string{"reason": why})
	}
}

// dropTasks ends what no record knows on a machine that lasts.
func (e *Engine) dropTasks(ctx context.Context, client *task.Client, tasks map[string]*taskv1.Process) {
	for id := range tasks {
		e.mu.Lock()
		known := e.ctrs[id] != nil || e.steps.get(id) != nil
		e.mu.Unlock()
		if known {
			continue
		}
		e.log.Warn("task without a container is ended", "container", id)
		if err := deleteTask(ctx, client, id); err != nil {
			e.log.Error("task without a container is left", "container", id, "err", err)
		}
	}
}

// actGuest is actMachine for a container that does not run on, on a machine that
// lasts.
func (e *Engine) actGuest(ctx context.Context, c *ctr, f *foundMachine) error {
	if f.guest != nil {
		var err error
		if f.task != nil {
			err = deleteTask(ctx, f.client, c.id)
		}
		if err == nil {
			err = e.leaveMachine(ctx, c, f.guest)
		}
		if err != nil { // it does not run for that: its next start, or its removal, tries again
			e.log.Error("something of a container is left on its machine for now", "container", c.id, "err", err)
			if f.task != nil {
				e.endTaskLater(c, f.guest)
			}
		}
	}
	if f.verdict == lost && f.guest == nil {
		why := "it ended while the daemon was away"
		if m := e.machOf(c.record()); m != nil && m.record().Facts.Error != "" {
			why = m.record().Facts.Error
		}
		e.exited(nil, c, c.runOrNew(), exitFacts{code: 137, at: time.Now(), unknown: machineText(c.record()) + " ended: " + why})
		return nil
	}
	return e.act(ctx, nil, c, f.verdict, nil)
}

// settleMachs goes on with what a daemon was killed at, and starts the machines
// that should run and don't.
func (e *Engine) settleMachs(ctx context.Context) {
	for _, c := range e.all() { // can't be, but for a machine whose record is lost
		if name := machine.Named(c.record().Isolation); name != "" && e.machOf(c.record()) == nil {
			e.log.Error("container's machine is not known", "container", c.id, "machine", name)
		}
	}
	for _, m := range e.allMachs() {
		r := m.record()
		k := m.current()
		switch pending := r.Facts.Pending; {
		case pending == machine.Creating || pending == machine.Removing:
			e.spawn(func() { e.dropMach(m) })
		case k != nil && pending == machine.Stopping:
			e.spawn(func() {
				if err := e.finishStop(m); err != nil {
					e.log.Error("machine is not stopped", "machine", r.Name, "err", err)
				}
			})
		case k != nil:
			if pending == machine.Starting || !r.Running() || r.Facts.Pid != k.machine.Proof().Pid {
				if err := e.changeMach(m, func(r *machine.Record) { e.noteMach(r, k) }); err != nil {
					e.log.Error("machine's start is not recorded", "machine", r.Name, "err", err)
				}
			}
			e.log.Info("machine found again", "machine", r.Name)
			if err := k.machine.Keep(ctx, idsOf(e.containersOf(m))); err != nil {
				e.log.Warn("files of removed containers are left on a machine until its next start", "machine", r.Name, "err", err)
			}
		default:
			if pending != "" {
				if err := e.changeMach(m, func(r *machine.Record) {
					if r.Facts.Pending == machine.Stopping || r.Running() {
						r.Facts.Finished = time.Now().UTC()
					}
					r.Facts.Pending = ""
				}); err != nil {
					e.log.Error("machine's state is not recorded", "machine", r.Name, "err", err)
				}
			}
			e.restartMach(m, 0)
		}
	}
}

// dropMach finishes a removal, or undoes a creation, that was cut off.
func (e *Engine) dropMach(m *mach) {
	drop := func(ctx context.Context) error {
		if err := m.op.lock(ctx); err != nil {
			return err
		}
		defer m.op.unlock()
		m.mu.Lock()
		gone := m.gone
		m.mu.Unlock()
		if gone {
			return nil
		}
		return e.finishRemoveMach(ctx, m)
	}
	ctx, cancel := context.WithTimeout(e.ctx, cleanTime)
	defer cancel()
	if err := drop(ctx); err != nil && e.ctx.Err() == nil {
		e.log.Error("machine is not removed", "machine", m.record().Name, "err", err)
		e.again("removal of machine "+m.record().Name, drop)
	}
}

// finishStop is a stop that was cut off.
func (e *Engine) finishStop(m *mach) error {
	ctx, cancel := context.WithTimeout(e.ctx, cleanTime)
	defer cancel()
	if err := m.op.lock(ctx); err != nil {
		return err
	}
	defer m.op.unlock()
	if err := e.stopMachLocked(ctx, m, StopOptions{}); !errors.Is(err, ErrNotModified) {
		return err
	}
	return nil
}
