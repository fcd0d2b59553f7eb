package cli

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// TestDocs keeps docs/cli.md what the commands say of themselves; -update
// writes it.
func TestDocs(t *testing.T) {
	const path = "../../docs/cli.md"
	a, _ := testApp(t)
	var b bytes.Buffer
	writeDocs(&b, a.root(nil))
	if *update {
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("docs/cli.md is not what the commands say (go test ./internal/cli -update writes it):\n%s", diff)
	}
}

const docsIntro = "# The tenon command\n\n" +
	"`tenon` talks to a Tenon daemon, or to any other server of the Docker Engine API. Its verbs and\n" +
	"flags are Docker's where Docker has them; what is Tenon's own is said there. This page is made from\n" +
	"the commands themselves (`go test ./internal/cli -update`).\n\n" +
	"The daemon is found by `-H`, else `TENON_HOST`, else `DOCKER_HOST`, else at\n" +
	"`unix:///run/tenon/docker.sock`. Credentials and default formats come from `~/.docker/config.json`\n" +
	"(`DOCKER_CONFIG`, `--config`), credential helpers included.\n\n" +
	"Exit codes: that of the container for `run`, `exec`, `start -a` and `attach`; 125 if the command\n" +
	"line or the engine is at fault, 126 if the container's command cannot be executed, 127 if it was not\n" +
	"found, 128+N if signal N ended it; else 0 or 1.\n\n" +
	"`--format` takes `table`, `table TEMPLATE`, `json` or a Go template, with the functions `json`,\n" +
	"`split`, `join`, `title`, `lower`, `upper`, `pad`, `truncate` and `println`.\n"

func writeDocs(b *bytes.Buffer, root *cobra.Command) {
	b.WriteString(docsIntro)
	for _, g := range root.Groups() {
		fmt.Fprintf(b, "\n%s\n\n| verb | what it does |\n| --- | --- |\n", "## "+strings.TrimSuffix(g.Title, ":"))
		for _, c := range root.Commands() {
			if c.GroupID == g.ID && !c.Hidden {
				fmt.Fprintf(b, "| [`%s`](#%s) | %s |\n", c.CommandPath(), strings.ReplaceAll(c.CommandPath(), " ", "-"), c.Short)
			}
		}
	}
	allCommands(root, func(c *cobra.Command) {
		if !c.Hidden {
			writeDoc(b, c)
		}
	})
}

func writeDoc(b *bytes.Buffer, c *cobra.Command) {
	level := "##"
	if c.Parent().HasParent() {
		level = "###"
	}
	fmt.Fprintf(b, "\n%s %s\n\n", level, c.CommandPath())
	text := c.Long
	if text == "" {
		text = c.Short + "."
	}
	fmt.Fprintf(b, "%s\n", strings.TrimSpace(text))
	if c.HasSubCommands() {
		b.WriteString("\n")
		for _, s := range c.Commands() {
			if s.Name() != "help" && !s.Hidden {
				fmt.Fprintf(b, "- `%s`: %s\n", s.CommandPath(), s.Short)
			}
		}
		return
	}
	fmt.Fprintf(b, "\n```\n%s\n```\n", useLine(c))
	if c.Example != "" {
		fmt.Fprintf(b, "\n```sh\n%s\n```\n", strings.TrimSpace(c.Example))
	}
	if len(c.Aliases) > 0 {
		fmt.Fprintf(b, "\nAlso: `%s`\n", strings.Join(c.Aliases, "`, `"))
	}
	if c.Parent().HasParent() {
		if twin, _, err := c.Root().Find([]string{c.Name()}); err == nil && twin.Short == c.Short && twin != c.Root() {
			fmt.Fprintf(b, "\nFlags: as [`%s`](#%s).\n", twin.CommandPath(), strings.ReplaceAll(twin.CommandPath(), " ", "-"))
			return
		}
	}
	writeFlagTable(b, c)
}

func writeFlagTable(b *bytes.Buffer, c *cobra.Command) {
	head := false
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		if !head {
			b.WriteString("\n| flag | meaning |\n| --- | --- |\n")
			head = true
		}
		name := "`--" + f.Name + "`"
		if f.Shorthand != "" {
			name = "`-" + f.Shorthand + "`, " + name
		}
		typ, usage := pflag.UnquoteUsage(f)
		if typ != "" {
			name += " " + typ
		}
		usage, _, _ = strings.Cut(usage, "\n")
		usage = strings.TrimSuffix(usage, ":")
		if d := f.DefValue; d != "" && d != "false" && d != "0" && d != "[]" && d != "0s" && !strings.Contains(usage, "default") {
			usage += fmt.Sprintf(" (default %s)", d)
		}
		fmt.Fprintf(b, "| %s | %s |\n", name, strings.ReplaceAll(usage, "|", "\\|"))
	})
}
