package server

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"tenon.dev/tenon/internal/server/wire"
)

type netKey struct{}

// connContext notes what kind of connection a request came by.
func connContext(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, netKey{}, c.LocalAddr().Network())
}

// guard wraps the APIs with what holds for every request.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.live.Add(1)
		defer s.live.Done()
		if s.cfg.Answered != nil {
			defer s.cfg.Answered()
		}
		debugging := s.log.Enabled(r.Context(), slog.LevelDebug)
		start := time.Time{}
		var rec *recorder
		if debugging {
			start = time.Now()
			rec = &recorder{ResponseWriter: w}
			w = rec
		}
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler {
					panic(p)
				}
				s.log.Error("request panicked", "method", r.Method, "path", r.URL.Path,
					"panic", p, "stack", string(debug.Stack()))
				// If the answer has begun already, this is lost; the log has it.
				wire.WriteError(w, errdefs.ErrInternal.WithMessage("the daemon met a fault of its own in this request; its log has the details"))
			}
			if debugging {
				s.log.Debug("request", "method", r.Method, "path", r.URL.Path,
					"status", max(rec.status, http.StatusOK), "dur", time.Since(start))
			}
		}()
		if err := s.allowed(r); err != nil {
			wire.WriteError(w, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// allowed refuses what a web page could make a browser send to a TCP listener:
// requests of a foreign origin, and requests to a name that was made to point
// here (DNS rebinding).
func (s *Server) allowed(r *http.Request) error {
	if network, _ := r.Context().Value(netKey{}).(string); network == "unix" {
		if o := r.Header.Get("Origin"); o != "" && o != "null" && !sameOrigin(o, r.Host) {
			return errdefs.ErrPermissionDenied.WithMessage("requests of web pages of another origin (" + o + ") are not answered")
		}
		return nil
	}
	if !s.knownHost(r.Host, r.TLS) {
		return errdefs.ErrPermissionDenied.WithMessage("the Host header " + quote(r.Host) + " is none of this daemon's names; use its address, or allow the name in the daemon's configuration")
	}
	if o := r.Header.Get("Origin"); o != "" && !sameOrigin(o, r.Host) {
		return errdefs.ErrPermissionDenied.WithMessage("requests of web pages of another origin (" + o + ") are not answered")
	}
	if f := r.Header.Get("Sec-Fetch-Site"); f == "cross-site" || f == "same-site" {
		return errdefs.ErrPermissionDenied.WithMessage("requests of web pages of another site are not answered")
	}
	return nil
}

func quote(s string) string {
	if len(s) > 200 {
		s = s[:200] + "…"
	}
	return `"` + strings.ToValidUTF8(s, "?") + `"`
}

func sameOrigin(origin, host string) bool {
	u, err := url.Parse(origin)
	return err == nil && u.Host != "" && strings.EqualFold(u.Host, host)
}

func (s *Server) knownHost(host string, state *tls.ConnectionState) bool {
	h := host
	if n, _, err := net.SplitHostPort(host); err == nil {
		h = n
	}
	h = strings.Trim(h, "[]")
	if _, err := netip.ParseAddr(h); err == nil || strings.EqualFold(h, "localhost") {
		return true
	}
	if slices.ContainsFunc(s.cfg.AllowedHosts, func(a string) bool { return strings.EqualFold(a, h) }) {
		return true
	}
	// The TLS handshake has shown the client a certificate of ours for the name
	// it asked for; Listen refuses names that the certificate does not have.
	return state != nil && state.ServerName != "" && strings.EqualFold(state.ServerName, h)
}

// recorder remembers the status for the access log.
type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(code int) {
	if r.status == 0 {
		r.status = code
	}
	r.ResponseWriter.WriteHeader(code)
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController find Flush and Hijack.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }
