package tenon

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strconv"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/client/machineapi"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/server/docker"
	"tenon.dev/tenon/internal/server/wire"
)

// Doors opens and closes the machines' own sockets.
type Doors interface {
	// Check says why a machine of this name could have none, or none of this group's.
	Check(name, group string) error
	// Open listens; a second call does nothing.
	Open(ctx context.Context, r *machine.Record) error
	// Close stops listening, ends what is under way there and removes the socket.
	Close(name string)
	// Path is where a machine's socket is.
	Path(name string) string
}

func (a *API) machineRoutes() {
	one := machineapi.Path + "/{name}"
	a.handle("POST "+machineapi.Path, a.machineCreate)
	a.handle("GET "+machineapi.Path, a.machineList)
	a.handle("POST "+machineapi.Path+"/prune", a.machinePrune)
	a.handle("GET "+one, a.machineInspect)
	a.handle("DELETE "+one, a.machineRemove)
	a.handle("POST "+one+"/start", a.machineStart)
	a.handle("POST "+one+"/stop", a.machineStop)
	a.handle("POST "+one+"/restart", a.machineRestart)
	a.handle("POST "+one+"/update", a.machineUpdate)
	a.handle("GET "+one+"/logs", a.machineLogs)
}

func (a *API) shape(m engine.Machine) machineapi.Machine {
	r, f := m.Record, &m.Record.Facts
	out := machineapi.Machine{
		ID: r.ID, Name: r.Name, Created: r.Created, State: string(m.State), Error: f.Error, Started: f.Started, Finished: f.Finished,
		RestartCount: f.Restarts, RestartPolicy: r.Restart, CPUs: r.CPUs, Memory: r.Memory, Disk: r.Disk, Labels: r.Labels, Shares: []machineapi.Share{},
		Isolation: r.Isolation(), Containers: m.Containers, Running: m.Running,
		BootID: f.BootID, Kernel: f.Kernel, Pid: f.Pid, Accel: f.Accel, KernelLog: f.KernelLog,
	}
	if out.Labels == nil {
		out.Labels = map[string]string{}
	}
	for _, s := range r.Shares {
		out.Shares = append(out.Shares, machineapi.Share{Path: s.Path, ReadOnly: s.ReadOnly})
	}
	if a.cfg.Doors != nil {
		out.Socket = a.cfg.Doors.Path(r.Name)
	}
	if u := m.Usage; u != nil {
		out.Usage = &machineapi.Usage{
			CPU: u.CPU.Nanoseconds(), HostPrivate: u.HostPrivate, MemoryTotal: u.MemoryTotal, MemoryFree: u.MemoryFree,
			DiskSize: u.DiskSize, DiskUsed: u.DiskUsed, DiskOnHost: u.DiskOnHost,
		}
	}
	return out
}

func (a *API) machineCreate(w http.ResponseWriter, r *http.Request) error {
	var req machineapi.CreateRequest
	if err := wire.ReadJSON(w, r, &req); err != nil {
		return err
	}
	rec := &machine.Record{Name: req.Name, CPUs: req.CPUs, Memory: req.Memory, Disk: req.Disk, Restart: req.RestartPolicy, Labels: req.Labels, Group: req.Group}
	for _, s := range req.Shares {
		rec.Shares = append(rec.Shares, machine.Share{Path: s.Path, ReadOnly: s.ReadOnly})
	}
	if a.cfg.Doors != nil {
		if err := a.cfg.Doors.Check(req.Name, req.Group); err != nil {
			return err
		}
	}
	m, err := a.cfg.Engine.MachineCreate(r.Context(), rec, !req.NoStart)
	if err != nil {
		return err
	}
	if a.cfg.Doors != nil {
		if err := a.cfg.Doors.Open(context.WithoutCancel(r.Context()), m.Record); err != nil {
			rmErr := a.cfg.Engine.MachineRemove(context.WithoutCancel(r.Context()), m.Record.ID, engine.MachineRemoveOptions{Force: true, Removing: a.closeDoor})
			return errors.Join(err, rmErr)
		}
	}
	return wire.WriteJSON(w, http.StatusCreated, a.shape(m))
}

func filtersOf(q url.Values) (engine.Filters, error) {
	f, err := docker.ParseFilters(q.Get("filters"))
	return engine.Filters(f), err
}

func (a *API) machineList(w http.ResponseWriter, r *http.Request) error {
	f, err := filtersOf(r.URL.Query())
	if err != nil {
		return err
	}
	list, err := a.cfg.Engine.MachineList(r.Context(), f)
	if err != nil {
		return err
	}
	out := []machineapi.Machine{}
	for _, m := range list {
		out = append(out, a.shape(m))
	}
	return wire.WriteJSON(w, http.StatusOK, out)
}

func (a *API) machineInspect(w http.ResponseWriter, r *http.Request) error {
	m, err := a.cfg.Engine.MachineInspect(r.Context(), r.PathValue("name"), true)
	if err != nil {
		return err
	}
	return wire.WriteJSON(w, http.StatusOK, a.shape(m))
}

// acted answers what was done without a body: 204, or 304 if there was nothing to do.
func acted(w http.ResponseWriter, err error) error {
	switch {
	case errors.Is(err, engine.ErrNotModified):
		w.WriteHeader(http.StatusNotModified)
		return nil
	case err != nil:
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *API) machineStart(w http.ResponseWriter, r *http.Request) error {
	return acted(w, a.cfg.Engine.MachineStart(r.Context(), r.PathValue("name")))
}

// stopOptions reads the time that containers have to end.
func stopOptions(q url.Values) (engine.StopOptions, error) {
	var o engine.StopOptions
	if t := q.Get("t"); t != "" {
		n, err := strconv.Atoi(t)
		if err != nil {
			return o, wire.Invalid("t is a number of seconds, not %q", t)
		}
		o.Timeout = &n
	}
	return o, nil
}

func (a *API) machineStop(w http.ResponseWriter, r *http.Request) error {
	o, err := stopOptions(r.URL.Query())
	if err != nil {
		return err
	}
	return acted(w, a.cfg.Engine.MachineStop(r.Context(), r.PathValue("name"), o))
}

func (a *API) machineRestart(w http.ResponseWriter, r *http.Request) error {
	o, err := stopOptions(r.URL.Query())
	if err != nil {
		return err
	}
	return acted(w, a.cfg.Engine.MachineRestart(r.Context(), r.PathValue("name"), o))
}

func (a *API) machineUpdate(w http.ResponseWriter, r *http.Request) error {
	var req machineapi.UpdateRequest
	if err := wire.ReadJSON(w, r, &req); err != nil {
		return err
	}
	return acted(w, a.cfg.Engine.MachineUpdate(r.Context(), r.PathValue("name"),
		engine.MachineUpdateOptions{CPUs: req.CPUs, Memory: req.Memory, Disk: req.Disk, Restart: req.RestartPolicy}))
}

func (a *API) machineRemove(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	m, err := a.cfg.Engine.MachineInspect(r.Context(), r.PathValue("name"), false)
	if err != nil {
		return err
	}
	o := engine.MachineRemoveOptions{Force: flag(q, "force"), Volumes: flag(q, "v"), Removing: a.closeDoor}
	return acted(w, a.cfg.Engine.MachineRemove(r.Context(), m.Record.ID, o))
}

// closeDoor closes a machine's socket while the name is still the machine's: one that
// is made right after opens its own.
func (a *API) closeDoor(name string) {
	if a.cfg.Doors != nil {
		a.cfg.Doors.Close(name)
	}
}

func flag(q url.Values, key string) bool {
	v := q.Get(key)
	return v != "" && v != "0" && v != "false"
}

func (a *API) machinePrune(w http.ResponseWriter, r *http.Request) error {
	f, err := filtersOf(r.URL.Query())
	if err != nil {
		return err
	}
	names, err := a.cfg.Engine.MachinePrune(r.Context(), f, a.closeDoor)
	if err != nil {
		return err
	}
	return wire.WriteJSON(w, http.StatusOK, machineapi.PruneReport{MachinesDeleted: names})
}

func (a *API) machineLogs(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	tail := -1
	if t := q.Get("tail"); t != "" && t != "all" {
		n, err := strconv.Atoi(t)
		if err != nil || n < 0 {
			return wire.Invalid("tail is a number of lines or all, not %q", t)
		}
		tail = n
	}
	if _, err := a.cfg.Engine.MachineInspect(r.Context(), r.PathValue("name"), false); err != nil {
		return err
	}
	s := wire.NewStream(w, "text/plain; charset=utf-8", true)
	err := a.cfg.Engine.MachineLogs(r.Context(), r.PathValue("name"), tail, flag(q, "follow"), s)
	if err != nil && !s.Began() && !errdefs.IsCanceled(err) {
		s.Close(false)
		return err
	}
	s.Close(true)
	return nil
}
