package client

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"tenon.dev/tenon/client/imageapi"
)

// BootstrapOptions say what a base image is made of; busybox takes none.
type BootstrapOptions struct {
	// Include names packages beside the distribution's minimum.
	Include []string
	// Tag is the name to give; empty is the distribution's own.
	Tag string
	// Mirror is the URL of an archive; empty: what the daemon's host uses.
	Mirror string
	// Epoch is the newest time in the image, in seconds since 1970; nil: that of the
	// archives' newest Release file.
	Epoch *int64
}

// Bootstrap makes a base image without a registry: "busybox" or "debian[:SUITE]". It
// returns a stream of Docker JSON messages, which the caller closes.
func (c *Client) Bootstrap(ctx context.Context, name string, o BootstrapOptions) (io.ReadCloser, error) {
	q := url.Values{"name": {name}}
	for _, p := range o.Include {
		q.Add("include", p)
	}
	if o.Tag != "" {
		q.Set("tag", o.Tag)
	}
	if o.Mirror != "" {
		q.Set("mirror", o.Mirror)
	}
	if o.Epoch != nil {
		q.Set("epoch", strconv.FormatInt(*o.Epoch, 10))
	}
	resp, err := c.Do(ctx, Request{Method: http.MethodPost, Path: imageapi.Path + "/bootstrap", Query: q})
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// ImageTree shows which images stand on which: all, or the line of image if it is not
// empty. all shows those without names, too.
func (c *Client) ImageTree(ctx context.Context, image string, all bool) ([]imageapi.Node, error) {
	var out []imageapi.Node
	err := c.Get(ctx, imageapi.Path+"/tree", url.Values{"image": {image}, "all": {strconv.FormatBool(all)}}, &out)
	return out, err
}

// ImageOutdated lists images whose base has moved. With remote, registries are asked;
// auth, if not empty, is the X-Registry-Config header for them.
func (c *Client) ImageOutdated(ctx context.Context, remote bool, auth string) (imageapi.OutdatedReport, error) {
	var out imageapi.OutdatedReport
	h := http.Header{}
	if auth != "" {
		h.Set("X-Registry-Config", auth)
	}
	resp, err := c.Do(ctx, Request{Method: http.MethodGet, Path: imageapi.Path + "/outdated", Query: url.Values{"remote": {strconv.FormatBool(remote)}}, Header: h})
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	return out, json.NewDecoder(resp.Body).Decode(&out)
}

// ImagePlan says how to make an image anew, or (chain) what stands on it.
func (c *Client) ImagePlan(ctx context.Context, image string, chain, all bool) ([]imageapi.Step, error) {
	var out []imageapi.Step
	q := url.Values{"image": {image}, "chain": {strconv.FormatBool(chain)}, "all": {strconv.FormatBool(all)}}
	err := c.Get(ctx, imageapi.Path+"/plan", q, &out)
	return out, err
}

// RecordBuild remembers how an image was built, so that it can be built again.
func (c *Client) RecordBuild(ctx context.Context, image string, d imageapi.Definition) error {
	resp, err := c.Do(ctx, Request{Method: http.MethodPut, Path: imageapi.Path + "/definition", Query: url.Values{"image": {image}}, Body: d})
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// ImageRebase puts an image's own layers on another base, where that is safe.
func (c *Client) ImageRebase(ctx context.Context, r imageapi.RebaseRequest) (imageapi.RebaseReport, error) {
	var out imageapi.RebaseReport
	err := c.Post(ctx, imageapi.Path+"/rebase", nil, r, &out)
	return out, err
}

// ImageDiff tells what changed between two images; without their files if noFiles.
func (c *Client) ImageDiff(ctx context.Context, from, to string, noFiles bool) (imageapi.Diff, error) {
	var out imageapi.Diff
	err := c.Get(ctx, imageapi.Path+"/diff", url.Values{"old": {from}, "new": {to}, "nofiles": {strconv.FormatBool(noFiles)}}, &out)
	return out, err
}

// ImagePackages lists an image's packages: the attested ones, or (files, or without
// an attestation) those that its files name.
func (c *Client) ImagePackages(ctx context.Context, image string, files bool) (imageapi.SBOM, error) {
	var out imageapi.SBOM
	err := c.Get(ctx, imageapi.Path+"/packages", url.Values{"image": {image}, "files": {strconv.FormatBool(files)}}, &out)
	return out, err
}

// ImageSPDX is an image's list of packages as an SPDX document.
func (c *Client) ImageSPDX(ctx context.Context, image string) (json.RawMessage, error) {
	var out json.RawMessage
	err := c.Get(ctx, imageapi.Path+"/packages", url.Values{"image": {image}, "form": {"spdx"}}, &out)
	return out, err
}

// Audit looks for what is wrong with images and with names (containers, or else
// images); with neither, with all images that have names and all containers that run
// (all: those that don't, too).
func (c *Client) Audit(ctx context.Context, images, names []string, all bool) (imageapi.AuditReport, error) {
	var out imageapi.AuditReport
	err := c.Get(ctx, imageapi.AuditPath, url.Values{"image": images, "name": names, "all": {strconv.FormatBool(all)}}, &out)
	return out, err
}
