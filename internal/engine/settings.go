package engine

import (
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	mobycontainer "github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// logSettings says how the shim keeps a container's output; nil: not at all.
func (e *Engine) logSettings(r *container.Record) (*taskv1.Log, error) {
	lc := r.HostConfig.LogConfig
	l := &taskv1.Log{Driver: lc.Type, MaxSize: uint64(e.cfg.Log.MaxSize), MaxFiles: uint32(e.cfg.Log.MaxFiles), Compress: lc.Type == "local"}
	switch lc.Type {
	case "none":
		return nil, nil
	case "local", "json-file":
	default:
		return nil, invalid("logger: no log driver named '%s' is registered; this release has local, json-file and none", lc.Type)
	}
	l.Path = e.logPath(r)
	attrs := map[string]string{}
	for k, v := range lc.Config {
		switch k {
		case "max-size":
			if v == "-1" {
				l.MaxSize = 0
				continue
			}
			n, err := units.RAMInBytes(v)
			if err != nil || n <= 0 {
				return nil, invalid("invalid value for 'max-size': %s", v)
			}
			l.MaxSize = uint64(n)
		case "max-file":
			n, err := strconv.ParseUint(v, 10, 16)
			if err != nil || n < 1 {
				return nil, invalid("invalid value for 'max-file': %s", v)
			}
			l.MaxFiles = uint32(n)
		case "compress":
			b, err := strconv.ParseBool(v)
			if err != nil {
				return nil, invalid("invalid value for 'compress': %s", v)
			}
			l.Compress = b
		case "mode":
			if v != "blocking" && v != "non-blocking" {
				return nil, invalid("logger: logging mode not supported: %s", v)
			}
		case "max-buffer-size": // of the non-blocking mode, which never blocks here either
		default:
			ours, err := logAttrs(attrs, r, k, v)
			if err != nil {
				return nil, err
			}
			if !ours {
				return nil, invalid("unknown log opt '%s' for %s log driver", k, lc.Type)
			}
		}
	}
	if len(attrs) > 0 {
		l.Attrs = attrs
	}
	if _, asked := lc.Config["compress"]; asked && l.Compress && (l.MaxFiles < 2 || l.MaxSize == 0) {
		return nil, invalid("compress cannot be true when max-file is less than 2 or max-size is not set")
	}
	return l, nil
}

func (e *Engine) logPath(r *container.Record) string {
	if r.HostConfig.LogConfig.Type == "json-file" {
		return filepath.Join(e.stateDir(r.ID), "log", r.ID+"-json.log")
	}
	return filepath.Join(e.stateDir(r.ID), "log", "container.log")
}

// runtimeOf finds the OCI runtime command; the zero Runtime is Tenon's own.
func (e *Engine) runtimeOf(h *mobycontainer.HostConfig) (Runtime, error) {
	if h.Runtime == "" || h.Runtime == "tenon" {
		return Runtime{}, nil
	}
	if r, ok := e.cfg.Runtimes[h.Runtime]; ok {
		return r, nil
	}
	known := slices.Sorted(maps.Keys(e.cfg.Runtimes))
	return Runtime{}, invalid("unknown or invalid runtime name: %s (known: %s)", h.Runtime, strings.Join(append([]string{"tenon"}, known...), ", "))
}

// planDevices looks up --device and the block devices of I/O limits.
func (e *Engine) planDevices(h *mobycontainer.HostConfig) ([]spec.Device, error) {
	var out []spec.Device
	for _, d := range h.Devices {
		access := d.CgroupPermissions
		if access == "" {
			access = "rwm"
		}
		if h.Privileged && d.PathOnHost == d.PathInContainer {
			continue // among all the others
		}
		ds, err := e.cfg.Kernel.Devices(d.PathOnHost, d.PathInContainer, access)
		if err != nil {
			return nil, err
		}
		out = append(out, ds...)
	}
	_, err := e.numberDevices(&h.Resources, nil)
	return out, err
}

// numberDevices returns a copy of r in which device paths are numbers, as
// package spec wants them. Where the container's own disks are given, they
// stand for each of the host's that is named.
func (e *Engine) numberDevices(r *mobycontainer.Resources, disks []spec.Device) (*mobycontainer.Resources, error) {
	c := *r
	resolve := func(path string) (string, error) {
		major, minor, err := e.cfg.Kernel.BlockDevice(path)
		return spec.DevPath(major, minor), err
	}
	var err error
	c.BlkioWeightDevice = nil
	for _, d := range r.BlkioWeightDevice {
		x := *d
		if x.Path, err = resolve(d.Path); err != nil {
			return nil, err
		}
		c.BlkioWeightDevice = append(c.BlkioWeightDevice, &x)
	}
	for _, list := range []*[]*throttle{&c.BlkioDeviceReadBps, &c.BlkioDeviceWriteBps, &c.BlkioDeviceReadIOps, &c.BlkioDeviceWriteIOps} {
		old := *list
		*list = nil
		for _, d := range old {
			x := *d
			if x.Path, err = resolve(d.Path); err != nil {
				return nil, err
			}
			if len(disks) == 0 {
				*list = append(*list, &x)
			}
			for _, own := range disks {
				*list = append(*list, &throttle{Path: spec.DevPath(uint32(own.Major), uint32(own.Minor)), Rate: d.Rate})
			}
		}
	}
	return &c, nil
}

// checkRelations refuses a request that refers to containers that are not
// there.
func (e *Engine) checkRelations(r *container.Record) error {
	for _, l := range r.HostConfig.Links {
		target, alias := splitLink(l)
		if alias == "" {
			return invalid("bad format for links: %s", l)
		}
		if _, err := e.find(target); err != nil {
			return invalid("could not get container for %s: No such container: %s", target, target)
		}
	}
	return nil
}

// peer returns the running container that a container: mode of r names.
func (e *Engine) peer(r *container.Record, id, what string) (*container.Record, error) {
	c, err := e.find(id)
	if err != nil {
		return nil, conflict("cannot join %s of a container that is gone: %s", what, id)
	}
	p := c.record()
	if !p.Running() {
		return nil, conflict("cannot join %s of a non running container: %s", what, id)
	}
	if p.Facts.Restarting {
		return nil, conflict("Container %s is restarting, wait until the container is running", id)
	}
	return p, sameKernel(r, p, what)
}

// sameKernel refuses namespaces of a container on another kernel.
func sameKernel(r, peer *container.Record, what string) error {
	if r.Isolation == peer.Isolation && peer.Isolation != sandbox.VM {
		return nil
	}
	return conflict("cannot join %s of container %s: it runs on another kernel (isolation %s); nothing was started", what, peer.ID, peer.Isolation)
}

// checkPeers refuses to join a container on another kernel before anything is made.
func (e *Engine) checkPeers(r *container.Record) error {
	h := r.HostConfig
	_, user, _ := strings.Cut(string(h.UsernsMode), "container:")
	for _, p := range []struct{ what, ref string }{
		{"network", h.NetworkMode.ConnectedContainer()}, {"IPC", h.IpcMode.Container()}, {"PID namespace", h.PidMode.Container()},
		{"user namespace", user},
	} {
		if p.ref == "" {
			continue
		}
		if c, err := e.find(p.ref); err == nil {
			if err := sameKernel(r, c.record(), p.what); err != nil {
				return err
			}
		}
	}
	return nil
}

// cpusFor is how many CPUs a kernel must have for these limits.
func cpusFor(r *mobycontainer.Resources) int {
	n := int((r.NanoCPUs + 1e9 - 1) / 1e9)
	if r.CPUQuota > 0 {
		period := r.CPUPeriod
		if period <= 0 {
			period = 100_000 // the kernel's own
		}
		n = max(n, int((r.CPUQuota+period-1)/period))
	}
	set, err := spec.ParseSet(r.CpusetCpus)
	if err != nil {
		return n // it was refused before
	}
	for i := range set {
		n = max(n, i+1)
	}
	return n
}

// checkCPUs refuses more CPUs than the kernel has.
func (e *Engine) checkCPUs(r *mobycontainer.Resources, facts sandbox.Facts) error {
	n := facts.CPUs
	if r.NanoCPUs > int64(n)*1e9 || r.NanoCPUs > 0 && r.NanoCPUs < 1e7 {
		return invalid("range of CPUs is from 0.01 to %d.00, as there are only %d CPUs available", n, n)
	}
	for _, set := range []struct{ what, text, there string }{{"CPUs", r.CpusetCpus, facts.CPUSet}, {"memory nodes", r.CpusetMems, facts.MemorySet}} {
		asked, err := spec.ParseSet(set.text)
		if err != nil {
			return err
		}
		there, err := spec.ParseSet(set.there)
		if err != nil || len(there) == 0 {
			continue // not known: the kernel decides
		}
		for n := range asked {
			if !there[n] {
				return invalid("Requested %s are not available - requested %s, available: %s", set.what, set.text, set.there)
			}
		}
	}
	if (r.CPURealtimePeriod != 0 || r.CPURealtimeRuntime != 0) && !facts.RealTime {
		return invalid("kernel does not support CPU real-time scheduler")
	}
	return nil
}
