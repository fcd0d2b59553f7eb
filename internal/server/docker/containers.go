package docker

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/storage"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/server/wire"
)

var containerFilters = []string{"ancestor", "annotation", "before", "expose", "exited", "health", "id", "isolation", "is-task",
	"label", "name", "network", "publish", "since", "status", "volume"}

func (a *API) containerList(c *call) error {
	f, err := c.filters(containerFilters...)
	if err != nil {
		return err
	}
	limit, err := c.num("limit", 0)
	if err != nil {
		return err
	}
	list, err := a.eng.List(c.ctx, engine.ListOptions{All: c.flag("all"), Size: c.flag("size"), Limit: limit, Filters: f})
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, containerShapes(c.v, list))
}

// containerShapes are containers in a list as version v shows them.
func containerShapes(v Version, list []container.Summary) []container.Summary {
	for i := range list {
		if v.before(46) {
			list[i].HostConfig.Annotations = nil
		}
		if v.before(48) {
			list[i].ImageManifestDescriptor = nil
		}
		if v.before(52) {
			list[i].Health = nil
		}
	}
	return nonNil(list)
}

func (a *API) containerPrune(c *call) error {
	f, err := c.filters("until", "label", "label!")
	if err != nil {
		return err
	}
	rep, err := a.eng.PruneContainers(c.ctx, f)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, rep)
}

func (a *API) containerInspect(c *call) error {
	in, err := a.eng.Inspect(c.ctx, c.name(), c.flag("size"))
	if err != nil {
		return err
	}
	out := *in
	if strings.HasPrefix(c.r.UserAgent(), "docker-sdk-python/") {
		forPython(&out)
	}
	v, err := inspectShape(c.v, out)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, v)
}

// forPython shows the local log driver as json-file: that SDK's run() returns
// the output of a container only if it knows the driver by name, and local is
// what containers get here by default.
func forPython(in *container.InspectResponse) {
	if in.HostConfig != nil && in.HostConfig.LogConfig.Type == "local" {
		hc := *in.HostConfig
		hc.LogConfig.Type, in.HostConfig = "json-file", &hc
	}
}

// inspectShape is a container as version v shows it.
func inspectShape(v Version, in container.InspectResponse) (any, error) {
	if in.Config == nil {
		in.Config = &container.Config{}
	}
	if v.before(48) {
		in.ImageManifestDescriptor = nil
	}
	if v.before(56) && in.HostConfig != nil && in.HostConfig.Umask != nil {
		hc := *in.HostConfig
		hc.Umask, in.HostConfig = nil, &hc
	}
	extra := map[string]any{}
	if v.before(52) {
		extra["NetworkSettings"] = legacyNetworkSettings(&in)
		if in.GraphDriver == nil {
			name := in.Driver
			if in.Storage != nil && in.Storage.RootFS != nil && in.Storage.RootFS.Snapshot != nil {
				name = in.Storage.RootFS.Snapshot.Name
			}
			in.GraphDriver = &storage.DriverData{Name: name}
		}
		in.Storage = nil
		extra["HostConfig"] = map[string]any{"KernelMemoryTCP": 0}
		extra["Config"] = map[string]any{"OnBuild": nil}
	}
	if v.before(45) && in.NetworkSettings != nil && len(in.ID) >= 12 {
		// The short ID was listed among the aliases.
		nets := in.NetworkSettings
		for name, ep := range nets.Networks {
			if ep == nil || !container.NetworkMode(name).IsUserDefined() {
				continue
			}
			for _, al := range []string{in.ID[:12], in.Config.Hostname} {
				if al != "" && !slices.Contains(ep.Aliases, al) {
					ep.Aliases = append(slices.Clip(ep.Aliases), al)
				}
			}
		}
	}
	return merged(in, extra)
}

// legacyNetworkSettings are the fields of the default bridge that stood at the
// top until 1.52; scripts still read .NetworkSettings.IPAddress.
func legacyNetworkSettings(in *container.InspectResponse) map[string]any {
	m := map[string]any{
		"Bridge": "", "HairpinMode": false, "LinkLocalIPv6Address": "", "LinkLocalIPv6PrefixLen": 0,
		"SecondaryIPAddresses": nil, "SecondaryIPv6Addresses": nil,
		"EndpointID": "", "Gateway": "", "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0,
		"IPAddress": "", "IPPrefixLen": 0, "IPv6Gateway": "", "MacAddress": "",
	}
	if in.NetworkSettings == nil {
		return m
	}
	if ep := in.NetworkSettings.Networks["bridge"]; ep != nil {
		m["EndpointID"] = ep.EndpointID
		m["Gateway"] = ep.Gateway
		m["GlobalIPv6Address"] = ep.GlobalIPv6Address
		m["GlobalIPv6PrefixLen"] = ep.GlobalIPv6PrefixLen
		m["IPAddress"] = ep.IPAddress
		m["IPPrefixLen"] = ep.IPPrefixLen
		m["IPv6Gateway"] = ep.IPv6Gateway
		m["MacAddress"] = ep.MacAddress
	}
	return m
}

func (a *API) containerTop(c *call) error {
	args := strings.Fields(c.str("ps_args"))
	if len(args) == 0 {
		args = []string{"-ef"}
	}
	top, err := a.eng.Top(c.ctx, c.name(), args)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, top)
}

func (a *API) containerChanges(c *call) error {
	ch, err := a.eng.Changes(c.ctx, c.name())
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, nonNil(ch))
}

func (a *API) containerStats(c *call) error {
	stream, oneShot := c.flagOr("stream", true), c.flag("one-shot")
	if stream && oneShot {
		return wire.Invalid("cannot have stream=true and one-shot=true")
	}
	rc := http.NewResponseController(c.w)
	began := false
	enc := json.NewEncoder(c.w)
	err := a.eng.Stats(c.ctx, c.name(), stream, oneShot, func(s *container.StatsResponse) error {
		if !began {
			c.w.Header().Set("Content-Type", "application/json")
			c.w.WriteHeader(http.StatusOK)
			began = true
		}
		if c.v.before(52) {
			s.OSType = ""
		}
		if err := enc.Encode(s); err != nil {
			return err
		}
		return rc.Flush()
	})
	if began {
		return nil
	}
	return err
}

func (a *API) containerResize(c *call) error {
	h, w, err := c.size()
	if err != nil {
		return err
	}
	return a.then(c, http.StatusOK, a.eng.Resize(c.ctx, c.name(), h, w))
}

// size is a console's size in cells.
func (c *call) size() (h, w uint, err error) {
	for _, p := range []struct {
		key string
		out *uint
	}{{"h", &h}, {"w", &w}} {
		n, err := c.num(p.key, -1)
		if err != nil {
			return 0, 0, err
		}
		if n < 0 || n > 1<<16-1 {
			return 0, 0, wire.Invalid("the console's size needs h and w from 0 to 65535")
		}
		*p.out = uint(n)
	}
	return h, w, nil
}

// then answers with status if err is nil.
func (a *API) then(c *call, status int, err error) error {
	if err != nil {
		return err
	}
	return c.done(status)
}

func (a *API) containerStart(c *call) error {
	// Some clients send "{}" or "null".
	if c.r.ContentLength > 7 || c.r.ContentLength == -1 {
		return wire.Invalid("starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24")
	}
	if c.str("checkpoint") != "" {
		return errNotBuilt(noteCheckpoint)
	}
	return a.then(c, http.StatusNoContent, a.eng.Start(c.ctx, c.name()))
}

func (c *call) stopOptions() (engine.StopOptions, error) {
	var o engine.StopOptions
	if !c.v.before(42) {
		o.Signal = c.str("signal")
	}
	if c.str("t") != "" {
		t, err := c.num("t", 0)
		if err != nil {
			return o, err
		}
		o.Timeout = &t
	}
	return o, nil
}

func (a *API) containerStop(c *call) error {
	o, err := c.stopOptions()
	if err != nil {
		return err
	}
	return a.then(c, http.StatusNoContent, a.eng.Stop(c.ctx, c.name(), o))
}

func (a *API) containerRestart(c *call) error {
	o, err := c.stopOptions()
	if err != nil {
		return err
	}
	return a.then(c, http.StatusNoContent, a.eng.Restart(c.ctx, c.name(), o))
}

func (a *API) containerKill(c *call) error {
	return a.then(c, http.StatusNoContent, a.eng.Kill(c.ctx, c.name(), c.str("signal")))
}

func (a *API) containerPause(c *call) error {
	return a.then(c, http.StatusNoContent, a.eng.Pause(c.ctx, c.name()))
}

func (a *API) containerUnpause(c *call) error {
	return a.then(c, http.StatusNoContent, a.eng.Unpause(c.ctx, c.name()))
}

func (a *API) containerRename(c *call) error {
	name, err := containerName(c.str("name"))
	if err != nil {
		return err
	}
	if name == "" {
		return wire.Invalid("Neither old nor new names may be empty")
	}
	return a.then(c, http.StatusNoContent, a.eng.Rename(c.ctx, c.name(), name))
}

func (a *API) containerUpdate(c *call) error {
	var u container.UpdateConfig
	if err := c.read(&u); err != nil {
		return err
	}
	if c.v.before(55) {
		u.BlkioWeightDevice = nil
		u.BlkioDeviceReadBps, u.BlkioDeviceWriteBps = nil, nil
		u.BlkioDeviceReadIOps, u.BlkioDeviceWriteIOps = nil, nil
	}
	warnings, err := a.eng.Update(c.ctx, c.name(), u)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, container.UpdateResponse{Warnings: nonNil(warnings)})
}

func (a *API) containerRemove(c *call) error {
	return a.then(c, http.StatusNoContent, a.eng.Remove(c.ctx, c.name(),
		engine.RemoveOptions{Force: c.flag("force"), Volumes: c.flag("v"), Link: c.flag("link")}))
}

func (a *API) containerWait(c *call) error {
	cond := container.WaitConditionNotRunning
	if s := c.str("condition"); s != "" {
		switch cond = container.WaitCondition(s); cond {
		case container.WaitConditionNotRunning, container.WaitConditionNextExit, container.WaitConditionRemoved:
		default:
			return wire.Invalid("invalid condition: %q", s)
		}
	}
	ch, err := a.eng.Wait(c.ctx, c.name(), cond)
	if err != nil {
		return err
	}
	c.w.Header().Set("Content-Type", "application/json")
	if !c.v.before(30) {
		c.w.WriteHeader(http.StatusOK)
		// `docker run` starts the container only when it has seen this header.
		_ = http.NewResponseController(c.w).Flush() // the next write fails as well
	}
	select {
	case res := <-ch:
		out := container.WaitResponse{StatusCode: int64(res.ExitCode)}
		if res.Error != "" {
			out.Error = &container.WaitExitError{Message: res.Error}
		}
		_ = json.NewEncoder(c.w).Encode(out) // the client may be gone
	case <-c.ctx.Done():
	}
	return nil
}
