package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

// containerPath is the API path of a container, with a sub-path.
func containerPath(name, sub string) string {
	return "/containers/" + url.PathEscape(name) + sub
}

// simple is a verb that posts to /containers/NAME/sub for each name.
func (a *app) simple(verbName, sub, short, example string, which filterContainers) *cobra.Command {
	return &cobra.Command{
		Use: verbName + " CONTAINER [CONTAINER...]", Short: short, Example: example,
		Args: minArgs(1), ValidArgsFunction: a.completeAll(a.containerNames(which)),
		RunE: a.do(func(ctx context.Context, c *client.Client, args []string) error {
			return a.eachParallel(args, func(name string) error {
				return c.Post(ctx, containerPath(name, sub), nil, nil, nil)
			})
		}),
	}
}

func (a *app) pauseCmd() *cobra.Command {
	return a.simple("pause", "/pause", "Pause all processes within one or more containers", "tenon pause web", running)
}

func (a *app) unpauseCmd() *cobra.Command {
	return a.simple("unpause", "/unpause", "Unpause all processes within one or more containers", "tenon unpause web", running)
}

func (a *app) startCmd() *cobra.Command {
	var attach, interactive bool
	var keys string
	cmd := &cobra.Command{
		Use:               "start [OPTIONS] CONTAINER [CONTAINER...]",
		Short:             "Start one or more stopped containers",
		Long:              "Start containers that were created or have stopped. With -a, stay attached and end\nwith the container's exit code.",
		Example:           "tenon start web db\ntenon start -ai job",
		Args:              minArgs(1),
		ValidArgsFunction: a.completeAll(a.containerNames(stopped)),
	}
	f := cmd.Flags()
	f.BoolVarP(&attach, "attach", "a", false, "Attach STDOUT/STDERR and forward signals")
	f.StringVar(&keys, "detach-keys", "", "Override the key sequence for detaching a container")
	f.BoolVarP(&interactive, "interactive", "i", false, "Attach container's STDIN")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		if attach || interactive {
			if len(args) > 1 {
				return errors.New("you cannot start and attach multiple containers at once")
			}
			return a.startAttached(ctx, c, args[0], keys, interactive)
		}
		return a.each(args, func(name string) error {
			return ignoreNotModified(c.Post(ctx, containerPath(name, "/start"), nil, nil, nil))
		})
	})
	return cmd
}

// ignoreNotModified drops the answer that everything is already as asked.
func ignoreNotModified(err error) error {
	var e *client.Error
	if errors.As(err, &e) && e.Status == http.StatusNotModified {
		return nil
	}
	return err
}

func (a *app) startAttached(ctx context.Context, c *client.Client, name, keySpec string, stdin bool) error {
	keys, err := parseDetachKeys(keySpec)
	if err != nil {
		return err
	}
	var info container.InspectResponse
	if err := c.Get(ctx, containerPath(name, "/json"), nil, &info); err != nil {
		return err
	}
	if info.Config == nil || info.HostConfig == nil {
		return fmt.Errorf("the daemon's description of %s is incomplete", name)
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
	cond := container.WaitConditionNextExit
	if info.HostConfig.AutoRemove {
		cond = container.WaitConditionRemoved
	}
	wait, err := startWait(ctx, c, info.ID, cond)
	if err != nil {
		return err
	}
	if !info.Config.Tty {
		defer a.forwardSignals(ctx, c, info.ID)()
	}
	if err := ignoreNotModified(c.Post(ctx, containerPath(info.ID, "/start"), nil, nil, nil)); err != nil {
		return &exitError{exitFailure, err}
	}
	switch err := st.stream(ctx, streamOptions{id: info.ID, tty: info.Config.Tty, stdin: stdin, keys: keys}); {
	case errors.Is(err, errDetached):
		return nil
	case err != nil:
		return err
	}
	return wait()
}

// stopping is stop and restart, which take the same flags.
func (a *app) stopping(name, past, example string) *cobra.Command {
	var sig string
	var timeout int
	cmd := &cobra.Command{
		Use:               name + " [OPTIONS] CONTAINER [CONTAINER...]",
		Short:             past + " one or more containers",
		Long:              past + " containers: the stop signal first (SIGTERM, or the image's), and SIGKILL when the\ntime is over (10 seconds, or the container's --stop-timeout).",
		Example:           example,
		Args:              minArgs(1),
		ValidArgsFunction: a.completeAll(a.containerNames(running)),
	}
	f := cmd.Flags()
	f.StringVarP(&sig, "signal", "s", "", "Signal to send to the container")
	f.IntVarP(&timeout, "timeout", "t", 0, "Seconds to wait before killing the container")
	f.IntVar(&timeout, "time", 0, "Seconds to wait before killing the container")
	_ = f.MarkHidden("time") // it was just added
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		q := url.Values{}
		if sig != "" {
			q.Set("signal", sig)
		}
		if f.Changed("timeout") || f.Changed("time") {
			q.Set("t", strconv.Itoa(timeout))
		}
		return a.eachParallel(args, func(n string) error {
			return ignoreNotModified(c.Post(ctx, containerPath(n, "/"+name), q, nil, nil))
		})
	})
	return cmd
}

func (a *app) stopCmd() *cobra.Command {
	return a.stopping("stop", "Stop", "tenon stop web\ntenon stop -t 30 db")
}

func (a *app) restartCmd() *cobra.Command {
	cmd := a.stopping("restart", "Restart", "tenon restart web")
	cmd.ValidArgsFunction = a.completeAll(a.containerNames(all))
	return cmd
}

func (a *app) killCmd() *cobra.Command {
	var sig string
	cmd := &cobra.Command{
		Use:               "kill [OPTIONS] CONTAINER [CONTAINER...]",
		Short:             "Kill one or more running containers",
		Long:              "Send a signal to the first process of containers: SIGKILL, or the one given.",
		Example:           "tenon kill web\ntenon kill -s HUP web",
		Args:              minArgs(1),
		ValidArgsFunction: a.completeAll(a.containerNames(running)),
	}
	cmd.Flags().StringVarP(&sig, "signal", "s", "", "Signal to send to the container")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		q := url.Values{}
		if sig != "" {
			q.Set("signal", sig)
		}
		return a.eachParallel(args, func(n string) error { return c.Post(ctx, containerPath(n, "/kill"), q, nil, nil) })
	})
	return cmd
}

func (a *app) rmCmd() *cobra.Command {
	var force, link, volumes bool
	cmd := &cobra.Command{
		Use:               "rm [OPTIONS] CONTAINER [CONTAINER...]",
		Aliases:           []string{"remove"},
		Short:             "Remove one or more containers",
		Long:              "Remove stopped containers with their writable layer and logs; running ones with -f.\nNamed volumes stay; -v removes the anonymous ones.",
		Example:           "tenon rm job\ntenon rm -f -v web",
		Args:              minArgs(1),
		ValidArgsFunction: a.completeAll(a.containerNames(all)),
	}
	f := cmd.Flags()
	f.BoolVarP(&force, "force", "f", false, "Force the removal of a running container (uses SIGKILL)")
	f.BoolVarP(&link, "link", "l", false, "Remove the specified link")
	f.BoolVarP(&volumes, "volumes", "v", false, "Remove anonymous volumes associated with the container")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		q := url.Values{}
		for k, on := range map[string]bool{"force": force, "link": link, "v": volumes} {
			if on {
				q.Set(k, "1")
			}
		}
		return a.eachParallel(args, func(n string) error {
			n = strings.Trim(n, "/")
			if n == "" {
				return errors.New("container name cannot be empty")
			}
			err := c.Delete(ctx, containerPath(n, ""), q, nil)
			var e *client.Error
			if force && errors.As(err, &e) && e.Status == http.StatusNotFound {
				fmt.Fprintln(a.err, err) // -f: what is gone is not a failure
				return errSilent
			}
			return err
		})
	})
	return cmd
}

func (a *app) renameCmd() *cobra.Command {
	return &cobra.Command{
		Use: "rename CONTAINER NEW_NAME", Short: "Rename a container", Example: "tenon rename web web-old",
		Args: exactArgs(2), ValidArgsFunction: a.completeFirst(a.containerNames(all)),
		RunE: a.do(func(ctx context.Context, c *client.Client, args []string) error {
			if strings.Trim(args[0], " /") == "" || strings.Trim(args[1], " /") == "" {
				return errors.New("Error: Neither old nor new names may be empty")
			}
			return c.Post(ctx, containerPath(args[0], "/rename"), url.Values{"name": {args[1]}}, nil, nil)
		}),
	}
}

func (a *app) waitCmd() *cobra.Command {
	return &cobra.Command{
		Use: "wait CONTAINER [CONTAINER...]", Short: "Block until one or more containers stop, then print their exit codes",
		Example: "tenon wait job && tenon logs job", Args: minArgs(1),
		ValidArgsFunction: a.completeAll(a.containerNames(running)),
		RunE: a.do(func(ctx context.Context, c *client.Client, args []string) error {
			var errs []error
			for _, name := range args {
				var out container.WaitResponse
				if err := c.Post(ctx, containerPath(name, "/wait"), nil, nil, &out); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(a.out, out.StatusCode)
			}
			return errors.Join(errs...)
		}),
	}
}

func (a *app) updateCmd() *cobra.Command {
	var u container.UpdateConfig
	var mem, reservation, swap bytesValue
	var cpus cpusValue
	var pids int64
	var restart string
	cmd := &cobra.Command{
		Use:               "update [OPTIONS] CONTAINER [CONTAINER...]",
		Short:             "Update configuration of one or more containers",
		Long:              "Change limits and the restart policy of containers, running or not.",
		Example:           "tenon update --memory 512m --memory-swap 1g web\ntenon update --cpus 1.5 --restart unless-stopped web",
		Args:              minArgs(1),
		ValidArgsFunction: a.completeAll(a.containerNames(all)),
	}
	f := cmd.Flags()
	f.Uint16Var(&u.BlkioWeight, "blkio-weight", 0, "Block IO (relative weight), between 10 and 1000, or 0 to disable (default 0)")
	f.Int64Var(&u.CPUPeriod, "cpu-period", 0, "Limit CPU CFS (Completely Fair Scheduler) period")
	f.Int64Var(&u.CPUQuota, "cpu-quota", 0, "Limit CPU CFS (Completely Fair Scheduler) quota")
	f.Int64Var(&u.CPURealtimePeriod, "cpu-rt-period", 0, "Limit the CPU real-time period in microseconds")
	f.Int64Var(&u.CPURealtimeRuntime, "cpu-rt-runtime", 0, "Limit the CPU real-time runtime in microseconds")
	f.Int64VarP(&u.CPUShares, "cpu-shares", "c", 0, "CPU shares (relative weight)")
	f.Var(&cpus, "cpus", "Number of CPUs")
	f.StringVar(&u.CpusetCpus, "cpuset-cpus", "", "CPUs in which to allow execution (0-3, 0,1)")
	f.StringVar(&u.CpusetMems, "cpuset-mems", "", "MEMs in which to allow execution (0-3, 0,1)")
	f.VarP(&mem, "memory", "m", "Memory limit")
	f.Var(&reservation, "memory-reservation", "Memory soft limit")
	f.Var(&swap, "memory-swap", "Swap limit equal to memory plus swap: -1 to enable unlimited swap")
	f.Int64Var(&pids, "pids-limit", 0, "Tune container pids limit (set -1 for unlimited)")
	f.StringVar(&restart, "restart", "", "Restart policy to apply when a container exits")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		if f.NFlag() == 0 {
			return errors.New("you must provide one or more flags when using this command")
		}
		u.Memory, u.MemoryReservation, u.MemorySwap, u.NanoCPUs = int64(mem), int64(reservation), int64(swap), int64(cpus)
		if f.Changed("pids-limit") {
			u.PidsLimit = &pids
		}
		var err error
		if u.RestartPolicy, err = parseRestart(restart); err != nil {
			return err
		}
		return a.each(args, func(n string) error {
			var out struct{ Warnings []string }
			if err := c.Post(ctx, containerPath(n, "/update"), nil, u, &out); err != nil {
				return err
			}
			for _, w := range out.Warnings {
				fmt.Fprintln(a.err, w)
			}
			return nil
		})
	})
	return cmd
}

func (a *app) topCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "top CONTAINER [ps OPTIONS]", Short: "Display the running processes of a container",
		Example: "tenon top web\ntenon top web -o pid,rss,comm", Args: minArgs(1),
		ValidArgsFunction: a.completeFirst(a.containerNames(running)),
	}
	cmd.Flags().SetInterspersed(false)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		q := url.Values{}
		if len(args) > 1 {
			q.Set("ps_args", strings.Join(args[1:], " "))
		}
		var out container.TopResponse
		if err := c.Get(ctx, containerPath(args[0], "/top"), q, &out); err != nil {
			return err
		}
		return a.columns(append([][]string{out.Titles}, out.Processes...))
	})
	return cmd
}

func (a *app) diffCmd() *cobra.Command {
	return &cobra.Command{
		Use: "diff CONTAINER", Short: "Inspect changes to files or directories on a container's filesystem",
		Long:    "List what a container changed in its image: A added, C changed, D deleted.",
		Example: "tenon diff web", Args: exactArgs(1), ValidArgsFunction: a.completeFirst(a.containerNames(all)),
		RunE: a.do(func(ctx context.Context, c *client.Client, args []string) error {
			var out []container.FilesystemChange
			if err := c.Get(ctx, containerPath(args[0], "/changes"), nil, &out); err != nil {
				return err
			}
			for _, ch := range out {
				kind := "?"
				if int(ch.Kind) < 3 {
					kind = []string{"C", "A", "D"}[ch.Kind]
				}
				fmt.Fprintln(a.out, kind, ch.Path)
			}
			return nil
		}),
	}
}

func (a *app) commitCmd() *cobra.Command {
	var author, message string
	var changes list
	var pause, noPause bool
	cmd := &cobra.Command{
		Use:               "commit [OPTIONS] CONTAINER [REPOSITORY[:TAG]]",
		Short:             "Create a new image from a container's changes",
		Example:           "tenon commit web web:patched\ntenon commit -c 'CMD [\"httpd\"]' -m 'with fixes' web web:2",
		Args:              rangeArgs(1, 2),
		ValidArgsFunction: a.completeFirst(a.containerNames(all)),
	}
	f := cmd.Flags()
	f.StringVarP(&author, "author", "a", "", `Author (e.g., "John Hannibal Smith <hannibal@a-team.com>")`)
	f.VarP(&changes, "change", "c", "Apply Dockerfile instruction to the created image")
	f.StringVarP(&message, "message", "m", "", "Commit message")
	f.BoolVarP(&pause, "pause", "p", true, "Pause container during commit")
	f.BoolVar(&noPause, "no-pause", false, "Disable pausing the container during commit")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		q := url.Values{"container": {args[0]}, "comment": {message}, "author": {author}, "changes": changes}
		if len(args) == 2 {
			repo, tag := splitTag(args[1])
			q.Set("repo", repo)
			q.Set("tag", tag)
		}
		if !pause || noPause {
			q.Set("pause", "0")
		}
		var out struct {
			ID string `json:"Id"`
		}
		if err := c.Post(ctx, "/commit", q, json.RawMessage("{}"), &out); err != nil {
			return err
		}
		fmt.Fprintln(a.out, out.ID)
		return nil
	})
	return cmd
}

// splitTag splits REPOSITORY[:TAG]; the tag is empty if there is none.
func splitTag(ref string) (repo, tag string) {
	if i := strings.LastIndex(ref, ":"); i > strings.LastIndex(ref, "/") {
		return ref[:i], ref[i+1:]
	}
	return ref, ""
}
