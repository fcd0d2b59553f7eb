// Package shim is the task server: it starts, watches and stops containers on
// the kernel it runs on, for a daemon that may come and go.
//
// One Shim serves any number of containers: containerd's Task API, Tenon's
// kernel service and stream connections, on one listener. It keeps everything
// that must outlive the daemon: processes' stdio, logs, exit codes, events.
//
// Nouns: a container is a task with its init process and execs (container.go,
// process.go); stdio is a process's standard streams (stdio.go), pumped to the
// log and to a hub of attached clients (hub.go); a child is a process as it was
// made, by a plan (package launch) or by an external OCI runtime (external.go).
//
// Lock order: process.mu before container.mu before Shim.mu; hub.mu and
// client.mu are leaves. No lock but process.mu (while starting) is held across
// a fork, a wait or a write to a client.
//
// An idle container costs a goroutine per output stream, two or three
// descriptors and no buffer, no thread.
package shim

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	taskv3 "tenon.dev/tenon/internal/task/api/v3"

	"tenon.dev/tenon/internal/cgroup"
	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/launch/fork"
	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	"tenon.dev/tenon/internal/task/replay"
)

// Config is what a Shim needs to know.
type Config struct {
	RunDir       string // for bundles and sockets of external runtimes; made as needed
	CgroupParent string // containers' cgroups are CgroupParent/ID unless their spec says otherwise
	Name         string // prefix of names that are seen outside
	Self         string // path by which the program can execute itself (`files`)
	OOMScoreAdj  int    // of processes whose spec has none: not the shim's own, which is protected
	Log          *slog.Logger

	// Quiet is how long nothing must have been made or removed before garbage is
	// collected. 0: a second.
	Quiet time.Duration
	// OpenLog opens a task's log. Nil: the files that the task's options name.
	OpenLog func(id string, o *taskv1.Log, onError func(error)) (logs.Sink, error)
	// Register adds services to the server. Nil: none.
	Register func(*ttrpc.Server)
}

// Shim is a task server.
type Shim struct {
	conf    Config
	log     *slog.Logger
	poll    *poller
	events  *replay.Ring[taskv1.Event]
	filters filters
	served  served
	started time.Time
	ctx     context.Context // ends with the shim
	cancel  context.CancelFunc
	down    chan struct{} // closed by Shutdown
	downOne sync.Once
	work    sync.WaitGroup // all goroutines of its own
	groups  sync.WaitGroup // those of them that remove cgroups

	mu      sync.Mutex
	tasks   map[string]*container
	closing bool // by Shutdown: no new tasks
	tidy    *time.Timer
	tidied  time.Time
	busy    map[string]chan struct{} // IDs whose container is being made or removed
}

// New returns a Shim without tasks.
func New(c Config) (*Shim, error) {
	p, err := newPoller()
	if err != nil {
		return nil, err
	}
	if c.OpenLog == nil {
		c.OpenLog = openLogFiles
	}
	s := &Shim{
		conf: c, log: c.Log, poll: p, events: newRing(), started: time.Now(), down: make(chan struct{}),
		tasks: map[string]*container{}, busy: map[string]chan struct{}{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// Serve answers on l until Shutdown is called or ctx ends; it closes l. Tasks
// that still run then go on, unwatched: a caller that does not exit next must
// have shut them down.
func (s *Shim) Serve(ctx context.Context, l net.Listener) error {
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(task.ServerInterceptor))
	if err != nil {
		return err
	}
	taskv3.RegisterTaskService(srv, &taskService{s})
	taskv1.RegisterKernelService(srv, &kernelService{s})
	if s.conf.Register != nil {
		s.conf.Register(srv)
	}
	s.work.Add(1)
	go func() {
		defer s.work.Done()
		s.reapOrphans()
	}()
	mux := channel.Listen(l, s.serveStream)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, mux) }()
	select {
	case <-ctx.Done():
	case <-s.down:
	case err = <-served:
	}
	s.cancel()
	s.mu.Lock()
	if s.tidy != nil {
		s.tidy.Stop()
	}
	s.mu.Unlock()
	_ = srv.Close()
	if cerr := mux.Close(); err == nil && cerr != nil && !errors.Is(cerr, net.ErrClosed) {
		err = cerr
	}
	s.work.Wait()
	if len(s.list()) == 0 {
		removeParent(s.conf.CgroupParent)
	}
	s.poll.close()
	if errors.Is(err, ttrpc.ErrServerClosed) {
		err = nil
	}
	return err
}

const (
	tidyAfter = time.Second     // of quiet
	tidyEvery = 2 * time.Second // at most
)

// touch is called when something has been made or removed: some time later, if
// it is quiet, garbage is collected and what the Go runtime keeps for reuse goes
// back to the kernel.
func (s *Shim) touch() {
	s.mu.Lock()
	defer s.mu.Unlock()
	wait := max(cmp.Or(s.conf.Quiet, tidyAfter), tidyEvery-time.Since(s.tidied))
	if s.tidy == nil {
		s.tidy = time.AfterFunc(wait, func() {
			s.mu.Lock()
			s.tidied = time.Now()
			s.mu.Unlock()
			fork.FreeMemory()
			debug.FreeOSMemory()
		})
		return
	}
	s.tidy.Reset(wait)
}

// cgroupPath says where a container lives in every hierarchy.
func (s *Shim) cgroupPath(id string, spec *specs.Spec) string {
	if spec.Linux != nil && spec.Linux.CgroupsPath != "" && !strings.Contains(spec.Linux.CgroupsPath, ":") {
		return spec.Linux.CgroupsPath
	}
	return path.Join("/", s.conf.CgroupParent, id)
}

// task returns a container.
func (s *Shim) task(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.tasks[id]
	if c == nil {
		return nil, fmt.Errorf("task %s: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// process returns an init (execID empty) or an exec.
func (s *Shim) process(id, execID string) (*process, error) {
	c, err := s.task(id)
	if err != nil {
		return nil, err
	}
	return c.process(execID)
}

// reserve takes an ID for a new container, waiting for one of the same name
// that is being removed.
func (s *Shim) reserve(ctx context.Context, id string) error {
	for {
		s.mu.Lock()
		if s.closing {
			s.mu.Unlock()
			return fmt.Errorf("task %s: the shim is being shut down: %w", id, errdefs.ErrUnavailable)
		}
		if s.tasks[id] != nil {
			s.mu.Unlock()
			return fmt.Errorf("task %s: %w", id, errdefs.ErrAlreadyExists)
		}
		wait := s.busy[id]
		if wait == nil {
			s.busy[id] = make(chan struct{})
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// idle waits until no container is being made or removed.
func (s *Shim) idle(ctx context.Context) error {
	for {
		s.mu.Lock()
		var wait chan struct{}
		for _, c := range s.busy {
			wait = c
			break
		}
		s.mu.Unlock()
		if wait == nil {
			break
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	gone := make(chan struct{})
	go func() {
		s.groups.Wait()
		close(gone)
	}()
	select {
	case <-gone:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// free ends a reservation, with the container that came of it, if one did.
func (s *Shim) free(id string, c *container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c != nil {
		s.tasks[id] = c
	}
	close(s.busy[id])
	delete(s.busy, id)
}

// take takes a container out of the table; its ID stays reserved.
func (s *Shim) take(c *container) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tasks[c.id] != c {
		return false
	}
	delete(s.tasks, c.id)
	s.busy[c.id] = make(chan struct{})
	return true
}

// list returns all containers.
func (s *Shim) list() []*container {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := make([]*container, 0, len(s.tasks))
	for _, c := range s.tasks {
		l = append(l, c)
	}
	return l
}

// remove frees what a container that was taken has, and publishes its end.
// The cgroup goes in the background if it is busy.
func (s *Shim) remove(c *container) {
	c.unsettle()
	c.mu.Lock()
	execs := c.execs
	c.execs = nil
	c.mu.Unlock()
	for _, p := range execs {
		p.discard()
	}
	if c.external != nil {
		c.external.delete(c)
	}
	c.poststop()
	s.removeGroup(c.group)
	s.forgetCgroup(c.id, c.group.Path())
	s.events.Publish(&taskv1.Event{Type: taskv1.Event_DELETE, Id: c.id, ExitStatus: c.init.code})
	s.free(c.id, nil)
	s.touch()
}

const (
	groupTime  = 200 * time.Millisecond // for a cgroup to become empty, while someone waits
	groupRetry = 5 * time.Second        // between attempts in the background
	groupTries = 60
)

// removeGroup kills what is left in a cgroup and removes it; if it stays busy,
// that goes on in the background.
func (s *Shim) removeGroup(g *cgroup.Group) {
	if removeGroup(s.ctx, g, groupTime) == nil {
		return
	}
	s.work.Add(1)
	s.groups.Add(1)
	go func() {
		defer s.work.Done()
		defer s.groups.Done()
		var err error
		for range groupTries {
			if err = removeGroup(s.ctx, g, groupRetry); err == nil {
				return
			}
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(groupRetry):
			}
		}
		s.log.Error("cgroup stays", "cgroup", g.Path(), "err", err)
	}()
}

func removeGroup(ctx context.Context, g *cgroup.Group, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := g.Delete(ctx)
	if err == nil {
		return nil
	}
	if kerr := g.Kill(9); kerr != nil && !errors.Is(kerr, os.ErrNotExist) {
		err = errors.Join(err, kerr)
	}
	if derr := g.Delete(ctx); derr == nil {
		return nil
	}
	return err
}
