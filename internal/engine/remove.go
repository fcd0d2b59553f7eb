package engine

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
)

// Remove removes a container. With Force a running one is killed first. A
// failure leaves a record that a later Remove, or recovery, goes on from.
func (e *Engine) Remove(ctx context.Context, ref string, o RemoveOptions) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if o.Link {
		return errdefs.ErrNotImplemented.WithMessage("removing a link alone is not available: connect the containers by a network of their own instead")
	}
	return e.remove(context.WithoutCancel(ctx), c, o)
}

func (e *Engine) remove(ctx context.Context, c *ctr, o RemoveOptions) error {
	for killed := false; ; {
		if r := c.record(); r.Running() || r.Facts.Restarting {
			if err := e.endForRemoval(ctx, c, o); err != nil {
				return err
			}
			killed = true
		}
		if err := c.op.lock(ctx); err != nil {
			return err
		}
		if c.isGone() {
			c.op.unlock()
			if killed && c.record().HostConfig.AutoRemove {
				return nil // it went by itself
			}
			return notFound("No such container: %s", c.id)
		}
		if c.record().Running() { // a start was under way: now it can be ended
			c.op.unlock()
			continue
		}
		err := e.removeLocked(ctx, c, o)
		c.op.unlock()
		return err
	}
}

// endForRemoval kills a running container, or refuses to.
func (e *Engine) endForRemoval(ctx context.Context, c *ctr, o RemoveOptions) error {
	r := c.record()
	if !o.Force {
		state := string(r.State())
		advice := "stop the container before removing or force remove"
		if r.State() == mobycontainer.StatePaused {
			advice = "unpause and then stop the container before removing or force remove"
		}
		return conflict("cannot remove container %q: container is %s: %s", r.Name, state, advice)
	}
	c.cancelRetry()
	rn, err := c.current(ctx)
	if err != nil {
		return err
	}
	if err := e.markStopped(c); err != nil {
		return err
	}
	if !c.record().Running() {
		return nil
	}
	if rn == nil {
		rn = c.runOrNew()
	}
	if err := e.signalOrEnd(c, rn, func() error { return e.signal(ctx, c, syscall.SIGKILL) }); err != nil {
		return fmt.Errorf("cannot remove container %q: kill it: %w", r.Name, err)
	}
	if !waitFor(ctx, rn.exited, killTime) {
		return fmt.Errorf("cannot remove container %q: it did not end within %v of SIGKILL", r.Name, killTime)
	}
	return nil
}

// removeLocked frees everything and the record last.
func (e *Engine) removeLocked(ctx context.Context, c *ctr, o RemoveOptions) (err error) {
	c.cancelRetry()
	if err := e.dependents(c); err != nil && !o.Force {
		return err
	}
	mark := func(r *container.Record) {
		f := &r.Facts
		f.Removing, f.Dead, f.Pending, f.Restarting, f.Volumes = true, false, "remove", false, f.Volumes || o.Volumes
	}
	if c.record().HostConfig.AutoRemove {
		c.publish(mark) // a record on tmpfs that says "running" without a task is removed by recovery too
	} else if err := e.change(c, mark); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if e2 := e.change(c, func(r *container.Record) { r.Facts.Removing, r.Facts.Dead, r.Facts.Error = false, true, err.Error() }); e2 != nil {
				err = errors.Join(err, e2)
			}
			c.mu.Lock()
			notifyLocked(&c.goneSubs, WaitResult{ExitCode: c.record().Facts.ExitCode, Error: err.Error()})
			c.mu.Unlock()
		}
	}()
	if err := failpoint("rm-marked"); err != nil {
		return err
	}
	if err := e.waitClean(ctx, c); err != nil {
		return err
	}
	if err := e.free(ctx, c); err != nil {
		return err
	}
	if err := failpoint("rm-freed"); err != nil {
		return err
	}
	if c.record().Facts.Volumes {
		e.removeAnonymous(ctx, c)
	} else if err := e.keepAnonymous(c); err != nil {
		return err
	}
	r := c.record()
	if err := e.saver.remove(r); err != nil {
		return fmt.Errorf("container %s: record: %w", c.id, err)
	}
	e.emit(c, events.ActionDestroy, nil)
	e.unregister(c)
	return nil
}

// releaseImages tells the image store that the container needs them no more.
func (e *Engine) releaseImages(r *container.Record) {
	e.cfg.Images.Released(r.Image.ID)
	for _, m := range r.Mounts {
		if m.Image != nil {
			e.cfg.Images.Released(m.Image.ID)
		}
	}
}

// waitClean waits until nothing of the last run is left in the kernel.
func (e *Engine) waitClean(ctx context.Context, c *ctr) error {
	c.mu.Lock()
	rn := c.run
	c.mu.Unlock()
	if rn == nil {
		return nil
	}
	select {
	case <-rn.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(cleanTime):
		return fmt.Errorf("container %s: what is left of its last run can't be freed", c.id)
	}
}

// free takes away everything but the record. Each step is no error if there is
// nothing (any more).
func (e *Engine) free(ctx context.Context, c *ctr) error {
	e.dropExecs(c)
	if err := e.cfg.Networks.Disconnect(ctx, c.id); err != nil {
		return fmt.Errorf("container %s: network: %w", c.id, err)
	}
	if err := e.releaseShm(ctx, c); err != nil {
		return err
	}
	if err := failpoint("rm-network"); err != nil {
		return err
	}
	if err := e.endOffline(ctx, c, false); err != nil {
		return fmt.Errorf("container %s: %w", c.id, err)
	}
	if err := e.discard(ctx, c); err != nil {
		return fmt.Errorf("container %s: %w", c.id, err)
	}
	if err := e.cfg.Roots.Remove(c.id); err != nil {
		return fmt.Errorf("container %s: root file system: %w", c.id, err)
	}
	if err := failpoint("rm-root"); err != nil {
		return err
	}
	if err := removeDir(e.runDir(c.id), networkFiles...); err != nil {
		return fmt.Errorf("container %s: %w", c.id, err)
	}
	if err := removeDir(filepath.Join(e.stateDir(c.id), "log")); err != nil {
		return fmt.Errorf("container %s: log: %w", c.id, err)
	}
	if err := removeDir(e.stateDir(c.id)); err != nil {
		return fmt.Errorf("container %s: %w", c.id, err)
	}
	return nil
}

// removeAnonymous removes the anonymous volumes that nobody else uses.
func (e *Engine) removeAnonymous(ctx context.Context, c *ctr) {
	for _, m := range c.record().Mounts {
		if m.Type != mount.TypeVolume || !m.Anonymous {
			continue
		}
		if len(e.volumeUsers(m.Name, c.id)) > 0 {
			if err := e.cfg.Volumes.Disown(m.Name); err != nil {
				e.log.Warn("anonymous volume belongs to a removed container", "container", c.id, "volume", m.Name, "err", err)
			}
			continue
		}
		if err := e.cfg.Volumes.Remove(ctx, m.Name); err != nil && !errdefs.IsNotFound(err) {
			e.log.Warn("anonymous volume is left", "container", c.id, "volume", m.Name, "err", err)
			continue
		}
		e.emitVolume(m.Name, events.ActionDestroy, nil)
	}
}

// keepAnonymous lets the anonymous volumes outlive the container.
func (e *Engine) keepAnonymous(c *ctr) error {
	for _, m := range c.record().Mounts {
		if m.Type == mount.TypeVolume && m.Anonymous {
			if err := e.cfg.Volumes.Disown(m.Name); err != nil {
				return fmt.Errorf("container %s: %w", c.id, err)
			}
		}
	}
	return nil
}

// dependents refuses the removal of a container whose namespaces others run in.
func (e *Engine) dependents(c *ctr) error {
	for _, other := range e.all() {
		r := other.record()
		if other == c || !r.Running() {
			continue
		}
		h := r.HostConfig
		if h.NetworkMode.ConnectedContainer() == c.id || h.IpcMode.Container() == c.id || h.PidMode.Container() == c.id {
			return conflict("cannot remove container %q: container %s runs in its namespaces; remove that one first, or force", c.record().Name, r.Name)
		}
	}
	return nil
}

// PruneContainers removes all stopped ones that pass the filters.
func (e *Engine) PruneContainers(ctx context.Context, f Filters) (mobycontainer.PruneReport, error) {
	return e.prune(ctx, f, "")
}

// TenantPrune is PruneContainers for those of one machine.
func (e *Engine) TenantPrune(ctx context.Context, name string, f Filters) (mobycontainer.PruneReport, error) {
	return e.prune(ctx, f, machine.Prefix+name)
}

// prune removes those of an isolation; empty: of any.
func (e *Engine) prune(ctx context.Context, f Filters, isolation string) (mobycontainer.PruneReport, error) {
	var rep mobycontainer.PruneReport
	sel, err := pruneFilter(f)
	if err != nil {
		return rep, err
	}
	for _, c := range e.all() {
		r := c.record()
		if r.Running() || r.Facts.Restarting || r.Facts.Removing || r.Facts.Pending == "start" || !sel(r) || isolation != "" && r.Isolation != isolation {
			continue
		}
		size := e.written(ctx, c)
		if err := e.remove(ctx, c, RemoveOptions{}); err != nil {
			e.log.Warn("container is not pruned", "container", c.id, "err", err)
			continue
		}
		rep.ContainersDeleted = append(rep.ContainersDeleted, c.id)
		rep.SpaceReclaimed += uint64(max(size, 0))
	}
	e.cfg.Events.Publish(events.Message{Type: events.ContainerEventType, Action: events.ActionPrune, Actor: events.Actor{Attributes: map[string]string{"reclaimed": utoa(uint(rep.SpaceReclaimed))}}})
	return rep, nil
}
