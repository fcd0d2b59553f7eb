package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image"
)

// Options say how a store is served by Listen.
type Options struct {
	// Listen is ADDRESS:PORT; see CheckExposure.
	Listen string
	// Namespace is what names of pushed images begin with. Empty: the address listened
	// on, or localhost:PORT for all addresses.
	Namespace   string
	ReadOnly    bool
	Users       *Users           // nil: everybody
	Certificate *tls.Certificate // nil: plain HTTP
	OnRequest   func(Request)    // as in Config
	Limits      image.RepositoryLimits
	Log         *slog.Logger
}

// Server is a registry with its listener.
type Server struct {
	reg  *Registry
	l    net.Listener
	cert *tls.Certificate
	ns   string
}

// Listen opens the listener of a registry on the store; Serve is to be called.
// errdefs.ErrInvalidArgument for options that can't be, ErrConflict if the address is
// in use, ErrUnavailable if this machine does not have it (yet).
func Listen(ctx context.Context, s *image.Store, o Options) (*Server, error) {
	if err := CheckExposure(o.Listen, o.Users != nil, o.Certificate != nil, o.ReadOnly); err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", o.Listen)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("registry: %w: %w", err, errdefs.ErrConflict)
	}
	var unknown *net.DNSError
	if errors.Is(err, unix.EADDRNOTAVAIL) || errors.As(err, &unknown) {
		return nil, fmt.Errorf("registry: %w: %w", err, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, fmt.Errorf("registry: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	srv := &Server{l: l, cert: o.Certificate, ns: o.Namespace}
	host, _, _ := net.SplitHostPort(o.Listen) // CheckExposure has read it
	local := loopback(host)
	if srv.ns == "" {
		_, port, _ := net.SplitHostPort(l.Addr().String())
		if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
			host = "localhost"
		}
		srv.ns = net.JoinHostPort(host, port)
	}
	reps, err := s.Repositories(srv.ns)
	if err != nil {
		_ = l.Close() // the error that is returned matters more
		return nil, err
	}
	reps.Limit(o.Limits)
	srv.reg = New(Config{Repositories: reps, ReadOnly: o.ReadOnly, Users: o.Users, Local: local && o.Users == nil && o.Certificate == nil, OnRequest: o.OnRequest, Log: o.Log})
	return srv, nil
}

// Addr is the address listened on.
func (s *Server) Addr() string { return s.l.Addr().String() }

// Namespace is what names of pushed images begin with.
func (s *Server) Namespace() string { return s.ns }

// Serve serves until ctx ends; see Registry.Serve.
func (s *Server) Serve(ctx context.Context) error { return s.reg.Serve(ctx, s.l, s.cert) }
