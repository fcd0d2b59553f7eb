package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

// inspected is one object as the server describes it, and the typed value that
// templates with Go field names ({{.ID}}) are tried on first.
type inspected struct {
	raw   json.RawMessage
	typed any
}

// inspector fetches one kind of object.
type inspector struct {
	kind  string
	path  func(name string) string
	typed func() any
}

func containerInspector() inspector {
	return inspector{"container", func(n string) string { return "/containers/" + url.PathEscape(n) + "/json" }, func() any { return &container.InspectResponse{} }}
}

func imageInspector() inspector {
	return inspector{"image", func(n string) string { return "/images/" + escapeImage(n) + "/json" }, func() any { return &image.InspectResponse{} }}
}

func networkInspector() inspector {
	return inspector{"network", func(n string) string { return "/networks/" + url.PathEscape(n) }, func() any { return &network.Inspect{} }}
}

func volumeInspector() inspector {
	return inspector{"volume", func(n string) string { return "/volumes/" + url.PathEscape(n) }, func() any { return &volume.Volume{} }}
}

func (i inspector) get(ctx context.Context, c *client.Client, name string, q url.Values) (inspected, error) {
	var raw json.RawMessage
	if err := c.Get(ctx, i.path(name), q, &raw); err != nil {
		return inspected{}, err
	}
	typed := i.typed()
	if json.Unmarshal(raw, typed) != nil {
		typed = nil // a server of another version: templates get the raw object
	}
	return inspected{raw, typed}, nil
}

// escapeImage escapes an image name for a path; its slashes stay.
func escapeImage(name string) string {
	return strings.ReplaceAll(url.PathEscape(name), "%2F", "/")
}

func (a *app) inspectCmd() *cobra.Command {
	var format, kind string
	var size bool
	cmd := &cobra.Command{
		Use:               "inspect [OPTIONS] NAME|ID [NAME|ID...]",
		Short:             "Return low-level information on Docker objects",
		Long:              "Show everything the engine knows about containers, images, networks and volumes.",
		Example:           "tenon inspect web\ntenon inspect -f '{{.State.ExitCode}}' job\ntenon inspect --type volume data",
		Args:              minArgs(1),
		ValidArgsFunction: a.completeAll(a.containerNames(all), a.imageNames, a.networkNames, a.volumeNames),
	}
	f := cmd.Flags()
	f.StringVarP(&format, "format", "f", "", inspectFormatUsage)
	f.BoolVarP(&size, "size", "s", false, "Display total file sizes if the type is container")
	f.StringVar(&kind, "type", "", "Only inspect objects of the given type (container, image, network, volume)")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, names []string) error {
		var from []inspector
		for _, i := range []inspector{containerInspector(), imageInspector(), networkInspector(), volumeInspector()} {
			if kind == "" || kind == i.kind {
				from = append(from, i)
			}
		}
		if len(from) == 0 {
			return fmt.Errorf("%q is not a valid value for --type", kind)
		}
		return a.inspectAll(ctx, c, names, format, sizeQuery(size), from...)
	})
	return cmd
}

func sizeQuery(size bool) url.Values {
	if size {
		return url.Values{"size": {"1"}}
	}
	return nil
}

// inspectGroup is the inspect verb of a group: container, image, network, volume.
func (a *app) inspectGroup(i inspector, names completer) func(*app) *cobra.Command {
	return func(*app) *cobra.Command {
		var format, platform string
		var size, verbose bool
		upper := strings.ToUpper(i.kind)
		cmd := &cobra.Command{
			Use:               fmt.Sprintf("inspect [OPTIONS] %s [%s...]", upper, upper),
			Short:             fmt.Sprintf("Display detailed information on one or more %ss", i.kind),
			Example:           fmt.Sprintf("tenon %s inspect NAME\ntenon %s inspect -f '{{json .}}' NAME", i.kind, i.kind),
			Args:              minArgs(1),
			ValidArgsFunction: a.completeAll(names),
		}
		f := cmd.Flags()
		f.StringVarP(&format, "format", "f", "", inspectFormatUsage)
		switch i.kind {
		case "container":
			f.BoolVarP(&size, "size", "s", false, "Display total file sizes")
		case "image":
			f.StringVar(&platform, "platform", "", "Inspect a specific platform of the multi-platform image")
		case "network":
			f.BoolVarP(&verbose, "verbose", "v", false, "Verbose output for diagnostics")
		}
		cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
			q := sizeQuery(size)
			if verbose {
				q = url.Values{"verbose": {"1"}}
			}
			if platform != "" {
				p, err := platformJSON(platform)
				if err != nil {
					return err
				}
				q = url.Values{"platform": {p}}
			}
			return a.inspectAll(ctx, c, args, format, q, i)
		})
		return cmd
	}
}

// inspectAll looks every name up in the given kinds, in this order, prints
// what was found and returns an error that names what was not.
func (a *app) inspectAll(ctx context.Context, c *client.Client, names []string, format string, q url.Values, from ...inspector) error {
	var found []inspected
	var errs []error
	for _, name := range names {
		obj, err := inspectOne(ctx, c, name, q, from)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		found = append(found, obj)
	}
	if err := a.printInspected(found, format); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func inspectOne(ctx context.Context, c *client.Client, name string, q url.Values, from []inspector) (inspected, error) {
	var err error
	for _, i := range from {
		var obj inspected
		if obj, err = i.get(ctx, c, name, q); err == nil {
			return obj, nil
		}
		var e *client.Error
		if !errors.As(err, &e) || e.Status != http.StatusNotFound && e.Status != http.StatusBadRequest {
			return obj, err
		}
	}
	if len(from) > 1 {
		err = fmt.Errorf("Error: No such object: %s", name)
	}
	return inspected{}, err
}

// joinRaw makes a JSON array of what the server sent, byte for byte.
func joinRaw(list []inspected) []byte {
	var raws [][]byte
	for _, o := range list {
		raws = append(raws, bytes.TrimSpace(o.raw))
	}
	return append(append([]byte{'['}, bytes.Join(raws, []byte{','})...), ']')
}

func (a *app) printInspected(list []inspected, format string) error {
	if format == "" {
		var out bytes.Buffer
		if err := json.Indent(&out, joinRaw(list), "", "    "); err != nil {
			return err
		}
		out.WriteByte('\n')
		_, err := a.out.Write(out.Bytes())
		return err
	}
	if format == "json" {
		_, err := fmt.Fprintf(a.out, "%s\n", joinRaw(list))
		return err
	}
	t, err := parseTemplate(format)
	if err != nil {
		return err
	}
	for _, o := range list {
		if format == "{{json .}}" {
			// What the server sent, in its order.
			fmt.Fprintf(a.out, "%s\n", bytes.TrimSpace(o.raw))
			continue
		}
		var out bytes.Buffer
		if o.typed == nil || t.Execute(&out, o.typed) != nil || strings.Contains(format, "json .}}") {
			// Field names as in the JSON, or a whole object that must show
			// what the server sent rather than what the types know.
			out.Reset()
			dec := json.NewDecoder(bytes.NewReader(o.raw))
			dec.UseNumber()
			var v any
			if err := dec.Decode(&v); err != nil {
				return fmt.Errorf("the daemon's answer is not understood: %w", err)
			}
			if err := t.Execute(&out, v); err != nil {
				return fmt.Errorf("template parsing error: %w", err)
			}
		}
		fmt.Fprintln(a.out, out.String())
	}
	return nil
}
