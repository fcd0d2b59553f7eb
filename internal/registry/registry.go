// Package registry serves the engine's image store as an OCI registry (OCI
// distribution specification 1.1): pull, push (in one piece, in chunks, by mounting a
// blob of another repository), discovery (tags, referrers) and removal of tags,
// manifests and blobs. It keeps nothing of its own but uploads that are under way: what
// is pushed is an image of the engine at once (package image, Repositories).
//
// Use: New makes a Registry, Serve serves it on a listener until its context ends.
//
// Clients are not trusted. Names, tags and digests are checked before anything is
// looked up by them; uploads are known by random names that never become paths, are
// bounded in number, size and time, and leave nothing when they are given up; who sends
// or reads next to nothing is cut off; what a web page makes a browser send is refused.
// Passwords are bcrypt's (an htpasswd file).
package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/client/registryapi"
	"tenon.dev/tenon/internal/image"
)

// Limits, with their reasons.
const (
	maxConns     = 512              // connections at once: each may cost a goroutine and buffers
	maxUploads   = 256              // uploads under way
	maxEach      = 128              // of connections and uploads: those of one address, or user
	maxMemory    = 64 << 20         // manifests that are being read; half of it those of one user
	parseAtOnce  = 2                // manifests that are being looked at
	headerTime   = 20 * time.Second // for a request's header: slow clients hold a connection each
	keepTime     = 2 * time.Minute  // an idle connection
	stallTime    = time.Minute      // in which a transfer must bring or take something
	slowAfter    = 5 * time.Minute  // after which a transfer must be faster than slowRate
	slowRate     = 1 << 10          // bytes a second
	graceTime    = 3 * time.Second  // for requests under way when the registry ends
	maxHeader    = 32 << 10
	maxTags      = 10000 // in one answer
	maxReferrers = 4 << 20
)

// uploadIdle is how long an upload may rest before it is given up, uploadAge how long it
// may take at all.
var (
	uploadIdle = 10 * time.Minute
	uploadAge  = 24 * time.Hour
)

// Repositories is what a Registry serves; *image.Repositories is one.
type Repositories = image.Repositories

// Config configures a Registry.
type Config struct {
	Repositories *Repositories
	// ReadOnly refuses everything but pulls.
	ReadOnly bool
	// Users may be nil: then everybody may do everything.
	Users *Users
	// Local says that only this machine's users reach it. What asks by a name that is
	// neither an address, localhost nor the namespace's is then refused: it is a web page
	// whose name was made to point here (DNS rebinding).
	Local bool
	// OnRequest, if not nil, is told of each request that has been answered. It must
	// not block.
	OnRequest func(Request)
	Log       *slog.Logger
}

// Request is one request that has been answered.
type Request = registryapi.Request

// Registry is an http.Handler. Make it with New.
type Registry struct {
	cfg Config
	log *slog.Logger

	parsing chan struct{} // slots

	mu      sync.Mutex
	uploads map[string]*upload // by ID
	memory  int64              // of manifests that are being read
	own     map[string]int64   // the same by user
	full    time.Time          // when the log was told last that there is no room
	closed  bool
}

// New makes a Registry. Close ends its uploads.
func New(cfg Config) *Registry {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Registry{cfg: cfg, log: cfg.Log, uploads: map[string]*upload{}, own: map[string]int64{}, parsing: make(chan struct{}, parseAtOnce)}
}

// tellFull tells whether the log is to hear again that there is no room: clients bring
// that about, as often as they like.
func (g *Registry) tellFull() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if time.Since(g.full) < time.Minute {
		return false
	}
	g.full = time.Now()
	return true
}

// takeMemory takes, or with less than nothing gives back, memory for a user's manifests;
// false if there is not so much. Without users ("") there is one machine's only.
func (g *Registry) takeMemory(user string, n int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if n > 0 && (g.memory+n > maxMemory || user != "" && g.own[user]+n > maxMemory/2) {
		return false
	}
	g.memory += n
	if g.own[user] += n; g.own[user] == 0 {
		delete(g.own, user)
	}
	return true
}

// CheckExposure refuses an address that would let others than this machine's users
// push without a password, or passwords cross a network in the clear.
func CheckExposure(addr string, users, tls, readOnly bool) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("listen on %q: give ADDRESS:PORT: %w: %w", addr, err, errdefs.ErrInvalidArgument)
	}
	if loopback(host) {
		return nil
	}
	switch {
	case !users && !readOnly:
		return fmt.Errorf("listen on %s: whoever reaches it could push; give --htpasswd, or --read-only: %w", addr, errdefs.ErrInvalidArgument)
	case users && !tls:
		return fmt.Errorf("listen on %s: passwords would cross the network in the clear; give --tls-cert and --tls-key: %w", addr, errdefs.ErrInvalidArgument)
	}
	return nil
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// Serve serves on a listener, which it closes, until ctx ends: then it returns nil,
// with uploads given up and connections closed.
func (g *Registry) Serve(ctx context.Context, l net.Listener, cert *tls.Certificate) error {
	defer g.Close()
	l = &limited{Listener: l, from: map[netip.Addr]int{}}
	srv := &http.Server{
		Handler: g, ReadHeaderTimeout: headerTime, IdleTimeout: keepTime, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
	}
	if cert != nil {
		l = tls.NewListener(l, &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*cert}, NextProtos: []string{"http/1.1"}})
	}
	done := make(chan struct{})
	unhook := context.AfterFunc(ctx, func() {
		defer close(done)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), graceTime)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			_ = srv.Close() // what is left is cut off
		}
	})
	err := srv.Serve(l)
	if !unhook() {
		<-done
		return nil
	}
	_ = srv.Close() // the error that is returned matters more
	return err
}

// Close gives all uploads up.
func (g *Registry) Close() {
	g.mu.Lock()
	all := g.uploads
	g.uploads, g.closed = map[string]*upload{}, true
	g.mu.Unlock()
	for _, u := range all {
		u.end()
	}
}

// limited bounds the connections that are open at once, all together and from one
// address of another machine; more are closed at once.
type limited struct {
	net.Listener

	mu   sync.Mutex
	all  int
	from map[netip.Addr]int
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := address(c.RemoteAddr().String())
		if l.enter(from) {
			return &limitedConn{Conn: c, release: sync.OnceFunc(func() { l.leave(from) })}, nil
		}
		_ = c.Close() // rather than let those wait who have a connection
	}
}

func (l *limited) enter(from netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all >= maxConns || l.from[from] >= maxEach && !from.IsLoopback() {
		return false
	}
	l.all++
	l.from[from]++
	return true
}

func (l *limited) leave(from netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all--
	if l.from[from]--; l.from[from] == 0 {
		delete(l.from, from)
	}
}

// address is that of HOST:PORT, of IPv6 the network: one machine may have all of it.
func address(hostport string) netip.Addr {
	ap, _ := netip.ParseAddrPort(hostport)
	a := ap.Addr().Unmap().WithZone("")
	if a.Is6() && !a.IsLoopback() {
		if p, err := a.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return a
}

type limitedConn struct {
	net.Conn
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// ReadFrom lets the kernel copy files into the socket (sendfile(2)).
func (c *limitedConn) ReadFrom(r io.Reader) (int64, error) {
	if rf, ok := c.Conn.(io.ReaderFrom); ok {
		return rf.ReadFrom(r)
	}
	return io.Copy(struct{ io.Writer }{c.Conn}, r)
}

var errSlow = errors.New("the client has been too slow")

// paced reads a request's body; a client that sends next to nothing meets errSlow.
type paced struct {
	r     io.Reader
	rc    *http.ResponseController
	start time.Time
	until time.Time // zero: any
	n     int64
}

func (p *paced) Read(b []byte) (int, error) {
	_ = p.rc.SetReadDeadline(time.Now().Add(stallTime)) // without one it is as it was
	n, err := p.r.Read(b)
	p.n += int64(n)
	if err == io.EOF {
		_ = p.rc.SetReadDeadline(time.Time{}) // what is done with the body may take longer
	}
	if t := time.Since(p.start); err == nil && t > slowAfter && p.n/int64(t/time.Second) < slowRate {
		err = errSlow
	}
	if err == nil && !p.until.IsZero() && time.Now().After(p.until) {
		err = errSlow
	}
	return n, err
}

// sendStep is how much of a blob is sent under one deadline.
const sendStep = 4 << 20

// send copies n bytes of a file to the client.
func send(w http.ResponseWriter, r io.Reader, n int64) (int64, error) {
	rc := http.NewResponseController(w)
	var sent int64
	for sent < n {
		// At slowRate the step would take an hour; a client must take it within the
		// time that a transfer may be slow.
		_ = rc.SetWriteDeadline(time.Now().Add(slowAfter))
		m, err := io.CopyN(w, r, min(sendStep, n-sent))
		sent += m
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// descriptorOf is what a blob's answer tells of it.
func descriptorOf(d digest.Digest, size int64) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: size}
}
