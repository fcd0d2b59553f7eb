package cli

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

type cpOptions struct{ archive, follow, quiet bool }

func (a *app) cpCmd() *cobra.Command {
	var o cpOptions
	cmd := &cobra.Command{
		Use:   "cp [OPTIONS] CONTAINER:SRC_PATH DEST_PATH|-\n        tenon cp [OPTIONS] SRC_PATH|- CONTAINER:DEST_PATH",
		Short: "Copy files/folders between a container and the local filesystem",
		Long: `Copy files in or out of a container, running or not.

A directory is copied into DEST_PATH if that exists, and as DEST_PATH if it does
not; SRC_PATH/. stands for what is in it. '-' is a tar archive on standard input
or output.`,
		Example: "tenon cp web:/etc/nginx/nginx.conf .\ntenon cp ./site/. web:/srv\ntar c data | tenon cp - web:/srv",
		Args:    exactArgs(2),
	}
	f := cmd.Flags()
	f.BoolVarP(&o.archive, "archive", "a", false, "Archive mode (copy all uid/gid information)")
	f.BoolVarP(&o.follow, "follow-link", "L", false, "Always follow symbol link in SRC_PATH")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "Suppress progress output during copy")
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		names, _ := a.complete(prefix, a.containerNames(all))
		for i := range names {
			names[i] += ":"
		}
		return names, cobra.ShellCompDirectiveDefault | cobra.ShellCompDirectiveNoSpace
	}
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		from, src := splitCopyArg(args[0])
		to, dst := splitCopyArg(args[1])
		if src == "" || dst == "" {
			return errors.New("neither SRC_PATH nor DEST_PATH can be empty")
		}
		switch {
		case from != "" && to != "":
			return errors.New("copying between containers is not supported")
		case from != "":
			return a.copyOut(ctx, c, from, src, dst, o)
		case to != "":
			return a.copyIn(ctx, c, src, to, dst, o)
		}
		return errors.New("must specify at least one container source")
	})
	return cmd
}

// splitCopyArg splits NAME:PATH; the name is empty for a local path.
func splitCopyArg(arg string) (name, p string) {
	if filepath.IsAbs(arg) {
		return "", arg
	}
	name, p, ok := strings.Cut(arg, ":")
	if !ok || strings.HasPrefix(name, ".") {
		return "", arg
	}
	return name, p
}

// place is one end of a copy.
type place struct {
	path   string // as given, absolute, with its trailing slash or dot
	exists bool
	dir    bool
}

// wantsDir tells whether the path itself says that it is a directory.
func (p place) wantsDir() bool {
	return strings.HasSuffix(p.path, "/") || strings.HasSuffix(p.path, "/.") || p.path == "."
}

// contents tells whether the path names what is in a directory.
func (p place) contents() bool {
	return strings.HasSuffix(p.path, "/.") || p.path == "." || path.Clean(p.path) == "/"
}

// planCopy says into which directory src goes, and under which name; the name
// is "." when what is in src goes directly into dir. The rules are Docker's.
func planCopy(src, dst place) (dir, name string, err error) {
	base := path.Base(path.Clean(src.path))
	switch {
	case dst.exists && dst.dir && src.dir && src.contents():
		return path.Clean(dst.path), ".", nil
	case dst.exists && dst.dir:
		return path.Clean(dst.path), base, nil
	case dst.exists && src.dir:
		return "", "", fmt.Errorf("cannot copy directory %s over the file %s", src.path, dst.path)
	case dst.exists && dst.wantsDir():
		return "", "", fmt.Errorf("%s is not a directory", dst.path)
	case !src.dir && dst.wantsDir():
		return "", "", fmt.Errorf("no such directory: %s", dst.path)
	}
	clean := path.Clean(dst.path)
	return path.Dir(clean), path.Base(clean), nil
}

// containerStat asks for what is at a path in a container; a path that does
// not exist is no error.
func containerStat(ctx context.Context, c *client.Client, name, p string) (container.PathStat, bool, error) {
	var st container.PathStat
	resp, err := c.Do(ctx, client.Request{Method: http.MethodHead, Path: containerPath(name, "/archive"), Query: url.Values{"path": {p}}})
	if err != nil {
		var e *client.Error
		if errors.As(err, &e) && e.Status == http.StatusNotFound {
			// A HEAD has no body: is it the path or the container?
			if cerr := c.Get(ctx, containerPath(name, "/json"), nil, &json.RawMessage{}); cerr != nil {
				return st, false, cerr
			}
			return st, false, nil
		}
		return st, false, err
	}
	defer resp.Body.Close()
	st, err = decodePathStat(resp.Header)
	return st, err == nil, err
}

func decodePathStat(h http.Header) (st container.PathStat, err error) {
	raw, err := base64.StdEncoding.DecodeString(h.Get("X-Docker-Container-Path-Stat"))
	if err == nil {
		err = json.Unmarshal(raw, &st)
	}
	if err != nil {
		return st, fmt.Errorf("the daemon's description of the path is not understood: %w", err)
	}
	return st, nil
}

// inContainer makes a path of a container absolute and keeps its trailing
// slash or dot.
func inContainer(p string) string {
	return keepTail(p, path.Join("/", p))
}

func keepTail(given, clean string) string {
	switch {
	case given == "." || strings.HasSuffix(given, "/."):
		return strings.TrimSuffix(clean, "/") + "/."
	case strings.HasSuffix(given, "/") && clean != "/":
		return clean + "/"
	}
	return clean
}

// linkTarget is where a link at p leads.
func linkTarget(p, target string) string {
	if path.IsAbs(target) {
		return target
	}
	return path.Join(path.Dir(path.Clean(p)), target)
}

func (a *app) copyOut(ctx context.Context, c *client.Client, name, src, dst string, o cpOptions) error {
	src = inContainer(src)
	ask := src
	if o.follow {
		st, exists, err := containerStat(ctx, c, name, src)
		if err != nil {
			return err
		}
		if exists && st.Mode&os.ModeSymlink != 0 {
			ask = linkTarget(src, st.LinkTarget)
		}
	}
	resp, err := c.Do(ctx, client.Request{Method: http.MethodGet, Path: containerPath(name, "/archive"), Query: url.Values{"path": {ask}}})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if dst == "-" {
		if _, is := terminal(a.out); is {
			return errors.New("cowardly refusing to write a tar archive to a terminal")
		}
		_, err := io.Copy(a.out, resp.Body)
		return err
	}
	st, err := decodePathStat(resp.Header)
	if err != nil {
		return err
	}
	to, err := localDestination(dst)
	if err != nil {
		return err
	}
	dir, newName, err := planCopy(place{path: src, exists: true, dir: st.Mode.IsDir()}, to)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	x := &extractor{root: root, name: newName, own: o.archive}
	if err := x.extract(bufio.NewReaderSize(resp.Body, 256<<10)); err != nil {
		return err
	}
	a.copied(x.bytes, filepath.Join(dir, newName), o)
	return nil
}

// copied tells a user at a terminal what was done.
func (a *app) copied(n int64, to string, o cpOptions) {
	if _, is := terminal(a.err); is && !o.quiet {
		fmt.Fprintf(a.err, "Successfully copied %s to %s\n", units.HumanSize(float64(n)), to)
	}
}

// localDestination describes a local path, links followed.
func localDestination(p string) (place, error) {
	abs, err := filepath.Abs(p)
	if err != nil {
		return place{}, err
	}
	for range 40 {
		fi, err := os.Lstat(abs)
		switch {
		case errors.Is(err, os.ErrNotExist):
			if _, err := os.Stat(filepath.Dir(abs)); err != nil {
				return place{}, fmt.Errorf("invalid output path: directory %q does not exist", filepath.Dir(abs))
			}
			return place{path: keepTail(p, abs)}, nil
		case err != nil:
			return place{}, err
		case fi.Mode()&os.ModeSymlink == 0:
			if !fi.IsDir() && !fi.Mode().IsRegular() {
				return place{}, fmt.Errorf("invalid output path: %q must be a directory or a regular file", p)
			}
			return place{path: keepTail(p, abs), exists: true, dir: fi.IsDir()}, nil
		}
		target, err := os.Readlink(abs)
		if err != nil {
			return place{}, err
		}
		abs = linkTarget(abs, target)
	}
	return place{}, fmt.Errorf("%s: too many links", p)
}

func (a *app) copyIn(ctx context.Context, c *client.Client, src, name, dst string, o cpOptions) error {
	dst = inContainer(dst)
	to := place{path: dst}
	for range 40 {
		st, exists, err := containerStat(ctx, c, name, to.path)
		if err != nil {
			return err
		}
		to.exists, to.dir = exists, st.Mode.IsDir()
		if !exists || st.Mode&os.ModeSymlink == 0 {
			if exists && !to.dir && !st.Mode.IsRegular() {
				return fmt.Errorf("destination %q must be a directory or a regular file", name+":"+dst)
			}
			break
		}
		to.path = keepTail(dst, linkTarget(to.path, st.LinkTarget))
	}
	if src == "-" {
		if !to.dir {
			return fmt.Errorf("destination %q must be a directory", name+":"+dst)
		}
		return putArchive(ctx, c, name, to.path, a.in, o)
	}
	abs, err := filepath.Abs(src)
	if err != nil {
		return err
	}
	from := place{path: keepTail(src, abs), exists: true}
	stat := os.Lstat
	if o.follow || from.wantsDir() {
		stat = os.Stat
	}
	fi, err := stat(abs)
	if err != nil {
		return err
	}
	from.dir = fi.IsDir()
	if !from.dir && from.wantsDir() {
		return fmt.Errorf("%s is not a directory", src)
	}
	dir, newName, err := planCopy(from, to)
	if err != nil {
		return err
	}
	pr, pw := io.Pipe()
	p := &packer{follow: o.follow || from.wantsDir()}
	go func() {
		bw := bufio.NewWriterSize(pw, 256<<10)
		p.tw = tar.NewWriter(bw)
		err := p.pack(abs, newName)
		if err == nil {
			err = errors.Join(p.tw.Close(), bw.Flush())
		}
		pw.CloseWithError(err)
	}()
	err = putArchive(ctx, c, name, dir, pr, o)
	pr.CloseWithError(errors.New("the daemon stopped reading"))
	if err != nil {
		return err
	}
	a.copied(p.bytes.Load(), name+":"+path.Join(dir, newName), o)
	return nil
}

func putArchive(ctx context.Context, c *client.Client, name, dir string, r io.Reader, o cpOptions) error {
	q := url.Values{"path": {dir}, "noOverwriteDirNonDir": {"true"}}
	if o.archive {
		q.Set("copyUIDGID", "true")
	}
	w := &watchedReader{r: r}
	err := c.Call(ctx, client.Request{
		Method: http.MethodPut, Path: containerPath(name, "/archive"), Query: q, Body: w, Header: http.Header{"Content-Type": {"application/x-tar"}},
	}, nil)
	// What went wrong on this side explains the daemon's complaint about a cut
	// archive.
	if rerr := w.failure(); rerr != nil {
		return rerr
	}
	return err
}
