package engine

import (
	"context"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/types/system"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/events"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/rootfs"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/store"
	"tenon.dev/tenon/internal/volume"
)

// Config is what an engine is made of. The parts are opened by the caller, and
// closed by the caller after Close.
type Config struct {
	Name    string // the daemon's prefix
	Root    string // durable state
	RunRoot string // volatile state, on a tmpfs
	Version string // shown by Info

	DB       *store.DB
	Volatile *store.Volatile
	Images   *image.Store
	Roots    *rootfs.Store
	Networks *network.Controller
	Volumes  *volume.Store
	Events   *events.Hub
	// Kernel is what containers of isolation "process" run on; Machines makes the
	// kernels of isolation "vm", nil: there are none. DefaultIsolation is that of
	// containers that ask for none; empty: "process".
	Kernel           sandbox.Sandbox
	Machines         sandbox.Machines
	DefaultIsolation string
	// HangTime is how long a new daemon waits for the guest of a machine to answer
	// before it takes it for hung; 0: three minutes.
	HangTime time.Duration

	// Pids and ShmSize are limits for containers that ask for none;
	// MemoryReserve is what such containers can't take from the host (bytes).
	Pids, ShmSize, MemoryReserve int64
	StopTimeout                  int // seconds
	// DiskLimit bounds the writable layer of containers that don't say; bytes,
	// 0: unbounded.
	DiskLimit int64
	Log       LogDefaults
	// Runtimes are OCI runtime commands by name; DefaultRuntime is one of them,
	// or empty for Tenon's own.
	Runtimes       map[string]Runtime
	DefaultRuntime string
	UserNS         UserNS
	// Tenants bounds what clients of a machine's own socket make.
	Tenants TenantLimits
	// Describe adds to Info what the engine does not know (registries, warnings
	// of the host). May be nil.
	Describe func(*system.Info)
	Logger   *slog.Logger
}

// LogDefaults are the log settings of containers that ask for none.
type LogDefaults struct {
	Driver   string // "local", "json-file", "none"
	MaxSize  int64  // bytes per file
	MaxFiles int
}

// Runtime is an OCI runtime command.
type Runtime struct {
	Path string
	Args []string
}

// Engine implements API.
//
// Locks, in this order: a machine's op (its life cycle), a container's op (one life-cycle operation at a time,
// held across RPCs), Engine.mu (the tables), ctr.mu (one container's record and
// lists). The last two are never held across an RPC or a callback.
type Engine struct {
	cfg Config
	log *slog.Logger
	def spec.Defaults

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	shim *link

	mu       sync.Mutex
	ctrs     map[string]*ctr
	machs    map[string]*mach // by name
	registry *container.Registry
	execs    map[string]*execution
	identity string
	closing  bool // Shutdown: nothing starts any more

	loaded atomic.Bool // the records have been read

	saver  saver
	idmaps usernsProbe
	known  knownAccounts
	lately lately
	steps  steps
}

var _ API = (*Engine)(nil)

// New makes an engine; it has no side effects. Follow it with Recover.
func New(cfg Config) (*Engine, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.StopTimeout == 0 {
		cfg.StopTimeout = 10
	}
	if cfg.HangTime == 0 {
		cfg.HangTime = 3 * time.Minute
	}
	if cfg.Log.Driver == "" {
		cfg.Log = LogDefaults{Driver: "local", MaxSize: 20 << 20, MaxFiles: 5}
	}
	e := &Engine{cfg: cfg, log: cfg.Logger, ctrs: map[string]*ctr{}, machs: map[string]*mach{}, registry: container.NewRegistry(), execs: map[string]*execution{}}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.shim = newLink(e.ctx, cfg.Kernel, e.log)
	e.def = spec.Defaults{Pids: cfg.Pids, ShmSize: cfg.ShmSize}
	e.def.Memory = cfg.Kernel.Facts().ForContainers(cfg.MemoryReserve)
	e.saver.init(e)
	return e, nil
}

// closeTime bounds the end of the engine's goroutines.
const closeTime = 30 * time.Second

// Close ends the engine's goroutines and leaves all containers running.
func (e *Engine) Close() error {
	e.cancel()
	done := make(chan struct{})
	go func() {
		e.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(closeTime):
		e.log.Warn("operations are still under way while the engine closes")
	}
	e.idmaps.close()
	e.shim.close() // after those who still free what an ended container held
	return e.saver.flush()
}

// Networks is the network controller.
func (e *Engine) Networks() *network.Controller { return e.cfg.Networks }

// Images is the image store.
func (e *Engine) Images() *image.Store { return e.cfg.Images }

// Volumes is the volume store.
func (e *Engine) Volumes() *volume.Store { return e.cfg.Volumes }

// go runs f until it ends; Close waits for it.
func (e *Engine) spawn(f func()) {
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		f()
	}()
}

func (e *Engine) stateDir(id string) string { return filepath.Join(e.cfg.Root, "containers", id) }
func (e *Engine) runDir(id string) string   { return filepath.Join(e.cfg.RunRoot, "containers", id) }
