package engine

import (
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
)

// mergeImage lays a request over its image's configuration, as Docker does.
func mergeImage(req *container.Config, img *dockerspec.DockerOCIImageConfig) *container.Config {
	c := *req
	if c.User == "" {
		c.User = img.User
	}
	ports := network.PortSet{}
	for p := range img.ExposedPorts {
		if port, err := network.ParsePort(p); err == nil {
			ports[port] = struct{}{}
		}
	}
	maps.Copy(ports, req.ExposedPorts)
	c.ExposedPorts = nil
	if len(ports) > 0 {
		c.ExposedPorts = ports
	}
	c.Env = mergeEnv(req.Env, img.Env)
	c.Labels = map[string]string{}
	maps.Copy(c.Labels, img.Labels)
	maps.Copy(c.Labels, req.Labels)
	if len(req.Entrypoint) == 0 {
		if len(req.Cmd) == 0 {
			c.Cmd, c.ArgsEscaped = slices.Clone(img.Cmd), img.ArgsEscaped
		}
		if req.Entrypoint == nil {
			c.Entrypoint = slices.Clone(img.Entrypoint)
		}
	}
	if len(c.Entrypoint) == 1 && c.Entrypoint[0] == "" { // --entrypoint ""
		c.Entrypoint = nil
	}
	c.Healthcheck = mergeHealth(req.Healthcheck, img.Healthcheck)
	switch {
	case c.WorkingDir == "":
		c.WorkingDir = img.WorkingDir
	case !filepath.IsAbs(c.WorkingDir) && img.WorkingDir != "":
		c.WorkingDir = filepath.Join(img.WorkingDir, c.WorkingDir)
	}
	if c.WorkingDir != "" && filepath.IsAbs(c.WorkingDir) {
		c.WorkingDir = filepath.Clean(c.WorkingDir)
	}
	vols := map[string]struct{}{}
	maps.Copy(vols, img.Volumes)
	maps.Copy(vols, req.Volumes)
	c.Volumes = nil
	if len(vols) > 0 {
		c.Volumes = vols
	}
	if c.StopSignal == "" {
		c.StopSignal = img.StopSignal
	}
	if len(c.Shell) == 0 {
		c.Shell = img.Shell
	}
	return &c
}

// mergeEnv keeps the request's variables and adds the image's others.
func mergeEnv(req, img []string) []string {
	out := slices.Clone(req)
	have := map[string]bool{}
	for _, e := range req {
		k, _, _ := strings.Cut(e, "=")
		have[k] = true
	}
	for _, e := range img {
		if k, _, _ := strings.Cut(e, "="); !have[k] {
			out = append(out, e)
		}
	}
	return out
}

func mergeHealth(req, img *container.HealthConfig) *container.HealthConfig {
	if req == nil || img == nil {
		if req == nil {
			req = img
		}
		return req
	}
	h := *req
	if len(h.Test) == 0 {
		h.Test = img.Test
	}
	if h.Interval == 0 {
		h.Interval = img.Interval
	}
	if h.Timeout == 0 {
		h.Timeout = img.Timeout
	}
	if h.StartPeriod == 0 {
		h.StartPeriod = img.StartPeriod
	}
	if h.StartInterval == 0 {
		h.StartInterval = img.StartInterval
	}
	if h.Retries == 0 {
		h.Retries = img.Retries
	}
	return &h
}

// hostDefaults copies a host configuration with what Docker fills in.
func (e *Engine) hostDefaults(req *container.HostConfig, facts sandbox.Facts) (*container.HostConfig, []string, error) {
	h := container.HostConfig{}
	if req != nil {
		h = *req
	}
	var warnings []string
	if h.NetworkMode == "" || h.NetworkMode == "default" {
		h.NetworkMode = network.NetworkBridge
	}
	if h.RestartPolicy.Name == "" {
		h.RestartPolicy.Name = container.RestartPolicyDisabled
	}
	if h.IpcMode == "" {
		h.IpcMode = container.IPCModePrivate
	}
	if h.CgroupnsMode == "" {
		h.CgroupnsMode = container.CgroupnsModePrivate
		if h.Privileged && !facts.CgroupV2 {
			h.CgroupnsMode = container.CgroupnsModeHost
		}
	}
	if h.ShmSize == 0 && !h.IpcMode.IsContainer() {
		h.ShmSize = e.def.ShmSize
		if h.ShmSize == 0 {
			h.ShmSize = 64 << 20
		}
	}
	if h.PidsLimit != nil && *h.PidsLimit == 0 {
		h.PidsLimit = nil // clients send 0 for "not said"
	}
	if h.Memory > 0 && h.MemorySwap == 0 {
		h.MemorySwap = 2 * h.Memory
	}
	if h.MemorySwappiness != nil && *h.MemorySwappiness == -1 {
		h.MemorySwappiness = nil
	}
	if h.MemorySwappiness != nil && facts.CgroupV2 {
		warnings = append(warnings, "Your kernel does not support memory swappiness capabilities or the cgroup is not mounted. Memory swappiness discarded.")
		h.MemorySwappiness = nil
	}
	if h.OomKillDisable != nil && *h.OomKillDisable {
		if facts.CgroupV2 {
			warnings = append(warnings, "Your kernel does not support OomKillDisable. OomKillDisable discarded.")
			h.OomKillDisable = nil
		} else if h.Memory == 0 {
			warnings = append(warnings, "OOM killer is disabled for the container, but no memory limit is set, this can result in the system running out of resources.")
		}
	}
	if _, ok := h.StorageOpt["size"]; !ok && e.cfg.DiskLimit > 0 {
		h.StorageOpt = maps.Clone(h.StorageOpt)
		if h.StorageOpt == nil {
			h.StorageOpt = map[string]string{}
		}
		h.StorageOpt["size"] = strconv.FormatInt(e.cfg.DiskLimit, 10)
	}
	if h.LogConfig.Type == "" {
		h.LogConfig.Type = e.cfg.Log.Driver
	}
	if h.Runtime == "" {
		h.Runtime = e.cfg.DefaultRuntime
	}
	if h.Runtime == "" {
		h.Runtime = "tenon"
	}
	if h.PortBindings == nil {
		h.PortBindings = network.PortMap{}
	}
	if h.NetworkMode.IsHost() && (len(h.PortBindings) > 0 || h.PublishAllPorts) {
		warnings = append(warnings, "Published ports are discarded when using host network mode")
	}
	for _, k := range shownFacts { // of another container, of which this request is a copy
		if _, ok := h.Annotations[k]; ok {
			h.Annotations = maps.Clone(h.Annotations)
			delete(h.Annotations, k)
		}
	}
	if h.Links == nil {
		h.Links = []string{}
	}
	if h.MaskedPaths == nil && !h.Privileged {
		h.MaskedPaths = spec.DefaultMaskedPaths
	}
	if h.ReadonlyPaths == nil && !h.Privileged {
		h.ReadonlyPaths = spec.DefaultReadonlyPaths
	}
	if err := e.canonicalModes(&h); err != nil {
		return nil, nil, err
	}
	return &h, warnings, nil
}

// canonicalModes replaces names in container: modes by identifiers, so that a
// later rename changes nothing.
func (e *Engine) canonicalModes(h *container.HostConfig) error {
	fix := func(mode string) (string, error) {
		kind, ref, ok := strings.Cut(mode, ":")
		if !ok || kind != "container" {
			return mode, nil
		}
		c, err := e.find(ref)
		if err != nil {
			return "", invalid("No such container: %s", ref)
		}
		return "container:" + c.id, nil
	}
	for _, m := range []*string{(*string)(&h.NetworkMode), (*string)(&h.PidMode), (*string)(&h.IpcMode), (*string)(&h.UsernsMode)} {
		fixed, err := fix(*m)
		if err != nil {
			return err
		}
		*m = fixed
	}
	return nil
}

// withTag adds the tag that a name without one means.
func withTag(ref string) string {
	if strings.Contains(ref, "@") || strings.LastIndexByte(ref, ':') > strings.LastIndexByte(ref, '/') {
		return ref
	}
	return ref + ":latest"
}
