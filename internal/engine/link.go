package engine

import (
	"context"
	"fmt"
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
}

func newLink(ctx context.Context, k sandbox.Sandbox, log *slog.Logger) *link {
	return &link{kernel: k, log: log, ctx: ctx, up: make(chan struct{})}
}

// awayTime is how long an operation waits for a shim that is away.
const awayTime = 30 * time.Second

// get returns the connection, waiting for it while it is being made again.
func (l *link) get(ctx context.Context) (*task.Client, error) {
	var late <-chan time.Time
	for {
		l.mu.Lock()
		c, up := l.client, l.up
		l.mu.Unlock()
		if c != nil {
			return c, nil
		}
		if late == nil {
			t := time.NewTimer(awayTime)
			defer t.Stop()
			late = t.C
		}
		select {
		case <-up:
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
