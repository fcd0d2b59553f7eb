package cli

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/volume"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

func (a *app) volumeCmd() *cobra.Command {
	return a.group("volume", "Manage volumes", "",
		verb{name: "create", make: (*app).volumeCreateCmd},
		verb{name: "inspect", make: a.inspectGroup(volumeInspector(), a.volumeNames)},
		verb{name: "ls", make: (*app).volumeLsCmd},
		verb{name: "prune", make: (*app).volumePruneCmd},
		verb{name: "rm", make: (*app).volumeRmCmd},
	)
}

// volumeRow is a line of volume ls.
type volumeRow struct {
	isRow
	v volume.Volume
}

func (r volumeRow) Name() string          { return r.v.Name }
func (r volumeRow) Driver() string        { return r.v.Driver }
func (r volumeRow) Scope() string         { return r.v.Scope }
func (r volumeRow) Mountpoint() string    { return r.v.Mountpoint }
func (r volumeRow) Labels() string        { return labelList(r.v.Labels) }
func (r volumeRow) Label(n string) string { return r.v.Labels[n] }

// The fields of cluster volumes, which this engine does not have.
func (r volumeRow) Availability() string { return "N/A" }
func (r volumeRow) Group() string        { return "N/A" }
func (r volumeRow) Status() string       { return "N/A" }

func (r volumeRow) Links() string {
	if r.v.UsageData == nil {
		return "N/A"
	}
	return strconv.FormatInt(r.v.UsageData.RefCount, 10)
}
func (r volumeRow) Size() string {
	if r.v.UsageData == nil || r.v.UsageData.Size < 0 {
		return "N/A"
	}
	return units.HumanSize(float64(r.v.UsageData.Size))
}

var volumeHeaders = headers{
	"Name": "VOLUME NAME", "Driver": "DRIVER", "Scope": "SCOPE", "Mountpoint": "MOUNTPOINT", "Labels": "LABELS",
	"Links": "LINKS", "Size": "SIZE", "Availability": "AVAILABILITY", "Group": "GROUP", "Status": "STATUS",
}

func (a *app) volumeLsCmd() *cobra.Command {
	var format string
	var quiet bool
	fil := filters{}
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List volumes",
		Example: "tenon volume ls\ntenon volume ls -q -f dangling=true", Args: exactArgs(0),
	}
	f := cmd.Flags()
	f.VarP(fil, "filter", "f", `Provide filter values (e.g. "dangling=true")`)
	f.StringVar(&format, "format", "", formatUsage)
	f.BoolVarP(&quiet, "quiet", "q", false, "Only display volume names")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		var out volume.ListResponse
		if err := c.Get(ctx, "/volumes", fil.query(nil), &out); err != nil {
			return err
		}
		for _, w := range out.Warnings {
			fmt.Fprintln(a.err, "WARNING:", w)
		}
		if quiet && format == "" {
			format = "{{.Name}}"
		}
		slices.SortFunc(out.Volumes, func(x, y volume.Volume) int { return strings.Compare(x.Name, y.Name) })
		var rows []any
		for _, v := range out.Volumes {
			rows = append(rows, volumeRow{v: v})
		}
		return listing{table: "{{.Driver}}\t{{.Name}}", headers: volumeHeaders}.print(a.out, format, rows)
	})
	return cmd
}

func (a *app) volumeCreateCmd() *cobra.Command {
	var driver, name string
	var labels, opts list
	cmd := &cobra.Command{
		Use: "create [OPTIONS] [VOLUME]", Short: "Create a volume",
		Example: "tenon volume create data\ntenon volume create -o type=tmpfs -o device=tmpfs -o o=size=64m scratch",
		Args:    maxArgs(1),
	}
	f := cmd.Flags()
	f.StringVarP(&driver, "driver", "d", "local", "Specify volume driver name")
	f.Var(&labels, "label", "Set metadata for a volume")
	f.StringVar(&name, "name", "", "Specify volume name")
	_ = f.MarkHidden("name") // it was just added
	f.VarP(&opts, "opt", "o", "Set driver specific options")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		if len(args) == 1 {
			if name != "" {
				return errors.New("conflicting options: cannot specify a volume-name through both --name and as a positional arg")
			}
			name = args[0]
		}
		o, err := keyValues("opt", opts)
		if err != nil {
			return err
		}
		l, err := readLabels(nil, labels)
		if err != nil {
			return err
		}
		var out volume.Volume
		if err := c.Post(ctx, "/volumes/create", nil, volume.CreateRequest{Name: name, Driver: driver, DriverOpts: o, Labels: l}, &out); err != nil {
			return err
		}
		fmt.Fprintln(a.out, out.Name)
		return nil
	})
	return cmd
}

func (a *app) volumeRmCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm [OPTIONS] VOLUME [VOLUME...]", Aliases: []string{"remove"}, Short: "Remove one or more volumes",
		Long:    "Remove volumes with what is in them. A volume that a container uses stays.",
		Example: "tenon volume rm data", Args: minArgs(1), ValidArgsFunction: a.completeAll(a.volumeNames),
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Force the removal of one or more volumes")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		q := url.Values{}
		if force {
			q.Set("force", "1")
		}
		return a.each(args, func(n string) error {
			return forgive(force, c.Delete(ctx, "/volumes/"+url.PathEscape(n), q, nil))
		})
	})
	return cmd
}
