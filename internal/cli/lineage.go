package cli

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/moby/moby/api/types/registry"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/cli/buildopts"
)

// table writes columns, and texts of others so that they can't command a terminal.
func (a *app) table(fill func(*tabwriter.Writer)) error {
	var b bytes.Buffer
	tw := tabwriter.NewWriter(&b, 0, 1, 3, ' ', 0)
	fill(tw)
	_ = tw.Flush() // writes to memory
	return writeText(a.out, b.Bytes())
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
		if format != "" {
			return a.printOne(nodes, format)
		}
		return a.table(func(tw *tabwriter.Writer) {
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

func (a *app) outdatedCmd() *cobra.Command {
	var format string
	var remote, code bool
	cmd := &cobra.Command{
		Use: "outdated [OPTIONS]", Short: "Show images whose base has moved, and the containers on them",
		Long:    "Show the images whose base's name now means another image than the one they were made\nfrom, those that stand on such images, and the containers that run them. With --remote the\nbases' names are looked up in their registries, too; nothing is fetched.\n\nContainers whose own image's name now means another image are listed at the end.",
		Example: "tenon image outdated\ntenon image outdated --remote --exit-code || tenon pull debian:bookworm",
		Args:    exactArgs(0),
	}
	f := cmd.Flags()
	f.BoolVar(&remote, "remote", false, "Ask the registries of the bases, too")
	f.BoolVar(&code, "exit-code", false, "End with 1 if something is outdated")
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
		if err == nil && code && len(r.Images)+len(r.Containers) > 0 {
			return &exitError{code: exitFailure}
		}
		return err
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

func (a *app) rebuildCmd() *cobra.Command {
	var chain, all, dry, swap bool
	var format string
	cmd := &cobra.Command{
		Use: "rebuild [OPTIONS] IMAGE", Short: "Build an image again, or all that stands on it",
		Long:    "Build IMAGE again from the definition that its build recorded, or, with --chain, those\nimages that stand on IMAGE and are outdated, parents before their children. Names go to the\nnew images; containers are not touched, and are listed at the end.\n\nAn image without a definition is re-based: its own layers are put on the new base, where\nthat is safe (same platform and release, and no file of its own that the two bases have\ndifferently). Values of build arguments that look like secrets are not recorded: they come\nfrom the environment.",
		Example: "tenon image rebuild --chain debian:bookworm --dry-run\ntenon image rebuild --chain debian:bookworm\ntenon image rebuild app:1",
		Args:    exactArgs(1), ValidArgsFunction: a.completeFirst(a.imageNames),
	}
	f := cmd.Flags()
	f.BoolVar(&chain, "chain", false, "Rebuild the images that stand on IMAGE and are outdated")
	f.BoolVar(&all, "all", false, "With --chain: those that are not outdated, too")
	f.BoolVar(&dry, "dry-run", false, "Only show what would be done")
	f.BoolVar(&swap, "rebase", false, "Swap the base's layers where that is safe, instead of building again")
	f.StringVar(&format, "format", "", "With --dry-run: "+inspectFormatUsage)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		steps, err := c.ImagePlan(ctx, args[0], chain, all)
		if err != nil {
			return err
		}
		for i := range steps {
			a.settle(ctx, c, &steps[i], swap)
		}
		if dry && format != "" {
			return a.printOne(steps, format)
		}
		if len(steps) == 0 {
			fmt.Fprintf(a.out, "Nothing that stands on %s is outdated.\n", args[0])
			return nil
		}
		return a.rebuild(ctx, c, steps, dry)
	})
	return cmd
}

// settle decides what only this side knows: whether the context is here, and, for a
// swap whose new base is here, whether it is safe.
func (a *app) settle(ctx context.Context, c *client.Client, s *imageapi.Step, swap bool) {
	if s.Do == imageapi.StepBuild && s.Definition == nil {
		s.Do, s.Why = imageapi.StepNone, "the daemon does not tell how it was built"
	}
	if s.Do == imageapi.StepBuild {
		gone := ""
		if d := s.Definition; !buildopts.Remote(d.Context) {
			here, _ := os.Hostname() // unknown: the directory alone tells
			if _, err := os.Stat(d.Context); err != nil || d.Host != "" && here != "" && d.Host != here {
				gone = fmt.Sprintf("its context %s is not on this machine", d.Context)
				if d.Host != "" {
					gone += " (it was built on " + d.Host + ")"
				}
			}
		}
		if gone == "" && !swap {
			s.Why = takes(s.Definition) // in this side's words: it is what is sent
			return
		}
		if s.From == "" || s.Base == "" {
			if gone != "" {
				s.Do, s.Why = imageapi.StepNone, gone
			}
			return
		}
		s.Do, s.Why = imageapi.StepRebase, "asked for"
		if gone != "" {
			s.Why = gone
		}
	}
	if s.Do != imageapi.StepRebase || s.To == "" {
		return
	}
	r, err := c.ImageRebase(ctx, imageapi.RebaseRequest{Image: s.ID, From: s.From, To: s.To, DryRun: true})
	if err != nil {
		s.Do, s.Why = imageapi.StepNone, s.Why+"; "+err.Error()
		return
	}
	s.Why += fmt.Sprintf("; %d own layers stay, %d of the base go, %d come", r.Kept, r.Swapped, r.Added)
}

// takes says what a build takes of this machine.
func takes(d *imageapi.Definition) string {
	out := "built from " + d.Context
	for _, part := range []struct {
		what string
		list []string
	}{{"context", d.Contexts}, {"secret", d.Secrets}, {"ssh", d.SSH}} {
		for _, v := range part.list {
			out += ", " + part.what + " " + v
		}
	}
	return out
}

func (a *app) rebuild(ctx context.Context, c *client.Client, steps []imageapi.Step, dry bool) error {
	var errs []error
	var left []string
	failed := map[string]bool{} // by name
	for i, s := range steps {
		name := shortID(s.ID, false)
		if len(s.Names) > 0 {
			name = s.Names[0]
		}
		word := map[string]string{imageapi.StepBuild: "build", imageapi.StepRebase: "re-base"}[s.Do]
		if word == "" {
			word = "can't be rebuilt"
		}
		_ = writeText(a.out, fmt.Appendf(nil, "[%d/%d] %s: %s on %s (%s)\n", i+1, len(steps), name, word, s.Base, s.Why))
		if dry {
			continue
		}
		var err error
		switch {
		case failed[s.Base]:
			err = errors.New("its base could not be made")
		case s.Do == imageapi.StepBuild:
			err = a.buildAgain(ctx, s)
		case s.Do == imageapi.StepRebase:
			to := s.Base
			var r imageapi.RebaseReport
			if r, err = c.ImageRebase(ctx, imageapi.RebaseRequest{Image: s.ID, From: s.From, To: to, Names: s.Names}); err == nil {
				fmt.Fprintf(a.out, "  %s: %d own layers on %d of %s\n", shortID(r.ID, false), r.Kept, r.Added, to)
				for _, n := range r.Notes {
					_ = writeText(a.out, []byte("  "+n+"\n"))
				}
			}
		default:
			err = errors.New(s.Why)
		}
		if err != nil {
			for _, n := range s.Names {
				failed[n] = true
			}
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			continue
		}
		for _, k := range s.Containers {
			left = append(left, containerText([]imageapi.Container{k}))
		}
	}
	if len(left) > 0 {
		fmt.Fprintf(a.out, "%s of the former images, not touched: %s\n", countOf(len(left), "container"), strings.Join(left, ", "))
	}
	return errors.Join(errs...)
}

func countOf(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// buildAgain runs this program's own build.
func (a *app) buildAgain(ctx context.Context, s imageapi.Step) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, arg := range s.Definition.Args {
		if _, set := os.LookupEnv(arg); !strings.Contains(arg, "=") && !set {
			a.complain(fmt.Sprintf("warning: the build argument %s has no value: none was recorded, and none is in the environment", arg))
		}
	}
	args, err := buildArgs(s)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, args...)
	if a.host != "" {
		cmd.Args = slices.Insert(cmd.Args, 1, "--host", a.host)
	}
	if a.config != "" {
		cmd.Args = slices.Insert(cmd.Args, 1, "--config", a.config)
	}
	if a.tls {
		cmd.Args = slices.Insert(cmd.Args, 1, "--tlsverify")
	}
	cmd.Stdout, cmd.Stderr = a.out, a.err
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build: %w", err)
	}
	return nil
}

// buildArgs is the command line of a build from its definition, which the daemon tells:
// of further flags it takes those that no file of this machine is written by.
func buildArgs(s imageapi.Step) ([]string, error) {
	d := s.Definition
	for _, f := range d.Flags {
		if !buildopts.Recorded(f) {
			return nil, fmt.Errorf("its definition has the flag %.100q, which none has", f)
		}
	}
	args := []string{"build"}
	add := func(flag string, values ...string) {
		for _, v := range values {
			if v != "" {
				args = append(args, "--"+flag+"="+v)
			}
		}
	}
	add("tag", s.Names...)
	add("file", d.Dockerfile)
	add("target", d.Target)
	add("platform", d.Platform)
	add("network", d.Network)
	add("isolation", d.Isolation)
	add("build-arg", d.Args...)
	add("label", d.Labels...)
	add("build-context", d.Contexts...)
	add("secret", d.Secrets...)
	add("ssh", d.SSH...)
	args = append(args, d.Flags...)
	return append(args, "--", d.Context), nil
}

func (a *app) imageDiffCmd() *cobra.Command {
	var format string
	var files, noFiles bool
	cmd := &cobra.Command{
		Use: "diff [OPTIONS] OLD NEW", Short: "Show what changed between two images: packages, configuration, files",
		Long:    "Show what changed between two images: packages (of dpkg and apk), configuration, and the\nnumber of files that came (A), changed (C) and went (D); with --files each of them.",
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
		if format != "" {
			return a.printOne(d, format)
		}
		return a.table(func(tw *tabwriter.Writer) { writeImageDiff(tw, d, files, noFiles) })
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
		Long:    "List the packages in an image: those that its attestation names (an SBOM of its build, or\nof tenon image bootstrap), or, if it has none, those of dpkg's and apk's databases in its\nfiles. --format spdx prints an SPDX document.",
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
		if format != "" {
			return a.printOne(s, format)
		}
		return a.table(func(tw *tabwriter.Writer) {
			fmt.Fprintln(tw, "PACKAGE\tVERSION\tARCH\tKIND")
			for _, p := range s.Packages {
				fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", p.Name, p.Version, p.Arch, p.Kind)
			}
		})
	})
	return cmd
}
