package engine

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/system"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
)

// isolation is the kernel that a new container gets, by what it asks for and
// the daemon's default, and what is known of it if it is a machine's. Nothing is made if it can't be had.
func (e *Engine) isolation(ctx context.Context, asked mobycontainer.Isolation) (string, sandbox.About, error) {
	iso, err := spec.Isolation(asked)
	if err == nil && iso == "" {
		iso, err = spec.Isolation(mobycontainer.Isolation(e.cfg.DefaultIsolation))
	}
	switch {
	case err != nil:
		return "", sandbox.About{}, err
	case iso == sandbox.Process || iso == "":
		return sandbox.Process, sandbox.About{}, nil
	}
	if name := machine.Named(iso); name != "" {
		e.mu.Lock()
		m := e.machs[name]
		e.mu.Unlock()
		if m == nil {
			return "", sandbox.About{}, invalid("isolation %s: there is no machine %s (tenon machine create %s); nothing was started", iso, name, name)
		}
	}
	about, err := e.machines(ctx)
	return iso, about, err
}

// machines is what makes virtual machines, if they can be had.
func (e *Engine) machines(ctx context.Context) (sandbox.About, error) {
	err := errdefs.ErrFailedPrecondition.WithMessage("this daemon was set up without virtual machines")
	if e.cfg.Machines != nil {
		var about sandbox.About
		if about, err = e.cfg.Machines.Check(ctx); err == nil {
			return about, nil
		}
	}
	return sandbox.About{}, remark{err, "a virtual machine can't be had: " + err.Error() + "; nothing was started"}
}

// factsOf are of the kernel that a container of some isolation runs on.
func (e *Engine) factsOf(isolation string) sandbox.Facts {
	if isolation == sandbox.Process || e.cfg.Machines == nil {
		return e.cfg.Kernel.Facts()
	}
	e.mu.Lock()
	m := e.machs[machine.Named(isolation)]
	e.mu.Unlock()
	if m == nil {
		return e.cfg.Machines.Facts()
	}
	if k := m.current(); k != nil {
		return k.machine.Facts()
	}
	f, r := e.cfg.Machines.Facts(), m.record()
	f.CPUs, f.Memory, f.CPUSet = r.CPUs, r.Memory, "" // what it has when it runs
	return f
}

// defaultsOf are the limits of containers that ask for none.
func (e *Engine) defaultsOf(isolation string) spec.Defaults {
	d := e.def
	if isolation != sandbox.Process {
		d.Memory = 0 // its machine has no more
	}
	return d
}

// onHost says that a container runs on the host's kernel.
func onHost(r *container.Record) bool {
	return r.Isolation != sandbox.VM && r.Isolation != sandbox.OwnSystem && machine.Named(r.Isolation) == ""
}

// kernelOf is what a container runs on; on a machine that is gone, the host's,
// which knows nothing of it.
func (e *Engine) kernelOf(c *ctr) sandbox.Sandbox {
	if m := c.onMachine(); m != nil {
		return m.machine
	}
	return e.cfg.Kernel
}

// client is the connection to the shim that has a running container.
func (e *Engine) client(ctx context.Context, c *ctr) (*task.Client, error) {
	if onHost(c.record()) {
		return e.shim.get(ctx)
	}
	m := c.onMachine()
	if m == nil {
		return nil, noMachine(c)
	}
	return m.link.get(ctx)
}

// describeMachines shows what virtual machines run on, once it is known.
func (e *Engine) describeMachines(ctx context.Context, info *system.Info) {
	if e.cfg.Machines == nil {
		return
	}
	var names []string
	for _, m := range e.allMachs() {
		r := m.record()
		names = append(names, r.Name+" ("+string(r.State())+")")
	}
	if slices.Sort(names); len(names) > 0 {
		info.DriverStatus = append(info.DriverStatus, [2]string{"Machines", strings.Join(names, ", ")})
	}
	a, err := e.cfg.Machines.About(ctx)
	switch {
	case err != nil:
		info.DriverStatus = append(info.DriverStatus, [2]string{"Virtual machines", "not reachable: " + err.Error()})
		return
	case a.Accel == "":
		return // nobody has asked for one yet
	}
	accel := a.Accel
	if a.AccelReason != "" {
		accel += " (" + a.AccelReason + ")"
	}
	info.DriverStatus = append(info.DriverStatus,
		[2]string{"Virtual machines", fmt.Sprintf("QEMU %s, %d in use, %d ready", a.QEMU, a.Machines, a.Ready)},
		[2]string{"Virtual machines' accelerator", accel},
		[2]string{"Virtual machines' kernel", a.Kernel + " (" + a.Origin + ")"})
}
