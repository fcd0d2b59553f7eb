package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/config"
	"tenon.dev/tenon/internal/doctor"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/registry"
)

// A registry's address may be missing when the machine starts, or be another program's:
// containers don't wait for that. It is tried again, after tryFirst and then less and
// less often.
const (
	tryFirst = time.Second
	trySlow  = 15 * time.Second
)

// served is the registry of the settings.
type served struct {
	failed atomic.Pointer[string] // why it is not there at the moment
}

// serveRegistry serves the images as a registry, if the settings ask for it, until ctx
// ends; wait returns when it has ended. It fails if the settings can't be.
func (d *daemon) serveRegistry(ctx context.Context) (wait func(), err error) {
	c := d.cfg.Registry
	if c.Listen == "" {
		return func() {}, nil
	}
	o := registry.Options{
		Listen: c.Listen, Namespace: c.Namespace, ReadOnly: c.ReadOnly, Log: d.log,
		Limits: registryLimits(d.cfg),
	}
	if c.Htpasswd != "" {
		if o.Users, err = registry.OpenUsers(c.Htpasswd); err != nil {
			return nil, fmt.Errorf("registry: %w", err)
		}
	}
	if c.TLSCert != "" {
		cert, err := tls.LoadX509KeyPair(c.TLSCert, c.TLSKey)
		if err != nil {
			return nil, fmt.Errorf("registry: %w", err)
		}
		o.Certificate = &cert
	}
	srv, err := registry.Listen(ctx, d.images, o)
	if err != nil && !passing(err) {
		return nil, err
	}
	done, failed := make(chan struct{}), err
	go func() {
		defer close(done)
		d.keepRegistry(ctx, o, srv, failed)
	}()
	return func() { <-done }, nil
}

// registryLimits are what the settings say that a registry's clients can make it keep.
func registryLimits(cfg *config.Config) image.RepositoryLimits {
	c := cfg.Registry
	return image.RepositoryLimits{Uploads: config.Bytes(c.Uploads), Free: config.Bytes(c.KeepFree), Manifests: c.Manifests}
}

// passing tells whether a registry may be there later.
func passing(err error) bool { return errdefs.IsUnavailable(err) || errdefs.IsConflict(err) }

// keepRegistry serves until ctx ends, and listens anew as long as that fails.
func (d *daemon) keepRegistry(ctx context.Context, o registry.Options, srv *registry.Server, err error) {
	pause := tryFirst
	for ctx.Err() == nil {
		if err == nil {
			d.registry.failed.Store(nil)
			pause = tryFirst
			d.log.Info("serving images as a registry", "address", srv.Addr(), "namespace", srv.Namespace())
			err = srv.Serve(ctx)
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				err = fmt.Errorf("registry: it has ended: %w", errdefs.ErrUnavailable)
			}
		}
		if d.registry.failed.Load() == nil {
			d.log.Error("images are not served as a registry; it is tried again", "address", o.Listen, "err", err)
		}
		why := err.Error()
		d.registry.failed.Store(&why)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, trySlow)
		srv, err = registry.Listen(ctx, d.images, o)
	}
}

// registryCheck tells whether the registry of the settings is there.
func (d *daemon) registryCheck() (doctor.Check, bool) {
	listen := d.cfg.Registry.Listen
	if listen == "" {
		return doctor.Check{}, false
	}
	if why := d.registry.failed.Load(); why != nil {
		return doctor.Check{
			Name: "registry", Status: doctor.Warn, Detail: *why,
			Remedy: "it is tried again every few seconds; if the address is not to come, change registry.listen",
		}, true
	}
	return doctor.Check{Name: "registry", Status: doctor.OK, Detail: "served at " + listen}, true
}
