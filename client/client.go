// Package client is the Go client of a Tenon daemon, and of any other server
// of the Docker Engine API.
//
// It is deliberately thin: a request is a method, a path of the Docker Engine
// API (https://docs.docker.com/reference/api/engine/), a query and a body; the
// types of bodies and answers are those of github.com/moby/moby/api/types. The
// package adds what every caller needs around that: the way to the socket,
// errors with Docker's message and their errdefs class, connections taken over
// for attach and exec, and typed calls for Tenon's own endpoints.
//
// Each request uses a connection of its own, so that a program that makes one
// request, as most runs of a command line do, pays for nothing more: no pool,
// no goroutines. A Client holds no state that changes and may be used by
// several goroutines.
//
//	c, err := client.New("unix:///run/tenon/docker.sock")
//	var list []container.Summary
//	err = c.Get(ctx, "/containers/json", url.Values{"all": {"1"}}, &list)
package client

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/client/imageapi"
)

// DefaultHost is the address of a Tenon daemon that was started with its
// defaults.
const DefaultHost = "unix:///run/tenon/docker.sock"

// HostFromEnv returns TENON_HOST, or else DOCKER_HOST, or else DefaultHost.
func HostFromEnv() string {
	for _, name := range []string{"TENON_HOST", "DOCKER_HOST"} {
		if v := os.Getenv(name); v != "" {
			return v
		}
	}
	return DefaultHost
}

// Client talks to one daemon.
type Client struct {
	// UserAgent is sent with every request.
	UserAgent string
	// TLS, if not nil, is used for tcp:// addresses.
	TLS *tls.Config
	// APIVersion, if not empty, is put in front of every Docker path
	// ("1.44" asks for /v1.44/...). Without it the server answers in its
	// newest version, which is what the types of this package describe.
	APIVersion string

	host, network, address, httpHost string

	begun atomic.Pointer[begun]
}

// begun is a connection on which a request was sent.
type begun struct {
	conn     net.Conn
	received []byte
}

// Resume makes the next request use conn, on which somebody has sent that very
// request already, and received what it was answered so far.
func (c *Client) Resume(conn net.Conn, received []byte) {
	c.begun.Store(&begun{conn, received})
}

// New returns a Client for host: unix:///path/of/socket or tcp://address:port.
// It does not connect.
func New(host string) (*Client, error) {
	proto, addr, ok := strings.Cut(host, "://")
	if !ok {
		return nil, fmt.Errorf("daemon address %q: want unix:///path or tcp://host:port: %w", host, errdefs.ErrInvalidArgument)
	}
	c := &Client{UserAgent: "tenon", host: host, network: proto, address: addr, httpHost: "tenon"}
	switch proto {
	case "unix":
		if addr == "" {
			return nil, fmt.Errorf("daemon address %q has no path: %w", host, errdefs.ErrInvalidArgument)
		}
	case "tcp", "http", "https":
		c.network = "tcp"
		c.address, _, _ = strings.Cut(addr, "/")
		c.httpHost = c.address
		if _, _, err := net.SplitHostPort(c.address); err != nil {
			return nil, fmt.Errorf("daemon address %q: %v: %w", host, err, errdefs.ErrInvalidArgument)
		}
	default:
		return nil, fmt.Errorf("daemon address %q: scheme %q is not known, want unix or tcp: %w", host, proto, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

// Host returns the address that New was given.
func (c *Client) Host() string { return c.host }

// Error is what a server answered instead of what was asked for. It matches
// the errdefs class of its status with errors.Is.
type Error struct {
	// Status is the HTTP status code.
	Status int
	// Message is the server's sentence.
	Message string
}

// Error returns the message as Docker's clients show it.
func (e *Error) Error() string { return "Error response from daemon: " + e.Message }

// Unwrap returns the errdefs class of the status.
func (e *Error) Unwrap() error {
	switch e.Status {
	case http.StatusBadRequest:
		return errdefs.ErrInvalidArgument
	case http.StatusUnauthorized:
		return errdefs.ErrUnauthenticated
	case http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case http.StatusNotFound:
		return errdefs.ErrNotFound
	case http.StatusConflict:
		return errdefs.ErrConflict
	case http.StatusNotImplemented:
		return errdefs.ErrNotImplemented
	case http.StatusServiceUnavailable:
		return errdefs.ErrUnavailable
	case http.StatusNotModified:
		return errdefs.ErrNotModified
	}
	if e.Status >= 500 {
		return errdefs.ErrInternal
	}
	return errdefs.ErrUnknown
}

// ConnectError reports that the daemon could not be reached.
type ConnectError struct {
	Host string
	Err  error
}

// Error tells what to do about it.
func (e *ConnectError) Error() string {
	msg := fmt.Sprintf("cannot connect to the Tenon daemon at %s: %v", e.Host, e.Err)
	switch {
	case errors.Is(e.Err, syscall.EACCES), errors.Is(e.Err, syscall.EPERM):
		return msg + "\nThe socket belongs to root: use sudo, or join the group that owns it."
	case errors.Is(e.Err, syscall.ENOENT), errors.Is(e.Err, syscall.ECONNREFUSED):
		return msg + "\nIs it running? Start it with: systemctl start tenon, or, as root: tenond"
	}
	return msg
}

// Unwrap returns the cause.
func (e *ConnectError) Unwrap() error { return e.Err }

// Request is one call. Method and Path are required.
type Request struct {
	Method string
	// Path is the unversioned API path, already escaped.
	Path  string
	Query url.Values
	// Body is sent as JSON, unless it is nil or an io.Reader, which is
	// streamed as it is, by a goroutine that may still read from it after the
	// call has returned; the caller closes it.
	Body   any
	Header http.Header

	sent bool // by somebody else (Resume)
}

// maxErrorBody bounds what is read of an error answer, in bytes.
const maxErrorBody = 1 << 20

// Do sends the request and returns the answer, whose status is below 400; the
// caller closes its body, which closes the connection. An answer of 400 and
// above is returned as an *Error. Ending ctx ends the call and the body.
func (c *Client) Do(ctx context.Context, r Request) (*http.Response, error) {
	conn, resp, err := c.send(ctx, r, "")
	if err != nil {
		return nil, err
	}
	resp.Body = &body{ReadCloser: resp.Body, conn: conn}
	return resp, nil
}

// Call sends the request and decodes the JSON answer into out, unless out is
// nil.
func (c *Client) Call(ctx context.Context, r Request, out any) error {
	resp, err := c.Do(ctx, r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		_, err := io.Copy(io.Discard, resp.Body)
		return err
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("%s %s: decode the answer: %w", r.Method, r.Path, err)
	}
	return nil
}

// Get calls GET path and decodes the answer into out.
func (c *Client) Get(ctx context.Context, path string, q url.Values, out any) error {
	return c.Call(ctx, Request{Method: http.MethodGet, Path: path, Query: q}, out)
}

// Post calls POST path with a JSON body (or none) and decodes the answer into
// out, unless out is nil.
func (c *Client) Post(ctx context.Context, path string, q url.Values, body, out any) error {
	return c.Call(ctx, Request{Method: http.MethodPost, Path: path, Query: q, Body: body}, out)
}

// Delete calls DELETE path and decodes the answer into out, unless out is nil.
func (c *Client) Delete(ctx context.Context, path string, q url.Values, out any) error {
	return c.Call(ctx, Request{Method: http.MethodDelete, Path: path, Query: q}, out)
}

// Hijacked is a connection that has left HTTP: what is written goes to the
// server as it is, what is read is what the server sends after its headers.
type Hijacked struct {
	net.Conn
	// Reader must be used for reading; it may hold bytes already received.
	Reader *bufio.Reader
	// Response holds the headers of the answer; its body is not to be used.
	Response *http.Response
}

// Read reads from Reader.
func (h *Hijacked) Read(p []byte) (int, error) { return h.Reader.Read(p) }

// CloseWrite tells the server that nothing more comes.
func (h *Hijacked) CloseWrite() error {
	if cw, ok := h.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return nil
}

// Hijack sends the request with "Upgrade: proto" and returns the connection
// once the server has switched. The caller closes it; the end of ctx does, too.
func (c *Client) Hijack(ctx context.Context, r Request, proto string) (*Hijacked, error) {
	conn, resp, err := c.send(ctx, r, proto)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols && resp.StatusCode != http.StatusOK {
		conn.Close()
		return nil, fmt.Errorf("%s %s: the server did not switch protocols: %s", r.Method, r.Path, resp.Status)
	}
	return &Hijacked{Conn: conn.Conn, Reader: conn.br, Response: resp}, nil
}

// conn is a connection that ends with its context.
type conn struct {
	net.Conn
	br   *bufio.Reader
	stop func() bool
}

func (c *conn) Close() error {
	c.stop()
	return c.Conn.Close()
}

// body closes the connection with the answer's body.
type body struct {
	io.ReadCloser
	conn *conn
}

func (b *body) Close() error { return b.conn.Close() }

// Dial opens a connection to the daemon.
func (c *Client) Dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, c.network, c.address)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) && op.Err != nil {
			err = op.Err
		}
		return nil, &ConnectError{Host: c.host, Err: err}
	}
	if c.TLS != nil && c.network == "tcp" {
		conf := c.TLS.Clone()
		if conf.ServerName == "" {
			conf.ServerName, _, _ = net.SplitHostPort(c.address)
		}
		tc := tls.Client(nc, conf)
		if err := tc.HandshakeContext(ctx); err != nil {
			nc.Close()
			return nil, &ConnectError{Host: c.host, Err: err}
		}
		return tc, nil
	}
	return nc, nil
}

// send writes the request and reads the head of the answer.
func (c *Client) send(ctx context.Context, r Request, upgrade string) (*conn, *http.Response, error) {
	keys, err := c.imageKeys(ctx, r.Path)
	if err != nil {
		return nil, nil, err
	}
	b := c.begun.Swap(nil)
	if b == nil {
		nc, err := c.Dial(ctx)
		if err != nil {
			return nil, nil, err
		}
		b = &begun{conn: nc}
	} else {
		r.sent = true
	}
	nc := b.conn
	var from io.Reader = nc
	if len(b.received) > 0 {
		from = io.MultiReader(bytes.NewReader(b.received), nc)
	}
	cn := &conn{Conn: nc, br: bufio.NewReaderSize(from, 32<<10)}
	cn.stop = context.AfterFunc(ctx, func() { nc.Close() })
	resp, err := c.exchange(cn, r, upgrade, keys)
	if err != nil {
		cn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, nil, err
	}
	return cn, resp, nil
}

func (c *Client) exchange(cn *conn, r Request, upgrade, keys string) (*http.Response, error) {
	path := r.Path
	if c.APIVersion != "" && !strings.HasPrefix(path, "/tenon/") {
		path = "/v" + c.APIVersion + path
	}
	req := &http.Request{
		Method: r.Method, Host: c.httpHost, Header: http.Header{},
		// Opaque keeps the escaped path as it is.
		URL:   &url.URL{Scheme: "http", Host: c.httpHost, Opaque: path, RawQuery: r.Query.Encode()},
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	for k, v := range r.Header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", c.UserAgent)
	if keys != "" {
		req.Header.Set(imageapi.KeysHeader, keys)
	}
	switch b := r.Body.(type) {
	case nil:
	case io.Reader:
		req.Body, req.ContentLength = io.NopCloser(b), -1
	default:
		data, err := json.Marshal(b)
		if err != nil {
			return nil, fmt.Errorf("%s %s: encode the request: %w", r.Method, r.Path, err)
		}
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(data)), int64(len(data))
		req.Header.Set("Content-Type", "application/json")
	}
	if upgrade != "" {
		req.Header.Set("Connection", "Upgrade")
		req.Header.Set("Upgrade", upgrade)
	} else {
		req.Close = true
	}
	var werr error
	broken := make(chan error, 1)
	if _, streamed := r.Body.(io.Reader); r.sent {
		// Only the answer is missing.
	} else if streamed {
		// The server may answer while it still reads (progress of a load),
		// or refuse before it has read everything: both ways at once. The
		// goroutine ends with the body or, at the latest, with its next
		// write after the connection is closed. A body that can't be read
		// must not look like one that ends: the connection goes with it.
		src := &source{ReadCloser: req.Body}
		req.Body = src
		go func() {
			if err := writeRequest(cn, req); err != nil && src.err != nil {
				broken <- src.err
				_ = cn.Close() // the reader of the answer meets its end
			}
		}()
	} else {
		werr = writeRequest(cn, req)
	}
	resp, err := http.ReadResponse(cn.br, req)
	for err == nil && resp.StatusCode == http.StatusContinue {
		resp, err = http.ReadResponse(cn.br, req)
	}
	if err != nil {
		select {
		case err := <-broken:
			return nil, err
		default:
		}
		if werr != nil && !errors.Is(werr, syscall.EPIPE) {
			err = werr
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
			return nil, fmt.Errorf("the daemon at %s closed the connection (it may have been stopped): %w", c.host, err)
		}
		return nil, fmt.Errorf("%s %s: %w", r.Method, r.Path, err)
	}
	if resp.StatusCode >= 400 || resp.StatusCode == http.StatusNotModified {
		return nil, readError(resp)
	}
	return resp, nil
}

// source remembers why a body could not be read to its end.
type source struct {
	io.ReadCloser
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// writeRequest sends req in as few writes as possible.
func writeRequest(w io.Writer, req *http.Request) error {
	bw := bufio.NewWriterSize(w, 32<<10)
	if err := req.Write(bw); err != nil {
		return err
	}
	return bw.Flush()
}

func readError(resp *http.Response) error {
	data, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // a cut message is better than none
	var m struct {
		Message string `json:"message"`
	}
	msg := strings.TrimSpace(string(data))
	if json.Unmarshal(data, &m) == nil && m.Message != "" {
		msg = strings.TrimSpace(m.Message)
	}
	if msg == "" {
		msg = strconv.Itoa(resp.StatusCode) + " " + http.StatusText(resp.StatusCode)
	}
	return &Error{Status: resp.StatusCode, Message: msg}
}
