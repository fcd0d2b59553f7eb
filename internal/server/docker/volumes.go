package docker

import (
	"net/http"

	"github.com/moby/moby/api/types/volume"
	"tenon.dev/tenon/internal/engine"
)

func (a *API) volumeList(c *call) error {
	f, err := c.filters("dangling", "driver", "label", "name")
	if err != nil {
		return err
	}
	list, warnings, err := a.eng.VolumeList(c.ctx, engine.Filters(f))
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, volume.ListResponse{Volumes: nonNil(list), Warnings: warnings})
}

func (a *API) volumeInspect(c *call) error {
	v, err := a.eng.VolumeInspect(c.ctx, c.name())
	if err != nil {
		return err
	}
	cp := *v
	cp.UsageData = nil // Docker has it in /system/df only
	return c.json(http.StatusOK, cp)
}

func (a *API) volumeCreate(c *call) error {
	var req volume.CreateRequest
	if err := c.read(&req); err != nil {
		return err
	}
	if req.ClusterVolumeSpec != nil {
		return errNoSwarm
	}
	v, err := a.eng.VolumeCreate(c.ctx, req)
	if err != nil {
		return err
	}
	return c.json(http.StatusCreated, v)
}

func (a *API) volumeRemove(c *call) error {
	return a.then(c, http.StatusNoContent, a.eng.VolumeRemove(c.ctx, c.name(), c.flag("force")))
}

func (a *API) volumePrune(c *call) error {
	f, err := c.filters("label", "label!", "all")
	if err != nil {
		return err
	}
	if c.v.before(42) {
		f["all"] = []string{"true"} // named ones were pruned as well
	}
	rep, err := a.eng.VolumePrune(c.ctx, engine.Filters(f))
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, rep)
}
