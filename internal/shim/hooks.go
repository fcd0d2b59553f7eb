package shim

import (
	"encoding/json"
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/launch"
	"tenon.dev/tenon/internal/launch/fork"
)

// phases says at which points of the launch hooks run.
func phases(h *specs.Hooks) (list []launch.Phase) {
	if h == nil {
		return nil
	}
	//lint:ignore SA1019 prestart is deprecated and still specified
	if len(h.Prestart) > 0 || len(h.CreateRuntime) > 0 {
		list = append(list, launch.PhaseNamespaces)
	}
	if len(h.CreateContainer) > 0 {
		list = append(list, launch.PhaseMounts)
	}
	return list
}

// hookState is what a hook reads.
func hookState(c *container, spec kept, status specs.ContainerState, pid int) ([]byte, error) {
	return json.Marshal(specs.State{
		Version: specs.Version, ID: c.id, Status: status, Pid: pid, Bundle: c.bundle, Annotations: spec.annotations,
	})
}

// hookPhase runs the hooks of the creation.
func (c *container) hookPhase(spec *specs.Spec) func(launch.Phase, *fork.Process) error {
	return func(ph launch.Phase, p *fork.Process) error {
		state, err := hookState(c, keep(spec), specs.StateCreating, p.Pid)
		if err != nil {
			return err
		}
		switch ph {
		case launch.PhaseNamespaces:
			//lint:ignore SA1019 prestart is deprecated and still specified
			for _, h := range append(append([]specs.Hook(nil), spec.Hooks.Prestart...), spec.Hooks.CreateRuntime...) {
				if err := fork.RunHook(h, state); err != nil {
					return fmt.Errorf("hook %s: %w", h.Path, err)
				}
			}
		case launch.PhaseMounts:
			for _, h := range spec.Hooks.CreateContainer {
				if err := p.RunHook(h, state); err != nil {
					return fmt.Errorf("hook %s: %w", h.Path, err)
				}
			}
		}
		return nil
	}
}

// startContainer runs those hooks in the container, before its program.
func (c *container) startContainer() error {
	p, ok := c.init.child.(planned)
	if !ok || c.spec.hooks == nil || len(c.spec.hooks.StartContainer) == 0 {
		return nil
	}
	state, err := hookState(c, c.spec, specs.StateCreated, p.pid())
	if err != nil {
		return err
	}
	for _, h := range c.spec.hooks.StartContainer {
		if err := p.p.RunHook(h, state); err != nil {
			return fmt.Errorf("%s: hook %s: %w", c.init.name(), h.Path, err)
		}
	}
	return nil
}

// poststart runs those hooks; a failure is told and changes nothing.
func (c *container) poststart() {
	if c.external == nil && c.spec.hooks != nil {
		c.tell(c.spec.hooks.Poststart, specs.StateRunning)
	}
}

// poststop runs those hooks; a failure is told and changes nothing.
func (c *container) poststop() {
	if c.external == nil && c.spec.hooks != nil {
		c.tell(c.spec.hooks.Poststop, specs.StateStopped)
	}
}

func (c *container) tell(hooks []specs.Hook, status specs.ContainerState) {
	for _, h := range hooks {
		pid := 0
		if status == specs.StateRunning {
			pid = c.init.child.pid()
		}
		state, err := hookState(c, c.spec, status, pid)
		if err == nil {
			err = fork.RunHook(h, state)
		}
		if err != nil {
			c.shim.log.Warn("hook failed", "container", c.id, "hook", h.Path, "err", err)
		}
	}
}
