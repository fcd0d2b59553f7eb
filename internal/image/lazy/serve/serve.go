// Package serve is the inside of tenon-lazy: it shows lazily read images' EROFS files
// through FUSE, fetches what is read of them and is not here, and does what the daemon
// says over its socket (package lazy has the messages, and the maps).
//
//	serve.go    the server: which chains there are
//	chain.go    one chain's file: what is here, who waits for what
//	fetch.go    fetching and verifying
//	fuse.go     the kernel's side
//	control.go  the daemon's side
//	drop.go     giving up privileges
//
// Every read ends when nothing comes for lazy.StallTimeout, and in lazy.ReadTimeout at
// the latest, with EIO at the worst: nothing here waits without a deadline. Where the
// kernel can (6.15), it ends the connection, so that all readers get an error, if this
// program should not answer at all.
//
// Locks: Server.mu before chain.mu. Neither is held while something is fetched, read
// or written.
package serve

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/lazy"
	"tenon.dev/tenon/internal/image/lazy/remote"
)

const (
	// parallel requests to registries, of one chain.
	parallel = 8
	// memory is what the pieces may take that are fetched at a time, in bytes. One
	// that is larger is fetched alone.
	memory = 256 << 20
	// flushEvery is how soon what has come is brought to the disk and noted.
	flushEvery = 5 * time.Second
)

// Options are a Server's. The zero value is good.
type Options struct {
	// ReadTime is how long a read may take; default lazy.ReadTimeout. StallTime is for
	// how long nothing may come; default lazy.StallTimeout.
	ReadTime, StallTime time.Duration
}

// Server shows chains' files.
type Server struct {
	log    *slog.Logger
	o      Options
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	memory *semaphore.Weighted
	dirty  chan struct{} // something has come

	mu     sync.Mutex
	next   uint64 // node
	names  map[string]*chain
	nodes  map[uint64]*chain
	closed bool
	served []*conn
}

// New makes a server of nothing yet.
func New(log *slog.Logger, o Options) *Server {
	o.ReadTime = cmp.Or(o.ReadTime, lazy.ReadTimeout)
	o.StallTime = cmp.Or(o.StallTime, lazy.StallTimeout)
	ctx, cancel := context.WithCancel(context.Background())
	s := &Server{log: log, o: o, ctx: ctx, cancel: cancel, memory: semaphore.NewWeighted(memory),
		dirty: make(chan struct{}, 1), next: rootNode + 1, names: map[string]*chain{}, nodes: map[uint64]*chain{}}
	s.wg.Add(1)
	go s.flush()
	return s
}

// Close ends what is under way, ServeFUSE too, and notes what has come.
func (s *Server) Close() {
	s.cancel()
	s.mu.Lock()
	s.closed = true
	served := s.served
	s.mu.Unlock()
	for _, c := range served { // nothing begins any more, then
		c.dev.Close()
		<-c.ended
	}
	s.wg.Wait()
	s.mu.Lock()
	all := make([]*chain, 0, len(s.nodes))
	for _, c := range s.nodes {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		c.flush(s.log)
		c.close()
	}
}

// flush brings what has come to the disk, a while after it came.
func (s *Server) flush() {
	defer s.wg.Done()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.dirty:
		}
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(flushEvery):
		}
		s.mu.Lock()
		all := make([]*chain, 0, len(s.nodes))
		for _, c := range s.nodes {
			all = append(all, c)
		}
		s.mu.Unlock()
		for _, c := range all {
			c.flush(s.log)
		}
	}
}

// add shows a chain. The files are the server's from now, whatever happens.
func (s *Server) add(id digest.Digest, blobs []lazy.Blob, access remote.Access, file, mapFile *os.File) (err error) {
	defer func() {
		if err != nil {
			file.Close()
			mapFile.Close()
		}
	}()
	if err := id.Validate(); err != nil || id.Algorithm() != digest.SHA256 {
		return fmt.Errorf("chain %.100q: %w", id, errdefs.ErrInvalidArgument)
	}
	repo, err := remote.New(access)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	s.mu.Lock()
	if old := s.find(id, &st); old != nil {
		had, err := s.againLocked(old, blobs, repo)
		s.mu.Unlock()
		if err != nil {
			return err
		}
		had.Close()
		file.Close()
		mapFile.Close()
		return nil
	}
	s.mu.Unlock()
	c, err := newChain(s, id, blobs, repo, file, mapFile, &st)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if had := s.names[id.Encoded()]; had != nil { // another file, or at the same time
		s.hideLocked(had)
	}
	c.node = s.next
	s.next++
	s.names[id.Encoded()], s.nodes[c.node] = c, c
	return nil
}

// find returns the chain, if it has this file, and even if it is shown no more. Server.mu
// is held, without a break until againLocked: the chain may be freed otherwise.
func (s *Server) find(id digest.Digest, st *unix.Stat_t) *chain {
	for _, c := range s.nodes {
		if c.id == id && c.dev == uint64(st.Dev) && c.ino == st.Ino {
			return c
		}
	}
	return nil
}

// againLocked shows a chain again, and gives it new access. It returns what had that.
func (s *Server) againLocked(c *chain, blobs []lazy.Blob, repo *remote.Repository) (old *remote.Repository, err error) {
	if !slices.Equal(blobs, c.blobs) {
		return nil, fmt.Errorf("chain %s: it is served with other blobs: %w", c.id, errdefs.ErrInvalidArgument)
	}
	c.mu.Lock()
	old = c.repo
	c.repo, c.down = repo, time.Time{}
	c.mu.Unlock()
	name := c.id.Encoded()
	had := s.names[name]
	s.names[name] = c
	if had != nil && had != c {
		s.dropLocked(had)
	}
	return old, nil
}

// remove shows a chain no more.
func (s *Server) remove(id digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.names[id.Encoded()]; c != nil {
		s.hideLocked(c)
	}
}

// hideLocked takes a chain's name away; it stays while it is open or known to the kernel.
func (s *Server) hideLocked(c *chain) {
	if s.names[c.id.Encoded()] == c {
		delete(s.names, c.id.Encoded())
	}
	s.dropLocked(c)
}

// dropLocked frees a chain that nobody can reach any more.
func (s *Server) dropLocked(c *chain) {
	if c.opens > 0 || c.lookups > 0 || s.names[c.id.Encoded()] == c || s.nodes[c.node] != c || s.closed {
		return
	}
	delete(s.nodes, c.node)
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		c.flush(s.log)
		c.close()
	}()
}

// states tells of one chain, or of all that are shown or open.
func (s *Server) states(id digest.Digest) ([]lazy.State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []lazy.State
	for _, c := range s.nodes {
		if (id == "" || c.id == id) && (s.names[c.id.Encoded()] == c || c.opens > 0) {
			st := c.state()
			st.Opens = c.opens
			out = append(out, st)
		}
	}
	if id != "" && len(out) == 0 {
		return nil, fmt.Errorf("chain %s: %w", id, errdefs.ErrNotFound)
	}
	slices.SortFunc(out, func(a, b lazy.State) int { return cmp.Compare(a.ID, b.ID) })
	return out, nil
}

// busy tells whether any file is open.
func (s *Server) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.nodes {
		if c.opens > 0 {
			return true
		}
	}
	return false
}
