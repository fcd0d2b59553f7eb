package client

import (
	"context"
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
