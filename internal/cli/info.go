package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/system"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

// infos is what info shows; templates name the fields of the server's part
// directly, as with Docker, and ClientInfo's.
type infos struct {
	*system.Info
	ClientInfo clientVersion
}

func (a *app) infoCmd() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "info [OPTIONS]", Short: "Display system-wide information",
		Long:    "Show the engine's settings, its counts and what its host offers.\n'tenon doctor' says what the host lacks and what to do about it.",
		Example: "tenon info\ntenon info -f '{{.CgroupVersion}}'", Args: exactArgs(0),
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", inspectFormatUsage)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		var raw json.RawMessage
		if err := c.Get(ctx, "/info", nil, &raw); err != nil {
			return err
		}
		v := infos{Info: &system.Info{}, ClientInfo: clientVersion{a.version, runtime.Version(), runtime.GOOS, runtime.GOARCH}}
		if err := json.Unmarshal(raw, v.Info); err != nil {
			return fmt.Errorf("the daemon's answer is not understood: %w", err)
		}
		if format != "" {
			return a.printOne(v, format)
		}
		var b bytes.Buffer
		writeInfo(&b, v)
		_, err := a.out.Write(b.Bytes())
		return err
	})
	return cmd
}

func writeInfo(b *bytes.Buffer, v infos) {
	line := func(title string, val any) {
		if s := fmt.Sprint(val); s != "" {
			fmt.Fprintf(b, " %s: %s\n", title, s)
		}
	}
	fmt.Fprintf(b, "Client: Tenon\n Version: %s\n\nServer:\n", v.ClientInfo.Version)
	i := v.Info
	fmt.Fprintf(b, " Containers: %d\n  Running: %d\n  Paused: %d\n  Stopped: %d\n Images: %d\n", i.Containers, i.ContainersRunning, i.ContainersPaused, i.ContainersStopped, i.Images)
	line("Server Version", i.ServerVersion)
	line("Storage Driver", i.Driver)
	for _, kv := range i.DriverStatus {
		fmt.Fprintf(b, "  %s: %s\n", kv[0], kv[1])
	}
	line("Logging Driver", i.LoggingDriver)
	line("Cgroup Driver", i.CgroupDriver)
	line("Cgroup Version", i.CgroupVersion)
	fmt.Fprintf(b, " Plugins:\n  Volume: %s\n  Network: %s\n  Log: %s\n", strings.Join(i.Plugins.Volume, " "), strings.Join(i.Plugins.Network, " "), strings.Join(i.Plugins.Log, " "))
	line("Runtimes", strings.Join(sortedKeys(i.Runtimes), " "))
	line("Default Runtime", i.DefaultRuntime)
	line("Default Isolation", i.Isolation)
	line("Init Binary", i.InitBinary)
	if len(i.SecurityOptions) > 0 {
		fmt.Fprintln(b, " Security Options:")
		for _, o := range i.SecurityOptions {
			for n, kv := range strings.Split(o, ",") {
				k, val, ok := strings.Cut(kv, "=")
				switch {
				case !ok:
					fmt.Fprintf(b, "  %s\n", kv)
				case n == 0 && k == "name":
					fmt.Fprintf(b, "  %s\n", val)
				default:
					fmt.Fprintf(b, "   %s: %s\n", k, val)
				}
			}
		}
	}
	line("Kernel Version", i.KernelVersion)
	line("Operating System", i.OperatingSystem)
	line("OSType", i.OSType)
	line("Architecture", i.Architecture)
	line("CPUs", i.NCPU)
	line("Total Memory", units.BytesSize(float64(i.MemTotal)))
	line("Name", i.Name)
	line("ID", i.ID)
	line("Root Dir", i.DockerRootDir)
	line("Debug Mode", i.Debug)
	line("HTTP Proxy", i.HTTPProxy)
	line("HTTPS Proxy", i.HTTPSProxy)
	line("No Proxy", i.NoProxy)
	if len(i.Labels) > 0 {
		fmt.Fprintln(b, " Labels:")
		for _, l := range i.Labels {
			fmt.Fprintf(b, "  %s\n", l)
		}
	}
	line("Experimental", i.ExperimentalBuild)
	if r := i.RegistryConfig; r != nil {
		if len(r.InsecureRegistryCIDRs) > 0 || len(r.IndexConfigs) > 0 {
			fmt.Fprintln(b, " Insecure Registries:")
			for _, name := range sortedKeys(r.IndexConfigs) {
				if c := r.IndexConfigs[name]; c != nil && !c.Secure {
					fmt.Fprintf(b, "  %s\n", name)
				}
			}
			for _, n := range r.InsecureRegistryCIDRs {
				fmt.Fprintf(b, "  %s\n", n)
			}
		}
		if len(r.Mirrors) > 0 {
			fmt.Fprintf(b, " Registry Mirrors:\n  %s\n", strings.Join(r.Mirrors, "\n  "))
		}
	}
	line("Live Restore Enabled", i.LiveRestoreEnabled)
	if f := i.FirewallBackend; f != nil {
		line("Firewall Backend", f.Driver)
	}
	if len(i.DefaultAddressPools) > 0 {
		fmt.Fprintln(b, " Default Address Pools:")
		for _, p := range i.DefaultAddressPools {
			fmt.Fprintf(b, "   Base: %s, Size: %d\n", p.Base, p.Size)
		}
	}
	line("Host Check", "tenon doctor (overlay, nftables, KVM, QEMU, guest kernel)")
	for _, w := range i.Warnings {
		fmt.Fprintln(b, w)
	}
}
