package cli

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/moby/moby/api/types/container"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

func attachQuery(stdin, stdout, stderr, logs bool) url.Values {
	q := url.Values{"stream": {"1"}}
	for name, on := range map[string]bool{"stdin": stdin, "stdout": stdout, "stderr": stderr, "logs": logs} {
		if on {
			q.Set(name, "1")
		}
	}
	return q
}

// attach opens the streams of a container.
func (a *app) attach(ctx context.Context, c *client.Client, id string, q url.Values) (*attached, error) {
	conn, err := c.Hijack(ctx, client.Request{Method: http.MethodPost, Path: "/containers/" + url.PathEscape(id) + "/attach", Query: q}, "tcp")
	if err != nil {
		return nil, err
	}
	return &attached{a: a, c: c, conn: conn}, nil
}

// forwardSignals sends this process's signals to the container until the
// returned function is called.
func (a *app) forwardSignals(ctx context.Context, c *client.Client, id string) (stop func()) {
	return onSignals(func(name string) {
		_ = c.Post(ctx, "/containers/"+url.PathEscape(id)+"/kill", url.Values{"signal": {name}}, nil, nil) // it may just have ended
	})
}

func (a *app) attachCmd() *cobra.Command {
	var noStdin, sigProxy bool
	var keys string
	cmd := &cobra.Command{
		Use:   "attach [OPTIONS] CONTAINER",
		Short: "Attach local standard input, output, and error streams to a running container",
		Long: `Connect this terminal to the first process of a running container.
With a terminal, ctrl-p ctrl-q leaves again without stopping it.`,
		Example:           "tenon attach web\ntenon attach --no-stdin --sig-proxy=false web",
		Args:              exactArgs(1),
		ValidArgsFunction: a.completeFirst(a.containerNames(running)),
	}
	f := cmd.Flags()
	f.StringVar(&keys, "detach-keys", "", "Override the key sequence for detaching a container")
	f.BoolVar(&noStdin, "no-stdin", false, "Do not attach STDIN")
	f.BoolVar(&sigProxy, "sig-proxy", true, "Proxy all received signals to the process")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		return a.attachRunning(ctx, c, args[0], keys, !noStdin, sigProxy)
	})
	return cmd
}

func (a *app) attachRunning(ctx context.Context, c *client.Client, name, keySpec string, stdin, sigProxy bool) error {
	keys, err := parseDetachKeys(keySpec)
	if err != nil {
		return err
	}
	var info container.InspectResponse
	if err := c.Get(ctx, "/containers/"+url.PathEscape(name)+"/json", nil, &info); err != nil {
		return err
	}
	switch {
	case info.State == nil || info.Config == nil:
		return fmt.Errorf("the daemon's description of %s is incomplete", name)
	case !info.State.Running:
		return errors.New("cannot attach to a stopped container, start it first")
	case info.State.Paused:
		return errors.New("cannot attach to a paused container, unpause it first")
	case info.State.Restarting:
		return errors.New("cannot attach to a restarting container, wait until it is running")
	}
	stdin = stdin && info.Config.OpenStdin
	if err := a.checkTTY(stdin, info.Config.Tty); err != nil {
		return err
	}
	st, err := a.attach(ctx, c, info.ID, attachQuery(stdin, true, true, false))
	if err != nil {
		return err
	}
	defer st.conn.Close()
	wait, err := startWait(ctx, c, info.ID, container.WaitConditionNotRunning)
	if err != nil {
		return err
	}
	if sigProxy && !info.Config.Tty {
		defer a.forwardSignals(ctx, c, info.ID)()
	}
	switch err := st.stream(ctx, streamOptions{id: info.ID, tty: info.Config.Tty, stdin: stdin, keys: keys, redraw: true}); {
	case errors.Is(err, errDetached):
		return nil
	case err != nil:
		return err
	}
	return wait()
}

type execOptions struct {
	detach, interactive, tty, privileged bool
	keys, user, workdir                  string
	env, envFile                         list
}

func (a *app) execCmd() *cobra.Command {
	var o execOptions
	cmd := &cobra.Command{
		Use:   "exec [OPTIONS] CONTAINER COMMAND [ARG...]",
		Short: "Execute a command in a running container",
		Long: `Run one more command in a running container, in its namespaces and limits.
The command's exit code becomes this command's.`,
		Example:           "tenon exec web nginx -t\ntenon exec -it web sh\ntenon exec -u nobody -w /tmp -e A=1 web env",
		Args:              minArgs(2),
		ValidArgsFunction: a.completeFirst(a.containerNames(running)),
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&o.detach, "detach", "d", false, "Detached mode: run command in the background")
	f.StringVar(&o.keys, "detach-keys", "", "Override the key sequence for detaching a container")
	f.VarP(&o.env, "env", "e", "Set environment variables")
	f.Var(&o.envFile, "env-file", "Read in a file of environment variables")
	f.BoolVarP(&o.interactive, "interactive", "i", false, "Keep STDIN open even if not attached")
	f.BoolVar(&o.privileged, "privileged", false, "Give extended privileges to the command")
	f.BoolVarP(&o.tty, "tty", "t", false, "Allocate a pseudo-TTY")
	f.StringVarP(&o.user, "user", "u", "", `Username or UID (format: "<name|uid>[:<group|gid>]")`)
	f.StringVarP(&o.workdir, "workdir", "w", "", "Working directory inside the container")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		return a.exec(ctx, c, o, args)
	})
	return cmd
}

func (a *app) exec(ctx context.Context, c *client.Client, o execOptions, args []string) error {
	env, err := readEnv(o.envFile, o.env)
	if err != nil {
		return err
	}
	keys, err := parseDetachKeys(o.keys)
	if err != nil {
		return err
	}
	stdin := o.interactive && !o.detach
	if err := a.checkTTY(stdin, o.tty); err != nil {
		return err
	}
	req := container.ExecCreateRequest{
		User: o.user, Privileged: o.privileged, Tty: o.tty, DetachKeys: o.keys, Env: env, WorkingDir: o.workdir, Cmd: args[1:],
		AttachStdin: stdin, AttachStdout: !o.detach, AttachStderr: !o.detach,
	}
	if hw, ok := a.consoleSize(); ok && o.tty {
		req.ConsoleSize = &hw
	}
	var created container.ExecCreateResponse
	if err := c.Post(ctx, "/containers/"+url.PathEscape(args[0])+"/exec", nil, req, &created); err != nil {
		return err
	}
	start := container.ExecStartRequest{Detach: o.detach, Tty: o.tty, ConsoleSize: req.ConsoleSize}
	path := "/exec/" + url.PathEscape(created.ID)
	if o.detach {
		return c.Post(ctx, path+"/start", nil, start, nil)
	}
	conn, err := c.Hijack(ctx, client.Request{Method: http.MethodPost, Path: path + "/start", Body: start}, "tcp")
	if err != nil {
		if code := startCode(err.Error()); code != exitEngine {
			return &exitError{code, err}
		}
		return err
	}
	defer conn.Close()
	st := &attached{a: a, c: c, conn: conn}
	switch err := st.stream(ctx, streamOptions{id: created.ID, exec: true, tty: o.tty, stdin: stdin, keys: keys}); {
	case errors.Is(err, errDetached):
		return nil
	case err != nil:
		return err
	}
	var end container.ExecInspectResponse
	if err := c.Get(ctx, path+"/json", nil, &end); err != nil {
		return err
	}
	if end.ExitCode != nil && *end.ExitCode != 0 {
		return &exitError{code: *end.ExitCode}
	}
	return nil
}
