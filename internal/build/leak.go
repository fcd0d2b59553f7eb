package build

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/cache"
	bkexecutor "github.com/moby/buildkit/executor"
	resourcestypes "github.com/moby/buildkit/executor/resources/types"
	"github.com/moby/buildkit/frontend"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/llbsolver/linuxresources"
	"github.com/moby/buildkit/solver/llbsolver/ops"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/moby/buildkit/worker"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"tenon.dev/tenon/internal/build/where"
)

// releaseFailed lets go what the error of a build holds: BuildKit's solver keeps the
// source of a step whose inputs could not be read (COPY of a file that is missing) with
// the error, for debuggers, and nobody releases it.
func releaseFailed(ctx context.Context, err error) {
	for err != nil {
		if e, ok := err.(*solver.SlowCacheError); ok && e.Result != nil {
			_ = e.Result.Release(context.WithoutCancel(ctx)) // once only; a second time it says so
			e.Result = nil
		}
		if many, ok := err.(interface{ Unwrap() []error }); ok {
			for _, e := range many.Unwrap() {
				releaseFailed(ctx, e)
			}
			return
		}
		err = errors.Unwrap(err)
	}
}

// releasing is a server's interceptor that does so for clients' builds.
func (r *running) releasing(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	releaseFailed(ctx, err)
	if _, ok := req.(*controlapi.SolveRequest); ok {
		r.built()
	}
	return resp, err
}

// placing is a server's interceptor that has errors say where in the Dockerfile they are:
// Docker's clients show the lines that BuildKit names, and no column. A command that has
// failed is named by itself.
func placing(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	if err == nil {
		return resp, nil
	}
	plain := grpcerrors.FromGRPC(err) // as the client reads it
	var exit *gatewaypb.ExitError
	if p, ok := where.Find(plain); ok && !errors.As(plain, &exit) && !strings.Contains(err.Error(), p.String()) {
		st := status.Convert(err).Proto()
		st.Message += " (" + p.String() + ")"
		err = status.ErrorProto(st)
	}
	return resp, err
}

// ResolveOp makes the operation of a step. Those that run a process get a cache whose
// new records heed the end of a build: BuildKit's step commits what a process has
// written even if the build was cancelled, and its solver then forgets the result
// without releasing it. Without a result the step releases all that it holds.
func (w *tenonWorker) ResolveOp(v solver.Vertex, s frontend.FrontendLLBBridge, sm *session.Manager, proxy worker.ProxyOpt) (solver.Op, error) {
	base, ok := v.Sys().(*pb.Op)
	if !ok || proxy.Network {
		return w.Worker.ResolveOp(v, s, sm, proxy)
	}
	op, ok := base.Op.(*pb.Op_Exec)
	if !ok {
		return w.Worker.ResolveOp(v, s, sm, proxy)
	}
	var limits *pb.LinuxResources
	if m, ok := v.Options().Metadata.(*linuxresources.Metadata); ok && m != nil {
		limits = m.LinuxResources
	}
	return ops.NewExecOp(v, op, base.Platform, heedingCache{w.CacheMgr}, w.ParallelismSem, sm, platformExecutor{w.r.executor, base.Platform}, w.Worker, limits, false)
}

// platformExecutor runs steps for a platform.
type platformExecutor struct {
	*executor
	platform *pb.Platform
}

// Run runs a process; of one that this kernel can't execute it says why.
func (x platformExecutor) Run(ctx context.Context, id string, root bkexecutor.Mount, mounts []bkexecutor.Mount, p bkexecutor.ProcessInfo, started chan<- struct{}) (resourcestypes.Recorder, error) {
	rec, err := x.executor.Run(ctx, id, root, mounts, p, started)
	var exit *gatewaypb.ExitError
	if x.platform == nil || !errors.As(err, &exit) || exit.Err == nil || !strings.Contains(exit.Err.Error(), syscall.ENOEXEC.Error()) {
		return rec, err
	}
	want, here := platforms.Normalize(x.platform.Spec()), platforms.Normalize(platforms.DefaultSpec())
	if want.Architecture == here.Architecture {
		return rec, err
	}
	return rec, &gatewaypb.ExitError{ExitCode: exit.ExitCode, Err: fmt.Errorf("the step is for %s, and this host runs programs for %s (builds don't emulate; COPY and the like work for any platform): %w",
		platforms.Format(want), platforms.Format(here), exit.Err)}
}

// heedingCache is the cache as steps see it.
type heedingCache struct{ cache.Manager }

// New makes a record that can be written to.
func (c heedingCache) New(ctx context.Context, parent cache.ImmutableRef, s session.Group, opts ...cache.RefOption) (cache.MutableRef, error) {
	ref, err := c.Manager.New(ctx, parent, s, opts...)
	if err != nil {
		return nil, err
	}
	return heedingRef{ref}, nil
}

type heedingRef struct{ cache.MutableRef }

// Commit makes a result of what was written, unless nobody wants it any more.
func (r heedingRef) Commit(ctx context.Context) (cache.ImmutableRef, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("result of a step: %w", err)
	}
	return r.MutableRef.Commit(ctx)
}
