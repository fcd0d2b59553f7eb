package image

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/sirupsen/logrus"
)

const (
	dialTimeout   = 15 * time.Second
	headerTimeout = 60 * time.Second
	maxRedirects  = 10
)

// quiet keeps the registry client, which logs through a package of its own,
// off the daemon's standard error.
var quiet = func() *log.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return logrus.NewEntry(l)
}()

// resolver returns the registry client for one operation.
func (s *Store) resolver(auth *registry.AuthConfig, tracker docker.StatusTracker) remotes.Resolver {
	h := http.Header{"User-Agent": {cmp.Or(s.cfg.Registries.UserAgent, "tenon")}}
	return docker.NewResolver(docker.ResolverOptions{
		Headers: h,
		Tracker: tracker,
		Hosts:   func(host string) ([]docker.RegistryHost, error) { return s.hosts(host, auth, h) },
	})
}

// hosts lists where to ask for a registry's content: its mirrors, then itself.
func (s *Store) hosts(host string, auth *registry.AuthConfig, header http.Header) ([]docker.RegistryHost, error) {
	var out []docker.RegistryHost
	cfg := s.cfg.Registries
	mirrors := append(slices.Clone(cfg.Mirrors[host]), cfg.Mirrors["*"]...)
	for _, m := range mirrors {
		if !strings.Contains(m, "://") {
			m = "https://" + m
		}
		u, err := url.Parse(m)
		if err != nil || u.Host == "" {
			return nil, fmt.Errorf("mirror %q of %s: not a URL: %w", m, host, errdefs.ErrInvalidArgument)
		}
		rh, err := s.host(u.Host, u.Scheme, nil, header)
		if err != nil {
			return nil, err
		}
		p := strings.TrimSuffix(u.Path, "/")
		if !strings.HasSuffix(p, "/v2") {
			p += "/v2"
		}
		rh.Path = p
		rh.Capabilities = docker.HostCapabilityPull | docker.HostCapabilityResolve | docker.HostCapabilityReferrers
		out = append(out, rh)
	}
	api, err := docker.DefaultHost(host)
	if err != nil {
		return nil, err
	}
	rh, err := s.host(api, "", auth, header)
	if err != nil {
		return nil, err
	}
	return append(out, rh), nil
}

// host describes one server. Credentials are given to it alone, not to mirrors.
func (s *Store) host(host, scheme string, auth *registry.AuthConfig, header http.Header) (docker.RegistryHost, error) {
	client, err := s.client(host, scheme)
	if err != nil {
		return docker.RegistryHost{}, err
	}
	opts := []docker.AuthorizerOpt{docker.WithAuthClient(client), docker.WithAuthHeader(header)}
	rh := docker.RegistryHost{
		Client: client, Host: host, Scheme: cmp.Or(scheme, "https"), Path: "/v2",
		Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve | docker.HostCapabilityPush | docker.HostCapabilityReferrers,
	}
	if auth != nil {
		user, secret, err := credentials(*auth)
		if err != nil {
			return rh, err
		}
		opts = append(opts, docker.WithAuthCreds(func(h string) (string, string, error) {
			if h != host {
				return "", "", nil
			}
			return user, secret, nil
		}))
		if auth.RegistryToken != "" {
			rh.Header = http.Header{"Authorization": {"Bearer " + auth.RegistryToken}}
			return rh, nil
		}
	}
	rh.Authorizer = &oneAtATime{a: docker.NewDockerAuthorizer(opts...)}
	return rh, nil
}

// oneAtATime keeps concurrent requests from racing in containerd's authorizer,
// which reads a token's expiry while another request may set it.
type oneAtATime struct {
	mu sync.Mutex
	a  docker.Authorizer
}

func (o *oneAtATime) Authorize(ctx context.Context, req *http.Request) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.a.Authorize(ctx, req)
}

func (o *oneAtATime) AddResponses(ctx context.Context, rs []*http.Response) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.a.AddResponses(ctx, rs)
}

// credentials returns user and password; no user means that the password is an
// identity token.
func credentials(a registry.AuthConfig) (user, secret string, err error) {
	if a.IdentityToken != "" {
		return "", a.IdentityToken, nil
	}
	if a.Username == "" && a.Auth != "" {
		b, err := base64.StdEncoding.DecodeString(a.Auth)
		if err != nil {
			return "", "", fmt.Errorf("registry credentials: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		u, p, _ := strings.Cut(strings.TrimRight(string(b), "\x00"), ":")
		return u, p, nil
	}
	return a.Username, a.Password, nil
}

// client makes the HTTP client for a host, kept for its connections.
func (s *Store) client(host, scheme string) (*http.Client, error) {
	key := scheme + "://" + host
	s.clientMu.Lock()
	defer s.clientMu.Unlock()
	if c := s.clients[key]; c != nil {
		return c, nil
	}
	insecure := s.insecure(host)
	tc := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: insecure}
	own, err := s.certs(host, tc)
	if err != nil {
		return nil, err
	}
	if own {
		tc.InsecureSkipVerify = false // somebody has said whom to trust
	}
	tr := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:       tc,
		TLSHandshakeTimeout:   dialTimeout,
		ResponseHeaderTimeout: headerTimeout,
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       60 * time.Second,
		ExpectContinueTimeout: time.Second,
		DisableCompression:    true,
		ReadBufferSize:        64 << 10,
		WriteBufferSize:       64 << 10,
		ForceAttemptHTTP2:     true,
	}
	c := &http.Client{Transport: tr, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) >= maxRedirects {
			return errors.New("too many redirects")
		}
		if !insecure && req.URL.Scheme != "https" && via[0].URL.Scheme == "https" {
			return errors.New("redirect from https to " + req.URL.Scheme)
		}
		return nil
	}}
	if insecure && !own && scheme != "http" {
		c.Transport = docker.NewHTTPFallback(tr)
	}
	s.clients[key] = c
	return c, nil
}

// insecure tells whether plain HTTP and unverified certificates will do.
func (s *Store) insecure(host string) bool {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = host
	}
	name = strings.Trim(name, "[]")
	cfg := s.cfg.Registries
	if name == "localhost" || slices.Contains(cfg.InsecureHosts, host) || slices.Contains(cfg.InsecureHosts, name) {
		return true
	}
	var addrs []netip.Addr
	if a, err := netip.ParseAddr(name); err == nil {
		addrs = append(addrs, a.Unmap())
	} else if len(cfg.InsecureCIDRs) > 0 {
		ctx, cancel := context.WithTimeout(s.ctx, dialTimeout)
		defer cancel()
		addrs, _ = net.DefaultResolver.LookupNetIP(ctx, "ip", name) // unknown is secure
	}
	for _, a := range addrs {
		if a.IsLoopback() {
			return true
		}
		for _, p := range cfg.InsecureCIDRs {
			if p.Contains(a.Unmap()) {
				return true
			}
		}
	}
	return false
}

// certs reads the host's directory under CertsDir, laid out as Docker's.
func (s *Store) certs(host string, tc *tls.Config) (own bool, err error) {
	if s.cfg.Registries.CertsDir == "" || strings.ContainsAny(host, "/\x00") || host == ".." {
		return false, nil
	}
	dir := filepath.Join(s.cfg.Registries.CertsDir, host)
	ents, err := os.ReadDir(dir)
	if isNotExist(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("registry %s: certificates: %w", host, err)
	}
	for _, e := range ents {
		path := filepath.Join(dir, e.Name())
		switch filepath.Ext(path) {
		case ".crt":
			b, err := os.ReadFile(path)
			if err != nil {
				return false, fmt.Errorf("registry %s: %w", host, err)
			}
			if tc.RootCAs == nil {
				if tc.RootCAs, err = x509.SystemCertPool(); err != nil {
					tc.RootCAs = x509.NewCertPool()
				}
			}
			if !tc.RootCAs.AppendCertsFromPEM(b) {
				return false, fmt.Errorf("registry %s: %s holds no certificate: %w", host, path, errdefs.ErrInvalidArgument)
			}
			own = true
		case ".cert":
			c, err := tls.LoadX509KeyPair(path, strings.TrimSuffix(path, ".cert")+".key")
			if err != nil {
				return false, fmt.Errorf("registry %s: client certificate: %w", host, err)
			}
			tc.Certificates = append(tc.Certificates, c)
		}
	}
	return own, nil
}

// Tags lists the tags of a repository at its registry, in its order.
func (s *Store) Tags(ctx context.Context, repository string, auth *registry.AuthConfig) ([]string, error) {
	named, err := reference.ParseNormalizedNamed(repository)
	if err != nil {
		return nil, fmt.Errorf("invalid reference format: %.200q: %w: %w", repository, err, errdefs.ErrInvalidArgument)
	}
	ctx = log.WithLogger(ctx, quiet)
	ctx = docker.WithScope(ctx, "repository:"+reference.Path(named)+":pull")
	hosts, err := s.hosts(reference.Domain(named), auth, nil)
	if err != nil {
		return nil, err
	}
	rh := hosts[len(hosts)-1] // mirrors need not have all tags
	var out []string
	next := "/" + reference.Path(named) + "/tags/list?n=1000"
	for range maxTagPages {
		var page struct {
			Tags []string `json:"tags"`
		}
		resp, err := s.get(ctx, rh, rh.Path+next)
		if err != nil {
			return nil, registryError("pull", reference.FamiliarName(named), err)
		}
		err = json.NewDecoder(io.LimitReader(resp.Body, s.cfg.Limits.ManifestBytes)).Decode(&page)
		resp.Body.Close()
		if err != nil {
			return nil, fmt.Errorf("tags of %s: %w", repository, err)
		}
		out = append(out, page.Tags...)
		// Link: </v2/x/tags/list?last=…>; rel="next"
		link, ok := strings.CutPrefix(resp.Header.Get("Link"), "<")
		if link, _, ok2 := strings.Cut(link, ">"); ok && ok2 {
			if u, err := url.Parse(link); err == nil && u.RawQuery != "" {
				next = "/" + reference.Path(named) + "/tags/list?" + u.RawQuery
				continue
			}
		}
		break
	}
	return out, nil
}

// maxTagPages bounds a registry that always has more.
const maxTagPages = 100

// get asks a registry, with its ceremony of authorization. The caller closes
// the body.
func (s *Store) get(ctx context.Context, rh docker.RegistryHost, path string) (*http.Response, error) {
	for range 3 {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, rh.Scheme+"://"+rh.Host+path, nil)
		if err != nil {
			return nil, err
		}
		for k, v := range rh.Header {
			req.Header[k] = v
		}
		if rh.Authorizer != nil {
			if err := rh.Authorizer.Authorize(ctx, req); err != nil {
				return nil, err
			}
		}
		resp, err := rh.Client.Do(req)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode == http.StatusOK {
			return resp, nil
		}
		err = remoteerrors.NewUnexpectedStatusErr(resp)
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized || rh.Authorizer == nil {
			if resp.StatusCode == http.StatusNotFound {
				err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
			}
			return nil, err
		}
		if aerr := rh.Authorizer.AddResponses(ctx, []*http.Response{resp}); aerr != nil {
			return nil, fmt.Errorf("%w: %w", aerr, errdefs.ErrUnauthenticated)
		}
	}
	return nil, fmt.Errorf("credentials refused: %w", errdefs.ErrUnauthenticated)
}

// registryError says what a registry's answer means for the user.
func registryError(verb, name string, err error) error {
	status := httpStatus(err)
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s %s: %w", verb, name, err)
	case status == http.StatusUnauthorized, status == http.StatusForbidden,
		errors.Is(err, docker.ErrInvalidAuthorization), errdefs.IsUnauthorized(err), errdefs.IsPermissionDenied(err):
		return fmt.Errorf("%s access denied for %s, repository does not exist or may require 'docker login': %w: %w", verb, name, err, errdefs.ErrPermissionDenied)
	case errdefs.IsNotFound(err):
		return fmt.Errorf("manifest for %s not found: manifest unknown: %w", name, err)
	case status >= 500:
		return fmt.Errorf("%s %s: %w: %w", verb, name, err, errdefs.ErrUnavailable)
	}
	var ne *net.OpError
	var de *net.DNSError
	if errors.As(err, &ne) || errors.As(err, &de) {
		return fmt.Errorf("%s %s: registry not reached: %w: %w", verb, name, err, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%s %s: %w", verb, name, err)
}

// httpStatus is the status a registry answered with, 0 if the error is another.
func httpStatus(err error) int {
	var s remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &s) {
		return s.StatusCode
	}
	return 0
}
