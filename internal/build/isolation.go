package build

import (
	"context"
	"maps"
	"strings"

	bkexecutor "github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"

	"github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/internal/spec"
)

// What steps run in is asked for by the frontend's attribute "isolation", or by a build
// argument for clients that can't set attributes. BuildKit has no word for it in a
// step's description; it goes with the step's control group, and so it is part of what
// the cache knows a step by.
const (
	isolationAttr   = "isolation"
	isolationArg    = "build-arg:TENON_ISOLATION"
	cgroupAttr      = "cgroup-parent"
	isolationPrefix = "tenon-isolation:"
)

// setIsolation asks for an isolation. InvalidArgument if there is none of that name.
func setIsolation(attrs map[string]string, isolation string) error {
	if isolation == "" || isolation == "default" {
		return nil
	}
	attrs[isolationAttr] = isolation
	_, err := withIsolation(attrs)
	return err
}

// withIsolation moves the wish to where the executor finds it.
func withIsolation(opt map[string]string) (map[string]string, error) {
	want := opt[isolationAttr]
	if want == "" {
		want = opt[isolationArg]
	}
	if strings.HasPrefix(opt[cgroupAttr], isolationPrefix) {
		return nil, invalid("cgroup-parent %q", opt[cgroupAttr])
	}
	if want == "" || want == "default" {
		return opt, nil
	}
	if strings.EqualFold(want, "machine") {
		return nil, invalid("isolation %s boots disk images; steps of builds run with process, vm or machine=NAME", want)
	}
	if len(want) > 100 || strings.ContainsAny(want, "/:") {
		return nil, invalid("isolation %.100q is not known", want)
	}
	if _, err := spec.Isolation(container.Isolation(want)); err != nil {
		return nil, err
	}
	out := maps.Clone(opt)
	delete(out, isolationAttr)
	out[cgroupAttr] = isolationPrefix + want + "/" + opt[cgroupAttr]
	return out, nil
}

// cutIsolation is withIsolation's other end.
func cutIsolation(cgroupParent string) (isolation, parent string) {
	rest, ok := strings.CutPrefix(cgroupParent, isolationPrefix)
	if !ok {
		return "", cgroupParent
	}
	isolation, parent, _ = strings.Cut(rest, "/")
	return isolation, parent
}

// isolating is a frontend that knows the attribute, and remembers what is asked of it.
// check says early what can't be had.
type isolating struct {
	frontend.Frontend
	check func(ctx context.Context, isolation string) (string, error)
	asked *asked
}

// Solve runs the frontend.
func (f isolating) Solve(ctx context.Context, llb frontend.FrontendLLBBridge, exec bkexecutor.Executor, opt map[string]string, inputs map[string]*pb.Definition, sid string, sm *session.Manager) (*frontend.Result, error) {
	opt, err := withIsolation(opt)
	if err != nil {
		return nil, err
	}
	if asked, _ := cutIsolation(opt[cgroupAttr]); asked != "" {
		if _, err := f.check(ctx, asked); err != nil {
			return nil, err
		}
	}
	res, err := f.Frontend.Solve(ctx, llb, exec, opt, inputs, sid, sm)
	noteBases(res)
	f.asked.note(res, opt)
	return res, err
}
