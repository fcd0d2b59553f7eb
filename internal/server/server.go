// Package server is the daemon's door: it listens (unix sockets, TCP with
// client certificates, sockets handed over by systemd), guards what comes in,
// and hands requests to two APIs on the same listeners: Docker's
// (server/docker) and Tenon's own under /tenon/v1 (server/tenon).
//
// Use: Listen makes listeners, New a Server from a Config, Serve serves until
// its context ends or Shutdown is called:
//
//	ls, err := server.Listen(ctx, server.ListenConfig{Hosts: hosts, TLS: …})
//	srv := server.New(server.Config{Engine: eng, Images: eng.Images(), Networks: eng.Networks(), …})
//	err = srv.Serve(ctx, ls)
//
// Every request goes through the same few steps: who may speak (Host and
// Origin on TCP), a limit on the body, a guard against panics, the route, and
// one place where errors become statuses (server/wire). Nothing here keeps
// state of its own; the engine owns all.
package server

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/server/docker"
	"tenon.dev/tenon/internal/server/tenon"
)

// Config is what a Server serves. Engine, Images and Networks are required.
type Config struct {
	Engine   engine.API
	Images   *image.Store
	Networks *network.Controller
	// Builder builds images; nil: there is none.
	Builder docker.Builder

	// Version, GitCommit and BuildTime are what /version tells.
	Version, GitCommit, BuildTime string
	// Doctor answers GET /tenon/v1/doctor with something that encodes as JSON;
	// nil answers 501.
	Doctor func(ctx context.Context) (any, error)
	// PrepareVM answers POST /tenon/v1/vm/prepare likewise.
	PrepareVM func(ctx context.Context) (any, error)
	// Footprint answers GET /tenon/v1/df likewise.
	Footprint func(ctx context.Context) (any, error)
	// Quit is called once by POST /tenon/v1/shutdown, after the engine has shut
	// down and the answer is on its way: it must make the daemon end. nil: the
	// endpoint answers 501.
	Quit func()
	// Answered, if not nil, is called when a request has been answered.
	Answered func()
	// AllowedHosts are further names that a Host header may carry on TCP
	// listeners, beside IP addresses, localhost and the certificate's names.
	AllowedHosts []string
	// MachineSockets is the directory of the machines' own sockets, owned by Group
	// as ListenConfig's; empty: they have none.
	MachineSockets, Group string
	// Registry bounds what clients can make a registry keep that is served by
	// POST /tenon/v1/registry; zero values are its defaults.
	Registry image.RepositoryLimits
	// Log receives warnings, and at debug level one line per request. nil discards.
	Log *slog.Logger
}

// headerTimeout bounds how long a client may take to send a request's header.
const headerTimeout = 30 * time.Second

// graceTime is how long handlers may take to end when the daemon does.
const graceTime = 10 * time.Second

// Server serves the APIs. Make it with New.
type Server struct {
	cfg  Config
	log  *slog.Logger
	http *http.Server
	base context.Context // of all requests
	stop context.CancelFunc
	live sync.WaitGroup // handlers, hijacked ones as well

	doors *doors // nil: machines have no sockets
}

// New makes a server; it does nothing until Serve.
func New(cfg Config) *Server {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	d := docker.New(docker.Config{
		Engine: cfg.Engine, Images: cfg.Images, Networks: cfg.Networks, Builder: cfg.Builder,
		Version: cfg.Version, GitCommit: cfg.GitCommit, BuildTime: cfg.BuildTime, Log: log,
	})
	s := &Server{cfg: cfg, log: log}
	own := tenon.Config{Engine: cfg.Engine, Images: cfg.Images, Doctor: cfg.Doctor, PrepareVM: cfg.PrepareVM, Footprint: cfg.Footprint, Quit: cfg.Quit, Registry: cfg.Registry, Log: log}
	if cfg.MachineSockets != "" {
		s.doors = &doors{s: s, dir: cfg.MachineSockets, open: map[string]*http.Server{}}
		own.Doors = s.doors
	}
	s.base, s.stop = context.WithCancel(context.Background())
	s.http = s.httpServer(s.guard(withKeys(route(tenon.New(own), d), false)))
	return s
}

// Serve accepts connections on all listeners until ctx ends or Shutdown is
// called, and then returns nil; it returns the error of the first listener
// that fails otherwise. It closes the listeners, and when it returns after ctx's
// end, handlers have returned too (or have had ten seconds to).
func (s *Server) Serve(ctx context.Context, listeners []net.Listener) error {
	if len(listeners) == 0 {
		return errors.New("serve: no listeners")
	}
	down := make(chan struct{})
	unhook := context.AfterFunc(ctx, func() {
		defer close(down)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), graceTime)
		defer cancel()
		_ = s.Shutdown(grace) // what is left is cut off when the process ends
	})
	if s.doors != nil {
		s.doors.openAll(ctx)
	}
	errs := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { errs <- s.http.Serve(l) }()
	}
	var first error
	for range listeners {
		if err := <-errs; err != nil && !errors.Is(err, http.ErrServerClosed) && first == nil {
			first = err
			_ = s.http.Close()
		}
	}
	if !unhook() {
		<-down // handlers may still use what the caller closes next
	}
	return first
}

// Shutdown stops accepting, ends the context of every request (attached
// streams as well: containers don't notice), and waits until their handlers
// have returned or ctx ends.
func (s *Server) Shutdown(ctx context.Context) error {
	err := s.shutdownHTTP(ctx)
	done := make(chan struct{})
	go func() { s.live.Wait(); close(done) }()
	select {
	case <-done:
		return err
	case <-ctx.Done():
		return errors.Join(err, s.Close(), context.Cause(ctx))
	}
}

func (s *Server) shutdownHTTP(ctx context.Context) error {
	// Give plain requests a moment to finish by themselves before their
	// contexts end; streams never would.
	t := time.AfterFunc(300*time.Millisecond, s.stop)
	defer t.Stop()
	defer s.stop()
	if s.doors == nil {
		return s.http.Shutdown(ctx)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.doors.shutdown(ctx) }()
	err := s.http.Shutdown(ctx)
	return errors.Join(err, <-ended)
}

var _ io.Closer = (*Server)(nil)

// Close ends everything at once.
func (s *Server) Close() error {
	s.stop()
	if s.doors != nil {
		s.doors.closeAll()
	}
	return s.http.Close()
}
