package engine

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/system"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/sandbox"
)

// gpuKinds are what --gpus can mean, by the driver that a request may name.
var gpuKinds = []struct{ driver, kind string }{{"nvidia", "nvidia.com/gpu"}, {"amd", "amd.com/gpu"}}

// cdiDevices names the devices that --gpus and --device VENDOR/CLASS=NAME ask
// for, as the Container Device Interface does.
func (e *Engine) cdiDevices(requests []mobycontainer.DeviceRequest) ([]string, error) {
	var out []string
	for i := range requests {
		q := &requests[i]
		if q.Driver == "cdi" {
			out = append(out, q.DeviceIDs...)
			continue
		}
		list, err := e.gpus(q)
		if err != nil {
			return nil, err
		}
		out = append(out, list...)
	}
	return out, nil
}

func (e *Engine) gpus(q *mobycontainer.DeviceRequest) ([]string, error) {
	kinds := gpuKinds
	if q.Driver != "" {
		kinds = slices.DeleteFunc(slices.Clone(kinds), func(k struct{ driver, kind string }) bool { return k.driver != q.Driver })
	}
	isGPU := slices.ContainsFunc(q.Capabilities, func(all []string) bool { return slices.Contains(all, "gpu") })
	if !isGPU || len(kinds) == 0 {
		return nil, invalid("could not select device driver %q with capabilities: %v", q.Driver, q.Capabilities)
	}
	var dirs, known []string
	if k, ok := e.cfg.Kernel.(sandbox.NamedDevices); ok {
		dirs, known = k.CDI()
	}
	for _, k := range kinds {
		var all []string
		for _, d := range known {
			if name, ok := strings.CutPrefix(d, k.kind+"="); ok {
				all = append(all, name)
			}
		}
		if len(all) > 0 {
			return chooseGPUs(q, k.kind, all)
		}
	}
	return nil, invalid("could not select device driver %q with capabilities: %v: no CDI specification in %s names %s (NVIDIA's is made by: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml)",
		q.Driver, q.Capabilities, strings.Join(dirs, ", "), kinds[0].kind)
}

// chooseGPUs picks devices of one kind, whose names are all.
func chooseGPUs(q *mobycontainer.DeviceRequest, kind string, all []string) ([]string, error) {
	var out []string
	switch {
	case len(q.DeviceIDs) > 0 && q.Count != 0:
		return nil, invalid("cannot set both Count and DeviceIDs on device request")
	case len(q.DeviceIDs) > 0:
		for _, id := range q.DeviceIDs {
			out = append(out, kind+"="+strings.TrimPrefix(id, kind+"="))
		}
		return out, nil
	case q.Count < 0:
		return []string{kind + "=all"}, nil
	}
	var numbers []int
	for _, name := range all {
		if n, err := strconv.Atoi(name); err == nil {
			numbers = append(numbers, n)
		}
	}
	slices.SortFunc(numbers, cmp.Compare[int])
	if q.Count > len(numbers) {
		return nil, invalid("%d devices of %s were asked for, and there are %d", q.Count, kind, len(numbers))
	}
	for _, n := range numbers[:max(q.Count, 0)] {
		out = append(out, kind+"="+strconv.Itoa(n))
	}
	return out, nil
}

// injectDevices adds named devices to a specification.
func (e *Engine) injectDevices(s *specs.Spec, requests []mobycontainer.DeviceRequest) error {
	if len(requests) == 0 {
		return nil
	}
	names, err := e.cdiDevices(requests)
	if err != nil || len(names) == 0 {
		return err
	}
	k, ok := e.cfg.Kernel.(sandbox.NamedDevices)
	if !ok {
		return invalid("containers of isolation %s can't have the devices %s", e.cfg.Kernel.Isolation(), strings.Join(names, ", "))
	}
	return k.InjectCDI(s, names)
}

func (e *Engine) describeDevices(info *system.Info) {
	k, ok := e.cfg.Kernel.(sandbox.NamedDevices)
	if !ok {
		return
	}
	dirs, names := k.CDI()
	info.CDISpecDirs = dirs
	for _, n := range names {
		info.DiscoveredDevices = append(info.DiscoveredDevices, system.DeviceInfo{Source: "cdi", ID: n})
	}
}
