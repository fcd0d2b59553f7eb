package build

import (
	"context"
	"errors"
	"fmt"

	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/llbsolver/linuxresources"
	"github.com/moby/buildkit/solver/llbsolver/ops"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/worker"
	"google.golang.org/grpc"
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
func releasing(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	releaseFailed(ctx, err)
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
	return ops.NewExecOp(v, op, base.Platform, heedingCache{w.CacheMgr}, w.ParallelismSem, sm, w.r.executor, w.Worker, limits, false)
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
