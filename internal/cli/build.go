package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/system"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/internal/cli/buildopts"
)

// buildProgram does the work of `tenon build`: BuildKit's client, which has a size and a
// start of its own that the other verbs don't pay for.
const buildProgram = "tenon-build"

func (a *app) buildCmd() *cobra.Command {
	o := &buildopts.Options{}
	var shm, memory, swap string
	var check string
	cmd := &cobra.Command{
		Use: "build [OPTIONS] PATH | URL | -", Short: "Build an image from a Dockerfile",
		Long: "Build an image from a Dockerfile and a context: a directory, the URL of a Git repository or\n" +
			"of an archive, or - for a tar archive or a Dockerfile on the standard input. The image is in the\n" +
			"engine's store when the command ends, unless --output says otherwise.",
		Example: "tenon build -t app .\ntenon build -t app --target test --build-arg VERSION=2 .\n" +
			"tenon build --secret id=token,src=token.txt -o out .\ntenon build --isolation vm -t app .\n" +
			"tenon build -t app - < Dockerfile",
		Args: exactArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.File, "file", "f", "", "Path of the Dockerfile (default PATH/Dockerfile; - for the standard input)")
	f.StringArrayVarP(&o.Tags, "tag", "t", nil, "Name of the image, NAME[:TAG]")
	f.StringVar(&o.Target, "target", "", "Stage to build")
	f.StringArrayVar(&o.Args, "build-arg", nil, "Set a build-time variable, NAME[=VALUE]")
	f.StringArrayVar(&o.Labels, "label", nil, "Set metadata of the image, NAME=VALUE")
	f.StringArrayVar(&o.Contexts, "build-context", nil, "Additional context (e.g. name=path, name=docker-image://image)")
	f.StringArrayVar(&o.Secrets, "secret", nil, "Secret that RUN steps may mount (id=NAME[,src=FILE|,env=VARIABLE])")
	f.StringArrayVar(&o.SSH, "ssh", nil, "SSH agent socket or keys that RUN steps may use (default|NAME[=SOCKET|KEY,...])")
	f.StringSliceVar(&o.Platform, "platform", nil, "Platform to build for, os/arch[/variant]")
	f.StringArrayVar(&o.AddHosts, "add-host", nil, "Add a host-to-address mapping for RUN steps (HOST:ADDRESS)")
	f.StringArrayVar(&o.Allow, "allow", nil, "Allow an entitlement (network.host)")
	f.StringArrayVar(&o.Ulimits, "ulimit", nil, "Limit of RUN steps (NAME=SOFT[:HARD])")
	f.BoolVar(&o.NoCache, "no-cache", false, "Run all steps anew")
	f.StringArrayVar(&o.NoCacheFilter, "no-cache-filter", nil, "Run the steps of a stage anew")
	f.BoolVar(&o.Pull, "pull", false, "Ask the registry for newer base images")
	f.StringVar(&o.Network, "network", "", "Network of RUN steps: default, none or host")
	f.StringVar(&o.Isolation, "isolation", "", "What RUN steps run in: process, vm or machine=NAME (default: the daemon's)")
	f.StringVar(&o.CgroupParent, "cgroup-parent", "", "Parent control group of RUN steps")
	f.StringVar(&shm, "shm-size", "", "Size of /dev/shm in RUN steps")
	f.StringVarP(&memory, "memory", "m", "", "Memory limit of a RUN step")
	f.StringVar(&swap, "memory-swap", "", "Limit of memory and swap of a RUN step")
	f.Int64VarP(&o.CPUShares, "cpu-shares", "c", 0, "CPU shares of a RUN step")
	f.Int64Var(&o.CPUPeriod, "cpu-period", 0, "CPU CFS period of a RUN step, in microseconds")
	f.Int64Var(&o.CPUQuota, "cpu-quota", 0, "CPU CFS quota of a RUN step, in microseconds")
	f.StringVar(&o.CPUSetCPUs, "cpuset-cpus", "", "CPUs that RUN steps may use (0-3, 0,1)")
	f.StringVar(&o.CPUSetMems, "cpuset-mems", "", "Memory nodes that RUN steps may use (0-3, 0,1)")
	f.StringArrayVar(&o.CacheFrom, "cache-from", nil, "Where to take cached steps from (image, type=registry|local,...)")
	f.StringArrayVar(&o.CacheTo, "cache-to", nil, "Where to put cached steps (type=inline|registry|local,...)")
	f.StringArrayVarP(&o.Outputs, "output", "o", nil, "Where the result goes (DIRECTORY, -, type=local|tar|oci|docker|image,dest=PATH)")
	f.BoolVar(&o.Push, "push", false, "Push the image")
	f.BoolVar(&o.Load, "load", false, "Put the image into the engine's store (the default without --output)")
	f.StringArrayVar(&o.Attest, "attest", nil, "Attestation (type=sbom|provenance,...)")
	f.StringVar(&o.Provenance, "provenance", "", "Attach provenance (true, false, mode=min|max)")
	f.StringVar(&o.SBOM, "sbom", "", "Attach a list of packages (true, false, generator=IMAGE)")
	f.StringVar(&o.Progress, "progress", "auto", "Kind of progress: auto, plain, tty, rawjson or quiet")
	f.BoolVarP(&o.Quiet, "quiet", "q", false, "Print the image's ID only")
	f.StringVar(&o.IIDFile, "iidfile", "", "Write the image's ID to a file")
	f.StringVar(&o.MetadataFile, "metadata-file", "", "Write what the build says of its result to a file, as JSON")
	f.BoolVar(&o.Check, "check", false, "Only check the Dockerfile")
	f.StringVar(&check, "call", "", "What to do with the Dockerfile: build or check")
	// What clients of the older builder give; there is nothing to remove or to keep.
	for _, name := range []string{"rm", "force-rm", "squash", "compress"} {
		f.Bool(name, name == "rm", "")
		_ = f.MarkHidden(name)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if on, _ := f.GetBool("squash"); on {
			return errors.New("--squash is not known to this builder: join RUN steps, or copy the result into a stage of its own")
		}
		switch check {
		case "", "build":
		case "check":
			o.Check = true
		default:
			return fmt.Errorf("--call %s is not known: give build or check", check)
		}
		for _, size := range []struct {
			flag, value string
			into        *int64
		}{{"shm-size", shm, &o.ShmSize}, {"memory", memory, &o.Memory}, {"memory-swap", swap, &o.MemorySwap}} {
			if size.value == "" {
				continue
			}
			if size.value == "-1" && size.flag == "memory-swap" {
				o.MemorySwap = -1
				continue
			}
			n, err := units.RAMInBytes(size.value)
			if err != nil {
				return fmt.Errorf("invalid value %q for --%s: %w", size.value, size.flag, err)
			}
			*size.into = n
		}
		o.Context = args[0]
		return a.runBuild(o)
	}
	return cmd
}

// runBuild becomes the program that builds.
func (a *app) runBuild(o *buildopts.Options) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	o.Host, o.TLS, o.Version, o.APIVersion = c.Host(), c.TLS != nil, a.version, c.APIVersion
	o.ConfigDir = configDir(a.config)
	path, err := programBeside(buildProgram)
	if err != nil {
		return err
	}
	arg, file, err := o.Hand()
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }() // if it could not be run
	return fmt.Errorf("run %s: %w", path, syscall.Exec(path, []string{buildProgram, arg}, os.Environ()))
}

// programBeside finds a program beside this one, or in PATH.
func programBeside(name string) (string, error) {
	if self, err := os.Executable(); err == nil {
		if self, err = filepath.EvalSymlinks(self); err == nil {
			if path := filepath.Join(filepath.Dir(self), name); isProgram(path) {
				return path, nil
			}
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("the program %s is missing: it belongs beside tenon", name)
	}
	return path, nil
}

func isProgram(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

func (a *app) builderCmd() *cobra.Command {
	return a.group("builder", "Manage builds and their cache", "",
		verb{name: "build", make: (*app).buildCmd},
		verb{name: "du", make: (*app).builderDuCmd},
		verb{name: "prune", make: (*app).builderPruneCmd},
	)
}

func (a *app) builderDuCmd() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "du [OPTIONS]", Short: "Show the build cache", Args: exactArgs(0),
		Example: "tenon builder du\ntenon builder du --format json",
	}
	cmd.Flags().StringVar(&format, "format", "", inspectFormatUsage)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		var du system.DiskUsage
		if err := c.Get(ctx, "/system/df", map[string][]string{"type": {"build-cache"}, "verbose": {"1"}}, &du); err != nil {
			return err
		}
		u := du.BuildCacheUsage
		if u == nil {
			u = &build.DiskUsage{}
		}
		if format != "" {
			return a.printOne(u, format)
		}
		rows := [][]string{{"ID", "TYPE", "SIZE", "LAST USED", "IN USE", "SHARED", "DESCRIPTION"}}
		for _, r := range u.Items {
			last := ""
			if r.LastUsedAt != nil {
				last = units.HumanDuration(time.Since(*r.LastUsedAt)) + " ago"
			}
			text := []rune(strings.Join(strings.Fields(r.Description), " "))
			if len(text) > 60 {
				text = append(text[:59], '…')
			}
			rows = append(rows, []string{r.ID, r.Type, units.HumanSize(float64(r.Size)), last,
				fmt.Sprint(r.InUse), fmt.Sprint(r.Shared), string(text)})
		}
		if err := a.columns(rows); err != nil {
			return err
		}
		_, err := fmt.Fprintf(a.out, "\nTotal: %s, reclaimable: %s\n", units.HumanSize(float64(u.TotalSize)), units.HumanSize(float64(u.Reclaimable)))
		return err
	})
	return cmd
}

func (a *app) builderPruneCmd() *cobra.Command {
	var reserved, maxUsed, minFree string
	cmd := a.pruneVerb("Remove build cache", "tenon builder prune\ntenon builder prune -a --filter until=24h\ntenon builder prune --reserved-space 2GB",
		func(all bool) string {
			if all {
				return "This will remove all build cache."
			}
			return "This will remove all dangling build cache."
		}, "Remove all unused build cache, not just dangling ones",
		func(ctx context.Context, c *client.Client, fil filters, all bool) (uint64, error) {
			q := fil.query(nil)
			if q == nil {
				q = map[string][]string{}
			}
			if all {
				q.Set("all", "1")
			}
			for key, s := range map[string]string{"reserved-space": reserved, "max-used-space": maxUsed, "min-free-space": minFree} {
				if s == "" {
					continue
				}
				n, err := units.RAMInBytes(s)
				if err != nil {
					return 0, fmt.Errorf("invalid value %q for --%s: %w", s, key, err)
				}
				q.Set(key, fmt.Sprint(n))
			}
			return a.pruneBuilds(ctx, c, q)
		})
	f := cmd.Flags()
	f.StringVar(&reserved, "reserved-space", "", "Amount of cache to keep")
	f.StringVar(&maxUsed, "max-used-space", "", "Amount of cache to have at most")
	f.StringVar(&minFree, "min-free-space", "", "Amount of disk to have free")
	return cmd
}

func (a *app) pruneBuilds(ctx context.Context, c *client.Client, q map[string][]string) (uint64, error) {
	var out build.CachePruneReport
	err := c.Post(ctx, "/build/prune", q, nil, &out)
	a.section("Deleted build cache objects", out.CachesDeleted)
	return out.SpaceReclaimed, err
}
