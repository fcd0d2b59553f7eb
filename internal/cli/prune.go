package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

// pruneVerb is a prune verb: it asks, then calls work with the filters.
func (a *app) pruneVerb(short, example string, warning func(all bool) string, withAll string, work func(context.Context, *client.Client, filters, bool) (uint64, error)) *cobra.Command {
	var force, everything bool
	fil := filters{}
	cmd := &cobra.Command{Use: "prune [OPTIONS]", Short: short, Example: example, Args: exactArgs(0)}
	f := cmd.Flags()
	if withAll != "" {
		f.BoolVarP(&everything, "all", "a", false, withAll)
	}
	f.Var(fil, "filter", `Provide filter values (e.g. "until=<timestamp>")`)
	f.BoolVarP(&force, "force", "f", false, "Do not prompt for confirmation")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		if !force && !a.confirm("WARNING! "+warning(everything)+"\nAre you sure you want to continue?") {
			return nil
		}
		space, err := work(ctx, c, fil, everything)
		if err != nil {
			return err
		}
		if space != noSpace {
			fmt.Fprintln(a.out, "Total reclaimed space:", units.HumanSize(float64(space)))
		}
		return nil
	})
	return cmd
}

// noSpace says that what was pruned takes no space.
const noSpace = ^uint64(0)

// section prints a list under a title, if there is something in it.
func (a *app) section(title string, lines []string) {
	if len(lines) > 0 {
		fmt.Fprintf(a.out, "%s:\n%s\n\n", title, strings.Join(lines, "\n"))
	}
}

func (a *app) pruneContainers(ctx context.Context, c *client.Client, fil filters, _ bool) (uint64, error) {
	var out container.PruneReport
	err := c.Post(ctx, "/containers/prune", fil.query(nil), nil, &out)
	a.section("Deleted Containers", out.ContainersDeleted)
	return out.SpaceReclaimed, err
}

func (a *app) pruneImages(ctx context.Context, c *client.Client, fil filters, everything bool) (uint64, error) {
	own := filters{}
	for k, v := range fil {
		own[k] = v
	}
	own["dangling"] = map[string]bool{fmt.Sprint(!everything): true}
	var out image.PruneReport
	err := c.Post(ctx, "/images/prune", own.query(nil), nil, &out)
	var lines []string
	for _, d := range out.ImagesDeleted {
		if d.Untagged != "" {
			lines = append(lines, "untagged: "+d.Untagged)
		} else {
			lines = append(lines, "deleted: "+d.Deleted)
		}
	}
	a.section("Deleted Images", lines)
	return out.SpaceReclaimed, err
}

func (a *app) pruneVolumes(ctx context.Context, c *client.Client, fil filters, everything bool) (uint64, error) {
	own := filters{}
	for k, v := range fil {
		own[k] = v
	}
	if everything {
		own["all"] = map[string]bool{"true": true}
	}
	var out volume.PruneReport
	err := c.Post(ctx, "/volumes/prune", own.query(nil), nil, &out)
	a.section("Deleted Volumes", out.VolumesDeleted)
	return out.SpaceReclaimed, err
}

func (a *app) pruneNetworks(ctx context.Context, c *client.Client, fil filters, _ bool) (uint64, error) {
	var out network.PruneReport
	err := c.Post(ctx, "/networks/prune", fil.query(nil), nil, &out)
	a.section("Deleted Networks", out.NetworksDeleted)
	return noSpace, err
}

func says(s string) func(bool) string { return func(bool) string { return s } }

func (a *app) containerPruneCmd() *cobra.Command {
	return a.pruneVerb("Remove all stopped containers", "tenon container prune --filter until=24h",
		says("This will remove all stopped containers."), "", a.pruneContainers)
}

func (a *app) imagePruneCmd() *cobra.Command {
	return a.pruneVerb("Remove unused images", "tenon image prune\ntenon image prune -a --filter until=24h",
		func(all bool) string {
			if all {
				return "This will remove all images without at least one container associated to them."
			}
			return "This will remove all dangling images."
		}, "Remove all unused images, not just dangling ones", a.pruneImages)
}

func (a *app) volumePruneCmd() *cobra.Command {
	return a.pruneVerb("Remove unused local volumes", "tenon volume prune",
		func(all bool) string {
			if all {
				return "This will remove all local volumes not used by at least one container."
			}
			return "This will remove anonymous local volumes not used by at least one container."
		}, "Remove all unused volumes, not just anonymous ones", a.pruneVolumes)
}

func (a *app) networkPruneCmd() *cobra.Command {
	return a.pruneVerb("Remove all unused networks", "tenon network prune",
		says("This will remove all custom networks not used by at least one container."), "", a.pruneNetworks)
}

func (a *app) systemPruneCmd() *cobra.Command {
	var volumes bool
	warning := func(all bool) string {
		lines := []string{"This will remove:", "  - all stopped containers", "  - all networks not used by at least one container"}
		if volumes {
			lines = append(lines, "  - all anonymous volumes not used by at least one container")
		}
		if all {
			lines = append(lines, "  - all images without at least one container associated to them")
		} else {
			lines = append(lines, "  - all dangling images")
		}
		lines = append(lines, "  - unused build cache")
		return strings.Join(lines, "\n") + "\n"
	}
	cmd := a.pruneVerb("Remove unused data", "tenon system prune\ntenon system prune -a --volumes", warning,
		"Remove all unused images not just dangling ones",
		func(ctx context.Context, c *client.Client, fil filters, everything bool) (uint64, error) {
			var total uint64
			steps := []func(context.Context, *client.Client, filters, bool) (uint64, error){a.pruneContainers, a.pruneNetworks}
			if volumes {
				steps = append(steps, func(ctx context.Context, c *client.Client, fil filters, _ bool) (uint64, error) {
					return a.pruneVolumes(ctx, c, fil, false)
				})
			}
			for _, step := range append(steps, a.pruneImages) {
				n, err := step(ctx, c, fil, everything)
				if err != nil {
					return total, err
				}
				if n != noSpace {
					total += n
				}
			}
			q := fil.query(nil)
			if everything {
				q.Set("all", "1")
			}
			n, err := a.pruneBuilds(ctx, c, q)
			return total + n, err
		})
	cmd.Flags().BoolVar(&volumes, "volumes", false, "Prune anonymous volumes")
	return cmd
}
