package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
)

// mountOf translates Docker's local driver options. Without options the volume
// is its directory. type=tmpfs gives every container a tmpfs of
// its own; type=none with o=bind is a host directory; others are mounted by
// name (nfs, ext4, …) on the kernel that the container runs on.
func mountOf(v *Volume, data string) (Mount, error) {
	typ, device := v.Options["type"], v.Options["device"]
	var opts []string
	if o := v.Options["o"]; o != "" {
		opts = strings.Split(o, ",")
	}
	for k := range v.Options {
		switch k {
		case "type", "o", "device", "size":
		default:
			return Mount{}, fmt.Errorf("volume %s: option %q is not known; local volumes take type=, o=, device= and size=: %w", v.Name, k, errdefs.ErrInvalidArgument)
		}
	}
	switch {
	case typ == "" && device == "" && len(opts) == 0:
		return Mount{Type: "bind", Source: data, Options: []string{"rbind"}}, nil
	case typ == "tmpfs":
		// A volume has none of the limits that --tmpfs has; o= may ask for them.
		return Mount{Type: "tmpfs", Source: "tmpfs", Options: append([]string{"exec", "suid", "dev"}, opts...)}, nil
	case device == "":
		return Mount{}, fmt.Errorf("volume %s: type=%s needs device=: %w", v.Name, typ, errdefs.ErrInvalidArgument)
	case typ == "none" || typ == "" || typ == "bind":
		if !filepath.IsAbs(device) {
			return Mount{}, fmt.Errorf("volume %s: device=%s must be an absolute path: %w", v.Name, device, errdefs.ErrInvalidArgument)
		}
		return Mount{Type: "bind", Source: device, Options: append(opts, "rbind")}, nil
	default:
		return Mount{Type: typ, Source: device, Options: opts}, nil
	}
}

// diskUsage counts each inode's blocks once.
func diskUsage(ctx context.Context, dir string) (int64, error) {
	type inode struct{ dev, ino uint64 }
	seen := map[inode]bool{}
	var total int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // went away under the walk
			}
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		info, err := d.Info()
		if err != nil {
			return nil // went away under the walk
		}
		st := info.Sys().(*syscall.Stat_t)
		if id := (inode{uint64(st.Dev), st.Ino}); st.Nlink == 1 || !seen[id] {
			seen[id] = true
			total += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		return total, fmt.Errorf("disk usage of %s: %w", dir, err)
	}
	return total, nil
}
