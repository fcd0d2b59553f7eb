package engine

import (
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/mount"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/sandbox"
)

// checkMachine refuses what a container on a machine can't have, or not yet,
// before anything is made. On one that lasts it can share what others there have.
func (e *Engine) checkMachine(r *container.Record) error {
	h := r.HostConfig
	no := func(what string) error {
		return errdefs.ErrNotImplemented.WithMessage(what + " can't be had with --isolation " + r.Isolation + " in this release; nothing was started")
	}
	own := r.Isolation == sandbox.VM
	another := func(what string) error { return no(what + " (the other container runs on another kernel)") }
	switch {
	case own && h.NetworkMode.IsContainer():
		return another("--network container:…")
	case own && h.PidMode.IsContainer():
		return another("--pid container:…")
	case own && h.IpcMode.IsContainer():
		return another("--ipc container:…")
	case own && strings.HasPrefix(string(h.UsernsMode), "container:"):
		return another("--userns container:…")
	}
	if err := e.checkPeers(r); err != nil {
		return err
	}
	if err := e.planUserNS(r); err != nil {
		return err
	}
	if err := e.checkUserNSMounts(r); err != nil {
		return err
	}
	switch {
	case len(h.DeviceRequests) > 0:
		return no("--gpus and other device requests")
	case len(h.BlkioWeightDevice) > 0:
		return no("--blkio-weight-device (the container's disks are its machine's; --device-read-bps and the like limit them)")
	case h.CgroupParent != "":
		return no("--cgroup-parent")
	case h.Runtime != "" && h.Runtime != "tenon":
		return no("--runtime " + h.Runtime)
	}
	for name := range r.Networks {
		n, err := e.cfg.Networks.Inspect(e.ctx, name)
		if err == nil { // of one that is not there the start speaks
			err = machineNetwork(r, n)
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	for _, d := range h.Devices {
		if !slices.Contains(guestDevices, d.PathOnHost) {
			return no("--device " + d.PathOnHost + " (a device of the host; those of the container's own kernel are " + strings.Join(guestDevices, ", ") + ")")
		}
	}
	for _, m := range r.Mounts {
		switch {
		case m.Type == mount.TypeTmpfs, m.Type == mount.TypeImage:
		case m.Type == mount.TypeVolume:
			if t := e.volumeType(&m); t != "bind" && t != "tmpfs" {
				return no("a volume of a file system that the host would mount, of type " + t + " (" + m.Destination + ")")
			}
		case m.Type == mount.TypeBind && m.Propagation != "" && !strings.HasSuffix(string(m.Propagation), "private"):
			return no("mount propagation " + string(m.Propagation) + " (" + m.Destination + ")")
		case m.Type == mount.TypeBind:
			if st, err := os.Stat(m.Source); err == nil && !st.IsDir() && !st.Mode().IsRegular() {
				return no("a socket or device of the host (" + m.Source + ")")
			}
		default:
			return no("a mount of type " + string(m.Type) + " (" + m.Destination + ")")
		}
	}
	return nil
}

// machineNetwork refuses networks that extend an interface of the host by the
// host's kernel.
func machineNetwork(r *container.Record, n network.Inspect) error {
	if onHost(r) || n.Driver != "macvlan" {
		return nil
	}
	return errdefs.ErrNotImplemented.WithMessage("a " + n.Driver + " network (" + n.Name + ") can't be had with --isolation " + r.Isolation + " in this release; nothing was started")
}

// volumeType is what would be mounted for a volume: that of one to be made is
// what the mount asks for.
func (e *Engine) volumeType(m *container.Mount) string {
	if v, err := e.cfg.Volumes.Mount(m.Name); m.Name != "" && err == nil {
		return v.Type
	}
	if m.Spec != nil && m.Spec.VolumeOptions != nil && m.Spec.VolumeOptions.DriverConfig != nil {
		if t := m.Spec.VolumeOptions.DriverConfig.Options["type"]; t != "" && t != "none" {
			return t
		}
	}
	return "bind"
}

// ownHost gives a container that is alone on its kernel what "host" means there:
// the network of that kernel is the container's, on the default bridge.
func ownHost(r *container.Record) bool {
	return r.Isolation == sandbox.VM && r.HostConfig.NetworkMode.IsHost()
}
