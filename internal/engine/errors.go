package engine

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// ErrNotModified says that the container is in the state asked for already.
// The server answers 304.
var ErrNotModified = errors.New("not modified")

func invalid(format string, args ...any) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(format, args...))
}

func notFound(format string, args ...any) error {
	return errdefs.ErrNotFound.WithMessage(fmt.Sprintf(format, args...))
}

func conflict(format string, args ...any) error {
	return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(format, args...))
}
