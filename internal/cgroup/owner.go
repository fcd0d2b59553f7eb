package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// delegated are the files that whom a group is given to may write, where the
// kernel has no list.
var delegated = []string{"cgroup.procs", "cgroup.subtree_control", "cgroup.threads"}

// Delegate gives a group to a user of the host, as the OCI runtime specification
// wants it of one that its container may write: the directory and what the kernel
// lists for the purpose, on v2 only, where it is safe (cgroups(7)).
func (g *Group) Delegate(uid uint32) error {
	files := delegated
	if raw, err := os.ReadFile("/sys/kernel/cgroup/delegate"); err == nil {
		files = strings.Fields(string(raw))
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	for _, d := range g.dirs {
		if !d.v2 {
			continue
		}
		if err := os.Chown(d.path, int(uid), -1); err != nil {
			return fmt.Errorf("cgroup %s: owner: %w", g.path, err)
		}
		for _, f := range files {
			if err := os.Chown(filepath.Join(d.path, f), int(uid), -1); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("cgroup %s: owner: %w", g.path, err)
			}
		}
	}
	return nil
}
