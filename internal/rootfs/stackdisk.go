package rootfs

import (
	"context"
	"fmt"
	"path/filepath"
)

// PrepareUpper makes the writable disk of something that runs on a virtual machine
// above directories of the host that are no image's (a build's step); see PrepareDisks.
// Remove takes it away.
func (s *Store) PrepareUpper(ctx context.Context, id string, lower []string, opts Options) (string, error) {
	dir, err := s.dir(id)
	if err != nil {
		return "", err
	}
	if err := s.makeUpper(ctx, dir, lower, opts); err != nil {
		return "", fmt.Errorf("%s: writable disk: %w", id, err)
	}
	return filepath.Join(dir, vmDiskFile), nil
}
