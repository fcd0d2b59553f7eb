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
