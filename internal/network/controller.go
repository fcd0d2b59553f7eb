package network

import (
	"context"
	"errors"
)

// Controller owns all networks of one engine. Safe for concurrent use.
type Controller struct {
	cfg Config
}

// Open makes a controller: it repairs the default networks, the nftables
// table, the bridges and the DNS process, and takes over what a former
// controller with the same directories left behind. Follow it with Restore.
func Open(ctx context.Context, cfg Config) (*Controller, error) {
	return nil, errors.ErrUnsupported
}

// Close ends the controller's goroutines and leaves the data path standing.
func (c *Controller) Close() error { return nil }

// Teardown ends the controller and removes everything that it put into the
// kernel (namespaces, bridges, the table) and the DNS process. Records of
// networks stay, so that Open makes them again.
func (c *Controller) Teardown(ctx context.Context) error { return errors.ErrUnsupported }

// Create makes a network. Errors: InvalidArgument, AlreadyExists (name taken),
// FailedPrecondition (no free subnet, overlap).
func (c *Controller) Create(ctx context.Context, req CreateRequest) (Inspect, error) {
	return Inspect{}, errors.ErrUnsupported
}

// Remove deletes a network by name or id. Errors: NotFound, PermissionDenied
// (a predefined network), FailedPrecondition (has endpoints).
func (c *Controller) Remove(ctx context.Context, nameOrID string) error { return errors.ErrUnsupported }

// Inspect describes a network by name, id or unique prefix of the id.
func (c *Controller) Inspect(ctx context.Context, nameOrID string) (Inspect, error) {
	return Inspect{}, errors.ErrUnsupported
}

// List describes all networks that pass the filters, oldest first.
func (c *Controller) List(ctx context.Context, f Filters) ([]Inspect, error) {
	return nil, errors.ErrUnsupported
}

// Prune removes the networks without endpoints that pass the filters, and
// returns their names.
func (c *Controller) Prune(ctx context.Context, f Filters) ([]string, error) {
	return nil, errors.ErrUnsupported
}

// Connect makes a container's network. All of it or nothing is made. Errors:
// InvalidArgument, NotFound (network), FailedPrecondition (no address left),
// Conflict-like AlreadyExists (the container is connected, a port is taken).
func (c *Controller) Connect(ctx context.Context, req Request) (*Namespace, error) {
	return nil, errors.ErrUnsupported
}

// Disconnect frees a container's names, addresses and ports at once; its
// interfaces and namespace go in the background. Unknown containers are no error.
func (c *Controller) Disconnect(ctx context.Context, containerID string) error {
	return errors.ErrUnsupported
}

// ConnectNetwork attaches a running container to one more network.
func (c *Controller) ConnectNetwork(ctx context.Context, containerID string, req EndpointRequest) (Endpoint, error) {
	return Endpoint{}, errors.ErrUnsupported
}

// DisconnectNetwork takes a running container off a network. With force it is
// no error if the container is not there.
func (c *Controller) DisconnectNetwork(ctx context.Context, containerID, network string, force bool) error {
	return errors.ErrUnsupported
}

// Namespace returns a connected container's network as it is now.
// Errors: NotFound.
func (c *Controller) Namespace(containerID string) (*Namespace, error) {
	return nil, errors.ErrUnsupported
}

// Rename changes a connected container's name in the DNS. Unknown containers
// are no error.
func (c *Controller) Rename(ctx context.Context, containerID, newName string) error {
	return errors.ErrUnsupported
}

// Restore is called once after Open with the ids of all containers that still
// run: their networks are kept, all others are freed.
func (c *Controller) Restore(ctx context.Context, live []string) error { return errors.ErrUnsupported }

// HostGateway is the host's address as containers on the default bridge see it
// (what "host-gateway" in extra hosts stands for).
func (c *Controller) HostGateway() string { return "" }
