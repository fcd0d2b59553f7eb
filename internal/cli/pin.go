package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

func (a *app) pinCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "pin [IMAGE...]", Short: "Keep images from being pruned, and from the disk budget; without images, list those that are kept",
		Long: "A pinned image is removed by rmi alone: neither prune nor the daemon's image-budget takes it.\n" +
			"Images that were made here (build, commit, import) with the label dev.tenon.keep are\npinned by themselves; those from elsewhere never are, whatever their labels say.",
		Example: "tenon image pin base:1\ntenon image pin", ValidArgsFunction: a.completeEach(a.imageNames),
	}
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		if len(args) > 0 {
			return a.each(args, func(ref string) error { return c.PinImage(ctx, ref, true) })
		}
		names, err := c.PinnedImages(ctx)
		for _, n := range names {
			fmt.Fprintln(a.out, n)
		}
		return err
	})
	return cmd
}

func (a *app) unpinCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "unpin IMAGE [IMAGE...]", Short: "Let pinned images be pruned again", Example: "tenon image unpin base:1",
		Args: minArgs(1), ValidArgsFunction: a.completeEach(a.imageNames),
	}
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		return a.each(args, func(ref string) error { return c.PinImage(ctx, ref, false) })
	})
	return cmd
}
