package remote

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	dialTimeout   = 10 * time.Second
	headerTimeout = 20 * time.Second
	maxRedirects  = 10
	maxErrorBody  = 4 << 10
)

// Repository reads blobs of one repository. It is safe for concurrent use.
type Repository struct {
	agent string
	hosts []*host
}

// host is a server that is asked.
type host struct {
	Host
	client *http.Client
	auth   authorizer
	plain  atomic.Bool // it speaks no TLS

	mu sync.Mutex
	// moved is where the host has sent us for a blob, if that was another host:
	// further ranges are asked for there, until it refuses.
	moved map[digest.Digest]*url.URL
}

// maxMoved bounds what is remembered of redirections.
const maxMoved = 1 << 10

// New makes the reader of a repository. It asks nobody yet. InvalidArgument for
// certificates that are none.
func New(a Access) (*Repository, error) {
	if a.Repository == "" || len(a.Hosts) == 0 {
		return nil, fmt.Errorf("registry: no repository, or no host: %w", errdefs.ErrInvalidArgument)
	}
	r := &Repository{agent: cmp.Or(a.UserAgent, "tenon")}
	for _, h := range a.Hosts {
		h.Repository = cmp.Or(h.Repository, a.Repository)
		c, err := client(h)
		if err != nil {
			return nil, fmt.Errorf("registry %s: %w", h.Host, err)
		}
		o := &host{Host: h, client: c, moved: map[digest.Digest]*url.URL{}}
		o.auth = authorizer{host: &o.Host, client: c, repository: h.Repository, agent: r.agent}
		r.hosts = append(r.hosts, o)
	}
	return r, nil
}

// Close closes the connections that wait.
func (r *Repository) Close() {
	for _, h := range r.hosts {
		h.client.CloseIdleConnections()
	}
}

func client(h Host) (*http.Client, error) {
	tc := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: h.Insecure}
	for _, pem := range h.Roots {
		if tc.RootCAs == nil {
			var err error
			if tc.RootCAs, err = x509.SystemCertPool(); err != nil {
				tc.RootCAs = x509.NewCertPool()
			}
		}
		if !tc.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("no certificate: %w", errdefs.ErrInvalidArgument)
		}
	}
	for _, p := range h.Certs {
		c, err := tls.X509KeyPair(p.Cert, p.Key)
		if err != nil {
			return nil, fmt.Errorf("client certificate: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		tc.Certificates = append(tc.Certificates, c)
	}
	tr := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:       tc,
		TLSHandshakeTimeout:   dialTimeout,
		ResponseHeaderTimeout: headerTimeout,
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       60 * time.Second,
		DisableCompression:    true,
		ReadBufferSize:        64 << 10,
		ForceAttemptHTTP2:     true,
	}
	return &http.Client{Transport: tr, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) >= maxRedirects {
			return errors.New("too many redirects")
		}
		if !h.Insecure && req.URL.Scheme != "https" && via[0].URL.Scheme == "https" {
			return errors.New("redirect from https to " + req.URL.Scheme)
		}
		return nil
	}}, nil
}

// Range returns size bytes of a blob from off; the reader ends with
// io.ErrUnexpectedEOF if fewer come. The hosts are asked in turn, after the first skip
// of them (modulo their number). The error's classes:
// NotFound, PermissionDenied (credentials), FailedPrecondition (the server knows no
// ranges), Unavailable (it may go better later). The context bounds the reading, too.
func (r *Repository) Range(ctx context.Context, blob digest.Digest, off, size int64, skip int) (io.ReadCloser, error) {
	var errs []error
	for i := range r.hosts {
		h := r.hosts[(i+skip)%len(r.hosts)]
		body, err := h.get(ctx, r, blob, off, size)
		if err == nil {
			return body, nil
		}
		errs = append(errs, fmt.Errorf("registry %s: blob %s: %w", h.Host.Host, blob, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

func (h *host) get(ctx context.Context, r *Repository, blob digest.Digest, off, size int64) (io.ReadCloser, error) {
	h.mu.Lock()
	moved := h.moved[blob]
	h.mu.Unlock()
	if moved != nil {
		resp, err := h.ask(ctx, r, moved, off, size, false)
		if err == nil {
			if body, err := ranged(resp, off, size); err == nil {
				return body, nil
			}
		}
		h.mu.Lock()
		delete(h.moved, blob)
		h.mu.Unlock()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	scheme := cmp.Or(h.Scheme, "https")
	if h.plain.Load() {
		scheme = "http"
	}
	u := &url.URL{Scheme: scheme, Host: h.Host.Host, Path: h.Path + "/" + h.Repository + "/blobs/" + blob.String()}
	resp, err := h.ask(ctx, r, u, off, size, true)
	if err != nil && h.PlainHTTP && u.Scheme == "https" && notTLS(err, h.Host.Host) {
		u.Scheme = "http"
		if resp, err = h.ask(ctx, r, u, off, size, true); err == nil {
			h.plain.Store(true)
		}
	}
	if err != nil {
		return nil, err
	}
	body, err := ranged(resp, off, size)
	if err == nil && resp.Request.URL.Host != h.Host.Host {
		h.mu.Lock()
		if len(h.moved) < maxMoved {
			h.moved[blob] = resp.Request.URL
		}
		h.mu.Unlock()
	}
	return body, err
}

// notTLS tells whether the server speaks HTTP where HTTPS was tried.
func notTLS(err error, host string) bool {
	var re tls.RecordHeaderError
	return errors.As(err, &re) || errors.Is(err, http.ErrSchemeMismatch) ||
		errors.Is(err, unix.ECONNREFUSED) && !strings.Contains(host, ":") // the ports differ
}

// ask sends a request for a range. With authorization, the server may say how it wants it.
func (h *host) ask(ctx context.Context, r *Repository, u *url.URL, off, size int64, ours bool) (*http.Response, error) {
	for try := 0; ; try++ {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("User-Agent", r.agent)
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+size-1))
		if ours {
			if err := h.auth.authorize(ctx, req); err != nil {
				return nil, err
			}
		}
		resp, err := h.client.Do(req)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", redacted(err), errdefs.ErrUnavailable)
		}
		if resp.StatusCode != http.StatusUnauthorized || !ours || try > 0 {
			return resp, nil
		}
		discard(resp)
		if err := h.auth.challenged(ctx, resp); err != nil {
			return nil, err
		}
	}
}

// redacted is an error without the URL, which may hold a signature.
func redacted(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err
	}
	return err
}

func discard(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, maxErrorBody) // so that the connection is used again
	resp.Body.Close()
}

// ranged checks that an answer has the range.
func ranged(resp *http.Response, off, size int64) (io.ReadCloser, error) {
	fail := func(class error, format string, a ...any) (io.ReadCloser, error) {
		discard(resp)
		return nil, fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), class)
	}
	switch code := resp.StatusCode; {
	case code == http.StatusPartialContent:
		var first, last int64
		if n, _ := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/", &first, &last); n != 2 || first != off || last != off+size-1 {
			return fail(errdefs.ErrFailedPrecondition, "asked for the bytes %d-%d, it sends %.100q", off, off+size-1, resp.Header.Get("Content-Range"))
		}
	case code == http.StatusOK && off == 0:
		// The whole, of which the beginning is read.
	case code == http.StatusOK:
		resp.Body.Close() // not read to its end
		return nil, fmt.Errorf("it does not serve parts of blobs: %w", errdefs.ErrFailedPrecondition)
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return fail(errdefs.ErrPermissionDenied, "access denied (%s)", resp.Status)
	case code == http.StatusNotFound:
		return fail(errdefs.ErrNotFound, "it is not there")
	case code == http.StatusTooManyRequests, code >= 500:
		return fail(errdefs.ErrUnavailable, "it answers %s", resp.Status)
	default:
		return fail(errdefs.ErrFailedPrecondition, "it answers %s", resp.Status)
	}
	return &exact{body: resp.Body, left: size}, nil
}

// exact reads as many bytes as were asked for.
type exact struct {
	body io.ReadCloser
	left int64
}

func (e *exact) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n, err := e.body.Read(p[:min(int64(len(p)), e.left)])
	e.left -= int64(n)
	switch {
	case e.left == 0:
		err = nil
		if n == 0 {
			err = io.EOF
		}
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (e *exact) Close() error { return e.body.Close() }
