package docker

import (
	"fmt"
	"net/http"

	"github.com/containerd/errdefs"
)

const noteSwarm = "Tenon has no swarm mode; use Kubernetes for clusters"

// errNoSwarm is word for word Docker's: clients look for it.
var errNoSwarm = errdefs.ErrUnavailable.WithMessage(
	`This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm and try again.`)

func errNotBuilt(note string) error {
	return errdefs.ErrNotImplemented.WithMessage("not implemented: " + note)
}

// noPlugin is 404, not 501: `docker inspect NAME` asks every kind of object and
// takes only "not found" for a no.
func (a *API) noPlugin(c *call) error {
	return errdefs.ErrNotFound.WithMessage(fmt.Sprintf("plugin %q not found: %s", c.name(), notePlugin))
}

func (a *API) pluginList(c *call) error { return c.json(http.StatusOK, []any{}) }
