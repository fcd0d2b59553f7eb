package tenon

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

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
	case "missing", "always", "never":
	default:
		return wire.Invalid("pull is missing, always or never, not %q", req.Pull)
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
	rn := &run{api: a, req: &req, sess: sess, out: wire.NewFrames(sess.Conn()), warnings: warnings,
		image: o.Request.Image, tty: o.Request.Tty, auth: docker.Auth(r)}
	rn.do(ctx, o)
	return nil
}

// run is one run's connection.
type run struct {
	api      *API
	req      *runproto.Request
	sess     *wire.Session
	out      *wire.Frames
	warnings []string
	image    string
	tty      bool
	auth     *registry.AuthConfig
	ctl      *control
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
		rn.ctl = newControl(ctx, rn.api.cfg.Engine)
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
		rn.ctl.container(res.ID)
	}
	rn.send(runproto.Created, runproto.CreatedMessage{ID: res.ID, Warnings: append(rn.warnings, res.Warnings...)})
}

func (rn *run) send(typ byte, v any) {
	b, err := json.Marshal(v)
	if err == nil {
		err = rn.out.WriteFrame(typ, b)
	}
	if err != nil {
		rn.sess.Gone()
	}
}

func (rn *run) fail(err error, kind string, code int) {
	rn.send(runproto.Error, runproto.ErrorMessage{Status: wire.Status(err), Message: wire.Message(err), Kind: kind, Code: code})
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
	_, err = images.Pull(ctx, ref, image.PullOptions{Platform: o.Platform, Auth: rn.auth, Progress: rn.progress})
	return err
}

func (rn *run) progress(p image.Progress) { rn.send(runproto.Progress, docker.Message(p)) }

// read handles what the client sends until the connection ends.
func (rn *run) read(in *inbox, cancel context.CancelCauseFunc) {
	err := rn.frames(in)
	if in != nil {
		in.close(err)
	}
	cancel(wire.ErrClientGone)
}

var errLeft = errors.New("the client detached")

// frames returns errLeft for a client that detached, io.EOF for one that is
// lost (its container's stdin ends then, unless it is a terminal).
func (rn *run) frames(in *inbox) error {
	fr := runproto.NewReader(bufio.NewReaderSize(rn.sess, 16<<10))
	for {
		typ, p, err := fr.Next()
		if err != nil {
			if rn.tty {
				return errLeft
			}
			return io.EOF
		}
		switch typ {
		case runproto.Stdin:
			if in != nil && !in.put(p) {
				in = nil // nobody reads any more
			}
		case runproto.StdinEOF:
			if in != nil && !rn.tty {
				in.close(io.EOF)
			}
		case runproto.Resize:
			var m runproto.ResizeMessage
			if json.Unmarshal(p, &m) == nil {
				rn.ctl.resize(m.H, m.W)
			}
		case runproto.Signal:
			var m runproto.SignalMessage
			if json.Unmarshal(p, &m) == nil && m.Signal != "" {
				rn.ctl.signal(m.Signal)
			}
		case runproto.Detach:
			return errLeft
		}
	}
}

// retryFor bounds how long a resize waits for its container to run.
const retryFor = 2 * time.Second
