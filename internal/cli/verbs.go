package cli

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// verb is an entry of the table of verbs. make is called only when the verb,
// or a list of all verbs, is needed.
type verb struct {
	name  string
	group string
	make  func(*app) *cobra.Command
}

// Groups of verbs, in the order of the help text.
const (
	groupCommon  = "Common Commands"
	groupManage  = "Management Commands"
	groupTenon   = "Tenon Commands"
	groupCommand = "Commands"
)

var groups = []string{groupCommon, groupManage, groupTenon, groupCommand}

// topVerbs returns the verbs of the root.
func topVerbs() []verb {
	return []verb{
		{"run", groupCommon, (*app).runCmd},
		{"exec", groupCommon, (*app).execCmd},
		{"ps", groupCommon, (*app).psCmd},
		{"logs", groupCommon, (*app).logsCmd},
		{"stop", groupCommon, (*app).stopCmd},
		{"rm", groupCommon, (*app).rmCmd},
		{"build", groupCommon, (*app).buildCmd},
		{"pull", groupCommon, (*app).pullCmd},
		{"push", groupCommon, (*app).pushCmd},
		{"images", groupCommon, (*app).imagesCmd},
		{"login", groupCommon, (*app).loginCmd},
		{"logout", groupCommon, (*app).logoutCmd},
		{"version", groupCommon, (*app).versionCmd},
		{"info", groupCommon, (*app).infoCmd},

		{"container", groupManage, (*app).containerCmd},
		{"image", groupManage, (*app).imageCmd},
		{"builder", groupManage, (*app).builderCmd},
		{"network", groupManage, (*app).networkCmd},
		{"volume", groupManage, (*app).volumeCmd},
		{"system", groupManage, (*app).systemCmd},

		{"audit", groupTenon, (*app).auditCmd},
		{"machine", groupTenon, (*app).machineCmd},
		{"registry", groupTenon, (*app).registryCmd},
		{"vm", groupTenon, (*app).vmCmd},
		{"compose", groupTenon, (*app).composeCmd},
		{"doctor", groupTenon, (*app).doctorCmd},
		{"completion", groupTenon, (*app).completionCmd},

		{"attach", groupCommand, (*app).attachCmd},
		{"commit", groupCommand, (*app).commitCmd},
		{"cp", groupCommand, (*app).cpCmd},
		{"create", groupCommand, (*app).createCmd},
		{"diff", groupCommand, (*app).diffCmd},
		{"events", groupCommand, (*app).eventsCmd},
		{"export", groupCommand, (*app).exportCmd},
		{"history", groupCommand, (*app).historyCmd},
		{"import", groupCommand, (*app).importCmd},
		{"inspect", groupCommand, (*app).inspectCmd},
		{"kill", groupCommand, (*app).killCmd},
		{"load", groupCommand, (*app).loadCmd},
		{"pause", groupCommand, (*app).pauseCmd},
		{"port", groupCommand, (*app).portCmd},
		{"rename", groupCommand, (*app).renameCmd},
		{"restart", groupCommand, (*app).restartCmd},
		{"rmi", groupCommand, (*app).rmiCmd},
		{"save", groupCommand, (*app).saveCmd},
		{"search", groupCommand, (*app).searchCmd},
		{"start", groupCommand, (*app).startCmd},
		{"stats", groupCommand, (*app).statsCmd},
		{"tag", groupCommand, (*app).tagCmd},
		{"top", groupCommand, (*app).topCmd},
		{"unpause", groupCommand, (*app).unpauseCmd},
		{"update", groupCommand, (*app).updateCmd},
		{"wait", groupCommand, (*app).waitCmd},
	}
}

// root builds the root command with the verb that args name, or with all of
// them when args name none.
func (a *app) root(args []string) *cobra.Command {
	root := &cobra.Command{
		Use:              "tenon [OPTIONS] COMMAND [ARG...]",
		Short:            "Run containers and virtual machines as one thing",
		Long:             "Tenon runs containers and virtual machines as one thing.\nThe verbs and flags are Docker's; what is Tenon's own is listed apart.",
		TraverseChildren: true,
		SilenceErrors:    true,
		SilenceUsage:     true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownVerb(cmd, args[0])
			}
			return nil
		},
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	var showVersion bool
	root.RunE = func(cmd *cobra.Command, args []string) error {
		if showVersion {
			fmt.Fprintf(a.out, "Tenon version %s\n", a.version)
			return nil
		}
		return cmd.Help()
	}
	f := root.Flags()
	f.SetInterspersed(false)
	f.StringVarP(&a.host, "host", "H", "", "Daemon socket to connect to (TENON_HOST, DOCKER_HOST; default unix:///run/tenon/docker.sock)")
	f.StringVar(&a.config, "config", "", "Directory of client configuration and credentials (DOCKER_CONFIG; default ~/.docker)")
	f.BoolVar(&a.tls, "tlsverify", false, "Use TLS for tcp:// hosts (DOCKER_TLS_VERIFY, DOCKER_CERT_PATH)")
	f.BoolVarP(&showVersion, "version", "v", false, "Print version information and quit")
	f.BoolP("help", "h", false, "Print usage")
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetHelpFunc(a.help)
	root.SetUsageFunc(func(*cobra.Command) error { return nil })
	root.SetHelpCommand(a.helpCmd())
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return &usageError{cmd, err} })

	verbs := topVerbs()
	if i := slices.IndexFunc(verbs, func(v verb) bool { return v.name == firstWord(args) }); i >= 0 {
		verbs = verbs[i : i+1]
	}
	for _, v := range verbs {
		cmd := finish(v.make(a))
		cmd.GroupID = v.group
		root.AddCommand(cmd)
	}
	for _, g := range groups {
		root.AddGroup(&cobra.Group{ID: g, Title: g + ":"})
	}
	return root
}

// firstWord returns the first argument that is not a global flag or its value.
func firstWord(args []string) string {
	for i := 0; i < len(args); i++ {
		switch s := args[i]; {
		case s == "-H", s == "--host", s == "--config":
			i++
		case strings.HasPrefix(s, "-"):
		default:
			return s
		}
	}
	return ""
}

// group is a command that only holds verbs.
func (a *app) group(use, short, long string, verbs ...verb) *cobra.Command {
	cmd := &cobra.Command{
		Use: use + " COMMAND", Short: short, Long: long,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownVerb(cmd, args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return cmd.Help() },
	}
	for _, v := range verbs {
		sub := v.make(a)
		if v.name != sub.Name() {
			rename(sub, v.name)
		}
		cmd.AddCommand(finish(sub))
	}
	return cmd
}

// rename gives a verb the name it has inside a group (images → ls).
func rename(cmd *cobra.Command, name string) {
	_, rest, _ := strings.Cut(cmd.Use, " ")
	cmd.Use = strings.TrimSpace(name + " " + rest)
	if name == "ls" {
		cmd.Aliases = []string{"list"}
	}
}

// finish completes a verb: its help flag, and how its argument errors read.
func finish(cmd *cobra.Command) *cobra.Command {
	f := cmd.Flags()
	if f.Lookup("help") == nil {
		if f.ShorthandLookup("h") == nil {
			f.BoolP("help", "h", false, "Print usage")
		} else {
			f.Bool("help", false, "Print usage")
		}
	}
	cmd.DisableFlagsInUseLine = true
	f.SortFlags = true
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			err := check(cmd, args)
			var ue *usageError
			var ee *exitError
			if err == nil || errors.As(err, &ue) || errors.As(err, &ee) {
				return err
			}
			return &exitError{exitFailure, fmt.Errorf("%w\n\nUsage:  %s\n\n%s\n\nRun '%s --help' for more information", err, useLine(cmd), cmd.Short, cmd.CommandPath())}
		}
	}
	return cmd
}

func useLine(cmd *cobra.Command) string {
	path := cmd.CommandPath()
	_, rest, _ := strings.Cut(cmd.Use, " ")
	return strings.TrimSpace(path + " " + rest)
}

// unknownVerb is the error for a verb that does not exist, with the nearest
// ones that do.
func unknownVerb(cmd *cobra.Command, name string) error {
	var names []string
	for _, c := range cmd.Commands() {
		names = append(names, c.Name())
	}
	msg := fmt.Sprintf("'%s %s' is not a tenon command", cmd.CommandPath(), name)
	if near := nearest(name, names); len(near) > 0 {
		msg += "\n\nDid you mean this?\n    " + strings.Join(near, "\n    ")
	}
	return &exitError{exitFailure, fmt.Errorf("tenon: %s\n\nRun '%s --help' for a list of commands", msg, cmd.CommandPath())}
}

// nearest returns up to three of names that are one or two edits from s, or
// begin with it.
func nearest(s string, names []string) []string {
	type scored struct {
		name string
		d    int
	}
	var found []scored
	for _, n := range names {
		d := distance(s, n)
		if strings.HasPrefix(n, s) {
			d = min(d, 1)
		}
		if d <= 2 && d < len(n) {
			found = append(found, scored{n, d})
		}
	}
	slices.SortStableFunc(found, func(a, b scored) int { return a.d - b.d })
	var out []string
	for _, f := range found[:min(len(found), 3)] {
		out = append(out, f.name)
	}
	return out
}

// distance is the Levenshtein distance, with a swap of neighbours as one edit.
func distance(a, b string) int {
	d := make([][]int, len(a)+1)
	for i := range d {
		d[i] = make([]int, len(b)+1)
		d[i][0] = i
	}
	for j := range d[0] {
		d[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			d[i][j] = min(d[i-1][j]+1, d[i][j-1]+1, d[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d[i][j] = min(d[i][j], d[i-2][j-2]+1)
			}
		}
	}
	return d[len(a)][len(b)]
}

func minArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < n {
			return fmt.Errorf("'%s' requires at least %s", cmd.CommandPath(), plural(n))
		}
		return nil
	}
}

func maxArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > n {
			return fmt.Errorf("'%s' accepts at most %s", cmd.CommandPath(), plural(n))
		}
		return nil
	}
}

func rangeArgs(lo, hi int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < lo || len(args) > hi {
			return fmt.Errorf("'%s' requires %d to %s", cmd.CommandPath(), lo, plural(hi))
		}
		return nil
	}
}

func exactArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			if n == 0 {
				return fmt.Errorf("'%s' accepts no arguments", cmd.CommandPath())
			}
			return fmt.Errorf("'%s' requires %s", cmd.CommandPath(), plural(n))
		}
		return nil
	}
}

func plural(n int) string {
	if n == 1 {
		return "1 argument"
	}
	return fmt.Sprintf("%d arguments", n)
}
