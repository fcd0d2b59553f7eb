package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

func (a *app) doctorCmd() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "doctor [OPTIONS]", Short: "Show what this host has and lacks, each lack with its remedy",
		Long:    "Ask the engine what its host offers for containers and virtual machines; if no\nengine answers, its program looks by itself.\nEnds with 1 if something required is missing.",
		Example: "tenon doctor\ntenon doctor --format json", Args: exactArgs(0),
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", inspectFormatUsage)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		r, err := c.Doctor(ctx)
		var unreached *client.ConnectError
		if errors.As(err, &unreached) {
			r, err = a.lookAlone(ctx, err)
		}
		if err != nil {
			return err
		}
		if format != "" {
			err = a.printOne(r, format)
		} else {
			var b bytes.Buffer
			_, tty := terminal(a.out)
			writeReport(&b, r, tty)
			_, err = a.out.Write(b.Bytes())
		}
		if err == nil && counts(r)[client.CheckMissing] > 0 {
			return &exitError{code: exitFailure}
		}
		return err
	})
	return cmd
}

// lookAlone asks the program of the daemon, for when no daemon answers: that is
// when somebody wants to know what the host lacks.
func (a *app) lookAlone(ctx context.Context, unreached error) (r client.Report, err error) {
	path := ""
	if self, err := os.Executable(); err == nil {
		path = filepath.Join(filepath.Dir(self), "tenond")
	}
	if _, err := os.Stat(path); err != nil {
		if path, err = exec.LookPath("tenond"); err != nil {
			return r, unreached
		}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--check").Output()
	if err == nil {
		err = json.Unmarshal(out, &r)
	}
	if err != nil {
		return r, unreached
	}
	fmt.Fprintf(a.err, "%v\nThis is what %s finds by itself:\n\n", unreached, path)
	return r, nil
}

func counts(r client.Report) map[string]int {
	n := map[string]int{}
	for _, c := range r.Checks {
		n[c.Status]++
	}
	return n
}

// writeReport prints the checks as a table, the remedies under their lines.
func writeReport(b *bytes.Buffer, r client.Report, colour bool) {
	paint := map[string]string{client.CheckOK: "\x1b[32m", client.CheckWarn: "\x1b[33m", client.CheckMissing: "\x1b[31m"}
	var t bytes.Buffer
	tw := tabwriter.NewWriter(&t, 0, 1, 3, ' ', 0)
	fmt.Fprintln(tw, "CHECK\tSTATUS\tDETAIL")
	for _, c := range r.Checks {
		fmt.Fprintf(tw, "%s\t%s\t%s\n", c.Name, c.Status, strings.ReplaceAll(c.Detail, "\n", " "))
		if c.Remedy != "" && c.Status != client.CheckOK {
			mark := "→"
			for line := range strings.Lines(c.Remedy) {
				fmt.Fprintf(tw, "\t\t%s %s\n", mark, strings.TrimSuffix(line, "\n"))
				mark = " "
			}
		}
	}
	_ = tw.Flush() // writes to memory
	for line := range strings.Lines(t.String()) {
		if colour {
			for status, code := range paint {
				// Columns are separated by three blanks; names hold no status.
				if i := strings.Index(line, "   "+status+" "); i >= 0 && !strings.HasPrefix(line, " ") {
					line = line[:i+3] + code + status + "\x1b[0m" + line[i+3+len(status):]
					break
				}
			}
		}
		b.WriteString(line)
	}
	n := counts(r)
	switch {
	case n[client.CheckMissing] > 0:
		fmt.Fprintf(b, "\n%d missing, %d with less than could be had.\n", n[client.CheckMissing], n[client.CheckWarn])
	case n[client.CheckWarn] > 0:
		fmt.Fprintf(b, "\nAll that is required is there; %d could be better.\n", n[client.CheckWarn])
	default:
		fmt.Fprintln(b, "\nAll is well.")
	}
}

func (a *app) shutdownCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "shutdown [OPTIONS]", Short: "Stop all containers, then the daemon and everything it made",
		Long:    "Stop all containers with their stop signals, then the daemon, and remove what it made on\nthe host: bridges, firewall tables, cgroups, mounts. Images, volumes and stopped\ncontainers stay on disk.",
		Example: "tenon system shutdown --force", Args: exactArgs(0),
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Do not prompt for confirmation")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		if !force && !a.confirm("This stops all containers and the daemon at "+c.Host()+".\nAre you sure you want to continue?") {
			return nil
		}
		return c.Shutdown(ctx)
	})
	return cmd
}
