package engine

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/system"

	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/sandbox"
)

// Events subscribes to events; see API.
func (e *Engine) Events(ctx context.Context, since, until time.Time, f Filters) (<-chan EventMessage, error) {
	if err := checkFilters(f, "container", "daemon", "event", "image", "label", "network", "plugin", "scope", "type", "volume", "config", "node", "secret", "service"); err != nil {
		return nil, err
	}
	return e.cfg.Events.Subscribe(ctx, since, until, f), nil
}

// Emit publishes an event that another part observed.
func (e *Engine) Emit(m EventMessage) { e.cfg.Events.Publish(m) }

// Info describes the daemon and its host.
func (e *Engine) Info(ctx context.Context) (*system.Info, error) {
	facts := e.cfg.Kernel.Facts()
	hostname, _ := os.Hostname() // a host without a name still has the rest
	info := &system.Info{
		ID: e.id(), Driver: "overlayfs", DriverStatus: [][2]string{{"driver-type", "io.containerd.snapshotter.v1"}},
		MemoryLimit: true, SwapLimit: true, CPUCfsPeriod: true, CPUCfsQuota: true, CPUShares: true, CPUSet: true, PidsLimit: true,
		IPv4Forwarding: readFlag("/proc/sys/net/ipv4/ip_forward"), OomKillDisable: !facts.CgroupV2,
		NGoroutines: runtime.NumGoroutine(), SystemTime: time.Now().Format(time.RFC3339Nano), LoggingDriver: e.cfg.Log.Driver,
		CgroupDriver: "cgroupfs", CgroupVersion: "1", NEventsListener: e.cfg.Events.Listeners(),
		KernelVersion: facts.KernelRelease, OSType: "linux", Architecture: architecture(), NCPU: facts.CPUs, MemTotal: facts.Memory,
		DockerRootDir: e.cfg.Root, Name: hostname, Labels: []string{}, ServerVersion: e.cfg.Version,
		Runtimes: map[string]system.RuntimeWithStatus{}, DefaultRuntime: firstOf(e.cfg.DefaultRuntime, "tenon"),
		LiveRestoreEnabled: true, Isolation: mobycontainer.Isolation(firstOf(e.cfg.DefaultIsolation, sandbox.Process)), InitBinary: "tini-static",
		IndexServerAddress: "https://index.docker.io/v1/",
		RegistryConfig:     &registry.ServiceConfig{IndexConfigs: map[string]*registry.IndexInfo{}},
		Plugins:            system.PluginsInfo{Volume: []string{"local"}, Network: []string{"bridge", "host", "macvlan", "none"}, Log: []string{"local", "json-file", "none"}},
		SecurityOptions:    []string{"name=seccomp,profile=builtin"},
		FirewallBackend:    &system.FirewallInfo{Driver: "nftables"},
		Warnings:           []string{},
	}
	info.OperatingSystem, info.OSVersion = osRelease()
	if facts.CgroupV2 {
		info.CgroupVersion = "2"
	}
	info.SecurityOptions = append(info.SecurityOptions, "name=cgroupns")
	if e.cfg.UserNS.Auto {
		info.SecurityOptions = append(info.SecurityOptions, "name=userns")
	}
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		info.NFd = len(fds)
	}
	info.Runtimes["tenon"] = system.RuntimeWithStatus{Runtime: system.Runtime{Path: "tenon-shim"}}
	for name, r := range e.cfg.Runtimes {
		info.Runtimes[name] = system.RuntimeWithStatus{Runtime: system.Runtime{Path: r.Path, Args: r.Args}}
	}
	e.count(ctx, info)
	e.describeDevices(info)
	e.describeMachines(ctx, info)
	if e.cfg.Describe != nil {
		e.cfg.Describe(info)
	}
	return info, nil
}

// id names this state directory for ever.
func (e *Engine) id() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.identity != "" {
		return e.identity
	}
	if err := e.cfg.DB.Get("meta", "id", &e.identity); err == nil && e.identity != "" {
		return e.identity
	}
	b := make([]byte, 16)
	_, _ = rand.Read(b) // crypto/rand never fails
	e.identity = fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
	if err := e.cfg.DB.Put("meta", "id", e.identity); err != nil {
		e.log.Warn("the daemon's identity is not kept", "err", err)
	}
	return e.identity
}

func (e *Engine) count(ctx context.Context, info *system.Info) {
	for _, c := range e.all() {
		info.Containers++
		switch r := c.record(); r.State() {
		case mobycontainer.StatePaused:
			info.ContainersPaused++
		case mobycontainer.StateRunning, mobycontainer.StateRestarting:
			info.ContainersRunning++
		default:
			info.ContainersStopped++
		}
	}
	if imgs, err := e.cfg.Images.List(ctx, image.ListOptions{}); err == nil {
		info.Images = len(imgs)
	}
}

func readFlag(path string) bool {
	b, err := os.ReadFile(path)
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

func architecture() string {
	switch runtime.GOARCH {
	case "amd64":
		return "x86_64"
	case "arm64":
		return "aarch64"
	}
	return runtime.GOARCH
}

func osRelease() (pretty, version string) {
	pretty = "Linux"
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return pretty, ""
	}
	for _, line := range strings.Split(string(b), "\n") {
		k, v, _ := strings.Cut(line, "=")
		v = strings.Trim(v, `"'`)
		switch k {
		case "PRETTY_NAME":
			pretty = v
		case "VERSION_ID":
			version = v
		}
	}
	return pretty, version
}

// shutdownTime bounds the whole shutdown.
const shutdownTime = 3 * time.Minute

// shutdownParallel is how many containers are stopped at the same time.
const shutdownParallel = 16

// Shutdown stops all containers and takes down what the engine made in the
// kernel: networks, the shim. Records and images stay.
func (e *Engine) Shutdown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, shutdownTime)
	defer cancel()
	e.mu.Lock()
	e.closing = true
	e.mu.Unlock()
	e.steps.end(ctx)
	slots := make(chan struct{}, shutdownParallel)
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	for _, c := range e.all() {
		c.cancelRetry()
		if !c.record().Running() {
			continue
		}
		wg.Add(1)
		slots <- struct{}{}
		go func() {
			defer func() { <-slots; wg.Done() }()
			err := e.stopForShutdown(ctx, c, StopOptions{})
			if err != nil && !errors.Is(err, ErrNotModified) {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
	for _, c := range e.all() {
		if r := c.record(); r.HostConfig.AutoRemove && !r.Running() {
			if err := e.remove(ctx, c, RemoveOptions{Volumes: true, Force: true}); err != nil && !errdefs.IsNotFound(err) {
				errs = append(errs, err)
			}
		}
	}
	if client, err := e.shim.get(ctx); err == nil {
		e.cancel() // the shim's end is not news
		errs = append(errs, client.Shutdown(ctx, true))
	}
	if e.cfg.Machines != nil {
		e.endAllOffline(ctx)
		e.endAllMachs(ctx)
		errs = append(errs, e.cfg.Machines.Teardown(ctx))
	}
	errs = append(errs, e.cfg.Kernel.Teardown(ctx), e.cfg.Roots.Unmount())
	errs = append(errs, e.cfg.Networks.Teardown(ctx), e.saver.flush())
	e.cfg.Events.Publish(events.Message{Type: events.DaemonEventType, Action: "shutdown", Actor: events.Actor{ID: e.cfg.Name}})
	return errors.Join(errs...)
}

// stopForShutdown stops without telling the restart policies that a user did.
func (e *Engine) stopForShutdown(ctx context.Context, c *ctr, o StopOptions) error {
	manual := c.record().Facts.Stopped
	err := e.stop(ctx, c, o)
	if err == nil && !manual {
		err = e.unmarkStopped(c)
	}
	c.mu.Lock()
	rn := c.run
	c.mu.Unlock()
	if rn != nil && (err == nil || errors.Is(err, ErrNotModified)) {
		waitFor(ctx, rn.done, cleanTime)
	}
	return err
}
