package shim

import (
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// external drives an OCI runtime command.
type external struct {
	path string
	args []string
}

func (e *external) create(c *container, p *process, r createRequest) (child, error) {
	return nil, errdefs.ErrNotImplemented
}

func (e *external) exec(c *container, p *process, process *specs.Process) (child, error) {
	return nil, errdefs.ErrNotImplemented
}

func (e *external) delete(c *container) {}
