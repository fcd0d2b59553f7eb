package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/system"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

func (a *app) systemCmd() *cobra.Command {
	return a.group("system", "Manage the engine", "",
		verb{name: "df", make: (*app).dfCmd},
		verb{name: "events", make: (*app).eventsCmd},
		verb{name: "info", make: (*app).infoCmd},
		verb{name: "prune", make: (*app).systemPruneCmd},
		verb{name: "shutdown", make: (*app).shutdownCmd},
	)
}

func (a *app) containerCmd() *cobra.Command {
	return a.group("container", "Manage containers", "",
		verb{name: "attach", make: (*app).attachCmd},
		verb{name: "commit", make: (*app).commitCmd},
		verb{name: "cp", make: (*app).cpCmd},
		verb{name: "create", make: (*app).createCmd},
		verb{name: "diff", make: (*app).diffCmd},
		verb{name: "exec", make: (*app).execCmd},
		verb{name: "export", make: (*app).exportCmd},
		verb{name: "inspect", make: a.inspectGroup(containerInspector(), a.containerNames(all))},
		verb{name: "kill", make: (*app).killCmd},
		verb{name: "logs", make: (*app).logsCmd},
		verb{name: "ls", make: func(a *app) *cobra.Command {
			cmd := a.psCmd()
			rename(cmd, "ls")
			cmd.Aliases = []string{"ps", "list"}
			return cmd
		}},
		verb{name: "pause", make: (*app).pauseCmd},
		verb{name: "port", make: (*app).portCmd},
		verb{name: "prune", make: (*app).containerPruneCmd},
		verb{name: "rename", make: (*app).renameCmd},
		verb{name: "restart", make: (*app).restartCmd},
		verb{name: "rm", make: (*app).rmCmd},
		verb{name: "run", make: (*app).runCmd},
		verb{name: "start", make: (*app).startCmd},
		verb{name: "stats", make: (*app).statsCmd},
		verb{name: "stop", make: (*app).stopCmd},
		verb{name: "top", make: (*app).topCmd},
		verb{name: "unpause", make: (*app).unpauseCmd},
		verb{name: "update", make: (*app).updateCmd},
		verb{name: "wait", make: (*app).waitCmd},
	)
}

// columns prints rows, the first of which are titles.
func (a *app) columns(rows [][]string) error {
	var b bytes.Buffer
	tw := tabwriter.NewWriter(&b, 20, 1, 3, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(tw, strings.Join(r, "\t"))
	}
	_ = tw.Flush() // writes to memory
	return writeText(a.out, b.Bytes())
}

// versions is what version shows; templates name its fields.
type versions struct {
	Client clientVersion
	Server *system.VersionResponse `json:",omitempty"`
}

type clientVersion struct {
	Version, GoVersion, Os, Arch string
}

func (a *app) versionCmd() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "version [OPTIONS]", Short: "Show the version of the command and of the engine",
		Example: "tenon version\ntenon version -f '{{.Server.Version}}'", Args: exactArgs(0),
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", inspectFormatUsage)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		v := versions{Client: clientVersion{a.version, runtime.Version(), runtime.GOOS, runtime.GOARCH}}
		var server system.VersionResponse
		err := c.Get(ctx, "/version", nil, &server)
		if err == nil {
			v.Server = &server
		}
		if format != "" {
			if perr := a.printOne(v, format); perr != nil {
				return perr
			}
			return err
		}
		var b bytes.Buffer
		fmt.Fprintf(&b, "Client: Tenon\n Version:           %s\n Go version:        %s\n OS/Arch:           %s/%s\n",
			v.Client.Version, v.Client.GoVersion, v.Client.Os, v.Client.Arch)
		if v.Server != nil {
			writeServerVersion(&b, v.Server)
		}
		if _, werr := a.out.Write(b.Bytes()); werr != nil {
			return werr
		}
		return err
	})
	return cmd
}

func writeServerVersion(b *bytes.Buffer, s *system.VersionResponse) {
	fmt.Fprint(b, "\nServer:")
	if s.Platform.Name != "" {
		fmt.Fprintf(b, " %s", s.Platform.Name)
	}
	fmt.Fprintln(b)
	comps := s.Components
	if len(comps) == 0 {
		comps = []system.ComponentVersion{{Name: "Engine", Version: s.Version, Details: map[string]string{
			"ApiVersion": s.APIVersion, "MinAPIVersion": s.MinAPIVersion, "GoVersion": s.GoVersion, "GitCommit": s.GitCommit,
			"Os": s.Os, "Arch": s.Arch, "BuildTime": s.BuildTime, "KernelVersion": s.KernelVersion,
		}}}
	}
	line := func(title, v string) {
		if v != "" {
			fmt.Fprintf(b, "  %-17s %s\n", title+":", v)
		}
	}
	for _, c := range comps {
		fmt.Fprintf(b, " %s:\n", c.Name)
		line("Version", c.Version)
		d := c.Details
		if api := d["ApiVersion"]; api != "" {
			line("API version", fmt.Sprintf("%s (minimum version %s)", api, d["MinAPIVersion"]))
		}
		line("Go version", d["GoVersion"])
		line("Git commit", d["GitCommit"])
		line("Built", d["BuildTime"])
		if d["Os"] != "" {
			line("OS/Arch", d["Os"]+"/"+d["Arch"])
		}
		line("Kernel", d["KernelVersion"])
		known := []string{"ApiVersion", "MinAPIVersion", "GoVersion", "GitCommit", "BuildTime", "Os", "Arch", "KernelVersion", "Experimental"}
		for _, k := range sortedKeys(d) {
			if !slices.Contains(known, k) {
				line(k, d[k])
			}
		}
	}
}

// printOne prints one value as JSON or by a template.
func (a *app) printOne(v any, format string) error {
	if format == "json" {
		format = "{{json .}}"
	}
	t, err := parseTemplate(format)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := t.Execute(&b, v); err != nil {
		return &exitError{exitFailure, fmt.Errorf("template parsing error: %w", err)}
	}
	fmt.Fprintln(a.out, b.String())
	return nil
}

func (a *app) eventsCmd() *cobra.Command {
	var since, until, format string
	fil := filters{}
	cmd := &cobra.Command{
		Use: "events [OPTIONS]", Short: "Get real time events from the server",
		Long:    "Show what happens to containers, images, networks and volumes, as it happens, or what\nhappened between --since and --until.",
		Example: "tenon events\ntenon events --since 10m --until 0s -f type=container --format '{{.Action}} {{.Actor.ID}}'",
		Args:    exactArgs(0),
	}
	f := cmd.Flags()
	f.VarP(fil, "filter", "f", "Filter output based on conditions provided")
	f.StringVar(&format, "format", "", inspectFormatUsage)
	f.StringVar(&since, "since", "", "Show all events created since timestamp")
	f.StringVar(&until, "until", "", "Stream events until this timestamp")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		q := fil.query(url.Values{})
		for k, v := range map[string]string{"since": since, "until": until} {
			if v == "" {
				continue
			}
			ts, err := parseTimestamp(v, time.Now())
			if err != nil {
				return fmt.Errorf("invalid value for %q: %w", k, err)
			}
			q.Set(k, ts)
		}
		resp, err := c.Do(ctx, client.Request{Method: http.MethodGet, Path: "/events", Query: q})
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		dec := json.NewDecoder(resp.Body)
		for {
			var raw json.RawMessage
			if err := dec.Decode(&raw); err != nil {
				return endOfStream(err)
			}
			if err := a.printEvent(raw, format); err != nil {
				return err
			}
		}
	})
	return cmd
}

func (a *app) printEvent(raw json.RawMessage, format string) error {
	if format == "json" || format == "{{json .}}" {
		_, err := fmt.Fprintf(a.out, "%s\n", raw)
		return err
	}
	var e events.Message
	if err := json.Unmarshal(raw, &e); err != nil {
		return fmt.Errorf("the daemon's event is not understood: %w", err)
	}
	if format != "" {
		return a.printOne(e, format)
	}
	at := time.Unix(0, e.TimeNano)
	if e.TimeNano == 0 {
		at = time.Unix(e.Time, 0)
	}
	var attrs []string
	for _, k := range sortedKeys(e.Actor.Attributes) {
		attrs = append(attrs, k+"="+e.Actor.Attributes[k])
	}
	line := fmt.Sprintf("%s %s %s %s", at.Format("2006-01-02T15:04:05.000000000Z07:00"), e.Type, e.Action, e.Actor.ID)
	if len(attrs) > 0 {
		line += " (" + strings.Join(attrs, ", ") + ")"
	}
	return writeText(a.out, []byte(line+"\n"))
}

func (a *app) dfCmd() *cobra.Command {
	var format string
	var verbose bool
	cmd := &cobra.Command{
		Use: "df [OPTIONS]", Short: "Show disk usage", Example: "tenon system df\ntenon system df -v", Args: exactArgs(0),
	}
	cmd.Flags().StringVar(&format, "format", "", formatUsage)
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "Show detailed information on space usage")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		q := url.Values{}
		if verbose {
			q.Set("verbose", "1")
		}
		var raw json.RawMessage
		if err := c.Get(ctx, "/system/df", q, &raw); err != nil {
			return err
		}
		u, err := decodeUsage(raw)
		if err != nil {
			return err
		}
		if verbose {
			return a.printUsageDetails(u, format)
		}
		l := listing{
			table:   "{{.Type}}\t{{.TotalCount}}\t{{.Active}}\t{{.Size}}\t{{.Reclaimable}}",
			headers: headers{"Type": "TYPE", "TotalCount": "TOTAL", "Active": "ACTIVE", "Size": "SIZE", "Reclaimable": "RECLAIMABLE"},
		}
		var rows []any
		for _, r := range u.rows() {
			rows = append(rows, r)
		}
		if f, err := c.Footprint(ctx); err == nil { // Docker's daemon has none
			for _, r := range footprintRows(f) {
				rows = append(rows, r)
			}
		}
		return l.print(a.out, format, rows)
	})
	return cmd
}

// footprintRows are what the state takes beside what Docker's API tells of, and the sum.
func footprintRows(f client.Footprint) []usageRow {
	var out []usageRow
	for _, r := range []usageRow{
		{typ: "Logs", size: f.Logs}, {typ: "Machines", size: f.Machines}, {typ: "VM templates, kernels", size: f.VM},
		{typ: "Other", size: f.Total - f.Images - f.Containers - f.Volumes - f.BuildCache - f.Logs - f.Machines - f.VM},
		{typ: "Total on the disk", size: f.Total},
	} {
		if r.size > 0 {
			r.total = -1
			out = append(out, r)
		}
	}
	return out
}

// usageRow is a line of system df; a total of -1 is not told.
type usageRow struct {
	isRow
	typ               string
	total, active     int64
	size, reclaimable int64
}

func (r usageRow) Type() string       { return r.typ }
func (r usageRow) TotalCount() string { return r.count(r.total) }
func (r usageRow) Active() string     { return r.count(r.active) }
func (r usageRow) count(n int64) string {
	if r.total < 0 {
		return ""
	}
	return fmt.Sprint(n)
}
func (r usageRow) Size() string { return units.HumanSize(float64(r.size)) }
func (r usageRow) Reclaimable() string {
	if r.total < 0 {
		return ""
	}
	s := units.HumanSize(float64(r.reclaimable))
	if r.size > 0 {
		s += fmt.Sprintf(" (%d%%)", r.reclaimable*100/r.size)
	}
	return s
}
