package tenon

import (
	"net/http"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/server/wire"
)

func (a *API) spaceRoutes() {
	a.handle("GET /tenon/v1/df", answer(a.cfg.Footprint, "this daemon does not measure its disk"))
	a.handle("GET "+imageapi.Path+"/pin", func(w http.ResponseWriter, r *http.Request) error {
		return wire.WriteJSON(w, http.StatusOK, a.cfg.Images.Pinned(r.Context()))
	})
	a.handle("PUT "+imageapi.Path+"/pin", func(w http.ResponseWriter, r *http.Request) error {
		q := r.URL.Query()
		if err := a.cfg.Images.Pin(r.Context(), q.Get("image"), !q.Has("pinned") || truth(q, "pinned")); err != nil {
			return err
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	})
}
