package cli

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/moby/moby/api/types/registry"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/imageapi"
)

// table writes columns, and texts of others so that they can't command a terminal.
func (a *app) table(fill func(*tabwriter.Writer)) error {
	var b bytes.Buffer
	tw := tabwriter.NewWriter(&b, 0, 1, 3, ' ', 0)
	fill(tw)
	_ = tw.Flush() // writes to memory
	return writeText(a.out, b.Bytes())
}

// show writes v in a format, or, without one, as a table.
func (a *app) show(v any, format string, fill func(*tabwriter.Writer)) error {
	if format != "" {
		return a.printOne(v, format)
	}
	return a.table(fill)
}

func (a *app) treeCmd() *cobra.Command {
	var format string
	var all bool
	cmd := &cobra.Command{
		Use: "tree [OPTIONS] [IMAGE]", Short: "Show which images stand on which, and the containers on them",
		Long:    "Show which images stand on which, with the containers on them and who owns them (labels\nof authors, vendor and dev.tenon.owner). With IMAGE: its line, from its first parent to\nall that stands on it.\n\nParents are known by the definitions of builds, the annotations org.opencontainers.image.base,\nattested provenance, commits, and the layers of images that are here. An image whose base\nhas moved is marked with an asterisk (tenon image outdated says more).",
		Example: "tenon image tree\ntenon image tree debian:bookworm\ntenon image tree --format json | jq '.[].children[].names'",
		Args:    rangeArgs(0, 1), ValidArgsFunction: a.completeFirst(a.imageNames),
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "Show images without a name, too")
	cmd.Flags().StringVar(&format, "format", "", inspectFormatUsage)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		ref := ""
		if len(args) > 0 {
			ref = args[0]
		}
		nodes, err := c.ImageTree(ctx, ref, all)
		if err != nil {
			return err
		}
		return a.show(nodes, format, func(tw *tabwriter.Writer) {
			fmt.Fprintln(tw, "IMAGE\tID\tLAYERS\tBY\tOWNER\tCONTAINERS")
			for _, n := range nodes {
				writeNode(tw, n, "", "")
			}
		})
	})
	return cmd
}

// writeNode writes a line and those below it. own and below stand in front of them.
func writeNode(tw *tabwriter.Writer, n imageapi.Node, own, below string) {
	id, layers := "(not here)", ""
	if n.ID != "" {
		id, layers = shortID(n.ID, false), fmt.Sprintf("%d of %d", n.OwnLayers, n.Layers)
	} else if n.Digest != "" {
		id = "(not here: " + shortID(n.Digest, false) + ")"
	}
	name := strings.Join(n.Names, ", ")
	if name == "" {
		name = "<none>"
	}
	if n.Outdated {
		name += " *"
	}
	fmt.Fprintf(tw, "%s%s\t%s\t%s\t%s\t%s\t%s\n", own, name, id, layers, n.By, ownerText(n.Owners), containerText(n.Containers))
	for i, c := range n.Children {
		if i == len(n.Children)-1 {
			writeNode(tw, c, below+"└─ ", below+"   ")
		} else {
			writeNode(tw, c, below+"├─ ", below+"│  ")
		}
	}
}

func ownerText(o map[string]string) string {
	for _, k := range []string{"owner", "authors", "vendor", "maintainer"} {
		if o[k] != "" {
			return truncate(o[k], 40)
		}
	}
	return ""
}

func containerText(list []imageapi.Container) string {
	var out []string
	for _, c := range list {
		s := c.Name
		if c.State != "running" {
			s += " (" + c.State + ")"
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

// exitUnknown ends `tenon image outdated --exit-code` if nothing is known to be outdated,
// and not all could be asked for.
const exitUnknown = 2

func (a *app) outdatedCmd() *cobra.Command {
	var format string
	var remote, code bool
	cmd := &cobra.Command{
		Use: "outdated [OPTIONS]", Short: "Show images whose base has moved, and the containers on them",
		Long:    "Show the images whose base's name now means another image than the one they were made\nfrom, those that stand on such images, and the containers that run them. With --remote the\nbases' names are looked up in their registries, too; nothing is fetched. Names without a registry of\nimages that were made here are nobody else's, and not asked for.\n\nContainers whose own image's name now means another image are listed at the end.",
		Example: "tenon image outdated\ntenon image outdated --remote --exit-code || tenon pull debian:bookworm",
		Args:    exactArgs(0),
	}
	f := cmd.Flags()
	f.BoolVar(&remote, "remote", false, "Ask the registries of the bases, too")
	f.BoolVar(&code, "exit-code", false, "End with 1 if something is outdated, with 2 if a registry could not be asked")
	f.StringVar(&format, "format", "", inspectFormatUsage)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		auth := ""
		if remote {
			var err error
			if auth, err = a.allAuth(ctx); err != nil {
				return err
			}
		}
		r, err := c.ImageOutdated(ctx, remote, auth)
		if err != nil {
			return err
		}
		if format != "" {
			err = a.printOne(r, format)
		} else {
			err = a.writeOutdated(r)
		}
		switch {
		case err != nil || !code:
			return err
		case len(r.Images)+len(r.Containers) > 0:
			return &exitError{code: exitFailure}
		case len(r.Unknown) > 0:
			return &exitError{code: exitUnknown}
		}
		return nil
	})
	return cmd
}

func (a *app) writeOutdated(r imageapi.OutdatedReport) error {
	if len(r.Images)+len(r.Containers) == 0 {
		fmt.Fprintln(a.out, "Nothing is outdated.")
	}
	err := a.table(func(tw *tabwriter.Writer) {
		if len(r.Images) > 0 {
			fmt.Fprintln(tw, "IMAGE\tBASE\tWAS\tNOW\tOWNER\tCONTAINERS")
		}
		for _, o := range r.Images {
			was, now, on := shortID(o.Was, false), shortID(o.Now, false), o.Base
			if o.Now == "" {
				was, now, on = "", "", o.Through+" (outdated)"
			}
			if o.Remote {
				now += " (registry)"
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", strings.Join(o.Names, ", "), on, was, now, ownerText(o.Owners), containerText(o.Containers))
		}
		if len(r.Containers) > 0 {
			if len(r.Images) > 0 {
				fmt.Fprintln(tw)
			}
			fmt.Fprintln(tw, "CONTAINER\tIMAGE\tRUNS\tNOW")
		}
		for _, s := range r.Containers {
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", containerText([]imageapi.Container{s.Container}), s.Image, shortID(s.Was, false), shortID(s.Now, false))
		}
	})
	a.writeRemedies(r)
	var names []string
	for n := range r.Unknown {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		a.complain(fmt.Sprintf("not known of %s: %s", n, r.Unknown[n]))
	}
	return err
}

// writeRemedies says what brings images up to date.
func (a *app) writeRemedies(r imageapi.OutdatedReport) {
	var said []string
	for _, o := range r.Images {
		if o.Now == "" { // with its parent
			continue
		}
		do := "tenon image rebuild --chain " + o.Base
		if o.Remote {
			do = "tenon pull " + o.Base + " && " + do
		}
		if !slices.Contains(said, do) {
			said = append(said, do)
			_ = writeText(a.out, []byte("→ "+do+"\n")) // what matters has been written
		}
	}
	if len(said) == 0 && len(r.Containers) > 0 {
		fmt.Fprintln(a.out, "→ make these containers anew")
	}
}

// allAuth is the X-Registry-Config header: the credentials that the configuration has,
// by registry.
func (a *app) allAuth(ctx context.Context) (string, error) {
	c, err := a.loadConfig()
	if err != nil {
		return "", err
	}
	all := map[string]registry.AuthConfig{}
	for _, server := range slices.Concat(sortedKeys(c.auths), sortedKeys(c.credHelpers)) {
		host := server // some clients keep them by URL
		if server != dockerHub {
			host = strings.TrimPrefix(strings.TrimPrefix(server, "https://"), "http://")
			host, _, _ = strings.Cut(host, "/")
		}
		if all[host], err = c.get(ctx, server); err != nil {
			return "", err
		}
	}
	if len(all) == 0 {
		return "", nil
	}
	b, err := json.Marshal(all)
	return base64.URLEncoding.EncodeToString(b), err
}

func (a *app) imageDiffCmd() *cobra.Command {
	var format string
	var files, noFiles bool
	cmd := &cobra.Command{
		Use: "diff [OPTIONS] OLD NEW", Short: "Show what changed between two images: packages, configuration, files",
		Long:    "Show what changed between two images: packages (of dpkg, apk and rpm), configuration, and the\nnumber of files that came (A), changed (C) and went (D); with --files each of them.",
		Example: "tenon image diff app:1 app:2\ntenon image diff --files debian:bookworm app:1\ntenon image diff --format '{{range .Packages}}{{.Name}} {{.Old}} {{.New}}{{println}}{{end}}' app:1 app:2",
		Args:    exactArgs(2), ValidArgsFunction: a.completeEach(a.imageNames, a.imageNames),
	}
	cmd.Flags().BoolVar(&files, "files", false, "List the files")
	cmd.Flags().BoolVar(&noFiles, "no-files", false, "Don't look at files: packages and configuration alone")
	cmd.Flags().StringVar(&format, "format", "", inspectFormatUsage)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		d, err := c.ImageDiff(ctx, args[0], args[1], noFiles)
		if err != nil {
			return err
		}
		return a.show(d, format, func(tw *tabwriter.Writer) { writeImageDiff(tw, d, files, noFiles) })
	})
	return cmd
}

func writeImageDiff(tw *tabwriter.Writer, d imageapi.Diff, files, noFiles bool) {
	if len(d.Packages) > 0 {
		fmt.Fprintln(tw, "PACKAGE\tBEFORE\tAFTER")
		for _, p := range d.Packages {
			dash := func(s string) string {
				if s == "" {
					return "-"
				}
				return s
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\n", p.Name, dash(p.Old), dash(p.New))
		}
		fmt.Fprintln(tw)
	}
	for _, l := range d.Config {
		fmt.Fprintln(tw, l)
	}
	n := map[string]int{}
	for _, f := range d.Files {
		n[f.Kind]++
		if files {
			fmt.Fprintf(tw, "%s %s\n", f.Kind, f.Path)
		}
	}
	fmt.Fprintf(tw, "%s, %s of configuration", countOf(len(d.Packages), "package"), countOf(len(d.Config), "line"))
	if !noFiles {
		fmt.Fprintf(tw, ", files: %d came, %d changed, %d went", n["A"], n["C"], n["D"])
	}
	if d.Truncated {
		fmt.Fprint(tw, " (there are more)")
	}
	fmt.Fprintln(tw)
}

func (a *app) sbomCmd() *cobra.Command {
	var format string
	var files bool
	cmd := &cobra.Command{
		Use: "sbom [OPTIONS] IMAGE", Short: "List the packages in an image",
		Long:    "List the packages in an image: those that its attestation names (an SBOM of its build, or\nof tenon image bootstrap), or, if it has none, those of the databases of dpkg, apk and rpm\nin its files. --format spdx prints an SPDX document.",
		Example: "tenon image sbom debian:bookworm\ntenon image sbom --format spdx app:1 > app.spdx.json",
		Args:    exactArgs(1), ValidArgsFunction: a.completeFirst(a.imageNames),
	}
	cmd.Flags().BoolVar(&files, "files", false, "Look at the image's files, even if there is an attestation")
	cmd.Flags().StringVar(&format, "format", "", "spdx, json, or a Go template")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		if format == "spdx" {
			b, err := c.ImageSPDX(ctx, args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.out, string(b))
			return err
		}
		s, err := c.ImagePackages(ctx, args[0], files)
		if err != nil {
			return err
		}
		return a.show(s, format, func(tw *tabwriter.Writer) {
			fmt.Fprintln(tw, "PACKAGE\tVERSION\tARCH\tKIND")
			for _, p := range s.Packages {
				fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", p.Name, p.Version, p.Arch, p.Kind)
			}
		})
	})
	return cmd
}
