package cli

import (
	"context"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

// containerRow is a line of ps.
type containerRow struct {
	isRow
	s    container.Summary
	full bool
	now  time.Time
}

func (r containerRow) ID() string { return shortID(r.s.ID, r.full) }
func (r containerRow) Names() string {
	var names []string
	for _, n := range r.s.Names {
		n = strings.TrimPrefix(n, "/")
		if !r.full && strings.Contains(n, "/") {
			continue // the name as another container links to it
		}
		names = append(names, n)
	}
	return strings.Join(names, ",")
}
func (r containerRow) Image() string {
	if r.s.Image == "" {
		return "<no image>"
	}
	if !r.full {
		if hex, ok := strings.CutPrefix(r.s.Image, "sha256:"); ok {
			return truncate(hex, 12)
		}
		name, _, _ := strings.Cut(r.s.Image, "@sha256:")
		return name
	}
	return r.s.Image
}
func (r containerRow) Command() string {
	c := r.s.Command
	if !r.full {
		c = ellipsis(c, 20)
	}
	return strconv.Quote(c)
}
func (r containerRow) CreatedAt() string { return time.Unix(r.s.Created, 0).String() }
func (r containerRow) RunningFor() string {
	return units.HumanDuration(r.now.Sub(time.Unix(r.s.Created, 0))) + " ago"
}
func (r containerRow) Ports() string  { return displayPorts(r.s.Ports) }
func (r containerRow) State() string  { return string(r.s.State) }
func (r containerRow) Status() string { return r.s.Status }
func (r containerRow) Size() string {
	s := units.HumanSizeWithPrecision(float64(r.s.SizeRw), 3)
	if r.s.SizeRootFs > 0 {
		s += " (virtual " + units.HumanSizeWithPrecision(float64(r.s.SizeRootFs), 3) + ")"
	}
	return s
}
func (r containerRow) Platform() *ocispec.Platform {
	if r.s.ImageManifestDescriptor == nil {
		return nil
	}
	return r.s.ImageManifestDescriptor.Platform
}
func (r containerRow) Labels() string { return labelList(r.s.Labels) }
func (r containerRow) Label(name string) string {
	return r.s.Labels[name]
}
func (r containerRow) Mounts() string {
	var out []string
	for _, m := range r.s.Mounts {
		name := m.Name
		if name == "" {
			name = m.Source
		}
		if !r.full {
			name = ellipsis(name, 15)
		}
		out = append(out, name)
	}
	return strings.Join(out, ",")
}
func (r containerRow) LocalVolumes() string {
	n := 0
	for _, m := range r.s.Mounts {
		if m.Driver == "local" {
			n++
		}
	}
	return strconv.Itoa(n)
}
func (r containerRow) Networks() string {
	var out []string
	if r.s.NetworkSettings != nil {
		for n := range r.s.NetworkSettings.Networks {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return strings.Join(out, ",")
}

var containerHeaders = headers{
	"ID": "CONTAINER ID", "Names": "NAMES", "Image": "IMAGE", "Command": "COMMAND", "CreatedAt": "CREATED AT",
	"RunningFor": "CREATED", "Ports": "PORTS", "State": "STATE", "Status": "STATUS", "Size": "SIZE", "Labels": "LABELS",
	"Mounts": "MOUNTS", "LocalVolumes": "LOCAL VOLUMES", "Networks": "NETWORKS", "Platform": "PLATFORM",
}

const containerTable = "{{.ID}}\t{{.Image}}\t{{.Command}}\t{{.RunningFor}}\t{{.Status}}\t{{.Ports}}\t{{.Names}}"

// displayPorts shows ports as Docker does, neighbours joined to ranges:
// 0.0.0.0:8000-8001->80-81/tcp, 443/tcp.
func displayPorts(ports []container.PortSummary) string {
	ports = slices.Clone(ports)
	slices.SortFunc(ports, func(a, b container.PortSummary) int {
		if a.PrivatePort != b.PrivatePort {
			return int(a.PrivatePort) - int(b.PrivatePort)
		}
		if a.IP != b.IP {
			return a.IP.Compare(b.IP)
		}
		if a.PublicPort != b.PublicPort {
			return int(a.PublicPort) - int(b.PublicPort)
		}
		return strings.Compare(a.Type, b.Type)
	})
	type span struct {
		ip                   netip.Addr
		proto                string
		private, public, len int
	}
	var spans []span
next:
	for _, p := range ports {
		for i := range spans {
			s := &spans[i]
			if s.ip != p.IP || s.proto != p.Type || s.private+s.len != int(p.PrivatePort) {
				continue
			}
			if s.public == 0 && p.PublicPort == 0 || s.public != 0 && s.public+s.len == int(p.PublicPort) {
				s.len++
				continue next
			}
		}
		spans = append(spans, span{p.IP, p.Type, int(p.PrivatePort), int(p.PublicPort), 1})
	}
	rangeOf := func(first, n int) string {
		if n == 1 {
			return strconv.Itoa(first)
		}
		return fmt.Sprintf("%d-%d", first, first+n-1)
	}
	var out []string
	for _, s := range spans {
		str := rangeOf(s.private, s.len) + "/" + s.proto
		if s.public != 0 {
			str = rangeOf(s.public, s.len) + "->" + str
			if s.ip.IsValid() {
				ip := s.ip.String()
				if s.ip.Is6() {
					ip = "[" + ip + "]"
				}
				str = ip + ":" + str
			}
		}
		out = append(out, str)
	}
	return strings.Join(out, ", ")
}

func (a *app) psCmd() *cobra.Command {
	var all, noTrunc, quiet, size, latest bool
	var last int
	var format string
	fil := filters{}
	cmd := &cobra.Command{
		Use:     "ps [OPTIONS]",
		Short:   "List containers",
		Long:    "List running containers, or all of them with -a.",
		Example: "tenon ps\ntenon ps -a --filter status=exited --format '{{.Names}}\\t{{.Status}}'\ntenon rm $(tenon ps -aq -f label=temporary)",
		Args:    exactArgs(0),
	}
	f := cmd.Flags()
	f.BoolVarP(&all, "all", "a", false, "Show all containers (default shows just running)")
	f.VarP(fil, "filter", "f", "Filter output based on conditions provided")
	f.StringVar(&format, "format", "", formatUsage)
	f.IntVarP(&last, "last", "n", -1, "Show n last created containers (includes all states)")
	f.BoolVarP(&latest, "latest", "l", false, "Show the latest created container (includes all states)")
	f.BoolVar(&noTrunc, "no-trunc", false, "Don't truncate output")
	f.BoolVarP(&quiet, "quiet", "q", false, "Only display container IDs")
	f.BoolVarP(&size, "size", "s", false, "Display total file sizes")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		q := fil.query(nil)
		if all {
			q.Set("all", "1")
		}
		if latest && last < 0 {
			last = 1
		}
		if last > 0 {
			q.Set("limit", strconv.Itoa(last))
		}
		if size || strings.Contains(format, ".Size") {
			q.Set("size", "1")
		}
		var list []container.Summary
		if err := c.Get(ctx, "/containers/json", q, &list); err != nil {
			return err
		}
		return a.printContainers(list, format, quiet, noTrunc, size)
	})
	return cmd
}

func (a *app) printContainers(list []container.Summary, format string, quiet, noTrunc, size bool) error {
	if format == "" {
		format = a.configFormat("psFormat")
	}
	if quiet && (format == "" || strings.HasPrefix(format, "table")) {
		format = "{{.ID}}"
	}
	l := listing{table: containerTable, headers: containerHeaders}
	if size {
		l.table += "\t{{.Size}}"
	}
	now := time.Now()
	var rows []any
	for _, s := range list {
		rows = append(rows, containerRow{s: s, full: noTrunc, now: now})
	}
	return l.print(a.out, format, rows)
}

func (a *app) portCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "port CONTAINER [PRIVATE_PORT[/PROTO]]",
		Short:             "List port mappings or a specific mapping for the container",
		Example:           "tenon port web\ntenon port web 80/tcp",
		Args:              rangeArgs(1, 2),
		ValidArgsFunction: a.completeFirst(a.containerNames(running)),
		RunE: a.do(func(ctx context.Context, c *client.Client, args []string) error {
			var info container.InspectResponse
			if err := c.Get(ctx, "/containers/"+url.PathEscape(args[0])+"/json", nil, &info); err != nil {
				return err
			}
			want := ""
			if len(args) == 2 {
				want = args[1]
				if !strings.Contains(want, "/") {
					want += "/tcp"
				}
			}
			return a.printPorts(info, want)
		}),
	}
}

func (a *app) printPorts(info container.InspectResponse, want string) error {
	var out []string
	found := false
	if info.NetworkSettings != nil {
		for p, bindings := range info.NetworkSettings.Ports {
			if want != "" && p.String() != strings.ToLower(want) {
				continue
			}
			for _, b := range bindings {
				found = true
				addr := b.HostIP.String()
				if b.HostIP.Is6() {
					addr = "[" + addr + "]"
				} else if !b.HostIP.IsValid() {
					addr = "0.0.0.0"
				}
				line := addr + ":" + b.HostPort
				if want == "" {
					line = p.String() + " -> " + line
				}
				out = append(out, line)
			}
		}
	}
	if want != "" && !found {
		return fmt.Errorf("Error: No public port '%s' published for %s", want, strings.TrimPrefix(info.Name, "/"))
	}
	slices.Sort(out)
	for _, l := range out {
		fmt.Fprintln(a.out, l)
	}
	return nil
}
