package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

func (a *app) bootstrapCmd() *cobra.Command {
	var quiet bool
	var epoch string
	var include list
	var o client.BootstrapOptions
	cmd := &cobra.Command{
		Use: "bootstrap [OPTIONS] busybox|debian[:SUITE]", Short: "Make a base image without any registry",
		Long: "Make a base image from what the host's own package system offers.\n\nbusybox is Debian's busybox-static. debian is the minimum of a release, made by\nmmdebstrap from the archives that the host's apt is set up for (or --mirror); without\nSUITE it is the host's own release. The image's labels say which archives, its\nattestation (tenon image sbom) which packages it is made of. The same archives and the\nsame --epoch give the same image, to the byte; without --epoch (or SOURCE_DATE_EPOCH)\nit is the date of the newest Release file.",
		Example: "tenon image bootstrap busybox && tenon run --rm busybox echo hello\n" +
			"tenon image bootstrap debian:bookworm --include ca-certificates,curl --tag base:1",
		Args:              exactArgs(1),
		ValidArgsFunction: a.completeFirst(fixed("busybox", "debian")),
	}
	f := cmd.Flags()
	f.BoolVarP(&quiet, "quiet", "q", false, "Print the image's ID only")
	f.Var(&include, "include", "Packages to install beside the minimum, separated by commas")
	f.StringVarP(&o.Tag, "tag", "t", "", "Name of the image (default debian:SUITE)")
	f.StringVar(&o.Mirror, "mirror", "", "URL of the archive (default: those of the host's apt)")
	f.StringVar(&epoch, "epoch", "", "Newest time in the image, in seconds since 1970 (SOURCE_DATE_EPOCH)")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		if epoch == "" && args[0] != "busybox" {
			epoch = os.Getenv("SOURCE_DATE_EPOCH")
		}
		if epoch != "" {
			n, err := strconv.ParseInt(epoch, 10, 64)
			if err != nil {
				return fmt.Errorf("invalid epoch %q: want seconds since 1970", epoch)
			}
			o.Epoch = &n
		}
		o.Include = include
		body, err := c.Bootstrap(ctx, args[0], o)
		if err != nil {
			return err
		}
		defer body.Close()
		if !quiet {
			return newProgress(a.out, false).copy(body, func(json.RawMessage) {})
		}
		dec, id := json.NewDecoder(body), ""
		for dec.More() {
			var m struct{ ID, Error string }
			if err := dec.Decode(&m); err != nil {
				return err
			}
			if m.Error != "" {
				return fmt.Errorf("%s", m.Error)
			}
			if m.ID != "" {
				id = m.ID
			}
		}
		_, err = fmt.Fprintln(a.out, id)
		return err
	})
	return cmd
}
