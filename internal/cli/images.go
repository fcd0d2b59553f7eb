package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/image"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/imageapi"
)

// imageRow is a line of images: one tag or digest of one image.
type imageRow struct {
	isRow
	s                 image.Summary
	repo, tag, digest string
	full              bool
	now               time.Time
}

func (r imageRow) ID() string         { return shortID(r.s.ID, r.full) }
func (r imageRow) Repository() string { return r.repo }
func (r imageRow) Tag() string        { return r.tag }
func (r imageRow) Digest() string     { return r.digest }
func (r imageRow) CreatedSince() string {
	if r.s.Created <= 0 {
		return "N/A"
	}
	return units.HumanDuration(r.now.Sub(time.Unix(r.s.Created, 0))) + " ago"
}
func (r imageRow) CreatedAt() string {
	if r.s.Created <= 0 {
		return "N/A"
	}
	return time.Unix(r.s.Created, 0).String()
}
func (r imageRow) Size() string { return units.HumanSizeWithPrecision(float64(r.s.Size), 3) }
func (r imageRow) Containers() string {
	if r.s.Containers < 0 {
		return "N/A"
	}
	return strconv.FormatInt(r.s.Containers, 10)
}
func (r imageRow) SharedSize() string {
	if r.s.SharedSize < 0 {
		return "N/A"
	}
	return units.HumanSize(float64(r.s.SharedSize))
}
func (r imageRow) UniqueSize() string {
	if r.s.SharedSize < 0 {
		return "N/A"
	}
	return units.HumanSize(float64(r.s.Size - r.s.SharedSize))
}
func (r imageRow) VirtualSize() string { return r.Size() }
func (r imageRow) Labels() string      { return labelList(r.s.Labels) }

// lazyLabel is what lists have for images whose files come when they are read.
const lazyLabel = "dev.tenon.lazy"

// Kind is "disk" for disks of machines with a system of their own, "lazy, 12%" for
// images of which some is here, else "container".
func (r imageRow) Kind() string {
	if r.s.Labels[imageapi.LabelKind] == imageapi.KindDisk {
		return "disk"
	}
	if here := r.s.Labels[lazyLabel]; here != "" {
		return "lazy, " + here
	}
	return "container"
}
func (r imageRow) Label(n string) string {
	return r.s.Labels[n]
}

var imageHeaders = headers{
	"ID": "IMAGE ID", "Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", "CreatedSince": "CREATED",
	"CreatedAt": "CREATED AT", "Size": "SIZE", "Containers": "CONTAINERS", "SharedSize": "SHARED SIZE",
	"UniqueSize": "UNIQUE SIZE", "VirtualSize": "SIZE", "Labels": "LABELS", "Kind": "KIND",
}

const none = "<none>"

// imageRows makes a row of each tag, or of each digest, or one without a name.
func imageRows(list []image.Summary, digests, full bool, now time.Time) []imageRow {
	var rows []imageRow
	for _, s := range list {
		byRepo := map[string][]string{}
		for _, d := range s.RepoDigests {
			repo, digest, _ := strings.Cut(d, "@")
			byRepo[repo] = append(byRepo[repo], digest)
		}
		named := false
		for _, t := range s.RepoTags {
			repo, tag := splitTag(t)
			if repo == none {
				continue
			}
			named = true
			ds := byRepo[repo]
			delete(byRepo, repo)
			if !digests || len(ds) == 0 {
				ds = append(ds[:0:0], ds...)
				ds = append(ds[:min(len(ds), 1)], none)[:1]
			}
			for _, d := range ds {
				rows = append(rows, imageRow{s: s, repo: repo, tag: tag, digest: d, full: full, now: now})
			}
		}
		if named {
			continue
		}
		repos := make([]string, 0, len(byRepo))
		for repo := range byRepo {
			repos = append(repos, repo)
		}
		slices.Sort(repos)
		for _, repo := range repos {
			for _, d := range byRepo[repo] {
				named = true
				rows = append(rows, imageRow{s: s, repo: repo, tag: none, digest: d, full: full, now: now})
			}
		}
		if !named {
			rows = append(rows, imageRow{s: s, repo: none, tag: none, digest: none, full: full, now: now})
		}
	}
	return rows
}

func (a *app) imagesCmd() *cobra.Command {
	var all, digests, noTrunc, quiet bool
	var format string
	fil := filters{}
	cmd := &cobra.Command{
		Use: "images [OPTIONS] [REPOSITORY[:TAG]]", Short: "List images",
		Example: "tenon images\ntenon images --filter dangling=true -q\ntenon images --format '{{.Repository}}:{{.Tag}} {{.Size}}'",
		Args:    maxArgs(1), ValidArgsFunction: a.completeFirst(a.imageNames),
	}
	f := cmd.Flags()
	f.BoolVarP(&all, "all", "a", false, "Show all images (default hides intermediate images)")
	f.BoolVar(&digests, "digests", false, "Show digests")
	f.VarP(fil, "filter", "f", "Filter output based on conditions provided")
	f.StringVar(&format, "format", "", formatUsage)
	f.BoolVar(&noTrunc, "no-trunc", false, "Don't truncate output")
	f.BoolVarP(&quiet, "quiet", "q", false, "Only show image IDs")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		if len(args) == 1 {
			fil.add("reference", args[0])
		}
		q := fil.query(nil)
		if all {
			q.Set("all", "1")
		}
		if strings.Contains(format, "SharedSize") || strings.Contains(format, "UniqueSize") {
			q.Set("shared-size", "1")
		}
		var list []image.Summary
		if err := c.Get(ctx, "/images/json", q, &list); err != nil {
			return err
		}
		return a.printImages(list, format, digests, quiet, noTrunc)
	})
	return cmd
}

func (a *app) printImages(list []image.Summary, format string, digests, quiet, noTrunc bool) error {
	if format == "" {
		format = a.configFormat("imagesFormat")
	}
	if quiet && (format == "" || strings.HasPrefix(format, "table")) {
		format = "{{.ID}}"
	}
	l := listing{table: "{{.Repository}}\t{{.Tag}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}", headers: imageHeaders}
	if digests {
		l.table = "{{.Repository}}\t{{.Tag}}\t{{.Digest}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}"
	}
	var rows []any
	disks := false
	for _, r := range imageRows(list, digests, noTrunc, time.Now()) {
		rows = append(rows, r)
		disks = disks || r.Kind() != "container"
	}
	if disks {
		l.table += "\t{{.Kind}}"
	}
	return l.print(a.out, format, rows)
}

func (a *app) rmiCmd() *cobra.Command {
	var force, noPrune bool
	var platforms []string
	cmd := &cobra.Command{
		Use:     "rmi [OPTIONS] IMAGE [IMAGE...]",
		Short:   "Remove one or more images",
		Long:    "Take tags off images; an image whose last tag goes is deleted with the layers that no\nother image shares. An image that containers use stays, unless -f.",
		Example: "tenon rmi web:old\ntenon rmi $(tenon images -q -f dangling=true)",
		Args:    minArgs(1), ValidArgsFunction: a.completeAll(a.imageNames),
	}
	f := cmd.Flags()
	f.BoolVarP(&force, "force", "f", false, "Force removal of the image")
	f.BoolVar(&noPrune, "no-prune", false, "Do not delete untagged parents")
	f.StringSliceVar(&platforms, "platform", nil, `Remove only the given platform variant (e.g., "linux/amd64")`)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		q := url.Values{}
		if force {
			q.Set("force", "1")
		}
		if noPrune {
			q.Set("noprune", "1")
		}
		for _, p := range platforms {
			j, err := platformJSON(p)
			if err != nil {
				return err
			}
			q.Add("platforms", j)
		}
		var errs []error
		for _, name := range args {
			var out []image.DeleteResponse
			if err := c.Delete(ctx, "/images/"+escapeImage(name), q, &out); err != nil {
				var e *client.Error
				if force && errors.As(err, &e) && e.Status == http.StatusNotFound {
					fmt.Fprintln(a.err, err)
					continue
				}
				errs = append(errs, err)
				continue
			}
			for _, d := range out {
				if d.Deleted != "" {
					fmt.Fprintln(a.out, "Deleted:", d.Deleted)
				} else {
					fmt.Fprintln(a.out, "Untagged:", d.Untagged)
				}
			}
		}
		return errors.Join(errs...)
	})
	return cmd
}

func (a *app) tagCmd() *cobra.Command {
	return &cobra.Command{
		Use: "tag SOURCE_IMAGE[:TAG] TARGET_IMAGE[:TAG]", Short: "Create a tag TARGET_IMAGE that refers to SOURCE_IMAGE",
		Example: "tenon tag web:2 registry.example.com/team/web:2",
		Args:    exactArgs(2), ValidArgsFunction: a.completeFirst(a.imageNames),
		RunE: a.do(func(ctx context.Context, c *client.Client, args []string) error {
			repo, tag := splitTag(args[1])
			if tag == "" {
				tag = "latest"
			}
			return c.Post(ctx, "/images/"+escapeImage(args[0])+"/tag", url.Values{"repo": {repo}, "tag": {tag}}, nil, nil)
		}),
	}
}

// historyRow is a line of history.
type historyRow struct {
	isRow
	s           image.HistoryResponseItem
	full, human bool
	now         time.Time
}

func (r historyRow) ID() string {
	if r.s.ID == "" {
		return "<missing>"
	}
	return shortID(r.s.ID, r.full)
}
func (r historyRow) CreatedAt() string {
	if r.s.Created <= 0 {
		return "N/A"
	}
	return time.Unix(r.s.Created, 0).Format(time.RFC3339)
}
func (r historyRow) CreatedSince() string {
	if !r.human || r.s.Created <= 0 {
		return r.CreatedAt()
	}
	return units.HumanDuration(r.now.Sub(time.Unix(r.s.Created, 0))) + " ago"
}
func (r historyRow) CreatedBy() string {
	s := strings.ReplaceAll(r.s.CreatedBy, "\t", " ")
	if !r.full {
		s = ellipsis(s, 45)
	}
	return s
}
func (r historyRow) Size() string {
	if !r.human {
		return strconv.FormatInt(r.s.Size, 10)
	}
	return units.HumanSizeWithPrecision(float64(r.s.Size), 3)
}
func (r historyRow) Comment() string { return r.s.Comment }

func (a *app) historyCmd() *cobra.Command {
	var human, noTrunc, quiet bool
	var format, platform string
	cmd := &cobra.Command{
		Use: "history [OPTIONS] IMAGE", Short: "Show the history of an image",
		Example: "tenon history busybox\ntenon history --no-trunc --format '{{.CreatedBy}}' web",
		Args:    exactArgs(1), ValidArgsFunction: a.completeFirst(a.imageNames),
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", formatUsage)
	f.BoolVarP(&human, "human", "H", true, "Print sizes and dates in human readable format")
	f.BoolVar(&noTrunc, "no-trunc", false, "Don't truncate output")
	f.StringVar(&platform, "platform", "", `Show history for the given platform (e.g., "linux/amd64")`)
	f.BoolVarP(&quiet, "quiet", "q", false, "Only show image IDs")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		q := url.Values{}
		if platform != "" {
			p, err := platformJSON(platform)
			if err != nil {
				return err
			}
			q.Set("platform", p)
		}
		var list []image.HistoryResponseItem
		if err := c.Get(ctx, "/images/"+escapeImage(args[0])+"/history", q, &list); err != nil {
			return err
		}
		if quiet && format == "" {
			format = "{{.ID}}"
		}
		l := listing{
			table: "{{.ID}}\t{{.CreatedSince}}\t{{.CreatedBy}}\t{{.Size}}\t{{.Comment}}",
			headers: headers{"ID": "IMAGE", "CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "CreatedBy": "CREATED BY",
				"Size": "SIZE", "Comment": "COMMENT"},
		}
		if !human {
			l.headers["CreatedSince"] = l.headers["CreatedAt"]
		}
		now := time.Now()
		var rows []any
		for _, s := range list {
			rows = append(rows, historyRow{s: s, full: noTrunc, human: human, now: now})
		}
		return l.print(a.out, format, rows)
	})
	return cmd
}

// platformJSON turns os[/arch[/variant]] into the JSON that some queries take.
func platformJSON(s string) (string, error) {
	parts := strings.Split(s, "/")
	if len(parts) > 3 || parts[0] == "" {
		return "", fmt.Errorf("invalid platform %q: want os[/arch[/variant]]", s)
	}
	p := ocispec.Platform{OS: parts[0]}
	if len(parts) > 1 {
		p.Architecture = parts[1]
	}
	if len(parts) > 2 {
		p.Variant = parts[2]
	}
	b, err := json.Marshal(p)
	return string(b), err
}

func (a *app) imageCmd() *cobra.Command {
	return a.group("image", "Manage images", "",
		verb{name: "audit", make: (*app).imageAuditCmd},
		verb{name: "bootstrap", make: (*app).bootstrapCmd},
		verb{name: "build", make: (*app).buildCmd},
		verb{name: "diff", make: (*app).imageDiffCmd},
		verb{name: "history", make: (*app).historyCmd},
		verb{name: "import", make: (*app).importCmd},
		verb{name: "inspect", make: a.inspectGroup(imageInspector(), a.imageNames)},
		verb{name: "load", make: (*app).loadCmd},
		verb{name: "ls", make: (*app).imagesCmd},
		verb{name: "outdated", make: (*app).outdatedCmd},
		verb{name: "pin", make: (*app).pinCmd},
		verb{name: "prune", make: (*app).imagePruneCmd},
		verb{name: "pull", make: (*app).pullCmd},
		verb{name: "push", make: (*app).pushCmd},
		verb{name: "rebuild", make: (*app).rebuildCmd},
		verb{name: "rm", make: func(a *app) *cobra.Command {
			cmd := a.rmiCmd()
			cmd.Aliases = []string{"remove"}
			return cmd
		}},
		verb{name: "save", make: (*app).saveCmd},
		verb{name: "sbom", make: (*app).sbomCmd},
		verb{name: "sign", make: (*app).signCmd},
		verb{name: "tag", make: (*app).tagCmd},
		verb{name: "tree", make: (*app).treeCmd},
		verb{name: "unpin", make: (*app).unpinCmd},
		verb{name: "verify", make: (*app).verifyCmd},
	)
}
