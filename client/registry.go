package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"tenon.dev/tenon/client/registryapi"
)

// ServeRegistry has the daemon serve its images as a registry until ctx ends, and
// calls f with each message, in order.
func (c *Client) ServeRegistry(ctx context.Context, s registryapi.Serve, f func(registryapi.Message)) error {
	resp, err := c.Do(ctx, Request{Method: http.MethodPost, Path: registryapi.Path, Body: s})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	dec := json.NewDecoder(resp.Body)
	for {
		var m registryapi.Message
		err := dec.Decode(&m)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, io.EOF):
			return errors.New("the daemon has ended the registry")
		case err != nil:
			return fmt.Errorf("the daemon is gone, and the registry with it: %w", err)
		case m.Error != "":
			return errors.New(m.Error)
		}
		f(m)
	}
}
