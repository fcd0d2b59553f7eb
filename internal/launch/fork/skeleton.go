package fork

import (
	"errors"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/launch"
)

var errUnfinished = errors.New("fork: not built yet")

func start(plan *launch.Plan, stdio Stdio) (*Process, error)   { return nil, errUnfinished }
func (p *Process) exec() error                                 { return errUnfinished }
func (p *Process) wait() (Exit, error)                         { return Exit{}, errUnfinished }
func (p *Process) signal(sig syscall.Signal) error             { return errUnfinished }
func (p *Process) close() error                                { return nil }
func runHook(hook specs.Hook, state []byte, in *Process) error { return errUnfinished }
