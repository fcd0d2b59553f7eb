package engine

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/mount"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/audit"
	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/image/lineage"
)

// AuditOptions say what is to be looked at. With neither Images nor Names it is all
// images that have a name, and all containers that run.
type AuditOptions struct {
	Images []string
	Names  []string // containers, or else images
	All    bool     // containers that do not run, too
}

// Audit looks for what is wrong with images and containers.
func (e *Engine) Audit(ctx context.Context, o AuditOptions) (*imageapi.AuditReport, error) {
	out := &imageapi.AuditReport{Findings: []imageapi.Finding{}, Rules: audit.Rules}
	images, ctrs, err := e.auditSubjects(ctx, o)
	if err != nil {
		return nil, err
	}
	k, err := e.kin(ctx)
	if err != nil {
		return nil, err
	}
	moved := map[string]lineage.Moved{}
	for _, m := range k.graph.Outdated(k.graph.Local) {
		moved[m.Image.ID] = m
	}
	var scanner audit.Scanner
	for _, ref := range images {
		f, err := e.imageFacts(ctx, ref, moved, &scanner)
		sweep := len(o.Images)+len(o.Names) == 0
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case errdefs.IsNotFound(err) && sweep:
			continue // removed meanwhile
		case err != nil && sweep: // one does not keep the others from being looked at
			out.Incomplete = append(out.Incomplete, fmt.Sprintf("image %s: not read: %v", ref, err))
			continue
		case err != nil:
			return nil, err
		}
		if f.Files.Incomplete != "" {
			out.Incomplete = append(out.Incomplete, "image "+f.Name+": "+f.Files.Incomplete)
		}
		out.Images = append(out.Images, f.Name)
		out.Findings = append(out.Findings, audit.CheckImage(f)...)
	}
	for _, r := range ctrs {
		out.Containers = append(out.Containers, r.Name)
		f := e.containerFacts(ctx, r, k)
		if f.Files, err = e.auditFiles(ctx, r, len(o.Names) > 0); err != nil {
			return nil, err
		}
		if f.Files.Incomplete != "" {
			out.Incomplete = append(out.Incomplete, "container "+f.Name+": "+f.Files.Incomplete)
		}
		out.Findings = append(out.Findings, audit.CheckContainer(f)...)
	}
	audit.Sort(out.Findings)
	return out, nil
}

func (e *Engine) auditSubjects(ctx context.Context, o AuditOptions) (images []string, ctrs []*container.Record, err error) {
	images = o.Images
	for _, n := range o.Names {
		c, err := e.find(n)
		if err == nil {
			ctrs = append(ctrs, c.record())
			continue
		}
		if _, ierr := e.cfg.Images.Resolve(ctx, n, nil); ierr != nil {
			return nil, nil, notFound("No such container or image: %.200s", n)
		}
		images = append(images, n)
	}
	if len(o.Images)+len(o.Names) > 0 {
		return images, ctrs, nil
	}
	all, err := e.cfg.Images.All(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, i := range all {
		if len(i.RepoTags) > 0 {
			images = append(images, i.RepoTags[0])
		}
	}
	for _, c := range e.all() {
		if r := c.record(); r.Running() || o.All {
			ctrs = append(ctrs, r)
		}
	}
	slices.SortFunc(ctrs, func(a, b *container.Record) int { return strings.Compare(a.Name, b.Name) })
	return images, ctrs, nil
}

// imageFacts reads what the rules want to know of an image.
func (e *Engine) imageFacts(ctx context.Context, ref string, moved map[string]lineage.Moved, scanner *audit.Scanner) (f audit.Image, err error) {
	if img, err := e.cfg.Images.Resolve(ctx, ref, nil); err == nil && img.Disk != nil {
		return audit.Image{Name: ref, Disk: true, Files: audit.Files{Incomplete: "it is a disk with an operating system of its own, whose files are not read"}}, nil
	}
	img, s, release, err := e.imageStack(ctx, ref)
	if err != nil {
		return f, err
	}
	defer release()
	c := img.Config.Config
	f = audit.Image{Name: ref, User: c.User, Env: c.Env, Healthcheck: hasCheck(img)}
	for p := range c.ExposedPorts {
		f.Ports = append(f.Ports, p)
	}
	for _, h := range img.Config.History {
		f.History = append(f.History, h.CreatedBy)
	}
	if m, ok := moved[img.ID]; ok {
		f.Base, f.BaseNow = m.Parent.Base.Name, m.Now
		if m.Through != nil {
			f.Through = nameOf(m.Through)
		}
	}
	f.Files, err = scanner.Scan(ctx, s)
	return f, err
}

// auditFiles reads what a container has written into its root, from whichever kernel has it.
// One with a kernel of its own that does not run gets a machine for that only if named.
func (e *Engine) auditFiles(ctx context.Context, r *container.Record, named bool) (f audit.Files, err error) {
	if isSystem(r) {
		f.Incomplete = "it is a machine with its own operating system: what is in it is not read"
		return f, nil
	}
	if !onHost(r) && !r.Running() && !named {
		f.Incomplete = "what it has written is not read while it does not run, unless it is named"
		return f, nil
	}
	c, err := e.find(r.ID)
	if err != nil {
		f.Incomplete = "it was removed meanwhile"
		return f, nil
	}
	limits := audit.WrittenLimits
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, limits.Time)
	defer cancel()
	owned := sync.OnceValue(func() func(string) bool { // few containers have anything to ask for
		if img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform); err == nil {
			if dirs, _, err := e.cfg.Images.Root(ctx, img); err == nil { // the container keeps them
				return audit.Packaged(ctx, dirs)
			}
		}
		return func(string) bool { return false }
	})
	client, at, release, err := e.files(ctx, c)
	if err == nil {
		defer release()
		at.Skip = append(at.Skip, engineFiles...)
		var diff io.ReadCloser
		if diff, err = client.Diff(ctx, at); err == nil {
			defer diff.Close()
			stop := context.AfterFunc(ctx, func() { diff.Close() })
			defer stop()
			f = audit.Written(ctx, diff, limits, func(p string) bool { return owned()(p) })
		}
	}
	if whole.Err() != nil {
		return f, context.Cause(whole)
	}
	if err != nil {
		f.Incomplete = "what it has written is not read: " + err.Error()
	}
	return f, nil
}

func hasCheck(img *image.Image) bool {
	h := img.Config.Config.Healthcheck
	return h != nil && len(h.Test) > 0 && h.Test[0] != "NONE"
}

// containerFacts is what the rules want to know of a container.
func (e *Engine) containerFacts(ctx context.Context, r *container.Record, k *kin) audit.Container {
	h := r.HostConfig
	f := audit.Container{
		Name: r.Name, Image: r.Image.Ref, User: r.Config.User, Isolation: r.Isolation, Env: r.Config.Env, UserNS: r.UserNS != nil,
		Healthcheck: r.Config.Healthcheck != nil && len(r.Config.Healthcheck.Test) > 0 && r.Config.Healthcheck.Test[0] != "NONE",
		Privileged:  h.Privileged, ReadonlyRoot: h.ReadonlyRootfs, CapAdd: h.CapAdd, SecurityOpt: h.SecurityOpt, Memory: h.Memory,
	}
	if img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform); err == nil {
		f.ImageEnv = img.Config.Config.Env
	}
	switch {
	case h.PidsLimit == nil || *h.PidsLimit == 0:
		f.Pids = e.def.Pids
	case *h.PidsLimit > 0:
		f.Pids = *h.PidsLimit
	}
	for _, ns := range []struct {
		mode, name string
	}{{string(h.PidMode), "pid"}, {string(h.NetworkMode), "net"}, {string(h.IpcMode), "ipc"}, {string(h.UTSMode), "uts"}, {string(h.UsernsMode), "user"}, {string(h.CgroupnsMode), "cgroup"}} {
		if ns.mode == "host" && !(h.Privileged && ns.name == "cgroup") { // it has that anyway
			f.Host = append(f.Host, ns.name)
		}
	}
	for _, m := range r.Mounts {
		if m.Type == mount.TypeBind && !strings.HasPrefix(m.Source, e.cfg.Root+"/") {
			f.Mounts = append(f.Mounts, audit.Mount{Source: m.Source, Destination: m.Destination, Writable: m.RW})
		}
	}
	for _, d := range h.Devices {
		f.Devices = append(f.Devices, d.PathOnHost)
	}
	for port, list := range h.PortBindings {
		if len(list) == 0 {
			f.Ports = append(f.Ports, audit.Port{Container: port.String()})
		}
		for _, b := range list {
			p := audit.Port{Container: port.String(), HostPort: b.HostPort}
			if b.HostIP.IsValid() {
				p.HostIP = b.HostIP.String()
			}
			f.Ports = append(f.Ports, p)
		}
	}
	if i := k.graph.Named(image.Familiar(r.Image.Ref)); i != nil && i.ID != r.Image.ID {
		f.ImageMove = i.ID
	}
	return f
}
