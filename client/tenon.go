package client

import (
	"context"
	"net/http"

	"tenon.dev/tenon/client/runproto"
)

// RunConn is a run or an exec in one round trip (runproto). Frames from the
// server are read with Reader by one goroutine; Writer may be used by several.
type RunConn struct {
	Reader *runproto.Reader
	Writer *runproto.Writer
	conn   *Hijacked
}

// Buffered returns how many bytes from the server can be read without waiting.
func (c *RunConn) Buffered() int { return c.conn.Reader.Buffered() }

// Close ends the connection. The process goes on.
func (c *RunConn) Close() error { return c.conn.Close() }

// Run sends a run request and returns when the server has understood it.
// auth, if not empty, is the value of the X-Registry-Auth header. A server
// without the endpoint gives an *Error with status 404 or 501.
func (c *Client) Run(ctx context.Context, req *runproto.Request, auth string) (*RunConn, error) {
	h := http.Header{}
	if auth != "" {
		h.Set("X-Registry-Auth", auth)
	}
	conn, err := c.Hijack(ctx, Request{Method: http.MethodPost, Path: runproto.Path, Body: req, Header: h}, runproto.Upgrade)
	if err != nil {
		return nil, err
	}
	return &RunConn{Reader: runproto.NewReader(conn.Reader), Writer: runproto.NewWriter(conn.Conn), conn: conn}, nil
}

// Exec runs a further process in a container, as Run does a container: frames
// follow. A server without the endpoint gives an *Error with status 404 or 501.
func (c *Client) Exec(ctx context.Context, req *runproto.ExecRequest) (*RunConn, error) {
	conn, err := c.Hijack(ctx, Request{Method: http.MethodPost, Path: runproto.ExecPath, Body: req}, runproto.ExecUpgrade)
	if err != nil {
		return nil, err
	}
	return &RunConn{Reader: runproto.NewReader(conn.Reader), Writer: runproto.NewWriter(conn.Conn), conn: conn}, nil
}

// Check is one line of a doctor's report.
type Check struct {
	// Name of what was looked at.
	Name string `json:"name"`
	// Status is CheckOK, CheckWarn or CheckMissing.
	Status string `json:"status"`
	// Detail tells what was found.
	Detail string `json:"detail"`
	// Remedy tells what to do, if there is something to do.
	Remedy string `json:"remedy,omitempty"`
}

// Values of Check.Status.
const (
	CheckOK      = "ok"
	CheckWarn    = "warn"
	CheckMissing = "missing"
)

// Report is the answer of Doctor.
type Report struct {
	Checks []Check `json:"checks"`
}

// VMState is what virtual machines run on, and how many wait for containers.
type VMState struct {
	Accel       string // "kvm" or "tcg"
	AccelReason string // why not kvm
	QEMU        string
	Kernel      string
	Ready       int
}

// PrepareVM makes what virtual machines are copied from, and those that are to wait
// for containers. It may take a minute.
func (c *Client) PrepareVM(ctx context.Context) (VMState, error) {
	var s VMState
	err := c.Post(ctx, "/tenon/v1/vm/prepare", nil, nil, &s)
	return s, err
}

// Doctor asks what the daemon's host has and lacks.
func (c *Client) Doctor(ctx context.Context) (Report, error) {
	var r Report
	err := c.Get(ctx, "/tenon/v1/doctor", nil, &r)
	return r, err
}

// Shutdown stops all containers, then the daemon and everything it made.
func (c *Client) Shutdown(ctx context.Context) error {
	return c.Post(ctx, "/tenon/v1/shutdown", nil, nil, nil)
}
