package client

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/client/runproto"
)

type imageKeys struct{}

// WithImageKeys returns a context whose requests carry the keys of images, those that
// pull, push, load, run and create, and no others. The keys go to the daemon over a unix
// socket or TLS, and are not kept there.
func WithImageKeys(ctx context.Context, k *imageapi.Keys) (context.Context, error) {
	v, err := k.Encode()
	if err != nil {
		return nil, err
	}
	return context.WithValue(ctx, imageKeys{}, v), nil
}

// imageKeys are the context's keys for a request that wants them; "": none.
func (c *Client) imageKeys(ctx context.Context, path string) (string, error) {
	v, _ := ctx.Value(imageKeys{}).(string)
	if v == "" || path != runproto.Path && path != "/containers/create" && !strings.HasPrefix(path, "/images/") {
		return "", nil
	}
	if c.network != "unix" && c.TLS == nil {
		return "", fmt.Errorf("keys of images are not sent to %s: the connection is not encrypted: %w", c.host, errdefs.ErrFailedPrecondition)
	}
	return v, nil
}
