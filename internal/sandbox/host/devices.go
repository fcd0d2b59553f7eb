package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/spec"
)

// Devices reads the node at path, or all nodes below a directory, as Docker's
// --device does.
func (h *Host) Devices(path, target, access string) ([]spec.Device, error) {
	if target == "" {
		target = path
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("error gathering device information while adding custom device %q: %v", path, errors.Unwrap(err)))
	}
	if !st.IsDir() {
		d, err := device(path, target, access)
		if err != nil {
			return nil, err
		}
		return []spec.Device{d}, nil
	}
	out, err := below(path, target, access)
	if err == nil && len(out) == 0 {
		err = errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%q has no device nodes", path))
	}
	return out, err
}

func device(path, target, access string) (spec.Device, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return spec.Device{}, fmt.Errorf("device %s: %w", path, err)
	}
	d := spec.Device{Access: access, LinuxDevice: specs.LinuxDevice{Path: target, Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev))}}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		d.Type = "c"
	case unix.S_IFBLK:
		d.Type = "b"
	case unix.S_IFIFO:
		d.Type = "p"
	default:
		return d, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("error gathering device information while adding custom device %q: not a device node", path))
	}
	mode := os.FileMode(st.Mode & 0o7777)
	uid, gid := st.Uid, st.Gid
	d.FileMode, d.UID, d.GID = &mode, &uid, &gid
	return d, nil
}

// below walks a directory; what is no device, and what other mounts hold, is
// left out.
func below(dir, target, access string) ([]spec.Device, error) {
	var out []spec.Device
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			if p == dir {
				return err
			}
			return nil // went away
		}
		if e.IsDir() {
			switch e.Name() {
			case "pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev":
				if p != dir {
					return fs.SkipDir
				}
			}
			return nil
		}
		if e.Type()&(fs.ModeDevice|fs.ModeCharDevice) == 0 || e.Name() == "console" {
			return nil
		}
		rel := strings.TrimPrefix(p, dir)
		if d, err := device(p, filepath.Join(target, rel), access); err == nil {
			out = append(out, d)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("devices below %s: %w", dir, err)
	}
	return out, nil
}

// AllDevices are those in /dev.
func (h *Host) AllDevices() ([]spec.Device, error) { return below("/dev", "/dev", "rwm") }

// BlockDevice finds the numbers of the device node at path.
func (h *Host) BlockDevice(path string) (major, minor uint32, err error) {
	d, err := device(path, path, "")
	if err != nil || d.Type != "b" {
		return 0, 0, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("invalid device path %q: not a block device", path))
	}
	return uint32(d.Major), uint32(d.Minor), nil
}
