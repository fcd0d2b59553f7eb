package launch

import (
	"errors"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Plan is a compiled specification.
type Plan struct{}

// Compile makes the plan of a container's first process.
func Compile(spec *specs.Spec, opts Options) (*Plan, error) {
	return nil, errors.New("launch: not built yet")
}

// CompileExec makes the plan of a further process in a running container.
func CompileExec(process *specs.Process, opts ExecOptions) (*Plan, error) {
	return nil, errors.New("launch: not built yet")
}

// String lists the steps, one a line.
func (p *Plan) String() string { return "" }
