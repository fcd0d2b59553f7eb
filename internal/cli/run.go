package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"

	"github.com/moby/moby/api/types/container"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/runproto"
)

// runOptions are the flags of run that are not the container's.
type runOptions struct {
	detach, sigProxy bool
	detachKeys       string
}

func (a *app) runCmd() *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run [OPTIONS] IMAGE [COMMAND] [ARG...]",
		Short: "Create and run a new container from an image",
		Long: `Create a container from an image and run a command in it.

The image is pulled if it is not there (--pull). The command's exit code becomes
this command's; 125 says that the engine failed, 126 that the command cannot be
executed, 127 that it was not found, 128+N that signal N ended it.`,
		Example: `tenon run --rm busybox echo hello
tenon run -it --rm busybox sh
tenon run -d --name web -p 8080:80 -v data:/srv --memory 256m nginx`,
		Args:        minArgs(1),
		Annotations: map[string]string{engineCodes: ""},
	}
	flags := newContainerFlags(cmd.Flags())
	cmd.Flags().BoolVarP(&o.detach, "detach", "d", false, "Run container in background and print container ID")
	cmd.Flags().StringVar(&o.detachKeys, "detach-keys", "", "Override the key sequence for detaching a container")
	cmd.Flags().BoolVar(&o.sigProxy, "sig-proxy", true, "Proxy received signals to the process")
	cmd.ValidArgsFunction = a.completeFirst(a.imageNames)
	a.completeContainerFlags(cmd)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		ctx, err := withImageKeys(ctx, flags.decryptionKeys, nil, nil)
		if err != nil {
			return &exitError{exitEngine, err}
		}
		return a.run(ctx, c, flags, o, args)
	})
	return cmd
}

func (a *app) run(ctx context.Context, c *client.Client, flags *containerFlags, o runOptions, args []string) error {
	req, err := flags.request(args)
	if err != nil {
		return &exitError{exitEngine, err}
	}
	conf := req.Config
	if o.detach {
		if len(flags.attach) > 0 {
			return &exitError{exitEngine, errors.New("conflicting options: cannot specify both --attach and --detach")}
		}
		conf.AttachStdin, conf.AttachStdout, conf.AttachStderr, conf.StdinOnce = false, false, false, false
	} else if err := a.checkTTY(conf.AttachStdin, conf.Tty); err != nil {
		return &exitError{exitFailure, err}
	}
	keys, err := parseDetachKeys(o.detachKeys)
	if err != nil {
		return err
	}
	if err := checkCIDFile(flags.cidfile); err != nil {
		return err
	}
	hw, haveSize := a.consoleSize()
	if conf.Tty && haveSize {
		req.HostConfig.ConsoleSize = hw
	}
	body, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("encode the container's configuration: %w", err)
	}
	rr := &runproto.Request{
		Name: flags.name, Platform: flags.platform, Pull: flags.pull.value, Detach: o.detach, Config: body,
		TTY: conf.Tty, Stdin: conf.OpenStdin, Attach: attachList(conf),
	}
	if conf.Tty && haveSize {
		rr.ConsoleSize = &hw
	}
	s := &session{a: a, c: c, flags: flags, o: o, req: req, keys: keys}
	auth, viaHelper := a.registryAuth(conf.Image)
	if viaHelper && rr.Pull != "never" {
		// The credentials are behind a helper program, which is only asked
		// when the image has to be pulled; then this side pulls it.
		if rr.Pull == "always" {
			if err := s.pull(ctx); err != nil {
				return err
			}
		}
		rr.Pull = "never"
	}
	rc, err := c.Run(ctx, rr, auth)
	if noEndpoint(err) {
		return s.fallback(ctx)
	}
	if err != nil {
		return err
	}
	err = s.frames(rc)
	var re *runError
	if viaHelper && (flags.pull.value == "missing" || flags.pull.value == "lazy") && errors.As(err, &re) && re.Kind == "image" {
		if err := s.pull(ctx); err != nil {
			return err
		}
		if rc, err = c.Run(ctx, rr, auth); err != nil {
			return err
		}
		err = s.frames(rc)
	}
	return err
}

// noEndpoint tells whether err says that the server has no one-round-trip run.
func noEndpoint(err error) bool {
	var e *client.Error
	return errors.As(err, &e) && (e.Status == http.StatusNotFound || e.Status == http.StatusNotImplemented)
}

func attachList(conf *container.Config) []string {
	var l []string
	if conf.AttachStdin {
		l = append(l, "stdin")
	}
	if conf.AttachStdout {
		l = append(l, "stdout")
	}
	if conf.AttachStderr {
		l = append(l, "stderr")
	}
	return l
}

// checkCIDFile refuses a file that exists, before anything is created.
func checkCIDFile(name string) error {
	if name == "" {
		return nil
	}
	if _, err := os.Stat(name); err == nil {
		return fmt.Errorf("container ID file found, make sure the other container isn't running or delete %s", name)
	}
	return nil
}

func writeCIDFile(name, id string) error {
	if name == "" {
		return nil
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("create the container ID file: %w", err)
	}
	_, err = f.WriteString(id)
	return errors.Join(err, f.Close())
}

func (a *app) createCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:         "create [OPTIONS] IMAGE [COMMAND] [ARG...]",
		Short:       "Create a new container",
		Long:        "Create a container from an image without starting it, and print its ID.\n'tenon start' starts it.",
		Example:     "tenon create --name job -v data:/data busybox tar c /data\ntenon start -a job",
		Args:        minArgs(1),
		Annotations: map[string]string{engineCodes: ""},
	}
	flags := newContainerFlags(cmd.Flags())
	cmd.ValidArgsFunction = a.completeFirst(a.imageNames)
	a.completeContainerFlags(cmd)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		req, err := flags.request(args)
		if err != nil {
			return &exitError{exitEngine, err}
		}
		if err := checkCIDFile(flags.cidfile); err != nil {
			return err
		}
		if req.Config.Tty {
			req.HostConfig.ConsoleSize, _ = a.consoleSize()
		}
		if ctx, err = withImageKeys(ctx, flags.decryptionKeys, nil, nil); err != nil {
			return &exitError{exitEngine, err}
		}
		s := &session{a: a, c: c, flags: flags, req: req}
		id, err := s.create(ctx)
		if err != nil {
			return err
		}
		fmt.Fprintln(a.out, id)
		return nil
	})
	return cmd
}

// create makes the container by Docker's own endpoint and pulls the image if
// that is asked for.
func (s *session) create(ctx context.Context) (string, error) {
	if s.flags.pull.value == "always" {
		if err := s.pull(ctx); err != nil {
			return "", err
		}
	}
	q := url.Values{}
	if s.flags.name != "" {
		q.Set("name", s.flags.name)
	}
	if s.flags.platform != "" {
		q.Set("platform", s.flags.platform)
	}
	var out container.CreateResponse
	err := s.c.Post(ctx, "/containers/create", q, s.req, &out)
	var e *client.Error
	if errors.As(err, &e) && e.Status == http.StatusNotFound && (s.flags.pull.value == "missing" || s.flags.pull.value == "lazy") {
		if !s.flags.quiet {
			fmt.Fprintf(s.a.err, "Unable to find image '%s' locally\n", s.req.Image)
		}
		if err := s.pull(ctx); err != nil {
			return "", err
		}
		err = s.c.Post(ctx, "/containers/create", q, s.req, &out)
	}
	if err != nil {
		return "", err
	}
	for _, w := range out.Warnings {
		fmt.Fprintln(s.a.err, "WARNING:", w)
	}
	return out.ID, writeCIDFile(s.flags.cidfile, out.ID)
}

// pull fetches the image of the container, with progress on standard error.
func (s *session) pull(ctx context.Context) error {
	return s.a.pullImage(ctx, s.c, s.req.Image, s.flags.platform, lazyOf(s.flags.pull.value), s.a.err, s.flags.quiet)
}
