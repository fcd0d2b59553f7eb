package docker

import (
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types"
	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/server/wire"
)

func (a *API) ping(c *call) error {
	h := c.w.Header()
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	h.Set("Pragma", "no-cache")
	builder := build.BuilderV1 // no BuildKit: clients don't try it
	if a.cfg.Tenant == nil && a.cfg.Builder != nil {
		builder = build.BuilderBuildKit
	}
	h.Set("Builder-Version", string(builder))
	h.Set("Docker-Experimental", "false")
	h.Set("Swarm", "inactive")
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if c.r.Method == http.MethodHead {
		h.Set("Content-Length", "0")
		return nil
	}
	_, _ = io.WriteString(c.w, "OK") // the client may be gone
	return nil
}

var kernelVersion = sync.OnceValue(func() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
})

// vcs is the commit and its time, as the Go tool noted them in the program.
var vcs = sync.OnceValues(func() (commit, at string) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "", ""
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			commit = s.Value[:min(len(s.Value), 12)]
		case "vcs.time":
			at = s.Value
		}
	}
	return commit, at
})

func (a *API) version(c *call) error {
	commit, built := a.cfg.GitCommit, a.cfg.BuildTime
	if commit == "" && built == "" {
		commit, built = vcs()
	}
	kernel := kernelVersion()
	if t := a.cfg.Tenant; t != nil {
		kernel = t.Kernel(c.ctx)
	}
	v := system.VersionResponse{
		Platform:      system.PlatformInfo{Name: "Tenon"},
		Version:       a.cfg.Version,
		APIVersion:    MaxVersion.String(),
		MinAPIVersion: MinVersion.String(),
		Os:            "linux",
		Arch:          runtime.GOARCH,
		GitCommit:     commit,
		GoVersion:     runtime.Version(),
		KernelVersion: kernel,
		BuildTime:     built,
	}
	v.Components = []system.ComponentVersion{{
		Name:    "Engine",
		Version: v.Version,
		Details: map[string]string{
			"ApiVersion": v.APIVersion, "MinAPIVersion": v.MinAPIVersion, "Os": v.Os, "Arch": v.Arch,
			"GitCommit": v.GitCommit, "GoVersion": v.GoVersion, "KernelVersion": v.KernelVersion,
			"BuildTime": built, "Experimental": "false",
		},
	}}
	return c.json(http.StatusOK, v)
}

// names leaves the names of security options: "seccomp" of "name=seccomp,profile=builtin".
func names(options []string) []string {
	out := make([]string, 0, len(options))
	for _, o := range options {
		name, _, _ := strings.Cut(strings.TrimPrefix(o, "name="), ",")
		out = append(out, name)
	}
	return out
}

func (a *API) info(c *call) error {
	in, err := a.eng.Info(c.ctx)
	if err != nil {
		return err
	}
	info := *in // older versions drop fields
	if info.Swarm.LocalNodeState == "" {
		info.Swarm.LocalNodeState = "inactive"
	}
	info.RegistryConfig = registryConfig(info.RegistryConfig)
	extra := map[string]any{}
	if c.v.before(25) {
		info.SecurityOptions = names(info.SecurityOptions)
	}
	if c.v.before(44) {
		rts := make(map[string]system.RuntimeWithStatus, len(info.Runtimes))
		for k, rt := range info.Runtimes {
			rts[k] = system.RuntimeWithStatus{Runtime: rt.Runtime}
		}
		info.Runtimes = rts
	}
	if c.v.before(46) {
		info.Containerd = nil
	}
	if c.v.before(49) {
		info.FirewallBackend = nil
		extra["ContainerdCommit"] = map[string]any{"Expected": info.ContainerdCommit.ID}
		extra["RuncCommit"] = map[string]any{"Expected": info.RuncCommit.ID}
		extra["InitCommit"] = map[string]any{"Expected": info.InitCommit.ID}
	}
	if c.v.before(50) {
		info.DiscoveredDevices = nil
		extra["BridgeNfIptables"], extra["BridgeNfIp6tables"] = false, false
	}
	if c.v.before(53) {
		info.NRI = nil
	}
	v, err := merged(info, extra)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, v)
}

// registryConfig adds what holds in every daemon, and what clients take for
// granted: registries on loopback may speak plain HTTP.
func registryConfig(in *registry.ServiceConfig) *registry.ServiceConfig {
	var out registry.ServiceConfig
	if in != nil {
		out = *in
	}
	loopback := []netip.Prefix{netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("127.0.0.0/8")}
	out.InsecureRegistryCIDRs = append(loopback, out.InsecureRegistryCIDRs...)
	out.Mirrors = nonNil(out.Mirrors)
	out.IndexConfigs = maps.Clone(out.IndexConfigs)
	if out.IndexConfigs == nil {
		out.IndexConfigs = map[string]*registry.IndexInfo{}
	}
	if out.IndexConfigs["docker.io"] == nil {
		out.IndexConfigs["docker.io"] = &registry.IndexInfo{Name: "docker.io", Mirrors: out.Mirrors, Secure: true, Official: true}
	}
	return &out
}

func (a *API) auth(c *call) error {
	var cfg registry.AuthConfig
	if err := c.read(&cfg); err != nil {
		return err
	}
	status, err := a.images.CheckAuth(c.ctx, cfg)
	if err != nil {
		return err
	}
	if status == "" {
		status = "Login Succeeded"
	}
	return c.json(http.StatusOK, registry.AuthResponse{Status: status})
}

// eventTypes are what a client may ask /events for.
var eventTypes = []string{types.MediaTypeJSONLines, types.MediaTypeNDJSON, types.MediaTypeJSONSequence}

func (a *API) events(c *call) error {
	since, err := c.unixTime("since")
	if err != nil {
		return err
	}
	until, err := c.unixTime("until")
	if err != nil {
		return err
	}
	if !until.IsZero() && until.Before(since) {
		return wire.Invalid("`since` time (%s) cannot be after `until` time (%s)", c.str("since"), c.str("until"))
	}
	f, err := c.filters("config", "container", "daemon", "event", "image", "label", "network", "node",
		"plugin", "scope", "secret", "service", "type", "volume")
	if err != nil {
		return err
	}
	ch, err := a.eng.Events(c.ctx, since, until, engine.Filters(f))
	if err != nil {
		return err
	}
	ct := types.MediaTypeJSONLines
	if c.v.before(52) {
		ct = types.MediaTypeJSON
	}
	if want := accepted(c.r.Header.Get("Accept"), eventTypes); want != "" {
		ct = want
	}
	c.w.Header().Set("Content-Type", ct)
	c.w.WriteHeader(http.StatusOK)
	rc := http.NewResponseController(c.w)
	_ = rc.Flush() // the next write fails as well
	enc := json.NewEncoder(c.w)
	for {
		select {
		case m, ok := <-ch:
			if !ok {
				return nil
			}
			if c.v.before(46) && m.Type == events.ImageEventType && m.Action == events.ActionCreate {
				continue
			}
			if ct == types.MediaTypeJSONSequence {
				_, _ = c.w.Write([]byte{0x1e}) // the encoder's write fails as well
			}
			if enc.Encode(eventShape(c.v, &m)) != nil {
				return nil // the client is gone
			}
			if len(ch) == 0 && rc.Flush() != nil {
				return nil
			}
		case <-c.ctx.Done():
			return nil
		}
	}
}

// legacyEvent is an event as versions before 1.52 had it; some of their
// clients fail without the three fields.
type legacyEvent struct {
	Status string `json:"status,omitempty"`
	ID     string `json:"id,omitempty"`
	From   string `json:"from,omitempty"`
	*events.Message
}

func eventShape(v Version, m *events.Message) any {
	if !v.before(52) {
		return m
	}
	switch m.Type {
	case events.ContainerEventType:
		return legacyEvent{string(m.Action), m.Actor.ID, m.Actor.Attributes["image"], m}
	case events.ImageEventType:
		return legacyEvent{string(m.Action), m.Actor.ID, "", m}
	}
	return m
}

// accepted returns the first of offers that an Accept header names outright.
func accepted(header string, offers []string) string {
	for part := range strings.SplitSeq(header, ",") {
		name, params, _ := strings.Cut(part, ";")
		if strings.ReplaceAll(params, " ", "") == "q=0" {
			continue
		}
		for _, o := range offers {
			if strings.EqualFold(strings.TrimSpace(name), o) {
				return o
			}
		}
	}
	return ""
}

// legacyUsage is /system/df as versions before 1.52 had it; 1.52 has both.
type legacyUsage struct {
	LayersSize int64               `json:"LayersSize,omitempty"`
	Images     any                 `json:"Images,omitempty"` // a list
	Containers []container.Summary `json:"Containers,omitzero"`
	Volumes    []volume.Volume     `json:"Volumes,omitzero"`
	BuildCache []build.CacheRecord `json:"BuildCache,omitzero"`
}

func (a *API) diskUsage(c *call) error {
	want := map[system.DiskUsageObject]bool{}
	for _, t := range c.q["type"] {
		switch o := system.DiskUsageObject(t); o {
		case system.ContainerObject, system.ImageObject, system.VolumeObject, system.BuildCacheObject:
			want[o] = true
		default:
			return wire.Invalid("unknown object type: %s", t)
		}
	}
	all := len(want) == 0 || c.v.before(42)
	verbose := !c.v.before(52) && c.flag("verbose")
	legacy := !verbose

	var du system.DiskUsage
	var old legacyUsage
	if all || want[system.ImageObject] {
		u, err := a.images.DiskUsage(c.ctx, true)
		if err != nil {
			return err
		}
		du.ImageUsage, old.LayersSize = u, u.TotalSize
		if legacy {
			if old.Images, err = imageShapes(c.v, slices.Clone(u.Items), true); err != nil {
				return err
			}
		}
	}
	if all || want[system.ContainerObject] {
		u, err := a.containerUsage(c)
		if err != nil {
			return err
		}
		du.ContainerUsage = u
		old.Containers = containerShapes(c.v, slices.Clone(u.Items))
	}
	if all || want[system.VolumeObject] {
		u, err := a.volumeUsage(c)
		if err != nil {
			return err
		}
		du.VolumeUsage = u
		old.Volumes = nonNil(u.Items)
	}
	if all || want[system.BuildCacheObject] {
		u, err := a.buildUsage(c)
		if err != nil {
			return err
		}
		du.BuildCacheUsage = u
		old.BuildCache = nonNil(u.Items)
	}
	if c.v.before(52) {
		return c.json(http.StatusOK, old)
	}
	if !verbose {
		stripItems(&du)
	}
	if !legacy {
		return c.json(http.StatusOK, du)
	}
	return c.json(http.StatusOK, struct {
		legacyUsage
		system.DiskUsage
	}{old, du})
}

func stripItems(du *system.DiskUsage) {
	if u := du.ImageUsage; u != nil {
		cp := *u
		cp.Items, du.ImageUsage = nil, &cp
	}
	if u := du.BuildCacheUsage; u != nil {
		cp := *u
		cp.Items, du.BuildCacheUsage = nil, &cp
	}
	if u := du.ContainerUsage; u != nil {
		cp := *u
		cp.Items, du.ContainerUsage = nil, &cp
	}
	if u := du.VolumeUsage; u != nil {
		cp := *u
		cp.Items, du.VolumeUsage = nil, &cp
	}
}

func (a *API) containerUsage(c *call) (*container.DiskUsage, error) {
	list, err := a.eng.List(c.ctx, engine.ListOptions{All: true, Size: true})
	if err != nil {
		return nil, err
	}
	u := &container.DiskUsage{Items: list, TotalCount: int64(len(list))}
	for i := range list {
		s := &list[i]
		u.TotalSize += s.SizeRw
		switch s.State {
		case container.StateRunning, container.StatePaused, container.StateRestarting:
			u.ActiveCount++
		default:
			u.Reclaimable += s.SizeRw
		}
	}
	return u, nil
}

func (a *API) volumeUsage(c *call) (*volume.DiskUsage, error) {
	list, _, err := a.eng.VolumeList(c.ctx, nil)
	if err != nil {
		return nil, err
	}
	u := &volume.DiskUsage{Items: list, TotalCount: int64(len(list))}
	for i := range list {
		if list[i].UsageData == nil {
			// The list is cheap and has no sizes.
			if d, err := a.eng.VolumeUsage(c.ctx, list[i].Name); err == nil {
				list[i].UsageData = d
			}
		}
		d := list[i].UsageData
		if d == nil {
			continue
		}
		if d.Size > 0 {
			u.TotalSize += d.Size
		}
		if d.RefCount > 0 {
			u.ActiveCount++
		} else if d.Size > 0 {
			u.Reclaimable += d.Size
		}
	}
	return u, nil
}

func nonNil[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

// started is when a stream of output should have shown its header at the
// latest, so that a client that only waits for it goes on.
const started = 100 * time.Millisecond
