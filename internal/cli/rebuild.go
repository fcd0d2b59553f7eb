package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/cli/buildopts"
)

func (a *app) rebuildCmd() *cobra.Command {
	var chain, all, dry, yes bool
	var how rebuilding
	var format string
	cmd := &cobra.Command{
		Use: "rebuild [OPTIONS] IMAGE", Short: "Build an image again, or all that stands on it",
		Long:    "Build IMAGE again from the definition that its build recorded, or, with --chain, those\nimages that stand on IMAGE and are outdated, parents before their children. Names go to the\nnew images; containers are not touched, and are listed at the end.\n\nBuilds by other clients (docker build, buildx, Compose) do not tell which directory\nthey took: --context tells. An image without a definition is re-based: its own layers are put on the new base, where\nthat is safe (same platform and release, and no file of its own that the two bases have\ndifferently). Values of build arguments that look like secrets are not recorded: they come\nfrom the environment.",
		Example: "tenon image rebuild --chain debian:bookworm --dry-run\ntenon image rebuild --chain debian:bookworm\ntenon image rebuild app:1\ntenon image rebuild --chain base:1 --context app:1=./app",
		Args:    exactArgs(1), ValidArgsFunction: a.completeFirst(a.imageNames),
	}
	f := cmd.Flags()
	f.BoolVar(&chain, "chain", false, "Rebuild the images that stand on IMAGE and are outdated")
	f.BoolVar(&all, "all", false, "With --chain: those that are not outdated, too")
	f.BoolVar(&dry, "dry-run", false, "Only show what would be done")
	f.BoolVarP(&yes, "yes", "y", false, "Build from definitions that this user did not record, too, without asking")
	f.BoolVar(&how.swap, "rebase", false, "Swap the base's layers where that is safe, instead of building again")
	f.BoolVar(&how.revision, "revision", false, "Of Git contexts, build the commit that the image was built from, not what its name there means now")
	f.StringArrayVar(&how.contexts, "context", nil, "Directory that an image is built from, if its build did not tell or it is elsewhere (IMAGE=DIRECTORY)")
	f.StringVar(&format, "format", "", "With --dry-run: "+inspectFormatUsage)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		steps, err := c.ImagePlan(ctx, args[0], chain, all)
		if err != nil {
			return err
		}
		if err := how.check(steps); err != nil {
			return err
		}
		for i := range steps {
			a.settle(ctx, c, &steps[i], how)
		}
		if dry && format != "" {
			return a.printOne(steps, format)
		}
		if len(steps) == 0 {
			fmt.Fprintf(a.out, "Nothing that stands on %s is outdated.\n", args[0])
			return nil
		}
		if !dry && !yes {
			if err := a.agree(steps); err != nil {
				return err
			}
		}
		return a.rebuild(ctx, c, steps, dry)
	})
	return cmd
}

// rebuilding is what a user says of how images are made anew.
type rebuilding struct {
	swap, revision bool
	contexts       []string // IMAGE=DIRECTORY
}

// check looks whether all images that have a directory are to be made.
func (h rebuilding) check(steps []imageapi.Step) error {
	for _, c := range h.contexts {
		name, dir, ok := strings.Cut(c, "=")
		if !ok || name == "" || dir == "" {
			return fmt.Errorf("--context %q: want IMAGE=DIRECTORY", c)
		}
		if !slices.ContainsFunc(steps, func(s imageapi.Step) bool { return named(s, name) }) {
			return fmt.Errorf("--context %s: %s is not to be built", c, name)
		}
	}
	return nil
}

// named tells whether a step's image has a name.
func named(s imageapi.Step, name string) bool {
	if !strings.Contains(name[strings.LastIndexByte(name, '/')+1:], ":") {
		name += ":latest"
	}
	return slices.Contains(s.Names, name)
}

// place puts what the user says into a step's definition.
func (h rebuilding) place(s *imageapi.Step) error {
	d := s.Definition
	if d == nil {
		return nil
	}
	for _, c := range h.contexts {
		name, dir, _ := strings.Cut(c, "=")
		if !named(*s, name) {
			continue
		}
		if buildopts.Remote(d.Context) {
			return fmt.Errorf("it is built from %s, not from a directory", d.Context)
		}
		at, err := filepath.Abs(dir)
		if err != nil {
			return err
		}
		own := *d
		file := d.Dockerfile
		if rel, err := filepath.Rel(d.Context, file); filepath.IsAbs(file) && err == nil {
			file = rel
		}
		if file != "" && !filepath.IsLocal(file) {
			return fmt.Errorf("its Dockerfile %s is not in its context: build it by tenon build", d.Dockerfile)
		}
		if file == "" {
			file = "Dockerfile"
		}
		own.Context, own.Dockerfile, own.Host, own.Sent = at, filepath.Join(at, file), "", false
		if _, err := os.Stat(own.Dockerfile); err != nil {
			return fmt.Errorf("%s has no %s, which it was built from: build it by tenon build", dir, file)
		}
		s.Do, s.Definition = imageapi.StepBuild, &own
		return nil
	}
	if h.revision && s.Do == imageapi.StepBuild && d.Revision != "" {
		at, ok := buildopts.AtRevision(d.Context, d.Revision)
		if !ok {
			return fmt.Errorf("its context %s can't be had at another commit", d.Context)
		}
		own := *d
		own.Context = at
		s.Definition = &own
	}
	return nil
}

// settle decides what only this side knows: whether the context is here, and, for a
// swap whose new base is here, whether it is safe.
func (a *app) settle(ctx context.Context, c *client.Client, s *imageapi.Step, how rebuilding) {
	// What the user says now needs no seal, what the daemon says does: that is looked at
	// before the two are one.
	sealed := s.Definition != nil && buildopts.Sealed(configDir(a.config), c.Host(), s.Names, *s.Definition)
	if err := how.place(s); err != nil {
		s.Do, s.Why = imageapi.StepNone, err.Error()
		return
	}
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
		if gone == "" && !how.swap {
			s.Why = takes(s.Definition) // in this side's words: it is what is sent
			s.Unconfirmed = !sealed
			if s.Unconfirmed {
				s.Why += "; not recorded by you here: asks first"
			}
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
	} else if d := s.Definition; d != nil && d.Sent {
		s.Why += "; --context " + stepName(*s) + "=DIRECTORY builds it"
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

// agree asks for what is built from definitions that may be anybody's.
func (a *app) agree(steps []imageapi.Step) error {
	var text strings.Builder
	for _, s := range steps {
		if s.Unconfirmed {
			fmt.Fprintf(&text, "  %s: %s\n", stepName(s), takes(s.Definition))
		}
	}
	if text.Len() == 0 {
		return nil
	}
	_ = writeText(a.out, []byte("The daemon says so, and you did not record it here:\n"+text.String())) // the question fails, too
	if !a.confirm("Do you want to give the daemon these files, and build?") {
		return errors.New("nothing was done: look at what is built from where, then give --yes (or build it once by tenon build)")
	}
	return nil
}

func stepName(s imageapi.Step) string {
	if len(s.Names) > 0 {
		return s.Names[0]
	}
	return shortID(s.ID, false)
}

// takes says what a build takes of this machine.
func takes(d *imageapi.Definition) string {
	out := "built from " + d.Context
	if at := d.Revision; at != "" && !strings.Contains(d.Context, at) {
		out += ", which was at " + at[:min(len(at), 12)]
	}
	// It is read wherever it is; of a remote context it is a part.
	if d.Dockerfile != "" && !buildopts.Remote(d.Context) && filepath.Dir(d.Dockerfile) != filepath.Clean(d.Context) {
		out += ", Dockerfile " + d.Dockerfile
	}
	for _, part := range []struct {
		what string
		list []string
	}{{"context", d.Contexts}, {"secret", d.Secrets}, {"ssh", d.SSH}} {
		for _, v := range part.list {
			out += ", " + part.what + " " + v
		}
	}
	for _, v := range d.Args {
		if !strings.Contains(v, "=") {
			out += ", variable " + v
		}
	}
	return out
}

func (a *app) rebuild(ctx context.Context, c *client.Client, steps []imageapi.Step, dry bool) error {
	var errs []error
	var left []string
	failed := map[string]bool{} // by name
	for i, s := range steps {
		name := stepName(s)
		word := map[string]string{imageapi.StepBuild: "build", imageapi.StepRebase: "re-base"}[s.Do]
		if word == "" {
			word = "can't be rebuilt"
		}
		_ = writeText(a.out, fmt.Appendf(nil, "[%d/%d] %s: %s%s%s (%s)\n", i+1, len(steps), name, word, before(" on ", s.Base), before(", of ", ownerText(s.Owners)), s.Why))
		if dry {
			continue
		}
		var err error
		switch {
		case ctx.Err() != nil:
			err = errors.New("not begun")
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
			errs = append(errs, fmt.Errorf("%s: %w (%s)", name, err, "it is as it was"))
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

// before is s behind what stands before it, if there is one.
func before(what, s string) string {
	if s == "" {
		return ""
	}
	return what + s
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
	// It has a build to cancel.
	cmd.Cancel, cmd.WaitDelay = func() error { return cmd.Process.Signal(syscall.SIGINT) }, 10*time.Second
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
