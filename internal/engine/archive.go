package engine

import (
	"context"
	"io"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// files says where the shim finds a container's files: in the running task, or
// in the root that it mounts for the purpose. The caller releases them.
func (e *Engine) files(ctx context.Context, c *ctr) (_ *task.Client, f task.Files, release func(), err error) {
	f = task.Files{ID: c.id}
	r := c.record()
	if err := noSystem(c, "its files (cp, diff, export, commit)"); err != nil {
		return nil, f, nil, err
	}
	if r.Facts.Removing || r.Facts.Dead {
		return nil, f, nil, conflict("container %s is being removed", c.id)
	}
	for _, m := range r.Mounts {
		f.Skip = append(f.Skip, m.Destination)
	}
	for dest := range r.HostConfig.Tmpfs {
		f.Skip = append(f.Skip, path.Clean(dest))
	}
	if !onHost(r) {
		client, root, release, running, err := e.offlineFiles(ctx, c)
		if running {
			release = func() {}
			if client, err = e.client(ctx, c); err == nil {
				root = c.machineRoot()
			}
		}
		f.Root = root
		return client, f, release, err
	}
	client, err := e.client(ctx, c)
	if err != nil {
		return nil, f, nil, err
	}
	root, err := e.rootOf(ctx, r)
	if err != nil {
		return nil, f, nil, err
	}
	var mounts []spec.Mount
	if !r.Running() {
		if mounts, err = e.specMounts(r); err != nil {
			return nil, f, nil, err
		}
		mounts = append(mounts, e.writtenFiles(r, mounts)...)
	}
	f.Root = e.rootMessage(r, root, mounts)
	return client, f, func() {}, nil
}

// lent is a stream of a container's files, which are released with it.
type lent struct {
	io.ReadCloser
	release func()
}

func (l lent) Close() error {
	defer l.release()
	return l.ReadCloser.Close()
}

// engineFiles are the mount points that every start makes in the root; they
// are no change of the container's.
var engineFiles = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev", "/proc", "/sys", "/sbin/docker-init", "/.dockerenv"}

func pathError(ref, p string, err error) error {
	if errdefs.IsNotFound(err) {
		return notFound("Could not find the file %s in container %s", p, ref)
	}
	return err
}

// StatPath looks at a path in a container's root. NotFound if it is not there.
func (e *Engine) StatPath(ctx context.Context, ref, p string) (*mobycontainer.PathStat, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	client, f, release, err := e.files(ctx, c)
	if err != nil {
		return nil, err
	}
	defer release()
	st, err := client.StatFile(ctx, f, p)
	if err != nil {
		return nil, pathError(ref, p, err)
	}
	return pathStat(st), nil
}

func pathStat(st task.FileStat) *mobycontainer.PathStat {
	return &mobycontainer.PathStat{Name: st.Name, Size: st.Size, Mode: st.Mode, Mtime: st.ModTime, LinkTarget: st.LinkTarget}
}

// ReadArchive returns a tar of a path. The caller closes it.
func (e *Engine) ReadArchive(ctx context.Context, ref, p string) (io.ReadCloser, *mobycontainer.PathStat, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, nil, err
	}
	client, f, release, err := e.files(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	r, st, err := client.ReadFiles(ctx, f, p)
	if err != nil {
		release()
		return nil, nil, pathError(ref, p, err)
	}
	e.emit(c, events.ActionArchivePath, nil)
	return lent{r, release}, pathStat(st), nil
}

// WriteArchive unpacks a tar into a directory of a container.
func (e *Engine) WriteArchive(ctx context.Context, ref, p string, tar io.Reader, noOverwriteDirNonDir, copyUIDGID bool) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	client, f, release, err := e.files(ctx, c)
	if err != nil {
		return err
	}
	defer release()
	if err := writable(c.record(), path.Clean("/"+p)); err != nil {
		return err
	}
	if err := client.WriteFiles(ctx, f, p, tar, noOverwriteDirNonDir, copyUIDGID); err != nil {
		return pathError(ref, p, err)
	}
	if r := c.record(); !onHost(r) && !r.Facts.Changed {
		if err := e.change(c, func(r *container.Record) { r.Facts.Changed = true }); err != nil {
			return err
		}
	}
	e.emit(c, events.ActionExtractToDir, nil)
	return nil
}

// writable refuses a path on a read-only mount, or on a read-only root.
func writable(r *container.Record, p string) error {
	best, rw := "", !r.HostConfig.ReadonlyRootfs
	consider := func(dest string, w bool) {
		if (p == dest || strings.HasPrefix(p, dest+"/")) && len(dest) > len(best) {
			best, rw = dest, w
		}
	}
	for _, m := range r.Mounts {
		consider(m.Destination, m.RW)
	}
	for dest := range r.HostConfig.Tmpfs {
		consider(path.Clean(dest), true)
	}
	switch {
	case rw:
		return nil
	case best != "":
		return errdefs.ErrPermissionDenied.WithMessage("mounted volume is marked read-only")
	}
	return errdefs.ErrPermissionDenied.WithMessage("container rootfs is marked read-only")
}

// Changes lists what differs from the image.
func (e *Engine) Changes(ctx context.Context, ref string) ([]mobycontainer.FilesystemChange, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	client, f, release, err := e.files(ctx, c)
	if err != nil {
		return nil, err
	}
	defer release()
	f.Skip = append(f.Skip, engineFiles...)
	kinds := map[taskv1.Change_Kind]mobycontainer.ChangeType{
		taskv1.Change_MODIFIED: mobycontainer.ChangeModify, taskv1.Change_ADDED: mobycontainer.ChangeAdd, taskv1.Change_DELETED: mobycontainer.ChangeDelete,
	}
	out := []mobycontainer.FilesystemChange{}
	err = client.Changes(ctx, f, func(ch *taskv1.Change) error {
		out = append(out, mobycontainer.FilesystemChange{Kind: kinds[ch.Kind], Path: ch.Path})
		return nil
	})
	return out, err
}

// Export returns a tar of a container's whole root. The caller closes it.
func (e *Engine) Export(ctx context.Context, ref string) (io.ReadCloser, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	client, f, release, err := e.files(ctx, c)
	if err != nil {
		return nil, err
	}
	r, err := client.Export(ctx, f)
	if err != nil {
		release()
		return nil, err
	}
	e.emit(c, events.ActionExport, nil)
	return lent{r, release}, nil
}

// Top is `ps` in a container.
func (e *Engine) Top(ctx context.Context, ref string, psArgs []string) (mobycontainer.TopResponse, error) {
	var out mobycontainer.TopResponse
	c, err := e.running(ref)
	if err != nil {
		return out, err
	}
	client, err := e.client(ctx, c)
	if err != nil {
		return out, err
	}
	out.Titles, out.Processes, err = client.Processes(ctx, c.id, psArgs)
	if err == nil {
		e.emit(c, events.ActionTop, nil)
	}
	return out, err
}

// running finds a container that runs.
func (e *Engine) running(ref string) (*ctr, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	r := c.record()
	if r.Facts.Restarting {
		return nil, conflict("Container %s is restarting, wait until the container is running", c.id)
	}
	if !r.Running() {
		return nil, conflict("container %s is not running", c.id)
	}
	return c, nil
}

// Update changes limits and the restart policy; a running container feels the
// limits at once.
func (e *Engine) Update(ctx context.Context, ref string, u mobycontainer.UpdateConfig) ([]string, error) {
	c, err := e.lockOp(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer c.op.unlock()
	r := c.record()
	if r.Facts.Removing || r.Facts.Dead {
		return nil, conflict("Cannot update container %s: container is marked for removal and cannot be \"update\"", c.id)
	}
	if isSystem(r) {
		if err := checkSystemUpdate(&u.Resources); err != nil {
			return nil, err
		}
	}
	h, err := mergeUpdate(r.HostConfig, u)
	if err == nil {
		err = e.checkCPUs(&h.Resources, e.factsOf(r.Isolation))
	}
	if err != nil {
		return nil, err
	}
	change := u.Resources
	if h.PidsLimit != nil && u.PidsLimit != nil {
		change.PidsLimit = h.PidsLimit
	}
	change.MemorySwap = h.MemorySwap
	if change.Memory == 0 && u.MemorySwap != 0 {
		change.Memory = h.Memory // a swap limit is set together with memory's
	}
	if u.Memory == 0 && u.MemorySwap == 0 {
		change.MemorySwap = 0
	}
	if throttled(&change) && !onHost(r) { // of the host's devices, which it has not
		return nil, errdefs.ErrNotImplemented.WithMessage("a limit of a block device can't be changed with --isolation " + r.Isolation + " in this release")
	}
	numbered, err := e.numberDevices(&change, nil)
	if err != nil {
		return nil, err
	}
	undoHost := r.HostConfig
	if err := e.change(c, func(r *container.Record) { r.HostConfig = h }); err != nil {
		return nil, err
	}
	if r.Running() {
		client, err := e.client(ctx, c)
		if g := c.onMachine(); g != nil && err == nil && !g.machine.Lasting() {
			err = g.machine.Grow(ctx, change.Memory, cpusFor(&h.Resources))
		}
		if err == nil {
			err = client.Update(ctx, c.id, spec.Resources(numbered, spec.Defaults{}))
		}
		if err != nil {
			if e2 := e.change(c, func(r *container.Record) { r.HostConfig = undoHost }); e2 != nil {
				e.log.Error("update is recorded though it was refused", "container", c.id, "err", e2)
			}
			return nil, invalid("Cannot update container %s: %v", c.id, err)
		}
	}
	e.emit(c, events.ActionUpdate, nil)
	return []string{}, nil
}

// mergeUpdate lays what is set over a host configuration and checks the result.
func mergeUpdate(old *mobycontainer.HostConfig, u mobycontainer.UpdateConfig) (*mobycontainer.HostConfig, error) {
	h := *old
	set := func(to *int64, v int64) {
		if v != 0 {
			*to = v
		}
	}
	if u.NanoCPUs > 0 && (h.CPUPeriod > 0 || h.CPUQuota > 0) && u.CPUPeriod == 0 {
		return nil, invalid("Conflicting options: Nano CPUs cannot be updated as CPU Period has already been set")
	}
	if u.CPUPeriod > 0 && h.NanoCPUs > 0 || u.CPUQuota > 0 && h.NanoCPUs > 0 {
		return nil, invalid("Conflicting options: CPU Period cannot be updated as NanoCPUs has already been set")
	}
	set(&h.CPUShares, u.CPUShares)
	set(&h.NanoCPUs, u.NanoCPUs)
	set(&h.CPUPeriod, u.CPUPeriod)
	set(&h.CPUQuota, u.CPUQuota)
	set(&h.CPURealtimePeriod, u.CPURealtimePeriod)
	set(&h.CPURealtimeRuntime, u.CPURealtimeRuntime)
	set(&h.MemoryReservation, u.MemoryReservation)
	if u.Memory != 0 {
		if h.MemorySwap > 0 && u.Memory > h.MemorySwap && u.MemorySwap == 0 {
			return nil, invalid("Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time")
		}
		h.Memory = u.Memory
	}
	set(&h.MemorySwap, u.MemorySwap)
	if u.CpusetCpus != "" {
		h.CpusetCpus = u.CpusetCpus
	}
	if u.CpusetMems != "" {
		h.CpusetMems = u.CpusetMems
	}
	if u.BlkioWeight != 0 {
		h.BlkioWeight = u.BlkioWeight
	}
	if u.PidsLimit != nil {
		n := *u.PidsLimit
		if n <= 0 {
			n = -1 // both mean unlimited
		}
		h.PidsLimit = &n
	}
	if u.RestartPolicy.Name != "" {
		if h.AutoRemove && !u.RestartPolicy.IsNone() {
			return nil, invalid("Restart policy cannot be updated because AutoRemove is enabled for the container")
		}
		if err := mobycontainer.ValidateRestartPolicy(u.RestartPolicy); err != nil {
			return nil, invalid("%v", err)
		}
		h.RestartPolicy = u.RestartPolicy
	}
	if err := spec.ValidateResources(&h.Resources); err != nil {
		return nil, err
	}
	return &h, nil
}

// Rename gives a container another name, in the DNS too.
func (e *Engine) Rename(ctx context.Context, ref, name string) error {
	if name == "" {
		return invalid("Neither old nor new names may be empty")
	}
	if name[0] == '/' {
		name = name[1:]
	}
	if err := container.CheckName(name); err != nil {
		return err
	}
	c, err := e.lockOp(ctx, ref)
	if err != nil {
		return err
	}
	defer c.op.unlock()
	old := c.record().Name
	if old == name {
		return invalid("Renaming a container with the same name as its current name")
	}
	take := func(n string) error {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.registry.Add(c.id, n)
	}
	if err := take(name); err != nil {
		return err
	}
	back := func(err error) error {
		if e2 := take(old); e2 != nil {
			e.log.Error("rename is half undone", "container", c.id, "err", e2)
		}
		return err
	}
	if err := e.cfg.Networks.Rename(ctx, c.id, name); err != nil && !errdefs.IsNotFound(err) {
		return back(err)
	}
	if err := e.change(c, func(r *container.Record) { r.Name = name }); err != nil {
		_ = e.cfg.Networks.Rename(ctx, c.id, old) // the error that led here is the one to tell
		return back(err)
	}
	if ns, err := e.cfg.Networks.Namespace(c.id); err == nil {
		c.setNetwork(ns)
	}
	e.emit(c, events.ActionRename, map[string]string{"oldName": "/" + old})
	return nil
}
