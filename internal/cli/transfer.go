package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

func (a *app) pullCmd() *cobra.Command {
	var allTags, quiet bool
	var decrypt []string
	var platform string
	lazy := choice{allowed: []string{"always", "auto", "never"}}
	cmd := &cobra.Command{
		Use: "pull [OPTIONS] NAME[:TAG|@DIGEST]", Short: "Download an image from a registry",
		Example: "tenon pull debian:12\ntenon pull --lazy registry.example.com/team/web:2\ntenon pull --platform linux/arm64 registry.example.com/team/web@sha256:…\n" +
			"tenon pull --decryption-key team.key registry.example.com/team/secret",
		Args: exactArgs(1), ValidArgsFunction: a.completeFirst(a.imageNames),
	}
	f := cmd.Flags()
	f.BoolVarP(&allTags, "all-tags", "a", false, "Download all tagged images in the repository")
	decryptionFlag(f, &decrypt)
	f.Bool("disable-content-trust", true, "Skip image verification")
	f.Var(&lazy, "lazy", `Leave the files at the registry until they are read: "always" (the image must be an eStargz one), "auto" (if it is) or "never"; default: the daemon's images.lazy`)
	f.Lookup("lazy").NoOptDefVal = "always"
	f.StringVar(&platform, "platform", "", "Set platform if server is multi-platform capable")
	f.BoolVarP(&quiet, "quiet", "q", false, "Suppress verbose output")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		ref := args[0]
		ctx, err := withImageKeys(ctx, decrypt, nil, nil)
		if err != nil {
			return err
		}
		repo, tag := splitTag(ref)
		switch {
		case allTags && (tag != "" || strings.Contains(ref, "@")):
			return errors.New("tag can't be used with --all-tags/-a")
		case !allTags && tag == "" && !strings.Contains(ref, "@"):
			if !quiet {
				fmt.Fprintln(a.out, "Using default tag: latest")
			}
		}
		if allTags {
			return a.pullFrom(ctx, c, url.Values{"fromImage": {repo}}, repo, platform, lazy.value, a.out, quiet)
		}
		if err := a.pullImage(ctx, c, ref, platform, lazy.value, a.out, quiet); err != nil {
			return err
		}
		fmt.Fprintln(a.out, canonicalName(ref))
		return nil
	})
	return cmd
}

// pullImage pulls one image and shows the progress on w.
func (a *app) pullImage(ctx context.Context, c *client.Client, ref, platform, lazy string, w io.Writer, quiet bool) error {
	repo, tag := ref, ""
	if name, digest, ok := strings.Cut(ref, "@"); ok {
		repo, _ = splitTag(name)
		tag = digest
	} else if repo, tag = splitTag(ref); tag == "" {
		tag = "latest"
	}
	return a.pullFrom(ctx, c, url.Values{"fromImage": {repo}, "tag": {tag}}, repo, platform, lazy, w, quiet)
}

// lazyOf is what a pull is asked for by a run's --pull.
func lazyOf(pull string) string {
	if pull == "lazy" {
		return "always"
	}
	return ""
}

func (a *app) pullFrom(ctx context.Context, c *client.Client, q url.Values, repo, platform, lazy string, w io.Writer, quiet bool) error {
	auth, err := a.authHeader(repo)
	if err != nil {
		return err
	}
	if platform != "" {
		q.Set("platform", strings.ToLower(platform))
	}
	if lazy != "" {
		q.Set("lazy", lazy)
	}
	resp, err := c.Do(ctx, client.Request{Method: http.MethodPost, Path: "/images/create", Query: q, Header: auth})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return newProgress(w, quiet).copy(resp.Body, nil)
}

func (a *app) pushCmd() *cobra.Command {
	var allTags, quiet bool
	var encrypt, decrypt []string
	var layers []int
	var platform string
	cmd := &cobra.Command{
		Use: "push [OPTIONS] NAME[:TAG]", Short: "Upload an image to a registry",
		Example: "tenon push registry.example.com/team/web:2\ntenon push -a registry.example.com/team/web\n" +
			"tenon push --encryption-key jwe:team.pem registry.example.com/team/secret",
		Args: exactArgs(1), ValidArgsFunction: a.completeFirst(a.imageNames),
	}
	f := cmd.Flags()
	f.BoolVarP(&allTags, "all-tags", "a", false, "Push all tags of an image to the repository")
	decryptionFlag(f, &decrypt)
	f.StringArrayVar(&encrypt, "encryption-key", nil, "Encrypt the image for a recipient: jwe:FILE (a public key) or pkcs7:FILE (a certificate)")
	f.IntSliceVar(&layers, "encrypt-layer", nil, "Layer to encrypt, 0 the lowest, -1 the highest (default: all)")
	f.Bool("disable-content-trust", true, "Skip image signing")
	f.StringVar(&platform, "platform", "", `Push a platform-specific manifest as a single-platform image (e.g., "linux/amd64")`)
	f.BoolVarP(&quiet, "quiet", "q", false, "Suppress verbose output")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		ref := args[0]
		ctx, err := withImageKeys(ctx, decrypt, encrypt, layers)
		if err != nil {
			return err
		}
		repo, tag := splitTag(ref)
		q := url.Values{}
		switch {
		case strings.Contains(ref, "@"):
			return errors.New("cannot push a digest reference")
		case allTags && tag != "":
			return errors.New("tag can't be used with --all-tags/-a")
		case allTags:
		case tag == "":
			tag = "latest"
			if !quiet {
				fmt.Fprintln(a.out, "Using default tag: latest")
			}
			fallthrough
		default:
			q.Set("tag", tag)
		}
		if platform != "" {
			p, err := platformJSON(platform)
			if err != nil {
				return err
			}
			q.Set("platform", p)
		}
		auth, err := a.authHeader(repo)
		if err != nil {
			return err
		}
		resp, err := c.Do(ctx, client.Request{Method: http.MethodPost, Path: "/images/" + escapeImage(repo) + "/push", Query: q, Header: auth})
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if err := newProgress(a.out, quiet).copy(resp.Body, nil); err != nil {
			return err
		}
		if quiet {
			fmt.Fprintln(a.out, canonicalName(ref))
		}
		return nil
	})
	return cmd
}

func (a *app) saveCmd() *cobra.Command {
	var output string
	var platforms []string
	cmd := &cobra.Command{
		Use: "save [OPTIONS] IMAGE [IMAGE...]", Short: "Save one or more images to a tar archive (streamed to STDOUT by default)",
		Example: "tenon save -o web.tar web:2\ntenon save web:2 | ssh other tenon load",
		Args:    minArgs(1), ValidArgsFunction: a.completeAll(a.imageNames),
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "Write to a file, instead of STDOUT")
	cmd.Flags().StringSliceVar(&platforms, "platform", nil, `Save only the given platform variant (e.g., "linux/amd64")`)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		q := url.Values{"names": args}
		for _, p := range platforms {
			j, err := platformJSON(p)
			if err != nil {
				return err
			}
			q.Add("platform", j)
		}
		return a.download(ctx, c, "/images/get", q, output)
	})
	return cmd
}

func (a *app) exportCmd() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "export [OPTIONS] CONTAINER", Short: "Export a container's filesystem as a tar archive",
		Example: "tenon export -o root.tar web\ntenon export web | tar t",
		Args:    exactArgs(1), ValidArgsFunction: a.completeFirst(a.containerNames(all)),
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "Write to a file, instead of STDOUT")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		return a.download(ctx, c, containerPath(args[0], "/export"), nil, output)
	})
	return cmd
}

// download streams an answer to standard output, or into a file that appears
// only when it is complete.
func (a *app) download(ctx context.Context, c *client.Client, path string, q url.Values, output string) error {
	if _, is := terminal(a.out); output == "" && is {
		return errors.New("cowardly refusing to save to a terminal. Use the -o flag or redirect")
	}
	resp, err := c.Do(ctx, client.Request{Method: http.MethodGet, Path: path, Query: q})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if output == "" {
		_, err := io.Copy(a.out, resp.Body)
		return err
	}
	if fi, err := os.Stat(output); err == nil && !fi.Mode().IsRegular() {
		// /dev/null, a pipe: there is nothing to replace.
		f, err := os.OpenFile(output, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, resp.Body)
		return errors.Join(err, f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(output), "."+filepath.Base(output)+"-")
	if err != nil {
		return err
	}
	_, err = io.Copy(f, resp.Body)
	err = errors.Join(err, f.Chmod(0o600), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), output)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

func (a *app) loadCmd() *cobra.Command {
	var input string
	var platforms []string
	var quiet bool
	var disk diskFlags
	var decrypt []string
	cmd := &cobra.Command{
		Use: "load [OPTIONS] [FILE]", Short: "Load an image from a tar archive, a disk or STDIN",
		Long: "Load images from a docker archive or an OCI layout, as a tar file, also compressed.\n" +
			"A disk with an operating system (qcow2 or raw, also compressed) becomes a disk image,\n" +
			"with the file's name unless --tag says another: it runs with --isolation machine.",
		Example: "tenon load -i web.tar\ntenon load < web.tar.gz\ntenon load debian-12.qcow2\ntenon load -i disk.raw.xz --tag os:1 --firmware uefi",
		Args:    maxArgs(1),
	}
	f := cmd.Flags()
	decryptionFlag(f, &decrypt)
	f.StringVarP(&input, "input", "i", "", "Read from tar archive file, instead of STDIN")
	f.StringSliceVar(&platforms, "platform", nil, `Load only the given platform variant (e.g., "linux/amd64")`)
	f.BoolVarP(&quiet, "quiet", "q", false, "Suppress the load output")
	f.VarP(&disk.tags, "tag", "t", "Name of the disk image (name:tag)")
	disk.add(f)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		ctx, err := withImageKeys(ctx, decrypt, nil, nil)
		if err != nil {
			return err
		}
		in := a.in
		if len(args) == 1 {
			if input != "" {
				return errors.New("give the file once: as an argument, or with --input")
			}
			input = args[0]
		}
		if input != "" {
			file, err := os.Open(input)
			if err != nil {
				return err
			}
			defer file.Close()
			in = file
		} else if _, is := terminal(a.in); is {
			return errors.New("requested load from stdin, but stdin is empty")
		}
		_, tty := terminal(a.out)
		q := url.Values{"quiet": {"1"}}
		if tty && !quiet {
			q.Set("quiet", "0")
		}
		for _, p := range platforms {
			j, err := platformJSON(p)
			if err != nil {
				return err
			}
			q.Add("platform", j)
		}
		disk.query(q)
		for _, t := range disk.tags {
			q.Add("tag", t)
		}
		if input != "" {
			q.Set("suggested", diskName(input))
		}
		body, err := plain(ctx, in)
		if err != nil {
			return err
		}
		defer body.Close()
		resp, err := c.Do(ctx, client.Request{
			Method: http.MethodPost, Path: "/images/load", Query: q, Body: body,
			Header: http.Header{"Content-Type": {"application/x-tar"}},
		})
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") {
			p := newProgress(a.out, false)
			if quiet {
				return a.loadedOnly(resp.Body)
			}
			return p.copy(resp.Body, nil)
		}
		_, err = io.Copy(a.out, resp.Body)
		return err
	})
	return cmd
}

// loadedOnly prints of a load's messages only the images' names.
func (a *app) loadedOnly(r io.Reader) error {
	var b bytes.Buffer
	err := newProgress(&b, false).copy(r, nil)
	for line := range strings.Lines(b.String()) {
		if strings.HasPrefix(line, "Loaded image") {
			fmt.Fprint(a.out, line)
		}
	}
	return err
}

func (a *app) importCmd() *cobra.Command {
	var changes list
	var message, platform string
	var disk diskFlags
	cmd := &cobra.Command{
		Use: "import [OPTIONS] file|URL|- [REPOSITORY[:TAG]]", Short: "Import the contents from a tarball to create a filesystem image",
		Long: "Make an image with one layer of a tar archive of files. A disk with an operating system\n" +
			"(qcow2 or raw) becomes a disk image.",
		Example: "tenon import root.tar base:1\ntar c -C rootfs . | tenon import -c 'CMD [\"sh\"]' - base:1",
		Args:    rangeArgs(1, 2),
	}
	f := cmd.Flags()
	f.VarP(&changes, "change", "c", "Apply Dockerfile instruction to the created image")
	f.StringVarP(&message, "message", "m", "", "Set commit message for imported image")
	f.StringVar(&platform, "platform", "", "Set platform if server is multi-platform capable")
	disk.add(f)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		q := url.Values{"message": {message}, "changes": changes}
		disk.query(q)
		if len(args) == 2 {
			repo, tag := splitTag(args[1])
			q.Set("repo", repo)
			q.Set("tag", tag)
		}
		if platform != "" {
			q.Set("platform", strings.ToLower(platform))
		}
		var body any
		switch {
		case strings.HasPrefix(args[0], "http://"), strings.HasPrefix(args[0], "https://"):
			q.Set("fromSrc", args[0])
		case args[0] == "-":
			q.Set("fromSrc", "-")
			body = a.in
		default:
			file, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer file.Close()
			q.Set("fromSrc", "-")
			body = io.Reader(file)
		}
		resp, err := c.Do(ctx, client.Request{Method: http.MethodPost, Path: "/images/create", Query: q, Body: body, Header: http.Header{"Content-Type": {"application/x-tar"}}})
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		return newProgress(a.out, false).copy(resp.Body, nil)
	})
	return cmd
}

func (a *app) searchCmd() *cobra.Command {
	return &cobra.Command{
		Use: "search TERM", Short: "Search a registry for images (comes later)", Hidden: true, DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("tenon search comes later: use the registry's own search")
		},
	}
}
