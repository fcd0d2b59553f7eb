package engine

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// bootTime bounds the start of a machine: an emulated one takes a while, and the
// first of all waits for the template.
const bootTime = 5 * time.Minute

// guestsTime is how long the containers of a machine that is stopped may take
// together, whatever they have as their own stop time: a tenant may have asked for any.
// Who stops it can say another.
const guestsTime = 2 * time.Minute

// MachineStart starts a machine, and then the containers on it that their
// policies want. ErrNotModified if it runs.
func (e *Engine) MachineStart(ctx context.Context, ref string) error {
	m, err := e.findMach(ref)
	if err != nil {
		return err
	}
	return e.startMach(context.WithoutCancel(ctx), m, true)
}

func (e *Engine) startMach(ctx context.Context, m *mach, byUser bool) error {
	if err := m.op.lock(ctx); err != nil {
		return err
	}
	defer m.op.unlock()
	m.mu.Lock()
	gone := m.gone
	if byUser {
		m.backoff = backoff{}
	}
	m.mu.Unlock()
	if k := m.current(); k != nil && (isClosed(k.over) || isClosed(k.machine.Ended())) { // its end is under way
		waitFor(ctx, k.gone, removeTime+killTime)
	}
	r := m.record()
	switch {
	case gone || r.Facts.Pending == machine.Removing:
		return notFound("No such machine: %s", r.Name)
	case m.current() != nil:
		return ErrNotModified
	case e.isClosing():
		return errdefs.ErrUnavailable.WithMessage("the daemon is shutting down")
	case !byUser && !r.Facts.Wanted:
		return ErrNotModified // stopped while the restart was waiting
	}
	if byUser {
		m.cancelRetry()
	}
	if err := e.startMachLocked(ctx, m); err != nil {
		return err
	}
	e.emitMach(m, events.ActionStart, nil)
	e.startGuests(m)
	return nil
}

// startMachLocked boots the machine, with its op lock held.
func (e *Engine) startMachLocked(ctx context.Context, m *mach) (err error) {
	ctx, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	pending := machine.Starting
	if m.record().Facts.Pending == machine.Creating {
		pending = machine.Creating
	}
	if err := e.changeMach(m, func(r *machine.Record) { r.Facts.Pending, r.Facts.Wanted = pending, true }); err != nil {
		return err
	}
	defer func() {
		if err != nil && pending == machine.Starting {
			if e2 := e.changeMach(m, func(r *machine.Record) {
				r.Facts.Pending, r.Facts.Error, r.Facts.Crashed = "", err.Error(), true
			}); e2 != nil {
				e.log.Error("failed start of a machine is not recorded", "machine", m.record().Name, "err", e2)
			}
		}
	}()
	if err := failpoint("machine-start"); err != nil {
		return err
	}
	if _, err := e.machines(ctx); err != nil {
		return err
	}
	r := m.record()
	dir := e.machineDir(m.id)
	vm, err := e.cfg.Machines.Create(ctx, sandbox.MachineRequest{
		ID: m.id, Hostname: r.Name, Memory: r.Memory, CPUs: r.CPUs,
		Lasting: &sandbox.Lasting{
			Name: r.Name, Data: filepath.Join(dir, "data.img"), DataSize: r.Disk,
			KernelLog: filepath.Join(dir, "kernel.log"), Containers: idsOf(e.containersOf(m)),
		},
	})
	if err != nil {
		return fmt.Errorf("machine %s: %w", r.Name, err)
	}
	k := e.newKernel(vm)
	client, seq, err := k.connect(ctx)
	if err == nil {
		err = failpoint("machine-started")
	}
	if err == nil {
		err = e.changeMach(m, func(r *machine.Record) { e.noteMach(r, k) })
	}
	if err != nil {
		k.once.Do(func() { close(k.over) })
		k.link.close()
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTime)
		defer cancel()
		return errors.Join(fmt.Errorf("machine %s: %w", r.Name, err), vm.Remove(rctx))
	}
	m.setKernel(k)
	e.spawn(func() { e.watchMachine(k, client, seq, lasting{e, m, k}) })
	return nil
}

// noteMach records that the machine runs.
func (e *Engine) noteMach(r *machine.Record, k *kernel) {
	f, p, x := k.machine.Facts(), k.machine.Proof(), &r.Facts
	if !r.Running() || x.Pending != "" {
		x.Started = time.Now().UTC()
	}
	x.Pending, x.Wanted, x.Crashed, x.Error = "", true, false, ""
	x.BootID, x.HostBoot, x.Kernel = f.BootID, e.cfg.Kernel.Facts().BootID, f.KernelRelease
	x.Pid, x.Accel, x.KernelLog = p.Pid, p.Accel, p.KernelLog
}

// MachineStop stops the containers of a machine, and then it. ErrNotModified if it
// does not run.
func (e *Engine) MachineStop(ctx context.Context, ref string, o StopOptions) error {
	m, err := e.findMach(ref)
	if err != nil {
		return err
	}
	if err := m.op.lock(ctx); err != nil {
		return err
	}
	defer m.op.unlock()
	return e.stopMachLocked(context.WithoutCancel(ctx), m, o)
}

// MachineRestart is a stop and a start.
func (e *Engine) MachineRestart(ctx context.Context, ref string, o StopOptions) error {
	if err := e.MachineStop(ctx, ref, o); err != nil && !errors.Is(err, ErrNotModified) {
		return err
	}
	err := e.MachineStart(ctx, ref)
	if errors.Is(err, ErrNotModified) {
		return nil
	}
	return err
}

func (e *Engine) stopMachLocked(ctx context.Context, m *mach, o StopOptions) error {
	m.cancelRetry()
	k := m.current()
	if r := m.record(); k == nil {
		if !r.Facts.Wanted {
			return ErrNotModified
		}
		err := e.changeMach(m, func(r *machine.Record) { r.Facts.Wanted = false }) // it waited for a restart
		for _, c := range e.containersOf(m) {
			e.restNow(c)
		}
		return err
	}
	if err := e.changeMach(m, func(r *machine.Record) { r.Facts.Pending, r.Facts.Wanted = machine.Stopping, false }); err != nil {
		return err
	}
	if err := failpoint("machine-stopping"); err != nil {
		return err
	}
	end := time.Now().Add(guestsTime)
	sctx := ctx
	if o.Timeout == nil { // what has not ended then ends with the machine
		var cancel context.CancelFunc
		sctx, cancel = context.WithDeadline(ctx, end.Add(2*killTime))
		defer cancel()
	}
	slots := make(chan struct{}, shutdownParallel)
	var wg sync.WaitGroup
	for _, c := range e.containersOf(m) {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			e.restNow(c)
			own := o
			if d := e.stopTimeout(c.record(), o); o.Timeout == nil && (d < 0 || d > time.Until(end)) {
				secs := max(0, int(time.Until(end)/time.Second))
				own.Timeout = &secs
			}
			if err := e.stopForShutdown(sctx, c, own); err != nil && !errors.Is(err, ErrNotModified) {
				e.log.Warn("container does not end before its machine", "container", c.id, "machine", m.record().Name, "err", err)
			}
		})
	}
	wg.Wait()
	e.endKernel(ctx, m, k, true, "the machine was stopped")
	err := e.changeMach(m, func(r *machine.Record) {
		r.Facts.Pending, r.Facts.Finished, r.Facts.Pid, r.Facts.Crashed, r.Facts.Error = "", time.Now().UTC(), 0, false, ""
	})
	e.emitMach(m, events.ActionStop, nil)
	return err
}

// restNow ends a restart of a container that waits; its policy starts it when the
// machine is started.
func (e *Engine) restNow(c *ctr) {
	if !c.record().Facts.Restarting {
		return
	}
	c.cancelRetry()
	if err := e.change(c, func(r *container.Record) { r.Facts.Restarting = false }); err != nil {
		e.log.Error("restart is not taken back", "container", c.id, "err", err)
	}
}

// endKernel ends a machine that runs, and what still runs on it; with write the
// disk is written back.
func (e *Engine) endKernel(ctx context.Context, m *mach, k *kernel, write bool, why string) {
	for _, c := range e.containersOf(m) {
		if err := e.endOffline(ctx, c, false); err != nil {
			e.log.Warn("a container's files are in use while its machine ends", "container", c.id, "err", err)
		}
	}
	k.once.Do(func() { close(k.over) })
	if write {
		if err := powerOff(ctx, k.machine); err != nil {
			e.log.Warn("machine does not power off", "machine", m.record().Name, "err", err)
		}
	}
	m.setKernel(nil)
	k.link.close()
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTime)
	defer cancel()
	if err := k.machine.Remove(rctx); err != nil {
		e.log.Error("something of a machine is left", "machine", m.record().Name, "err", err)
	}
	e.lostOn(m, k, why)
}

// lostOn ends the runs of the containers that were on a machine when it ended.
func (e *Engine) lostOn(m *mach, k *kernel, why string) {
	var wg sync.WaitGroup
	for _, c := range e.containersOf(m) {
		g := c.onMachine()
		if g == nil || g.kernel != k {
			continue
		}
		c.mu.Lock()
		rn := c.run
		c.guest = nil
		c.mu.Unlock()
		if rn == nil {
			continue
		}
		wg.Go(func() {
			e.exited(nil, c, rn, exitFacts{code: 137, at: time.Now(), unknown: "machine " + m.record().Name + " ended: " + why})
		})
	}
	wg.Wait()
}

// lasting keeps a machine that holds several containers.
type lasting struct {
	e *Engine
	m *mach
	k *kernel
}

func (l lasting) found(client *task.Client, procs []*taskv1.Process) {
	tasks := initTasks(procs)
	for _, c := range l.e.containersOf(l.m) {
		c.mu.Lock()
		rn, g := c.run, c.guest
		c.mu.Unlock()
		if rn != nil && g != nil && g.kernel == l.k {
			l.e.ended(client, c, rn, tasks[c.id])
		}
	}
}

// lost is the crash of a machine: its containers end, and it is started again by
// its policy.
func (l lasting) lost(why error) {
	e, m, k := l.e, l.m, l.k
	text := k.end(why)
	e.log.Warn("a machine ended", "machine", m.record().Name, "reason", text)
	if m.current() != k {
		return
	}
	k.once.Do(func() { close(k.over) })
	k.link.close()
	var ran time.Duration
	err := e.changeMach(m, func(r *machine.Record) {
		f := &r.Facts
		f.Finished, f.Pid, f.Crashed, f.Error = time.Now().UTC(), 0, true, text
		ran = f.Finished.Sub(f.Started)
	})
	if err != nil {
		e.log.Error("end of a machine is not recorded", "machine", m.record().Name, "err", err)
	}
	e.emitMach(m, events.ActionDie, map[string]string{"reason": text})
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), removeTime)
	defer cancel()
	if err := k.machine.Remove(ctx); err != nil {
		e.log.Error("something of a machine is left", "machine", m.record().Name, "err", err)
	}
	m.mu.Lock()
	if m.kernel == k { // from here on it can be started again
		m.kernel = nil
	}
	m.mu.Unlock()
	close(k.gone)
	e.lostOn(m, k, text)
	e.restartMach(m, ran)
}

// restartMach starts a machine again after it ended by itself, if its policy says
// so. ran is how long it ran.
func (e *Engine) restartMach(m *mach, ran time.Duration) {
	r := m.record()
	m.mu.Lock()
	if m.gone || !r.Facts.Wanted || r.Facts.Pending != "" || r.Restart != machine.Always || e.isClosing() {
		m.mu.Unlock()
		for _, c := range e.containersOf(m) {
			e.restNow(c) // nothing will start them but the machine's next start
		}
		return
	}
	m.backoff = m.backoff.next(ran)
	pause := m.backoff.pause
	ctx, cancel := context.WithCancel(e.ctx)
	m.retry = cancel
	m.mu.Unlock()
	e.spawn(func() {
		defer cancel()
		t := time.NewTimer(pause)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		err := e.startMach(context.WithoutCancel(ctx), m, false)
		switch {
		case err == nil:
			if err := e.changeMach(m, func(r *machine.Record) { r.Facts.Restarts++ }); err != nil {
				e.log.Error("restart of a machine is not recorded", "machine", r.Name, "err", err)
			}
		case errors.Is(err, ErrNotModified), errdefs.IsNotFound(err), ctx.Err() != nil:
		default:
			e.log.Error("machine could not be restarted", "machine", r.Name, "err", err)
			e.restartMach(m, 0)
		}
	})
}

// cancelRetry ends a restart that waits.
func (m *mach) cancelRetry() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.retry != nil {
		m.retry()
		m.retry = nil
	}
}

// startGuests starts the containers of a machine that has just been started, by
// their policies.
func (e *Engine) startGuests(m *mach) {
	for _, c := range e.containersOf(m) {
		r := c.record()
		f := &r.Facts
		switch {
		case c.isGone() || r.Running() || f.Removing || f.Dead:
			continue
		case f.Restarting:
			c.cancelRetry()
		case restartAtBoot(r.HostConfig.RestartPolicy, f.ExitCode, f.RestartCount, f.Stopped, !f.Started.IsZero(), false):
			if err := e.change(c, func(r *container.Record) { r.Facts.Restarting = true }); err != nil {
				e.log.Error("restart is not recorded", "container", c.id, "err", err)
			}
		default:
			continue
		}
		e.scheduleRestart(c, 0)
	}
}

// startPoll is how often a start that is waited for is looked at.
const startPoll = 50 * time.Millisecond

// started is running after a start that is under way: a daemon that has just
// started starts its machines, too.
func (m *mach) started(ctx context.Context) (*kernel, error) {
	for m.record().State() == machine.Starting {
		select {
		case <-time.After(startPoll):
		case <-ctx.Done():
			return nil, conflict("machine %s is still starting", m.record().Name)
		}
	}
	return m.running()
}

// waitsForMachine says that a container's restart has to wait for its machine, and
// that its machine will be started again.
func (e *Engine) waitsForMachine(c *ctr) (waits, hopeful bool) {
	m := e.machOf(c.record())
	if m == nil {
		return false, false
	}
	if _, err := m.running(); err == nil {
		return false, false
	}
	r := m.record()
	return true, r.Facts.Wanted && (r.Restart == machine.Always || r.Facts.Pending == machine.Starting)
}

// endAllMachs ends all machines that last, in order, and leaves them to be started
// by the next daemon.
func (e *Engine) endAllMachs(ctx context.Context) {
	var wg sync.WaitGroup
	for _, m := range e.allMachs() {
		m.cancelRetry()
		k := m.current()
		if k == nil {
			continue
		}
		wg.Go(func() {
			e.endKernel(ctx, m, k, true, "the daemon was shut down")
			if err := e.changeMach(m, func(r *machine.Record) { r.Facts.Finished, r.Facts.Pid = time.Now().UTC(), 0 }); err != nil {
				e.log.Error("end of a machine is not recorded", "machine", m.record().Name, "err", err)
			}
		})
	}
	wg.Wait()
}
