// Package tenon serves what Tenon's socket answers beside the Docker API, under
// /tenon/v1: a container's run in one round trip, an exec likewise, the host's
// check-up, base images without a registry and the life of images, machines, virtual machines made ahead,
// and the daemon's end.
// docs/tenon-api.md describes it; the frames of a run are package
// client/runproto's.
package tenon

import (
	"context"
	"log/slog"
	"net/http"

	"github.com/containerd/errdefs"
	"tenon.dev/tenon/client/registryapi"
	"tenon.dev/tenon/client/runproto"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/server/wire"
)

// Prefix is what the paths of this API begin with.
const Prefix = "/tenon/"

// Config is what an API serves. Engine and Images are required.
type Config struct {
	Engine engine.API
	Images *image.Store
	// Doctor answers GET /tenon/v1/doctor; nil: 501.
	Doctor func(ctx context.Context) (any, error)
	// PrepareVM answers POST /tenon/v1/vm/prepare; nil: 501.
	PrepareVM func(ctx context.Context) (any, error)
	// Footprint answers GET /tenon/v1/df; nil: 501.
	Footprint func(ctx context.Context) (any, error)
	// Quit makes the daemon end; nil: shutdown is answered with 501.
	Quit func()
	// Registry bounds what clients can make a registry keep; zero values are defaults.
	Registry image.RepositoryLimits
	// Tenant is the machine whose own socket this is: run and exec alone are served.
	Tenant string
	// Doors are the machines' own sockets; nil: they have none.
	Doors Doors
	Log   *slog.Logger
}

// API is an http.Handler. Make it with New.
type API struct {
	cfg Config
	log *slog.Logger
	mux *http.ServeMux
}

// New makes an API.
func New(cfg Config) *API {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a := &API{cfg: cfg, log: cfg.Log, mux: http.NewServeMux()}
	a.handle("POST "+runproto.Path, a.run)
	a.handle("POST "+runproto.ExecPath, a.exec)
	if cfg.Tenant != "" {
		a.handle("/tenon/", func(http.ResponseWriter, *http.Request) error {
			return engine.Denied(cfg.Tenant, "this is served on the daemon's own socket")
		})
		return a
	}
	a.handle("GET /tenon/v1/doctor", answer(cfg.Doctor, "this daemon has no doctor"))
	a.handle("POST /tenon/v1/vm/prepare", answer(cfg.PrepareVM, "this daemon was set up without virtual machines"))
	a.imageRoutes()
	a.handle("POST /tenon/v1/shutdown", a.shutdown)
	a.spaceRoutes()
	a.signatureRoutes()
	a.handle("POST "+registryapi.Path, a.serveRegistry)
	a.machineRoutes()
	a.mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		wire.WriteMessage(w, http.StatusNotFound, "page not found")
	})
	return a
}

func (a *API) handle(pattern string, do func(http.ResponseWriter, *http.Request) error) {
	a.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		if err := do(w, r); err != nil {
			if wire.Status(err) == http.StatusInternalServerError {
				a.log.Warn("request failed", "method", r.Method, "path", r.URL.Path, "err", err)
			}
			wire.WriteError(w, err)
		}
	})
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.mux.ServeHTTP(w, r) }

// answer writes what f finds; without one it says none.
func answer(f func(context.Context) (any, error), none string) func(http.ResponseWriter, *http.Request) error {
	return func(w http.ResponseWriter, r *http.Request) error {
		if f == nil {
			return errdefs.ErrNotImplemented.WithMessage(none)
		}
		v, err := f(r.Context())
		if err != nil {
			return err
		}
		return wire.WriteJSON(w, http.StatusOK, v)
	}
}

func (a *API) shutdown(w http.ResponseWriter, r *http.Request) error {
	if a.cfg.Quit == nil {
		return errdefs.ErrNotImplemented.WithMessage("this daemon can't be ended by a request; stop its process")
	}
	// A client that loses patience does not stop half of it.
	if err := a.cfg.Engine.Shutdown(context.WithoutCancel(r.Context())); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	_ = http.NewResponseController(w).Flush() // the client may be gone
	go a.cfg.Quit()                           // it waits for this handler
	return nil
}
