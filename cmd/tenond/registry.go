package main

import (
	"context"
	"crypto/tls"
	"fmt"

	"tenon.dev/tenon/internal/registry"
)

// serveRegistry serves the images as a registry, if the settings ask for it, until ctx
// ends; wait returns when it has ended.
func (d *daemon) serveRegistry(ctx context.Context) (wait func(), err error) {
	c := d.cfg.Registry
	if c.Listen == "" {
		return func() {}, nil
	}
	o := registry.Options{Listen: c.Listen, Namespace: c.Namespace, ReadOnly: c.ReadOnly, Log: d.log}
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
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(ctx); err != nil {
			d.log.Error("registry has ended", "err", err)
		}
	}()
	d.log.Info("serving images as a registry", "address", srv.Addr(), "namespace", srv.Namespace())
	return func() { <-done }, nil
}
