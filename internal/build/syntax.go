package build

import (
	"context"
	"log/slog"
	"maps"
	"strings"

	bkexecutor "github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
)

// ownSyntax is the frontend that runs others' frontends ("# syntax=IMAGE"). The one
// that most Dockerfiles name is built in: where its image can't be had, as on a machine
// without a registry, ours does the work.
type ownSyntax struct {
	frontend.Frontend
	own frontend.Frontend
	log *slog.Logger
}

// usual tells whether a frontend's image is Docker's own for Dockerfiles, in a stable
// version.
func usual(source string) bool {
	s := strings.TrimPrefix(strings.TrimPrefix(source, "docker.io/"), "docker/dockerfile")
	if s == source || strings.Contains(s, "labs") || strings.Contains(s, "@") {
		return false
	}
	return s == "" || s == ":latest" || s == ":1" || strings.HasPrefix(s, ":1.")
}

// Solve runs the frontend.
func (f ownSyntax) Solve(ctx context.Context, llb frontend.FrontendLLBBridge, exec bkexecutor.Executor, opt map[string]string, inputs map[string]*pb.Definition, sid string, sm *session.Manager) (*frontend.Result, error) {
	res, err := f.Frontend.Solve(ctx, llb, exec, opt, inputs, sid, sm)
	source := opt["source"]
	if err == nil || ctx.Err() != nil || !usual(source) || !strings.Contains(err.Error(), "failed to resolve source metadata for docker.io/docker/dockerfile") {
		return res, err
	}
	f.log.Info("the Dockerfile's frontend can't be had; the one built in is used", "syntax", source, "err", err)
	opt = maps.Clone(opt)
	delete(opt, "source")
	opt["cmdline"] = source
	return f.own.Solve(ctx, llb, exec, opt, inputs, sid, sm)
}
