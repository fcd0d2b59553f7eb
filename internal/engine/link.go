package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/task"
)

// link is the connection to a kernel's shim, as it is at the moment.
type link struct {
	kernel sandbox.Sandbox
	log    *slog.Logger
	ctx    context.Context

	mu     sync.Mutex
	client *task.Client
	up     chan struct{} // closed while there is a client
	err    error         // why there will be none by waiting
	failed chan struct{} // closed while err is set
}

func newLink(ctx context.Context, k sandbox.Sandbox, log *slog.Logger) *link {
	return &link{kernel: k, log: log, ctx: ctx, up: make(chan struct{}), failed: make(chan struct{})}
}

// awayTime is how long an operation waits for a shim that is away.
const awayTime = 30 * time.Second

// get returns the connection, waiting for it while it is being made again.
func (l *link) get(ctx context.Context) (*task.Client, error) {
	var late <-chan time.Time
	for {
		l.mu.Lock()
		c, up, err, failed := l.client, l.up, l.err, l.failed
		l.mu.Unlock()
		if c != nil {
			return c, nil
		}
		if err != nil {
			return nil, errdefs.ErrUnavailable.WithMessage("the shim is not reachable: " + err.Error())
		}
		if late == nil {
			t := time.NewTimer(awayTime)
			defer t.Stop()
			late = t.C
		}
		select {
		case <-up:
		case <-failed:
		case <-late:
			return nil, errdefs.ErrUnavailable.WithMessage(fmt.Sprintf("the shim is not reachable since %v; see the daemon's log", awayTime))
		case <-ctx.Done():
			return nil, errdefs.ErrUnavailable.WithMessage("the shim is not reachable: " + context.Cause(ctx).Error())
		case <-l.ctx.Done():
			return nil, errdefs.ErrUnavailable.WithMessage("the daemon is shutting down")
		}
	}
}

func (l *link) set(c *task.Client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.client = c
	close(l.up)
	if l.err != nil {
		l.err, l.failed = nil, make(chan struct{})
	}
}

// fail tells those who wait why an attempt to reach the shim has failed, if that
// is nothing that passes: its program is missing or can't be run.
func (l *link) fail(err error) {
	if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		close(l.failed)
	}
	l.err = err
}

func (l *link) clear() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.client != nil {
		l.client.Close()
		l.client, l.up = nil, make(chan struct{})
	}
}

func (l *link) close() { l.clear() }
