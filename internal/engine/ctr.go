package engine

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/moby/moby/api/types/events"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/health"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/network"
	"tenon.dev/tenon/internal/task"
)

// ctr is a container that the engine knows.
type ctr struct {
	id string
	op lock // life-cycle operations, one at a time

	offline *offline // for its files, while it does not run on a kernel of its own

	rec atomic.Pointer[container.Record] // published; never changed in place

	saveMu sync.Mutex // held while the record goes to the durable store, so that an older one never overwrites a newer

	mu       sync.Mutex // guards publication of rec and all below
	gone     bool
	run      *run // the current or last one; nil before the first
	waiting  []*pendingAttach
	exitSubs []chan WaitResult
	goneSubs []chan WaitResult
	execs    map[string]*execution
	monitor  *health.Monitor
	network  *network.Namespace // of the current run
	retry    context.CancelFunc // of a restart that waits; nil: none
	noRetry  bool               // the user stopped this run: no restart after it
	backoff  backoff
	guest    *guest             // its machine; nil: the host's kernel, or it does not run
	attached []*task.Attachment // to the current run
	flushing <-chan struct{}    // closed when the last output of the last run is written; nil: it is
	holds    int                // operations that want the container kept in spite of --rm
}

func (c *ctr) hold(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.holds += n
}

func (c *ctr) held() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.holds > 0
}

// run is one time that a container runs.
type run struct {
	n       uint64
	settled chan struct{} // closed when the start has succeeded or failed
	exited  chan struct{} // closed when the exit is recorded
	freed   chan struct{} // closed when its addresses and ports are free
	done    chan struct{} // closed when nothing of it is left in the kernel
	once    sync.Once     // of the exit
}

func newRun(n uint64) *run {
	return &run{n: n, settled: make(chan struct{}), exited: make(chan struct{}), freed: make(chan struct{}), done: make(chan struct{})}
}

// record is the container's as it is now. Read only.
func (c *ctr) record() *container.Record { return c.rec.Load() }

// lock is a mutex that gives up with a context.
type lock chan struct{}

func newLock() lock { return make(lock, 1) }

func (l lock) lock(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	default:
	}
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// try takes the lock if it is free.
func (l lock) try() bool {
	select {
	case l <- struct{}{}:
		return true
	default:
		return false
	}
}

func (l lock) unlock() { <-l }

func newCtr(r *container.Record) *ctr {
	c := &ctr{id: r.ID, op: newLock(), offline: newOffline(), execs: map[string]*execution{}}
	c.rec.Store(r)
	return c
}

// find returns a container by name, ID or unique prefix.
func (e *Engine) find(ref string) (*ctr, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	id, err := e.registry.Lookup(ref)
	if err != nil {
		return nil, err
	}
	c, ok := e.ctrs[id]
	if !ok {
		return nil, notFound("No such container: %s", ref)
	}
	return c, nil
}

// lockOp finds a container and takes its op lock; the container may have gone
// while waiting.
func (e *Engine) lockOp(ctx context.Context, ref string) (*ctr, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	if err := c.op.lock(ctx); err != nil {
		return nil, err
	}
	if c.isGone() {
		c.op.unlock()
		return nil, notFound("No such container: %s", ref)
	}
	return c, nil
}

func (c *ctr) isGone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

func (e *Engine) all() []*ctr {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]*ctr, 0, len(e.ctrs))
	for _, c := range e.ctrs {
		out = append(out, c)
	}
	return out
}

// change publishes and keeps a changed record. f gets a copy. The durable copy
// follows in the background; the volatile one is written when change returns.
func (e *Engine) change(c *ctr, f func(*container.Record)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.record().Clone()
	f(r)
	r.Seq++
	if c.gone {
		return nil
	}
	c.rec.Store(r)
	return e.saver.save(r)
}

// publish changes the record in memory alone, for facts that the kernel or the
// next write holds as well.
func (c *ctr) publish(f func(*container.Record)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.record().Clone()
	f(r)
	r.Seq++
	c.rec.Store(r)
}

// IsolationAttribute, of the events of containers on machines, is their isolation.
const IsolationAttribute = "tenon.isolation"

// emit sends a container's event.
func (e *Engine) emit(c *ctr, action events.Action, attrs map[string]string) {
	r := c.record()
	a := make(map[string]string, len(r.Config.Labels)+len(attrs)+2)
	for k, v := range r.Config.Labels {
		a[k] = v
	}
	a["image"], a["name"] = r.Image.Ref, r.Name
	if delete(a, IsolationAttribute); machine.Named(r.Isolation) != "" {
		a[IsolationAttribute] = r.Isolation
	}
	for k, v := range attrs {
		a[k] = v
	}
	e.cfg.Events.Publish(events.Message{Type: events.ContainerEventType, Action: action, Actor: events.Actor{ID: r.ID, Attributes: a}})
}

// subscribe adds a channel to a list of waiters.
func (c *ctr) subscribe(list *[]chan WaitResult) chan WaitResult {
	ch := make(chan WaitResult, 1)
	*list = append(*list, ch)
	return ch
}

func (c *ctr) unsubscribe(list *[]chan WaitResult, ch chan WaitResult) {
	c.mu.Lock()
	defer c.mu.Unlock()
	*list = slices.DeleteFunc(*list, func(x chan WaitResult) bool { return x == ch })
}

// notify answers all waiters of a list and empties it.
func notifyLocked(list *[]chan WaitResult, r WaitResult) {
	for _, ch := range *list {
		ch <- r // buffered, and only ever sent to once
	}
	*list = nil
}
