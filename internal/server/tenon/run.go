package tenon

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/registry"
	"tenon.dev/tenon/client/runproto"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/server/docker"
	"tenon.dev/tenon/internal/server/wire"
)

const runIntro = "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: " + runproto.Upgrade + "\r\n\r\n"

// run is POST /tenon/v1/run.
func (a *API) run(w http.ResponseWriter, r *http.Request) error {
	if !strings.EqualFold(r.Header.Get("Upgrade"), runproto.Upgrade) {
		return wire.Invalid("this endpoint needs the headers Connection: Upgrade and Upgrade: %s", runproto.Upgrade)
	}
	var req runproto.Request
	if err := wire.ReadJSON(w, r, &req); err != nil {
		return err
	}
	switch req.Pull {
	case "":
		req.Pull = "missing"
	case "missing", "always", "never", "lazy":
	default:
		return wire.Invalid("pull is missing, always, never or lazy, not %q", req.Pull)
	}
	for _, s := range req.Attach {
		if s != "stdin" && s != "stdout" && s != "stderr" {
			return wire.Invalid("attach lists stdin, stdout and stderr, not %q", s)
		}
	}
	o, warnings, err := docker.DecodeCreate(docker.MaxVersion, req.Name, req.Platform, req.Config)
	if err != nil {
		return err
	}
	sess, ctx, err := wire.Hijack(w, r, runIntro)
	if err != nil {
		return err
	}
	sess.Begin()
	defer sess.End()
	rn := &run{link: link{sess: sess, out: wire.NewFrames(sess.Conn()), tty: o.Request.Tty},
		api: a, req: &req, warnings: warnings, image: o.Request.Image, auth: docker.Auth(r)}
	rn.do(ctx, o)
	return nil
}

// run is one run's connection.
type run struct {
	link
	api      *API
	req      *runproto.Request
	warnings []string
	image    string
	auth     *registry.AuthConfig
}

func (rn *run) do(ctx context.Context, o engine.CreateOptions) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ro := engine.RunOptions{CreateOptions: o, Created: rn.created}
	if !rn.req.Detach {
		at := &engine.AttachOptions{Stream: true}
		if slices.Contains(rn.req.Attach, "stdout") {
			at.Stdout = rn.out.Stream(runproto.Stdout)
		}
		if slices.Contains(rn.req.Attach, "stderr") {
			at.Stderr = rn.out.Stream(runproto.Stderr)
		}
		if s := rn.req.ConsoleSize; s != nil {
			at.Height, at.Width = s[0], s[1]
		}
		var in *inbox
		if slices.Contains(rn.req.Attach, "stdin") {
			in = newInbox()
			at.Stdin = in
			defer in.close(io.EOF)
		}
		rn.ctl = newControl(ctx, rn.api.cfg.Engine.Kill, rn.api.cfg.Engine.Resize)
		ro.Attach = at
		go rn.read(in, cancel) // ends with the session
	}
	if err := rn.fetch(ctx, &o); err != nil {
		rn.fail(err, "image", 0)
		return
	}
	res, wait, err := rn.api.cfg.Engine.Run(ctx, ro)
	switch {
	case err != nil && ctx.Err() != nil:
		// The client has left; nobody reads an answer.
	case err != nil && res.ID != "":
		rn.fail(err, "start", startCode(wait, err))
	case err != nil:
		rn.fail(err, "", 0)
	case rn.req.Detach:
		rn.send(runproto.Exit, runproto.ExitMessage{ID: res.ID})
	default:
		rn.send(runproto.Exit, runproto.ExitMessage{Code: wait.ExitCode, Error: wait.Error})
	}
}

func (rn *run) created(res engine.CreateResult) {
	if rn.ctl != nil {
		rn.ctl.target(res.ID)
	}
	rn.send(runproto.Created, runproto.CreatedMessage{ID: res.ID, Warnings: append(rn.warnings, res.Warnings...)})
}

// startCode is the exit code of a container whose command could not be
// started: what the engine says, or what the message tells, as Docker's own
// clients have it.
func startCode(w engine.WaitResult, err error) int {
	if w.ExitCode >= 125 && w.ExitCode <= 127 {
		return w.ExitCode
	}
	msg := err.Error()
	switch {
	case strings.Contains(msg, "executable file not found") || strings.Contains(msg, "no such file or directory"):
		return 127
	case strings.Contains(msg, "permission denied") || strings.Contains(msg, "is a directory"):
		return 126
	}
	return 125
}

// fetch makes sure that the image is there, by the request's pull policy.
func (rn *run) fetch(ctx context.Context, o *engine.CreateOptions) error {
	images := rn.api.cfg.Images
	if rn.req.Pull != "always" {
		_, err := images.Resolve(ctx, rn.image, o.Platform)
		if err == nil || rn.req.Pull == "never" || !errdefs.IsNotFound(err) {
			return err
		}
	}
	ref, err := docker.PullReference(rn.image, "")
	if err != nil {
		return err
	}
	if rn.req.Pull != "always" {
		rn.progress(image.Progress{Status: fmt.Sprintf("Unable to find image '%s' locally", rn.image)})
	}
	opts := image.PullOptions{Platform: o.Platform, Auth: rn.auth, Progress: rn.progress}
	if rn.req.Pull == "lazy" {
		opts.Lazy = image.LazyAlways
	}
	_, err = images.Pull(ctx, ref, opts)
	return err
}

func (rn *run) progress(p image.Progress) { rn.send(runproto.Progress, docker.Message(p)) }
