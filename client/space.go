package client

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
)

// PinImage keeps an image from being pruned and from the disk budget, or lets it go
// again.
func (c *Client) PinImage(ctx context.Context, ref string, pinned bool) error {
	q := url.Values{"image": {ref}, "pinned": {strconv.FormatBool(pinned)}}
	resp, err := c.Do(ctx, Request{Method: http.MethodPut, Path: "/tenon/v1/images/pin", Query: q})
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// PinnedImages lists the images that are kept: names, or IDs of those without.
func (c *Client) PinnedImages(ctx context.Context) ([]string, error) {
	var out []string
	err := c.Get(ctx, "/tenon/v1/images/pin", nil, &out)
	return out, err
}

// Footprint is what the engine's state takes on the disk, in bytes, by part; Total is
// what du(1) says of the state root. Blobs, Layers and EROFS are parts of Images.
type Footprint struct {
	Images, Blobs, Layers, EROFS                                      int64
	Containers, Logs, Volumes, BuildCache, Machines, VM, Other, Total int64
}

// Footprint measures it. A server without the endpoint gives an *Error with status 404.
func (c *Client) Footprint(ctx context.Context) (f Footprint, err error) {
	err = c.Get(ctx, "/tenon/v1/df", nil, &f)
	return f, err
}
