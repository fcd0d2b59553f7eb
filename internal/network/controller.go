package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/network/link"
	"tenon.dev/tenon/internal/network/nft"
	"tenon.dev/tenon/internal/network/shortcut"
)

// Controller owns all networks of one engine. Safe for concurrent use.
type Controller struct {
	cfg       Config
	log       *slog.Logger
	short     string
	rtnl      *link.Socket
	table     *nft.Table
	dns       *dnsClient
	pool      *readyPool
	path      *shortcut.Path                 // nil: the kernel takes none; fixed after Open
	plain     atomic.Bool                    // its programs cannot be attached
	doors     atomic.Pointer[shortcut.Doors] // nil: there are none, or none yet
	doorsOnce sync.Once
	switching sync.Mutex // held while others' rules are looked at and the doors switched
	late      latecomers
	keys      keyLock
	index     *indexes

	hostRes hostResolv

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	nets  map[string]*netw       // by id
	conts map[string]*contRecord // by id
	ports portTable
	names map[string]string // network name to id, for all networks
}

// netw is a network: its record and what is in use of it.
type netw struct {
	rec     netRecord
	subnets []*subnet
	// mac is the hardware address of the network's own bridge; nil if the bridge
	// is the administrator's.
	mac net.HardwareAddr
	// segments are the bridges; the first is the network's own.
	segments []segment
	// eps holds the containers' endpoints by container id. The names of
	// pooled namespaces are not in it.
	eps map[string]*Endpoint
	// ghosts are the ports of the last endpoints that had an address.
	ghosts map[netip.Addr]string
}

// Open makes a controller: it repairs the default networks, the nftables
// table, the bridges and the DNS process, and takes over what a former
// controller with the same directories left behind. Follow it with Restore.
func Open(ctx context.Context, cfg Config) (_ *Controller, err error) {
	if err := cfg.fill(); err != nil {
		return nil, fmt.Errorf("network: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	c := &Controller{cfg: cfg, log: cfg.Log, short: shortName(cfg.Name), index: newIndexes(),
		nets: map[string]*netw{}, conts: map[string]*contRecord{}, names: map[string]string{}, ports: newPortTable(),
		late: latecomers{kick: make(chan struct{}, 1)}}
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	for _, dir := range []string{cfg.StateDir, cfg.RunDir, filepath.Join(cfg.RunDir, "containers")} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("network: %w", err)
		}
	}
	if err := link.PrepareDir(filepath.Join(cfg.RunDir, "netns")); err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	if c.rtnl, err = link.Open(); err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	if err := link.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		c.log.Warn("IPv4 forwarding could not be switched on: containers reach nothing outside", "err", err)
	}
	loop, err := c.raiseLoop()
	if err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	if c.table, err = nft.Open(cfg.Name, loop); err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	c.openShortcuts()
	if err := c.recoverState(); err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	c.dns = startDNS(c)
	c.pool = startPool(c)
	c.watchTable()
	c.watchLate()
	return c, nil
}

func (cfg *Config) fill() error {
	if cfg.Name == "" {
		cfg.Name = "tenon"
	}
	if !prefixPattern.MatchString(cfg.Name) {
		return fmt.Errorf("bad name prefix %q", cfg.Name)
	}
	if cfg.StateDir == "" || cfg.RunDir == "" {
		return errors.New("state and run directories are required")
	}
	if cfg.MTU == 0 {
		cfg.MTU = 1500
	}
	if cfg.ShortcutDelay == 0 {
		cfg.ShortcutDelay = time.Second
	}
	if cfg.PoolSize == 0 {
		cfg.PoolSize = 4
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if len(cfg.Pools) == 0 {
		for i := 17; i < 32; i++ {
			cfg.Pools = append(cfg.Pools, Pool{netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(i), 0, 0}), 16), 16})
		}
		cfg.Pools = append(cfg.Pools, Pool{netip.MustParsePrefix("192.168.0.0/16"), 20})
	}
	if len(cfg.Pools6) == 0 {
		cfg.Pools6 = []Pool{ulaPool(cfg.Name)}
	}
	for _, p := range append(append([]Pool(nil), cfg.Pools...), cfg.Pools6...) {
		if !p.Base.IsValid() || p.Size < p.Base.Bits() || p.Size > p.Base.Addr().BitLen()-2 {
			return fmt.Errorf("bad address pool %s size %d", p.Base, p.Size)
		}
	}
	return nil
}

// Close ends the controller's goroutines and leaves the data path standing.
func (c *Controller) Close() error {
	c.cancel()
	c.wg.Wait()
	var errs []error
	if c.dns != nil {
		c.dns.close()
	}
	if c.rtnl != nil {
		errs = append(errs, c.rtnl.Close())
	}
	c.path.Close()
	c.doors.Load().Close()
	if c.table != nil {
		errs = append(errs, c.table.Close())
		c.table = nil
	}
	return errors.Join(errs...)
}

// Teardown ends the controller and removes everything that it put into the
// kernel (namespaces, bridges, the table) and the DNS process. Records of
// networks stay, so that Open makes them again.
func (c *Controller) Teardown(ctx context.Context) error {
	c.cancel()
	c.wg.Wait()
	errs := []error{c.dns.quit(ctx)}
	c.mu.Lock()
	for id := range c.conts {
		_ = os.Remove(c.contPath(id))
	}
	c.conts = map[string]*contRecord{}
	c.mu.Unlock()
	errs = append(errs, c.table.Remove(), c.removeLinks())
	dir := filepath.Join(c.cfg.RunDir, "netns")
	files, _ := os.ReadDir(dir)
	for _, f := range files {
		errs = append(errs, link.ReleaseNetns(filepath.Join(dir, f.Name())))
	}
	errs = append(errs, link.RemoveDir(dir), os.RemoveAll(filepath.Join(c.cfg.RunDir, "containers")), c.Close())
	return errors.Join(errs...)
}

// removeLinks deletes all of this controller's interfaces.
func (c *Controller) removeLinks() error {
	links, err := c.rtnl.Links()
	if err != nil {
		return err
	}
	var b link.Batch
	for _, l := range c.ourPorts(links) {
		b.DelLink(l.Name)
	}
	for _, l := range links {
		if l.Alias == c.loopAlias() {
			b.DelLink(l.Name)
		} else if id, seg, ok := c.parseAlias(l.Alias); ok {
			b.DelLink(l.Name)
			if seg > 0 {
				b.DelLink(c.uplinkName(id, seg, "u"))
			}
		}
	}
	return c.rtnl.Do(&b)
}

func (c *Controller) ownsBridge(l link.Info) bool {
	_, _, ok := c.parseAlias(l.Alias)
	return ok
}

// ourPorts are the interfaces that this controller put into its bridges.
func (c *Controller) ourPorts(links []link.Info) []link.Info {
	bridges := map[int]bool{0: true} // a port that is not in its bridge yet
	for _, l := range links {
		if c.ownsBridge(l) {
			bridges[l.Index] = true
		}
	}
	var out []link.Info
	for _, l := range links {
		if c.isPortName(l.Name) && (l.Kind == "veth" || l.Kind == "tun") && bridges[l.Master] {
			out = append(out, l)
		}
	}
	return out
}

func (c *Controller) emit(action string, n netRecord, container string) {
	if c.cfg.OnEvent != nil {
		c.cfg.OnEvent(Event{Action: action, NetworkID: n.ID, NetworkName: n.Name, Driver: n.Driver, ContainerID: container, Time: time.Now()})
	}
}

// HostGateway is the host's address as containers on the default bridge see it
// (what "host-gateway" in extra hosts stands for).
func (c *Controller) HostGateway() netip.Addr {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.byNameLocked(defaultNetwork); n != nil {
		for _, s := range n.subnets {
			if s.gateway.IsValid() {
				return s.gateway
			}
		}
	}
	return netip.Addr{}
}

// Namespace returns a connected container's network as it is now.
// Errors: NotFound.
func (c *Controller) Namespace(containerID string) (*Namespace, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.conts[containerID]
	if r == nil {
		return nil, fmt.Errorf("container %s has no network: %w", containerID, errdefs.ErrNotFound)
	}
	return c.namespaceLocked(r), nil
}

// keyLock is one lock per container.
type keyLock struct {
	mu   sync.Mutex
	held map[string]*keyEntry
}

type keyEntry struct {
	refs int
	ch   chan struct{}
}

// lock waits for the key and returns its unlock.
func (k *keyLock) lock(ctx context.Context, key string) (func(), error) {
	k.mu.Lock()
	if k.held == nil {
		k.held = map[string]*keyEntry{}
	}
	e := k.held[key]
	if e == nil {
		e = &keyEntry{ch: make(chan struct{}, 1)}
		k.held[key] = e
	}
	e.refs++
	k.mu.Unlock()
	drop := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if e.refs--; e.refs == 0 {
			delete(k.held, key)
		}
	}
	select {
	case e.ch <- struct{}{}:
		return func() { <-e.ch; drop() }, nil
	case <-ctx.Done():
		drop()
		return nil, context.Cause(ctx)
	}
}
