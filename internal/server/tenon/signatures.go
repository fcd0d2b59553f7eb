package tenon

import (
	"net/http"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/image/signature"
	"tenon.dev/tenon/internal/server/docker"
	"tenon.dev/tenon/internal/server/wire"
)

// maxKeyFiles bounds what one request may bring to check signatures with.
const maxKeyFiles = 16

func (a *API) signatureRoutes() {
	images := a.cfg.Images
	a.handle("GET "+imageapi.SignaturesPath, func(w http.ResponseWriter, r *http.Request) error {
		p, err := images.Signable(r.Context(), r.URL.Query().Get("image"), docker.Auth(r))
		if err != nil {
			return err
		}
		return wire.WriteJSON(w, http.StatusOK, imageapi.Signable{Payloads: p})
	})
	a.handle("POST "+imageapi.SignaturesPath, func(w http.ResponseWriter, r *http.Request) error {
		var q imageapi.SignRequest
		if err := wire.ReadJSON(w, r, &q); err != nil {
			return err
		}
		var sigs []signature.Signature
		for _, s := range q.Signatures {
			sigs = append(sigs, signature.Signature{Payload: s.Payload, Signature: s.Signature})
		}
		signed, err := images.PushSignatures(r.Context(), q.Image, sigs, docker.Auth(r))
		if err != nil {
			return err
		}
		var out imageapi.SignReport
		for _, d := range signed {
			out.Signed = append(out.Signed, d.String())
		}
		return wire.WriteJSON(w, http.StatusOK, out)
	})
	a.handle("POST "+imageapi.SignaturesPath+"/verify", func(w http.ResponseWriter, r *http.Request) error {
		var q imageapi.VerifyRequest
		if err := wire.ReadJSON(w, r, &q); err != nil {
			return err
		}
		if len(q.Keys) > maxKeyFiles {
			return wire.Invalid("%d files of keys, %d are the most", len(q.Keys), maxKeyFiles)
		}
		var keys []signature.Key
		for _, k := range q.Keys {
			parsed, err := signature.ParsePublicKeys(k.Name, k.PEM)
			if err != nil {
				return err
			}
			keys = append(keys, parsed...)
		}
		v, err := images.VerifySignatures(r.Context(), q.Image, keys, q.Identity, docker.Auth(r))
		if err != nil {
			return err
		}
		out := imageapi.VerifyReport{Image: q.Image, Digest: v.Digest.String(), Rule: v.Rule, Key: v.Key.Name, KeyID: v.Key.ID(), Source: v.Source, Manifest: v.Manifest.String()}
		return wire.WriteJSON(w, http.StatusOK, out)
	})
}
