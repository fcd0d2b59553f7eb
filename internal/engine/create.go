package engine

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
)

// Create makes a container. Nothing is made if it fails. Errors: NotFound (the
// image), InvalidArgument, AlreadyExists (the name).
func (e *Engine) Create(ctx context.Context, o CreateOptions) (CreateResult, error) {
	_, res, err := e.create(ctx, o, false)
	return res, err
}

// create makes a container. With early the record of one that has made nothing
// else yet is left to the start, which follows at once.
func (e *Engine) create(ctx context.Context, o CreateOptions, early bool) (_ *ctr, res CreateResult, err error) {
	if e.isClosing() {
		return nil, res, errdefs.ErrUnavailable.WithMessage("the daemon is shutting down")
	}
	if o.Request.Config == nil {
		return nil, res, invalid("Config cannot be empty in order to create a container")
	}
	if o.Name != "" {
		if err := container.CheckName(o.Name); err != nil {
			return nil, res, err
		}
	}
	img, release, err := e.cfg.Images.Acquire(ctx, o.Request.Config.Image, o.Platform)
	if errdefs.IsNotFound(err) && !errors.Is(err, image.ErrPlatform) {
		return nil, res, notFound("No such image: %s", withTag(o.Request.Config.Image))
	}
	if err != nil {
		return nil, res, err
	}
	// Let go when the record says that it is used.
	defer release()
	if img.Encrypted() { // its layers are unpacked while there is a key
		if _, err := e.cfg.Images.LayersFor(ctx, img); err != nil {
			return nil, res, err
		}
	}
	r, warnings, err := e.newRecord(ctx, o, img)
	if err != nil {
		return nil, res, err
	}
	c := newCtr(r)
	if err := c.op.lock(ctx); err != nil { // nobody touches it before it is whole
		return nil, res, err
	}
	defer c.op.unlock()
	var u undo
	defer func() { err = u.onError(ctx, err) }()
	if err := e.register(c); err != nil {
		return nil, res, err
	}
	u.add("registration", func(context.Context) error { e.unregister(c); return nil })
	if err := e.tenantContainers(o.Tenant); err != nil {
		return nil, res, err
	}
	if err := e.checkImageMounts(ctx, r); err != nil { // they are in use from here on
		return nil, res, err
	}
	if err := e.resolveVolumes(ctx, r, o.Tenant, &u); err != nil {
		return nil, res, err
	}
	if err := failpoint("create-volumes"); err != nil {
		return nil, res, err
	}
	if !early || len(r.Mounts) > 0 {
		if err := e.saver.saveNow(r); err != nil {
			return nil, res, err
		}
		u.add("record", func(context.Context) error { return e.saver.remove(r) })
	}
	if err := failpoint("create-record"); err != nil {
		return nil, res, err
	}
	if err := e.populateVolumes(ctx, c, img, &u); err != nil {
		return nil, res, err
	}
	if err := failpoint("create-end"); err != nil {
		return nil, res, err
	}
	e.emit(c, events.ActionCreate, nil)
	return c, CreateResult{ID: r.ID, Warnings: warnings}, nil
}

// newRecord merges and checks a request; it has no side effects.
func (e *Engine) newRecord(ctx context.Context, o CreateOptions, img *image.Image) (*container.Record, []string, error) {
	id, err := e.newID()
	if err != nil {
		return nil, nil, err
	}
	var asked mobycontainer.Isolation
	if o.Request.HostConfig != nil {
		asked = o.Request.HostConfig.Isolation
	}
	if o.Tenant != "" {
		var err error
		if asked, err = tenantIsolation(o.Tenant, asked); err != nil {
			return nil, nil, err
		}
		if err := e.tenantPeers(o.Tenant, o.Request.HostConfig); err != nil {
			return nil, nil, err
		}
	}
	isolation, about, err := e.isolation(ctx, asked)
	if err != nil {
		return nil, nil, err
	}
	if err := matchImage(isolation, img, o.Request.Config.Image); err != nil {
		return nil, nil, err
	}
	system := isolation == sandbox.OwnSystem
	if system {
		if err := checkSystem(o.Request.Config, o.Request.HostConfig); err != nil {
			return nil, nil, err
		}
	}
	facts := e.factsOf(isolation)
	h, warnings, err := e.hostDefaults(o.Request.HostConfig, facts)
	if err != nil {
		return nil, nil, err
	}
	if system {
		h.ShmSize, h.Runtime = 0, "tenon" // clients that make containers anew from what inspect shows are not refused
	}
	cfg := mergeImage(o.Request.Config, &img.Config.Config)
	if name, err := os.Hostname(); err == nil && cfg.Hostname == name && h.UTSMode.IsHost() {
		cfg.Hostname = "" // as inspect shows it: clients make containers anew from that
	}
	valid := *cfg
	if system {
		valid.Cmd = []string{""} // it has none
	}
	if err := spec.Validate(&valid, h); err != nil {
		return nil, nil, err
	}
	if limit, err := spec.DiskLimit(h); err != nil {
		return nil, nil, err
	} else if limit != 0 && !system {
		if err := e.cfg.Roots.CheckLimit(limit); err != nil {
			return nil, nil, err
		}
	}
	if arch := img.Platform.Architecture; o.Platform == nil && arch != "" && arch != runtime.GOARCH && !(arch == "386" && runtime.GOARCH == "amd64") {
		warnings = append(warnings, fmt.Sprintf("The requested image's platform (%s/%s) does not match the detected host platform (linux/%s) and no specific platform was requested", img.Platform.OS, arch, runtime.GOARCH))
	}
	manifest := img.Manifest
	if manifest.Platform == nil {
		manifest.Platform = &img.Platform
	}
	r := &container.Record{
		V: container.Version, Seq: 1, ID: id, Name: o.Name, Created: time.Now().UTC(),
		Config: cfg, HostConfig: h, Isolation: isolation,
		Image: container.Image{ID: img.ID, Ref: o.Request.Config.Image, Manifest: &manifest, Platform: img.Platform},
	}
	if err := e.checkRelations(r); err != nil {
		return nil, nil, err
	}
	if r.Networks, err = e.planNetworks(ctx, r, o.Request.NetworkingConfig); err != nil {
		return nil, nil, err
	}
	if _, err := bindings(r); err != nil {
		return nil, nil, err
	}
	switch {
	case cfg.Hostname != "" || h.NetworkMode.IsContainer():
	case h.NetworkMode.IsHost() || h.UTSMode.IsHost():
		cfg.Hostname, _ = os.Hostname() // a host without a name is no error
	default:
		cfg.Hostname = id[:12]
	}
	if _, err := e.logSettings(r); err != nil {
		return nil, nil, err
	}
	if _, err := e.runtimeOf(h); err != nil {
		return nil, nil, err
	}
	if err := e.checkCPUs(&h.Resources, facts); err != nil {
		return nil, nil, err
	}
	if isolation == sandbox.Process { // a machine's devices are known when it runs
		if _, err := e.planDevices(h); err != nil {
			return nil, nil, err
		}
		if err := e.injectDevices(&specs.Spec{}, h.DeviceRequests); err != nil { // they are there
			return nil, nil, err
		}
	}
	if r.Mounts, err = e.planMounts(r, o.Tenant != ""); err != nil {
		return nil, nil, err
	}
	if err := e.checkTenant(ctx, o.Tenant, r); err != nil {
		return nil, nil, err
	}
	if system {
		if err := e.completeSystem(r, img); err != nil {
			return nil, nil, err
		}
	}
	if !onHost(r) {
		if about.Accel == "tcg" {
			warnings = append(warnings, "This container's virtual machine is emulated (TCG), which is slow: KVM can't be had ("+about.AccelReason+").")
		}
		if system {
			return r, warnings, nil
		}
		return r, warnings, e.checkMachine(r)
	}
	if err := e.checkPeers(r); err != nil {
		return nil, nil, err
	}
	if err := e.planUserNS(r); err != nil {
		return nil, nil, err
	}
	if err := e.checkUserNSMounts(r); err != nil {
		return nil, nil, err
	}
	return r, warnings, nil
}

func (e *Engine) newID() (string, error) {
	b := make([]byte, 32)
	for {
		if _, err := rand.Read(b); err != nil {
			return "", fmt.Errorf("container id: %w", err)
		}
		id := hex.EncodeToString(b)
		// A short id of digits alone could be taken for a number.
		digits := true
		for _, r := range id[:12] {
			digits = digits && r >= '0' && r <= '9'
		}
		if !digits {
			return id, nil
		}
	}
}

// register takes the name, or finds one, and shows the container to others.
func (e *Engine) register(c *ctr) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	r := c.record()
	if name := machine.Named(r.Isolation); name != "" { // it may have gone since it was looked at
		if m := e.machs[name]; m == nil || m.record().State() == machine.Removing {
			return conflict("machine %s is being removed; nothing was started", name)
		}
	}
	if err := e.takeIDsLocked(r); err != nil {
		return err
	}
	if r.Name == "" {
		named := r.Clone()
		named.Name = container.RandomName(e.registry.Taken)
		c.rec.Store(named)
		*r = *named // not published yet: the caller's copy is the same record
	}
	if err := e.registry.Add(r.ID, r.Name); err != nil {
		return err
	}
	e.ctrs[r.ID] = c
	return nil
}

func (e *Engine) unregister(c *ctr) {
	e.mu.Lock()
	e.registry.Remove(c.id)
	delete(e.ctrs, c.id)
	e.mu.Unlock()
	e.releaseImages(c.record())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
	for _, w := range c.waiting {
		w.fail(nil)
	}
	c.waiting = nil
	if r := c.record(); r.HostConfig.AutoRemove && r.Facts.Run > 0 {
		e.lately.add(ending{c.id, time.Now(), WaitResult{ExitCode: r.Facts.ExitCode, Error: r.Facts.Error}, c.flushing})
	}
	notifyLocked(&c.exitSubs, WaitResult{})
	notifyLocked(&c.goneSubs, WaitResult{ExitCode: c.record().Facts.ExitCode})
}

func (e *Engine) isClosing() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.closing || e.ctx.Err() != nil
}

// Run creates and starts in one call.
func (e *Engine) Run(ctx context.Context, o RunOptions) (CreateResult, WaitResult, error) {
	c, res, err := e.create(ctx, o.CreateOptions, true)
	if err != nil {
		return res, WaitResult{}, err
	}
	if o.Created != nil {
		o.Created(res)
	}
	var att *pendingAttach
	var exit chan WaitResult
	var exits *[]chan WaitResult
	c.mu.Lock()
	if o.Attach != nil {
		att = newPendingAttach(*o.Attach)
		c.waiting = append(c.waiting, att)
		exits = &c.exitSubs
		if c.record().HostConfig.AutoRemove { // its name is free when Run returns
			exits = &c.goneSubs
		}
		exit = c.subscribe(exits)
	}
	c.mu.Unlock()
	if err := e.start(ctx, c, startOptions{byUser: true, fresh: true}); err != nil {
		if att != nil {
			c.unsubscribe(exits, exit)
		}
		return res, WaitResult{}, err
	}
	if o.Attach == nil {
		return res, WaitResult{}, nil
	}
	if o.Attach.Ready != nil {
		o.Attach.Ready()
	}
	if err := att.wait(ctx); err != nil {
		return res, WaitResult{}, err
	}
	select {
	case w := <-exit:
		return res, w, nil
	case <-ctx.Done():
		c.unsubscribe(exits, exit)
		return res, WaitResult{}, context.Cause(ctx)
	}
}
