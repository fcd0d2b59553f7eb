package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"

	"tenon.dev/tenon/internal/cgroup"
	"tenon.dev/tenon/internal/launch"
	"tenon.dev/tenon/internal/launch/fork"
	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// container is a task: an init process, execs, and what they share.
type container struct {
	shim       *Shim
	id         string
	owner      string
	bundle     string
	autoDelete bool
	log        logs.Sink
	logged     bool // log is one
	group      *cgroup.Group
	external   *external // nil: the plan
	spec       kept
	init       *process

	mu     sync.Mutex
	execs  map[string]*process
	paused bool
	ooms   uint64 // reported so far
	stop   func() // ends the watch for OOM kills
}

// kept is what outlives Create of a spec: a container's memory is counted.
type kept struct {
	seccomp     *specs.LinuxSeccomp
	personality *specs.LinuxPersonality
	hooks       *specs.Hooks
	annotations map[string]string
	uidMaps     []specs.LinuxIDMapping
	gidMaps     []specs.LinuxIDMapping
	oomScoreAdj *int   // the init's; execs have it too
	uid, gid    uint32 // the init's
	ownPids     bool   // has a pid namespace of its own, whose init's end is everyone's
}

func keep(s *specs.Spec) kept {
	k := kept{hooks: s.Hooks, annotations: s.Annotations, oomScoreAdj: s.Process.OOMScoreAdj, uid: s.Process.User.UID, gid: s.Process.User.GID}
	if l := s.Linux; l != nil {
		k.seccomp = l.Seccomp
		k.personality = l.Personality
		k.uidMaps, k.gidMaps = l.UIDMappings, l.GIDMappings
		for _, n := range l.Namespaces {
			if n.Type == specs.PIDNamespace && n.Path == "" {
				k.ownPids = true
			}
		}
	}
	return k
}

// filters lets containers with equal seccomp profiles share one in memory.
type filters struct {
	mu   sync.Mutex
	seed maphash.Seed
	list map[uint64]*specs.LinuxSeccomp
	// known are those in list: most profiles come as the same object again.
	known map[*specs.LinuxSeccomp]bool
}

// maxFilters bounds the table; beyond it, profiles are not shared.
const maxFilters = 256

func (f *filters) one(s *specs.LinuxSeccomp) *specs.LinuxSeccomp {
	if s == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.known[s] {
		return s
	}
	b, err := json.Marshal(s)
	if err != nil {
		return s
	}
	if f.list == nil {
		f.seed, f.list, f.known = maphash.MakeSeed(), map[uint64]*specs.LinuxSeccomp{}, map[*specs.LinuxSeccomp]bool{}
	}
	h := maphash.Bytes(f.seed, b)
	if old := f.list[h]; old != nil {
		if ob, err := json.Marshal(old); err == nil && string(ob) == string(b) {
			return old
		}
		return s
	}
	if len(f.list) < maxFilters {
		f.list[h], f.known[s] = s, true
	}
	return s
}

// noLog discards.
var noLog logs.Sink = (*logs.Writer)(nil)

func openLogFiles(_ string, l *taskv1.Log, onError func(error)) (logs.Sink, error) {
	return logs.Open(logs.Config{
		Driver: l.Driver, Path: l.Path, MaxSize: int64(min(l.MaxSize, 1<<62)), MaxFiles: int(min(l.MaxFiles, 1<<20)),
		Compress: l.Compress, Attrs: l.Attrs,
	}, onError)
}

// createRequest is Create with everything parsed.
type createRequest struct {
	id, bundle       string
	terminal         bool
	spec             *specs.Spec
	rootfs           []launch.Mount
	opts             *taskv1.CreateOptions
	stdin, out, errs string // FIFOs, if not empty
}

// newContainer makes a container whose init is ready to start. On an error
// nothing is left of it.
func (s *Shim) newContainer(r createRequest) (_ *container, err error) {
	c := &container{
		shim: s, id: r.id, owner: r.opts.Owner, bundle: r.bundle, autoDelete: r.opts.AutoDelete,
		execs: map[string]*process{}, log: noLog,
	}
	if r.opts.Runtime != "" {
		c.external = &external{self: s.conf.Self, path: r.opts.Runtime, args: r.opts.RuntimeArgs}
	}
	defer func() {
		if err != nil {
			err = execError("task "+r.id, err)
			_ = c.log.Close()
		}
	}()
	if l := r.opts.Log; l != nil && l.Driver != "" && l.Driver != logs.None {
		sink, err := s.conf.OpenLog(r.id, l, c.logFailed)
		if err != nil {
			return nil, fmt.Errorf("log: %w", err)
		}
		c.log, c.logged = sink, true
	}
	path := s.cgroupPath(r.id, r.spec)
	var res *specs.LinuxResources
	if r.spec.Linux != nil {
		res = r.spec.Linux.Resources
		r.spec.Linux.CgroupsPath = path
	}
	if err := s.recordCgroup(r.id, path); err != nil {
		return nil, err
	}
	if c.group, err = cgroup.Create(path, res, writableGroups(r.spec)...); err != nil {
		s.forgetCgroup(r.id, path)
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	defer func() {
		if err != nil {
			s.removeGroup(c.group)
			s.forgetCgroup(r.id, path)
		}
	}()
	if uid, ok := launch.CgroupOwner(r.spec); ok {
		if err := c.group.Delegate(uid); err != nil {
			return nil, err
		}
	}
	p := newProcess(c, "")
	p.terminal = r.terminal
	p.once = r.opts.StdinOnce
	if r.spec.Process.OOMScoreAdj == nil {
		adj := s.conf.OOMScoreAdj
		r.spec.Process.OOMScoreAdj = &adj
	}
	stdin := r.opts.Stdin || r.stdin != ""
	if p.io, err = newStdio(r.terminal, stdin, c.log); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			p.io.close()
		}
	}()
	owner := keep(r.spec)
	if err := p.io.give(owner.uid, owner.uidMaps); err != nil {
		return nil, err
	}
	if err := p.io.openFIFOs(r.stdin, r.out, r.errs); err != nil {
		return nil, err
	}
	if p.child, err = c.create(p, r); err != nil {
		return nil, err
	}
	c.init = p
	c.spec = keep(r.spec)
	p.io.run()
	if err := p.watch(); err != nil {
		_ = p.child.signal(syscall.SIGKILL) // it is ours and at the barrier
		_, _ = p.child.wait()
		p.child.close()
		return nil, err
	}
	return c, nil
}

// create makes the init's child.
func (c *container) create(p *process, r createRequest) (child, error) {
	if c.external != nil {
		return c.external.create(c, p, r)
	}
	plan, err := launch.Compile(r.spec, launch.Options{Bundle: r.bundle, Rootfs: r.rootfs, Cgroup: c.group, OwnHierarchies: true, Phases: phases(r.spec.Hooks)})
	if err != nil {
		if task.ErrorCode(err) == codes.Unknown {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		return nil, err
	}
	stdio := fork.Stdio{In: p.io.in, Out: p.io.out, Err: p.io.err}
	if r.spec.Hooks != nil {
		stdio.AtPhase = c.hookPhase(r.spec)
	}
	fp, err := fork.Start(plan, stdio)
	if err != nil {
		return nil, err
	}
	for _, w := range fp.Warnings {
		c.shim.log.Warn("container runs with less than asked for", "container", c.id, "warning", w)
	}
	err = c.sendListener(fp, r.spec.Linux, specs.StateCreating)
	if err == nil && fp.Console != nil {
		err = p.io.setConsole(fp.Console)
	}
	if err == nil && r.terminal && (r.opts.ConsoleWidth > 0 || r.opts.ConsoleHeight > 0) {
		err = p.io.resize(r.opts.ConsoleWidth, r.opts.ConsoleHeight)
	}
	if err != nil {
		_ = fp.Signal(syscall.SIGKILL) // it stands at the barrier
		_, _ = fp.Wait()
		_ = fp.Close()
		return nil, err
	}
	return planned{fp}, nil
}

// logFailed reports output that could not be kept.
func (c *container) logFailed(err error) {
	c.shim.log.Error("output could not be kept", "container", c.id, "err", err)
	c.shim.events.Publish(&taskv1.Event{Type: taskv1.Event_LOG_ERROR, Id: c.id, Message: err.Error()})
}

// process returns the init or an exec.
func (c *container) process(execID string) (*process, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.execs[execID]
	if p == nil {
		return nil, fmt.Errorf("exec %s of task %s: %w", execID, c.id, errdefs.ErrNotFound)
	}
	return p, nil
}

func (c *container) isPaused() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.paused
}

// initExited runs before the init's output is drained.
func (c *container) initExited() {
	c.unsettle()
	if !c.spec.ownPids {
		// Nobody else ends what the init left behind.
		if err := c.group.Kill(syscall.SIGKILL); err != nil {
			c.shim.log.Warn("processes left behind were not killed", "container", c.id, "err", err)
		}
	}
}

// oomKilled asks the cgroup whether the kernel killed for memory. It reads one
// small file; the exit waits for it.
func (c *container) oomKilled() bool {
	n, err := c.group.OOMKills()
	if err != nil || n == 0 {
		return false
	}
	c.oomSeen(n)
	return true
}

// oomSeen publishes an event for new kills.
func (c *container) oomSeen(n uint64) {
	c.mu.Lock()
	news := n > c.ooms
	c.ooms = max(n, c.ooms)
	c.mu.Unlock()
	if news {
		c.shim.events.Publish(&taskv1.Event{Type: taskv1.Event_OOM, Id: c.id, OomKilled: true})
	}
}

// settleAfter is when a container counts as one that stays: what a short one
// needs not have is done then.
const settleAfter = 300 * time.Millisecond

// settle has memory saved and OOM kills watched, if the container stays.
func (c *container) settle() {
	ctx, cancel := context.WithCancel(context.Background())
	t := time.AfterFunc(settleAfter, func() {
		shared := c.shim.filters.one(c.spec.seccomp)
		c.mu.Lock()
		c.spec.seccomp = shared
		c.mu.Unlock()
		counts, err := c.group.OOM(ctx)
		if err != nil {
			c.shim.log.Debug("OOM kills are only seen at the exit", "container", c.id, "err", err)
			return
		}
		for n := range counts {
			if n > 0 {
				c.oomSeen(n)
			}
		}
	})
	c.mu.Lock()
	c.stop = func() { t.Stop(); cancel() }
	c.mu.Unlock()
	c.init.mu.Lock()
	gone := c.init.status == taskv1.Status_STATUS_STOPPED
	c.init.mu.Unlock()
	if gone { // it was faster
		c.unsettle()
	}
}

func (c *container) unsettle() {
	c.mu.Lock()
	stop := c.stop
	c.stop = nil
	c.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// writableGroups are the controllers of all v1 hierarchies, for a container that
// may write to control groups (a privileged one): it is shown every hierarchy, of
// which it must have a group of its own, so as not to be shown the host's.
func writableGroups(s *specs.Spec) (list []string) {
	if !slices.ContainsFunc(s.Mounts, func(m specs.Mount) bool { return m.Type == "cgroup" && !slices.Contains(m.Options, "ro") }) {
		return nil
	}
	for _, h := range cgroup.Hierarchies() {
		if !h.V2 {
			list = append(list, strings.Split(h.Controllers, ",")...)
		}
	}
	return list
}
