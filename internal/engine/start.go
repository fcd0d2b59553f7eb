package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/rootfs"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	"tenon.dev/tenon/internal/userns"
)

type throttle = blkiodev.ThrottleDevice

// startTime bounds a start; a client that hangs up does not end it. On a kernel of
// its own, firstTime does: the first start of all makes the template of machines,
// which an emulator that is short of processors takes minutes for.
const (
	startTime = 2 * time.Minute
	firstTime = 15 * time.Minute
)

type startOptions struct {
	byUser bool // resets the restart count and the back-off
	fresh  bool // just created: the record is not in the durable store yet
}

// Start starts a container. Errors: NotFound, ErrNotModified (it runs),
// FailedPrecondition (paused, being removed), and what the start itself says.
func (e *Engine) Start(ctx context.Context, ref string) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	return e.start(ctx, c, startOptions{byUser: true})
}

func (e *Engine) start(ctx context.Context, c *ctr, o startOptions) error {
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	limit := startTime
	if !onHost(c.record()) {
		limit = firstTime
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	err := e.startLocked(ctx, c, o)
	c.op.unlock()
	if err != nil && c.record().HostConfig.AutoRemove && !errors.Is(err, ErrNotModified) && !c.record().Running() {
		if rmErr := e.remove(ctx, c, RemoveOptions{Volumes: true, Force: true}); rmErr != nil && !errdefs.IsNotFound(rmErr) {
			err = errors.Join(err, rmErr)
		}
	}
	return err
}

// startable says whether the container is in a state to be started.
func (e *Engine) startable(c *ctr, o startOptions) error {
	if c.isGone() {
		return notFound("No such container: %s", c.id)
	}
	if e.isClosing() {
		return errdefs.ErrUnavailable.WithMessage("the daemon is shutting down")
	}
	r := c.record()
	switch {
	case r.Facts.Dead || r.Facts.Removing:
		return conflict("container is marked for removal and cannot be started")
	case r.Running() && r.Facts.Paused:
		return conflict("cannot start a paused container, try unpause instead")
	case r.Running():
		return ErrNotModified
	case !o.byUser && !r.Facts.Restarting:
		return ErrNotModified // stopped while the restart was waiting
	}
	return nil
}

// startLocked is the start with the container's op lock held.
func (e *Engine) startLocked(ctx context.Context, c *ctr, o startOptions) (err error) {
	if err := e.startable(c, o); err != nil {
		return err
	}
	if o.byUser {
		c.cancelRetry()
	}
	c.mu.Lock()
	old := c.run
	c.mu.Unlock()
	if old != nil {
		select {
		case <-old.done: // nothing of the last run is left
		case <-ctx.Done():
			return fmt.Errorf("container %s: what is left of its last run: %w", c.id, context.Cause(ctx))
		}
	}
	rn := newRun(c.record().Facts.Run + 1)
	c.mu.Lock()
	c.run, c.noRetry = rn, false
	if o.byUser {
		c.backoff = backoff{}
	}
	c.mu.Unlock()
	if err := e.endOffline(ctx, c, true); err != nil {
		e.startFailed(c, rn, err)
		return err
	}
	err = e.change(c, func(r *container.Record) {
		f := &r.Facts
		f.Run, f.Pending, f.Error, f.OOM, f.Stopped = rn.n, "start", "", false, false
		if o.byUser {
			f.RestartCount, f.Restarting = 0, false
		}
	})
	if err == nil {
		err = failpoint("start-intent")
	}
	var saved chan error
	if err == nil && o.fresh && !c.record().Volatile() {
		saved = make(chan error, 1)
		go func() { saved <- e.saver.put(c.record()) }() // while the kernel works
	}
	if err == nil {
		err = e.launch(ctx, c, rn)
	}
	if saved != nil {
		if saveErr := <-saved; saveErr != nil {
			e.log.Error("container record is not on the disk yet", "container", c.id, "err", saveErr)
		}
	}
	if err != nil {
		e.startFailed(c, rn, err)
		return err
	}
	close(rn.settled)
	return nil
}

// startFailed records why, and lets those go who waited for streams.
func (e *Engine) startFailed(c *ctr, rn *run, err error) {
	recErr := e.change(c, func(r *container.Record) {
		r.Facts.Pending, r.Facts.Restarting = "", false
		r.Facts.Error, r.Facts.ExitCode = err.Error(), startExitCode(err)
	})
	if recErr != nil {
		e.log.Error("failed start is not recorded", "container", c.id, "err", recErr)
	}
	c.mu.Lock()
	waiting := c.waiting
	c.waiting = nil
	c.mu.Unlock()
	for _, w := range waiting {
		w.fail(nil)
	}
	rn.once.Do(func() { close(rn.exited); close(rn.freed); close(rn.done) })
	close(rn.settled)
}

// startExitCode is what inspect shows after a start that failed, and what
// Docker's CLI ends with by the message.
func startExitCode(err error) int {
	text := err.Error()
	switch {
	case strings.Contains(text, "executable file not found"), strings.Contains(text, "no such file or directory"):
		return 127
	case strings.Contains(text, "permission denied"), strings.Contains(text, "is a directory"), strings.Contains(text, "exec format error"):
		return 126
	}
	return 128
}

// launch prepares everything and runs the first process. All or nothing.
func (e *Engine) launch(ctx context.Context, c *ctr, rn *run) (err error) {
	var u undo
	from := time.Now()
	defer func() { err = e.lazyRemark(ctx, c.record(), from, u.onError(ctx, err)) }()
	var client *task.Client
	var p *prepared
	if onHost(c.record()) {
		if client, err = e.shim.get(ctx); err == nil {
			p, err = e.prepare(ctx, c, &u)
		}
	} else if isSystem(c.record()) {
		p, client, err = e.prepareSystem(ctx, c, rn, &u)
	} else {
		p, client, err = e.prepareMachine(ctx, c, rn, &u)
	}
	if err != nil {
		return err
	}
	defer p.userns.Close() // the task has its own by then
	req, err := e.taskRequest(c, rn, p)
	if err != nil {
		return err
	}
	if err := failpoint("start-prepared"); err != nil {
		return err
	}
	u.add("task", func(ctx context.Context) error { return deleteTask(ctx, client, c.id) })
	_, err = client.Create(ctx, req)
	if errdefs.IsAlreadyExists(err) { // of an earlier run, whose end could not be cleaned up
		if err = deleteTask(ctx, client, c.id); err == nil {
			_, err = client.Create(ctx, req)
		}
	}
	if err != nil {
		return startError(c, err)
	}
	if err := failpoint("start-created"); err != nil {
		return err
	}
	if err := e.connectWaiting(ctx, c, client); err != nil {
		return err
	}
	// The time is taken before: the program may end before the answer is here,
	// and must not seem to have ended before it began.
	began := time.Now().UTC()
	pid, err := client.Start(ctx, c.id, "")
	if err != nil {
		return startError(c, err)
	}
	if err := failpoint("start-started"); err != nil {
		return err
	}
	err = e.change(c, func(r *container.Record) {
		f := &r.Facts
		f.Started, f.Pid, f.Pending, f.Paused, f.Restarting, f.ExitCode = began, pid, "", false, false, 0
		f.BootID = p.on.Facts().BootID
		if g := c.onMachineLocked(); g != nil {
			f.Machine = e.machineFacts(g)
			f.Pid = f.Machine.Pid // what the guest counts means nothing here
		}
		f.Health = initialHealth(r.Config)
	})
	if err != nil {
		return err
	}
	e.volumesUsed(c.record(), true)
	e.emit(c, events.ActionStart, nil)
	e.startHealth(c)
	return nil
}

// startError is Docker's sentence for a start that the runtime refused.
func startError(c *ctr, err error) error {
	text := "failed to create task for container: " + commandText(c.id, err)
	switch {
	case startExitCode(err) != 128: // the command's fault, not ours: 400, as Docker says
		return errdefs.ErrInvalidArgument.WithMessage(text)
	case errdefs.IsNotFound(err), errdefs.IsPermissionDenied(err), errdefs.IsInvalidArgument(err):
		return errdefs.ErrInvalidArgument.WithMessage(text)
	}
	return remark{err, text}
}

// commandText is the shim's text without the task's name; for a command that
// was looked for in PATH it says so, as Docker does.
func commandText(id string, err error) string {
	text := strings.TrimPrefix(err.Error(), "task "+id+": ")
	if rest, ok := strings.CutPrefix(text, `exec: "`); ok {
		if name, tail, ok := strings.Cut(rest, `": `); ok && !strings.Contains(name, "/") && strings.Contains(tail, "no such file or directory") {
			return fmt.Sprintf("exec: %q: executable file not found in $PATH", name)
		}
	}
	return text
}

// deleteTask ends and deletes a task, whatever its state; none is no error.
func deleteTask(ctx context.Context, client *task.Client, id string) error {
	_, err := client.Delete(ctx, id, "")
	if err == nil || errdefs.IsNotFound(err) {
		return nil
	}
	if err := client.Kill(ctx, id, "", 9, true); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("kill what was started: %w", err)
	}
	if _, err := client.Wait(ctx, id, ""); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("wait for what was started: %w", err)
	}
	if _, err := client.Delete(ctx, id, ""); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete what was started: %w", err)
	}
	return nil
}

// prepared is what a start needs beside the record.
type prepared struct {
	on     sandbox.Sandbox
	root   *rootfs.Root
	ns     *network.Namespace
	kernel sandbox.Prepared
	mounts []spec.Mount
	files  []spec.Mount
	shm    string

	accounts *accounts // nil: root has them
	// devices and allDevices are a machine's that its container gets.
	devices, allDevices []spec.Device
	disks               []spec.Device // of a machine, that limits of I/O are for
	init                string        // of --init, on the kernel; empty: the kernel knows
	// netPeer and userPeer are namespaces of another container that are joined, on
	// the same machine; pids are the first processes of those whose namespaces
	// are, as the machine counts.
	netPeer, userPeer string

	held func() // lets go what was opened to be mounted
	pids map[string]int

	userns     *userns.Namespace
	usernsPath string
}

// prepare makes root, network and files, at the same time where it can.
func (e *Engine) prepare(ctx context.Context, c *ctr, u *undo) (_ *prepared, err error) {
	r := c.record()
	p := &prepared{on: e.cfg.Kernel}
	defer func() {
		if err != nil {
			p.userns.Close()
		}
	}()
	q, err := e.networkRequest(r)
	if err != nil {
		return nil, err
	}
	if err := e.prepareUserNS(ctx, r, p, &q); err != nil {
		return nil, err
	}
	if q.Mode == network.ModeContainer {
		if _, err := e.peer(r, q.Container, "network"); err != nil {
			return nil, err
		}
	}
	u.add("network", func(ctx context.Context) error {
		c.setNetwork(nil)
		return e.cfg.Networks.Disconnect(ctx, c.id)
	})
	u.add("kernel", func(ctx context.Context) error { return e.cfg.Kernel.Release(ctx, c.id) })
	netDone := make(chan error, 1)
	go func() {
		var err error
		p.ns, err = e.cfg.Networks.Connect(ctx, q)
		netDone <- err
	}()
	rootErr := e.prepareRoot(ctx, c, p)
	if err := <-netDone; err != nil {
		return nil, fmt.Errorf("failed to set up container networking: %w", err)
	}
	c.setNetwork(p.ns)
	if rootErr != nil {
		return nil, rootErr
	}
	if err := failpoint("start-network"); err != nil {
		return nil, err
	}
	if p.files, err = e.writeFiles(r, p.ns); err != nil {
		return nil, err
	}
	if p.mounts, err = e.specMounts(r); err != nil {
		return nil, err
	}
	if err := e.prepareShm(ctx, r, p); err != nil {
		return nil, err
	}
	if err := e.mapMounts(r, p); err != nil {
		return nil, err
	}
	for _, m := range p.mounts {
		if m.Type == "bind" && m.Propagation != "" {
			if err := e.cfg.Kernel.Propagates(m.Source, m.Propagation); err != nil {
				return nil, err
			}
		}
	}
	p.kernel, err = e.cfg.Kernel.Prepare(ctx, sandbox.Handover{ID: c.id, Root: taskMounts(p.root), NetNS: p.ns.Path})
	return p, err
}

func (e *Engine) prepareRoot(ctx context.Context, c *ctr, p *prepared) (err error) {
	p.root, err = e.rootOf(ctx, c.record())
	return err
}

// rootOf makes, or finds again, a container's root file system. It is mounted
// writable: with --read-only the launch makes it so once the mount points are there.
func (e *Engine) rootOf(ctx context.Context, r *container.Record) (*rootfs.Root, error) {
	img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
	if err != nil {
		return nil, fmt.Errorf("container %s: its image: %w", r.ID, err)
	}
	limit, err := spec.DiskLimit(r.HostConfig)
	if err != nil {
		return nil, err
	}
	return e.cfg.Roots.Prepare(ctx, r.ID, img, rootfs.Options{Volatile: r.HostConfig.AutoRemove, SizeLimit: limit})
}

func taskMounts(root *rootfs.Root) []task.Mount {
	var out []task.Mount
	for _, m := range root.Mounts {
		out = append(out, task.Mount{Type: m.Type, Source: m.Source, Options: m.Options})
	}
	return out
}

func (e *Engine) prepareShm(ctx context.Context, r *container.Record, p *prepared) error {
	mode := r.HostConfig.IpcMode
	var err error
	switch {
	case mode.IsShareable():
		p.shm, err = p.on.SharedMemory(ctx, r.ID, r.HostConfig.ShmSize)
	case mode.IsContainer():
		peer, perr := e.peer(r, mode.Container(), "IPC")
		if perr != nil {
			return perr
		}
		if !peer.HostConfig.IpcMode.IsShareable() {
			return conflict("cannot join IPC of a non-shareable container: %s (start it with --ipc=shareable)", peer.ID)
		}
		p.shm, err = p.on.SharedMemory(ctx, peer.ID, peer.HostConfig.ShmSize)
	case mode.IsHost():
		p.shm = "/dev/shm"
	}
	return err
}

// writeFiles makes hosts, hostname and resolv.conf on the run root.
func (e *Engine) writeFiles(r *container.Record, ns *network.Namespace) ([]spec.Mount, error) {
	dir := e.runDir(r.ID)
	if r.HostConfig.NetworkMode.IsContainer() {
		dir = e.runDir(r.HostConfig.NetworkMode.ConnectedContainer())
	} else if err := writeNetworkFiles(dir, r, ns); err != nil {
		return nil, err
	}
	var out []spec.Mount
	for _, f := range []struct{ name, dest string }{{"resolv.conf", "/etc/resolv.conf"}, {"hostname", "/etc/hostname"}, {"hosts", "/etc/hosts"}} {
		out = append(out, spec.Mount{Type: "bind", Source: filepath.Join(dir, f.name), Destination: f.dest, ReadOnly: r.HostConfig.ReadonlyRootfs, Engine: true})
	}
	return out, nil
}

// networkFiles are what writeNetworkFiles makes.
var networkFiles = []string{"hostname", "hosts", "resolv.conf"}

// writtenFiles are the mounts of those that the last start of a container wrote,
// but for where the container has mounts of its own.
func (e *Engine) writtenFiles(r *container.Record, own []spec.Mount) []spec.Mount {
	dir := e.runDir(r.ID)
	if r.HostConfig.NetworkMode.IsContainer() {
		dir = e.runDir(r.HostConfig.NetworkMode.ConnectedContainer())
	}
	var out []spec.Mount
	for _, name := range networkFiles {
		m := spec.Mount{Type: "bind", Source: filepath.Join(dir, name), Destination: "/etc/" + name, Options: []string{"bind"}, Engine: true}
		hidden := slices.ContainsFunc(own, func(o spec.Mount) bool {
			d := path.Clean(o.Destination)
			return d == "/etc" || d == m.Destination
		})
		if _, err := os.Stat(m.Source); err == nil && !hidden {
			out = append(out, m)
		}
	}
	return out
}

func writeNetworkFiles(dir string, r *container.Record, ns *network.Namespace) error {
	hostname := r.Config.Hostname
	if r.Config.Domainname != "" {
		hostname += "." + r.Config.Domainname
	}
	if err := unix.Mkdir(dir, 0o711); err != nil {
		if err := os.MkdirAll(dir, 0o711); err != nil { // the one above, or it is there
			return fmt.Errorf("container's files: %w", err)
		}
	}
	// Written in place: nobody reads them yet, and a start that is cut off writes
	// them again.
	for name, text := range map[string]string{
		"hostname":    hostname + "\n",
		"hosts":       strings.Join(ns.Hosts, "\n") + "\n",
		"resolv.conf": resolvConf(ns.Resolver),
	} {
		if err := writeText(filepath.Join(dir, name), text); err != nil {
			return fmt.Errorf("container's files: %w", err)
		}
	}
	return nil
}

// writeText writes a small file that everybody may read, whatever the daemon's
// umask.
func writeText(path, text string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	n, err := unix.Write(fd, []byte(text))
	if err == nil && n < len(text) {
		err = unix.ENOSPC
	}
	if err == nil {
		err = unix.Fchmod(fd, 0o644)
	}
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err != nil {
		return &os.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

func resolvConf(r network.Resolver) string {
	var b strings.Builder
	b.WriteString("# Generated by Tenon.\n")
	for _, n := range r.Nameservers {
		fmt.Fprintf(&b, "nameserver %s\n", n)
	}
	if len(r.Search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(r.Search, " "))
	}
	if len(r.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(r.Options, " "))
	}
	return b.String()
}

func (c *ctr) setNetwork(ns *network.Namespace) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.network = ns
}

func (c *ctr) namespace() *network.Namespace {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.network
}

// rootMessage says how the shim mounts the root of a container that does not
// run.
func (e *Engine) rootMessage(r *container.Record, root *rootfs.Root, mounts []spec.Mount) *taskv1.Root {
	m := &taskv1.Root{Upper: root.Upper}
	for _, x := range root.Mounts {
		m.Mounts = append(m.Mounts, &taskv1.Mount{Type: x.Type, Source: x.Source, Options: x.Options})
	}
	for _, x := range mounts {
		if x.Type != "bind" && x.Type != "overlay" {
			continue // a tmpfs of a container that does not run has nothing in it
		}
		o := x.Options
		if x.ReadOnly {
			o = append(o[:len(o):len(o)], "ro")
		}
		if x.Beneath != "" {
			o = append(o[:len(o):len(o)], spec.BeneathOption+x.Beneath)
		}
		m.Volumes = append(m.Volumes, &taskv1.Mount{Type: x.Type, Source: x.Source, Target: x.Destination, Options: o})
	}
	return m
}
