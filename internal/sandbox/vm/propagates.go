package vm

import "github.com/moby/moby/api/types/mount"

// Propagates is for the host's kernel.
func (m *machine) Propagates(path string, _ mount.Propagation) error {
	return unlike("propagation of mounts below " + path)
}
