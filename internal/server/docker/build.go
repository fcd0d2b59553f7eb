package docker

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	apibuild "github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"

	"tenon.dev/tenon/internal/build/api"
	"tenon.dev/tenon/internal/server/wire"
)

// Builder builds images; *build.Builder is one.
type Builder interface {
	// Session serves a client's session on conn until it ends.
	Session(ctx context.Context, conn net.Conn, header map[string][]string) error
	// Serve serves BuildKit's own API on conn until the client closes it.
	Serve(ctx context.Context, conn net.Conn) error
	Build(ctx context.Context, req api.Request, p api.Printer) (api.Result, error)
	Cancel(id string) error
	DiskUsage(ctx context.Context) ([]api.Record, error)
	Prune(ctx context.Context, req api.PruneRequest) (api.PruneReport, error)
}

// errTenantBuild is what a machine's own socket answers: BuildKit's steps run beside
// the machine, and its sessions and cache are everybody's.
var errTenantBuild = errdefs.ErrPermissionDenied.WithMessage("images are not built on a machine's own socket: build on the host's, or elsewhere, and push the image to a registry or load it here")

// builder is the one of this socket.
func (a *API) builder() (Builder, error) {
	if a.cfg.Tenant != nil {
		return nil, errTenantBuild
	}
	if a.cfg.Builder == nil {
		return nil, errNotBuilt("this daemon was made without a builder")
	}
	return a.cfg.Builder, nil
}

// upgraded is a connection that was taken over from HTTP, with what HTTP had read of it.
type upgraded struct {
	net.Conn
	s *wire.Session
}

func (u *upgraded) Read(p []byte) (int, error) { return u.s.Read(p) }

// h2c takes the call's connection over for gRPC, and gives it to serve.
func (c *call) h2c(serve func(ctx context.Context, conn net.Conn) error) error {
	if p := c.r.Header.Get("Upgrade"); !strings.EqualFold(p, "h2c") {
		if p == "" {
			return wire.Invalid("no upgrade proto in request")
		}
		return wire.Invalid("protocol %s not supported: the connection is upgraded to h2c", p)
	}
	s, ctx, err := wire.Hijack(c.w, c.r, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
	if err != nil {
		return err
	}
	s.Begin()
	defer s.End()
	return serve(ctx, &upgraded{s.Conn(), s})
}

func (a *API) session(c *call) error { return a.grpcConn(c, "session", Builder.Session) }

func (a *API) grpc(c *call) error {
	return a.grpcConn(c, "grpc", func(b Builder, ctx context.Context, conn net.Conn, _ map[string][]string) error {
		return b.Serve(ctx, conn)
	})
}

func (a *API) grpcConn(c *call, what string, serve func(Builder, context.Context, net.Conn, map[string][]string) error) error {
	b, err := a.builder()
	if err != nil {
		return err
	}
	began := false
	err = c.h2c(func(ctx context.Context, conn net.Conn) error {
		began = true
		return serve(b, ctx, conn, c.r.Header)
	})
	if began {
		if err != nil && c.ctx.Err() == nil {
			a.log.Debug("stream ended", "what", what, "err", err)
		}
		return nil
	}
	return err
}

// maxContext is how much of a body is read only to be thrown away.
const maxContext = 256 << 20

// bodyWait is how long a client that sends a body nobody reads is listened to.
const bodyWait = 10 * time.Second

// printer sends what a build says.
type printer struct {
	m     *messages
	quiet bool
	kept  strings.Builder // what a quiet build printed: shown if it fails
	aux   bool
}

// maxKept bounds what is remembered of a quiet build, in bytes.
const maxKept = 1 << 20

// Text implements api.Printer.
func (p *printer) Text(s string) {
	if p.quiet {
		if p.kept.Len()+len(s) <= maxKept {
			p.kept.WriteString(s)
		}
		return
	}
	p.m.send(jsonstream.Message{Stream: s})
}

// Aux implements api.Printer.
func (p *printer) Aux(id string, v any) {
	if p.quiet || !p.aux {
		return
	}
	b, err := json.Marshal(v)
	if err != nil {
		return // of what this program made
	}
	raw := json.RawMessage(b)
	p.m.send(jsonstream.Message{ID: id, Aux: &raw})
}

func (a *API) build(c *call) error {
	b, err := a.builder()
	if err == nil {
		var req api.Request
		if req, err = c.buildRequest(); err == nil {
			return a.runBuild(c, b, req)
		}
	}
	// A client that is still sending when the connection closes reports that instead of
	// the answer.
	_ = http.NewResponseController(c.w).SetReadDeadline(time.Now().Add(bodyWait))
	_, _ = io.CopyN(io.Discard, c.r.Body, maxContext)
	_ = http.NewResponseController(c.w).SetReadDeadline(time.Time{})
	return err
}

func (a *API) runBuild(c *call, b Builder, req api.Request) error {
	req.Context = c.r.Body
	m := c.messages(true)
	p := &printer{m: m, quiet: c.flag("q"), aux: !c.v.before(30)}
	res, err := b.Build(c.ctx, req, p)
	if err != nil {
		if !m.s.Began() { // the context may still come in
			_, _ = io.CopyN(io.Discard, c.r.Body, maxRest)
		}
		if p.kept.Len() > 0 {
			m.send(jsonstream.Message{Stream: p.kept.String()})
		}
		var se *api.StepError
		if errors.As(err, &se) {
			m.fail(&jsonstream.Error{Code: se.Code, Message: se.Error()})
			return nil
		}
		return m.end(err)
	}
	if p.quiet && res.ImageID != "" {
		m.send(jsonstream.Message{Stream: res.ImageID + "\n"})
	}
	return m.end(nil)
}

// jsonParam decodes a query parameter into v.
func (c *call) jsonParam(key string, v any) error {
	s := c.str(key)
	if s == "" {
		return nil
	}
	if err := json.Unmarshal([]byte(s), v); err != nil {
		return wire.Invalid("parameter %s: %v", key, err)
	}
	return nil
}

// sizes reads parameters that are numbers.
func (c *call) sizes(into map[string]*int64) error {
	for key, p := range into {
		s := c.str(key)
		if s == "" {
			continue
		}
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return wire.Invalid("invalid value for %q: %q is not a number", key, s)
		}
		*p = n
	}
	return nil
}

// buildRequest reads the parameters of POST /build.
func (c *call) buildRequest() (api.Request, error) {
	req := api.Request{
		Version: api.Classic, ID: c.str("buildid"), Session: c.str("session"), Remote: c.str("remote"),
		Dockerfile: c.str("dockerfile"), Target: c.str("target"), Network: c.str("networkmode"),
		NoCache: c.flag("nocache"), Pull: c.flag("pull"), Isolation: c.str("isolation"),
		ExtraHosts: c.q["extrahosts"],
	}
	switch v := apibuild.BuilderVersion(c.str("version")); v {
	case "", apibuild.BuilderV1:
	case apibuild.BuilderBuildKit:
		req.Version = api.BuildKit
	default:
		return req, wire.Invalid("invalid version %q", v)
	}
	switch {
	case c.flag("squash"):
		return req, wire.Invalid("squash is only supported with experimental mode, which there is none of: join RUN steps, or copy the result into a stage of its own")
	case len(c.q["securityopt"]) > 0:
		return req, wire.Invalid("security options are not supported on linux")
	}
	if !c.v.before(32) {
		req.Platform = c.str("platform")
	}
	if !c.v.before(40) {
		if err := c.jsonParam("outputs", &req.Outputs); err != nil {
			return req, err
		}
	}
	l := &req.Limits
	l.CPUSetCPUs, l.CPUSetMems, l.CgroupParent = c.str("cpusetcpus"), c.str("cpusetmems"), c.str("cgroupparent")
	for _, err := range []error{
		c.sizes(map[string]*int64{
			"shmsize": &req.ShmSize, "memory": &l.Memory, "memswap": &l.MemorySwap,
			"cpushares": &l.CPUShares, "cpuperiod": &l.CPUPeriod, "cpuquota": &l.CPUQuota,
		}),
		c.jsonParam("ulimits", &req.Ulimits),
		// A null is an argument whose value the client's environment does not have.
		c.jsonParam("buildargs", &req.Args),
		c.jsonParam("labels", &req.Labels),
		c.jsonParam("cachefrom", &req.CacheFrom),
	} {
		if err != nil {
			return req, err
		}
	}
	for _, t := range c.q["t"] {
		if t == "" {
			continue
		}
		name, err := buildTag(t)
		if err != nil {
			return req, err
		}
		req.Tags = append(req.Tags, name)
	}
	req.Auth = authConfigs(c.r.Header)
	return req, nil
}

// buildTag makes a full name of a -t.
func buildTag(t string) (string, error) {
	named, err := reference.ParseNormalizedNamed(t)
	if err != nil {
		return "", wire.Invalid("invalid tag %q: %v", t, err)
	}
	if _, ok := named.(reference.Digested); ok {
		return "", wire.Invalid("invalid tag %q: refusing to create a tag with a digest reference", t)
	}
	return reference.TagNameOnly(named).String(), nil
}

// authConfigs are the credentials that a client sends with a build; like Docker, one that
// can't be read is none.
func authConfigs(h http.Header) map[string]registry.AuthConfig {
	out := map[string]registry.AuthConfig{}
	s := h.Get("X-Registry-Config")
	if s == "" {
		return out
	}
	_ = json.NewDecoder(base64.NewDecoder(base64.URLEncoding, strings.NewReader(s))).Decode(&out)
	return out
}

func (a *API) buildCancel(c *call) error {
	b, err := a.builder()
	if err != nil {
		return err
	}
	if err := b.Cancel(c.str("id")); err != nil {
		return err
	}
	return c.done(http.StatusOK)
}
