package server

import (
	"net/http"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/image/crypt"
	"tenon.dev/tenon/internal/server/wire"
)

// withKeys hands on the keys of images that come with a request: in its context, not in
// its header any more. With own those of the daemon's settings do not count.
func withKeys(next http.Handler, own bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v := r.Header.Get(imageapi.KeysHeader)
		if v == "" && !own {
			next.ServeHTTP(w, r)
			return
		}
		ctx := r.Context()
		var keys *crypt.Keys
		var encrypt *image.EncryptOptions
		if v != "" {
			r.Header.Del(imageapi.KeysHeader)
			k, err := imageapi.DecodeKeys(v)
			if err != nil {
				wire.WriteError(w, wire.Invalid("%v", err))
				return
			}
			keys, err = crypt.ParseKeys(k.Decrypt)
			k.Wipe()
			if err == nil && len(k.JWE)+len(k.PKCS7) > 0 {
				encrypt = &image.EncryptOptions{Layers: k.Layers}
				encrypt.To, err = crypt.ParseRecipients(k.JWE, k.PKCS7)
			}
			if err != nil {
				wire.WriteError(w, err)
				return
			}
		}
		ctx = image.WithKeys(ctx, keys, own)
		if encrypt != nil {
			ctx = image.WithEncryption(ctx, encrypt)
		}
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}
