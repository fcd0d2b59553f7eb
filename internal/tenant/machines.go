package tenant

import (
	"context"
	"io"

	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/machine"
)

// Machines are managed on the daemon's own socket.

func (s *Scope) noMachines() error {
	return s.denied("machines are managed on the daemon's own socket")
}

// MachineCreate is refused.
func (s *Scope) MachineCreate(context.Context, *machine.Record, bool) (engine.Machine, error) {
	return engine.Machine{}, s.noMachines()
}

// MachineInspect is refused.
func (s *Scope) MachineInspect(context.Context, string, bool) (engine.Machine, error) {
	return engine.Machine{}, s.noMachines()
}

// MachineList is refused.
func (s *Scope) MachineList(context.Context, engine.Filters) ([]engine.Machine, error) {
	return nil, s.noMachines()
}

// MachineStart is refused.
func (s *Scope) MachineStart(context.Context, string) error { return s.noMachines() }

// MachineStop is refused.
func (s *Scope) MachineStop(context.Context, string, engine.StopOptions) error { return s.noMachines() }

// MachineRestart is refused.
func (s *Scope) MachineRestart(context.Context, string, engine.StopOptions) error {
	return s.noMachines()
}

// MachineRemove is refused.
func (s *Scope) MachineRemove(context.Context, string, engine.MachineRemoveOptions) error {
	return s.noMachines()
}

// MachineUpdate is refused.
func (s *Scope) MachineUpdate(context.Context, string, engine.MachineUpdateOptions) error {
	return s.noMachines()
}

// MachineLogs is refused.
func (s *Scope) MachineLogs(context.Context, string, int, bool, io.Writer) error {
	return s.noMachines()
}

// MachinePrune is refused.
func (s *Scope) MachinePrune(context.Context, engine.Filters, func(string)) ([]string, error) {
	return nil, s.noMachines()
}
