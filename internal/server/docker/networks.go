package docker

import (
	"net/http"

	"github.com/moby/moby/api/types/network"
	tnet "tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/server/wire"
)

func (a *API) networkList(c *call) error {
	f, err := c.filters("dangling", "driver", "id", "label", "name", "scope", "type")
	if err != nil {
		return err
	}
	list, err := a.nets.List(c.ctx, tnet.Filters(f))
	if err != nil {
		return err
	}
	if c.v.before(52) { // always empty from 1.28 on, but clients look into it
		for i := range list {
			if !c.v.before(28) || list[i].Containers == nil {
				list[i].Containers = map[string]network.EndpointResource{}
			}
			list[i].Status = nil
		}
		return c.json(http.StatusOK, nonNil(list))
	}
	out := make([]network.Summary, 0, len(list))
	for i := range list {
		out = append(out, network.Summary{Network: list[i].Network})
	}
	return c.json(http.StatusOK, out)
}

func (a *API) networkInspect(c *call) error {
	in, err := a.nets.Inspect(c.ctx, c.name())
	if err != nil {
		return err
	}
	if c.v.before(52) {
		in.Status = nil
	}
	if in.Containers == nil {
		in.Containers = map[string]network.EndpointResource{}
	}
	return c.json(http.StatusOK, in)
}

func (a *API) networkCreate(c *call) error {
	var req network.CreateRequest
	if err := c.read(&req); err != nil {
		return err
	}
	if req.Name == "" {
		return wire.Invalid("the network needs a name")
	}
	if c.v.before(48) {
		req.EnableIPv4 = nil
	}
	in, err := a.nets.Create(c.ctx, req)
	if err != nil {
		return err
	}
	return c.json(http.StatusCreated, network.CreateResponse{ID: in.ID})
}

func (a *API) networkRemove(c *call) error {
	return a.then(c, http.StatusNoContent, a.nets.Remove(c.ctx, c.name()))
}

func (a *API) networkConnect(c *call) error {
	var req network.ConnectRequest
	if err := c.read(&req); err != nil {
		return err
	}
	if req.Container == "" {
		return wire.Invalid("Container is missing: say which container is to be connected")
	}
	if req.EndpointConfig == nil {
		req.EndpointConfig = &network.EndpointSettings{}
	}
	if c.v.before(54) {
		req.EndpointConfig.MacAddress = nil
	}
	return a.then(c, http.StatusOK, a.eng.ConnectNetwork(c.ctx, c.name(), req.Container, req.EndpointConfig))
}

func (a *API) networkDisconnect(c *call) error {
	var req network.DisconnectRequest
	if err := c.read(&req); err != nil {
		return err
	}
	if req.Container == "" {
		return wire.Invalid("Container is missing: say which container is to be disconnected")
	}
	return a.then(c, http.StatusOK, a.eng.DisconnectNetwork(c.ctx, c.name(), req.Container, req.Force))
}

func (a *API) networkPrune(c *call) error {
	f, err := c.filters("until", "label", "label!")
	if err != nil {
		return err
	}
	names, err := a.nets.Prune(c.ctx, tnet.Filters(f))
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, network.PruneReport{NetworksDeleted: names})
}
