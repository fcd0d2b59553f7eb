package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/server/docker"
	"tenon.dev/tenon/internal/server/tenon"
	"tenon.dev/tenon/internal/tenant"
)

// maxSocketPath is what an address of a unix socket holds, in bytes.
const maxSocketPath = 107

// doors are the machines' own sockets: each a whole Docker API, scoped to its
// machine by package tenant.
type doors struct {
	s   *Server
	dir string

	mu     sync.Mutex
	open   map[string]*http.Server
	closed bool
}

var _ tenon.Doors = (*doors)(nil)

// Path is where a machine's socket is.
func (d *doors) Path(name string) string { return filepath.Join(d.dir, name+".sock") }

// Check says why a machine could have no socket.
func (d *doors) Check(name, group string) error {
	if err := machine.CheckName(name); err != nil {
		return err
	}
	if p := d.Path(name); len(p) > maxSocketPath {
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("the machine's name is too long: its socket %s would have a path of %d bytes, and %d is the most", p, len(p), maxSocketPath))
	}
	if group != "" {
		if _, err := user.LookupGroup(group); err != nil {
			return errdefs.ErrInvalidArgument.WithMessage("there is no group " + group + " to own the machine's socket")
		}
	}
	return nil
}

// Open listens.
func (d *doors) Open(ctx context.Context, r *machine.Record) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.open[r.Name] != nil {
		return nil
	}
	group := r.Group
	if group == "" {
		group = d.s.cfg.Group
	}
	l, err := listenUnix(ctx, d.Path(r.Name), group)
	if err != nil {
		return fmt.Errorf("machine %s: its socket: %w", r.Name, err)
	}
	srv := d.s.httpServer(d.s.guard(withKeys(d.handler(r.Name), true)))
	d.open[r.Name] = srv
	go func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			d.s.log.Error("a machine's socket is served no more", "machine", r.Name, "err", err)
		}
	}()
	return nil
}

// handler serves a machine's tenants.
func (d *doors) handler(name string) http.Handler {
	cfg := d.s.cfg
	scope := tenant.New(cfg.Engine, cfg.Networks, name)
	log := d.s.log.With("machine", name)
	api := docker.New(docker.Config{
		Engine: scope, Images: cfg.Images, Networks: scope.Networks(), Tenant: scope,
		Version: cfg.Version, GitCommit: cfg.GitCommit, BuildTime: cfg.BuildTime, Log: log,
	})
	own := tenon.New(tenon.Config{Engine: scope, Images: cfg.Images, Tenant: name, Log: log})
	return route(own, api)
}

// Close stops listening and removes the socket.
func (d *doors) Close(name string) {
	d.mu.Lock()
	srv := d.open[name]
	delete(d.open, name)
	d.mu.Unlock()
	if srv != nil {
		_ = srv.Close() // removes the socket; what is under way is cut off
	}
}

// openAll opens the sockets of all machines that there are.
func (d *doors) openAll(ctx context.Context) {
	list, err := d.s.cfg.Engine.MachineList(ctx, nil)
	if err != nil {
		d.s.log.Error("machines' sockets are not served", "err", err)
		return
	}
	known := map[string]bool{}
	for _, m := range list {
		if m.State == machine.Creating || m.State == machine.Removing { // a daemon was killed at it: it goes
			continue
		}
		known[m.Record.Name] = true
		if err := d.Open(ctx, m.Record); err != nil {
			d.s.log.Error("a machine's socket is not served", "machine", m.Record.Name, "err", err)
		}
	}
	entries, _ := os.ReadDir(d.dir) // none is no error
	for _, x := range entries {
		if name, ok := strings.CutSuffix(x.Name(), ".sock"); ok && !known[name] && x.Type() == os.ModeSocket {
			_ = os.Remove(filepath.Join(d.dir, x.Name())) // of a machine that was removed while a daemon was killed
		}
	}
}

// shutdown stops accepting and waits for what is under way until ctx ends.
func (d *doors) shutdown(ctx context.Context) error {
	d.mu.Lock()
	d.closed = true
	var list []*http.Server
	for _, s := range d.open {
		list = append(list, s)
	}
	d.mu.Unlock()
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for i, s := range list {
		wg.Go(func() { errs[i] = s.Shutdown(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// closeAll ends everything at once.
func (d *doors) closeAll() {
	d.mu.Lock()
	d.closed = true
	defer d.mu.Unlock()
	for _, s := range d.open {
		_ = s.Close() // ends with the process at the latest
	}
}

// httpServer makes a server for the daemon's listeners, or a machine's.
func (s *Server) httpServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		MaxHeaderBytes:    1 << 20,
		BaseContext:       func(net.Listener) context.Context { return s.base },
		ConnContext:       connContext,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}

// route is one handler for both APIs.
func route(own *tenon.API, api *docker.API) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, tenon.Prefix) {
			own.ServeHTTP(w, r)
			return
		}
		api.ServeHTTP(w, r)
	})
}

var _ engine.API = (*tenant.Scope)(nil)
