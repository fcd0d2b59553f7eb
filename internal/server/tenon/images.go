package tenon

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/server/wire"
)

func (a *API) imageRoutes() {
	a.handle("POST "+imageapi.Path+"/bootstrap", a.bootstrap)
	life, ok := a.cfg.Engine.(Life)
	if !ok {
		return
	}
	get := func(path string, f func(context.Context, url.Values, *http.Request) (any, error)) {
		a.handle("GET "+imageapi.Path+path, func(w http.ResponseWriter, r *http.Request) error {
			v, err := f(r.Context(), r.URL.Query(), r)
			if err != nil {
				return err
			}
			return wire.WriteJSON(w, http.StatusOK, v)
		})
	}
	get("/tree", func(ctx context.Context, q url.Values, _ *http.Request) (any, error) {
		return life.ImageTree(ctx, q.Get("image"), truth(q, "all"))
	})
	get("/outdated", func(ctx context.Context, q url.Values, r *http.Request) (any, error) {
		auth, err := credentials(r)
		if err != nil {
			return nil, err
		}
		return life.ImageOutdated(ctx, truth(q, "remote"), auth)
	})
	get("/plan", func(ctx context.Context, q url.Values, _ *http.Request) (any, error) {
		return life.ImagePlan(ctx, q.Get("image"), truth(q, "chain"), truth(q, "all"))
	})
	get("/diff", func(ctx context.Context, q url.Values, _ *http.Request) (any, error) {
		return life.ImageDiff(ctx, q.Get("old"), q.Get("new"), truth(q, "nofiles"))
	})
	get("/packages", func(ctx context.Context, q url.Values, _ *http.Request) (any, error) {
		if q.Get("form") == "spdx" {
			return life.ImageSPDX(ctx, q.Get("image"))
		}
		return life.ImagePackages(ctx, q.Get("image"), truth(q, "files"))
	})
	a.handle("GET "+imageapi.AuditPath, func(w http.ResponseWriter, r *http.Request) error {
		q := r.URL.Query()
		v, err := life.Audit(r.Context(), engine.AuditOptions{Images: q["image"], Names: q["name"], All: truth(q, "all")})
		if err != nil {
			return err
		}
		return wire.WriteJSON(w, http.StatusOK, v)
	})
	a.handle("PUT "+imageapi.Path+"/definition", func(w http.ResponseWriter, r *http.Request) error {
		var d imageapi.Definition
		if err := wire.ReadJSON(w, r, &d); err != nil {
			return err
		}
		if err := life.ImageDefine(r.Context(), r.URL.Query().Get("image"), d); err != nil {
			return err
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	})
	a.handle("POST "+imageapi.Path+"/rebase", func(w http.ResponseWriter, r *http.Request) error {
		var q imageapi.RebaseRequest
		if err := wire.ReadJSON(w, r, &q); err != nil {
			return err
		}
		v, err := life.ImageRebase(r.Context(), q)
		if err != nil {
			return err
		}
		return wire.WriteJSON(w, http.StatusOK, v)
	})
}

// Life is what an engine knows of its images' lives; one that does not has none of
// these paths.
type Life interface {
	ImageTree(ctx context.Context, ref string, all bool) ([]imageapi.Node, error)
	ImageOutdated(ctx context.Context, remote bool, auth engine.Credentials) (*imageapi.OutdatedReport, error)
	ImagePlan(ctx context.Context, ref string, chain, all bool) ([]imageapi.Step, error)
	ImageDefine(ctx context.Context, ref string, d imageapi.Definition) error
	ImageRebase(ctx context.Context, r imageapi.RebaseRequest) (*imageapi.RebaseReport, error)
	ImageDiff(ctx context.Context, from, to string, noFiles bool) (*imageapi.Diff, error)
	ImagePackages(ctx context.Context, ref string, files bool) (*imageapi.SBOM, error)
	ImageSPDX(ctx context.Context, ref string) (json.RawMessage, error)
	Audit(ctx context.Context, o engine.AuditOptions) (*imageapi.AuditReport, error)
}

func truth(q url.Values, name string) bool {
	v, _ := strconv.ParseBool(q.Get(name)) // what is no truth value is none
	return v
}

// credentials reads X-Registry-Config, as builds send it: credentials by registry.
func credentials(r *http.Request) (engine.Credentials, error) {
	h := r.Header.Get("X-Registry-Config")
	if h == "" {
		return nil, nil
	}
	var all map[string]registry.AuthConfig
	b, err := base64.URLEncoding.DecodeString(h)
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil {
		return nil, fmt.Errorf("X-Registry-Config: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return func(ref string) *registry.AuthConfig {
		n, err := reference.ParseNormalizedNamed(ref)
		if err != nil {
			return nil
		}
		host := reference.Domain(n)
		if host == "docker.io" {
			host = "https://index.docker.io/v1/"
		}
		if a, ok := all[host]; ok {
			return &a
		}
		return nil
	}, nil
}

// bootstrap makes a base image; the answer is a stream, in which an error may come
// after the beginning.
func (a *API) bootstrap(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	name, suite, _ := strings.Cut(q.Get("name"), ":")
	switch name {
	case "", "busybox":
		if suite != "" && suite != "latest" || q.Has("include") || q.Has("mirror") || q.Has("epoch") || q.Has("tag") {
			return errdefs.ErrInvalidArgument.WithMessage("busybox is one program, and comes as it is: it has no suites, packages or tags to choose")
		}
		img, err := a.cfg.Images.BootstrapBusybox(r.Context())
		if err != nil {
			return err
		}
		s := wire.NewStream(w, "application/json", true)
		enc := json.NewEncoder(s)
		_ = enc.Encode(map[string]string{"status": "Made " + img.Ref() + " from the host's busybox-static"}) // the client may be gone
		_ = enc.Encode(map[string]string{"status": img.Ref(), "id": img.ID})
		s.Close(true)
		return nil
	case "debian":
	default:
		return errdefs.ErrNotImplemented.WithMessage("only busybox and debian[:SUITE] can be made without a registry; load or pull other images")
	}
	o := image.DebianOptions{Suite: suite, Ref: q.Get("tag"), Mirror: q.Get("mirror")}
	for _, list := range q["include"] {
		for p := range strings.SplitSeq(list, ",") {
			if p = strings.TrimSpace(p); p != "" {
				o.Include = append(o.Include, p)
			}
		}
	}
	if e := q.Get("epoch"); e != "" {
		n, err := strconv.ParseInt(e, 10, 64)
		if err != nil {
			return fmt.Errorf("epoch %.40q is no number of seconds: %w", e, errdefs.ErrInvalidArgument)
		}
		o.Epoch = &n
	}
	s := wire.NewStream(w, "application/json", true)
	enc := json.NewEncoder(s)
	o.Progress = func(p image.Progress) {
		_ = enc.Encode(map[string]string{"status": p.Status}) // the client may be gone
	}
	img, err := a.cfg.Images.BootstrapDebian(r.Context(), o)
	if err != nil && !s.Began() {
		return err
	}
	if err != nil {
		a.log.Warn("request failed", "path", r.URL.Path, "err", err)
		_ = enc.Encode(map[string]any{"error": err.Error(), "errorDetail": map[string]string{"message": err.Error()}})
		s.Close(true)
		return nil
	}
	_ = enc.Encode(map[string]string{"status": img.Ref(), "id": img.ID})
	s.Close(true)
	return nil
}
