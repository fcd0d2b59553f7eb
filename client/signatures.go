package client

import (
	"context"
	"net/http"
	"net/url"

	"tenon.dev/tenon/client/imageapi"
)

// Signable asks what is to be signed to sign an image at its registry. header may hold
// credentials (X-Registry-Auth).
func (c *Client) Signable(ctx context.Context, image string, header http.Header) (out imageapi.Signable, err error) {
	err = c.Call(ctx, Request{Method: http.MethodGet, Path: imageapi.SignaturesPath, Query: url.Values{"image": {image}}, Header: header}, &out)
	return out, err
}

// PushSignatures puts signatures beside an image in its registry.
func (c *Client) PushSignatures(ctx context.Context, r imageapi.SignRequest, header http.Header) (out imageapi.SignReport, err error) {
	err = c.Call(ctx, Request{Method: http.MethodPost, Path: imageapi.SignaturesPath, Body: r, Header: header}, &out)
	return out, err
}

// VerifySignatures checks an image's signatures. An *Error with status 403 if none counts.
func (c *Client) VerifySignatures(ctx context.Context, r imageapi.VerifyRequest, header http.Header) (out imageapi.VerifyReport, err error) {
	err = c.Call(ctx, Request{Method: http.MethodPost, Path: imageapi.SignaturesPath + "/verify", Body: r, Header: header}, &out)
	return out, err
}
