package shim

import (
	"context"

	"github.com/containerd/errdefs"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

func (k *kernelService) Processes(_ context.Context, r *taskv1.ProcessesRequest) (*taskv1.ProcessesResponse, error) {
	return nil, errdefs.ErrNotImplemented
}
