package engine

import (
	"context"
	"fmt"
	"runtime"

	"github.com/moby/moby/api/types/events"

	"tenon.dev/tenon/internal/machine"
)

// MachineUpdateOptions change a machine; zero values leave it as it is. Sizes are
// bytes.
type MachineUpdateOptions struct {
	CPUs         int
	Memory, Disk int64
	Restart      string
}

// MachineUpdate changes a machine, at once if it runs. Its disk only grows, and
// processors of one that runs can't be taken back. InvalidArgument,
// FailedPrecondition.
func (e *Engine) MachineUpdate(ctx context.Context, ref string, o MachineUpdateOptions) error {
	m, err := e.findMach(ref)
	if err != nil {
		return err
	}
	if err := m.op.lock(ctx); err != nil {
		return err
	}
	defer m.op.unlock()
	ctx = context.WithoutCancel(ctx)
	old := m.record()
	if old.Facts.Pending == machine.Removing {
		return notFound("No such machine: %s", old.Name)
	}
	n := old.Clone()
	if o.CPUs != 0 {
		n.CPUs = o.CPUs
	}
	if o.Memory != 0 {
		n.Memory = o.Memory
	}
	if o.Disk != 0 {
		n.Disk = o.Disk
	}
	if o.Restart != "" {
		n.Restart = o.Restart
	}
	k := m.current()
	switch {
	case n.Disk < old.Disk:
		return invalid("machine %s: its disk has %d bytes; it only grows", old.Name, old.Disk)
	case k != nil && n.CPUs < old.CPUs:
		return invalid("machine %s runs with %d CPUs, which can't be taken back: stop it first", old.Name, old.CPUs)
	}
	if err := n.Complete(runtime.NumCPU()); err != nil {
		return err
	}
	if k != nil { // what fails is not recorded, and what has grown stays
		if n.Memory != old.Memory || n.CPUs != old.CPUs {
			if err := k.machine.Resize(ctx, n.Memory, n.CPUs); err != nil {
				return fmt.Errorf("machine %s: %w", old.Name, err)
			}
			if err := e.changeMach(m, func(r *machine.Record) { r.Memory, r.CPUs = n.Memory, n.CPUs }); err != nil {
				return err
			}
		}
		if n.Disk != old.Disk {
			if err := k.machine.GrowDisk(ctx, n.Disk); err != nil {
				return fmt.Errorf("machine %s: %w", old.Name, err)
			}
		}
	}
	if err := e.changeMach(m, func(r *machine.Record) { r.CPUs, r.Memory, r.Disk, r.Restart = n.CPUs, n.Memory, n.Disk, n.Restart }); err != nil {
		return err
	}
	e.emitMach(m, events.ActionUpdate, nil)
	return nil
}
