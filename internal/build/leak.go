package build

import (
	"context"
	"errors"

	"github.com/moby/buildkit/solver"
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
