package tenon

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/client/registryapi"
	"tenon.dev/tenon/internal/registry"
	"tenon.dev/tenon/internal/server/wire"
)

// logQueue is how many requests of a registry wait to be told; more are not told.
const logQueue = 256

// serveRegistry serves the images as a registry for as long as the client listens.
func (a *API) serveRegistry(w http.ResponseWriter, r *http.Request) error {
	var req registryapi.Serve
	if err := wire.ReadJSON(w, r, &req); err != nil {
		return err
	}
	opts := registry.Options{Listen: req.Listen, Namespace: req.Namespace, ReadOnly: req.ReadOnly, Limits: a.cfg.Registry, Log: a.log}
	if req.Htpasswd != "" {
		u, err := registry.ParseUsers([]byte(req.Htpasswd))
		if err != nil {
			return err
		}
		opts.Users = u
	}
	if req.TLSCert != "" || req.TLSKey != "" {
		cert, err := tls.X509KeyPair([]byte(req.TLSCert), []byte(req.TLSKey))
		if err != nil {
			return fmt.Errorf("certificate: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		opts.Certificate = &cert
	}
	lines := make(chan registry.Request, logQueue)
	opts.OnRequest = func(q registry.Request) {
		select {
		case lines <- q:
		default:
		}
	}
	srv, err := registry.Listen(r.Context(), a.cfg.Images, opts)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(r.Context())
	var wg sync.WaitGroup
	defer func() {
		cancel()
		wg.Wait()
	}()
	done := make(chan error, 1)
	wg.Go(func() { done <- srv.Serve(ctx) })
	s := wire.NewStream(w, "application/x-ndjson", true)
	defer s.Close(true)
	enc := json.NewEncoder(s)
	serving := registryapi.Serving{Address: srv.Addr(), Namespace: srv.Namespace(), TLS: opts.Certificate != nil, ReadOnly: req.ReadOnly}
	err = enc.Encode(registryapi.Message{Serving: &serving})
	for err == nil {
		select {
		case q := <-lines:
			err = enc.Encode(registryapi.Message{Request: &q})
		case failed := <-done:
			if failed != nil {
				_ = enc.Encode(registryapi.Message{Error: failed.Error()}) // the client may be gone
			}
			return nil
		case <-ctx.Done():
			return nil
		}
	}
	return nil // the client is gone
}
