package client

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"tenon.dev/tenon/client/machineapi"
)

func machinePath(name string) string { return machineapi.Path + "/" + url.PathEscape(name) }

// MachineCreate makes a machine and, unless told not to, starts it.
func (c *Client) MachineCreate(ctx context.Context, req machineapi.CreateRequest) (machineapi.Machine, error) {
	var m machineapi.Machine
	err := c.Post(ctx, machineapi.Path, nil, req, &m)
	return m, err
}

// MachineList lists machines. filters, if not empty, is a JSON object of Docker's
// filters: name, id, label, state.
func (c *Client) MachineList(ctx context.Context, filters string) ([]machineapi.Machine, error) {
	q := url.Values{}
	if filters != "" {
		q.Set("filters", filters)
	}
	var list []machineapi.Machine
	err := c.Get(ctx, machineapi.Path, q, &list)
	return list, err
}

// MachineInspect describes a machine, with what it takes of its host.
func (c *Client) MachineInspect(ctx context.Context, name string) (machineapi.Machine, error) {
	var m machineapi.Machine
	err := c.Get(ctx, machinePath(name), nil, &m)
	return m, err
}

// MachineStart starts a machine; one that runs is no error.
func (c *Client) MachineStart(ctx context.Context, name string) error {
	return c.Post(ctx, machinePath(name)+"/start", nil, nil, nil)
}

func timeQuery(seconds *int) url.Values {
	q := url.Values{}
	if seconds != nil {
		q.Set("t", strconv.Itoa(*seconds))
	}
	return q
}

// MachineStop stops the containers of a machine, each with this many seconds
// before it is killed (nil: their own), and then it; one that does not run is no
// error.
func (c *Client) MachineStop(ctx context.Context, name string, seconds *int) error {
	return c.Post(ctx, machinePath(name)+"/stop", timeQuery(seconds), nil, nil)
}

// MachineRestart is MachineStop and MachineStart.
func (c *Client) MachineRestart(ctx context.Context, name string, seconds *int) error {
	return c.Post(ctx, machinePath(name)+"/restart", timeQuery(seconds), nil, nil)
}

// MachineUpdate changes a machine, at once if it runs.
func (c *Client) MachineUpdate(ctx context.Context, name string, req machineapi.UpdateRequest) error {
	return c.Post(ctx, machinePath(name)+"/update", nil, req, nil)
}

// MachineRemove removes a machine and its disk; with force also one that runs or
// has containers, and with volumes the volumes that its own socket made.
func (c *Client) MachineRemove(ctx context.Context, name string, force, volumes bool) error {
	q := url.Values{}
	if force {
		q.Set("force", "1")
	}
	if volumes {
		q.Set("v", "1")
	}
	return c.Delete(ctx, machinePath(name), q, nil)
}

// MachineLogs returns what the machine's kernel has said: the last tail lines
// (negative: all), and with follow what comes. The caller closes it.
func (c *Client) MachineLogs(ctx context.Context, name string, tail int, follow bool) (io.ReadCloser, error) {
	q := url.Values{}
	if tail >= 0 {
		q.Set("tail", strconv.Itoa(tail))
	}
	if follow {
		q.Set("follow", "1")
	}
	resp, err := c.Do(ctx, Request{Method: http.MethodGet, Path: machinePath(name) + "/logs", Query: q})
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// MachinePrune removes the machines that are stopped and have no containers.
// filters is as in MachineList.
func (c *Client) MachinePrune(ctx context.Context, filters string) (machineapi.PruneReport, error) {
	q := url.Values{}
	if filters != "" {
		q.Set("filters", filters)
	}
	var r machineapi.PruneReport
	err := c.Post(ctx, machineapi.Path+"/prune", q, nil, &r)
	return r, err
}
