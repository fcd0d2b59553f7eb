// Package dns is the server that answers containers' questions for names. It
// runs in a process of its own (cmd/tenon-dns), which outlives the daemon and
// keeps what the daemon told it over a unix socket (package wire).
//
// Who asks decides what is seen: a query's source address names the container,
// and the container's networks hold the names. Names of its networks are
// answered here; everything else goes to the host's resolvers or to the
// container's own, unless all its networks are internal.
//
// Concurrency: state is replaced under Server.mu; handlers only read. The
// daemon's protocol package is dns/wire; this package must not be imported by
// the daemon.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/network/dns/wire"
)

// Config of a server; the zero value is useful.
type Config struct {
	// ResolvConf names the host's resolvers. Default /etc/resolv.conf.
	ResolvConf string
	// Port is where to listen on the networks' gateways. Default 53.
	Port int
	// UpstreamPort is the port of the resolvers. Default 53.
	UpstreamPort int
	// Timeout of one question to one resolver. Default 2 s.
	Timeout time.Duration
	Log     *slog.Logger
}

// Server answers questions.
type Server struct {
	cfg  Config
	log  *slog.Logger
	host *resolvConf
	turn atomic.Uint32

	forwards chan struct{} // one token per question that is being forwarded

	mu      sync.RWMutex
	nets    map[string]*network
	conts   map[string]wire.Container
	sources map[netip.Addr]string // address to container
	holds   map[string][]int      // container to sockets that keep its ports
	perSrc  sync.Map              // netip.Addr to *atomic.Int32: questions being forwarded

	lmu       sync.Mutex
	listeners map[netip.Addr]*listener

	cmu      sync.Mutex
	controls map[*control]struct{}
}

// Limits: a container that asks without end must not take the others' answers.
const (
	maxForwards       = 1024
	maxForwardsSource = 128
	maxTCP            = 512
)

type network struct {
	wire.Network
	// names maps a lower-case name to the containers that have it.
	names map[string][]*endpoint
	addrs map[netip.Addr]*endpoint
}

type endpoint struct {
	id     string
	v4, v6 netip.Addr
	name   string
}

// New makes a server that knows nothing yet.
func New(cfg Config) *Server {
	if cfg.ResolvConf == "" {
		cfg.ResolvConf = "/etc/resolv.conf"
	}
	if cfg.Port == 0 {
		cfg.Port = 53
	}
	if cfg.UpstreamPort == 0 {
		cfg.UpstreamPort = 53
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 2 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, log: cfg.Log, host: &resolvConf{path: cfg.ResolvConf}, forwards: make(chan struct{}, maxForwards),
		nets: map[string]*network{}, conts: map[string]wire.Container{}, sources: map[netip.Addr]string{},
		holds: map[string][]int{}, listeners: map[netip.Addr]*listener{}, controls: map[*control]struct{}{}}
}

// Apply changes what the server knows.
func (s *Server) Apply(m wire.Message) error {
	s.mu.Lock()
	relisten := s.applyLocked(m)
	s.mu.Unlock()
	if relisten {
		return s.listen()
	}
	return nil
}

func (s *Server) applyLocked(m wire.Message) (relisten bool) {
	switch m.Op {
	case wire.OpState:
		if m.State == nil {
			return false
		}
		s.nets, s.conts, s.sources = map[string]*network{}, map[string]wire.Container{}, map[netip.Addr]string{}
		for _, n := range m.State.Networks {
			s.setNetLocked(n)
		}
		for _, c := range m.State.Containers {
			s.setLocked(c)
		}
		for id := range s.holds {
			if _, ok := s.conts[id]; !ok {
				s.releaseLocked(id)
			}
		}
		return true
	case wire.OpNet:
		if m.Network == nil {
			return false
		}
		s.setNetLocked(*m.Network)
		return true
	case wire.OpNetDel:
		delete(s.nets, m.ID)
		return true
	case wire.OpSet:
		if m.Container != nil {
			s.delLocked(m.Container.ID)
			s.setLocked(*m.Container)
		}
	case wire.OpDel:
		s.delLocked(m.ID)
		s.releaseLocked(m.ID)
	}
	return false
}

func (s *Server) releaseLocked(id string) {
	for _, fd := range s.holds[id] {
		unix.Close(fd)
	}
	delete(s.holds, id)
}

func (s *Server) setNetLocked(n wire.Network) {
	have := &network{Network: n, names: map[string][]*endpoint{}, addrs: map[netip.Addr]*endpoint{}}
	if old := s.nets[n.ID]; old != nil {
		have.names, have.addrs = old.names, old.addrs
	}
	s.nets[n.ID] = have
}

func (s *Server) setLocked(c wire.Container) {
	s.conts[c.ID] = c
	for _, e := range c.Endpoints {
		n := s.nets[e.Network]
		if n == nil {
			continue
		}
		ep := &endpoint{id: c.ID, v4: e.IPv4, v6: e.IPv6}
		for i, name := range e.Names {
			name = canonical(name)
			if i == 0 {
				ep.name = name
			}
			n.names[name] = append(n.names[name], ep)
		}
		for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
			if a.IsValid() {
				n.addrs[a] = ep
				s.sources[a] = c.ID
			}
		}
	}
}

func (s *Server) delLocked(id string) {
	c, ok := s.conts[id]
	if !ok {
		return
	}
	delete(s.conts, id)
	for _, e := range c.Endpoints {
		for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
			if s.sources[a] == id {
				delete(s.sources, a)
			}
		}
		n := s.nets[e.Network]
		if n == nil {
			continue
		}
		for _, name := range e.Names {
			name = canonical(name)
			var keep []*endpoint
			for _, ep := range n.names[name] {
				if ep.id != id {
					keep = append(keep, ep)
				}
			}
			if n.names[name] = keep; keep == nil {
				delete(n.names, name)
			}
		}
		for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
			if ep := n.addrs[a]; ep != nil && ep.id == id {
				delete(n.addrs, a)
			}
		}
	}
}

// listener is one gateway's address, by UDP and TCP.
type listener struct {
	port    int
	servers []*dns.Server
}

// listen opens and closes listeners so that they match the networks. An
// address that cannot be listened on is reported and tried again next time.
func (s *Server) listen() error {
	s.lmu.Lock()
	defer s.lmu.Unlock()
	want := map[netip.Addr]bool{}
	s.mu.RLock()
	for _, n := range s.nets {
		for _, a := range n.Listen {
			want[a] = true
		}
	}
	s.mu.RUnlock()
	for a, l := range s.listeners {
		if !want[a] {
			l.close()
			delete(s.listeners, a)
		}
	}
	var errs []error
	for a := range want {
		if s.listeners[a] != nil {
			continue
		}
		l, err := s.open(a)
		if err != nil {
			s.log.Warn("cannot listen for names", "addr", a, "err", err)
			errs = append(errs, err)
			continue
		}
		s.listeners[a] = l
	}
	return errors.Join(errs...)
}

// open listens on the address: on the usual port, or, where a program of the
// host has that, on any other (the daemon redirects containers there).
func (s *Server) open(a netip.Addr) (*listener, error) {
	l, err := s.openPort(a, s.cfg.Port)
	for i := 0; i < 10 && errors.Is(err, unix.EADDRINUSE); i++ {
		l, err = s.openPort(a, 0)
	}
	return l, err
}

// ports are the listeners on other ports than the usual one.
func (s *Server) ports() map[netip.Addr]uint16 {
	s.lmu.Lock()
	defer s.lmu.Unlock()
	out := map[netip.Addr]uint16{}
	for a, l := range s.listeners {
		if l.port != s.cfg.Port {
			out[a] = uint16(l.port)
		}
	}
	return out
}

func (s *Server) openPort(a netip.Addr, port int) (*listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		cerr := c.Control(func(fd uintptr) {
			// The bridge's address may come later.
			_ = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
			if a.Is6() {
				_ = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
			}
		})
		return cerr
	}}
	pc, err := lc.ListenPacket(context.Background(), "udp", netip.AddrPortFrom(a, uint16(port)).String())
	if err != nil {
		return nil, err
	}
	at := pc.LocalAddr().String()
	tl, err := lc.Listen(context.Background(), "tcp", at)
	if err != nil {
		pc.Close()
		return nil, err
	}
	handle := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) { s.serve(w, q, a) })
	l := &listener{port: pc.LocalAddr().(*net.UDPAddr).Port, servers: []*dns.Server{
		{PacketConn: pc, Handler: handle, UDPSize: 4096},
		{Listener: &limited{Listener: tl, tokens: make(chan struct{}, maxTCP)}, Handler: handle,
			ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, IdleTimeout: func() time.Duration { return 10 * time.Second }},
	}}
	for _, srv := range l.servers {
		go func() {
			if err := srv.ActivateAndServe(); err != nil && !errors.Is(err, net.ErrClosed) {
				s.log.Warn("listener ended", "addr", a, "err", err)
			}
		}()
	}
	return l, nil
}

func (l *listener) close() {
	for _, srv := range l.servers {
		// Not Shutdown, which waits for questions that are being forwarded.
		if srv.PacketConn != nil {
			_ = srv.PacketConn.Close()
		}
		if srv.Listener != nil {
			_ = srv.Listener.Close()
		}
	}
}

// limited bounds the open connections of a listener: those above it are closed.
type limited struct {
	net.Listener
	tokens chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.tokens <- struct{}{}:
			return &limitedConn{Conn: c, free: sync.OnceFunc(func() { <-l.tokens })}, nil
		default:
			c.Close()
		}
	}
}

type limitedConn struct {
	net.Conn
	free func()
}

func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.free()
	return err
}

// Close stops listening.
func (s *Server) Close() error {
	s.lmu.Lock()
	defer s.lmu.Unlock()
	for a, l := range s.listeners {
		l.close()
		delete(s.listeners, a)
	}
	return nil
}

func (s *Server) String() string { return fmt.Sprintf("dns server with %d networks", len(s.nets)) }
