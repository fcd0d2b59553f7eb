package tenon

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/server/wire"
)

func (a *API) imageRoutes() {
	a.handle("POST "+imageapi.Path+"/bootstrap", a.bootstrap)
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
