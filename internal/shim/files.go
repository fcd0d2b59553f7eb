package shim

import (
	"context"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/channel"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

func (s *Shim) serveFiles(ctx context.Context, conn channel.Conn, f *taskv1.Files) {
	refuse(conn, errdefs.ErrNotImplemented)
}
