// Package docker serves the Docker Engine API: its routes, shapes, version
// negotiation and the differences between versions that clients notice. What
// it serves is written in one table (routes.go), from which docs/docker-api.md
// is made and tested.
//
// A request's path may start with /v1.NN; the version is cut off before the
// route is looked up and is kept in the call. Names of images and plugins may
// hold slashes, which Go's ServeMux matches only at a path's end, so path
// escapes them first.
//
// Handlers are methods of API: they decode, call the engine, the image store
// or the networks, and encode. An error they return becomes a status in
// package wire. Handlers that have begun to answer return nil.
package docker

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"

	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/server/wire"
)

// Config is what an API serves. Engine, Images and Networks are required.
type Config struct {
	Engine                        engine.API
	Images                        *image.Store
	Networks                      Networks
	Version, GitCommit, BuildTime string
	Log                           *slog.Logger
	// Builder builds images; nil: there is none.
	Builder Builder
	// Tenant, if not nil, says that this is a machine's own socket, with Engine and
	// Networks scoped to it.
	Tenant Tenant
}

// Networks are the networks that clients see; *network.Controller is all of them.
type Networks interface {
	List(ctx context.Context, f network.Filters) ([]network.Inspect, error)
	Inspect(ctx context.Context, ref string) (network.Inspect, error)
	Create(ctx context.Context, req network.CreateRequest) (network.Inspect, error)
	Remove(ctx context.Context, ref string) error
	Prune(ctx context.Context, f network.Filters) ([]string, error)
}

// Tenant is what a machine's own socket adds to that.
type Tenant interface {
	// ImageName refuses a name that may not be given to an image, or taken away.
	ImageName(ref string) error
	// Kernel is the release of the machine's kernel.
	Kernel(ctx context.Context) string
}

// API is the Docker Engine API as an http.Handler. Make it with New.
type API struct {
	cfg    Config
	eng    engine.API
	images *image.Store
	nets   Networks
	log    *slog.Logger
	mux    func() *http.ServeMux
	server string // Server header
}

// New makes an API.
func New(cfg Config) *API {
	if cfg.Version == "" {
		cfg.Version = "dev"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a := &API{cfg: cfg, eng: cfg.Engine, images: cfg.Images, nets: cfg.Networks, log: cfg.Log,
		server: "Tenon/" + cfg.Version + " (linux)"}
	// ServeMux compares each pattern with the others: 2 ms that a daemon's start
	// need not wait for.
	a.mux = sync.OnceValue(a.routes)
	return a
}

// routes makes the multiplexer of the table.
func (a *API) routes() *http.ServeMux {
	mux := http.NewServeMux()
	for _, rt := range routes {
		mux.Handle(rt.Method+" "+rt.Pattern, &handler{api: a, route: rt})
	}
	mux.HandleFunc("/", notFound)
	return mux
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Server", a.server)
	h.Set("Api-Version", MaxVersion.String())
	h.Set("Ostype", "linux")
	v, rest, err := splitVersion(r.URL.EscapedPath())
	if err != nil {
		wire.WriteError(w, err)
		return
	}
	u := *r.URL
	u.RawPath = escapeNames(r.Method, rest)
	if u.Path, err = url.PathUnescape(u.RawPath); err != nil {
		wire.WriteError(w, wire.Invalid("malformed path: %v", err))
		return
	}
	r2 := r.WithContext(context.WithValue(r.Context(), versionKey{}, v))
	r2.URL = &u
	a.mux().ServeHTTP(w, r2)
}

type versionKey struct{}

func notFound(w http.ResponseWriter, _ *http.Request) {
	wire.WriteMessage(w, http.StatusNotFound, "page not found")
}

// handler runs one route.
type handler struct {
	api   *API
	route route
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != h.route.Method { // ServeMux gives HEAD to GET's handlers: streams would never end
		notFound(w, r)
		return
	}
	v, _ := r.Context().Value(versionKey{}).(Version)
	c := &call{w: w, r: r, ctx: r.Context(), v: v, q: r.URL.Query()}
	err := h.route.do(h.api, c)
	if err == nil {
		return
	}
	if r.Context().Err() != nil && errors.Is(err, context.Canceled) {
		h.api.log.Debug("request given up by its client", "method", r.Method, "path", r.URL.Path)
	}
	if s := wire.Status(err); s >= 500 && s != http.StatusNotImplemented && s != http.StatusServiceUnavailable {
		h.api.log.Warn("request failed", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	wire.WriteError(w, err)
}

// call is one request.
type call struct {
	w   http.ResponseWriter
	r   *http.Request
	ctx context.Context
	v   Version
	q   url.Values
}

// name is the {name} of the path.
func (c *call) name() string { return c.r.PathValue("name") }

// has tells whether a query parameter is given at all.
func (c *call) has(key string) bool { return c.q.Has(key) }

// str is a query parameter.
func (c *call) str(key string) string { return c.q.Get(key) }

// flag is a boolean query parameter; Docker takes anything but these for true.
func (c *call) flag(key string) bool {
	switch strings.ToLower(strings.TrimSpace(c.q.Get(key))) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}

// flagOr is flag with a default for a missing parameter.
func (c *call) flagOr(key string, def bool) bool {
	if !c.q.Has(key) {
		return def
	}
	return c.flag(key)
}

// num is an integer query parameter; def if it is missing or empty.
func (c *call) num(key string, def int) (int, error) {
	s := c.q.Get(key)
	if s == "" {
		return def, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		return 0, wire.Invalid("invalid value for %q: %q is not a number", key, s)
	}
	return n, nil
}

// read decodes the JSON body into v.
func (c *call) read(v any) error { return wire.ReadJSON(c.w, c.r, v) }

// json answers with v.
func (c *call) json(status int, v any) error { return wire.WriteJSON(c.w, status, v) }

// done answers without a body.
func (c *call) done(status int) error {
	c.w.WriteHeader(status)
	return nil
}
