// Package task is the Task API as the daemon speaks it to a shim: containerd's
// runtime/task/v3 and Tenon's own kernel service (api/v1) on one ttrpc
// connection, and stream connections (package channel) beside it.
//
// A Client talks to one shim, on the host or in a VM; what it needs of the
// transport is a channel.Dialer. It is safe for concurrent use. Errors carry
// the errdefs class that the shim gave them.
//
// Only what daemon and shim share belongs here: this package imports neither.
package task

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	taskv3 "tenon.dev/tenon/internal/task/api/v3"

	"tenon.dev/tenon/internal/channel"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// Client is a connection to one shim.
type Client struct {
	// Task is containerd's Task API. The methods of Client say the same in
	// plainer words.
	Task taskv3.TaskService
	// Kernel is what containerd's Task API has no words for.
	Kernel taskv1.KernelClient

	rpc    *ttrpc.Client
	dialer channel.Dialer
	closed chan struct{}
}

// Dial connects to the shim that listens on a unix socket.
func Dial(ctx context.Context, socketPath string) (*Client, error) {
	return New(ctx, channel.Unix(socketPath))
}

// New connects through d, which stays in use for streams. If nobody listens,
// the error is of class Unavailable.
func New(ctx context.Context, d channel.Dialer) (*Client, error) {
	conn, err := d.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("shim: %w: %w", errdefs.ErrUnavailable, err)
	}
	c := &Client{dialer: d, closed: make(chan struct{})}
	c.rpc = ttrpc.NewClient(conn,
		ttrpc.WithOnClose(func() { close(c.closed) }),
		ttrpc.WithUnaryClientInterceptor(ClientInterceptor))
	c.Task = taskv3.NewTaskClient(c.rpc)
	c.Kernel = kernelClient{taskv1.NewKernelClient(c.rpc)}
	return c, nil
}

// Closed is closed when the connection has ended, by Close or because the shim
// is gone. Tasks do not end with it.
func (c *Client) Closed() <-chan struct{} { return c.closed }

// Close ends the connection; streams that are open stay so.
func (c *Client) Close() error { return c.rpc.Close() }

// Stream opens a stream connection. The caller closes it. On an error from the
// shim the connection is nil and the error carries its class.
func (c *Client) Stream(ctx context.Context, h *taskv1.StreamHeader) (channel.Conn, *taskv1.StreamReply, error) {
	conn, reply, err := channel.Open(ctx, c.dialer, h)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	if conn == nil {
		return nil, reply, replyError(reply)
	}
	return conn, reply, nil
}

// Exit tells how a process ended.
type Exit struct {
	Status    uint32 // exit code, or 128 + signal
	StartedAt time.Time
	ExitedAt  time.Time
	OOMKilled bool // the kernel killed a process of the container for memory
}

func nanoTime(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}
