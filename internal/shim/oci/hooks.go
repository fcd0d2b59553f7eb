package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch"
	"tenon.dev/tenon/internal/launch/fork"
)

// phases are the points of the launch at which hooks run.
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

// hookState is what a hook reads on its standard input.
func (c *container) hookState(status specs.ContainerState) ([]byte, error) {
	return json.Marshal(specs.State{
		Version: c.OCIVersion, ID: c.ID, Status: status, Pid: c.Pid, Bundle: c.Bundle, Annotations: c.Annotations,
	})
}

// atPhase runs the hooks of the creation. One that fails ends it.
func (m *making) atPhase(ph launch.Phase, p *fork.Process) error {
	m.Pid = p.Pid
	state, err := m.hookState(specs.StateCreating)
	if err != nil {
		return err
	}
	h := m.spec.Hooks
	if ph == launch.PhaseMounts {
		for _, hook := range h.CreateContainer {
			if err := p.RunHook(hook, state); err != nil {
				return fmt.Errorf("hook createContainer %s: %w", hook.Path, err)
			}
		}
		return nil
	}
	//lint:ignore SA1019 prestart is deprecated and still specified
	for _, hook := range append(append([]specs.Hook(nil), h.Prestart...), h.CreateRuntime...) {
		if err := fork.RunHook(hook, state); err != nil {
			return fmt.Errorf("hook createRuntime %s: %w", hook.Path, err)
		}
	}
	return nil
}

// hooksOutside runs poststart or poststop hooks: their failures are told, and
// change nothing.
func (c *container) hooksOutside(a *app, hooks []specs.Hook, status specs.ContainerState) {
	if len(hooks) == 0 {
		return
	}
	state, err := c.hookState(status)
	if err != nil {
		a.warn(err.Error())
		return
	}
	for _, hook := range hooks {
		if err := fork.RunHook(hook, state); err != nil {
			a.warn(fmt.Sprintf("hook %s: %v", hook.Path, err))
		}
	}
}

func (c *container) runPoststop(a *app, s *specs.Spec) {
	if s.Hooks != nil {
		c.hooksOutside(a, s.Hooks.Poststop, statusStopped)
	}
}

// hooksInside runs startContainer hooks in the container's namespaces, as root
// with all capabilities, before its program starts.
func (c *container) hooksInside(hooks []specs.Hook, status specs.ContainerState) error {
	state, err := c.hookState(status)
	if err != nil {
		return err
	}
	for _, hook := range hooks {
		if err := c.hookInside(hook, state); err != nil {
			return fmt.Errorf("hook startContainer %s: %w", hook.Path, err)
		}
	}
	return nil
}

func (c *container) hookInside(hook specs.Hook, state []byte) error {
	args := hook.Args
	if len(args) == 0 {
		args = []string{hook.Path}
	}
	// The path is executed under the name of the first argument: only when they
	// are the same can the launcher be asked for it.
	args = append([]string{hook.Path}, args[1:]...)
	pidfd, err := c.pidfd()
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	group, err := c.group()
	if err != nil {
		return err
	}
	all := allCapabilities()
	plan, err := launch.CompileExec(&specs.Process{
		Args: args, Env: hook.Env, Cwd: "/",
		Capabilities: &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all},
	}, launch.ExecOptions{Pidfd: pidfd, Cgroup: group})
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer w.Close()
	proc, err := fork.Start(plan, fork.Stdio{In: r, Out: os.Stdout, Err: os.Stderr})
	if err != nil {
		return err
	}
	defer proc.Close()
	if err := proc.Exec(); err != nil {
		return err
	}
	r.Close()
	if hook.Timeout != nil {
		timer := time.AfterFunc(time.Duration(*hook.Timeout)*time.Second, func() { _ = proc.Signal(unix.SIGKILL) })
		defer timer.Stop()
	}
	if _, err := bytes.NewReader(state).WriteTo(w); err != nil && !errors.Is(err, unix.EPIPE) {
		_ = proc.Signal(unix.SIGKILL)
	}
	w.Close()
	exit, err := proc.Wait()
	if err == nil && (exit.Code != 0 || exit.Signal != 0) {
		err = errors.New(exit.String())
	}
	return err
}
