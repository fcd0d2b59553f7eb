package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/util/entitlements"
	"github.com/moby/moby/api/types/registry"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"tenon.dev/tenon/internal/build/api"
)

// The names of a build's local sources, as the Dockerfile frontend asks for them.
const (
	contextName    = "context"
	dockerfileName = "dockerfile"
)

// statusGrace is how long the status of a build that has failed may take to end.
const statusGrace = time.Second

// imageExporter is what makes an image in the engine's store.
const imageExporter = client.ExporterImage

// Build runs one POST /build until it ends: the context, if the request's body has it,
// is unpacked and given to BuildKit by a session of our own; what BuildKit reports goes
// to p as the builder of the asked version says it. Errors that are the Dockerfile's are
// invalid arguments, with its line and column.
func (b *Builder) Build(ctx context.Context, req api.Request, p api.Printer) (_ api.Result, err error) {
	ctx, leave, err := b.enter(ctx)
	if err != nil {
		return api.Result{}, err
	}
	defer leave()
	if id, ok := strings.CutPrefix(req.ID, uploadRequest+":"); ok {
		return api.Result{}, b.builds.send(ctx, id, req.Context)
	}
	ctx, done, err := b.builds.begin(ctx, req.ID)
	if err != nil {
		return api.Result{}, err
	}
	defer done()
	read := func() {}
	if req.Remote == uploadRequest {
		var r io.Reader
		if r, read, err = b.builds.receive(ctx, req.ID); err != nil {
			return api.Result{}, err
		}
		defer func() { read() }()
		req.Remote, req.Context = "", r
	}
	solve, err := solveRequest(&req)
	if err != nil {
		return api.Result{}, err
	}
	run, err := b.start(ctx)
	if err != nil {
		return api.Result{}, err
	}
	var steps *steps
	dirs := filesync.StaticDirSource{}
	shared := ""
	if req.Remote == "" {
		u, err := unpackContext(ctx, filepath.Join(b.opt.Dir, contextDir), req.Context)
		read() // the request that brought it ends
		if err != nil {
			return api.Result{}, err
		}
		defer func() {
			if rerr := os.RemoveAll(u.dir); rerr != nil {
				b.log.Warn("a build's context stays until the next start", "dir", u.dir, "err", rerr)
			}
		}()
		if u.loose {
			delete(solve.FrontendAttrs, "filename")
			req.Dockerfile = ""
		}
		if req.Version == api.Classic {
			if steps, err = readSteps(u.dir, &req); err != nil {
				return api.Result{}, err
			}
		}
		local, err := contextFS(u.dir)
		if err != nil {
			return api.Result{}, fmt.Errorf("build context: %w", err)
		}
		dirs[contextName], dirs[dockerfileName] = local, local
		shared = u.sum
	}
	if req.Session == "" || len(dirs) > 0 {
		id, end, err := run.ownSession(ctx, shared, dirs, req.Auth)
		if err != nil {
			return api.Result{}, err
		}
		defer end()
		if solve.Session == "" {
			solve.Session = id
		} else { // the client's has its secrets, ours the context
			solve.FrontendAttrs["local-sessionid:"+contextName] = id
			solve.FrontendAttrs["local-sessionid:"+dockerfileName] = id
		}
	}
	if steps == nil && req.Version == api.Classic {
		steps = remoteSteps(&req)
	}
	return run.solve(ctx, solve, steps, p)
}

// solveRequest is what BuildKit's frontend for Dockerfiles is asked, without a session.
func solveRequest(req *api.Request) (*controlapi.SolveRequest, error) {
	attrs := map[string]string{}
	set := func(key, v string) {
		if v != "" {
			attrs[key] = v
		}
	}
	num := func(key string, n int64) {
		if n != 0 {
			attrs[key] = strconv.FormatInt(n, 10)
		}
	}
	set("target", req.Target)
	if req.Dockerfile != "." {
		set("filename", req.Dockerfile)
	}
	if req.Remote != "" && req.Remote != api.ClientSession {
		attrs[contextName] = req.Remote
	}
	set("cache-from", strings.Join(req.CacheFrom, ","))
	for k, v := range req.Args {
		if v != nil {
			attrs["build-arg:"+k] = *v
		}
	}
	for k, v := range req.Labels {
		attrs["label:"+k] = v
	}
	if req.NoCache {
		attrs["no-cache"] = ""
	}
	attrs["image-resolve-mode"] = "default"
	if req.Pull {
		attrs["image-resolve-mode"] = "pull"
	}
	if req.Platform != "" {
		if _, err := platforms.Parse(req.Platform); err != nil {
			return nil, invalid("platform %q: %v", req.Platform, err)
		}
		attrs["platform"] = req.Platform
	}
	if req.Version == api.Classic {
		attrs["cmdline"] = "classic" // "# syntax=" is a comment for it
	}
	solve := &controlapi.SolveRequest{
		Ref: identity.NewID(), Session: req.Session,
		Frontend: "dockerfile.v0", FrontendAttrs: attrs,
		Cache: &controlapi.CacheOptions{},
	}
	switch req.Network {
	case "", "default", "bridge":
	case "none", "host":
		attrs["force-network-mode"] = req.Network
	default:
		return nil, invalid("network mode %q is not known to builds: give default, none or host", req.Network)
	}
	if req.Network == "host" {
		solve.Entitlements = append(solve.Entitlements, string(entitlements.EntitlementNetworkHost))
	}
	hosts, err := extraHosts(req.ExtraHosts)
	if err != nil {
		return nil, err
	}
	set("add-hosts", hosts)
	num("shm-size", req.ShmSize)
	limits := make([]string, 0, len(req.Ulimits))
	for _, u := range req.Ulimits {
		limits = append(limits, u.String())
	}
	set("ulimit", strings.Join(limits, ","))
	l := req.Limits
	num("memory", l.Memory)
	num("memswap", l.MemorySwap)
	num("cpushares", l.CPUShares)
	num("cpuperiod", l.CPUPeriod)
	num("cpuquota", l.CPUQuota)
	set("cpusetcpus", l.CPUSetCPUs)
	set("cpusetmems", l.CPUSetMems)
	set("cgroup-parent", l.CgroupParent)
	if err := setIsolation(attrs, req.Isolation); err != nil {
		return nil, err
	}
	if v := req.Args["BUILDKIT_INLINE_CACHE"]; v != nil {
		if on, err := strconv.ParseBool(*v); err == nil && on {
			solve.Cache.Exports = append(solve.Cache.Exports, &controlapi.CacheOptionsEntry{Type: "inline"})
		}
	}
	outputs := req.Outputs
	if len(outputs) == 0 {
		outputs = []api.Output{{Type: imageExporter}}
	}
	for _, o := range outputs {
		if o.Type == "cacheonly" {
			continue
		}
		if o.Type == "moby" {
			o.Type = imageExporter
		}
		x := &controlapi.Exporter{Type: o.Type, Attrs: maps.Clone(o.Attrs)}
		if x.Attrs == nil {
			x.Attrs = map[string]string{}
		}
		if o.Type == imageExporter && len(req.Tags) > 0 {
			x.Attrs["name"] = strings.Join(req.Tags, ",")
		}
		solve.Exporters = append(solve.Exporters, x)
	}
	return solve, nil
}

// extraHosts makes BuildKit's form of Docker's.
func extraHosts(in []string) (string, error) {
	var out []string
	for _, h := range in {
		name, addr, ok := strings.Cut(h, ":")
		if !ok || name == "" || addr == "" || strings.ContainsAny(h, ",=") {
			return "", invalid("extra host %q: write it as NAME:ADDRESS", h)
		}
		if addr != "host-gateway" && net.ParseIP(strings.Trim(addr, "[]")) == nil {
			return "", invalid("extra host %q: %q is not an IP address", h, addr)
		}
		out = append(out, name+"="+strings.Trim(addr, "[]"))
	}
	return strings.Join(out, ","), nil
}

// contextFS shows a directory to BuildKit with root as the owner of all.
func contextFS(dir string) (fsutil.FS, error) {
	local, err := fsutil.NewFS(dir)
	if err != nil {
		return nil, err
	}
	return fsutil.NewFilterFS(local, &fsutil.FilterOpt{Map: func(_ string, st *fstypes.Stat) fsutil.MapResult {
		st.Uid, st.Gid = 0, 0
		return fsutil.MapResultKeep
	}})
}

// ownSession is a session for a client that has none. end closes it and waits.
func (r *running) ownSession(ctx context.Context, shared string, dirs filesync.StaticDirSource, creds map[string]registry.AuthConfig) (id string, end func(), err error) {
	s, err := session.NewSession(ctx, shared)
	if err != nil {
		return "", nil, fmt.Errorf("build session: %w", err)
	}
	s.Allow(filesync.NewFSSyncProvider(dirs))
	s.Allow(credentials(creds))
	ctx, cancel := context.WithCancel(ctx)
	var g errgroup.Group
	g.Go(func() error {
		return s.Run(ctx, func(ctx context.Context, _ string, meta map[string][]string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			g.Go(func() error { return r.sessions.HandleConn(ctx, theirs, meta) })
			return ours, nil
		})
	})
	return s.ID(), func() {
		_ = s.Close() // what it served is over
		cancel()
		_ = g.Wait() // both end with the connection
	}, nil
}

// credentials answers BuildKit's questions for the credentials of registries.
type credentials map[string]registry.AuthConfig

// Register implements session.Attachable.
func (c credentials) Register(s *grpc.Server) { auth.RegisterAuthServer(s, c) }

// Credentials implements auth.AuthServer.
func (c credentials) Credentials(_ context.Context, req *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	host := req.Host
	names := []string{host}
	if host == "registry-1.docker.io" || host == "docker.io" {
		names = []string{"https://index.docker.io/v1/", "index.docker.io", "docker.io", host}
	}
	for _, n := range names {
		a, ok := c[n]
		if !ok {
			a, ok = c["https://"+n]
		}
		if !ok {
			continue
		}
		if a.IdentityToken != "" {
			return &auth.CredentialsResponse{Secret: a.IdentityToken}, nil
		}
		return &auth.CredentialsResponse{Username: a.Username, Secret: a.Password}, nil
	}
	return &auth.CredentialsResponse{}, nil
}

// FetchToken implements auth.AuthServer: the engine fetches tokens itself.
func (c credentials) FetchToken(context.Context, *auth.FetchTokenRequest) (*auth.FetchTokenResponse, error) {
	return nil, status.Error(codes.Unimplemented, "the engine fetches tokens")
}

// GetTokenAuthority implements auth.AuthServer.
func (c credentials) GetTokenAuthority(context.Context, *auth.GetTokenAuthorityRequest) (*auth.GetTokenAuthorityResponse, error) {
	return nil, status.Error(codes.Unavailable, "the engine fetches tokens")
}

// VerifyTokenAuthority implements auth.AuthServer.
func (c credentials) VerifyTokenAuthority(context.Context, *auth.VerifyTokenAuthorityRequest) (*auth.VerifyTokenAuthorityResponse, error) {
	return nil, status.Error(codes.Unavailable, "the engine fetches tokens")
}

// solve runs a request and tells p what comes of it: by steps, or BuildKit's messages if
// there are none.
func (r *running) solve(ctx context.Context, req *controlapi.SolveRequest, steps *steps, p api.Printer) (api.Result, error) {
	ch := make(chan *controlapi.StatusResponse)
	var resp *controlapi.SolveResponse
	var solveErr error
	var g errgroup.Group
	// A request that is given up ends the build; its last words are read all the same.
	statusCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	g.Go(func() error {
		resp, solveErr = r.ctl.Solve(ctx, req)
		releaseFailed(ctx, solveErr)
		r.built()
		if solveErr != nil {
			// The status ends with the build; of one that has not begun nobody knows.
			time.AfterFunc(statusGrace, stop)
		}
		return nil
	})
	g.Go(func() error {
		defer close(ch)
		return r.ctl.Status(&controlapi.StatusRequest{Ref: req.Ref}, &stream[controlapi.StatusResponse]{ctx: statusCtx, ch: ch})
	})
	var sent error
	for m := range ch {
		if steps != nil {
			steps.update(client.NewSolveStatus(m), p)
			continue
		}
		data, err := proto.Marshal(m)
		if err != nil {
			sent = fmt.Errorf("build progress: %w", err)
			continue
		}
		p.Aux("moby.buildkit.trace", data)
	}
	statusErr := g.Wait()
	stop()
	if solveErr != nil {
		if steps != nil {
			steps.fail(p)
		}
		if cause := context.Cause(ctx); cause != nil && ctx.Err() != nil {
			return api.Result{}, fmt.Errorf("build: %w", cause)
		}
		return api.Result{}, explain(solveErr, steps != nil)
	}
	if err := errors.Join(statusErr, sent); err != nil {
		return api.Result{}, fmt.Errorf("build progress: %w", err)
	}
	out := api.Result{}
	if slices.ContainsFunc(req.Exporters, func(x *controlapi.Exporter) bool { return x.Type == imageExporter }) {
		out.ImageID = r.imageID(resp.ExporterResponse)
		if steps == nil {
			p.Aux("moby.image.id", imageResult{out.ImageID})
		} else {
			p.Aux("", imageResult{out.ImageID})
		}
	}
	if steps != nil {
		steps.finish(p, out.ImageID)
	}
	return out, nil
}

// imageResult is Docker's build.Result.
type imageResult struct{ ID string }

// stream is the sending side of a gRPC stream within the process.
type stream[T any] struct {
	ctx context.Context
	ch  chan<- *T
}

func (s *stream[T]) SetHeader(metadata.MD) error  { return nil }
func (s *stream[T]) SendHeader(metadata.MD) error { return nil }
func (s *stream[T]) SetTrailer(metadata.MD)       {}
func (s *stream[T]) Context() context.Context     { return s.ctx }
func (s *stream[T]) RecvMsg(any) error            { return errors.New("nothing is received here") }
func (s *stream[T]) SendMsg(m any) error          { return s.Send(m.(*T)) }

// Send implements a generated server's stream.
func (s *stream[T]) Send(m *T) error {
	select {
	case s.ch <- m:
		return nil
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}
