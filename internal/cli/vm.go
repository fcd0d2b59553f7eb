package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

func (a *app) vmCmd() *cobra.Command {
	return a.group("vm", "Prepare for containers with kernels of their own", "",
		verb{name: "prepare", make: (*app).vmPrepareCmd},
	)
}

func (a *app) vmPrepareCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "prepare", Short: "Make what virtual machines are copied from, and those that wait for containers",
		Long: "Find out what virtual machines run on, fetch the guest's kernel, boot and save the machine that\n" +
			"all are copied from, and fill the pool. Else the first container with --isolation vm waits for it.",
		Example: "tenon vm prepare", Args: exactArgs(0),
	}
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		s, err := c.PrepareVM(ctx)
		if err != nil {
			return err
		}
		accel := s.Accel
		if s.AccelReason != "" {
			accel += " (" + s.AccelReason + ")"
		}
		fmt.Fprintf(a.out, "Accelerator: %s\nQEMU: %s\nKernel: %s\nReady machines: %d\n", accel, s.QEMU, s.Kernel, s.Ready)
		return nil
	})
	return cmd
}
