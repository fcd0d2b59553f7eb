package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/mount"
)

// Propagates checks that the mount which a directory of the host is on can give a
// container's mount that propagation.
func (h *Host) Propagates(path string, p mount.Propagation) error {
	shared := p == mount.PropagationShared || p == mount.PropagationRShared
	if !shared && p != mount.PropagationSlave && p != mount.PropagationRSlave {
		return nil
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("bind source: %w", err)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("mounts of the host: %w", err)
	}
	on, is := peers(string(table), real)
	switch {
	case shared && !strings.Contains(is, "shared:"):
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("path %s is mounted on %s but it is not a shared mount", path, on))
	case is == "":
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("path %s is mounted on %s but it is not a shared or slave mount", path, on))
	}
	return nil
}

// escapes undoes what the kernel does to names in mountinfo.
var escapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// peers finds the mount that a path without links is on, and its peer groups
// ("shared:1 master:2"; empty for a private one) in a table as of mountinfo.
func peers(table, path string) (on, groups string) {
	for line := range strings.Lines(table) {
		pre, _, ok := strings.Cut(line, " - ")
		f := strings.Fields(pre)
		if !ok || len(f) < 6 {
			continue
		}
		p := escapes.Replace(f[4])
		// Of several at one place the last is on top.
		if len(p) < len(on) || path != p && !strings.HasPrefix(path, strings.TrimSuffix(p, "/")+"/") {
			continue
		}
		var g []string
		for _, o := range f[6:] {
			if strings.HasPrefix(o, "shared:") || strings.HasPrefix(o, "master:") {
				g = append(g, o)
			}
		}
		on, groups = p, strings.Join(g, " ")
	}
	return on, groups
}
