package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// help prints what a verb does: usage, description, examples, flags, verbs.
func (a *app) help(cmd *cobra.Command, _ []string) {
	writeHelp(a.out, cmd, a.width())
}

func writeHelp(w io.Writer, cmd *cobra.Command, width int) {
	fmt.Fprintf(w, "Usage:  %s\n", useLine(cmd))
	text := cmd.Long
	if text == "" {
		text = cmd.Short
	}
	if text != "" {
		fmt.Fprintf(w, "\n%s\n", strings.TrimSpace(text))
	}
	if len(cmd.Aliases) > 0 {
		fmt.Fprintf(w, "\nAliases:\n  %s\n", strings.Join(append([]string{cmd.Name()}, cmd.Aliases...), ", "))
	}
	if cmd.Example != "" {
		fmt.Fprintf(w, "\nExamples:\n%s\n", indent(cmd.Example))
	}
	writeVerbs(w, cmd)
	if cmd.Flags().HasAvailableFlags() {
		title := "Options"
		if !cmd.HasParent() {
			title = "Global Options"
		}
		fmt.Fprintf(w, "\n%s:\n%s", title, cmd.Flags().FlagUsagesWrapped(min(width, 120)))
	}
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintf(w, "\nRun '%s COMMAND --help' for more information on a command.\n", cmd.CommandPath())
	}
	if !cmd.HasParent() {
		fmt.Fprint(w, "\nA first container:  tenon image bootstrap busybox && tenon run --rm busybox echo hello\nWhat this host can do:  tenon doctor\n")
	}
}

func writeVerbs(w io.Writer, cmd *cobra.Command) {
	pad := 0
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			pad = max(pad, len(c.Name()))
		}
	}
	list := func(title, group string) {
		head := false
		for _, c := range cmd.Commands() {
			if !c.IsAvailableCommand() || c.GroupID != group {
				continue
			}
			if !head {
				fmt.Fprintf(w, "\n%s:\n", title)
				head = true
			}
			fmt.Fprintf(w, "  %-*s   %s\n", pad, c.Name(), c.Short)
		}
	}
	for _, g := range cmd.Groups() {
		list(g.Title[:len(g.Title)-1], g.ID)
	}
	list("Commands", "")
}

func indent(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	for i, l := range lines {
		lines[i] = "  " + l
	}
	return strings.Join(lines, "\n")
}

// helpCmd is "tenon help VERB...".
func (a *app) helpCmd() *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND]", Short: "Help about a command", Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			target, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 && target.HasSubCommands() {
				name := strings.Join(args, " ")
				if len(rest) > 0 {
					name = rest[0]
				}
				return unknownVerb(cmd.Root(), name)
			}
			a.help(target, nil)
			return nil
		},
	}
}
