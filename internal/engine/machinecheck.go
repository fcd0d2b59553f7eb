package engine

import (
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/mount"

	"tenon.dev/tenon/internal/container"
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
	switch {
	case len(h.DeviceRequests) > 0:
		return no("--gpus and other device requests")
	case len(h.BlkioDeviceReadBps)+len(h.BlkioDeviceWriteBps)+len(h.BlkioDeviceReadIOps)+len(h.BlkioDeviceWriteIOps)+len(h.BlkioWeightDevice) > 0:
		return no("a limit of a block device")
	case own && h.NetworkMode.IsHost():
		return no("--network host")
	case own && h.NetworkMode.IsContainer():
		return no("--network container:… (the other container runs on another kernel)")
	case h.PidMode != "" && (own || !h.PidMode.IsContainer()):
		return no("--pid " + string(h.PidMode))
	case h.IpcMode.IsHost() || own && h.IpcMode.IsContainer():
		return no("--ipc " + string(h.IpcMode))
	case h.UTSMode.IsHost():
		return no("--uts host")
	case h.CgroupnsMode.IsHost():
		return no("--cgroupns host")
	case h.UsernsMode != "" && h.UsernsMode != "host":
		return no("--userns " + string(h.UsernsMode))
	case h.CgroupParent != "":
		return no("--cgroup-parent")
	case h.Runtime != "" && h.Runtime != "tenon":
		return no("--runtime " + h.Runtime)
	}
	for _, d := range h.Devices {
		if !slices.Contains(guestDevices, d.PathOnHost) {
			return no("--device " + d.PathOnHost + " (a device of the host; those of the container's own kernel are " + strings.Join(guestDevices, ", ") + ")")
		}
	}
	for _, m := range r.Mounts {
		switch {
		case m.Type == mount.TypeTmpfs:
		case m.Type == mount.TypeVolume:
			v, err := e.cfg.Volumes.Mount(m.Name)
			if err == nil && v.Type != "bind" && v.Type != "tmpfs" { // a new one is a directory
				return no("a volume of type " + v.Type + " (" + m.Name + ")")
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
	return e.checkPeers(r)
}
