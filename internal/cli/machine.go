package cli

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/machineapi"
)

func (a *app) machineCmd() *cobra.Command {
	return a.group("machine", "Manage machines: virtual machines that hold several containers", "",
		verb{name: "console", make: (*app).machineConsoleCmd},
		verb{name: "create", make: (*app).machineCreateCmd},
		verb{name: "inspect", make: a.inspectGroup(machineInspector(), a.machineNames)},
		verb{name: "logs", make: (*app).machineLogsCmd},
		verb{name: "ls", make: (*app).machineLsCmd},
		verb{name: "prune", make: (*app).machinePruneCmd},
		verb{name: "restart", make: (*app).machineRestartCmd},
		verb{name: "rm", make: (*app).machineRmCmd},
		verb{name: "start", make: (*app).machineStartCmd},
		verb{name: "stop", make: (*app).machineStopCmd},
		verb{name: "update", make: (*app).machineUpdateCmd},
	)
}

func machineInspector() inspector {
	return inspector{"machine", func(n string) string { return machineapi.Path + "/" + url.PathEscape(n) }, func() any { return &machineapi.Machine{} }}
}

func (a *app) machineNames(ctx context.Context, c *client.Client) []string {
	list, err := c.MachineList(ctx, "")
	if err != nil {
		return nil
	}
	var names []string
	for _, m := range list {
		names = append(names, m.Name)
	}
	return names
}

// machineRow is a line of machine ls.
type machineRow struct {
	isRow
	m machineapi.Machine
}

func (r machineRow) ID() string     { return r.m.ID }
func (r machineRow) Name() string   { return r.m.Name }
func (r machineRow) State() string  { return r.m.State }
func (r machineRow) CPUs() string   { return strconv.Itoa(r.m.CPUs) }
func (r machineRow) Memory() string { return units.BytesSize(float64(r.m.Memory)) }
func (r machineRow) Disk() string   { return units.BytesSize(float64(r.m.Disk)) }
func (r machineRow) Containers() string {
	return fmt.Sprintf("%d/%d", r.m.Running, len(r.m.Containers))
}
func (r machineRow) Socket() string        { return r.m.Socket }
func (r machineRow) Kernel() string        { return r.m.Kernel }
func (r machineRow) Labels() string        { return labelList(r.m.Labels) }
func (r machineRow) Label(n string) string { return r.m.Labels[n] }

// Status is the state, with how long it has been so.
func (r machineRow) Status() string {
	switch r.m.State {
	case "running":
		return "Up " + units.HumanDuration(time.Since(r.m.Started))
	case "crashed":
		return "Crashed (" + r.m.Error + ")"
	case "":
		return ""
	}
	return strings.ToUpper(r.m.State[:1]) + r.m.State[1:]
}

var machineHeaders = headers{
	"ID": "MACHINE ID", "Name": "NAME", "State": "STATE", "Status": "STATUS", "CPUs": "CPUS", "Memory": "MEMORY", "Disk": "DISK",
	"Containers": "CONTAINERS", "Socket": "SOCKET", "Kernel": "KERNEL", "Labels": "LABELS",
}

func (a *app) machineLsCmd() *cobra.Command {
	var format string
	var quiet bool
	fil := filters{}
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List machines",
		Long:    "List machines. CONTAINERS are those that run, and all.",
		Example: "tenon machine ls\ntenon machine ls -q -f state=running", Args: exactArgs(0),
	}
	f := cmd.Flags()
	f.VarP(fil, "filter", "f", `Provide filter values: name, id, label, state (e.g. "state=running")`)
	f.StringVar(&format, "format", "", formatUsage)
	f.BoolVarP(&quiet, "quiet", "q", false, "Only display machine names")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		list, err := c.MachineList(ctx, fil.query(nil).Get("filters"))
		if err != nil {
			return err
		}
		if quiet && format == "" {
			format = "{{.Name}}"
		}
		var rows []any
		for _, m := range list {
			rows = append(rows, machineRow{m: m})
		}
		return listing{table: "{{.Name}}\t{{.Status}}\t{{.CPUs}}\t{{.Memory}}\t{{.Disk}}\t{{.Containers}}\t{{.Socket}}", headers: machineHeaders}.print(a.out, format, rows)
	})
	return cmd
}

func (a *app) machineCreateCmd() *cobra.Command {
	var labels, shares list
	var memory, disk bytesValue
	req := machineapi.CreateRequest{}
	cmd := &cobra.Command{
		Use: "create [OPTIONS] NAME", Short: "Create a machine and start it",
		Long: "Create a machine: a virtual machine that lives on and holds the containers that are run with\n" +
			"--isolation machine=NAME. It has a Docker API of its own on a socket that machine inspect names,\n" +
			"which shows and makes containers on this machine alone, and gives no way to the host.",
		Example: "tenon machine create team-a --cpus 2 --memory 1g --disk 10g\ntenon run --rm --isolation machine=team-a busybox uname -r\n" +
			"tenon machine create team-b --share /srv/team-b:ro --group team-b",
		Args: exactArgs(1),
	}
	f := cmd.Flags()
	f.IntVar(&req.CPUs, "cpus", 0, "Number of processors (default 1)")
	f.VarP(&memory, "memory", "m", "Memory of the machine (default 1g)")
	f.Var(&disk, "disk", "What its containers can write (default 10g); takes of the host what is used")
	f.StringVar(&req.RestartPolicy, "restart", "", "After it ended by itself, and when the daemon starts: always (default) or no")
	f.Var(&labels, "label", "Set metadata for a machine")
	f.Var(&shares, "share", "Directory of the host that clients of its own socket may mount (PATH or PATH:ro)")
	f.StringVar(&req.Group, "group", "", "Group that may use its own socket (default: the group of the daemon's)")
	f.BoolVar(&req.NoStart, "no-start", false, "Leave it stopped")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		var err error
		if req.Labels, err = readLabels(nil, labels); err != nil {
			return err
		}
		for _, s := range shares {
			path, mode, _ := strings.Cut(s, ":")
			if mode != "" && mode != "ro" && mode != "rw" {
				return fmt.Errorf("share %q: write PATH or PATH:ro", s)
			}
			req.Shares = append(req.Shares, machineapi.Share{Path: path, ReadOnly: mode == "ro"})
		}
		req.Name, req.Memory, req.Disk = args[0], int64(memory), int64(disk)
		m, err := c.MachineCreate(ctx, req)
		if err != nil {
			return err
		}
		fmt.Fprintln(a.out, m.Name)
		return nil
	})
	return cmd
}

// machineVerb is a verb that does something with each of some machines.
func (a *app) machineVerb(use, short, example string, work func(context.Context, *client.Client, string) error) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Example: example, Args: minArgs(1), ValidArgsFunction: a.completeAll(a.machineNames),
	}
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		return a.each(args, func(n string) error { return work(ctx, c, n) })
	})
	return cmd
}

func (a *app) machineStartCmd() *cobra.Command {
	return a.machineVerb("start MACHINE [MACHINE...]", "Start one or more machines, and the containers on them by their restart policies",
		"tenon machine start team-a", func(ctx context.Context, c *client.Client, n string) error { return c.MachineStart(ctx, n) })
}

// stopTime adds the flag of the time that containers have to end.
func stopTime(cmd *cobra.Command) func() *int {
	var seconds int
	cmd.Flags().IntVarP(&seconds, "time", "t", 0, "Seconds that each container has to end before it is killed (default: its own)")
	return func() *int {
		if !cmd.Flags().Changed("time") {
			return nil
		}
		return &seconds
	}
}

func (a *app) machineStopCmd() *cobra.Command {
	var wait func() *int
	cmd := a.machineVerb("stop [OPTIONS] MACHINE [MACHINE...]", "Stop the containers of one or more machines, and then the machines",
		"tenon machine stop team-a", func(ctx context.Context, c *client.Client, n string) error { return c.MachineStop(ctx, n, wait()) })
	wait = stopTime(cmd)
	return cmd
}

func (a *app) machineRestartCmd() *cobra.Command {
	var wait func() *int
	cmd := a.machineVerb("restart [OPTIONS] MACHINE [MACHINE...]", "Stop and start one or more machines",
		"tenon machine restart team-a", func(ctx context.Context, c *client.Client, n string) error { return c.MachineRestart(ctx, n, wait()) })
	wait = stopTime(cmd)
	return cmd
}

func (a *app) machineRmCmd() *cobra.Command {
	var force, volumes bool
	cmd := a.machineVerb("rm [OPTIONS] MACHINE [MACHINE...]", "Remove one or more machines with their disks",
		"tenon machine rm team-a\ntenon machine rm -f team-a", func(ctx context.Context, c *client.Client, n string) error {
			return forgive(force, c.MachineRemove(ctx, n, force, volumes))
		})
	cmd.Aliases = []string{"remove"}
	cmd.Long = "Remove machines with their disks, and the networks that their own sockets made. A machine that runs\nor has containers stays, unless forced."
	cmd.Flags().BoolVarP(&force, "force", "f", false, "End it, and remove its containers too")
	cmd.Flags().BoolVarP(&volumes, "volumes", "v", false, "Remove the volumes that its own socket made")
	return cmd
}

func (a *app) machineUpdateCmd() *cobra.Command {
	var memory, disk bytesValue
	req := machineapi.UpdateRequest{}
	cmd := a.machineVerb("update [OPTIONS] MACHINE [MACHINE...]", "Change one or more machines, also while they run",
		"tenon machine update --memory 2g --disk 20g team-a", func(ctx context.Context, c *client.Client, n string) error {
			req.Memory, req.Disk = int64(memory), int64(disk)
			return c.MachineUpdate(ctx, n, req)
		})
	cmd.Long = "Change machines, also while they run. A disk only grows; processors of a machine that runs can't be\ntaken back."
	f := cmd.Flags()
	f.IntVar(&req.CPUs, "cpus", 0, "Number of processors")
	f.VarP(&memory, "memory", "m", "Memory of the machine")
	f.Var(&disk, "disk", "What its containers can write")
	f.StringVar(&req.RestartPolicy, "restart", "", "After it ended by itself, and when the daemon starts: always or no")
	return cmd
}

func (a *app) machineLogsCmd() *cobra.Command {
	var follow bool
	var tail string
	cmd := &cobra.Command{
		Use: "logs [OPTIONS] MACHINE", Short: "Show what a machine's kernel has said", Args: exactArgs(1),
		Example: "tenon machine logs -f team-a", ValidArgsFunction: a.completeFirst(a.machineNames),
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "Follow what it says")
	cmd.Flags().StringVarP(&tail, "tail", "n", "all", "Number of lines to show from the end of the logs")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		n := -1
		if tail != "all" {
			var err error
			if n, err = strconv.Atoi(tail); err != nil || n < 0 {
				return fmt.Errorf("tail %q: a number of lines, or all", tail)
			}
		}
		return a.machineLog(ctx, c, args[0], n, follow)
	})
	return cmd
}

func (a *app) machineConsoleCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "console MACHINE", Short: "Follow the console of a machine's kernel", Args: exactArgs(1),
		Long:    "Follow what a machine's kernel says from now on, after its last ten lines. A machine has no shell:\nrun a container on it for one.",
		Example: "tenon machine console team-a", ValidArgsFunction: a.completeFirst(a.machineNames),
	}
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		return a.machineLog(ctx, c, args[0], 10, true)
	})
	return cmd
}

// machineLog copies a machine's log; what a guest writes is no command to a
// terminal.
func (a *app) machineLog(ctx context.Context, c *client.Client, name string, tail int, follow bool) error {
	body, err := c.MachineLogs(ctx, name, tail, follow)
	if err != nil {
		return err
	}
	defer body.Close()
	w := &safeWriter{w: a.out}
	defer w.flush()
	_, err = io.Copy(w, body)
	return err
}

func (a *app) machinePruneCmd() *cobra.Command {
	return a.pruneVerb("Remove machines that are stopped and have no containers", "tenon machine prune",
		says("This will remove all stopped machines without containers, and their disks."), "",
		func(ctx context.Context, c *client.Client, fil filters, _ bool) (uint64, error) {
			r, err := c.MachinePrune(ctx, fil.query(nil).Get("filters"))
			a.section("Deleted Machines", r.MachinesDeleted)
			return noSpace, err
		})
}
