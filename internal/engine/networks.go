package engine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	mobynet "github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/network"
)

// ConnectNetwork attaches a container to a network: at once if it runs, else
// at its next start.
func (e *Engine) ConnectNetwork(ctx context.Context, net, ref string, cfg *mobynet.EndpointSettings) error {
	n, err := e.cfg.Networks.Inspect(ctx, net)
	if err != nil {
		return err
	}
	c, err := e.lockOp(ctx, ref)
	if err != nil {
		return err
	}
	defer c.op.unlock()
	r := c.record()
	switch {
	case r.Facts.Removing || r.Facts.Dead:
		return conflict("container %s is marked for removal and cannot be connected or disconnected to the network", c.id)
	case noSystemNetwork(r) != nil:
		return noSystemNetwork(r)
	case r.HostConfig.NetworkMode.IsHost():
		return conflict("cannot connect or disconnect container to host network: container %s has the host's network", r.Name)
	case r.HostConfig.NetworkMode.IsContainer():
		return conflict("container sharing network namespace with another container or host cannot be connected to any other network")
	case machineNetwork(r, n) != nil:
		return machineNetwork(r, n)
	case n.Name == mobynet.NetworkHost:
		return conflict("cannot connect container to host network - container must be created in host network mode")
	case r.Networks[n.Name] != nil || r.Networks[n.ID] != nil:
		return errdefs.ErrPermissionDenied.WithMessage(fmt.Sprintf("endpoint with name %s already exists in network %s", r.Name, n.Name))
	}
	if cfg == nil {
		cfg = &mobynet.EndpointSettings{}
	}
	cfg = cfg.Copy()
	if err := checkEndpoint(n.Name, cfg); err != nil {
		return err
	}
	if r.Running() {
		q, err := e.endpointRequest(r, n.Name, cfg)
		if err != nil {
			return err
		}
		before := e.plugsOf(c)
		if _, err := e.cfg.Networks.ConnectNetwork(ctx, c.id, q); err != nil {
			return err
		}
		if err := e.replug(ctx, c, before); err != nil {
			_ = e.cfg.Networks.DisconnectNetwork(ctx, c.id, n.Name, true) // what has failed is what to tell
			return err
		}
		e.refreshNetwork(c)
	}
	err = e.change(c, func(r *container.Record) { r.Networks[n.Name] = cfg })
	if err != nil && r.Running() {
		_ = e.cfg.Networks.DisconnectNetwork(ctx, c.id, n.Name, true) // the record says it is not there
	}
	return err
}

// DisconnectNetwork takes a container off a network. With force a container
// that is not there is no error.
func (e *Engine) DisconnectNetwork(ctx context.Context, net, ref string, force bool) error {
	n, err := e.cfg.Networks.Inspect(ctx, net)
	if err != nil {
		return err
	}
	c, err := e.lockOp(ctx, ref)
	if err != nil {
		if force && errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	defer c.op.unlock()
	r := c.record()
	if err := noSystemNetwork(r); err != nil {
		return err
	}
	if r.HostConfig.NetworkMode.IsHost() || r.HostConfig.NetworkMode.IsContainer() {
		return conflict("container %s can't be disconnected from its %s network", r.Name, r.HostConfig.NetworkMode)
	}
	key := ""
	for k := range r.Networks {
		if k == n.Name || k == n.ID || strings.HasPrefix(n.ID, k) && len(k) >= 12 {
			key = k
		}
	}
	if key == "" {
		if force {
			return nil
		}
		return conflict("container %s is not connected to the network %s", c.id, n.Name)
	}
	if r.Running() {
		before := e.plugsOf(c)
		if err := e.cfg.Networks.DisconnectNetwork(ctx, c.id, n.Name, force); err != nil {
			return err
		}
		if err := e.replug(ctx, c, before); err != nil {
			return err
		}
		e.refreshNetwork(c)
	}
	return e.change(c, func(r *container.Record) { delete(r.Networks, key) })
}

// refreshNetwork takes over a running container's network after a change, and
// writes its hosts file and resolv.conf anew, in place: they are mounted.
func (e *Engine) refreshNetwork(c *ctr) {
	ns, err := e.cfg.Networks.Namespace(c.id)
	if err != nil {
		e.log.Warn("network of a running container is not known", "container", c.id, "err", err)
		return
	}
	c.setNetwork(ns)
	err = rewriteHosts(e.runDir(c.id), ns)
	if err == nil {
		err = e.refreshFiles(e.ctx, c)
	}
	if err != nil {
		e.log.Warn("hosts file is out of date", "container", c.id, "err", err)
	}
}

func rewriteHosts(dir string, ns *network.Namespace) error {
	for name, text := range map[string]string{
		"hosts":       strings.Join(ns.Hosts, "\n") + "\n",
		"resolv.conf": resolvConf(ns.Resolver),
	} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_TRUNC, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString(text)
		if e := f.Close(); err == nil {
			err = e
		}
		if err != nil {
			return err
		}
	}
	return nil
}
