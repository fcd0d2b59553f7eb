package engine

import (
	"context"
	"sync"
	"time"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// foundMachine is what recovery knows of a container with a kernel of its own.
type foundMachine struct {
	verdict verdict
	machine sandbox.Machine // nil: there is none
	guest   *guest          // connected; nil: it does not answer, or there is none
	client  *task.Client
	task    *taskv1.Process
	seq     uint64
}

// findMachines judges the containers with kernels of their own by the machines
// that an earlier engine left; what belongs to nobody is removed.
func (e *Engine) findMachines(ctx context.Context) map[*ctr]*foundMachine {
	machines := map[string]sandbox.Machine{}
	if e.cfg.Machines != nil {
		list, err := e.cfg.Machines.List(ctx)
		if err != nil {
			e.log.Error("virtual machines are not known; containers on them are taken for lost", "err", err)
		}
		for _, m := range list {
			machines[m.ID()] = m
		}
	}
	answers := e.askMachines(ctx, machines)
	out := map[*ctr]*foundMachine{}
	for _, m := range e.allMachs() {
		vm := machines[m.id]
		delete(machines, m.id)
		e.findGuests(ctx, m, vm, answers[m.id], out)
	}
	for _, c := range e.all() {
		if onHost(c.record()) || out[c] != nil {
			continue
		}
		f := &foundMachine{machine: machines[machineID(c.id)]}
		delete(machines, machineID(c.id))
		if a := answers[machineID(c.id)]; a != nil {
			f.guest, f.client, f.seq, f.task = &guest{kernel: a.kernel}, a.client, a.seq, initTasks(a.procs)[c.id]
			f.guest.root = f.machine.Root(c.id, e.hasLayers(ctx, c.record()))
		}
		f.verdict = decide(seen{record: c.record(), task: f.task, run: runOf(f.task)})
		out[c] = f
	}
	for _, m := range machines {
		e.log.Warn("virtual machine without a container is ended", "machine", m.ID())
		if isOffline(m) && !isClosed(m.Ended()) { // what was written to its disks is to stay
			if err := powerOff(ctx, m); err != nil {
				e.log.Error("what was written to a container's files may be lost", "machine", m.ID(), "err", err)
			}
		}
		if err := m.Remove(ctx); err != nil {
			e.log.Error("virtual machine without a container is left", "machine", m.ID(), "err", err)
		}
	}
	return out
}

// answer is what a machine's shim has.
type answer struct {
	kernel *kernel // connected
	client *task.Client
	seq    uint64
	procs  []*taskv1.Process
}

// askMachines asks the shims of all that somebody has, at once; those that don't
// answer, in the time that a guest may hang for, or end, are not in the result.
func (e *Engine) askMachines(ctx context.Context, machines map[string]sandbox.Machine) map[string]*answer {
	owned := map[string]bool{}
	for _, m := range e.allMachs() {
		owned[m.id] = true
	}
	for _, c := range e.all() {
		owned[machineID(c.id)] = true
	}
	ctx, cancel := context.WithTimeout(ctx, e.cfg.HangTime)
	defer cancel()
	out := map[string]*answer{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for id, m := range machines {
		if !owned[id] || isClosed(m.Ended()) {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			go func() {
				select {
				case <-m.Ended():
					cancel()
				case <-ctx.Done():
				}
			}()
			a := &answer{kernel: e.newKernel(m)}
			var err error
			if a.client, a.seq, err = a.kernel.connect(ctx); err == nil {
				a.procs, a.seq, err = a.client.List(ctx, "")
			}
			if err != nil {
				e.log.Error("virtual machine does not answer", "machine", id, "err", err)
				a.kernel.link.close()
				return
			}
			mu.Lock()
			defer mu.Unlock()
			out[id] = a
		})
	}
	wg.Wait()
	return out
}

// hasLayers says whether a container's root has a disk for its image.
func (e *Engine) hasLayers(ctx context.Context, r *container.Record) bool {
	img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
	if err != nil {
		return true
	}
	return img.ChainID != ""
}

// applyMachines acts on the verdicts and returns when each has been acted on.
func (e *Engine) applyMachines(ctx context.Context, found map[*ctr]*foundMachine) {
	slots := make(chan struct{}, recoverParallel)
	var wg sync.WaitGroup
	for c, f := range found {
		if f.verdict == settled && (f.machine == nil || f.machine.Lasting()) {
			continue
		}
		e.log.Info("container found again", "container", c.id, "name", c.record().Name, "isolation", c.record().Isolation, "verdict", f.verdict.String())
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			err := e.actMachine(ctx, c, f)
			if err == nil {
				return
			}
			e.log.Error("container could not be taken over", "container", c.id, "verdict", f.verdict.String(), "err", err)
			if f.verdict == finishRemove || f.verdict == undoStart && c.record().HostConfig.AutoRemove {
				e.removeLater(c, RemoveOptions{Force: true, Volumes: c.record().Facts.Volumes || c.record().HostConfig.AutoRemove})
			}
		})
	}
	wg.Wait()
}

// actMachine does what a verdict says for one container with a kernel of its
// own.
func (e *Engine) actMachine(ctx context.Context, c *ctr, f *foundMachine) error {
	if (f.verdict == adopt || f.verdict == exited) && f.guest != nil {
		c.setMachine(f.guest)
		if r := c.record(); r.HostConfig.PidMode.IsHost() { // with which rights its processes run is not known any more
			f.machine.Taint(e.reachOf(r))
		}
		if f.verdict == exited && isSystem(c.record()) {
			if err := e.noteStart(c, f.task); err != nil {
				return err
			}
			e.exited(f.client, c, c.runOrNew(), exitFacts{code: int(f.task.ExitStatus), at: time.Unix(0, f.task.ExitedAt), unknown: e.systemEnd(ctx, f)})
			return nil
		}
		if err := e.act(ctx, f.client, c, f.verdict, f.task); err != nil || f.verdict == exited {
			return err
		}
		if !f.machine.Lasting() { // that has somebody who watches it
			rn := c.runOrNew()
			e.spawn(func() { e.watchMachine(f.guest.kernel, f.client, f.seq, onlyGuest{e, c, rn, f.guest}) })
		}
		return nil
	}
	if machine.Named(c.record().Isolation) != "" {
		return e.actGuest(ctx, c, f)
	}
	var reason string
	if f.machine != nil {
		if reason = f.machine.End(); reason == "" && f.guest == nil {
			reason = "it did not answer"
		}
		if f.guest != nil {
			f.guest.link.close()
		}
		if err := f.machine.Remove(ctx); err != nil { // the container does not run for that
			e.log.Error("something of a container's virtual machine is left for now", "container", c.id, "err", err)
			e.again("virtual machine "+f.machine.ID(), f.machine.Remove)
		}
	}
	if f.verdict == lost && reason != "" {
		e.exited(nil, c, c.runOrNew(), exitFacts{code: 137, at: time.Now(), unknown: "the container's virtual machine ended: " + reason})
		return nil
	}
	return e.act(ctx, nil, c, f.verdict, nil)
}

// killedByUser is tenon-vmm's word for the end of a system that somebody asked for.
const killedByUser = "it was killed"

// systemEnd says why a system ended that nobody looked at, as the event of its end
// does; empty: it turned itself off, or was killed by its user.
func (e *Engine) systemEnd(ctx context.Context, f *foundMachine) string {
	if f.task.ExitStatus == 0 {
		return ""
	}
	if f.machine.End() == "" { // it ended since they were listed
		if _, err := e.cfg.Machines.List(ctx); err != nil {
			e.log.Warn("why a machine ended is not known", "machine", f.machine.ID(), "err", err)
		}
	}
	why := f.machine.End()
	if why == "" || why == killedByUser {
		return ""
	}
	return "the machine ended: " + why
}
