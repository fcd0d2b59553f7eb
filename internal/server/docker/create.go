package docker

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/server/wire"
)

var nameRegexp = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// containerName validates a container's new name; a leading slash is cut off.
func containerName(s string) (string, error) {
	name := strings.TrimPrefix(s, "/")
	if name == "" {
		return "", nil
	}
	if len(name) < 2 || len(name) > 255 || !nameRegexp.MatchString(name) {
		return "", wire.Invalid("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, and two characters at least", s)
	}
	return name, nil
}

// Platform parses "os[/arch[/variant]]"; nil for an empty string.
func Platform(s string) (*ocispec.Platform, error) {
	if s == "" {
		return nil, nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return nil, wire.Invalid("platform %q: %v", s, err)
	}
	return &p, nil
}

func (a *API) containerCreate(c *call) error {
	body, err := wire.ReadBody(c.w, c.r)
	if err != nil {
		return err
	}
	o, warnings, err := DecodeCreate(c.v, c.str("name"), c.str("platform"), body)
	if err != nil {
		return err
	}
	res, err := a.eng.Create(c.ctx, o)
	if err != nil {
		return err
	}
	return c.json(http.StatusCreated, container.CreateResponse{ID: res.ID, Warnings: nonNil(append(warnings, res.Warnings...))})
}

// DecodeCreate makes options of the body of POST /containers/create as clients
// of version v send it, and tells what it had to warn of. What older versions
// could not express is reset, what they expressed elsewhere is moved.
func DecodeCreate(v Version, name, platform string, body []byte) (engine.CreateOptions, []string, error) {
	var o engine.CreateOptions
	var err error
	if o.Name, err = containerName(name); err != nil {
		return o, nil, err
	}
	if o.Platform, err = Platform(platform); err != nil {
		return o, nil, err
	}
	if len(body) == 0 {
		return o, nil, wire.Invalid("invalid JSON: got EOF while reading request body")
	}
	if err := wire.DecodeJSON(body, &o.Request); err != nil {
		return o, nil, err
	}
	req := &o.Request
	if req.Config == nil {
		return o, nil, wire.Invalid("config cannot be empty in order to create a container")
	}
	if req.Config.Image == "" {
		return o, nil, wire.Invalid("config.Image is missing: say which image the container is made of")
	}
	if req.HostConfig == nil {
		req.HostConfig = &container.HostConfig{}
	}
	if req.NetworkingConfig == nil {
		req.NetworkingConfig = &network.NetworkingConfig{}
	}
	if req.NetworkingConfig.EndpointsConfig == nil {
		req.NetworkingConfig.EndpointsConfig = map[string]*network.EndpointSettings{}
	}
	for n, ep := range req.NetworkingConfig.EndpointsConfig {
		if ep == nil {
			req.NetworkingConfig.EndpointsConfig[n] = &network.EndpointSettings{}
		}
	}
	hc := req.HostConfig
	if hc.NetworkMode == "" || hc.NetworkMode.IsDefault() {
		hc.NetworkMode = network.NetworkBridge
		eps := req.NetworkingConfig.EndpointsConfig
		if ep, ok := eps[network.NetworkDefault]; ok {
			delete(eps, network.NetworkDefault)
			eps[network.NetworkBridge] = ep
		}
	}
	if err := checkMounts(v, hc); err != nil {
		return o, nil, err
	}
	if err := oldVersions(v, req); err != nil {
		return o, nil, err
	}
	warnings, err := legacyFields(v, req, body)
	return o, warnings, err
}

func checkMounts(v Version, hc *container.HostConfig) error {
	for i := range hc.Mounts {
		m := &hc.Mounts[i]
		if v.before(42) {
			// These combinations were not looked at before.
			if m.Type != mount.TypeVolume {
				m.VolumeOptions = nil
			}
			if m.Type != mount.TypeTmpfs {
				m.TmpfsOptions = nil
			}
			if m.BindOptions != nil {
				m.BindOptions.CreateMountpoint = false
			}
			continue
		}
		switch {
		case m.VolumeOptions != nil && m.Type != mount.TypeVolume:
			return wire.Invalid("VolumeOptions must not be specified on mount type %q", m.Type)
		case m.BindOptions != nil && m.Type != mount.TypeBind:
			return wire.Invalid("BindOptions must not be specified on mount type %q", m.Type)
		case m.TmpfsOptions != nil && m.Type != mount.TypeTmpfs:
			return wire.Invalid("TmpfsOptions must not be specified on mount type %q", m.Type)
		case m.BindOptions != nil && m.BindOptions.ReadOnlyForceRecursive && v.before(44):
			return wire.Invalid("BindOptions.ReadOnlyForceRecursive needs API v1.44 or newer")
		case m.VolumeOptions != nil && m.VolumeOptions.Subpath != "" && v.before(45):
			return wire.Invalid("VolumeOptions.Subpath needs API v1.45 or newer")
		case m.Type == mount.TypeImage && v.before(48):
			return wire.Invalid(`Mount type "Image" needs API v1.48 or newer`)
		}
	}
	return nil
}

func oldVersions(v Version, req *container.CreateRequest) error {
	hc, eps := req.HostConfig, req.NetworkingConfig.EndpointsConfig
	if v.before(25) {
		hc.AutoRemove = false // the client removed it
	}
	if v.before(40) {
		if hc.IpcMode.IsEmpty() {
			hc.IpcMode = container.IPCModeShareable
		}
		for i := range hc.Mounts {
			if b := hc.Mounts[i].BindOptions; b != nil {
				b.NonRecursive = false
			}
		}
	}
	if v.before(42) {
		hc.ConsoleSize = [2]uint{}
	}
	if v.before(43) {
		hc.Annotations = nil
	}
	if v.before(44) {
		if req.Config.Healthcheck != nil {
			req.Config.Healthcheck.StartInterval = 0
		}
		if len(eps) > 1 {
			names := make([]string, 0, len(eps))
			for n := range eps {
				names = append(names, n)
			}
			slices.Sort(names)
			return wire.Invalid("Container cannot be created with multiple network endpoints: %s", strings.Join(names, ", "))
		}
		// Read-only binds were not recursive.
		for i := range hc.Mounts {
			m := &hc.Mounts[i]
			if m.Type == mount.TypeBind && m.ReadOnly {
				if m.BindOptions == nil {
					m.BindOptions = &mount.BindOptions{}
				}
				m.BindOptions.ReadOnlyNonRecursive = true
			}
		}
	}
	if v.before(48) {
		for _, ep := range eps {
			ep.GwPriority = 0
		}
	}
	if v.before(56) {
		hc.Umask = nil
	}
	return nil
}

// endpointSysctls is the driver option that holds an endpoint's own sysctls.
const endpointSysctls = "com.docker.network.endpoint.sysctls"

// legacyFields moves what used to stand elsewhere.
func legacyFields(v Version, req *container.CreateRequest, body []byte) ([]string, error) {
	var warnings []string
	hc := req.HostConfig
	if v.before(52) {
		var old struct {
			MacAddress network.HardwareAddr
			HostConfig struct{ Capabilities []string }
		}
		if err := wire.DecodeJSON(body, &old); err != nil {
			return nil, err
		}
		if len(old.HostConfig.Capabilities) > 0 {
			return nil, wire.Invalid("the HostConfig.Capabilities field is not supported; use CapAdd and CapDrop to set capabilities")
		}
		if len(old.MacAddress) > 0 {
			if hc.NetworkMode.IsBridge() || hc.NetworkMode.IsUserDefined() {
				ep, err := mainEndpoint(v, req)
				if err != nil {
					return nil, err
				}
				if len(ep.MacAddress) == 0 {
					ep.MacAddress = old.MacAddress
				} else if !slices.Equal(ep.MacAddress, old.MacAddress) {
					return nil, wire.Invalid("the container-wide MAC address must match the endpoint-specific MAC address for the main network, or be left empty")
				}
			}
			if !v.before(44) {
				warnings = append(warnings, "The container-wide MacAddress field is now deprecated. It should be specified in EndpointsConfig instead.")
			}
		}
	}
	if w, err := interfaceSysctls(v, req); err != nil {
		return nil, err
	} else if w != "" {
		warnings = append(warnings, w)
	}
	var empty []string
	for port, b := range hc.PortBindings {
		if len(b) == 0 {
			hc.PortBindings[port] = []network.PortBinding{{}}
			empty = append(empty, port.String())
		}
	}
	if len(empty) > 0 && !v.before(52) {
		slices.Sort(empty)
		warnings = append(warnings, fmt.Sprintf("Following container port(s) have an empty list of port-bindings: %s. Such bindings will be discarded in a future version.", strings.Join(empty, ", ")))
	}
	return warnings, nil
}

// interfaceSysctls moves sysctls that name eth0 to the endpoint that becomes
// eth0: they can be set only when the interface exists.
func interfaceSysctls(v Version, req *container.CreateRequest) (warning string, err error) {
	hc := req.HostConfig
	if !hc.NetworkMode.IsPrivate() {
		return "", nil
	}
	var names, moved []string
	for k := range hc.Sysctls {
		if p := strings.SplitN(k, ".", 5); len(p) == 5 && p[0] == "net" && strings.HasPrefix(p[3], "eth") {
			if !v.before(48) {
				return "", wire.Invalid("interface specific sysctl setting %q must be supplied using driver option '%s'", k, endpointSysctls)
			}
			if p[3] != "eth0" {
				return "", wire.Invalid("unable to determine network endpoint for sysctl %s, use driver option '%s' to set per-interface sysctls", k, endpointSysctls)
			}
			names = append(names, k)
		}
	}
	if len(names) == 0 {
		return "", nil
	}
	slices.Sort(names)
	ep, err := mainEndpoint(v, req)
	if err != nil {
		return "", err
	}
	for _, k := range names {
		p := strings.SplitN(k, ".", 5)
		moved = append(moved, fmt.Sprintf("net.%s.%s.IFNAME.%s=%s", p[1], p[2], p[4], hc.Sysctls[k]))
		delete(hc.Sysctls, k)
	}
	opt := strings.Join(moved, ",")
	warning = fmt.Sprintf(`Migrated sysctl %q to DriverOpts{%q:%q}.`, strings.Join(names, ","), endpointSysctls, opt)
	if old := ep.DriverOpts[endpointSysctls]; old != "" {
		opt += "," + old
	}
	if ep.DriverOpts == nil {
		ep.DriverOpts = map[string]string{}
	}
	ep.DriverOpts[endpointSysctls] = opt
	return warning, nil
}

// mainEndpoint finds or makes the settings of the network that the network
// mode names.
func mainEndpoint(v Version, req *container.CreateRequest) (*network.EndpointSettings, error) {
	eps := req.NetworkingConfig.EndpointsConfig
	mode := string(req.HostConfig.NetworkMode)
	if ep, ok := eps[mode]; ok {
		return ep, nil
	}
	if len(eps) == 0 {
		ep := &network.EndpointSettings{}
		eps[mode] = ep
		return ep, nil
	}
	if v.before(44) {
		for _, ep := range eps {
			return ep, nil
		}
	}
	return nil, wire.Invalid("HostConfig.NetworkMode must match the identity of a network in NetworkSettings.Networks")
}
