// Package buildrun is the work of `tenon build`: it makes of the command line what
// BuildKit's frontend for Dockerfiles takes, opens a session that serves the context,
// secrets and credentials, shows the progress and writes what was asked for. It speaks to
// the daemon's /grpc and /session, as buildx does, and needs no buildx.
//
// It links BuildKit's client, so only cmd/tenon-build imports it.
package buildrun

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	bk "github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/frontend/subrequests/lint"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/progress/progressui"
	"golang.org/x/sync/errgroup"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/build/where"
	"tenon.dev/tenon/internal/cli/buildopts"
	"tenon.dev/tenon/internal/image/lineage"
)

// Run builds what o says. Progress goes to stderr; the image's ID (with Quiet) and
// results for "-" to stdout. The end of ctx cancels the build.
func Run(ctx context.Context, o *buildopts.Options, stdin io.Reader, stdout, stderr *os.File) (err error) {
	engine, err := daemon(o)
	if err != nil {
		return err
	}
	j, err := prepare(o, stdin, stdout)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.close()) }()
	c, err := bk.New(ctx, "",
		bk.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return upgrade(ctx, engine, "/grpc", nil)
		}),
		bk.WithSessionDialer(func(ctx context.Context, proto string, meta map[string][]string) (net.Conn, error) {
			return upgrade(ctx, engine, "/session", meta)
		}))
	if err != nil {
		return fmt.Errorf("connect to the daemon: %w", err)
	}
	defer func() { _ = c.Close() }() // all that it was asked for is there

	if o.Check {
		return check(ctx, c, j, stdout)
	}
	display, err := newDisplay(o, stderr)
	if err != nil {
		return err
	}
	var g errgroup.Group
	status := make(chan *bk.SolveStatus)
	g.Go(func() error {
		_, err := display.UpdateFrom(context.Background(), status) // ends with the channel
		return err
	})
	resp, err := c.Solve(ctx, nil, j.opt, status)
	if derr := g.Wait(); err == nil && derr != nil {
		err = fmt.Errorf("show the progress: %w", derr)
	}
	if err != nil {
		return err
	}
	return j.report(ctx, engine, resp, stdout, stderr)
}

// newDisplay is how the progress is shown.
func newDisplay(o *buildopts.Options, stderr *os.File) (progressui.Display, error) {
	mode := o.Progress
	if v := os.Getenv("BUILDKIT_PROGRESS"); v != "" && (mode == "auto" || mode == "") {
		mode = v
	}
	if o.Quiet {
		mode = "quiet"
	}
	d, err := progressui.NewDisplay(stderr, progressui.DisplayMode(mode))
	if err != nil {
		return d, fmt.Errorf("--progress %s: %w", mode, err)
	}
	return d, nil
}

// check asks for what is wrong with the Dockerfile, and builds nothing.
func check(ctx context.Context, c *bk.Client, j *job, stdout io.Writer) error {
	attrs := j.opt.FrontendAttrs
	attrs["requestid"] = lint.SubrequestLintDefinition.Name
	attrs["frontend.caps"] = "moby.buildkit.frontend.subrequests"
	j.opt.Frontend, j.opt.Exports = "", nil
	var found int
	_, err := c.Build(ctx, j.opt, "tenon", func(ctx context.Context, gw gateway.Client) (*gateway.Result, error) {
		res, err := gw.Solve(ctx, gateway.SolveRequest{Frontend: "dockerfile.v0", FrontendOpt: attrs})
		if err != nil {
			return nil, err
		}
		var results lint.LintResults
		if err := json.Unmarshal(res.Metadata["result.json"], &results); err != nil {
			return nil, fmt.Errorf("the check's answer: %w", err)
		}
		found = len(results.Warnings)
		if err := results.PrintTo(stdout, nil); err != nil {
			return nil, err
		}
		if results.Error != nil {
			return nil, lintError(&results)
		}
		return res, nil
	}, nil)
	if err != nil {
		return err
	}
	if found > 0 {
		return fmt.Errorf("the check has found %d problem(s)", found)
	}
	_, err = fmt.Fprintln(stdout, "Check complete, no warnings found.")
	return err
}

// lintError is what keeps a Dockerfile from being checked.
func lintError(r *lint.LintResults) error {
	l := &r.Error.Location
	if len(l.Ranges) == 0 || int(l.SourceIndex) >= len(r.Sources) || l.SourceIndex < 0 {
		return errors.New(r.Error.Message)
	}
	src := r.Sources[l.SourceIndex]
	first, last := int(l.Ranges[0].GetStart().GetLine()), int(l.Ranges[0].GetEnd().GetLine())
	if p, ok := where.InLines(src.GetFilename(), src.GetData(), first, last, r.Error.Message); ok {
		return fmt.Errorf("%s: %s", p, r.Error.Message)
	}
	return errors.New(r.Error.Message)
}

// ids are how the result is known.
func ids(resp *bk.SolveResponse) (id string) {
	r := resp.ExporterResponse
	if id = r["tenon.image.id"]; id != "" {
		return id
	}
	if id = r["containerimage.digest"]; id != "" {
		return id
	}
	return r["containerimage.config.digest"]
}

// report writes what the build has come to.
func (j *job) report(ctx context.Context, engine *client.Client, resp *bk.SolveResponse, stdout, stderr io.Writer) error {
	o, id := j.o, ids(resp)
	if o.IIDFile != "" {
		if err := os.WriteFile(o.IIDFile, []byte(id), 0o644); err != nil {
			return fmt.Errorf("--iidfile: %w", err)
		}
	}
	if o.MetadataFile != "" {
		if err := writeMetadata(o.MetadataFile, resp.ExporterResponse); err != nil {
			return fmt.Errorf("--metadata-file: %w", err)
		}
	}
	if o.Quiet && id != "" {
		if _, err := fmt.Fprintln(stdout, id); err != nil {
			return err
		}
	}
	if j.stored && id != "" {
		d := j.definition()
		seal, err := buildopts.Seal(o.ConfigDir, o.Host, o.Tags, d)
		if d.Seal = seal; err != nil {
			_, _ = fmt.Fprintf(stderr, "tenon: warning: tenon image rebuild will ask before it builds this again: %v\n", err) // for the user's eyes
		}
		if err := record(ctx, engine, id, d); err != nil {
			_, _ = fmt.Fprintf(stderr, "tenon: warning: how the image was built is not recorded: %v\n", err) // for the user's eyes
		}
	}
	return nil
}

// definition is how the image was built, for building it again, in whichever directory.
func (j *job) definition() imageapi.Definition {
	o := j.o
	d := imageapi.Definition{
		Context: lineage.WithoutCredentials(j.context), Dockerfile: j.dockerfile, Target: o.Target, Platform: strings.Join(o.Platform, ","),
		Labels: o.Labels, Contexts: each(o.Contexts, absContext), Secrets: each(o.Secrets, absSecret), SSH: each(o.SSH, absSSH),
		Network: o.Network, Isolation: o.Isolation, Flags: flags(o),
	}
	text, err := os.ReadFile(j.dockerfile)
	if err == nil && len(text) <= maxDockerfile && !buildopts.Remote(j.context) { // the engine finds the base otherwise
		if base := lineage.From(string(text), o.Target, o.Args); base != "" {
			d.Bases = []imageapi.Base{{Name: base}}
		}
	}
	d.Host, _ = os.Hostname() // unknown otherwise
	d.User = os.Getenv("USER")
	d.Args = withoutSecrets(o.Args)
	return d
}

// writeMetadata writes the exporter's answer as JSON, values that are JSON as such.
func writeMetadata(path string, resp map[string]string) error {
	out := map[string]any{}
	for k, v := range resp {
		var raw any
		if strings.HasPrefix(v, "{") && json.Unmarshal([]byte(v), &raw) == nil {
			out[k] = raw
			continue
		}
		out[k] = v
	}
	b, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return err
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// Report says why a build has failed, with the line and the column of the Dockerfile that
// it is about, and returns the process's exit code.
func Report(stderr io.Writer, err error) int {
	if err == nil {
		return 0
	}
	for _, s := range errdefs.Sources(err) {
		_ = s.Print(stderr) // for the user's eyes, as all below
	}
	msg := where.Plain(err.Error())
	if p, ok := where.Find(err); ok {
		_, _ = fmt.Fprintf(stderr, "%s: %s\n", p, strings.TrimSuffix(msg, " ("+p.String()+")"))
	} else {
		_, _ = fmt.Fprintf(stderr, "tenon: %s\n", msg)
	}
	if errors.Is(err, context.Canceled) {
		return 130
	}
	return 1
}
