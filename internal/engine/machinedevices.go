package engine

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	mobycontainer "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// guestDevices are those that a container with a kernel of its own may name:
// they are no hardware, and mean the same on every kernel.
var guestDevices = []string{"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/kmsg", "/dev/fuse", "/dev/net/tun"}

// machineDevices finds what --privileged and --device ask for among the devices
// of a machine, and its disks if I/O is limited.
func machineDevices(ctx context.Context, client *task.Client, h *mobycontainer.HostConfig, p *prepared) error {
	limited := throttled(&h.Resources)
	if !h.Privileged && len(h.Devices) == 0 && !limited {
		return nil
	}
	all, err := listDevices(ctx, client)
	if err != nil {
		return err
	}
	if h.Privileged {
		p.allDevices = all
	}
	for _, x := range all {
		if limited && x.Type == "b" && strings.HasPrefix(x.Path, "/dev/vd") {
			p.disks = append(p.disks, x)
		}
	}
	for _, d := range h.Devices {
		found := false
		for _, x := range all {
			if x.Path != d.PathOnHost {
				continue
			}
			if x.Path, found = firstOf(d.PathInContainer, d.PathOnHost), true; d.CgroupPermissions != "" {
				x.Access = d.CgroupPermissions
			}
			p.devices = append(p.devices, x)
		}
		if !found {
			return invalid("error gathering device information while adding custom device %q: the container's own kernel has none", d.PathOnHost)
		}
	}
	return nil
}

// throttled says whether I/O of devices is limited.
func throttled(r *mobycontainer.Resources) bool {
	return len(r.BlkioDeviceReadBps)+len(r.BlkioDeviceWriteBps)+len(r.BlkioDeviceReadIOps)+len(r.BlkioDeviceWriteIOps) > 0
}

// listDevices lists a machine's /dev, as an archive of it shows them.
func listDevices(ctx context.Context, client *task.Client) ([]spec.Device, error) {
	body, _, err := client.ReadFiles(ctx, task.Files{ID: "devices", Root: &taskv1.Root{
		Mounts: []*taskv1.Mount{{Type: "bind", Source: "/dev", Options: []string{"bind", "ro"}}},
	}}, "/.")
	if err != nil {
		return nil, fmt.Errorf("devices of the virtual machine: %w", err)
	}
	defer body.Close()
	var out []spec.Device
	for t := tar.NewReader(body); ; {
		x, err := t.Next()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("devices of the virtual machine: %w", err)
		}
		name := strings.TrimPrefix(path.Clean("/"+x.Name), "/")
		if name == "console" || strings.HasPrefix(name, "pts/") || strings.HasPrefix(name, "shm/") || strings.HasPrefix(name, "mqueue/") {
			continue
		}
		kind := map[byte]string{tar.TypeChar: "c", tar.TypeBlock: "b"}[x.Typeflag]
		if kind == "" {
			continue
		}
		mode, uid, gid := os.FileMode(x.Mode&0o7777), uint32(x.Uid), uint32(x.Gid)
		out = append(out, spec.Device{Access: "rwm", LinuxDevice: specs.LinuxDevice{
			Path: "/dev/" + name, Type: kind, Major: x.Devmajor, Minor: x.Devminor, FileMode: &mode, UID: &uid, GID: &gid,
		}})
	}
}
