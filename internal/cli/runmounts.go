package cli

import (
	"encoding/csv"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
)

// csvFields splits a comma-separated value in which quotes may hide commas.
func csvFields(s string) ([]string, error) {
	r := csv.NewReader(strings.NewReader(s))
	fields, err := r.Read()
	if err != nil {
		return nil, fmt.Errorf("%q is not a list of comma-separated values: %w", s, err)
	}
	return fields, nil
}

// addVolume reads one -v: [SRC:]DST[:OPTIONS].
func addVolume(v string, conf *container.Config, h *container.HostConfig) error {
	parts := strings.Split(v, ":")
	switch {
	case len(parts) == 1:
		if !path.IsAbs(v) {
			return fmt.Errorf("invalid volume specification: '%s': the mount path must be absolute", v)
		}
		if conf.Volumes == nil {
			conf.Volumes = map[string]struct{}{}
		}
		conf.Volumes[path.Clean(v)] = struct{}{}
		return nil
	case len(parts) > 3, parts[0] == "", parts[1] == "":
		return fmt.Errorf("invalid volume specification: '%s'", v)
	case !path.IsAbs(parts[1]):
		return fmt.Errorf("invalid volume specification: '%s': the mount path must be absolute", v)
	}
	if strings.HasPrefix(parts[0], ".") {
		abs, err := filepath.Abs(parts[0])
		if err != nil {
			return fmt.Errorf("volume %s: %w", v, err)
		}
		parts[0] = abs
	}
	h.Binds = append(h.Binds, strings.Join(parts, ":"))
	return nil
}

// parseMount reads one --mount: comma-separated key=value.
func parseMount(s string) (mount.Mount, error) {
	m := mount.Mount{Type: mount.TypeVolume}
	fields, err := csvFields(s)
	if err != nil {
		return m, err
	}
	for _, f := range fields {
		k, v, has := strings.Cut(f, "=")
		if err := setMountField(&m, strings.ToLower(k), v, has); err != nil {
			return m, err
		}
	}
	return m, checkMount(&m)
}

func setMountField(m *mount.Mount, k, v string, has bool) error {
	switch k {
	case "readonly", "ro", "volume-nocopy", "bind-nonrecursive", "bind-create-src":
		on := true
		if has {
			b, err := strconv.ParseBool(v)
			if err != nil {
				return fmt.Errorf("invalid value for %s: %s", k, v)
			}
			on = b
		}
		switch k {
		case "volume-nocopy":
			volumeOptions(m).NoCopy = on
		case "bind-nonrecursive":
			bindOptions(m).NonRecursive = on
		case "bind-create-src":
			bindOptions(m).CreateMountpoint = on
		default:
			m.ReadOnly = on
		}
		return nil
	}
	if !has {
		return fmt.Errorf("invalid field '%s' must be a key=value pair", k)
	}
	switch k {
	case "type":
		m.Type = mount.Type(strings.ToLower(v))
	case "source", "src":
		m.Source = v
		if strings.HasPrefix(v, ".") {
			abs, err := filepath.Abs(v)
			if err != nil {
				return err
			}
			m.Source = abs
		}
	case "target", "dst", "destination":
		m.Target = v
	case "consistency":
		m.Consistency = mount.Consistency(strings.ToLower(v))
	case "bind-propagation":
		bindOptions(m).Propagation = mount.Propagation(strings.ToLower(v))
	case "bind-recursive":
		o := bindOptions(m)
		switch v {
		case "enabled":
		case "disabled":
			o.NonRecursive = true
		case "writable":
			o.ReadOnlyNonRecursive = true
		case "readonly":
			o.ReadOnlyForceRecursive = true
		default:
			return fmt.Errorf("invalid value for %s: %s (must be \"enabled\", \"disabled\", \"writable\", or \"readonly\")", k, v)
		}
	case "volume-subpath":
		volumeOptions(m).Subpath = v
	case "image-subpath":
		m.ImageOptions = &mount.ImageOptions{Subpath: v}
	case "volume-label":
		o := volumeOptions(m)
		if o.Labels == nil {
			o.Labels = map[string]string{}
		}
		name, value, _ := strings.Cut(v, "=")
		o.Labels[name] = value
	case "volume-driver":
		volumeDriver(m).Name = v
	case "volume-opt":
		d := volumeDriver(m)
		if d.Options == nil {
			d.Options = map[string]string{}
		}
		name, value, _ := strings.Cut(v, "=")
		d.Options[name] = value
	case "tmpfs-size":
		n, err := units.RAMInBytes(v)
		if err != nil {
			return fmt.Errorf("invalid value for %s: %s", k, v)
		}
		tmpfsOptions(m).SizeBytes = n
	case "tmpfs-mode":
		n, err := strconv.ParseUint(v, 8, 32)
		if err != nil {
			return fmt.Errorf("invalid value for %s: %s", k, v)
		}
		tmpfsOptions(m).Mode = os.FileMode(n)
	default:
		return fmt.Errorf("unexpected key '%s' in '%s=%s'", k, k, v)
	}
	return nil
}

func checkMount(m *mount.Mount) error {
	if m.Type == "" {
		return errors.New("type is required")
	}
	if m.Target == "" {
		return errors.New("target is required")
	}
	for _, x := range []struct {
		typ  mount.Type
		set  bool
		name string
	}{
		{mount.TypeVolume, m.VolumeOptions != nil, "volume-*"},
		{mount.TypeBind, m.BindOptions != nil, "bind-*"},
		{mount.TypeTmpfs, m.TmpfsOptions != nil, "tmpfs-*"},
		{mount.TypeImage, m.ImageOptions != nil, "image-*"},
	} {
		if x.set && m.Type != x.typ {
			return fmt.Errorf("cannot mix '%s' options with mount type '%s'", x.name, m.Type)
		}
	}
	if o := m.BindOptions; o != nil && o.ReadOnlyNonRecursive && !m.ReadOnly {
		return errors.New("option 'bind-recursive=writable' requires 'readonly' to be specified in conjunction")
	}
	if o := m.BindOptions; o != nil && o.ReadOnlyForceRecursive {
		if !m.ReadOnly {
			return errors.New("option 'bind-recursive=readonly' requires 'readonly' to be specified in conjunction")
		}
		if o.Propagation != mount.PropagationRPrivate {
			return errors.New("option 'bind-recursive=readonly' requires 'bind-propagation=rprivate' to be specified in conjunction")
		}
	}
	return nil
}

func bindOptions(m *mount.Mount) *mount.BindOptions {
	if m.BindOptions == nil {
		m.BindOptions = &mount.BindOptions{}
	}
	return m.BindOptions
}

func volumeOptions(m *mount.Mount) *mount.VolumeOptions {
	if m.VolumeOptions == nil {
		m.VolumeOptions = &mount.VolumeOptions{}
	}
	return m.VolumeOptions
}

func volumeDriver(m *mount.Mount) *mount.Driver {
	o := volumeOptions(m)
	if o.DriverConfig == nil {
		o.DriverConfig = &mount.Driver{}
	}
	return o.DriverConfig
}

func tmpfsOptions(m *mount.Mount) *mount.TmpfsOptions {
	if m.TmpfsOptions == nil {
		m.TmpfsOptions = &mount.TmpfsOptions{}
	}
	return m.TmpfsOptions
}
