package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// recoverParallel is how many containers are looked after at the same time.
const recoverParallel = 8

// Recover takes over what a former engine with the same directories left:
// running containers go on, half-made and half-removed ones are undone or
// finished, exits that happened in between get their consequences. One bad
// container does not stop the others.
func (e *Engine) Recover(ctx context.Context) error {
	unreadable := e.loadRecords()
	if unreadable != nil {
		e.log.Error("container records that can't be read are left alone", "err", unreadable)
	}
	if err := e.loadMachs(); err != nil {
		e.log.Error("machine records that can't be read are left alone", "err", err)
	}
	e.loaded.Store(true)
	client, _, err := e.cfg.Kernel.Connect(ctx)
	if err != nil {
		return err
	}
	at := time.Now()
	procs, seq, err := client.List(ctx, "")
	if err != nil {
		client.Close()
		return fmt.Errorf("shim: %w", err)
	}
	verdicts := e.judge(procs, at)
	found := e.findMachines(ctx)
	var live []string
	for c, v := range verdicts {
		if c != nil && v == adopt {
			live = append(live, c.id)
		}
	}
	for c, f := range found {
		if f.verdict == adopt {
			live = append(live, c.id)
		}
	}
	if err := e.cfg.Networks.Restore(ctx, live); err != nil {
		e.log.Error("networks could not be taken over whole", "err", err)
	}
	e.apply(ctx, client, procs, verdicts)
	e.shim.set(client)
	e.applyMachines(ctx, found)
	e.settleMachs(ctx)
	for c, f := range found {
		verdicts[c] = f.verdict
	}
	e.sweep()
	if unreadable == nil {
		e.dropOrphans(ctx)
	}
	e.spawn(func() { e.watch(client, seq) })
	e.restartAll(verdicts)
	return nil
}

// loadRecords reads both stores; of two copies the newer is true.
func (e *Engine) loadRecords() error {
	found := map[string]*container.Record{}
	read := func(_ string, value []byte) error {
		r := new(container.Record)
		if err := json.Unmarshal(value, r); err != nil {
			return err
		}
		if r.V != container.Version || r.ID == "" || r.Config == nil || r.HostConfig == nil {
			return fmt.Errorf("record version %d, this program knows %d", r.V, container.Version)
		}
		if old, ok := found[r.ID]; !ok || old.Seq < r.Seq {
			found[r.ID] = r
		}
		return nil
	}
	err := errors.Join(e.cfg.DB.Each(bucket, read), e.cfg.Volatile.Each(bucket, read))
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range found {
		if e.registry.Taken(r.Name) { // can't be; keep both reachable
			r.Name = r.Name + "_" + r.ID[:12]
		}
		if addErr := e.registry.Add(r.ID, r.Name); addErr != nil {
			err = errors.Join(err, addErr)
			continue
		}
		e.ctrs[r.ID] = newCtr(r)
	}
	return err
}

// judge compares the engine's containers with the shim's tasks, listed at a
// time. Tasks without a container are under the nil key's reap.
func (e *Engine) judge(procs []*taskv1.Process, at time.Time) map[*ctr]verdict {
	tasks := initTasks(procs)
	out := map[*ctr]verdict{}
	for _, c := range e.all() {
		if !onHost(c.record()) {
			continue
		}
		c.mu.Lock()
		rn := c.run
		c.mu.Unlock()
		if rn != nil {
			select {
			case <-rn.settled:
			default:
				continue // a start is under way; it finds out by itself
			}
			if isClosed(rn.exited) && !isClosed(rn.done) {
				continue // its cleaning is under way
			}
		}
		r := c.record()
		if r.Facts.Started.After(at) {
			continue
		}
		t := tasks[c.id]
		out[c] = decide(seen{record: r, task: t, run: runOf(t)})
	}
	return out
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

func initTasks(procs []*taskv1.Process) map[string]*taskv1.Process {
	m := map[string]*taskv1.Process{}
	for _, p := range procs {
		if p.ExecId == "" {
			m[p.Id] = p
		}
	}
	return m
}

func runOf(t *taskv1.Process) uint64 {
	if t == nil {
		return 0
	}
	text, ok := strings.CutPrefix(t.Owner, "run ")
	n, err := strconv.ParseUint(text, 10, 64)
	if !ok || err != nil {
		return 0
	}
	return n
}

// reconcile is judge and apply for a shim that was reconnected.
func (e *Engine) reconcile(ctx context.Context, client *task.Client, procs []*taskv1.Process, at time.Time) {
	e.apply(ctx, client, procs, e.judge(procs, at))
}

// apply acts on the verdicts and returns when each has been acted on.
func (e *Engine) apply(ctx context.Context, client *task.Client, procs []*taskv1.Process, verdicts map[*ctr]verdict) {
	tasks := initTasks(procs)
	slots := make(chan struct{}, recoverParallel)
	var wg sync.WaitGroup
	do := func(f func()) {
		wg.Add(1)
		slots <- struct{}{}
		go func() {
			defer func() { <-slots; wg.Done() }()
			f()
		}()
	}
	for c, v := range verdicts {
		if v == settled {
			continue
		}
		e.log.Info("container found again", "container", c.id, "name", c.record().Name, "verdict", v.String())
		do(func() {
			if err := e.act(ctx, client, c, v, tasks[c.id]); err != nil {
				e.log.Error("container could not be taken over", "container", c.id, "verdict", v.String(), "err", err)
			}
		})
	}
	for _, p := range procs {
		e.mu.Lock()
		known := e.ctrs[p.Id] != nil || e.steps.get(p.Id) != nil
		_, knownExec := e.execs[p.ExecId]
		knownExec = knownExec || e.steps.get(p.Id) != nil // the step deletes its own
		e.mu.Unlock()
		switch {
		case p.ExecId == "" && !known:
			e.log.Warn("task without a container is ended", "container", p.Id)
			do(func() {
				if err := deleteTask(ctx, client, p.Id); err != nil {
					e.log.Error("task without a container is left", "container", p.Id, "err", err)
				}
			})
		case p.ExecId != "" && !knownExec && p.Status == taskv1.Status_STATUS_STOPPED:
			do(func() {
				if _, err := client.Delete(ctx, p.Id, p.ExecId); err != nil && !errdefs.IsNotFound(err) {
					e.log.Warn("exec is left in the shim", "container", p.Id, "exec", p.ExecId, "err", err)
				}
			})
		}
	}
	wg.Wait()
}

// act does what a verdict says for one container.
func (e *Engine) act(ctx context.Context, client *task.Client, c *ctr, v verdict, t *taskv1.Process) error {
	if v == adopt {
		return e.adopt(c, t)
	}
	switch v {
	case exited:
		if err := e.noteStart(c, t); err != nil {
			return err
		}
		e.exited(client, c, c.runOrNew(), exitFacts{code: int(t.ExitStatus), at: time.Unix(0, t.ExitedAt), oom: t.OomKilled})
		return nil
	case lost:
		x := exitFacts{code: 255, at: time.Now(), unknown: "the machine was restarted while the container ran"}
		switch f, boot := &c.record().Facts, e.cfg.Kernel.Facts().BootID; {
		case f.Machine != nil && f.Machine.HostBoot == boot:
			x.code, x.unknown = 137, "the container's virtual machine ended while the daemon was away"
		case f.Machine == nil && f.BootID == boot: // what is left of it is killed when a new shim starts
			x.code, x.unknown = 137, "the container's shim was killed, and the container with it"
		}
		e.exited(client, c, c.runOrNew(), x)
		return nil
	}
	var errs []error
	if t != nil {
		errs = append(errs, deleteTask(ctx, client, c.id))
	}
	errs = append(errs, e.cfg.Networks.Disconnect(ctx, c.id), e.cfg.Kernel.Release(ctx, c.id))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	switch {
	case v == finishRemove, v == undoStart && c.record().HostConfig.AutoRemove:
		if err := c.op.lock(ctx); err != nil {
			return err
		}
		defer c.op.unlock()
		return e.removeLocked(ctx, c, RemoveOptions{Force: true, Volumes: c.record().Facts.Volumes || c.record().HostConfig.AutoRemove})
	case v == undoStart:
		return e.change(c, func(r *container.Record) {
			r.Facts.Pending, r.Facts.Error = "", "the daemon was killed while it started the container"
		})
	}
	return nil
}

// runOrNew is the container's run, which a daemon that has just started does
// not have yet.
func (c *ctr) runOrNew() *run {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.run == nil {
		c.run = newRun(c.record().Facts.Run)
		close(c.run.settled)
	}
	return c.run
}

// noteStart records a start whose record was cut off.
func (e *Engine) noteStart(c *ctr, t *taskv1.Process) error {
	if c.record().Facts.Pending != "start" {
		return nil
	}
	return e.change(c, func(r *container.Record) {
		f := &r.Facts
		f.Pending, f.Restarting, f.ExitCode = "", false, 0
		f.Started, f.BootID = time.Unix(0, t.StartedAt).UTC(), e.cfg.Kernel.Facts().BootID
		if g := c.onMachineLocked(); g != nil {
			f.BootID, f.Machine = g.machine.Facts().BootID, e.machineFacts(g)
			f.Pid = f.Machine.Pid
		}
		f.Health = initialHealth(r.Config)
	})
}

// adopt goes on with a running container; nothing of it is touched.
func (e *Engine) adopt(c *ctr, t *taskv1.Process) error {
	c.mu.Lock()
	fresh := c.run == nil
	c.mu.Unlock()
	if !fresh {
		return nil // the daemon has lived all the time
	}
	c.runOrNew()
	c.mu.Lock()
	c.noRetry = c.record().Facts.Stopped
	c.mu.Unlock()
	if err := e.noteStart(c, t); err != nil {
		return err
	}
	paused := t.Status == taskv1.Status_STATUS_PAUSED
	c.publish(func(r *container.Record) {
		if r.Facts.Paused = paused; c.onMachineLocked() == nil {
			r.Facts.Pid = int(t.Pid)
		}
	})
	if ns, err := e.cfg.Networks.Namespace(c.id); err == nil {
		c.setNetwork(ns)
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	if !paused {
		e.startHealth(c)
	}
	return nil
}

// restartAll starts what the restart policies want after the daemon was away.
func (e *Engine) restartAll(verdicts map[*ctr]verdict) {
	for c, v := range verdicts {
		if c.isGone() {
			continue
		}
		r := c.record()
		f := &r.Facts
		if r.Running() || f.Removing || f.Dead {
			continue
		}
		if waits, hopeful := e.waitsForMachine(c); waits { // its start decides
			if !hopeful {
				e.restNow(c)
			}
			continue
		}
		switch {
		case v == exited || v == lost:
			continue // decided with the exit
		case f.Restarting:
			e.scheduleRestart(c, firstPause)
		case restartAtBoot(r.HostConfig.RestartPolicy, f.ExitCode, f.RestartCount, f.Stopped, !f.Started.IsZero(), v == undoStart):
			if err := e.change(c, func(r *container.Record) { r.Facts.Restarting = true }); err != nil {
				e.log.Error("restart is not recorded", "container", c.id, "err", err)
			}
			e.scheduleRestart(c, 0)
		}
	}
}

// dropOrphans removes anonymous volumes whose container is not known: it was
// never made whole, or ended with the boot (--rm).
func (e *Engine) dropOrphans(ctx context.Context) {
	for _, v := range e.cfg.Volumes.List() {
		if v.Owner == "" {
			continue
		}
		e.mu.Lock()
		known := e.ctrs[v.Owner] != nil
		e.mu.Unlock()
		if known || len(e.volumeUsers(v.Name, "")) > 0 {
			continue
		}
		if err := e.cfg.Volumes.Remove(ctx, v.Name); err != nil {
			e.log.Warn("anonymous volume without its container is left", "volume", v.Name, "err", err)
			continue
		}
		e.emitVolume(v.Name, events.ActionDestroy, nil)
	}
}

// sweep removes files of containers that no record knows.
func (e *Engine) sweep() {
	known := func(id string) bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.ctrs[id] != nil
	}
	ids, err := e.cfg.Roots.List()
	if err != nil {
		e.log.Warn("root file systems can't be listed", "err", err)
	}
	for _, id := range ids {
		if !known(id) {
			if err := e.cfg.Roots.Remove(id); err != nil {
				e.log.Warn("root file system without a container is left", "container", id, "err", err)
			}
		}
	}
	for _, dir := range []string{filepath.Join(e.cfg.RunRoot, "containers"), filepath.Join(e.cfg.Root, "containers")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			e.log.Warn("containers' files can't be listed", "path", dir, "err", err)
		}
		for _, x := range entries {
			if !known(x.Name()) {
				if err := removeDir(filepath.Join(dir, x.Name())); err != nil {
					e.log.Warn("files without a container are left", "path", filepath.Join(dir, x.Name()), "err", err)
				}
			}
		}
	}
}
