package cli

import (
	"context"
	"net/url"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

// completer returns the names that may stand at a place.
type completer func(ctx context.Context, c *client.Client) []string

// filterContainers tells which containers a verb takes.
type filterContainers int

const (
	all filterContainers = iota
	running
	stopped
)

func (a *app) containerNames(which filterContainers) completer {
	return func(ctx context.Context, c *client.Client) []string {
		q := url.Values{}
		if which != running {
			q.Set("all", "1")
		}
		var list []container.Summary
		if c.Get(ctx, "/containers/json", q, &list) != nil {
			return nil
		}
		var names []string
		for _, s := range list {
			if which == stopped && s.State == container.StateRunning {
				continue
			}
			for _, n := range s.Names {
				names = append(names, strings.TrimPrefix(n, "/"))
			}
		}
		return names
	}
}

func (a *app) imageNames(ctx context.Context, c *client.Client) []string {
	var list []image.Summary
	if c.Get(ctx, "/images/json", nil, &list) != nil {
		return nil
	}
	var names []string
	for _, s := range list {
		for _, t := range s.RepoTags {
			names = append(names, t)
			if short, ok := strings.CutSuffix(t, ":latest"); ok {
				names = append(names, short)
			}
		}
	}
	return names
}

func (a *app) networkNames(ctx context.Context, c *client.Client) []string {
	var list []network.Network
	if c.Get(ctx, "/networks", nil, &list) != nil {
		return nil
	}
	var names []string
	for _, n := range list {
		names = append(names, n.Name)
	}
	return names
}

func (a *app) volumeNames(ctx context.Context, c *client.Client) []string {
	var list volume.ListResponse
	if c.Get(ctx, "/volumes", nil, &list) != nil {
		return nil
	}
	var names []string
	for _, v := range list.Volumes {
		names = append(names, v.Name)
	}
	return names
}

// fixed completes to given words.
func fixed(words ...string) completer {
	return func(context.Context, *client.Client) []string { return words }
}

// completeFirst completes the first argument; what follows is left to the
// shell's file names.
func (a *app) completeFirst(from completer) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveDefault
		}
		return a.complete(prefix, from)
	}
}

// completeAll completes every argument from all lists.
func (a *app) completeAll(from ...completer) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		return a.complete(prefix, from...)
	}
}

// completeEach completes the n-th argument from the n-th list.
func (a *app) completeEach(from ...completer) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= len(from) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.complete(prefix, from[len(args)])
	}
}

func (a *app) complete(prefix string, from ...completer) ([]string, cobra.ShellCompDirective) {
	c, err := a.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var out []string
	for _, f := range from {
		for _, n := range f(context.Background(), c) {
			if strings.HasPrefix(n, prefix) {
				out = append(out, n)
			}
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// completeContainerFlags gives run and create completion of flag values.
func (a *app) completeContainerFlags(cmd *cobra.Command) {
	for name, from := range map[string]completer{
		"network": func(ctx context.Context, c *client.Client) []string {
			return append(a.networkNames(ctx, c), "container:")
		},
		"volumes-from":      a.containerNames(all),
		"volume":            a.volumeNames,
		"link":              a.containerNames(running),
		"pull":              fixed("always", "missing", "never", "lazy"),
		"restart":           fixed("no", "always", "on-failure", "unless-stopped"),
		"isolation":         fixed("process", "vm", "machine", "machine="),
		"log-driver":        fixed("local", "json-file", "none"),
		"cgroupns":          fixed("host", "private"),
		"ipc":               fixed("host", "private", "shareable", "none", "container:"),
		"pid":               fixed("host", "container:"),
		"health-on-failure": fixed("none", "kill", "restart", "stop"),
	} {
		// The flags exist: a mistake here is found by the test of all verbs.
		_ = cmd.RegisterFlagCompletionFunc(name, func(_ *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
			return a.complete(prefix, from)
		})
	}
}

func (a *app) completionCmd() *cobra.Command {
	return &cobra.Command{
		Use: "completion bash|zsh|fish", Short: "Print a completion script for a shell",
		Long: "Print a script that completes verbs, flags and the names of containers, images, networks\nand volumes.",
		Example: `source <(tenon completion bash)
tenon completion zsh > "${fpath[1]}/_tenon"
tenon completion fish > ~/.config/fish/completions/tenon.fish`,
		Args:      exactArgs(1),
		ValidArgs: []string{"bash", "zsh", "fish"},
		RunE: func(cmd *cobra.Command, args []string) error {
			root := a.root(nil)
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.out, true)
			case "zsh":
				return root.GenZshCompletion(a.out)
			case "fish":
				return root.GenFishCompletion(a.out, true)
			}
			return unknownShell(args[0])
		},
	}
}

func unknownShell(name string) error {
	return &exitError{exitFailure, &shellError{name}}
}

type shellError struct{ name string }

func (e *shellError) Error() string {
	return "no completion for " + e.name + ": want bash, zsh or fish"
}
