package vmm

import (
	"fmt"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/channel"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

func (v *machine) setShare(s *vmv1.HostShare) error {
	return fmt.Errorf("share %q: %w", s.GetTag(), errdefs.ErrNotImplemented)
}

func (v *machine) dropShare(string) {}

// serveShare serves a directory to the guest until the stream ends. An error is
// to be told to the guest: nothing was served.
func (v *machine) serveShare(_ channel.Conn, tag string) error {
	return fmt.Errorf("share %q: %w", tag, errdefs.ErrNotFound)
}

// ShareArg is the first argument of a program that is to call Shared.
const ShareArg = "share"

// Shared serves a host directory.
func Shared([]string) error { return errdefs.ErrNotImplemented }
